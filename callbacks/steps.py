"""Run a LightningModule's own step outside the training loop: as it is used, with its logging caught, leaving no trace."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities.model_helpers import is_overridden
from pytorch_lightning.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torchmetrics import Metric

from lit_compress import rng
from lit_compress.graph import evaluating
from lit_compress.statistics.gather import batch_size

Log = Callable[..., None]


def bare_step(pl_module: LightningModule) -> Callable[[LightningModule, Any], Any]:
    """The module's ``validation_step``, or its ``training_step`` if it has no other, as a function of module and batch."""
    name = "validation_step" if is_overridden("validation_step", pl_module) else "training_step"
    indices = _indices(getattr(pl_module, name), 0, 0)
    return lambda module, batch: getattr(module, name)(batch, *indices)


def _indices(step: Callable[..., Any], batch_idx: int, dataloader_idx: int) -> list[int]:
    """The positional arguments that a step takes after the batch."""
    taken: list[int] = []
    if is_param_in_hook_signature(step, "batch_idx", min_args=2):
        taken.append(batch_idx)
        if is_param_in_hook_signature(step, "dataloader_idx", min_args=3):
            taken.append(dataloader_idx)
    return taken


def silent_step(module: Any, batch: Any) -> Any:
    """Run the module's step on a batch; what it logs is dropped, and what it keeps on the module is put back."""
    with untouched(module, drop):
        return bare_step(module)(module, batch)


def transfer(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
    """Move a batch to the device as Lightning does for validation: precision, and the module's transfer hooks."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def evaluate(trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
    """What the module logs in a pass over its validation data, by name; empty if it has none.

    The trainer's own state, its logged metrics and its callbacks do not see the pass.
    """
    if not is_overridden("validation_step", pl_module) or trainer.limit_val_batches == 0:
        return {}
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.setup_data()
    if loop._combined_loader is None:
        return {}
    collected = _Collector()
    loaders = loop._combined_loader.flattened
    with rng.isolated(), evaluating(pl_module), torch.no_grad(), untouched(pl_module, collected.log, reset=True), validating(trainer):
        pl_module.on_validation_epoch_start()
        for loader_index, loader in enumerate(loaders):
            limit = loop.max_batches[loader_index]
            collected.suffix = f"/dataloader_idx_{loader_index}" if len(loaders) > 1 else ""
            for index, batch in enumerate(loader):
                if index >= limit:
                    break
                batch = transfer(trainer, pl_module, batch)
                collected.weight = batch_size(batch)
                indices = _indices(pl_module.validation_step, index, loader_index)
                with trainer.precision_plugin.val_step_context():
                    pl_module.validation_step(batch, *indices)
        collected.suffix, collected.weight = "", 1
        pl_module.on_validation_epoch_end()
        return collected.results()


@contextmanager
def validating(trainer: Trainer) -> Iterator[None]:
    """The trainer says that it validates, as it does in the middle of a fit."""
    stage = trainer.state.stage
    trainer.validating = True
    try:
        yield
    finally:
        trainer.state.stage = stage


@contextmanager
def untouched(pl_module: LightningModule, log: Log, *, reset: bool = False) -> Iterator[None]:
    """Hand what the module logs to ``log``; afterwards its metrics, plain attributes and buffers are as before.

    Args:
        pl_module: The module. Lists that its steps append to are put back to what they held.
        log: Called as ``LightningModule.log`` is.
        reset: Start its metrics from nothing.
    """
    attributes = {
        name: copy.copy(value)
        for name, value in vars(pl_module).items()
        if not name.startswith("_") and isinstance(value, (list, dict, set, int, float, str, type(None)))
    }
    contents = {name: (value, copy.copy(value)) for name, value in vars(pl_module).items()
                if not name.startswith("_") and isinstance(value, (list, dict, set))}  # fmt: skip
    buffers = [(buffer, buffer.detach().clone()) for buffer in pl_module.buffers()]
    metrics = [(metric, _state(metric)) for metric in pl_module.modules() if isinstance(metric, Metric)]
    if reset:
        for metric, _ in metrics:
            metric.reset()
    # On the instance, in front of the class's own.
    caught: dict[str, Any] = {"log": log, "log_dict": lambda values, *args, **kwargs: [log(key, value, *args, **kwargs) for key, value in values.items()]}  # fmt: skip
    vars(pl_module).update(caught)
    try:
        yield
    finally:
        for name in caught:
            vars(pl_module).pop(name, None)
        for name, value in attributes.items():
            vars(pl_module)[name] = contents[name][0] if name in contents else value
        for original, before in contents.values():
            original.clear()
            original.extend(before) if isinstance(original, list) else original.update(before)
        with torch.no_grad():
            for buffer, before in buffers:
                if buffer.shape == before.shape:
                    buffer.copy_(before)
        for metric, state in metrics:
            vars(metric).update(state)


def _state(metric: Metric) -> dict[str, Any]:
    plain = {name: value for name, value in vars(metric).items() if name in ("_update_count", "_computed", "_forward_cache", "_is_synced")}
    return plain | {name: copy.deepcopy(getattr(metric, name)) for name in metric._defaults}


def drop(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
    """Log nothing."""


class _Collector:
    """Averages what a module logs over an epoch, as Lightning does: by batch size, and a metric by its own rule."""

    def __init__(self) -> None:
        self.suffix, self.weight = "", 1
        self._sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._metrics: dict[str, Metric] = {}

    def log(self, name: str, value: Any, *args: Any, batch_size: int | None = None, **kwargs: Any) -> None:
        name += self.suffix
        if isinstance(value, Metric):
            self._metrics[name] = value
        elif not isinstance(value, Tensor) or value.numel() == 1:
            weight = self.weight if batch_size is None else batch_size
            self._sums[name][0] += float(value) * weight
            self._sums[name][1] += weight

    def results(self) -> dict[str, float]:
        means = {name: total / weight for name, (total, weight) in self._sums.items() if weight}
        return means | {name: float(metric.compute()) for name, metric in self._metrics.items()}
