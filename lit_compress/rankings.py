"""What any selection method gives: for channels that are chosen together, the order in which they go and how many stay."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, ClassVar, TypeAlias, TypeVar

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from lit_compress.graph import ChannelGraph, ChannelGroup
from lit_compress.statistics.gather import Watched


@dataclass(frozen=True)
class Ranking:
    """The order in which the channels of a group go.

    Args:
        group: The channels.
        order: Positions of the group's channels in the order in which they are removed, ``(C,)``.
        inactive: How many of the first in ``order`` are removed in any case.
    """

    group: ChannelGroup
    order: Tensor
    inactive: int

    def kept(self, width: int, min_width: int, round_to: int = 1, available: Tensor | None = None) -> Tensor:
        """Positions that stay, ascending: ``width`` of them or fewer, as many as are active, rounded up to a multiple.

        Args:
            width: How many.
            min_width: How many at least, active or not.
            round_to: The multiple.
            available: Which may stay at all ``(C,)``, bool; None for all.
        """
        order, active = self.order, torch.arange(len(self.order)) >= self.inactive
        if available is not None:
            order, active = order[available[order]], active[available[order]]
        least = max(min(width, int(active.sum())), min_width)
        return order[max(len(order) - round_to * ceil(least / round_to), 0) :].sort().values


R = TypeVar("R", bound=Ranking)
# Name of a group (of its first layer; "conv#2" for the second group that starts with it) to its ranking.
Rankings: TypeAlias = Mapping[str, Any]


class Method(ABC):
    """What a selection method adds to an analysis: its statistics, the order of the channels, and how many of them stay.

    Everything else is the same for all: groups of tied channels, the search for a size, the recipe.

    Attributes:
        name: What recipes call it.
        options: What sets this one apart, for a recipe.
        knob: What its own target is called in :meth:`Analysis.recipe <lit_compress.Analysis.recipe>`; higher keeps more.
    """

    name: ClassVar[str]
    knob: ClassVar[str]
    options: str = ""

    @property
    def targets(self) -> str:
        """What a recipe can be asked for, as an error names it."""
        return f"`{self.knob}`, `keep_params`, `keep_mult_adds` or `keep_latency`"

    def describe(self, target: str = "") -> str:
        """What chose the channels, for a recipe, so that a reader can redo it."""
        return f"{self.name}({', '.join(filter(None, (self.options, target)))})"

    def watched(self, model: nn.Module, graph: ChannelGraph) -> dict[str, Watched]:
        """What is to be gathered in a pass over the data, by name; empty if nothing is."""
        return {}

    @abstractmethod
    def rank(self, model: nn.Module, graph: ChannelGraph, watched: Mapping[str, Watched]) -> tuple[Rankings, dict[str, str]]:
        """The groups that channels can be removed from, and layer name to the reason why it is left whole.

        Args:
            model: The network.
            graph: Its graph.
            watched: What :meth:`watched` asked for, after the pass.
        """

    @abstractmethod
    def own_widths(self, rankings: Rankings) -> tuple[dict[str, int], str]:
        """How many channels stay in each group if no target is given, and what to call that rule.

        Raises:
            ValueError: If the method does not say without a target.
        """

    @abstractmethod
    def widths(self, rankings: Rankings, knob: float) -> dict[str, int]:
        """How many channels stay in each group at a value of its own target.

        Raises:
            ValueError: If the value is out of range.
        """

    @abstractmethod
    def steps(self, rankings: Rankings) -> Sequence[float]:
        """Every value, ascending, at which some width changes: between two neighbours the recipe is the same."""

    def figures(self, rankings: Rankings, kept: Mapping[str, int]) -> dict[str, Figure]:
        """Pictures of what was found, with the channels that a recipe keeps of each group."""
        return {}

    def values(self, rankings: Rankings) -> dict[str, float]:
        """Numbers to log, by name."""
        return {}


def by_name(rankings: Iterable[R]) -> dict[str, R]:
    """Rankings by the name of their group; a layer may be the first of several, if its channels are tied to different layers."""
    named: dict[str, R] = {}
    for ranking in rankings:
        name = ranking.group.name
        alike = sum(found.group.name == name for found in named.values())
        named[f"{name}#{alike + 1}" if alike else name] = ranking
    return named


def sort_out(graph: ChannelGraph) -> tuple[list[ChannelGroup], dict[str, str]]:
    """The groups that channels may be removed from, whatever the method; and why the other layers are left whole."""
    read = graph.read_classes()
    whole = {name: why for name in graph.layers if (why := graph.why_whole(name))}
    groups = []
    for group in graph.groups():
        if read.isdisjoint(group.classes.tolist()):
            whole |= dict.fromkeys(group.members, "no layer reads its channels")
        else:
            groups.append(group)
    return groups, whole
