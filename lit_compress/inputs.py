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
        classes: The class of the channel of each row, ``(K,)``; -1 for one that stays whatever is cut. Tied channels of one
            layer, as those of a convolution in groups, have rows of their own.
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
        covariance: Of the channels in the rows of :attr:`Reader.slots`, over samples and positions, ``(K, K)`` float64; of a
            flattened map the mean of those at each of its places. None if channels do not all have as many places.
        samples: How many the covariance is from, or would be; 0 if it was not asked for.
    """

    mean: Tensor | None
    covariance: Tensor | None = None
    samples: int = 0


def readers(graph: ChannelGraph) -> dict[str, Reader]:
    """Layers that read channels which may be cut, and by what.

    A weight that is used twice or multiplied with another parameter first is not among them, nor is that of a transposed or a
    grouped convolution.
    """
    uses = Counter(use.weight for use in graph.uses)
    names = {layer.weight: layer.name for layer in graph.layers.values()}
    tied = _tied(graph)
    found = {}
    for use in graph.uses:
        classes = graph.tensors.get(use.weight, {}).get(use.in_dim)
        plain = uses[use.weight] == 1 and use.plain and use.groups == 1 and (use.out_dim, use.in_dim) == (0, 1)
        if plain and classes is not None and use.weight.endswith(".weight"):
            name = names[use.weight]
            found[name] = Reader(name, use.weight, len(classes), *_places(classes, tied))
    return found


def _tied(graph: ChannelGraph) -> dict[int, int]:
    """Class to how many channels of one layer have it, where these are several."""
    tied: dict[int, int] = {}
    for layer in graph.layers.values():
        for channel_class, count in zip(*np.unique(layer.classes, return_counts=True), strict=True):
            if count > 1:
                tied[int(channel_class)] = max(int(count), tied.get(int(channel_class), 1))
    return tied


def _places(classes: Vector, tied: Mapping[int, int]) -> tuple[Vector | None, Vector]:
    """The slots and classes of a :class:`Reader`, from the class of each entry of its input."""
    fixed = classes == FIXED
    different, counts = np.unique(classes[~fixed], return_counts=True)
    if all(count == tied.get(int(one), 1) for one, count in zip(different, counts, strict=True)):
        # What cannot be cut can tell about what is, if it is not so much that it would take the memory.
        slots = np.arange(len(classes)) if 2 * fixed.sum() <= len(classes) else np.flatnonzero(~fixed)
        return slots[:, None], classes[slots]
    if fixed.any() or (counts != counts[0]).any() or not tied.keys().isdisjoint(different.tolist()):
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


def inputs_of(graph: ChannelGraph, watched: Mapping[str, Watched], *, covariances: bool) -> dict[str, LayerInput]:
    """What each reader was given, from what :func:`watched_inputs` asked for, after the pass."""
    inputs = {}
    for name, reader in readers(graph).items():
        if _mean_of(name) not in watched:
            continue
        seen = cast(StreamingMean, watched[_mean_of(name)].metric)
        mean = seen.compute() if seen.count > 0 else None
        gathered = watched.get(_covariance_of(name)) if covariances else None
        metric = None if gathered is None else cast(StreamingCovariance, gathered.metric)
        covariance = None if mean is None or metric is None or metric.count < 2 else _within_places(metric, mean, reader)
        inputs[name] = LayerInput(mean, covariance, int(seen.count) if covariances else 0)
    return inputs


def _within_places(metric: StreamingCovariance, mean: Tensor, reader: Reader) -> Tensor:
    """The mean of the covariances at each place: of all places together, less that of the means of the places."""
    pooled = metric.compute().cpu()
    if reader.slots is None or reader.slots.shape[1] == 1:
        return pooled
    places = mean.cpu()[torch.from_numpy(reader.slots)]
    places = places - places.mean(1, keepdim=True)
    count = float(metric.count)
    return pooled * ((count - 1) / count) - places @ places.T / places.shape[1]


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
        weights = tensors[use.weight].detach().cpu().double()[:, torch.from_numpy(reader.slots)].movedim(1, 0).flatten(1)
        channels = np.array([position.get(channel_class, FIXED) for channel_class in reader.classes.tolist()], dtype=np.int64)
        found.append(Reading(given.covariance.numpy(), (weights @ weights.T).numpy(), channels, given.samples))
    return found or None


def _rows(value: Tensor, slots: Tensor) -> Tensor:
    """The channels of an input ``(N, C, *positions)`` at each of their places, ``(N * places, K)``."""
    as_it_is = slots.shape[1] == 1 and len(slots) == value.shape[1]  # every entry once, in order
    places = value.unsqueeze(2) if as_it_is else value[:, slots.to(value.device)]
    return places.movedim(1, -1).flatten(0, -2)


def _mean_of(layer: str) -> str:
    return f"the mean input of {layer!r}"


def _covariance_of(layer: str) -> str:
    return f"the input of {layer!r}"
