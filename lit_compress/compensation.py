"""Keep what removed channels gave on average: their mean is folded into the biases of the layers that read them.

Exact for a channel that is constant, but for the borders of a zero-padded convolution: there the channel met padding, and the
bias does not know.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
from torch import Tensor, nn

from lit_compress.graph import ChannelGraph
from lit_compress.plan import Plan
from lit_compress.skips import Vector
from lit_compress.slicing import all_tensors, set_data


def readers(graph: ChannelGraph) -> dict[str, int]:
    """Layers that read channels which may be cut, to their number of input channels: those whose mean input is needed.

    A weight that is used twice, is multiplied with another parameter first, or belongs to a transposed convolution is not among
    them.
    """
    uses = Counter(use.weight for use in graph.uses)
    return {
        _name_of(graph, use.weight): graph.shapes[use.weight][use.in_dim]
        for use in graph.uses
        if uses[use.weight] == 1
        and use.plain
        and (use.out_dim, use.in_dim) == (0, 1)
        and use.weight.endswith(".weight")
        and use.in_dim in graph.tensors.get(use.weight, {})
    }


def _name_of(graph: ChannelGraph, weight: str) -> str:
    return next(layer.name for layer in graph.layers.values() if layer.weight == weight)


def compensate(model: nn.Module, graph: ChannelGraph, plan: Plan, mean_inputs: Mapping[str, Tensor]) -> list[str]:
    """Add to each reader's bias what the channels that a plan removes give on average. To be done before the cut.

    A layer without bias that a batch norm follows directly has it taken off the norm's running mean instead, which is the same in
    evaluation.

    Args:
        model: The network, not yet cut; changed in place.
        graph: Its graph.
        plan: The cut that is going to be made.
        mean_inputs: Layer name to the mean of each input channel, over samples and positions.

    Returns:
        Layers that read removed channels and have nowhere to put the mean, or whose mean input is not known; they are left as
        they are.
    """
    tensors, known, without = all_tensors(model), readers(graph), []
    read = {use.weight: kept for use in graph.uses if (kept := plan.keep.get(use.weight, {}).get(use.in_dim)) is not None}
    for weight, kept in read.items():
        name = _name_of(graph, weight)
        if name not in known or name not in mean_inputs:
            without.append(name)
            continue
        removed: Vector = np.delete(np.arange(graph.shapes[weight][1]), kept)
        kernel = (
            tensors[weight].detach().double().flatten(2).sum(2) if tensors[weight].ndim > 2 else tensors[weight].detach().double()
        )
        given = kernel[:, removed] @ mean_inputs[name].to(kernel)[removed]
        bias = tensors.get(f"{weight.removesuffix('weight')}bias")
        norm = tensors.get(graph.norms.get(weight, ""))
        if bias is not None:
            set_data(bias, bias.data + given.to(bias))
        elif norm is not None:
            set_data(norm, norm.data - given.to(norm))
        else:
            without.append(name)
    return without
