"""Methods that score channels one by one: by the size of their weights, or of the scales of their batch norms."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from typing_extensions import override

from lit_compress.graph import ChannelGraph, ChannelGroup
from lit_compress.labels import FIXED
from lit_compress.pictures import plot_scores
from lit_compress.rankings import Method, Ranking, Rankings, by_name, sort_out
from lit_compress.slicing import all_tensors
from lit_compress.statistics.gather import Watched

Scope = Literal["global", "layer"]
_ROUNDING = 1e-9  # 0.07 * 100 is 7.000000000000001


@dataclass(frozen=True)
class GroupScores(Ranking):
    """What each channel of a group is worth.

    Args:
        scores: Higher is kept longer, ``(C,)`` float64.
        width: How many channels the method itself would keep; None if it needs a target.
    """

    scores: Tensor
    width: int | None = None

    @classmethod
    def of(cls, group: ChannelGroup, scores: Tensor, width: int | None = None) -> GroupScores:
        """Channels in ascending order of their scores, of equals the first one first."""
        return cls(group, scores.argsort(stable=True), 0, scores, width)


class ScoreMethod(Method):
    """A method whose target is a share of the channels: those of the highest scores.

    Args:
        scope: ``"global"``: of all layers together, so that some lose more than others. ``"layer"``: of each layer alike.

    Raises:
        ValueError: If the scope is unknown.
    """

    knob = "keep_channels"

    def __init__(self, scope: Scope = "global") -> None:
        if scope not in ("global", "layer"):
            raise ValueError(f"Argument `scope` must be 'global' or 'layer' but got {scope!r}.")
        self.scope = scope
        self.options = f"scope={scope}"

    @abstractmethod
    def judge(
        self, model: nn.Module, graph: ChannelGraph, group: ChannelGroup, watched: Mapping[str, Watched]
    ) -> GroupScores | str:
        """What a group's channels are worth, or the reason why that cannot be told."""

    @override
    def rank(
        self, model: nn.Module, graph: ChannelGraph, watched: Mapping[str, Watched]
    ) -> tuple[Mapping[str, GroupScores], dict[str, str]]:
        groups, whole = sort_out(graph)
        found: list[GroupScores] = []
        for group in groups:
            scores = self.judge(model, graph, group, watched)
            if isinstance(scores, str):
                whole |= dict.fromkeys(group.members, scores)
            else:
                found.append(scores)
        return by_name(found), whole

    @override
    def own_widths(self, rankings: Rankings) -> tuple[dict[str, int], str]:
        widths = {name: found.width for name, found in rankings.items() if found.width is not None}
        if len(widths) < len(rankings):
            raise ValueError(f"{self.name} needs a target: give {self.targets}.")
        return widths, ""

    @override
    def widths(self, rankings: Rankings, knob: float) -> dict[str, int]:
        if not 0 < knob <= 1:
            raise ValueError(f"Argument `{self.knob}` must lie in (0, 1] but got {knob}.")
        sizes = {name: len(found.order) for name, found in rankings.items()}
        if self.scope == "layer":
            return {name: ceil(size * knob - _ROUNDING) for name, size in sizes.items()}
        scores = torch.cat([torch.zeros(0, dtype=torch.float64), *(found.scores for found in rankings.values())])
        of = np.repeat(np.arange(len(sizes)), list(sizes.values()))
        kept = scores.argsort(stable=True).flip(0)[: ceil(len(scores) * knob - _ROUNDING)]
        return dict(zip(sizes, np.bincount(of[kept.numpy()], minlength=len(sizes)).tolist(), strict=True))

    @override
    def steps(self, rankings: Rankings) -> Sequence[float]:
        sizes = {len(found.order) for found in rankings.values()}
        if self.scope == "global":
            sizes = {sum(len(found.order) for found in rankings.values())}
        return sorted({count / size for size in sizes for count in range(1, size + 1)} | {1.0})

    @override
    def figures(self, rankings: Rankings, kept: Mapping[str, int]) -> dict[str, Figure]:
        return {"scores": plot_scores({name: found.scores for name, found in rankings.items()}, kept)}


class Magnitude(ScoreMethod):
    r"""Filters of small weights go: the :math:`\ell_1` norm of each, relative to the mean of its layer.

    Relative, since a layer's fan-in, and not the worth of its filters, decides how large its norms are: globally, whole layers
    would go. Within a layer, the order is that of the norms. Tied channels have the mean over their layers.

    Source: Li et al., *Pruning Filters for Efficient ConvNets*, 2017 ("FP" in PFA, section 4), per layer.
    """

    name = "magnitude"

    @override
    def judge(
        self, model: nn.Module, graph: ChannelGraph, group: ChannelGroup, watched: Mapping[str, Watched]
    ) -> GroupScores | str:
        tensors = all_tensors(model)
        sizes = {}
        for name in group.members:
            layer = graph.layers[name]
            weight = tensors[layer.weight].detach().movedim(layer.dim, 0)
            norms = weight.flatten(1).abs().sum(1, dtype=torch.float64)
            sizes[name] = norms / norms.mean().clamp(min=torch.finfo(norms.dtype).tiny)
        return GroupScores.of(group, mean_over_members(group, sizes))


class Slimming(ScoreMethod):
    r"""Channels go that their batch norm scales down: :math:`|\gamma|`, of tied channels the mean over their layers.

    Source: Liu et al., *Learning Efficient Convolutional Networks through Network Slimming*, 2017 ("NS" in PFA, section 4).
    """

    name = "slimming"

    @override
    def judge(
        self, model: nn.Module, graph: ChannelGraph, group: ChannelGroup, watched: Mapping[str, Watched]
    ) -> GroupScores | str:
        scales = norm_scales(model, graph)
        if missing := [name for name in group.members if name not in scales]:
            return f"no batch norm with a scale takes the output of {missing[0]!r} alone"
        found = {name: scales[name].detach().abs().double() for name in group.members}
        return GroupScores.of(group, mean_over_members(group, found))


def norm_scales(model: nn.Module, graph: ChannelGraph) -> dict[str, Tensor]:
    """Layer name to the scale of the batch norm that alone takes its output, for layers that have one."""
    tensors = all_tensors(model)
    scales = {}
    for name, layer in graph.layers.items():
        mean = graph.norms.get(layer.weight)
        scale = None if mean is None else tensors.get(mean.removesuffix("running_mean") + "weight")
        if scale is not None:
            scales[name] = scale
    return scales


def mean_over_members(group: ChannelGroup, values: Mapping[str, Tensor]) -> Tensor:
    """Mean of each of a group's channels over the layers that share it, ``(C,)`` float64 on the CPU."""
    total = torch.zeros(len(group.classes), dtype=torch.float64)
    count = torch.zeros(len(group.classes), dtype=torch.float64)
    for name, position in group.members.items():
        inside = torch.from_numpy(position != FIXED)
        where = torch.from_numpy(position)[inside]
        total.index_add_(0, where, values[name].cpu().double()[inside])
        count.index_add_(0, where, torch.ones(len(where), dtype=torch.float64))
    return total / count
