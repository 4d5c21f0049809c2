"""The spectrum of channels that are chosen together, from the covariances of the layers that share them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, cast

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from typing_extensions import override

from lit_compress.graph import ChannelGraph, ChannelGroup
from lit_compress.inputs import LayerInput, inputs_of, readings, watched_inputs
from lit_compress.labels import FIXED
from lit_compress.pictures import plot_spectra
from lit_compress.rankings import Method, Ranking, Rankings, by_name, sort_out
from lit_compress.selection import pfa
from lit_compress.selection.reconstruction import removal_order
from lit_compress.skips import Tap
from lit_compress.statistics.covariance import StreamingCovariance, spatial_max
from lit_compress.statistics.gather import Watched


@dataclass(frozen=True)
class GroupSpectrum(Ranking):
    """What the responses of tied channels say: those of one layer, or of the layers that share a residual stream.

    Args:
        spectrum: Share of energy in each principal direction, descending, ``(C,)``.
    """

    spectrum: Tensor


Select: TypeAlias = Literal["correlation", "reconstruction"]


class PFA(Method):
    """Principal Filter Analysis: from the covariance of the responses, of tied layers together, to a spectrum.

    How many channels a layer needs is a matter of its spectrum; which, of ``select``.

    Args:
        select: ``"correlation"``: those that correlate the most with others go first, as in the paper. ``"reconstruction"``:
            those go first whose loss the layers that read them make up for best, once the others have taken over
            (:mod:`~lit_compress.selection.reconstruction`); of what is read by a grouped or transposed convolution or by a
            weight that is used twice, by correlation, with a warning.

    Raises:
        ValueError: If ``select`` is unknown.
    """

    name, knob = "pfa", "energy"

    def __init__(self, select: Select = "correlation") -> None:
        if select not in ("correlation", "reconstruction"):
            raise ValueError(f"Argument `select` must be 'correlation' or 'reconstruction' but got {select!r}.")
        self.select = select
        self.options = "" if select == "correlation" else f"select={select}"

    @override
    def watched(self, model: nn.Module, graph: ChannelGraph) -> dict[str, Watched]:
        modules = dict(model.named_modules())
        taps = {sum_name(point.tap): point.tap for point in graph.sums if point.tap is not None}
        odd = _complex(model, graph)
        groups = [observed(graph, group) for group in graph.groups() if odd.isdisjoint(group.members)]
        sizes = {name: len(position) for group in groups for name, position in group.members.items()}
        inputs = watched_inputs(model, graph, covariances=True) if self.select == "reconstruction" else {}
        return inputs | {
            name: Watched(taps.get(name, Tap(name)), StreamingCovariance(size, sync_on_compute=False), spatial_max)
            for name, size in sizes.items()
            if name in modules or name in taps
        }

    @override
    def rank(
        self, model: nn.Module, graph: ChannelGraph, watched: Mapping[str, Watched]
    ) -> tuple[dict[str, GroupSpectrum], dict[str, str]]:
        spectra, whole = group_spectra(graph, {name: cast(StreamingCovariance, what.metric) for name, what in watched.items()})
        if self.select == "reconstruction":
            spectra = _by_reconstruction(model, graph, spectra, inputs_of(graph, watched, covariances=True))
        return spectra, whole | dict.fromkeys(_complex(model, graph), "its responses are complex numbers")

    @override
    def own_widths(self, rankings: Rankings) -> tuple[dict[str, int], str]:
        return {name: pfa.kl_width(found.spectrum) for name, found in rankings.items()}, "kl"

    @override
    def widths(self, rankings: Rankings, knob: float) -> dict[str, int]:
        return {name: pfa.energy_width(found.spectrum, knob) for name, found in rankings.items()}

    @override
    def steps(self, rankings: Rankings) -> Sequence[float]:
        sums = [found.spectrum.cumsum(0).clamp(max=1).numpy() for found in rankings.values()]
        return [float(step) for step in np.unique(np.concatenate([[1.0], *sums]))]

    @override
    def figures(self, rankings: Rankings, kept: Mapping[str, int]) -> dict[str, Figure]:
        return {"spectra": plot_spectra({name: found.spectrum for name, found in rankings.items()}, kept)}


def _complex(model: nn.Module, graph: ChannelGraph) -> set[str]:
    weights = dict(model.named_parameters())
    return {name for name, layer in graph.layers.items() if layer.weight in weights and weights[layer.weight].is_complex()}


def _by_reconstruction(
    model: nn.Module, graph: ChannelGraph, spectra: Mapping[str, GroupSpectrum], inputs: Mapping[str, LayerInput]
) -> dict[str, GroupSpectrum]:
    """The same spectra, with the order in which channels go by what the layers that read them lose; inactive ones first."""
    ordered, unknown = dict(spectra), []
    for name, found in spectra.items():
        read_by = readings(model, graph, found.group, inputs)
        if read_by is None:
            unknown.append(name)
            continue
        order = torch.from_numpy(removal_order(read_by, len(found.order)))
        inactive = found.order[: found.inactive]
        active = order[~torch.isin(order, inactive)]
        ordered[name] = replace(found, order=torch.cat([inactive, active]))
    if unknown:
        warnings.warn(
            f"Of what reads the channels of {', '.join(map(repr, unknown))}, too little is known to reconstruct it (grouped or "
            "transposed convolutions, weights that are used twice, blocks that are padded back, channels with unequally many "
            "places in a flattened input): they are chosen by correlation.",
            stacklevel=2,
        )
    return ordered


def group_spectra(
    graph: ChannelGraph, covariances: Mapping[str, StreamingCovariance]
) -> tuple[dict[str, GroupSpectrum], dict[str, str]]:
    """The spectrum of every group of channels that has one, and the reason for each layer that is left whole.

    Args:
        graph: The network's graph.
        covariances: Layer name, or :func:`sum_name`, to the covariance of its responses, of one pass over the data.

    Returns:
        Group name (of its first layer; ``"conv#2"`` for the second group that starts with it) to spectrum, and layer name to the
        reason why nothing is cut out of it.
    """
    spectra: list[GroupSpectrum] = []
    groups, whole = sort_out(graph)
    for group in groups:
        seen = observed(graph, group)
        why = _unfit(seen, covariances)
        pooled = None if why else pooled_covariance(seen, {name: covariances[name].compute() for name in seen.members})
        if pooled is None:
            whole |= dict.fromkeys(group.members, why or "its responses are constant on these data")
            continue
        order, inactive = pfa.removal_order(pooled).cpu(), len(pfa.inactive_filters(pooled))
        spectra.append(GroupSpectrum(group, order, inactive, pfa.spectrum(pooled)))
    return by_name(spectra), whole


def sum_name(tap: Tap) -> str:
    """What a sum is called among the covariances."""
    return f"the sum at {tap.module}, call {tap.call}"


def observed(graph: ChannelGraph, group: ChannelGroup) -> ChannelGroup:
    """The group with that in place of its members whose responses are to be analysed.

    For layers that a skip ties, it is the sum of the two branches (P3, appendix C.3): where both end in a layer of their own (a
    projection), or else the last sum of the stream. A sum that no module takes or gives cannot be seen; the members are then
    pooled.
    """
    if len(group.members) < 2:
        return group
    wanted = set(group.classes.tolist())
    sums = [point for point in graph.sums if point.tap is not None and wanted.issubset(point.channels.tolist())]
    if not sums:
        return group
    point = next((point for point in sums if point.projection), sums[-1])
    position = {channel_class: index for index, channel_class in enumerate(group.classes.tolist())}
    channels = np.array([position.get(channel_class, FIXED) for channel_class in point.channels.tolist()], dtype=np.int64)
    return ChannelGroup(group.classes, {sum_name(point.tap): channels})  # type: ignore[arg-type]  # sums without a tap are left out


def pooled_covariance(group: ChannelGroup, covariances: Mapping[str, Tensor]) -> Tensor | None:
    """Covariance of a group's channels: that of its layer, or the sum over tied layers, each scaled to a total variance of 1.

    The responses before a skip connection's sum differ in scale from layer to layer (a norm follows each), so that each layer has
    the same say. Of uncorrelated branches, the covariance of the sum is the sum of the covariances.

    Returns:
        ``(C, C)`` float64 on the CPU, or None if every response is constant.
    """
    pooled = torch.zeros(len(group.classes), len(group.classes), dtype=torch.float64)
    for name, position in group.members.items():
        where, part = torch.from_numpy(position), covariances[name].cpu()
        inside = where != FIXED
        if not inside.all():
            where, part = where[inside], part[inside][:, inside]
        total = part.diagonal().sum()
        if total <= 0:
            continue
        if torch.equal(where, torch.arange(len(group.classes))):  # nearly always, and scattering 2048 channels takes 0.3 s
            pooled += part / total
        else:
            for once in _without_repeats(where):
                rows = torch.zeros(len(group.classes), len(once), dtype=torch.float64)
                rows.index_add_(0, where[once], part[once][:, once] / total)
                pooled.index_add_(1, where[once], rows)
    return pooled if pooled.diagonal().sum() > 0 else None


def _without_repeats(where: Tensor) -> list[Tensor]:
    """Indices into positions, parted so that no position comes twice: the groups of a grouped convolution, say.

    Channels of one layer that are tied count like those of tied layers: their sum, in which they may cancel, is nowhere computed.
    """
    order = where.argsort(stable=True)
    counts = where.bincount()
    turn = torch.cat([torch.arange(int(count)) for count in counts])
    return [order[turn == number].sort().values for number in range(int(counts.max()))]


def _unfit(group: ChannelGroup, covariances: Mapping[str, StreamingCovariance]) -> str:
    """Why a group cannot be analysed, or an empty string."""
    for name in group.members:
        if name not in covariances:
            return f"{name!r} is not a module of its own, so that its responses cannot be seen"
        samples, channels = int(covariances[name].count), len(group.classes)
        if samples < max(channels, 2):
            return f"its {channels} channels need at least as many samples to have a spectrum, but it saw {samples}"
    return ""
