"""Fine-tuning by the full training's schedule: after a cut, the learning rate starts anew."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn
from pytorch_lightning.utilities.model_helpers import is_overridden
from pytorch_lightning.utilities.types import LRSchedulerConfig
from torch import Tensor

_DRIVEN = ("lr", "momentum", "betas")  # what schedulers change in a parameter group; cyclic ones drive the momentum as well
_LENGTHS = {"OneCycleLR": "total_steps", "CosineAnnealingLR": "T_max", "PolynomialLR": "total_iters"}


def first_schedule(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """The schedule as it is when training begins: builtin types and tensors, to be kept in a checkpoint.

    Raises:
        MisconfigurationException: If there is no schedule, the module steps it itself, or training has begun already.
    """
    if not trainer.lr_scheduler_configs:
        raise MisconfigurationException(
            f"`restart_schedule=True` needs a schedule, but `configure_optimizers` of {type(pl_module).__name__} returns none. "
            "Return one, or leave `restart_schedule` out."
        )
    if is_overridden("lr_scheduler_step", pl_module):
        raise MisconfigurationException(
            f"{type(pl_module).__name__} overrides `lr_scheduler_step`, so that its schedule may go by the Trainer's count of "
            "epochs or steps, which goes on. Leave the step to Lightning, or `restart_schedule` out."
        )
    if trainer.global_step > 0:
        raise MisconfigurationException(
            "`restart_schedule=True` cannot know the schedule that training began with: the checkpoint was written without it. "
            "Leave it out, or begin anew."
        )
    return copy.deepcopy(_present(trainer))


def prepare_restart(trainer: Trainer, first: Mapping[str, Any]) -> Callable[[], None]:
    """Make sure that the schedule can start anew before the present epoch; calling the result lets it.

    Optimizer state, weight decay and all else in the parameter groups stay as they are.

    Args:
        trainer: The running Trainer.
        first: From :func:`first_schedule`.

    Raises:
        MisconfigurationException: If schedulers or parameter groups are no longer those that training began with, or a scheduler
            that steps every few epochs would be out of step.
    """
    begun, present = _described(first), _described(_present(trainer))
    if begun != present:
        raise MisconfigurationException(
            f"`restart_schedule` cannot bring back the schedule that training began with: that was {begun}, and now it is "
            f"{present}. Something else has replaced schedulers or added parameter groups; cut before it does, or leave one of "
            "the two out."
        )
    for config in trainer.lr_scheduler_configs:
        if config.interval == "epoch" and trainer.current_epoch % config.frequency:
            raise MisconfigurationException(
                f"{type(config.scheduler).__name__} steps every {config.frequency} epochs by the Trainer's count, so it cannot "
                f"start anew before epoch {trainer.current_epoch}. Cut before a multiple of {config.frequency}."
            )

    def restart() -> None:
        again = copy.deepcopy(dict(first))
        for config, one in zip(trainer.lr_scheduler_configs, again["schedulers"], strict=True):
            config.scheduler.load_state_dict(one["state"])
        for optimizer, groups in zip(trainer.optimizers, again["groups"], strict=True):
            for group, options in zip(optimizer.param_groups, groups, strict=True):
                for name, value in options.items():
                    if isinstance(group[name], Tensor):  # of a capturable optimizer, which holds on to it
                        group[name].fill_(value)
                    else:
                        group[name] = value

    return restart


def warn_if_cut_short(trainer: Trainer) -> None:
    """Say so if training ends before a schedule that starts now does, where its length is known."""
    for config in trainer.lr_scheduler_configs:
        name = type(config.scheduler).__name__
        length, left = getattr(config.scheduler, _LENGTHS.get(name, ""), 0), _steps_left(trainer, config)
        if left < length:
            rank_zero_warn(
                f"{name} starts anew and is made for {length} steps, but training ends after {left:g} more: fine-tuning does not "
                "get all of the schedule. Make it as long as the training before the cut, and `max_epochs` as long as training "
                "and fine-tuning together."
            )


def _steps_left(trainer: Trainer, config: LRSchedulerConfig) -> float:
    if config.interval == "step":
        return (trainer.estimated_stepping_batches - trainer.global_step) // config.frequency
    endless = trainer.max_epochs is None or trainer.max_epochs < 0
    return float("inf") if endless else ((trainer.max_epochs or 0) - trainer.current_epoch) // config.frequency


def _present(trainer: Trainer) -> dict[str, Any]:
    """The schedulers by kind and state, and what they drive in each parameter group of each optimizer."""
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    return {
        "schedulers": [{"kind": type(scheduler).__name__, "state": scheduler.state_dict()} for scheduler in schedulers],
        "groups": [
            [{name: group[name] for name in _DRIVEN if name in group} for group in optimizer.param_groups]
            for optimizer in trainer.optimizers
        ],
    }


def _described(schedule: Mapping[str, Any]) -> str:
    kinds = ", ".join(one["kind"] for one in schedule["schedulers"])
    return f"{kinds} on {' and '.join(str(len(groups)) for groups in schedule['groups'])} parameter group(s)"
