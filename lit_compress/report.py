"""What a network costs: parameters and mult-adds."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lit_compress import rng
from lit_compress.graph import evaluating
from lit_compress.surgery import ForwardFn, call


def count_parameters(model: nn.Module, *, trainable: bool = True) -> int:
    """Number of elements in the parameters of a network, shared ones counted once.

    Args:
        model: The network.
        trainable: Count only those with ``requires_grad``.

    Example:
        >>> count_parameters(nn.Linear(3, 2))
        8
    """
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad or not trainable)


def count_mult_adds(model: nn.Module, example_inputs: Any, *, forward_fn: ForwardFn = call) -> int:
    """Multiply-adds of one forward in evaluation mode, over the whole batch given.

    Convolutions, linear layers and matrix products count, as PyTorch's own flop counter counts them (half of its figure); biases,
    norms and activations do not.

    Args:
        model: The network.
        example_inputs: Inputs of the size meant; a batch of one gives the usual figure. A tuple or list holds positional arguments.
        forward_fn: How to run the network, where ``model(*example_inputs)`` is not it.

    Example:
        >>> count_mult_adds(nn.Linear(3, 2), torch.zeros(1, 3))
        6
    """
    with evaluating(model), torch.no_grad(), rng.isolated(), FlopCounterMode(display=False) as counter:
        forward_fn(model, example_inputs)
    return int(counter.get_total_flops()) // 2
