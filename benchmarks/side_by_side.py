"""Half of the channels of every network of the zoo, taken out by ours and by other tools, and whether what is left is right.

Every tool chooses its channels itself, by magnitude. What it took is read off the weights: their values are random, so those
that are left say which input channels each layer still reads (:func:`kept`). The original with just the other input channels
set to zero, in float64, is what the network left behind must compute. Nothing of the tool, or of our graph, is asked.

Each network and tool have a process of their own, with bounds of time and memory.
"""

from __future__ import annotations

import copy
import multiprocessing
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_map

from benchmarks.page import Section, main
from benchmarks.peers import SHARE, TOOLS, output_layers
from benchmarks.timing import figure, threads
from benchmarks.zoo import ZOO, Specimen
from lit_compress import count_parameters
from lit_compress.graph import in_training
from tests.networks import clone, randomized

EXACT = 1e-9
SECONDS = {"to cut": 120.0, "to judge": 600.0}  # on the wall, for a machine that has other things to do
GIGABYTES = 10
QUICK = ("SE gate", "weight norm", "grouped convolution")

Verdict = Literal["exact", "nothing cut", "wrong", "refused", "crashed", "not installed"]
VERDICTS: tuple[Verdict, ...] = ("exact", "nothing cut", "wrong", "refused", "crashed")


@dataclass(frozen=True)
class Outcome:
    """What a tool made of a network.

    Args:
        verdict: ``"wrong"`` is a network that runs and computes something else, or gives another shape. ``"refused"`` is an error
            that the tool raises on purpose, ``"crashed"`` any other, also of the network that it leaves behind.
        said: What is to be said of it.
        off: Share of the parameters that it took.
        seconds: Of processor time, from the network and its inputs to the smaller network.
    """

    verdict: Verdict
    said: str = ""
    off: float = 0.0
    seconds: float = float("nan")

    def cell(self) -> str:
        """Its cell of the table."""
        took = f", {figure(self.seconds)} s" if self.seconds == self.seconds else ""
        off = f", {100 * self.off:.0f} % off" if self.off else ""
        said = f": {self.said}" if self.said else ""
        return f"{self.verdict if self.verdict == 'exact' else f'**{self.verdict}**'}{said}{off}{took}"


def measure(quick: bool, rounds: int | None) -> Section:
    """Every network and tool once; ``quick`` takes some small networks."""
    outcomes: dict[str, dict[str, Outcome]] = {}
    for name in QUICK if quick else ZOO:
        outcomes[name] = {tool: _found(tool, name) for tool in TOOLS}
        print(_row(name, outcomes[name]), file=sys.stderr, flush=True)
    return section(outcomes)


def section(outcomes: Mapping[str, Mapping[str, Outcome]]) -> Section:
    """The page's section about what became of each network under each tool."""
    tables = {"Networks": _summary(outcomes)}
    for kind in dict.fromkeys(ZOO[name].kind for name in outcomes):
        rows = [_row(name, found) for name, found in outcomes.items() if ZOO[name].kind == kind]
        tables[kind.capitalize()] = "\n".join([f"| network | {' | '.join(TOOLS)} |", "|---" * (len(TOOLS) + 1) + "|", *rows])
    ours, *peers = TOOLS
    versions = {tool: TOOLS[tool].version for tool in peers}
    return Section(
        question="Which networks can other tools cut?",
        target="ours is never wrong and never crashes; where another tool is exact as well, how fast, and how much it takes.",
        tables=tables,
        verdicts=[_ours(ours, outcomes), *(_beside(ours, peer, outcomes) for peer in peers)],
        settings={"share of the channels to take": SHARE, "threads": 1, **versions},
    )


def _row(name: str, found: Mapping[str, Outcome]) -> str:
    return f"| {name} | {' | '.join(outcome.cell() for outcome in found.values())} |"


def _summary(outcomes: Mapping[str, Mapping[str, Outcome]]) -> str:
    lines = [f"| tool | {' | '.join(VERDICTS)} | median time of the exact, s |", "|---|" + "---:|" * (len(VERDICTS) + 1)]
    for tool in TOOLS:
        found = [by[tool] for by in outcomes.values()]
        counts = [str(sum(outcome.verdict == verdict for outcome in found)) for verdict in VERDICTS]
        seconds = [outcome.seconds for outcome in found if outcome.verdict == "exact"]
        if TOOLS[tool].missing:
            counts = ["not installed", *[""] * (len(VERDICTS) - 1)]
        lines.append(f"| {tool} | {' | '.join(counts)} | {figure(statistics.median(seconds)) if seconds else ''} |")
    return "\n".join(lines)


