"""What all pruning callbacks share: when to cut in a running Trainer, and everything that must follow a cut."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader
from typing_extensions import override

from lit_compress import rng
from lit_compress.analysis import Analysis, analyze, matches
from lit_compress.callbacks.companions import all_or_nothing, averages_of, forget_bests, optimizers_of
from lit_compress.callbacks.loaders import analysis_batches
from lit_compress.callbacks.outcome import CutReport, Measurement
from lit_compress.callbacks.progress import progress_of
from lit_compress.callbacks.ranks import buffers_of_first, over_ranks, own_state, refuse_strategy, rewrapped
from lit_compress.callbacks.resume import keep_plan_in_checkpoints, resume_rng
from lit_compress.callbacks.schedule import CutSchedule
from lit_compress.callbacks.steps import bare_step, drop, evaluate, is_dev_run, silent_step, training_error, untouched, validating
from lit_compress.checkpoint import write_plan
from lit_compress.graph import ChannelGraph, evaluating, trace
from lit_compress.plan import Plan, plan_of
from lit_compress.rankings import Method
from lit_compress.ranks import as_one, share
from lit_compress.recipe import Recipe
from lit_compress.report import count_parameters, measure_latency
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

    @property
    @abstractmethod
    def method(self) -> Method:
        """What the analysis looks at."""

    @abstractmethod
    def choose(self, analysis: Analysis) -> Recipe:
        """The channels to keep, from what the analysis found; with :attr:`method`, all that is a method's own.

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
        keep_plan_in_checkpoints(pl_module)
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
            resume_rng(trainer, states)
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
                    method=self.method,
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
                followers = [plan.prepare(optimizer) for optimizer in optimizers_of(trainer)]
                before = self._measure(trainer, pl_module, batch, analysis.mult_adds())
                averages = averages_of(trainer)
            with rewrapped(trainer, pl_module), as_one(), all_or_nothing([pl_module, *averages], optimizers_of(trainer)):
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
            forget_bests(trainer)
        else:
            self.nothing_left(trainer)

    def nothing_left(self, trainer: Trainer) -> None:
        """A cut has found nothing to remove."""
        rank_zero_warn(f"{type(self).__name__} found nothing to remove before epoch {trainer.current_epoch}.")

    @contextmanager
    def traced(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[tuple[ChannelGraph, Any]]:
        """The graph of the network as it is, and the example it was traced with; what fails inside fails on all ranks.

        Raises:
            MisconfigurationException: If there are no data for the analysis.
        """
        with as_one(), rng.isolated(), validating(trainer), as_one():
            batch = analysis_batches(trainer, pl_module, self.loader, self.max_samples).example()
            if batch is None:
                raise MisconfigurationException("The analysis needs data, but its loader gave no batch.")
            example = first_samples(batch)
            yield trace(pl_module, lambda: silent_step(pl_module, example)), example

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


def _refuse_training(pl_module: LightningModule, analysis: Analysis, error: Exception) -> None:
    unseen = ", ".join(map(repr, analysis.graph.unused[:3]))
    raise ValueError(
        f"After the cut, the `training_step` of {type(pl_module).__name__} fails: {error}. The channels were followed through "
        f"`validation_step`{f', which does not run {unseen}' if unseen else ''}. Run the same layers in both, or leave the "
        "layers that feed them out with `exclude`."
    ) from error
