"""What else in a Trainer must follow a cut, or be put back when it fails."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from lit_compress.callbacks.steps import is_dev_run
from lit_compress.checkpoint import rebuild
from lit_compress.slicing import all_tensors, set_data


def averages_of(trainer: Trainer) -> list[nn.Module]:
    """Copies of the module that other callbacks keep to average its weights over time."""
    kept = [vars(callback).get("_average_model") for callback in trainer.callbacks]  # type: ignore[attr-defined]
    return [average.module if isinstance(average, AveragedModel) else average for average in kept if average is not None]


def optimizers_of(trainer: Trainer) -> list[Optimizer]:
    """The module's optimizers, and those that callbacks have of their own."""
    own = [vars(callback).get("own_optimizer") for callback in trainer.callbacks]  # type: ignore[attr-defined]
    return [*trainer.optimizers, *(optimizer for optimizer in own if optimizer is not None)]


def step_own(trainer: Trainer, own: Optimizer, clip: bool = False) -> None:
    """Take a step of an optimizer that a callback has of its own, right before the module's own takes one.

    Args:
        trainer: The running Trainer.
        own: The callback's optimizer; its gradients are used up.
        clip: Whether the Trainer's gradient clipping holds for it too, by its own norm.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)  # of half precision: it does not know these gradients
    grads = [p.grad for group in own.param_groups for p in group["params"] if p.grad is not None]
    if scaler is not None:
        for grad in grads:
            grad.div_(scaler.get_scale())
    if scaler is None or all(bool(grad.isfinite().all()) for grad in grads):
        if clip and trainer.gradient_clip_val:
            trainer.lightning_module.clip_gradients(own, trainer.gradient_clip_val, trainer.gradient_clip_algorithm)
        own.step()
    own.zero_grad()


def rebuild_module(pl_module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Cut a module, and the averages of its weights in its Trainer, to the sizes of a checkpoint, before the weights load.

    Raises:
        ValueError: As :func:`~lit_compress.checkpoint.rebuild`.
    """
    trainer = pl_module._trainer
    for network in [pl_module, *(() if trainer is None else averages_of(trainer))]:
        rebuild(network, checkpoint)


def forget_bests(trainer: Trainer) -> None:
    """Let the callbacks that look for the best network begin again."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
            callback.best_k_models, callback.kth_best_model_path = {}, ""
            callback.best_model_path, callback.best_model_score = "", None
            callback.kth_value = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)
        elif isinstance(callback, EarlyStopping):
            callback.best_score = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)
            callback.wait_count = 0


def stops_now(trainer: Trainer) -> bool:
    """Whether this epoch, which ends, is the last one. ``EarlyStopping`` looks only later, right before files are written."""
    if trainer.current_epoch + 1 == trainer.max_epochs or 0 <= trainer.max_steps <= trainer.global_step:
        return True
    if trainer.current_epoch + 1 < (trainer.min_epochs or 0) or trainer.global_step < (trainer.min_steps or 0):
        return False
    callbacks = [one for one in trainer.callbacks if isinstance(one, EarlyStopping)]  # type: ignore[attr-defined]
    stops = trainer.should_stop or any(_will_stop(callback, trainer) for callback in callbacks)
    return trainer.strategy.reduce_boolean_decision(stops, all=False)


def _will_stop(callback: EarlyStopping, trainer: Trainer) -> bool:
    if not callback._check_on_train_epoch_end or callback._should_skip_check(trainer) or is_dev_run(trainer):
        return False
    value = trainer.callback_metrics.get(callback.monitor)
    return value is not None and copy.copy(callback)._evaluate_stopping_criteria(value.squeeze())[0]


@contextmanager
def all_or_nothing(networks: Sequence[nn.Module], optimizers: Sequence[Optimizer]) -> Iterator[None]:
    """If anything fails inside, networks and optimizers are put back to what they were. No tensor is copied for it."""
    found = {tensor: None for network in networks for tensor in all_tensors(network).values()}
    tensors = [(tensor, tensor.data, tensor.grad) for tensor in found]
    modules = [
        (module, type(module), dict(vars(module)), dict(module._parameters), dict(module._buffers))
        for network in networks
        for module in network.modules()
    ]
    states = [
        (state, dict(state))
        for optimizer in optimizers
        for state in (optimizer.state, *optimizer.state.values())  # which entries there are, and what each holds
    ]
    try:
        yield
    except BaseException:
        for module, kind, attributes, parameters, buffers in modules:
            module.__class__ = kind
            _refill(vars(module), attributes)
            _refill(module._parameters, parameters)
            _refill(module._buffers, buffers)
        for tensor, data, grad in tensors:
            tensor.grad = None
            set_data(tensor, data)
            tensor.grad = grad
        for state, before in states:
            _refill(state, before)
        raise


def _refill(present: dict[str, Any], before: dict[str, Any]) -> None:
    present.clear()
    present.update(before)
