"""Which networks are cut, how far, and whether exactly; writes docs/supported-networks.md."""

from __future__ import annotations

import multiprocessing
import re
import resource
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_map

from benchmarks.page import ROOT, Section, main
from benchmarks.timing import figure, threads
from benchmarks.zoo import QUICK, ZOO
from lit_compress.graph import ChannelGraph, in_training, trace
from lit_compress.labels import FIXED
from lit_compress.surgery import cut
from tests.networks import clone, places, random_recipe, randomized, relative_error, removed_by, silenced

PAGE = ROOT / "docs" / "supported-networks.md"
EXACT = 1e-9
GIGABYTES = 2.0


@dataclass(frozen=True)
class Outcome:
    """What became of a network.

    Args:
        name: As in the zoo.
        groups: Groups of channels, each of which lost a random half or so.
        free: Output channels of all layers that may be cut.
        channels: Output channels of all layers.
        whole: What is left whole, to why.
        trace: Seconds of one core.
        cut: Seconds of one core, the self-check included.
        memory: Largest memory of the process when the trace was done, in GB.
        error: Largest relative error of the cut network's outputs in float64, against zeroing.
        failure: What was raised instead.
    """

    name: str
    groups: int = 0
    free: int = 0
    channels: int = 0
    whole: tuple[str, ...] = ()
    trace: float = 0.0
    cut: float = 0.0
    memory: float = 0.0
    error: float = float("nan")
    failure: str = ""

    @property
    def exact(self) -> bool:
        """Whether the cut was made, and right."""
        return self.error < EXACT

    def row(self) -> str:
        """Its line of the table."""
        result = f"{self.error:.0e}" if self.exact else f"**{self.failure or f'wrong by {self.error:.0e}'}**"
        if self.exact and not self.groups:
            result = "nothing is cut"
        whole = "<br>".join(self.whole)
        return (
            f"| {self.name} | {self.groups} | {self.free} of {self.channels} | {whole} | {figure(self.trace)} | "
            f"{figure(self.cut)} | {self.memory:.1f} | {result} |"
        )


def measure(quick: bool, rounds: int | None) -> Section:
    """The zoo, each network in a process of its own; ``quick`` takes the small ones, here."""
    sizes = QUICK if quick else {name: specimen.size for name, specimen in ZOO.items()}
    if quick:
        outcomes = [observed(name, size) for name, size in sizes.items()]
    else:
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            outcomes = [_said(outcome) for outcome in pool.imap(_observed, sizes.items())]
    return section(outcomes)


def section(outcomes: Iterable[Outcome]) -> Section:
    """The page's section about these networks."""
    outcomes = list(outcomes)
    tables: dict[str, list[str]] = {}
    for outcome in outcomes:
        tables.setdefault(ZOO[outcome.name].kind.capitalize(), [_HEAD]).append(outcome.row())
    inexact = [outcome.name for outcome in outcomes if not outcome.exact]
    slow = [outcome.name for outcome in outcomes if outcome.trace > ZOO[outcome.name].bound]
    large = [outcome.name for outcome in outcomes if outcome.memory > GIGABYTES]
    return Section(
        question="What is cut?",
        target=f"every group that is cut is exact, with a relative error below {EXACT:.0e} in float64; a trace takes at most 2 s "
        f"for a classification network and 10 s for a detector, on one core, in less than {GIGABYTES:.0f} GB.",
        tables={kind: "\n".join(rows) for kind, rows in tables.items()},
        verdicts=[
            _verdict("the cut of every network is exact", inexact),
            _verdict("every trace is in its bound of time", slow),
            _verdict("every trace is in its bound of memory", large),
        ],
        settings={"threads": 1, "batch size": "1 (2 for couplings and conventions)"},
    )


_HEAD = (
    "| network | groups cut | channels free | left whole, and why | trace, s | cut, s | memory, GB | error |\n"
    "|---|---|---|---|---|---|---|---|"
)


def _verdict(claim: str, but: list[str]) -> str:
    return f"{claim}: NOT met by {', '.join(but)}" if but else f"{claim}: met"


def _observed(item: tuple[str, int]) -> Outcome:
    return observed(*item)


def _said(outcome: Outcome) -> Outcome:
    print(outcome.row(), file=sys.stderr, flush=True)
    return outcome


def observed(name: str, size: int) -> Outcome:
    """Trace a network, cut a random half of each group, and hold it against zeroing in float64.

    Args:
        name: As in the zoo.
        size: Height and width of images, in pixels.
    """
    specimen = ZOO[name]
    inputs = specimen.inputs(size)

    def built() -> Any:
        torch.manual_seed(0)
        return randomized(specimen.build()).eval()

    with threads(1):
        model = built()
        start = time.process_time()
        graph = trace(model, lambda: specimen.run(model, inputs))
        traced = time.process_time() - start
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB, on Linux
        groups = graph.groups()
        start = time.process_time()
        try:
            plan = cut(model, random_recipe(groups, seed=0, share=1.0), inputs, forward_fn=specimen.run, graph=graph)
        except ValueError as error:
            return Outcome(name, len(groups), *free_channels(graph), left_whole(graph), traced, memory=memory, failure=str(error))
        seconds = time.process_time() - start
        model, uncut = model.double(), built().double()
        inputs = tree_map(lambda t: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t, inputs)
        run = partial(_run, specimen.run, graph.trained, inputs)
        with torch.no_grad():
            expected = silenced(uncut, places(uncut, removed_by(plan), run, sizes=(30.0, -30.0)), run)
            error = relative_error(clone(run(model)), expected)
    return Outcome(name, len(groups), *free_channels(graph), left_whole(graph), traced, seconds, memory, error)


def _run(run: Any, trained: tuple[str, ...], inputs: Any, model: torch.nn.Module) -> list[Any]:
    """In evaluation, and with what runs in training only."""
    outputs = [run(model, inputs)]
    if trained:
        with in_training(model, trained):
            outputs.append(run(model, inputs))
    return outputs


def free_channels(graph: ChannelGraph) -> tuple[int, int]:
    """How many output channels of layers may be cut, and of how many."""
    made = [channel for layer in graph.layers.values() if layer.own for channel in layer.classes.tolist()]
    return sum(channel != FIXED and channel not in graph.frozen for channel in made), len(made)


def left_whole(graph: ChannelGraph, most: int = 5) -> tuple[str, ...]:
    """Layers with channels that stay, those of one reason in one line."""
    alike: dict[str, list[tuple[str, str]]] = {}
    found = {name: why for name, layer in graph.layers.items() if layer.own and (why := graph.why_whole(name))}
    for name, why in {**found, **graph.refused}.items():
        alike.setdefault(re.sub(r"'[^']*'|\(\d[^)]*\)", "", why), []).append((name, why))
    lines = []
    for (name, why), *others in alike.values():
        lines.append(f"`{name}`{f' and {len(others)} more' if others else ''}: {why}")
    return tuple(lines[:most] + ([f"and {len(lines) - most} reasons more"] if len(lines) > most else []))


if __name__ == "__main__":
    main("supported_networks", measure, page=PAGE)