def _ours(ours: str, outcomes: Mapping[str, Mapping[str, Outcome]]) -> str:
    bad = [name for name, found in outcomes.items() if found[ours].verdict in ("wrong", "crashed")]
    return f"ours is never wrong and never crashes: {'NOT met by ' + _listed(bad) if bad else 'met'}"


def _beside(ours: str, peer: str, outcomes: Mapping[str, Mapping[str, Outcome]]) -> str:
    """Where both are exact: whose time and whose cut is the smaller. What it is better at comes last."""
    both = {name: found for name, found in outcomes.items() if found[ours].verdict == found[peer].verdict == "exact"}
    if not both:
        return f"{peer}: no network is cut exactly by both"
    faster = [name for name, found in both.items() if found[peer].seconds < found[ours].seconds]
    ratio = statistics.median(found[ours].seconds / found[peer].seconds for found in both.values())
    more = [name for name, found in both.items() if found[peer].off > found[ours].off + 0.01]
    alone = [name for name, found in outcomes.items() if found[peer].verdict == "exact" and found[ours].verdict != "exact"]
    return (
        f"{peer}: of {len(both)} networks that both cut exactly, it takes less time on {len(faster)} (ours takes {figure(ratio)} "
        f"times as long in the median), and more parameters on {_listed(more)}; it alone is exact on {_listed(alone)}"
    )


def _listed(names: Sequence[str]) -> str:
    return f"{len(names)} ({', '.join(names)})" if names else "none"


# ---------------------------------------------------------------- a process each


def _found(tool: str, name: str) -> Outcome:
    return Outcome("not installed") if TOOLS[tool].missing else in_a_process(_tried, tool, name)


def in_a_process(work: Callable[..., None], *arguments: Any) -> Outcome:
    """What comes of some work in a process that may hang, die or ask for too much memory.

    Args:
        work: Called with the arguments and a connection, over which it sends the seconds that a tool took, and then the outcome.
        arguments: For ``work``.
    """
    context = multiprocessing.get_context("forkserver")  # which imports PyTorch once
    context.set_forkserver_preload(["benchmarks.zoo", "benchmarks.peers", "lit_compress.analysis"])
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(*arguments, sending))
    process.start()
    sending.close()
    seconds = float("nan")
    try:
        for step, limit in SECONDS.items():
            if not receiving.poll(limit):
                return Outcome("crashed", f"more than {limit:g} s {step}", seconds=seconds)
            answer = receiving.recv()
            if isinstance(answer, Outcome):
                return answer
            seconds = answer
        raise RuntimeError(f"{work} is to send an outcome after {len(SECONDS)} steps at most.")
    except EOFError:
        process.join()
        return Outcome("crashed", f"its process died with status {process.exitcode}", seconds=seconds)
    finally:
        process.kill()
        process.join()


def _tried(tool: str, name: str, sending: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (GIGABYTES * 2**30,) * 2)
    sending.send(judged(tool, ZOO[name], sending.send))


def judged(tool: str, specimen: Specimen, cut_after: Callable[[float], None] = lambda seconds: None) -> Outcome:
    """Let a tool cut a network, and hold what is left against the original.

    Args:
        tool: Key of :data:`~benchmarks.peers.TOOLS`.
        specimen: The network.
        cut_after: Called with the seconds of processor time that the tool took.
    """
    torch.manual_seed(0)
    inputs, original = specimen.inputs(specimen.size), randomized(specimen.build()).eval()
    pruned = copy.deepcopy(original)
    for module in TOOLS[tool].modules:
        import_module(module)
    with threads(1):
        leave = output_layers(specimen, pruned.requires_grad_(True), inputs)  # all of it, since others follow autograd's graph
        start = time.process_time()
        try:
            TOOLS[tool].prune(specimen, pruned, inputs, leave)
        except Exception as error:  # whatever it is, the row says so
            return Outcome(_kind(error, TOOLS[tool].package), _brief(error))
        seconds = time.process_time() - start
        cut_after(seconds)
        off = 1 - count_parameters(pruned) / count_parameters(original)
        if off == 0:
            return Outcome("nothing cut", seconds=seconds)
        verdict, said = compared(original, pruned.eval(), specimen, inputs)
    return Outcome(verdict, said, off, seconds)


