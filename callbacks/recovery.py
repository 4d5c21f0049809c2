"""How much a network may lose by a cut, and what to do if fine-tuning does not bring it back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from lightning_fabric.utilities.exceptions import MisconfigurationException

Verdict = Literal["wait", "held", "back"]


def points_lost(before: float, now: float, mode: Literal["min", "max"]) -> float:
    """Points, hundredths of a fraction, by which a metric is worse than before; negative where it is better.

    Args:
        before: A fraction, such as an accuracy.
        now: Likewise.
        mode: Whether the metric is better smaller or larger.
    """
    return 100 * (now - before if mode == "min" else before - now)


class Recovery:
    """Watches a network after a cut, and looks for the strongest cut that it recovers from, by bisection.

    A cut's strength is the share of the channels chosen for removal that it removes. The first try is the whole cut. A try has
    held once the metric is within ``max_drop`` of what it was before, and has failed after ``patience`` validations without a new
    best. Then the network goes back to before the cut, and the next try is half-way between the strongest that has held (at
    first none) and the weakest that has failed.

    Args:
        max_drop: Points that the metric may be worse by: hundredths of a fraction such as accuracy.
        mode: Whether the metric is better smaller or larger.
        patience: Validations without a new best after which a try has failed.
        tries: Cuts to try at most.

    Raises:
        MisconfigurationException: If an argument is out of range.

    Example:
        >>> recovery = Recovery(max_drop=1.0, mode="max", patience=1)
        >>> recovery.begin(0.98)
        >>> recovery.watch(0.90), recovery.watch(0.90), recovery.strength  # too little, and no longer getting better
        ('wait', 'back', 0.5)
        >>> recovery.watch(0.975), recovery.strength  # that is enough, so something between the two is tried
        ('back', 0.75)
    """

    def __init__(self, *, max_drop: float, mode: Literal["min", "max"], patience: int, tries: int = 4) -> None:
        if not (math.isfinite(max_drop) and max_drop >= 0):
            raise MisconfigurationException(f"Argument `max_drop` must be a number of points, at least 0, but got {max_drop}.")
        self.max_drop, self.mode, self.patience, self.tries = max_drop, mode, patience, tries
        self.reference: float | None = None  # before the first cut of the run
        self.settle()

    def settle(self) -> None:
        """The search is over, whatever it has found; the next cut begins another."""
        self.searching = False
        self.strength, self._held, self._failed, self._tried = 1.0, 0.0, 1.0, 0
        self._best, self._stale = -math.inf, 0

    def begin(self, value: float) -> None:
        """A cut is made, of a network with this value of the metric."""
        if self.reference is None:
            self.reference = value
        self.searching = True
        self._tried += 1
        self._best, self._stale = -math.inf, 0

    def drop(self, value: float) -> float:
        """Points by which a value is worse than before the first cut."""
        return points_lost(self.reference or 0.0, value, self.mode)

    def holds(self, value: float) -> bool:
        """Whether a value is within the bound. NaN is not."""
        return self.drop(value) <= self.max_drop + 1e-9  # the rounding of a difference of fractions

    def watch(self, value: float) -> Verdict:
        """Look at a validation after the cut.

        Returns:
            ``"wait"``: not decided. ``"held"``: the network stays as it is, and the search is over. ``"back"``: go back to before
            the cut, and try again with :attr:`strength`; 0 is no cut at all.
        """
        if not self.searching:
            return "held"
        if self.holds(value):
            self._held = self.strength
        else:
            better = -self.drop(value)
            if better > self._best:
                self._best, self._stale = better, 0
            else:
                self._stale += 1
            if self._stale < self.patience:
                return "wait"
            self._failed = self.strength
        if self._held == 1 or (self._tried >= self.tries and self._held == self.strength):
            return "held"
        self.strength = self._held if self._tried >= self.tries else (self._held + self._failed) / 2
        self._best, self._stale = -math.inf, 0
        return "back"

    @property
    def exhausted(self) -> bool:
        """Whether no other cut is to be tried: what has held best, or no cut at all, is to be put back."""
        return self._tried >= self.tries

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as builtin types."""
        return {name: value for name, value in vars(self).items() if name not in ("max_drop", "mode", "patience", "tries")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        vars(self).update(state)
