"""Says when training has not brought back what cuts have cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities import rank_zero_warn

from lit_compress.callbacks.recovery import points_lost


class DropAlert:
    """Compares a metric with what it was before the first cut of a run.

    Right after a deep cut accuracy is near chance, and fine-tuning brings it back: so what counts is the last validation before
    the next cut, or before training ends.

    Args:
        points: Points (hundredths of a fraction such as accuracy) by which the metric may be worse.
        monitor: Metric that the module logs on its validation data.
        mode: Whether it is better smaller or larger.

    Raises:
        MisconfigurationException: If an argument is out of range.

    Example:
        >>> alert = DropAlert(points=1.0, monitor="val/accuracy", mode="max")
        >>> alert.watch({"val/accuracy": 0.98})
        >>> alert.begin()
        >>> alert.watch({"val/accuracy": 0.95})
        >>> alert.text()
        'val/accuracy was 0.9800 before the first cut and is 0.9500 now: worse by 3.00 points, of which `alert_drop` allows 1.'
    """

    def __init__(self, points: float, monitor: str, mode: Literal["min", "max"]) -> None:
        if not (math.isfinite(points) and points >= 0):
            raise MisconfigurationException(f"Argument `alert_drop` must be a number of points, at least 0, but got {points}.")
        if mode not in ("min", "max"):
            raise MisconfigurationException(f"Argument `mode` must be 'min' or 'max' but got {mode!r}.")
        self.points, self.monitor, self.mode = points, monitor, mode
        self.reset()

    def reset(self) -> None:
        """Another run begins."""
        self._before: float | None = None
        self._latest: float | None = None
        self._cut = False

    def watch(self, metrics: Mapping[str, Any]) -> None:
        """Note what a validation has found.

        Raises:
            MisconfigurationException: If the metric is not among them, or is no fraction.
        """
        if self.monitor not in metrics:
            raise MisconfigurationException(
                f"`alert_drop` goes by `monitor={self.monitor!r}`, which the module does not log on its validation data; there "
                f"are {sorted(metrics)}."
            )
        value = float(metrics[self.monitor])
        if value < 0 or value > 1:
            raise MisconfigurationException(
                f"`alert_drop` is in points, hundredths of a fraction, but `{self.monitor}` is {value:.4g}. Give a `monitor` "
                "such as 'val/accuracy', with its `mode`."
            )
        self._latest = value

    def begin(self) -> None:
        """A cut is made, of the network that was last validated."""
        if not self._cut:
            self._cut, self._before = True, self._latest
            if self._before is None:
                rank_zero_warn(f"No alert can be given: {self.monitor} was not validated before the first cut.")
        self._latest = None

    def text(self) -> str | None:
        """What there is to say now, if too much is lost."""
        if self._before is None or self._latest is None:
            return None
        lost = points_lost(self._before, self._latest, self.mode)
        if lost <= self.points + 1e-9:  # the rounding of a difference of fractions
            return None
        return (
            f"{self.monitor} was {self._before:.4f} before the first cut and is {self._latest:.4f} now: worse by {lost:.2f} "
            f"points, of which `alert_drop` allows {self.points:g}."
        )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"before": self._before, "latest": self._latest, "cut": self._cut}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as :meth:`state_dict` says."""
        self._before, self._latest, self._cut = state["before"], state["latest"], state["cut"]
