"""How long a network takes beside itself at other widths: both run in turns, so that other load on the machine meets both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeAlias

import torch
from torch import nn

from lit_compress import rng
from lit_compress.graph import evaluating
from lit_compress.padding import padded_for_now
from lit_compress.plan import Plan, plan_of
from lit_compress.report import Latency, timed
from lit_compress.slicing import all_tensors, substituted
from lit_compress.statistics.gather import batch_size
from lit_compress.surgery import ForwardFn, call

_Widths: TypeAlias = Callable[[], AbstractContextManager[None]]  # while it lasts, the network has certain widths


@dataclass(frozen=True)
class Comparison:
    """Two networks timed in turns.

    Args:
        before: The one, in milliseconds.
        after: The other.
        ratio: Median, over the turns, of the second's time as a share of the first's in the same turn.
    """

    before: Latency
    after: Latency
    ratio: float

    @property
    def slower(self) -> bool:
        """Whether the second takes longer by more than the spread: the middle halves of their times do not even touch."""
        return self.after.lower > self.before.upper


class Stopwatch:
    """Times a network on a batch at the widths that it would have, has, and had. The network is left as it was.

    For as long as it is timed at other widths, its modules hold other tensors: slices where it would be cut, and where it was cut
    already, copies of the channels that are left in place of those that are gone. Time depends on sizes and not on values.

    The two networks of a comparison take turns, of which each reverses their order. In a turn, each runs twice and the second run
    counts, for the first finds the other's data in the caches. There are 5 to 50 turns.

    Args:
        model: The network, on its device. It runs in evaluation mode without gradients.
        inputs: A batch of the size that matters: at another batch size, another network may be the faster one.
        forward_fn: How to run the network, where ``model(*inputs)`` is not it.
        context: Entered around each run, and not timed: mixed precision, say, which would else keep casts of some weights.
        seconds: A comparison takes no further turn after about twice this time.

    Example:
        >>> import torch
        >>> from lit_compress import analyze
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 2))
        >>> images = torch.randn(600, 64)
        >>> analysis = analyze(net, [images], stopwatch=Stopwatch(net, images[:256]))
        >>> recipe = analysis.recipe(keep_latency=0.7)
        >>> recipe.widths["0"] < 512
        True
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        *,
        forward_fn: ForwardFn = call,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        seconds: float = 0.5,
    ) -> None:
        self._model, self._inputs, self._forward_fn = model, inputs, forward_fn
        self._context, self._seconds = context, seconds
        self._past = plan_of(model)
        self.batch_size = batch_size(inputs)

    def compare(self, plan: Plan) -> Comparison:
        """The network before anything was ever cut out of it, and as a plan would cut it.

        Args:
            plan: A cut that is not made, of the network as it is now.

        Raises:
            ValueError: If the network was cut since the stopwatch was made, or is compiled.
        """
        if plan_of(self._model) != self._past:
            raise ValueError("The network was cut since the stopwatch was made; make one, and an analysis, of it as it is now.")
        for module in self._model.modules():
            if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
                raise ValueError(
                    "A network under `torch.compile` cannot be timed at many widths: it is compiled for a few of them, and runs "
                    "uncompiled at the others. Time it uncompiled, or compile it after the cut."
                )
        original = nullcontext if self._past is None else _as_before(self._model, self._past, None)
        return self._in_turns(original, _as_cut(self._model, plan))

    def look_back(self, plan: Plan) -> Comparison:
        """The network as it was when the stopwatch was made, and as a plan has cut it since."""
        return self._in_turns(_as_before(self._model, plan, self._past), nullcontext)

    def _in_turns(self, *networks: _Widths) -> Comparison:
        device = next((parameter.device for parameter in self._model.parameters()), torch.device("cpu"))

        def once() -> float:
            with self._context():
                return timed(lambda: self._forward_fn(self._model, self._inputs), device)

        def turn(first: int) -> list[float]:
            times = [0.0, 0.0]
            for index in (first, 1 - first):
                with networks[index]():
                    once()
                    times[index] = once()
            return times

        with evaluating(self._model), torch.no_grad(), rng.isolated():
            spent = sum(turn(0)) + sum(turn(1))  # warms up
            turns = min(max(int(2e3 * self._seconds / max(spent, 1e-3)), 5), 50)
            times = [turn(number % 2) for number in range(turns)]
        before, after = (Latency.of(column) for column in zip(*times, strict=True))
        return Comparison(before, after, median(late / early for early, late in times))


def _as_cut(model: nn.Module, plan: Plan) -> _Widths:
    tensors = all_tensors(model)
    values = {tensors[name]: plan.take(name, tensors[name].data) for name in plan.keep}

    @contextmanager
    def widths() -> Iterator[None]:
        with substituted(model, values), padded_for_now(model, plan.pads):
            yield

    return widths


def _as_before(model: nn.Module, plan: Plan, before: Plan | None) -> _Widths:
    tensors = all_tensors(model)
    values = {tensors[name]: plan.widened(name, tensors[name].data) for name in plan.keep}
    keep, pads = ({}, {}) if before is None else (before.keep, before.pads)

    @contextmanager
    def widths() -> Iterator[None]:
        with substituted(model, values, keep), padded_for_now(model, {path: pads.get(path) for path in plan.pads}):
            yield

    return widths


def widest_within(
    steps: int, network: Callable[[int], bytes], ratio: Callable[[int], float], limit: float
) -> tuple[int | None, float]:
    """The widest network on a path whose measured latency is within a limit.

    Latency is noisy, and not monotonic in the width. So the path is walked down from its wide end in eighths, to the first
    network that is within the limit. Between this and the one above, bisection ends at two neighbours of which the smaller was
    measured to be within the limit and the larger not. The smaller is then measured once more; if it misses, that counts, and
    the search goes on below it.

    Args:
        steps: Length of the path, from the smallest network, 0, to the widest.
        network: Step to what two steps with the same network have in common; such a network is measured but once.
        ratio: Measures the network of a step; above 0.
        limit: What is to be met.

    Returns:
        The step, or None if no network is within the limit; and what was last measured there, or the smallest measured at all.
    """
    measured: dict[bytes, float] = {}

    def meets(step: int) -> bool:
        if network(step) not in measured:
            measured[network(step)] = ratio(step)
        return measured[network(step)] <= limit

    known = {part * (steps - 1) // 8 for part in range(9)}
    while True:
        low = next((step for step in sorted(known, reverse=True) if meets(step)), None)
        if low is None:
            return None, min(measured.values())
        high = min((step for step in known if step > low), default=low + 1)
        while high - low > 1:
            middle = (low + high) // 2
            known.add(middle)
            low, high = (middle, high) if meets(middle) else (low, middle)
        again = measured[network(low)] = ratio(low)
        if again <= limit:
            return low, again
