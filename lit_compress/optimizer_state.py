"""What the state of an optimizer is after a cut, worked out before anything is touched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer
from torch.utils._pytree import tree_leaves, tree_map

if TYPE_CHECKING:
    from lit_compress.plan import Plan


def prepared(plan: Plan, optimizer: Optimizer, names: Mapping[Tensor, str]) -> Callable[[], None]:
    """Work out what an optimizer's state will be; calling the result puts it there, and cannot fail.

    Args:
        plan: The cut.
        optimizer: Over parameters of the network, and possibly others. It is not changed.
        names: Parameter of the network to its name.

    Raises:
        ValueError: If the optimizer holds state that cannot follow the cut.
    """
    refuse_sharded(optimizer)
    if isinstance(optimizer, LBFGS):
        return _prepared_lbfgs(plan, optimizer, names)
    new: list[tuple[dict[str, Any], str, Any]] = []
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        name = names.get(parameter)
        if name is None or name not in plan.keep:
            continue
        state = optimizer.state.get(parameter, {})
        for key, value in state.items():
            if any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
                take = partial(_taken, plan, name, f"{type(optimizer).__name__} keeps {key!r}")
                new.append((state, key, tree_map(take, value)))  # some keep their state in lists or dicts

    def follow() -> None:
        for state, key, value in new:
            state[key] = value

    return follow


def _taken(plan: Plan, name: str, where: str, value: Any) -> Any:
    if not isinstance(value, Tensor) or value.numel() == 1 != prod(plan.shapes[name]):
        return value
    if tuple(value.shape) != plan.shapes[name]:
        raise ValueError(
            f"{where} of shape {tuple(value.shape)} for parameter {name!r} of shape {plan.shapes[name]}; only state of the "
            "parameter's own shape can follow a cut. Cut before training starts."
        )
    return plan.take(name, value)


def refuse_sharded(optimizer: Optimizer) -> None:
    """Refuse an optimizer that keeps state elsewhere than in ``optimizer.state``.

    Raises:
        ValueError: If it is a ``ZeroRedundancyOptimizer``.
    """
    if any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__):
        raise ValueError(
            "ZeroRedundancyOptimizer keeps on each rank the state of some parameters, where no cut reaches it. Use the optimizer "
            "that it wraps, or cut before you make it."
        )


def _prepared_lbfgs(plan: Plan, optimizer: LBFGS, names: Mapping[Tensor, str]) -> Callable[[], None]:
    """LBFGS keeps rows of all parameters, one behind the other, and products of such rows, which are made anew.

    A pair of steps whose curvature is no longer positive is dropped, as LBFGS does itself.
    """
    parameters = optimizer.param_groups[0]["params"]
    named = [(names.get(parameter), tuple(parameter.shape)) for parameter in parameters]
    held = [(name, shape if name is None else plan.shapes.get(name, shape)) for name, shape in named]

    def taken(row: Tensor) -> Tensor:
        sizes = [prod(shape) for _, shape in held]
        if sum(sizes) != len(row):
            raise ValueError(f"LBFGS keeps rows of {len(row)} numbers but its parameters had {sum(sizes)}; it was cut already.")
        parts = row.split(sizes)
        cut = [
            part if name is None else plan.take(name, part.view(shape)) for part, (name, shape) in zip(parts, held, strict=True)
        ]
        return torch.cat([part.reshape(-1) for part in cut])

    state = optimizer.state.get(parameters[0], {})
    new: dict[str, Any] = {key: taken(state[key]) for key in ("d", "prev_flat_grad") if state.get(key) is not None}
    if state.get("old_dirs") is not None:
        pairs = [(taken(y), taken(s)) for y, s in zip(state["old_dirs"], state["old_stps"], strict=True)]
        pairs = [(y, s) for y, s in pairs if y.dot(s) > 1e-10]
        new |= {"old_dirs": [y for y, _ in pairs], "old_stps": [s for _, s in pairs], "ro": [1 / y.dot(s) for y, s in pairs]}
        new["H_diag"] = pairs[-1][0].dot(pairs[-1][1]) / pairs[-1][0].dot(pairs[-1][0]) if pairs else 1

    def follow() -> None:
        state.update(new)
        optimizer._numel_cache = None  # the length of a row

    return follow
