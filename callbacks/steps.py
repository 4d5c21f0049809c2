"""Run a LightningModule's own step outside the training loop: as it is used, with its logging caught, leaving no trace."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.loggers.logger import DummyLogger, Logger
from pytorch_lightning.utilities.data import extract_batch_size
from pytorch_lightning.utilities.model_helpers import is_overridden
from pytorch_lightning.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torchmetrics import Metric

from lit_compress import rng
from lit_compress.graph import evaluating
from lit_compress.latency import Stopwatch
from lit_compress.ranks import as_one, share, world_size

Log = Callable[..., None]
_BY_TORCH = frozenset(vars(nn.Module()))  # attributes that are no plain ones of the user


def bare_step(pl_module: LightningModule) -> Callable[[Any, Any], Any]:
    """The module's ``validation_step``, or its ``training_step`` if it has no other, as a function of module and batch."""
    name = "validation_step" if is_overridden("validation_step", pl_module) else "training_step"
    indices = _indices(getattr(pl_module, name), 0)
    return lambda module, batch: getattr(module, name)(batch, *indices)


def refuse_only_training(pl_module: LightningModule) -> None:
    """Refuse a module that cannot be run without being trained.

    Raises:
        MisconfigurationException: If it optimizes manually and has no ``validation_step``.
    """
    if not pl_module.automatic_optimization and not is_overridden("validation_step", pl_module):
        raise MisconfigurationException(
            f"{type(pl_module).__name__} optimizes manually, so that its `training_step` cannot be run without training. "
            "Give it a `validation_step`, which shows how the network is used."
        )


def _indices(step: Callable[..., Any], batch_idx: int, dataloader_idx: int | None = None) -> list[int]:
    """The positional arguments that a step takes after the batch, as Lightning gives them.

    Without several loaders there is no ``dataloader_idx``, unless the step cannot do without.
    """
    if not is_param_in_hook_signature(step, "batch_idx", min_args=2):
        return []
    arguments = inspect.signature(step).parameters.values()
    if dataloader_idx is None and sum(a.default is a.empty and a.kind is a.POSITIONAL_OR_KEYWORD for a in arguments) >= 3:
        dataloader_idx = 0
    return [batch_idx] if dataloader_idx is None else [batch_idx, dataloader_idx]


def silent_step(module: Any, batch: Any) -> Any:
    """Run the module's step on a batch; what it logs is dropped, and what it keeps on the module is put back.

    Returns:
        What the step returns, and the tensors that it put on the module: both leave the network.
    """
    with untouched(module, drop) as kept:
        returned = bare_step(module)(module, batch)
        return returned, kept.left_behind()


