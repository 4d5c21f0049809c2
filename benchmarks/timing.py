"""Time several things in turns, so that the noise of a shared machine hits all of them alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

CPU = torch.device("cpu")


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Span:
    """Seconds on the wall, and of the CPU in all threads of this process."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> Span:
        """Both clocks."""
        return cls(time.perf_counter(), time.process_time())

    def since(self, start: Span, parts: int = 1) -> Span:
        """From one reading of the clocks to this one, divided into equal parts."""
        return Span((self.wall - start.wall) / parts, (self.cpu - start.cpu) / parts)


@dataclass(frozen=True)
class Candidate:
    """Something to time.

    Args:
        name: What the table calls it.
        run: What is timed; it gets what ``prepare`` made. A :class:`Span` that it returns counts instead: for what can only be
            timed from within.
        prepare: Makes what a run uses up, untimed. By default None.
        missing: Why it cannot be measured here; the table then says so in its row.
    """

    name: str
    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = _nothing
    missing: str = ""


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles of several values."""

    lower: float
    median: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        """Of one value or more."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))


@dataclass(frozen=True)
class Timing:
    """What each round took.

    Another process on the same cores lengthens the seconds on the wall and hardly those of the CPU, except that threads which
    wait for each other wait actively.
    """

    name: str
    spans: tuple[Span, ...]
    missing: str = ""

    @property
    def wall(self) -> Quartiles:
        """Seconds on the wall."""
        return Quartiles.of([span.wall for span in self.spans])

    @property
    def cpu(self) -> Quartiles:
        """Seconds of the CPU."""
        return Quartiles.of([span.cpu for span in self.spans])

    def ratio(self, to: Timing, *, cpu: bool = False) -> Quartiles:
        """Of the ratios within each round: a slow minute of the machine is in both."""
        pairs = zip(self.spans, to.spans, strict=True)
        return Quartiles.of([mine.cpu / other.cpu if cpu else mine.wall / other.wall for mine, other in pairs])


@dataclass(frozen=True)
class Comparison:
    """Candidates beside a baseline that was measured twice.

    Args:
        baseline: Measured in each round.
        again: The very same, measured once more in each round: what it differs by is noise.
        others: The candidates.
    """

    baseline: Timing
    again: Timing
    others: tuple[Timing, ...]

    def __getitem__(self, name: str) -> Timing:
        return next(timing for timing in self.others if timing.name == name)

    def spread(self, *, cpu: bool = False) -> tuple[float, float]:
        """Range of ratios around 1 that the same thing measured twice has in half of the rounds."""
        ratio = self.again.ratio(self.baseline, cpu=cpu)
        # Which of the two came first is arbitrary, hence both ways round.
        return min(ratio.lower, 1 / ratio.upper), max(ratio.upper, 1 / ratio.lower)

    def within_spread(self, name: str, *, cpu: bool = False) -> bool:
        """Whether a candidate's median ratio to the baseline lies in the range that the baseline has to itself."""
        low, high = self.spread(cpu=cpu)
        return low <= self[name].ratio(self.baseline, cpu=cpu).median <= high

    def beside_spread(self, name: str, *, cpu: bool = False) -> str:
        """A candidate's ratio to the baseline, and whether it lies within the range that the baseline has to itself."""
        low, high = self.spread(cpu=cpu)
        inside = "within" if self.within_spread(name, cpu=cpu) else "OUTSIDE"
        ratio = ratio_text(self[name].ratio(self.baseline, cpu=cpu))
        return f"{ratio}×, {inside} the {low:.2f}–{high:.2f} of the same measured twice"

    def table(self, *, unit: str = "ms") -> str:
        """Markdown: a row for each, medians with quartiles."""
        lines = [
            f"| what | wall, {unit} (quartiles) | × the first row, wall | CPU, {unit} | × the first row, CPU |",
            "|---|---:|---:|---:|---:|",
        ]
        for timing in (self.baseline, *self.others, self.again):
            lines.append(f"| {timing.name} | {timing.missing} | | | |" if timing.missing else self._row(timing, unit))
        return "\n".join(lines)

    def _row(self, timing: Timing, unit: str) -> str:
        scale = {"s": 1.0, "ms": 1e3, "µs": 1e6}[unit]
        wall, first = timing.wall, timing is self.baseline
        cells = [
            timing.name,
            f"{figure(scale * wall.median)} ({figure(scale * wall.lower)}–{figure(scale * wall.upper)})",
            "1" if first else ratio_text(timing.ratio(self.baseline)),
            figure(scale * timing.cpu.median),
            "1" if first else ratio_text(timing.ratio(self.baseline, cpu=True)),
        ]
        return "| " + " | ".join(cells) + " |"


def interleaved(baseline: Candidate, candidates: Sequence[Candidate], *, rounds: int, warmup: int = 1) -> Comparison:
    """Time the baseline, the candidates and the baseline again in turns: A B C A', A' C B A, and so on.

    Args:
        baseline: What the others are compared with.
        candidates: What to compare; the ``missing`` are left out.
        rounds: Times each is run.
        warmup: Untimed rounds before.

    Raises:
        ValueError: If there is no round, or two things have one name.
    """
    if rounds < 1:
        raise ValueError(f"Argument `rounds` must be at least 1 but got {rounds}.")
    again = Candidate(f"{baseline.name}, again", baseline.run, baseline.prepare)
    present = [baseline, *(candidate for candidate in candidates if not candidate.missing), again]
    names = [candidate.name for candidate in (baseline, *candidates, again)]
    if len(set(names)) < len(names):
        raise ValueError(f"Each candidate needs a name of its own but got {names}.")
    spans: dict[str, list[Span]] = {name: [] for name in names}
    with _swept():
        for number in range(-warmup, rounds):
            for candidate in present if number % 2 == 0 else present[::-1]:
                span = _once(candidate)
                if number >= 0:
                    spans[candidate.name].append(span)

    def timing(candidate: Candidate) -> Timing:
        return Timing(candidate.name, tuple(spans[candidate.name]), candidate.missing)

    return Comparison(timing(baseline), timing(again), tuple(timing(candidate) for candidate in candidates))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch with so many threads, and then with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def figure(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def ratio_text(ratio: Quartiles) -> str:
    """Median and quartiles; two decimals tell a few per cent, more would be noise."""

    def digits(value: float) -> str:
        return f"{value:.2f}" if value < 10 else figure(value)

    return f"{digits(ratio.median)} ({digits(ratio.lower)}–{digits(ratio.upper)})"


@contextmanager
def _swept() -> Iterator[None]:
    """Without the garbage collector looking again and again at what was there before: PyTorch itself takes it 0.1 s."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _settle() -> None:
    """Wait for what a GPU is still doing."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _once(candidate: Candidate) -> Span:
    prepared = candidate.prepare()
    gc.collect()  # so that nobody pays for what another left behind
    _settle()
    start = Span.now()
    result = candidate.run(prepared)
    _settle()
    span = Span.now().since(start)
    return result if isinstance(result, Span) else span
