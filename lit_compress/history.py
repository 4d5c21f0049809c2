"""The sizes of a network over a run: what it had at first, and what each cut left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from torch import nn

from lit_compress.gates import CHILD as GATES
from lit_compress.graph import ChannelGraph
from lit_compress.plan import plan_of
from lit_compress.recipe import joint_method, single_methods
from lit_compress.slicing import all_tensors


@dataclass(frozen=True)
class Sizes:
    """How large a network is.

    Args:
        parameters: Trainable parameters, but for those of gates, which no cut leaves.
        mult_adds: Mult-adds of convolutions and linear layers, one sample.
        widths: Layer name to output channels, in the order of the forward.
    """

    parameters: int
    mult_adds: int
    widths: Mapping[str, int]


class Gauge:
    """Reads a network's sizes off the shapes of its tensors, once it has been traced; no further forward is needed.

    Args:
        graph: A trace of the network, however much of it was cut already.
        samples: Samples in the batch that was traced.

    Example:
        >>> import torch
        >>> from lit_compress import Recipe, cut
        >>> from lit_compress.graph import trace
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> x = torch.rand(1, 4)
        >>> gauge = Gauge(trace(net, lambda: net(x)), samples=1)
        >>> _ = cut(net, Recipe(keep={"0": (1, 5)}), x)
        >>> gauge.read(net)
        Sizes(parameters=16, mult_adds=12, widths={'0': 2, '2': 2})
        >>> gauge.read_original(net)
        Sizes(parameters=58, mult_adds=48, widths={'0': 8, '2': 2})
    """

    def __init__(self, graph: ChannelGraph, samples: int) -> None:
        self._graph, self._samples = graph, samples

    def fits(self, model: nn.Module) -> bool:
        """Whether the network still has the weights that were traced; not so if layers were replaced by others."""
        return {use.weight for use in self._graph.uses} <= all_tensors(model).keys()

    def read(self, model: nn.Module) -> Sizes:
        """Sizes of the network as it is."""
        return self._sizes(model, {})

    def read_original(self, model: nn.Module) -> Sizes:
        """Sizes that the network would have if nothing had ever been cut out of it."""
        plan = plan_of(model)
        return self._sizes(model, {} if plan is None else plan.shapes)

    def _sizes(self, model: nn.Module, before: Mapping[str, tuple[int, ...]]) -> Sizes:
        shapes = {name: tuple(tensor.shape) for name, tensor in all_tensors(model).items()} | dict(before)
        # Gates are there for as long as VIB trains them, and leave with the cut.
        trainable = [
            name for name, parameter in model.named_parameters() if parameter.requires_grad and not name.startswith(f"{GATES}.")
        ]
        return Sizes(
            parameters=sum(prod(shapes[name]) for name in trainable),
            mult_adds=self._graph.mult_adds(shapes) // self._samples,
            # In proportion to the trace: the weight of a grouped transposed convolution holds the channels of one group.
            widths={
                name: len(layer.classes) * shapes[layer.weight][layer.dim] // self._graph.shapes[layer.weight][layer.dim]
                for name, layer in self._graph.layers.items()
            },
        )


@dataclass(frozen=True)
class Moment:
    """When a network came to have other sizes.

    Args:
        epoch: The epoch before which it did, counted from 0.
        step: Optimizer steps until then.
        cut: What cut it, as a recipe's ``method``; empty if nothing did.
        sizes: What it has from then on.
    """

    epoch: int
    step: int
    cut: str
    sizes: Sizes


class SizeHistory:
    """All moments of a run at which the sizes changed, the first one being its start. It grows with the cuts, not the epochs.

    Example:
        >>> history = SizeHistory()
        >>> whole, small = Sizes(58, 48, {"0": 8}), Sizes(16, 12, {"0": 2})
        >>> history.note(0, 0, "", whole, whole)
        True
        >>> history.note(1, 100, "", whole, whole), history.note(2, 200, "by hand", small, whole)
        (False, True)
        >>> [(moment.epoch, moment.cut) for moment in history.moments]
        [(0, ''), (2, 'by hand')]
    """

    def __init__(self) -> None:
        self.moments: list[Moment] = []
        self._method = ""  # of all cuts together

    def note(self, epoch: int, step: int, method: str, sizes: Sizes, original: Sizes) -> bool:
        """Look at a network.

        Args:
            epoch: The epoch that is about to begin.
            step: Optimizer steps so far.
            method: Of the recipe of all cuts so far; empty if there were none.
            sizes: What the network has.
            original: What it had before anything was cut. A network that was cut before the first look has it as its start.

        Returns:
            Whether there is something new: the start, or other sizes than at the last look.
        """
        known = len(self.moments)
        if not self.moments:
            self.moments.append(Moment(epoch, step, "", original))
        if sizes != self.moments[-1].sizes:
            before, now = single_methods(self._method), single_methods(method)
            new = now[len(before) :] if now[: len(before)] == before else now
            self.moments.append(Moment(epoch, step, joint_method(new), sizes))
        self._method = method
        return len(self.moments) > known

    @property
    def cuts(self) -> list[Moment]:
        """The moments at which something was cut."""
        return [moment for moment in self.moments if moment.cut]

    def sizes_table(self) -> tuple[list[str], list[list[Any]]]:
        """Columns, and a row for each moment."""
        columns = ["epoch", "step", "cut", "parameters", "share of parameters", "mult-adds", "share of mult-adds"]
        return columns, [
            [
                moment.epoch, moment.step, moment.cut,
                moment.sizes.parameters, share(moment.sizes.parameters, self.moments[0].sizes.parameters),
                moment.sizes.mult_adds, share(moment.sizes.mult_adds, self.moments[0].sizes.mult_adds),
            ]
            for moment in self.moments
        ]  # fmt: skip

    def widths_table(self) -> tuple[list[str], list[list[Any]]]:
        """Columns, and a row for each moment and layer."""
        columns = ["epoch", "step", "cut", "layer", "channels"]
        return columns, [
            [moment.epoch, moment.step, moment.cut, layer, width]
            for moment in self.moments
            for layer, width in moment.sizes.widths.items()
        ]

    def state_dict(self) -> dict[str, Any]:
        """Builtin types only, for a checkpoint."""
        return {"method": self._method, "moments": [asdict(moment) for moment in self.moments]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self._method = state["method"]
        self.moments = [Moment(**{**moment, "sizes": Sizes(**moment["sizes"])}) for moment in state["moments"]]


def share(part: int, whole: int) -> float:
    """What part of a whole is left, in [0, 1]; of nothing, all is."""
    return part / whole if whole else 1.0
