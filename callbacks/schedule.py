"""When to cut: before one epoch, every few epochs, or when training has converged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from lightning_fabric.utilities.exceptions import MisconfigurationException


class CutSchedule:
    """Decides before which epochs to cut.

    Args:
        at_epoch: Cut once, before this epoch, counted from 0. If no trigger is given, half of ``max_epochs``.
        every_n_epochs: Cut before every n-th epoch, ``max_cuts`` times.
        when: ``"converged"``: cut when ``monitor`` has not improved for ``patience`` epochs.
        max_cuts: How often to cut. Needed by ``every_n_epochs``; otherwise 1.
        monitor: Metric that the module logs.
        mode: Whether ``monitor`` is better when lower (``"min"``) or higher (``"max"``).
        patience: Epochs without improvement that count as convergence. An epoch that the Trainer does not validate is not looked
            at.

    Raises:
        MisconfigurationException: If the triggers contradict each other.

    Example:
        >>> schedule = CutSchedule(every_n_epochs=2, max_cuts=2)
        >>> schedule.resolve(max_epochs=10)
        >>> for epoch in range(10):
        ...     if schedule.due(epoch):
        ...         schedule.note_cut(epoch)
        >>> schedule.cuts
        [2, 4]
    """

    def __init__(
        self,
        *,
        at_epoch: int | None = None,
        every_n_epochs: int | None = None,
        when: Literal["converged"] | None = None,
        max_cuts: int | None = None,
        monitor: str = "val/loss",
        mode: Literal["min", "max"] = "min",
        patience: int = 3,
    ) -> None:
        triggers = {"at_epoch": at_epoch, "every_n_epochs": every_n_epochs, "when": when}
        given = [name for name, value in triggers.items() if value is not None]
        if len(given) > 1:
            raise MisconfigurationException(f"Give exactly one of `at_epoch`, `every_n_epochs` and `when` but got {given}.")
        if at_epoch is not None and at_epoch < 0:
            raise MisconfigurationException(f"Argument `at_epoch` must be at least 0 but got {at_epoch}.")
        if every_n_epochs is not None and every_n_epochs < 1:
            raise MisconfigurationException(f"Argument `every_n_epochs` must be at least 1 but got {every_n_epochs}.")
        if every_n_epochs is not None and max_cuts is None:
            raise MisconfigurationException("`every_n_epochs` needs `max_cuts`, or it would go on until nothing is left.")
        if when is not None and when != "converged":
            raise MisconfigurationException(f"Argument `when` must be 'converged' but got {when!r}.")
        if max_cuts is not None and (max_cuts < 1 or (max_cuts > 1 and every_n_epochs is None and when is None)):
            raise MisconfigurationException(f"Argument `max_cuts` must be at least 1, and 1 with `at_epoch`, but got {max_cuts}.")
        if mode not in ("min", "max"):
            raise MisconfigurationException(f"Argument `mode` must be 'min' or 'max' but got {mode!r}.")
        if patience < 1:
            raise MisconfigurationException(f"Argument `patience` must be at least 1 but got {patience}.")
        self._given_epoch = at_epoch
        self.at_epoch, self.every_n_epochs, self.when = at_epoch, every_n_epochs, when
        self.max_cuts = max_cuts or 1
        self.monitor, self.mode, self.patience = monitor, mode, patience
        self.cuts: list[int] = []  # epochs before which a cut was made
        self._best: float | None = None
        self._stale = 0
        self._closed = False

    def __str__(self) -> str:
        """The trigger, the same for as long as it lives."""
        if self.every_n_epochs is not None:
            return f"every {self.every_n_epochs} epochs"
        if self.when is not None:
            return f"when {self.monitor} has converged"
        return "halfway" if self._given_epoch is None else f"before epoch {self._given_epoch}"

    def reset(self) -> None:
        """Forget all cuts: another run begins."""
        self.at_epoch, self.cuts = self._given_epoch, []
        self._best, self._stale, self._closed = None, 0, False

    def resolve(self, max_epochs: int | None) -> None:
        """Check the schedule against the length of training, and fill in what was left open.

        Raises:
            MisconfigurationException: If training ends before the first cut, or has no end and no trigger was given.
        """
        endless = max_epochs is None or max_epochs < 0
        if self.at_epoch is None and self.every_n_epochs is None and self.when is None:
            if endless:
                raise MisconfigurationException(
                    "The Trainer has no `max_epochs`, so half of it is no time to cut: "
                    "give `at_epoch`, `every_n_epochs` or `when`."
                )
            self.at_epoch = (max_epochs or 0) // 2
        first = self.at_epoch if self.at_epoch is not None else self.every_n_epochs
        if not endless and first is not None and first >= (max_epochs or 0) and not self.cuts:
            raise MisconfigurationException(
                f"The first cut is due before epoch {first} (counted from 0), but training ends after {max_epochs} epochs."
            )

    @property
    def remaining(self) -> int:
        """Cuts still to be made."""
        return 0 if self._closed else self.max_cuts - len(self.cuts)

    def close(self) -> None:
        """No further cut is to be made."""
        self._closed = True

    @property
    def progress(self) -> float:
        """Which part of all cuts is made once the next one is, in (0, 1]."""
        return (len(self.cuts) + 1) / self.max_cuts

    def due(self, epoch: int) -> bool:
        """Whether to cut now, before this epoch."""
        if self.remaining <= 0 or (self.cuts and self.cuts[-1] == epoch):
            return False
        if self.when is not None:
            return self._stale >= self.patience
        if self.every_n_epochs is not None:
            return epoch > 0 and epoch % self.every_n_epochs == 0
        return self.at_epoch is not None and epoch >= self.at_epoch

    def note_cut(self, epoch: int) -> None:
        """A cut was made before this epoch; convergence is waited for anew."""
        self.cuts.append(epoch)
        self._best, self._stale = None, 0

    def watch(self, metrics: Mapping[str, Any]) -> None:
        """Look at an epoch's metrics, to find out whether training has converged.

        Raises:
            MisconfigurationException: If the monitored metric is not among them.
        """
        if self.when is None or self.remaining <= 0:
            return
        if self.monitor not in metrics:
            raise MisconfigurationException(f"`monitor={self.monitor!r}` is not logged; there are {sorted(metrics)}.")
        value = float(metrics[self.monitor])
        sign = 1 if self.mode == "min" else -1
        if not math.isnan(value) and (self._best is None or sign * value < sign * self._best):
            self._best, self._stale = value, 0
        else:
            self._stale += 1

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as builtin types."""
        waiting = {"best": self._best, "stale": self._stale, "closed": self._closed}
        return {"cuts": list(self.cuts), "at_epoch": self.at_epoch, **waiting}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self.cuts, self._best, self._stale = list(state["cuts"]), state["best"], state["stale"]
        self._closed = state["closed"]
        if self.every_n_epochs is None and self.when is None:
            self.at_epoch = state["at_epoch"]