def step_stopwatch(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Stopwatch:
    """A stopwatch on the module's step with a batch, in the Trainer's precision; what is logged is dropped."""

    @contextmanager
    def silent() -> Iterator[None]:
        with untouched(pl_module, drop), trainer.precision_plugin.val_step_context():
            yield

    return Stopwatch(pl_module, batch, forward_fn=bare_step(pl_module), context=silent)


def training_error(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Exception | None:
    """What the module's ``training_step`` raises on a batch, in training mode; None if it runs. It leaves no trace.

    Under manual optimization the step is not tried, since it would train.
    """
    step = pl_module.training_step
    if not pl_module.automatic_optimization or is_param_in_hook_signature(step, "dataloader_iter", explicit=True):
        return None
    modes = {module: module.training for module in pl_module.modules()}
    weights = [(parameter, parameter.detach().clone()) for parameter in pl_module.parameters()]
    with rng.isolated(), muted(trainer), evaluating(pl_module), torch.no_grad(), untouched(pl_module, drop):
        for module, training in modes.items():
            module.training = training
        try:
            with trainer.precision_plugin.train_step_context():
                step(batch, *_indices(step, 0))
        except Exception as error:  # whatever a user's step may raise
            return error
        finally:
            for parameter, before in weights:  # an average of weights may be updated in the step
                parameter.copy_(before)
    return None


def is_dev_run(trainer: Trainer) -> bool:
    """Whether the run is a ``fast_dev_run``, of one batch or a few."""
    return bool(vars(trainer)["fast_dev_run"])


def transfer(trainer: Trainer, pl_module: LightningModule, batch: Any, dataloader_idx: int = 0) -> Any:
    """Move a batch to the device as Lightning does for validation: precision, and the module's transfer hooks."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=dataloader_idx)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=dataloader_idx)


def evaluate(trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
    """What the module logs in a pass over its validation data, by name; empty if it has none.

    The trainer's own state, its loggers, its logged metrics and its callbacks do not see the pass. Of several ranks, each runs
    its part of the data, as in any validation, and all get what they logged together.
    """
    if not is_overridden("validation_step", pl_module) or trainer.limit_val_batches == 0:
        return {}
    with as_one(), rng.isolated(), validating(trainer):
        share(None)  # the loop talks to the other ranks
        loop = trainer.fit_loop.epoch_loop.val_loop
        loop.setup_data()
        loaders = loop._combined_loader
        if loaders is None:
            return {}
        loaders.limits = loop.max_batches
        several = loaders._mode == "sequential" and len(loaders.flattened) > 1
        collected = _Collector()
        with evaluating(pl_module), torch.no_grad(), untouched(pl_module, collected.log, reset=True, alone=False):
            pl_module.on_validation_start()
            pl_module.on_validation_epoch_start()
            for batch, index, loader in loaders:
                if several and loader != collected.loader:
                    collected.close()
                    collected.loader = loader
                batch = transfer(trainer, pl_module, batch, loader)
                collected.batch = batch
                place = (batch, index, loader) if several else (batch, index)
                pl_module.on_validation_batch_start(*place)
                with trainer.precision_plugin.val_step_context():
                    indices = _indices(pl_module.validation_step, index, loader if several else None)
                    outputs = pl_module.validation_step(batch, *indices)
                pl_module.on_validation_batch_end(outputs, *place)
            collected.close()
            collected.loader = None
            pl_module.on_validation_epoch_end()
            pl_module.on_validation_end()
            return collected.results()


@contextmanager
def validating(trainer: Trainer) -> Iterator[None]:
    """The trainer says that it validates, as it does in the middle of a fit, and its loggers take nothing."""
    stage = trainer.state.stage
    trainer.validating = True
    try:
        with muted(trainer):
            yield
    finally:
        trainer.state.stage = stage


@contextmanager
def muted(trainer: Trainer) -> Iterator[None]:
    """The trainer's loggers take nothing, also from a step that writes to them itself."""
    loggers = trainer.loggers
    trainer.loggers = [_Mute(logger) for logger in loggers]
    try:
        yield
    finally:
        trainer.loggers = loggers


class _Mute(DummyLogger):
    """Has the places of a logger and takes nothing."""

    def __init__(self, logger: Logger) -> None:
        super().__init__()
        self._logger = logger

    log_dir = property(lambda self: getattr(self._logger, "log_dir", None))
    root_dir = property(lambda self: getattr(self._logger, "root_dir", None))
    save_dir = property(lambda self: self._logger.save_dir)
    name = property(lambda self: self._logger.name)
    version = property(lambda self: self._logger.version)


@contextmanager
def untouched(pl_module: LightningModule, log: Log, *, reset: bool = False, alone: bool = True) -> Iterator[_Kept]:
    """Hand what the module logs to ``log``; afterwards its metrics, attributes, lists and dicts are as before.

    Parameters and buffers are not looked after: see :func:`~lit_compress.graph.evaluating`.

    Args:
        pl_module: The module. Objects of the user's own classes on it are kept, but not what is in them.
        log: Called as ``LightningModule.log`` is.
        reset: Start its metrics from nothing.
        alone: Neither its metrics nor its ``all_gather`` ask other ranks, which may be running something else.
    """
    kept = _Kept(pl_module)
    clones: dict[int, Tensor] = {}  # metrics of a collection may share a state
    for metric in pl_module.modules():
        if isinstance(metric, Metric):
            # Updated in place, and where validation made them, only under inference mode: so the step gets copies.
            states = {name: value for name in metric._defaults if isinstance(value := getattr(metric, name), Tensor)}
            vars(metric).update({name: clones.setdefault(id(value), value.clone()) for name, value in states.items()})
            if reset:
                metric.reset()
            if alone:
                vars(metric).update(sync_on_compute=False, dist_sync_on_step=False, _to_sync=False)

    def log_dict(values: Any, *args: Any, **kwargs: Any) -> None:
        for name, value in values.items():
            log(name, value, *args, **kwargs)

    vars(pl_module).update(log=log, log_dict=log_dict)  # on the instance, in front of the class's own
    if alone and world_size() > 1:
        vars(pl_module).update(all_gather=_as_if_alike)
    try:
        yield kept
    finally:
        kept.restore()


def _as_if_alike(data: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of ``LightningModule.all_gather``: as if every rank had what this one has."""
    return tree_map(lambda value: torch.stack([torch.as_tensor(value)] * world_size()), data)


def drop(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
    """Log nothing."""


class _Kept:
    """The plain attributes of a module and its submodules, and what is in their lists, dicts and sets."""

    def __init__(self, pl_module: nn.Module) -> None:
        self._attributes = [(vars(module), _plain(module)) for module in pl_module.modules()]
        contents: dict[int, tuple[Any, Any]] = {}
        for _, attributes in self._attributes:
            for value in attributes.values():
                _note_contents(value, contents)
        self._contents = list(contents.values())

    def restore(self) -> None:
        """Put everything back."""
        for present, before in self._attributes:
            for name in present.keys() - before.keys() - _BY_TORCH:
                del present[name]
            present.update(before)
        for container, before in self._contents:
            container.clear()
            (container.extend if isinstance(before, (list, deque)) else container.update)(before)

    def left_behind(self) -> list[Tensor]:
        """Tensors that are on the module now and were not before."""
        new: list[Any] = []
        for present, before in self._attributes:
            new += [value for name, value in present.items() if name not in _BY_TORCH and before.get(name) is not value]
        for container, before in self._contents:
            known = {id(item) for item in _items(before)}
            new += [item for item in _items(container) if id(item) not in known]
        return [leaf for leaf in tree_leaves(new) if isinstance(leaf, Tensor) and not isinstance(leaf, nn.Parameter)]


def _plain(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _BY_TORCH}


def _note_contents(value: Any, found: dict[int, tuple[Any, Any]]) -> None:
    if isinstance(value, (list, dict, set, deque)) and id(value) not in found:
        found[id(value)] = (value, value.copy())
        for item in _items(value):
            _note_contents(item, found)


def _items(container: Any) -> Any:
    return container.values() if isinstance(container, dict) else container


class _Collector:
    """Reduces what a module logs over an epoch as Lightning does: values by their rule and batch size, metrics by their own.

    Values are reduced over ranks too, whether or not they were logged with ``sync_dist``.
    """

    def __init__(self) -> None:
        self.batch: Any = None  # what is logged belongs to it; None outside of a step
        self.loader: int | None = None  # where there are several
        self._values: dict[str, tuple[str, list[tuple[float, int]]]] = {}
        self._metrics: dict[str, Metric] = {}
        self._results: dict[str, float] = {}

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        options = inspect.signature(LightningModule.log).bind_partial(None, name, value, *args, **kwargs).arguments
        if options.get("on_epoch") is False:
            return
        if self.loader is not None and options.get("add_dataloader_idx", True):
            name = f"{name}/dataloader_idx_{self.loader}"
        if isinstance(value, Metric):
            self._metrics[name] = value
            return
        rule = options.get("reduce_fx", "mean")
        rule = rule.lower() if isinstance(rule, str) else rule.__name__
        size = options.get("batch_size")
        if size is None:
            size = 1 if self.batch is None or rule not in ("mean", "avg") else extract_batch_size(self.batch)
        self._values.setdefault(name, (rule, []))[1].append((float(value), size))

    def close(self) -> None:
        """A loader, or the epoch, is over: what its metrics have now, on all ranks, is their result."""
        names = share(list(self._metrics))
        if any(theirs != names[0] for theirs in names):
            raise ValueError(f"The ranks log different metrics: {names}. Log the same on all, in the same order.")
        self._results |= {name: float(metric.compute()) for name, metric in self._metrics.items()}
        self._metrics, self.batch = {}, None

    def results(self) -> dict[str, float]:
        """Name to value, of everything."""
        self.close()
        together: dict[str, tuple[str, list[tuple[float, int]]]] = {}
        for values in share(self._values):
            for name, (rule, logged) in values.items():
                together.setdefault(name, (rule, []))[1].extend(logged)
        return {name: _reduced(rule, logged) for name, (rule, logged) in together.items()} | self._results


def _reduced(rule: str, logged: list[tuple[float, int]]) -> float:
    values = [value for value, _ in logged]
    if rule in ("mean", "avg"):
        return sum(value * size for value, size in logged) / max(sum(size for _, size in logged), 1)
    return float(sum(values) if rule == "sum" else min(values) if rule == "min" else max(values))
