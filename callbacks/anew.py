"""Weights that begin anew after a cut, where that is asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from lit_compress.initialisation import reinitialize
from lit_compress.ranks import share
from lit_compress.slicing import all_tensors, set_data


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
