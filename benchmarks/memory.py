"""Memory of an analysis over more and more samples: it must not grow."""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from benchmarks.analysis_pass import evaluation_pass, kept_responses
from benchmarks.page import ROOT, Section, main
from benchmarks.subjects import observations, resnet56
from benchmarks.timing import threads
from lit_compress import analyze
from lit_compress.graph import ChannelGraph, trace

# What a process of its own runs on a network, batches and the network's graph.
KINDS: dict[str, Callable[[nn.Module, Iterable[Tensor], ChannelGraph], object]] = {
    "plain evaluation pass": lambda net, batches, graph: evaluation_pass(net, batches),
    "analyze": lambda net, batches, graph: analyze(net, batches),
    "keeping all responses, then torch.cov": lambda net, batches, graph: kept_responses(net, batches, *observations(graph)),
}


class Images:
    """Random images of CIFAR's shape, made when they are asked for; notes this process's peak memory on the way.

    Args:
        marks: Numbers of samples after which to note it, ascending; the last is how many there are.
        batch: Samples in a batch, a divisor of each mark.
    """

    def __init__(self, marks: Sequence[int], batch: int) -> None:
        self.marks, self.batch = marks, batch
        self.peaks: list[float] = []

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        for start in range(0, self.marks[-1], self.batch):
            yield torch.randn(self.batch, 3, 32, 32, generator=generator)
            if start + self.batch in self.marks:  # that many have been worked on, as the next are asked for
                self.peaks.append(peak())


def measure(quick: bool, rounds: int | None) -> Section:
    """Peak memory of processes of their own, on the way through one pass and at its end."""
    name = resnet56(quick=quick).name
    marks, batch = ((32, 128), 16) if quick else ((512, 2048, 8192), 128)
    peaks: dict[str, list[list[float]]] = {kind: [] for kind in KINDS}
    again = "plain evaluation pass, again"
    order = [*KINDS, again]
    peaks[again] = []
    # In one process, the figures mean nothing; but PyTorch need not be loaded four times.
    peaks_in = peaks_of if quick else peaks_in_a_process
    for number in range(rounds or (1 if quick else 3)):
        for kind in order if number % 2 == 0 else order[::-1]:
            peaks[kind].append(peaks_in(kind.removesuffix(", again"), marks, batch, quick))
    rows = [
        "| what | "
        + " | ".join(f"peak after {mark} samples, MiB" for mark in marks)
        + " | at the end | growth, MiB (least–most) |",
        "|---|" + "---:|" * (len(marks) + 2),
    ]
    growths = {}
    for kind in order:
        medians = [statistics.median(column) for column in zip(*peaks[kind], strict=True)]
        growth = [run[-1] - run[0] for run in peaks[kind]]
        growths[kind] = statistics.median(growth)
        cells = [kind, *(f"{median:.0f}" for median in medians), f"{growths[kind]:.1f} ({min(growth):.1f}–{max(growth):.1f})"]
        rows.append("| " + " | ".join(cells) + " |")
    return Section(
        question="Does an analysis need more memory for more samples?",
        target="constant in the number of samples.",
        tables={f"Median of {len(peaks['analyze'])} processes each": "\n".join(rows)},
        verdicts=[
            f"growth from {marks[0]} samples to the end of {marks[-1]}: {growths['analyze']:.1f} MiB with `analyze`, "
            f"{growths['plain evaluation pass']:.1f} MiB in a plain evaluation pass, and "
            f"{growths['keeping all responses, then torch.cov']:.1f} MiB if every channel's spatial max is kept"
        ],
        settings={"network": name, "batch size": batch, "threads": 1},
    )


def peak() -> float:
    """The most memory that this process has had so far, in MiB."""
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def peaks_of(kind: str, marks: Sequence[int], batch: int, quick: bool) -> list[float]:
    """This process's peak memory in MiB after so many samples of a pass, and when it has ended."""
    _, net, example = resnet56(quick=quick)
    images = Images(marks, batch)
    with threads(1):
        KINDS[kind](net, images, trace(net, lambda: net(example)))
    return [*images.peaks, peak()]


def peaks_in_a_process(kind: str, marks: Sequence[int], batch: int, quick: bool) -> list[float]:
    """:func:`peaks_of` a process that does nothing else."""
    call = f"peaks_of({kind!r}, {list(marks)}, {batch}, {quick})"
    code = f"import json; from benchmarks.memory import peaks_of; print(json.dumps({call}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    peaks: list[float] = json.loads(done.stdout.splitlines()[-1])
    return peaks


if __name__ == "__main__":
    main("memory", measure)
