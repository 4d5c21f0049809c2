"""Losses that callbacks add to somebody else's training step."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple, TypeAlias

from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import LightningModule
from torch import Tensor

AddedLoss: TypeAlias = Callable[..., Tensor | Mapping[str, Tensor]]
Watch: TypeAlias = Callable[[Any], AbstractContextManager[Any]]


def add_loss(pl_module: LightningModule, name: str, loss: AddedLoss, watch: Watch | None = None, *, beside: bool = False) -> None:
    """Add a loss to what the ``training_step`` of any module returns, until :func:`remove_loss`.

    It is added to every batch's loss, inside of the step: mixed precision, gradient accumulation and DDP treat it as they treat
    the module's own, also for parameters that nothing else uses. It is logged as ``train/<name>``, or of several parts each as
    ``train/<name>/<part>``, the mean over the epoch and over ranks. Several may be added, each under a name of its own; adding
    one again takes its place.

    Args:
        pl_module: The module; its step may return a loss, a dict with one, or None to skip the batch.
        name: What it is logged as.
        loss: From the module to a scalar, in the unit of its own loss, or to scalars by the name of a part, which are added up.
        watch: Makes a context of the module, in which its own step runs, to see what happens in it. ``loss`` is then given what
            the context yields, after the module.
        beside: Whether ``loss`` is also given the module's own loss, last: to see what it stands beside.

    Raises:
        MisconfigurationException: If the module optimizes manually: its step calls ``backward`` itself.
    """
    refuse_manual(pl_module, name)
    step = vars(pl_module).get("training_step")
    if not isinstance(step, _Step):
        step = _Step(pl_module, step)
        vars(pl_module)["training_step"] = step  # on the instance, in front of the class's own
    step.losses[name] = _Added(loss, watch, beside)


def refuse_manual(pl_module: LightningModule, name: str) -> None:
    """Refuse a module that no loss can be added to.

    Raises:
        MisconfigurationException: If the module optimizes manually.
    """
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            f"{type(pl_module).__name__} optimizes manually: it calls `manual_backward` itself, so that `train/{name}` cannot be "
            "added to its loss. Use automatic optimization."
        )


def remove_loss(pl_module: LightningModule, name: str) -> None:
    """Take back what :func:`add_loss` did; nothing happens if there is no such loss."""
    step = vars(pl_module).get("training_step")
    if not isinstance(step, _Step):
        return
    step.losses.pop(name, None)
    if not step.losses:
        if step.own is None:
            del vars(pl_module)["training_step"]
        else:
            vars(pl_module)["training_step"] = step.own


class _Added(NamedTuple):
    """A loss that is added to a step."""

    loss: AddedLoss
    watch: Watch | None
    beside: bool


class _Step:
    """A training step with losses added. An object, so that a copy of the module has one that is bound to the copy."""

    def __init__(self, module: LightningModule, own: Callable[..., Any] | None) -> None:
        self.module, self.own = module, own
        self.losses: dict[str, _Added] = {}

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The step itself, from which Lightning reads which arguments it takes."""
        return types.MethodType(type(self.module).training_step, self.module) if self.own is None else self.own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            seen = {
                name: [stack.enter_context(one.watch(self.module))] for name, one in self.losses.items() if one.watch is not None
            }
            found = self.__wrapped__(*args, **kwargs)
        if found is None:
            return None
        total = own = found["loss"] if isinstance(found, dict) else found
        for name, one in self.losses.items():
            added = one.loss(self.module, *seen.get(name, ()), *([own] if one.beside else ()))
            parts = {name: added} if isinstance(added, Tensor) else {f"{name}/{part}": one for part, one in added.items()}
            for part, value in parts.items():
                self.module.log(f"train/{part}", value.detach(), on_step=False, on_epoch=True, batch_size=1, sync_dist=True)
                total = total + value
        return {**found, "loss": total} if isinstance(found, dict) else total

    def __deepcopy__(self, memo: dict[int, Any]) -> _Step:
        twin = _Step(copy.deepcopy(self.module, memo), copy.deepcopy(self.own, memo))
        twin.losses = dict(self.losses)  # functions of a module, whichever
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return _Step, (self.module, self.own)  # a pickle has the step alone
