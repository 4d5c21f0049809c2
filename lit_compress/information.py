"""Methods that ask how much information a unit carries: of sigmoid units read as bits, and of gates by the noise they stand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from lit_compress.graph import ChannelGraph, ChannelGroup
from lit_compress.labels import FIXED
from lit_compress.rankings import Rankings
from lit_compress.scores import GroupScores, ScoreMethod
from lit_compress.selection import pib
from lit_compress.statistics.entropies import StreamingEntropies
from lit_compress.statistics.gather import Watched

ONE_CHANNEL = "it has one channel"


@dataclass(frozen=True, kw_only=True)
class GroupEntropies(GroupScores):
    """What the activations of a layer's sigmoid units say.

    Args:
        entropies: Of each unit, in bits.
        middle: Share of the activations between 0.1 and 0.9.
    """

    entropies: pib.Entropies
    middle: float


class PIB(ScoreMethod):
    """The information of sigmoid units, read as bits.

    Layers that no sigmoid follows, as a module or right before one, are left whole, and so are tied layers.

    Args:
        variant: See :func:`~lit_compress.selection.pib.scores`.
        marginal: See :func:`~lit_compress.selection.pib.entropies`.

    Raises:
        ValueError: If either is unknown.

    Source: PIBprune, section 4.5.
    """

    name = "pib"

    def __init__(self, variant: pib.Variant = "A", marginal: pib.Marginal = "jensen") -> None:
        super().__init__("global")
        pib.keep_units(torch.zeros(1, 1), variant, marginal=marginal)  # refuses unknown ones
        self.variant, self.marginal = variant, marginal
        self.options = f"variant={variant}, marginal={marginal}"

    @override
    def watched(self, model: nn.Module, graph: ChannelGraph) -> dict[str, Watched]:
        watched = {}
        for group in graph.groups():
            point = graph.activation_of(group)
            if not why_no_bits(graph, group) and point is not None and point.tap is not None:
                shape = list(point.shape[1:])
                shape.insert(0, shape.pop(point.dim - 1))
                metric = StreamingEntropies(shape, sync_on_compute=False)
                watched[group.name] = Watched(point.tap, metric, dim=point.dim)
        return watched

    @override
    def judge(
        self, model: nn.Module, graph: ChannelGraph, group: ChannelGroup, watched: Mapping[str, Watched]
    ) -> GroupEntropies | str:
        if why := why_no_bits(graph, group):
            return why
        metric = cast(StreamingEntropies, watched[group.name].metric)
        found = metric.entropies(self.marginal)
        order, width = pib.removal_order(found, self.variant), pib.width_of(found, self.variant)
        scores = pib.scores(found, self.variant)
        return GroupEntropies(group, order, 0, scores, width, entropies=found, middle=metric.middle)

    @override
    def values(self, rankings: Rankings) -> dict[str, float]:
        return {f"information/{name}": bits for name, bits in information_of(rankings).items()}


def information_of(rankings: Rankings) -> dict[str, float]:
    """What the units of each layer carry together, in bits, from what :class:`PIB` found."""
    return {name: float(found.entropies.information.sum()) for name, found in rankings.items()}


def why_no_bits(graph: ChannelGraph, group: ChannelGroup) -> str:
    """Why a group's channels cannot be read as bits, or an empty string."""
    point = graph.activation_of(group)
    if len(group.classes) == 1:
        return ONE_CHANNEL
    if len(group.members) > 1:
        return f"its channels are tied to those of {', '.join(map(repr, list(group.members)[1:]))}"
    if point is None or not np.array_equal(point.channels, group.classes):
        return "no activation function takes its channels alone"
    if point.function != "sigmoid":
        return f"a {point.function} follows it, not a sigmoid"
    return "" if point.tap is not None else "no module gives or takes its sigmoid, where it could be seen; use nn.Sigmoid"


class VIB(ScoreMethod):
    r"""The noise that gates have found each channel to stand: channels of a high :math:`\log \alpha` go.

    Args:
        log_alphas: Layer name to :math:`\log \alpha` of each of its channels ``(C,)``; other layers are left whole.
        threshold: Without another target, channels stay whose :math:`\log \alpha` is below it, at least one in each layer.

    Source: VIBNet.
    """

    name = "vib"

    def __init__(self, log_alphas: Mapping[str, Tensor], threshold: float = 0.0) -> None:
        super().__init__("global")
        self.log_alphas, self.threshold = dict(log_alphas), threshold
        self.options = f"threshold={threshold:g}"

    @override
    def judge(
        self, model: nn.Module, graph: ChannelGraph, group: ChannelGroup, watched: Mapping[str, Watched]
    ) -> GroupScores | str:
        log_alpha = self.log_alphas.get(group.name)
        if log_alpha is None:
            return "it had no gate"
        scores = -log_alpha.detach().cpu().double()[torch.from_numpy(group.members[group.name]) != FIXED]
        return GroupScores.of(group, scores, max(int((scores > -self.threshold).sum()), 1))
