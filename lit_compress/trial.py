"""Whether channels that a forward parts (a chunk, a shuffle) may be cut: one is left out, and the rest must be what is left.

The sizes of the parts are the forward's own business: ``x.chunk(2, 1)`` follows a cut, ``x.split(64, 1)`` does not, and nothing
in the operation itself tells them apart. So the network runs without a channel of each part, and its graph is compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lit_compress.labels import FIXED
from lit_compress.skips import Marks, Vector

if TYPE_CHECKING:
    from lit_compress.graph import ChannelGraph


def one_of_each(graph: ChannelGraph, parted: Iterable[Vector]) -> Marks:
    """Marks on a class of channels from each of several places; on none where none may be cut.

    Args:
        graph: The network's graph.
        parted: For each place, the classes that meet there.
    """
    marks = graph.mark()
    for classes in parted:
        if not marks[classes].any():
            for channel_class in sorted(set(classes.tolist()) - graph.frozen.keys() - {FIXED}):
                marks[channel_class] = True
                if not any(marks[layer.classes].all() for layer in graph.layers.values()):
                    break
                marks[channel_class] = False
    return marks


def without(graph: ChannelGraph, marks: Marks, tensors: Mapping[str, Tensor]) -> dict[Tensor, Tensor]:
    """Parameters and buffers to what is left of them without the marked classes, where that is less."""
    left: dict[Tensor, Tensor] = {}
    for name, dims in graph.tensors.items():
        value = tensors[name].data
        for dim, classes in dims.items():
            if marks[classes].any():
                value = value.index_select(dim, torch.from_numpy(np.flatnonzero(~marks[classes])).to(value.device))
        if value.shape != tensors[name].shape:
            left[tensors[name]] = value
    return left


def is_what_is_left(smaller: ChannelGraph, graph: ChannelGraph, marks: Marks) -> bool:
    """Whether a network without the marked classes has the graph of the whole one without them.

    Classes may be numbered otherwise. Where a single channel is left, nothing can be said of it.
    """
    pairs: set[tuple[int, int]] = set()
    for name, dims in graph.tensors.items():
        for dim, classes in dims.items():
            expected = _free(graph, classes[~marks[classes]])
            found = smaller.tensors.get(name, {}).get(dim)
            found = np.full(len(expected), FIXED) if found is None else _free(smaller, found)
            if len(found) != len(expected):
                return False
            if len(expected) > 1:
                pairs.update(zip(expected.tolist(), found.tolist(), strict=True))
    return len({one for one, _ in pairs}) == len(pairs) == len({other for _, other in pairs})


def _free(graph: ChannelGraph, classes: Vector) -> Vector:
    return np.array([FIXED if channel_class in graph.frozen else channel_class for channel_class in classes.tolist()], np.int64)
