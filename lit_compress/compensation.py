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
from lit_compress.slicing import all_tensors


def readers(graph: ChannelGraph) -> dict[str, int]:
    """Layers that read channels which may be cut, to their number of input channels: those whose mean input is needed.

    A weight that is used twice or multiplied with another parameter first is not among them, nor is that of a transposed or a
    grouped convolution.
    """
    uses = Counter(use.weight for use in graph.uses)
    return {
        _name_of(graph, use.weight): graph.shapes[use.weight][use.in_dim]
        for use in graph.uses
        if uses[use.weight] == 1
        and use.plain
        and use.groups == 1
        and (use.out_dim, use.in_dim) == (0, 1)
        and use.weight.endswith(".weight")
        and use.in_dim in graph.tensors.get(use.weight, {})
    }


def _name_of(graph: ChannelGraph, weight: str) -> str:
    return next(layer.name for layer in graph.layers.values() if layer.weight == weight)


def compensated(
    model: nn.Module, graph: ChannelGraph, plan: Plan, mean_inputs: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """What each reader's bias is with what the channels that a plan removes give on average. Nothing is changed.

    A layer without bias that a batch norm follows directly has it taken off the norm's running mean instead, which is the same in
    evaluation.

    Args:
        model: The network, not yet cut.
        graph: Its graph.
        plan: The cut that is going to be made.
        mean_inputs: Layer name to the mean of each input channel, over samples and positions.

    Returns:
        Name of a bias or running mean to its new value, of its size before the cut; and the layers that read removed channels
        and have nowhere to put the mean, or whose mean input is not known.
    """
    tensors, known = all_tensors(model), readers(graph)
    values: dict[str, Tensor] = {}
    without: list[str] = []
    read = {use.weight: kept for use in graph.uses if (kept := plan.keep.get(use.weight, {}).get(use.in_dim)) is not None}
    for weight, kept in read.items():
        name, bias, norm = _name_of(graph, weight), f"{weight.removesuffix('weight')}bias", graph.norms.get(weight)
        place = bias if bias in tensors else norm
        if name not in known or name not in mean_inputs or place is None:
            without.append(name)
            continue
        removed: Vector = np.delete(np.arange(graph.shapes[weight][1]), kept)
        kernel = tensors[weight].detach().double()
        given = kernel.flatten(2).sum(2) if kernel.ndim > 2 else kernel
        shift = given[:, removed] @ mean_inputs[name].to(kernel)[removed]
        values[place] = tensors[place].detach() + (shift if place == bias else -shift).to(tensors[place])
    return values, without
