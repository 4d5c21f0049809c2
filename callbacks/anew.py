"""What begins anew after a cut, where that is asked for: the learning-rate schedules, or the weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pytorch_lightning import Trainer
from torch import nn
from torch.optim import Optimizer

from lit_compress.initialisation import reinitialize
from lit_compress.ranks import share
from lit_compress.slicing import all_tensors, set_data


@dataclass(frozen=True)
class Beginning:
    """The optimizers' options and the schedules as a fit begins.

    Args:
        options: Of each optimizer, what each group holds besides its parameters.
        schedules: The state of each schedule.
    """

    options: list[list[dict[str, Any]]]
    schedules: list[dict[str, Any]]

    @classmethod
    def of(cls, trainer: Trainer) -> Beginning:
        """The Trainer's, now."""
        return cls(
            options=[[_options(group) for group in optimizer.param_groups] for optimizer in trainer.optimizers],
            schedules=[copy.deepcopy(dict(config.scheduler.state_dict())) for config in trainer.lr_scheduler_configs],
        )

    def return_to(self, trainer: Trainer) -> None:
        """Let rates and schedules be what they were then; groups of parameters that came later go on as they are."""
        for optimizer, options in zip(trainer.optimizers, self.options, strict=True):
            for group, before in zip(optimizer.param_groups, options, strict=False):
                group.update(copy.deepcopy(before))
        for config, state in zip(trainer.lr_scheduler_configs, self.schedules, strict=True):
            config.scheduler.load_state_dict(copy.deepcopy(state))


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy({name: value for name, value in group.items() if name != "params"})


def draw_anew(model: nn.Module, averages: Sequence[nn.Module], optimizers: Sequence[Optimizer]) -> None:
    """Give a network new random weights, the same on all ranks, and let nobody remember the old ones.

    Args:
        model: Its tensors get new storage, so that whoever holds the old one can put it back.
        averages: Copies of it that follow training; they begin at its new weights.
        optimizers: Their state is forgotten.

    Raises:
        ValueError: If a module does not say how its weights begin.
    """
    for network in (model, *averages):
        for tensor in all_tensors(network).values():
            set_data(tensor, tensor.data.clone())
    torch.manual_seed(share(int(torch.randint(2**31, ())))[0])
    reinitialize(model)
    for average in averages:
        average.load_state_dict(model.state_dict())
    for optimizer in optimizers:
        optimizer.state.clear()
