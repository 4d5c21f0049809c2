"""What a training step and a forward of each compressed linear layer take, beside the dense layer and other people's layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks.allocation import allocated
from benchmarks.linear_peers import linear_peers, pointwise_peers, versions
from benchmarks.page import Section, main
from benchmarks.timing import CPU, Candidate, Comparison, interleaved, ratio_text, threads
from lit_compress.layers import (
    ACDCConv1x1,
    ACDCLinear,
    HashedConv1x1,
    HashedLinear,
    RankFactorizedConv1x1,
    RankFactorizedLinear,
    ShuffleConv1x1,
    ShuffleLinear,
    StructuredLinear,
    TensorTrainConv1x1,
    TensorTrainLinear,
    TuckerConv1x1,
    TuckerLinear,
)

SHARE = 8  # of the dense parameters, one in so many is kept, as far as the kind allows
# Kinds that have a peer of the same form, and how the peers' names begin or end.
PEERS = {"tensor_train": "tensor train", "tucker": "Tucker", "acdc": "ACDC"}
TRAINING, INFERENCE = "a training step", "inference"


def measure(quick: bool, rounds: int | None, device: torch.device = CPU) -> Section:
    """Three subjects, each in training and in inference."""
    width, batches, channels, side = (16, (4, 8), 16, 4) if quick else (1024, (256, 4096), 256, 32)
    rounds = rounds or (2 if quick else 5)
    ours, pointwise = linear_layers(width), pointwise_layers(channels)
    theirs = linear_peers(width, 1 / SHARE, ours["tensor_train"], ours["tucker"], ours["acdc"])  # type: ignore[arg-type]
    their_pointwise = pointwise_peers(
        channels, 1 / SHARE, pointwise["tensor_train"], pointwise["tucker"], pointwise["acdc"]  # type: ignore[arg-type]
    )  # fmt: skip
    images = torch.randn(4 if quick else 16, channels, side, side)
    subjects = [
        Subject(f"{width} to {width}, batch {batch}", nn.Linear(width, width), ours, theirs, torch.randn(batch, width))
        for batch in batches
    ]
    title = f"pointwise, {channels} channels of {side}×{side}, batch {len(images)}"
    subjects.append(Subject(title, nn.Conv2d(channels, channels, 1), pointwise, their_pointwise, images))
    tables, verdicts = {}, []
    with threads(1):
        for subject in (subject.to(device) for subject in subjects):
            for task, run, goal in ((TRAINING, train, 1.3), (INFERENCE, infer, None)):
                compared = compare(subject, run, rounds)
                tables[f"{subject.title}: {task}"] = compared.table()
                cpu = device == CPU  # a GPU's time is on the wall alone
                verdicts.append(f"{subject.title}, {task}: {verdict(compared, list(subject.ours), goal, cpu=cpu)}")
                verdicts.append(f"{subject.title}, {task}: {against_peers(compared, subject, cpu=cpu)}")
            table, sentence = memory(subject)
            tables[f"{subject.title}: parameters, and memory that a training step allocates"] = table
            verdicts.append(f"{subject.title}, {sentence}")
    return Section(
        question="What does a compressed linear layer cost in time and memory?",
        target="a training step at most 1.3× the dense layer's at batch 4096, inference never slower beyond the spread, faster "
        "than every peer; memory of a step at most the dense layer's and 10 % more. Ratios are of CPU seconds.",
        tables=tables,
        verdicts=verdicts,
        settings={"threads": 1, "dtype": "float32", "parameters": f"about 1/{SHARE} of the dense layer's", **versions()},
    )


@dataclass(frozen=True)
class Subject:
    """A dense layer, what stands for it, and an input; peers are None where they are not installed."""

    title: str
    dense: nn.Module
    ours: dict[str, StructuredLinear]
    theirs: dict[str, nn.Module | None]
    x: Tensor

    def to(self, device: torch.device) -> Subject:
        """The same, all of it on a device."""
        for module in self.modules().values():
            module.to(device)
        return replace(self, x=self.x.to(device))

    def modules(self) -> dict[str, nn.Module]:
        """All that is there."""
        return {"dense": self.dense, **self.ours, **{name: module for name, module in self.theirs.items() if module is not None}}


def linear_layers(width: int) -> dict[str, StructuredLinear]:
    """Every kind at about the same size; ACDC at the twelve factors of its source."""
    return {
        "rank_factorized": RankFactorizedLinear(width, width, rank=width // (2 * SHARE)),
        "hashed": HashedLinear(width, width, weights=width**2 // SHARE, seed=0),
        "tensor_train": TensorTrainLinear(width, width, rank_scale=0.4),
        "tucker": TuckerLinear(width, width, rank_scale=0.4),
        "shuffle": ShuffleLinear(width, width, groups=4),
        "acdc": ACDCLinear(width, width, layers=12),
    }


def pointwise_layers(channels: int) -> dict[str, StructuredLinear]:
    """The same as convolutions."""
    return {
        "rank_factorized": RankFactorizedConv1x1(channels, channels, rank=max(1, channels // (2 * SHARE))),
        "hashed": HashedConv1x1(channels, channels, weights=channels**2 // SHARE, seed=0),
        "tensor_train": TensorTrainConv1x1(channels, channels, rank_scale=0.4),
        "tucker": TuckerConv1x1(channels, channels, rank_scale=0.4),
        "shuffle": ShuffleConv1x1(channels, channels, groups=4 if channels >= 16 else 1),
        "acdc": ACDCConv1x1(channels, channels, layers=12),
    }


def train(layer: nn.Module, x: Tensor) -> None:
    """Forward and backward, down to the gradient of the input, as in the middle of a network."""
    layer.zero_grad()
    layer(x.detach().requires_grad_()).square().mean().backward()


def infer(layer: nn.Module, x: Tensor) -> None:
    """A forward without gradients; the warm-up has computed what is kept from call to call."""
    with torch.no_grad():
        layer(x)


def compare(subject: Subject, run: Callable[[nn.Module, Tensor], None], rounds: int) -> Comparison:
    """All layers in turns on one input."""
    for module in subject.modules().values():
        module.train(run is train)

    def candidate(name: str, module: nn.Module | None) -> Candidate:
        if module is None:
            return Candidate(name, lambda _: None, missing="not installed")
        return Candidate(name, lambda _: run(module, subject.x))

    candidates = [candidate(name, module) for name, module in {**subject.ours, **subject.theirs}.items()]
    return interleaved(candidate("dense", subject.dense), candidates, rounds=rounds)


def verdict(compared: Comparison, names: list[str], goal: float | None, *, cpu: bool) -> str:
    """Which kinds meet the goal, with the ratio of each that does not."""
    ratios = {name: compared[name].ratio(compared.baseline, cpu=cpu) for name in names}
    limit = compared.spread(cpu=cpu)[1] if goal is None else goal
    slower = [f"{name} {ratio_text(ratio)}×" for name, ratio in ratios.items() if ratio.median > limit]
    met = f"{len(names) - len(slower)} of {len(names)} kinds take at most {limit:.2f}× the dense layer"
    return f"{met}; not {', '.join(slower)}" if slower else met


def against_peers(compared: Comparison, subject: Subject, *, cpu: bool) -> str:
    """Which kinds are at least as fast as every peer of their form."""
    parts = []
    for kind, form in PEERS.items():
        for peer, module in subject.theirs.items():
            if module is not None and form in peer:
                parts.append(f"{kind} takes {ratio_text(compared[kind].ratio(compared[peer], cpu=cpu))}× {peer}")
    return "; ".join(parts) or "no peer is installed"


def memory(subject: Subject) -> tuple[str, str]:
    """Table of parameters and of the most bytes that a training step holds at once, and which kinds take 10 % more than dense."""
    lines = ["| what | parameters | at once, MiB | × dense |", "|---|---:|---:|---:|"]
    peaks: dict[str, float] = {}
    for name, module in subject.modules().items():
        module.train()
        train(module, subject.x)  # gradients of parameters are there from now on
        peaks[name] = allocated(lambda module=module: train(module, subject.x), subject.x.device)  # type: ignore[misc]
        parameters = sum(parameter.numel() for parameter in module.parameters())
        lines.append(f"| {name} | {parameters} | {peaks[name]:.3g} | {peaks[name] / peaks['dense']:.2f} |")
    more = [f"{name} {peaks[name] / peaks['dense']:.2f}×" for name in subject.ours if peaks[name] > 1.1 * peaks["dense"]]
    met = f"memory of a step: {len(subject.ours) - len(more)} of {len(subject.ours)} kinds take at most 1.10× the dense layer's"
    return "\n".join(lines), f"{met}; not {', '.join(more)}" if more else met


if __name__ == "__main__":
    main("linear_layers", measure)
