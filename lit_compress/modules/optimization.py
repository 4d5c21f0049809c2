"""Optimizer and schedule of the modules here, as Lightning takes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch.nn import Parameter

Interval = Literal["epoch", "step"]


def check_interval(interval: str) -> None:
    """Refuse an interval that Lightning would not step at.

    Raises:
        ValueError: If it is neither ``"epoch"`` nor ``"step"``.
    """
    if interval not in get_args(Interval):
        raise ValueError(f"Argument `scheduler_interval` must be 'epoch' or 'step' but got {interval!r}.")


def optimization(
    parameters: Iterator[Parameter],
    optimizer: OptimizerCallable,
    scheduler: LRSchedulerCallable | None,
    interval: Interval,
    monitor: str = "val/loss",
) -> OptimizerLRScheduler:
    """What ``configure_optimizers`` returns.

    Args:
        parameters: To train.
        optimizer: From parameters to an optimizer.
        scheduler: From the optimizer to a learning rate schedule, or None. ``ReduceLROnPlateau`` follows its own ``monitor`` if
            it has one, as Lightning's does, and otherwise ``monitor``.
        interval: Whether the schedule steps after every epoch or every optimizer step.
        monitor: What the module logs and a schedule may follow.
    """
    configured = optimizer(parameters)
    if scheduler is None:
        return configured
    schedule = scheduler(configured)
    settings: Any = {
        "scheduler": schedule,
        "interval": interval,
        "monitor": getattr(schedule, "monitor", monitor),  # read by ReduceLROnPlateau alone
    }
    return {"optimizer": configured, "lr_scheduler": settings}
