"""A network and its optimizers as they were, to go back to, also to before a cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from lit_compress.padding import repad
from lit_compress.plan import Plan, note_plan, plan_of
from lit_compress.slicing import all_tensors, fill_tensors


@dataclass(frozen=True)
class Snapshot:
    """Copies of all tensors of a network, of what was cut out of it by then, and of the state of its optimizers.

    Args:
        tensors: Name of a parameter or buffer to its value.
        plan: All cuts up to then.
        optimizers: For each optimizer and each of its parameters in order, the state.

    Example:
        >>> from lit_compress import Recipe, cut
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> before = Snapshot.of(net)
        >>> _ = cut(net, Recipe(keep={"0": (1, 5)}), torch.rand(1, 4))
        >>> before.restore(net)
        >>> net[0].out_features
        8
    """

    tensors: Mapping[str, Tensor]
    plan: Plan | None
    optimizers: Sequence[Sequence[Mapping[str, Any]]] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, optimizers: Sequence[Optimizer] = ()) -> Snapshot:
        """Copy a network and its optimizers as they are."""
        tensors = {name: tensor.detach().clone() for name, tensor in all_tensors(model).items()}
        states = [
            [_copied(optimizer.state.get(parameter, {})) for parameter in _parameters(optimizer)] for optimizer in optimizers
        ]
        return cls(tensors, plan_of(model), states)

    def restore(self, model: nn.Module, optimizers: Sequence[Optimizer] = ()) -> None:
        """Put network and optimizers back. Parameters stay the objects they are; groups, rates and schedules as they are now.

        Args:
            model: The network that the snapshot is of, possibly cut since.
            optimizers: Those that the snapshot was made with, in the same order.

        Raises:
            ValueError: If network or optimizers are others. Nothing is changed then.
        """
        present = all_tensors(model)
        if present.keys() != self.tensors.keys():
            odd = sorted(present.keys() ^ self.tensors.keys())[:3]
            raise ValueError(f"The snapshot is of another network: it differs in {odd}.")
        if [len(_parameters(optimizer)) for optimizer in optimizers] != [len(states) for states in self.optimizers]:
            raise ValueError("The snapshot was made with other optimizers.")
        fill_tensors(model, self.tensors, {} if self.plan is None else self.plan.keep)
        repad(model, {} if self.plan is None else self.plan.pads)
        note_plan(model, self.plan)
        for optimizer, states in zip(optimizers, self.optimizers, strict=True):
            for parameter, state in zip(_parameters(optimizer), states, strict=True):
                if state or parameter in optimizer.state:
                    held = optimizer.state[parameter]
                    held.clear()
                    held.update(_copied(state))
            if isinstance(optimizer, torch.optim.LBFGS):
                optimizer._numel_cache = None  # the length of its rows

    def to_dict(self) -> dict[str, Any]:
        """Tensors and builtin types only, for a checkpoint."""
        plan = None if self.plan is None else self.plan.to_dict()
        return {"tensors": dict(self.tensors), "plan": plan, "optimizers": [list(map(dict, one)) for one in self.optimizers]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Snapshot:
        """Inverse of :meth:`to_dict`."""
        plan = None if data["plan"] is None else Plan.from_dict(data["plan"])
        return cls(data["tensors"], plan, data["optimizers"])


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _copied(value: Any) -> Any:
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, value)
