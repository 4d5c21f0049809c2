"""What a training step and a forward of each compressed linear layer take, beside the dense layer that it stands for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.page import Section, main
from benchmarks.timing import Candidate, Comparison, interleaved, ratio_text, threads
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
ONE_BY_ONE = "acdc, 12 factors one after the other"


def measure(quick: bool, rounds: int | None) -> Section:
    """Three subjects, each in training and in inference."""
    width, batches, channels, side = (16, (4, 8), 8, 4) if quick else (1024, (256, 4096), 256, 32)
    rounds = rounds or (2 if quick else 11)
    subjects: dict[str, tuple[nn.Module, dict[str, StructuredLinear], Tensor]] = {
        f"{width} to {width}, batch {batch}": (nn.Linear(width, width), linear_layers(width), torch.randn(batch, width))
        for batch in batches
    }
    images = torch.randn(4 if quick else 16, channels, side, side)
    pointwise = f"pointwise, {channels} channels of {side}×{side}, batch {len(images)}"
    subjects[pointwise] = (nn.Conv2d(channels, channels, 1), pointwise_layers(channels), images)
    tables, verdicts = {}, []
    with threads(1):
        for subject, (dense, layers, x) in subjects.items():
            for task, task_run, goal in (("a training step", train, 1.3), ("inference", infer, None)):
                compared = compare(dense, layers, x, task_run, rounds)
                tables[f"{subject}: {task}"] = compared.table()
                verdicts.append(f"{subject}, {task}: {verdict(compared, list(layers), goal)}")
    return Section(
        question="What does a compressed linear layer cost in time?",
        target="a training step at most 1.3× the dense layer's at batch 4096; inference never slower beyond the spread.",
        tables=tables,
        verdicts=verdicts,
        settings={"threads": 1, "dtype": "float32", "parameters": f"about 1/{SHARE} of the dense layer's"},
    )


def linear_layers(width: int) -> dict[str, StructuredLinear]:
    """Every kind at about the same size; ACDC at the twelve factors of its source, and once more without computing the matrix."""
    return {
        "rank_factorized": RankFactorizedLinear(width, width, rank=width // (2 * SHARE)),
        "hashed": HashedLinear(width, width, weights=width**2 // SHARE, seed=0),
        "tensor_train": TensorTrainLinear(width, width, rank_scale=0.4),
        "tucker": TuckerLinear(width, width, rank_scale=0.4),
        "shuffle": ShuffleLinear(width, width, groups=4),
        "acdc, 12 factors": ACDCLinear(width, width, layers=12),
        ONE_BY_ONE: ACDCLinear(width, width, layers=12, path="factorized"),
    }


def pointwise_layers(channels: int) -> dict[str, StructuredLinear]:
    """The same as convolutions."""
    return {
        "rank_factorized": RankFactorizedConv1x1(channels, channels, rank=max(1, channels // (2 * SHARE))),
        "hashed": HashedConv1x1(channels, channels, weights=channels**2 // SHARE, seed=0),
        "tensor_train": TensorTrainConv1x1(channels, channels, rank_scale=0.4),
        "tucker": TuckerConv1x1(channels, channels, rank_scale=0.4),
        "shuffle": ShuffleConv1x1(channels, channels, groups=4 if channels >= 16 else 1),
        "acdc, 12 factors": ACDCConv1x1(channels, channels, layers=12),
        ONE_BY_ONE: ACDCConv1x1(channels, channels, layers=12, path="factorized"),
    }


def train(layer: nn.Module, x: Tensor) -> None:
    """Forward and backward, down to the gradient of the input, as in the middle of a network."""
    layer.zero_grad()
    layer(x.detach().requires_grad_()).square().mean().backward()


def infer(layer: nn.Module, x: Tensor) -> None:
    """A forward without gradients; the warm-up has computed what is kept from call to call."""
    with torch.no_grad():
        layer(x)


def compare(
    dense: nn.Module,
    layers: dict[str, StructuredLinear],
    x: Tensor,
    run: Callable[[nn.Module, Tensor], None],
    rounds: int,
) -> Comparison:
    """All layers in turns on one input."""
    for layer in (dense, *layers.values()):
        layer.train(run is train)

    def candidate(name: str, layer: nn.Module) -> Candidate:
        return Candidate(name, lambda _: run(layer, x))

    return interleaved(candidate("dense", dense), [candidate(name, layer) for name, layer in layers.items()], rounds=rounds)


def verdict(compared: Comparison, names: list[str], goal: float | None) -> str:
    """Which kinds meet the goal, with the ratio of each that does not."""
    kinds = [name for name in names if name != ONE_BY_ONE]
    ratios = {name: compared[name].ratio(compared.baseline) for name in kinds}
    limit = compared.spread()[1] if goal is None else goal
    slower = [f"{name} {ratio_text(ratio)}×" for name, ratio in ratios.items() if ratio.median > limit]
    met = f"{len(kinds) - len(slower)} of {len(kinds)} kinds take at most {limit:.2f}× the dense layer"
    return f"{met}; not {', '.join(slower)}" if slower else met


if __name__ == "__main__":
    main("linear_layers", measure)
