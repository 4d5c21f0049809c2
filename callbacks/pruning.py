"""What all pruning callbacks share: when to cut in a running Trainer, and everything that must follow a cut."""

from __future__ import annotations

import hashlib
import types
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.utilities import rank_zero_warn
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from typing_extensions import override

from lit_compress import rng
from lit_compress.analysis import Analysis, analyze, matches
from lit_compress.callbacks.loaders import analysis_batches
from lit_compress.callbacks.outcome import CutReport, Measurement
from lit_compress.callbacks.progress import progress_of
from lit_compress.callbacks.ranks import buffers_of_first, over_ranks, own_state, refuse_strategy, rewrapped
from lit_compress.callbacks.schedule import CutSchedule
from lit_compress.callbacks.steps import bare_step, drop, evaluate, is_dev_run, silent_step, training_error, untouched, validating
from lit_compress.checkpoint import rebuild, write_plan
from lit_compress.graph import evaluating
from lit_compress.plan import Plan, plan_of
from lit_compress.ranks import as_one, share
from lit_compress.recipe import Recipe
from lit_compress.report import count_parameters, measure_latency
from lit_compress.slicing import all_tensors, set_data
from lit_compress.statistics.gather import batch_size, first_samples
from lit_compress.surgery import cut, plan_for


class PruningCallback(Callback, ABC):
    """Cuts channels out of any LightningModule while it trains; subclasses choose which.

    At the start of an epoch the module's data are passed through it once in evaluation mode, a recipe is chosen, and the network
    is cut in place. The module, its parameters and its optimizers stay the objects they were: optimizer state is sliced,
    schedules go on. A checkpoint says what was cut, so that ``fit(ckpt_path=...)`` rebuilds the network before it loads the
    weights, also for a module that knows nothing of this package; the run then goes on exactly as if it had not stopped.

    Copies that weight-averaging callbacks keep are cut alike. What ``ModelCheckpoint`` and ``EarlyStopping`` hold for the best
    starts anew at a cut, since an uncut network cannot be the best cut one; files that were written stay.

    Under DDP the processes share out the data of the analysis, each sample once, and cut by one recipe, that of rank 0. If
    anything fails on one of them, it fails on all, and nothing has changed.

    In a ``fast_dev_run`` the cut is made before its only epoch, whatever the trigger, and nothing is logged.

    Args:
        at_epoch: Cut once, before this epoch, counted from 0. If no trigger is given, half of ``max_epochs``.
        every_n_epochs: Cut before every n-th epoch, ``max_cuts`` times.
        when: ``"converged"``: cut when ``monitor`` has not improved for ``patience`` epochs.
        max_cuts: How often to cut. Needed by ``every_n_epochs``; otherwise 1.
        monitor: Metric that the module logs.
        mode: Whether ``monitor`` is better when lower (``"min"``) or higher (``"max"``).
        patience: Epochs without improvement that count as convergence. An epoch that the Trainer does not validate is not looked
            at.
        include: Patterns over module names, as ``"net.layer1.*"``: the layers that may be cut.
        exclude: Patterns of layers to leave whole.
        min_width: Channels that each layer keeps at least.
        round_to: Round each width up to a multiple of this, which some hardware is faster with. A target is met all the same.
        skips: ``"share"``: layers tied by a skip connection keep the same channels. ``"pad"``: a block with an identity or
            zero-padded skip is cut on its own, and its output scattered back to the width of the skip.
        compensate: Fold what the removed channels give on average into the biases of the layers that read them.
        loader: Data for the analysis: ``"train"``, ``"val"`` or a ``DataLoader``. By default ``analysis_dataloader()`` of the
            module or the datamodule if there is one, otherwise the training data.
        max_samples: Use this many samples of it, drawn at random with a fixed seed. None for all.
        evaluate: Run the validation data before and after each cut, to tell what the cut itself costs.
        verify: Check on real data that the cut is exact and that ``training_step`` still runs, and otherwise put everything back
            and raise.

    Raises:
        MisconfigurationException: If the triggers contradict each other or the Trainer. From the start of ``fit``: if the
            strategy cannot be cut in flight, a pattern matches no module, or a module under manual optimization has no
            ``validation_step``.
    """

    def __init__(
        self,
        *,
        at_epoch: int | None = None,
        every_n_epochs: int | None = None,
        when: Literal["converged"] | None = None,
        max_cuts: int | None = None,
        monitor: str = "val/loss",
        mode: Literal["min", "max"] = "min",
        patience: int = 3,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        min_width: int = 1,
        round_to: int = 1,
        skips: Literal["share", "pad"] = "share",
        compensate: bool = False,
        loader: Literal["train", "val"] | DataLoader[Any] | Iterable[Any] | None = None,
        max_samples: int | None = None,
        evaluate: bool = True,
        verify: bool = True,
    ) -> None:
        self.schedule = CutSchedule(
            at_epoch=at_epoch,
            every_n_epochs=every_n_epochs,
            when=when,
            max_cuts=max_cuts,
            monitor=monitor,
            mode=mode,
            patience=patience,
        )
        if min_width < 1:
            raise MisconfigurationException(f"Argument `min_width` must be at least 1 but got {min_width}.")
        if round_to < 1:
            raise MisconfigurationException(f"Argument `round_to` must be at least 1 but got {round_to}.")
        if skips not in ("share", "pad"):
            raise MisconfigurationException(f"Argument `skips` must be 'share' or 'pad' but got {skips!r}.")
        if max_samples is not None and max_samples < 2:
            raise MisconfigurationException(f"Argument `max_samples` must be at least 2 or None but got {max_samples}.")
        if isinstance(loader, str) and loader not in ("train", "val"):
            raise MisconfigurationException(f"Argument `loader` must be 'train', 'val' or a DataLoader but got {loader!r}.")
        if isinstance(loader, Iterator):
            raise MisconfigurationException(
                "Argument `loader` is an iterator, which runs dry: give what can be iterated over again."
            )
        if isinstance(include, str) or isinstance(exclude, str):
            raise MisconfigurationException("Arguments `include` and `exclude` are lists of patterns, not one string.")
        self.include, self.exclude, self.min_width = tuple(include), tuple(exclude), min_width
        self.round_to, self.skips, self.compensate = round_to, skips, compensate
        self.loader, self.max_samples, self.evaluate, self.verify = loader, max_samples, evaluate, verify
        self.reports: list[CutReport] = []
        self._resumed_rng: list[dict[str, Any]] | None = None  # by rank
        self._failed = False
        self._validated: dict[str, float] | None = None  # the monitored metric, from a validation in this epoch

    @abstractmethod
    def choose(self, analysis: Analysis) -> Recipe:
        """The channels to keep, from what the analysis found; the one decision that is a method's own.

        Raises:
            ValueError: If the method's target cannot be reached.
        """

    # ---------------------------------------------------------------- hooks, in the order in which they fire

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(schedule=str(self.schedule), include=self.include, exclude=self.exclude)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, and see to it that a checkpoint of the cut network finds room for its weights."""
        _keep_plan_in_checkpoints(pl_module)
        if stage != "fit":
            return
        self._resumed_rng = self._validated = None
        self._failed = False
        if trainer.global_step == 0:  # what is resumed brings its own state later
            self.schedule.reset()
            self.reports = []
        if not is_dev_run(trainer):
            self.schedule.resolve(trainer.max_epochs)
        refuse_strategy(trainer)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot work on this module, now that it is configured."""
        names = [name for name, _ in pl_module.named_modules()]
        for pattern in (*self.include, *self.exclude):
            if not any(matches(name, pattern) for name in names):
                raise MisconfigurationException(f"Pattern {pattern!r} matches no module of {type(pl_module).__name__}.")
        if not pl_module.automatic_optimization and not is_overridden("validation_step", pl_module):
            raise MisconfigurationException(
                f"{type(pl_module).__name__} optimizes manually, so that its `training_step` cannot be run without training. "
                "Give it a `validation_step`, which shows how the network is used."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Resumed in the middle of an epoch, the rest of that epoch comes first.
        if trainer.fit_loop.restarted_mid_epoch and (states := self._own_rng(trainer)) is not None:
            rng.restore(states)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (states := self._own_rng(trainer)) is not None:
            _resume_rng(trainer, states)
        if self._validated is not None:  # resumed from between a validation and the end of its epoch
            self.schedule.watch(self._validated)
            self._validated = None
        if self.schedule.due(trainer.current_epoch) or (is_dev_run(trainer) and not self.schedule.cuts):
            self.cut_now(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._validated = self._monitored(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._validated is not None or not trainer.enable_validation:
            self.schedule.watch({**trainer.callback_metrics, **(self._validated or {}), **self._monitored(trainer)})
        self._validated = None

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.reports:
            return
        first = self.reports[0].before
        final = over_ranks({name: float(value) for name, value in trainer.callback_metrics.items() if name in first.metrics})
        self.reports[-1].finish(trainer, first, final)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._failed = True  # perhaps on this rank alone: a checkpoint that is written now cannot ask the others

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        write_plan(pl_module, checkpoint)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "schedule": self.schedule.state_dict(),
            "validated": self._validated,
            "rng": [rng.collect()] if self._failed else share(rng.collect()),
            "reports": [report.to_dict() for report in self.reports],
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.schedule.load_state_dict(state_dict["schedule"])
        self._validated = state_dict["validated"]
        self._resumed_rng = state_dict["rng"]
        self.reports = [CutReport.from_dict(report) for report in state_dict["reports"]]

    def _monitored(self, trainer: Trainer) -> dict[str, float]:
        """The monitored metric, if it is logged, the same on all ranks, which must cut together."""
        name = self.schedule.monitor
        return over_ranks({name: float(trainer.callback_metrics[name])} if name in trainer.callback_metrics else {})

    def _own_rng(self, trainer: Trainer) -> Mapping[str, Any] | None:
        """This rank's states of the random number generators, from the checkpoint that the run was resumed from; only once."""
        states, self._resumed_rng = self._resumed_rng, None
        return None if states is None else own_state(trainer, states, type(self).__name__)

    # ---------------------------------------------------------------- the cut

    def cut_now(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Analyse, choose, cut, and bring everything along that goes with the network. If anything fails, nothing has changed.

        Raises:
            MisconfigurationException: If there are no data for the analysis.
            ValueError: If the target cannot be reached, an optimizer's state cannot follow, or the network would not work once
                cut.
        """
        with as_one(), rng.isolated(), validating(trainer), buffers_of_first(trainer, pl_module):
            with as_one():
                loader = analysis_batches(trainer, pl_module, self.loader, self.max_samples)
                batch = loader.example()
                if batch is None:
                    raise MisconfigurationException("The analysis needs data, but its loader gave no batch.")
                example = first_samples(batch)
                analysis = analyze(
                    pl_module,
                    loader,
                    example_inputs=example,
                    forward_fn=silent_step,
                    max_samples=self.max_samples,
                    progress=progress_of(trainer),
                    skips=self.skips,
                    compensate=self.compensate,
                )
                recipe = Recipe.from_dict(share(self.choose(analysis).to_dict())[0])
                # Worked out before anything is touched, so that an optimizer that cannot follow stops the cut.
                plan = plan_for(pl_module, analysis.graph, recipe)
                _refuse_disagreement(plan)
                followers = [plan.prepare(optimizer) for optimizer in trainer.optimizers]
                before = self._measure(trainer, pl_module, batch, analysis.mult_adds())
                averages = _averages(trainer)
            with rewrapped(trainer, pl_module), as_one(), _all_or_nothing([pl_module, *averages], trainer.optimizers):
                trains = all(share(self.verify and training_error(trainer, pl_module, batch) is None))
                cut(
                    pl_module, recipe, example, forward_fn=silent_step, verify=self.verify, graph=analysis.graph,
                    mean_inputs=analysis.mean_inputs,
                )  # fmt: skip
                for follow in followers:
                    follow()
                for average in averages:
                    plan.apply_to(average)
                share(None)  # norms that sync over ranks talk to the others in training mode
                if trains and (error := training_error(trainer, pl_module, batch)) is not None:
                    _refuse_training(pl_module, analysis, error)
                after = self._measure(trainer, pl_module, batch, analysis.mult_adds(recipe))
                share(None)  # from here on, no rank can fail
        composed = plan_of(pl_module)
        report = CutReport(
            epoch=trainer.current_epoch,
            recipe=recipe if composed is None else composed.recipe,
            before=before,
            after=after,
            batch_size=batch_size(batch),
        )
        self.schedule.note_cut(trainer.current_epoch)
        self.reports.append(report)
        callbacks = [callback for callback in trainer.callbacks if isinstance(callback, PruningCallback)]  # type: ignore[attr-defined]
        with as_one(), rng.isolated():
            report.publish(trainer, analysis, plan.recipe, index=sum(len(callback.reports) for callback in callbacks) - 1)
        if plan.keep:
            _forget_bests(trainer)
        else:
            rank_zero_warn(f"{type(self).__name__} found nothing to remove before epoch {trainer.current_epoch}.")

    def _measure(self, trainer: Trainer, pl_module: LightningModule, batch: Any, mult_adds: int) -> Measurement:
        step = bare_step(pl_module)
        with evaluating(pl_module), untouched(pl_module, drop), trainer.precision_plugin.val_step_context():
            latency = measure_latency(lambda: step(pl_module, batch), device=pl_module.device)
        return Measurement(
            parameters=count_parameters(pl_module),
            mult_adds=mult_adds,
            latency=latency,
            metrics=evaluate(trainer, pl_module) if self.evaluate else {},
        )


def _refuse_disagreement(plan: Plan) -> None:
    """Refuse a plan that is not the same on all ranks, as of networks that run other layers on other inputs."""
    plans = share(hashlib.sha256(repr(plan.to_dict()).encode()).hexdigest())
    if len(set(plans)) > 1:
        raise ValueError(
            "The recipe means another cut on some ranks than on others: they traced the network with different samples, and what "
            "it runs depends on them. Give the analysis a plain `DataLoader`, of which all ranks trace the same samples."
        )


def _averages(trainer: Trainer) -> list[nn.Module]:
    """Copies of the module that other callbacks keep to average its weights over time."""
    kept = [vars(callback).get("_average_model") for callback in trainer.callbacks]  # type: ignore[attr-defined]
    return [average.module if isinstance(average, AveragedModel) else average for average in kept if average is not None]


def _forget_bests(trainer: Trainer) -> None:
    """Let the callbacks that look for the best network begin again."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
            callback.best_k_models, callback.kth_best_model_path = {}, ""
            callback.best_model_path, callback.best_model_score = "", None
            callback.kth_value = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)
        elif isinstance(callback, EarlyStopping):
            callback.best_score = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)
            callback.wait_count = 0


@contextmanager
def _all_or_nothing(networks: Sequence[nn.Module], optimizers: Sequence[Optimizer]) -> Iterator[None]:
    """If anything fails inside, networks and optimizers are put back to what they were. No tensor is copied for it."""
    found = {tensor: None for network in networks for tensor in all_tensors(network).values()}
    tensors = [(tensor, tensor.data, tensor.grad) for tensor in found]
    modules = [
        (module, type(module), dict(vars(module)), dict(module._parameters), dict(module._buffers))
        for network in networks
        for module in network.modules()
    ]
    states = [(state, dict(state)) for optimizer in optimizers for state in optimizer.state.values()]
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


def _refuse_training(pl_module: LightningModule, analysis: Analysis, error: Exception) -> None:
    unseen = ", ".join(map(repr, analysis.graph.unused[:3]))
    raise ValueError(
        f"After the cut, the `training_step` of {type(pl_module).__name__} fails: {error}. The channels were followed through "
        f"`validation_step`{f', which does not run {unseen}' if unseen else ''}. Run the same layers in both, or leave the "
        "layers that feed them out with `exclude`."
    ) from error


def _keep_plan_in_checkpoints(pl_module: LightningModule) -> None:
    """Let the module note in each checkpoint what was cut, and be cut to a checkpoint's sizes before the weights load.

    A callback's own load hooks run after the weights, and its save hooks not at all for a file of weights alone. The module's get
    the whole checkpoint, always. They are methods bound to the instance, so that copies and pickles of the module hold their own.
    """
    for hook in (on_load_checkpoint, on_save_checkpoint):
        own = vars(pl_module).get(hook.__name__)
        if getattr(own, "__func__", None) is hook:
            continue
        if own is not None:  # somebody else's, on the instance as well
            vars(pl_module)[f"_lit_compress_{hook.__name__}"] = own
        vars(pl_module)[hook.__name__] = types.MethodType(hook, pl_module)


# Named as on the module: a bound method is pickled by its name.
def on_load_checkpoint(self: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Cut the module to the sizes of the checkpoint, before its weights load."""
    for network in [self, *(() if self._trainer is None else _averages(self._trainer))]:
        rebuild(network, checkpoint)
    own = vars(self).get("_lit_compress_on_load_checkpoint")
    type(self).on_load_checkpoint(self, checkpoint) if own is None else own(checkpoint)


def on_save_checkpoint(self: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Note in the checkpoint what was cut."""
    write_plan(self, checkpoint)
    own = vars(self).get("_lit_compress_on_save_checkpoint")
    type(self).on_save_checkpoint(self, checkpoint) if own is None else own(checkpoint)


def _resume_rng(trainer: Trainer, states: Mapping[str, Any]) -> None:
    """Go on with the random numbers where the checkpoint was written, so that a resumed run is the same run.

    The Trainer has made the iterator of a resumed epoch before this, with other random numbers. It is made again where an
    uninterrupted run makes it: after the hooks at the start of the epoch, right before the first batch.
    """
    rng.restore(states)
    loop = trainer.fit_loop
    fetcher = loop._data_fetcher
    if fetcher is None or not (getattr(loop, "is_resuming", False) or loop.epoch_loop.restarting):
        return
    if fetcher.length is None:  # it has fetched ahead, to see the end come
        iter(fetcher)
    else:
        fetcher.iterator = _Later(fetcher)


class _Later(Iterator[Any]):
    """An iterator over a fetcher's loader that is made when the first batch is asked for."""

    def __init__(self, fetcher: Any) -> None:
        self._fetcher = fetcher

    @override
    def __next__(self) -> Any:
        self._fetcher.iterator = iter(self._fetcher.combined_loader)
        return next(self._fetcher.iterator)
