"""What the layers are given that read channels which may be cut: the mean of each channel, and how channels vary together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from lit_compress.graph import ChannelGraph, ChannelGroup
from lit_compress.labels import FIXED
from lit_compress.selection.reconstruction import Reading
from lit_compress.skips import Tap, Vector
from lit_compress.slicing import all_tensors
from lit_compress.statistics.covariance import StreamingCovariance
from lit_compress.statistics.gather import Watched
from lit_compress.statistics.mean import StreamingMean


@dataclass(frozen=True)
class Reader:
    """A layer that reads channels which may be cut.

    Args:
        name: As in ``model.named_modules()``.
        weight: Name of its weight.
        size: Of its input, C.
        slots: Indices into its input, ``(K, m)``: in each row those of one channel, which has m places in a flattened map and one
            elsewhere. None if channels do not all have as many places.
        classes: The class of the channel of each row, ``(K,)``; -1 for one that stays whatever is cut.
    """

    name: str
    weight: str
    size: int
    slots: Vector | None
    classes: Vector


@dataclass(frozen=True)
class LayerInput:
    """What a layer was given in a pass over the data.

    Args:
        mean: Of each entry of its input, over samples and positions, ``(C,)`` float64; None if it did not run, as heads that only
            training runs.
        covariance: Of the channels in the rows of :attr:`Reader.slots`, over samples and all their places, ``(K, K)`` float64;
            None if it was not asked for, or channels do not all have as many places.
        vectors: Samples times places that the covariance is from.
    """

    mean: Tensor | None
    covariance: Tensor | None = None
    vectors: int = 0


def readers(graph: ChannelGraph) -> dict[str, Reader]:
    """Layers that read channels which may be cut, and by what.

    A weight that is used twice or multiplied with another parameter first is not among them, nor is that of a transposed or a
    grouped convolution.
    """
    uses = Counter(use.weight for use in graph.uses)
    names = {layer.weight: layer.name for layer in graph.layers.values()}
    found = {}
    for use in graph.uses:
        classes = graph.tensors.get(use.weight, {}).get(use.in_dim)
        plain = uses[use.weight] == 1 and use.plain and use.groups == 1 and (use.out_dim, use.in_dim) == (0, 1)
        if plain and classes is not None and use.weight.endswith(".weight"):
            name = names[use.weight]
            found[name] = Reader(name, use.weight, len(classes), *_places(classes))
    return found


def _places(classes: Vector) -> tuple[Vector | None, Vector]:
    """The slots and classes of a :class:`Reader`, from the class of each entry of its input."""
    different, counts = np.unique(classes, return_counts=True)
    if different[0] == FIXED and (counts[1:] == 1).all():  # what cannot be cut can still tell about what is
        return np.arange(len(classes))[:, None], classes
    if different[0] == FIXED or (counts != counts[0]).any():
        return None, different
    return classes.argsort(kind="stable").reshape(len(different), -1), different


def watched_inputs(model: nn.Module, graph: ChannelGraph, *, covariances: bool) -> dict[str, Watched]:
    """What to gather for :func:`inputs_of`: means, and the covariances as well if they are wanted."""
    modules, tensors = dict(model.named_modules()), all_tensors(model)
    watched: dict[str, Watched] = {}
    for name, reader in readers(graph).items():
        if name not in modules:
            continue
        mean = StreamingMean(reader.size, sync_on_compute=False)
        watched[_mean_of(name)] = Watched(Tap(name, "input"), mean, at_once=True)
        if covariances and reader.slots is not None:
            covariance = StreamingCovariance(len(reader.slots), sync_on_compute=False).to(tensors[reader.weight].device)
            rows = partial(_rows, slots=torch.from_numpy(reader.slots))
            watched[_covariance_of(name)] = Watched(Tap(name, "input"), covariance, rows, at_once=True)
    return watched


def inputs_of(graph: ChannelGraph, watched: Mapping[str, Watched]) -> dict[str, LayerInput]:
    """What each reader was given, from what :func:`watched_inputs` asked for, after the pass."""
    inputs = {}
    for name in readers(graph):
        if _mean_of(name) not in watched:
            continue
        seen = cast(StreamingMean, watched[_mean_of(name)].metric)
        mean = seen.compute() if seen.count > 0 else None
        gathered = watched.get(_covariance_of(name))
        covariance = None if gathered is None else cast(StreamingCovariance, gathered.metric)
        if covariance is None or covariance.count < 2:
            inputs[name] = LayerInput(mean)
        else:
            inputs[name] = LayerInput(mean, covariance.compute().cpu(), int(covariance.count))
    return inputs


def readings(
    model: nn.Module, graph: ChannelGraph, group: ChannelGroup, inputs: Mapping[str, LayerInput]
) -> list[Reading] | None:
    """What the layers that read a group's channels make of them, those that run; None if one of them cannot tell."""
    tensors, known = all_tensors(model), readers(graph)
    position = {channel_class: index for index, channel_class in enumerate(group.classes.tolist())}
    names = {layer.weight: layer.name for layer in graph.layers.values() if layer.own}
    found = []
    for use in graph.uses:
        read = graph.tensors.get(use.weight, {}).get(use.in_dim)
        if use.weight not in names or read is None or position.keys().isdisjoint(read.tolist()):
            continue
        name = names[use.weight]
        given, reader = inputs.get(name), known.get(name)
        if given is not None and given.mean is None:
            continue
        if given is None or given.covariance is None or reader is None or reader.slots is None:
            return None
        weights = tensors[use.weight].detach().double().cpu()[:, torch.from_numpy(reader.slots)].movedim(1, 0).flatten(1)
        channels = np.array([position.get(channel_class, FIXED) for channel_class in reader.classes.tolist()], dtype=np.int64)
        found.append(Reading(given.covariance.numpy(), (weights @ weights.T).numpy(), channels, given.vectors))
    return found or None


def _rows(value: Tensor, slots: Tensor) -> Tensor:
    """The channels of an input ``(N, C, *positions)`` at each of their places, ``(N * places, K)``."""
    as_it_is = slots.shape[1] == 1 and len(slots) == value.shape[1]
    places = value.unsqueeze(2) if as_it_is else value[:, slots.to(value.device)]
    return places.movedim(1, -1).flatten(0, -2)


def _mean_of(layer: str) -> str:
    return f"{layer}, the mean of its input"


def _covariance_of(layer: str) -> str:
    return f"{layer}, its input"