def _kind(error: Exception, package: str) -> Verdict:
    """An error that the tool's own code raises on purpose is a refusal; what it runs into is a crash."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    own = f"/{package}/" in frame.filename
    return "refused" if own and (frame.line or "").startswith("raise") else "crashed"


def _brief(error: Exception, most: int = 100) -> str:
    text = " ".join(str(error).replace("|", "/").split())
    return f"{type(error).__name__}: {text[:most]}{'…' if len(text) > most else ''}"


# ---------------------------------------------------------------- whether it is right


def compared(original: nn.Module, pruned: nn.Module, specimen: Specimen, inputs: Any) -> tuple[Verdict, str]:
    """Whether a network computes what the original does without the input channels that it no longer reads.

    Returns:
        Verdict, and what is to be said of it.
    """
    try:
        expected = without_unread(original, pruned)
    except ValueError as error:
        return "wrong", str(error)
    inputs = tree_map(lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, inputs)
    pruned = pruned.double()
    for mode in ["", " in training mode"] if specimen.trains else [""]:
        run = partial(_outputs, specimen, inputs, bool(mode))
        try:
            found = run(pruned)
        except Exception as error:
            return "crashed", f"the network left does not run{mode}: {_brief(error)}"
        if (fault := _fault(found, run(expected))) is not None:
            return "wrong", f"{fault}{mode}"
    return "exact", ""


def _outputs(specimen: Specimen, inputs: Any, training: bool, model: nn.Module) -> list[Tensor]:
    with torch.no_grad(), in_training(model, [""]) if training else nullcontext():
        return clone(specimen.run(model, inputs))


def _fault(found: Sequence[Tensor], expected: Sequence[Tensor]) -> str | None:
    """What differs most, as a share of the largest value expected of that output; None if nothing does."""
    worst = 0.0
    for actual, wanted in zip(found, expected, strict=True):
        if actual.shape != wanted.shape:
            return f"shape {tuple(actual.shape)} instead of {tuple(wanted.shape)}"
        if not wanted.numel():
            continue
        difference = (actual - wanted).abs().max() / wanted.abs().max()
        worst = max(worst, float("inf") if difference != difference else float(difference))
    return None if worst < EXACT else f"differs by {worst:.0e}"


def without_unread(original: nn.Module, pruned: nn.Module) -> nn.Module:
    """A copy of a network, in float64, in which weights of input channels that a pruned one lacks are zero.

    Raises:
        ValueError: If a weight is no part of the original's, or its module is gone.
    """
    expected, left = copy.deepcopy(original), dict(pruned.named_modules())
    with torch.no_grad():
        for path, module in expected.named_modules():
            for name, dim in _read_along(module):
                weight = getattr(module, name)
                try:
                    stays = kept(weight, getattr(left[path], name))[dim]
                except (KeyError, ValueError):
                    raise ValueError(f"the weights of '{path}' are others than before") from None
                if parametrize.is_parametrized(module, name):
                    parametrize.remove_parametrizations(module, name)
                silent = torch.zeros(weight.shape[dim], dtype=weight.dtype).index_fill(0, stays, 1)
                shape = [-1 if along == dim else 1 for along in range(weight.ndim)]
                setattr(module, name, nn.Parameter(weight * silent.view(shape)))  # by itself, where it was tied
    return expected.double()


def _read_along(module: nn.Module) -> Iterator[tuple[str, int]]:
    """The weights of a module that end channels, and their dimension of input channels."""
    if isinstance(module, nn.modules.conv._ConvNd):
        yield "weight", 0 if module.transposed else 1
    elif isinstance(module, nn.Linear):
        yield "weight", 1
    elif isinstance(module, nn.MultiheadAttention):
        yield "in_proj_weight", 1
    elif isinstance(module, nn.RNNBase):
        yield from ((name, 1) for name, _ in module.named_parameters() if name.startswith("weight"))


def kept(whole: Tensor, left: Tensor) -> list[Tensor]:
    """For each dimension, the indices of a tensor that a part of it holds, told by up to 64 values each.

    Where one of them is found elsewhere as well, the others outvote it.

    Raises:
        ValueError: If it is no such part.
    """
    if whole.shape == left.shape and torch.equal(whole, left):
        return [torch.arange(size) for size in whole.shape]
    if whole.ndim != left.ndim or not left.numel():
        raise ValueError(f"A tensor of shape {tuple(left.shape)} is no part of one of shape {tuple(whole.shape)}.")
    values, order = whole.flatten().sort()
    found, part = [], whole
    for dim in range(whole.ndim):
        held = left.movedim(dim, 0).flatten(1)
        some = held[:, torch.linspace(0, held.shape[1] - 1, min(held.shape[1], 64)).long()]
        place = order[torch.searchsorted(values, some).clamp(max=len(values) - 1)]
        found.append(torch.unravel_index(place, whole.shape)[dim].mode(1).values)
        part = part.index_select(dim, found[-1])
    if not torch.equal(part, left):
        raise ValueError(f"A tensor of shape {tuple(left.shape)} holds other values than the one of shape {tuple(whole.shape)}.")
    return found


if __name__ == "__main__":
    main("side_by_side", measure)
