"""Keep what removed channels gave, as far as the layers that read them can: fold it into their biases and weights.

By the means alone, a removed channel is taken to be what it was on average: exact for one that is constant. By the covariances as
well, it is taken to be what the channels kept predict, by linear least squares: but for a small ridge, exact for one that is a
linear function of them.
Either way the borders of a zero-padded convolution are off: there the channel met padding, which its mean does not know.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lit_compress.graph import ChannelGraph
from lit_compress.inputs import LayerInput, Reader, readers
from lit_compress.plan import Plan
from lit_compress.selection.reconstruction import takeover
from lit_compress.slicing import all_tensors
from lit_compress.statistics.covariance import with_float64

_NOWHERE = "have no bias to fold their mean into, and no norm that takes their output alone: there, nothing is compensated"
_UNKNOWN = (
    "are grouped or transposed, did not run in the analysis, or their weight is used twice or not as it is: there, nothing is "
    "compensated"
)
_MEAN_ALONE = "not all of their channels have as many places: there, the mean alone is compensated"


def compensated(
    model: nn.Module, graph: ChannelGraph, plan: Plan, inputs: Mapping[str, LayerInput]
) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """What each reader's weight and bias are with what is known about the channels that a plan removes. Nothing is changed.

    A layer without bias that a batch norm follows directly has its shift taken off the norm's running mean instead, which is the
    same in evaluation.

    Args:
        model: The network, not yet cut.
        graph: Its graph.
        plan: The cut that is going to be made.
        inputs: Layer name to what it was given: from means alone come biases, with covariances weights as well.

    Returns:
        Name of a weight, bias or running mean to its new value, of its size before the cut; and what could not be done, in words,
        to the layers that read removed channels where it could not.
    """
    tensors, known = all_tensors(model), readers(graph)
    names = {layer.weight: layer.name for layer in graph.layers.values()}
    values: dict[str, Tensor] = {}
    left_out: dict[str, list[str]] = {}
    read = {use.weight: kept for use in graph.uses if (kept := plan.keep.get(use.weight, {}).get(use.in_dim)) is not None}
    for weight, kept in read.items():
        name, bias, norm = names[weight], f"{weight.removesuffix('weight')}bias", graph.norms.get(weight)
        place = bias if bias in tensors else norm
        given, reader = inputs.get(name), known.get(name)
        if given is None or given.mean is None or reader is None:
            left_out.setdefault(_UNKNOWN, []).append(name)
            continue
        removed = np.delete(np.arange(reader.size), kept)
        device = with_float64(tensors[weight].device)
        kernel, mean = tensors[weight].detach().to(device).double(), given.mean.to(device)
        if given.covariance is not None:
            taken_over, mean = _taken_over(reader, given.covariance, given.samples, mean, kernel, removed, place is not None)
            values[weight] = taken_over.to(tensors[weight])
        elif given.samples:
            left_out.setdefault(_MEAN_ALONE, []).append(name)
        if place is not None:
            summed = kernel.flatten(2).sum(2) if kernel.ndim > 2 else kernel
            shift = summed[:, removed] @ mean[removed]
            values[place] = tensors[place].detach() + (shift if place == bias else -shift).to(tensors[place])
        elif given.covariance is None:
            left_out.setdefault(_NOWHERE, []).append(name)
    return values, left_out


def _taken_over(
    reader: Reader, covariance: Tensor, samples: int, mean: Tensor, kernel: Tensor, removed: NDArray[np.int64], centred: bool
) -> tuple[Tensor, Tensor]:
    """The kernel with what the channels kept predict of those removed; and the mean, of these what no kernel can give.

    Where nothing takes up that part, the prediction is not centred: it then has to give the mean as well, as far as it can.
    """
    assert reader.slots is not None  # there is no covariance without equally many places
    gone = np.isin(reader.slots[:, 0], removed)
    means = mean.cpu().numpy()[reader.slots]
    moments = covariance.numpy() if centred else covariance.numpy() + means @ means.T / means.shape[1]
    coefficients = takeover(moments, np.flatnonzero(~gone), np.flatnonzero(gone), samples)
    share = torch.from_numpy(coefficients).to(kernel)
    kept, lost = torch.from_numpy(reader.slots[~gone]), torch.from_numpy(reader.slots[gone])
    kernel, mean = kernel.clone(), mean.clone()
    kernel[:, kept] += torch.einsum("or...,rk->ok...", kernel[:, lost], share)
    mean[lost] -= share @ mean[kept]
    return kernel, mean
