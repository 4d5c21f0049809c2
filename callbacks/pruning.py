"""What all pruning callbacks share: when to cut in a running Trainer, and everything that must follow a cut."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_warn
from torch.utils.data import DataLoader
from typing_extensions import override

from lit_compress import rng
from lit_compress.analysis import Analysis, analyze
from lit_compress.callbacks.added_loss import refuse_manual
from lit_compress.callbacks.anew import draw_anew
from lit_compress.callbacks.companions import all_or_nothing, averages_of, forget_bests, optimizers_of, stops_now
from lit_compress.callbacks.fallback import Fallback, Kept
from lit_compress.callbacks.loaders import analysis_batches, refuse_several
from lit_compress.callbacks.outcome import CutReport, Measurement, write_summary
from lit_compress.callbacks.progress import progress_of
from lit_compress.callbacks.ranks import buffers_of_first, over_ranks, refuse_strategy, rewrapped
from lit_compress.callbacks.restart import first_schedule, prepare_restart, warn_if_cut_short
from lit_compress.callbacks.resume import RandomStates, keep_plan_in_checkpoints
from lit_compress.callbacks.schedule import CutSchedule
from lit_compress.callbacks.self_distillation import NAME, SelfDistillation
from lit_compress.callbacks.steps import (
    evaluate,
    is_dev_run,
    refuse_only_training,
    silent_step,
    step_stopwatch,
    training_error,
    validating,
)
from lit_compress.checkpoint import write_plan
from lit_compress.graph import ChannelGraph, trace
from lit_compress.latency import Comparison
from lit_compress.losses import Term
from lit_compress.naming import matches
from lit_compress.norms import reestimate_norms
from lit_compress.optimizer_state import refuse_sharded
from lit_compress.plan import Plan, plan_of
from lit_compress.rankings import Method
from lit_compress.ranks import as_one, share
from lit_compress.recipe import Recipe
from lit_compress.report import count_bytes, count_parameters
from lit_compress.spectra import PFA
from lit_compress.statistics.gather import first_samples
from lit_compress.surgery import cut, cut_copy, plan_for


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
        include: Patterns over module names, as ``"net.layer1.*"``: the layers that may be cut.
        exclude: Patterns of layers to leave whole.
        min_width: Channels that each layer keeps at least.
        round_to: Round each width up to a multiple of this, which some hardware is faster with. A target is met all the same.
        skips: ``"share"``: layers tied by a skip connection keep the same channels. ``"pad"``: a block with an identity or
            zero-padded skip is cut on its own, and its output scattered back to the width of the skip.
        compensate: Fold what the removed channels give on average into the biases of the layers that read them. ``"linear"``:
            and what the channels kept tell about each sample's, by linear least squares, into their weights.
        weights: ``"kept"``: training goes on with the weights of the channels kept. ``"random"``: the cut decides the
            architecture alone; all weights are drawn anew, and optimizers forget their state.
        loader: Data for the analysis: ``"train"``, ``"val"`` or a ``DataLoader``. By default ``analysis_dataloader()`` of the
            module or the datamodule if there is one, otherwise the training data.
        max_samples: Use this many samples of it, drawn at random with a fixed seed. None for all.
        max_drop: Points (hundredths of a fraction such as accuracy) that ``monitor`` may be worse by than before the first cut.
            If fine-tuning has not come back to within it after ``patience`` validations without a new best, the network goes
            back to before the cut and a milder one is tried, by bisection; a run never ends with a network that has lost more.
            Until that is decided, checkpoints hold the network before the cut as well. None: a cut stays whatever it costs.
        reestimate_norms: Pass the analysis data through the cut network once more, to take the running statistics of its batch
            norms anew.
        restart_schedule: Let fine-tuning have the full training's schedule: right after a cut, every scheduler is again as it was
            when training began, and so are the learning rate and momentum of every parameter group. ``max_epochs`` stays: it
            counts training and fine-tuning together, and the schedule should be made for one of them. By default the running
            schedule goes on.
        distill_from_unpruned: After the first cut, let the network also learn from what it was right before: a frozen copy gives
            its softened outputs for each batch, and their divergence is added to the module's own loss. Or a list of terms
            (:mod:`lit_compress.losses`), which name layers of the network that ``training_step`` calls. Logged part by part, as
            ``train/unpruned/<term>``. Checkpoints hold the copy, beside the weights and not among them, so that a resumed run
            has the same teacher. A step then also costs a forward of the unpruned network.
        evaluate: Run the validation data before and after each cut, to tell what the cut itself costs.
        verify: Check on real data that the cut is exact and that ``training_step`` still runs, and otherwise put everything back
            and raise.
        kwargs: When to cut: ``at_epoch``, ``every_n_epochs`` or ``when``, with ``max_cuts``, ``monitor``, ``mode`` and
            ``patience``, as for :class:`~lit_compress.callbacks.schedule.CutSchedule`.

    Raises:
        MisconfigurationException: If the triggers contradict each other or the Trainer. From the start of ``fit``: if the
            strategy cannot be cut in flight, a pattern matches no module, a module under manual optimization has no
            ``validation_step``, an optimizer's state cannot follow a cut, or there is no schedule that could be restarted; if
            the module is to be distilled and optimizes manually. From the first step: if that calls not one network, once, or
            the network lacks a layer that a term reads.
    """

    def __init__(
        self,
        *,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        min_width: int = 1,
        round_to: int = 1,
        skips: Literal["share", "pad"] = "share",
        compensate: bool | Literal["linear"] = False,
        weights: Literal["kept", "random"] = "kept",
        loader: Literal["train", "val"] | DataLoader[Any] | Iterable[Any] | None = None,
        max_samples: int | None = None,
        max_drop: float | None = None,
        reestimate_norms: bool = False,
        restart_schedule: bool = False,
        distill_from_unpruned: bool | Sequence[Term] = False,
        evaluate: bool = True,
        verify: bool = True,
        **kwargs: Any,
    ) -> None:
        self.schedule = CutSchedule(**kwargs)
        if min_width < 1:
            raise MisconfigurationException(f"Argument `min_width` must be at least 1 but got {min_width}.")
        if round_to < 1:
            raise MisconfigurationException(f"Argument `round_to` must be at least 1 but got {round_to}.")
        if skips not in ("share", "pad"):
            raise MisconfigurationException(f"Argument `skips` must be 'share' or 'pad' but got {skips!r}.")
        if weights not in ("kept", "random"):
            raise MisconfigurationException(f"Argument `weights` must be 'kept' or 'random' but got {weights!r}.")
        if weights == "random" and compensate:
            raise MisconfigurationException(
                f"With `weights='random'` no bias is kept that `compensate={compensate!r}` could be folded into."
            )
        if compensate not in (False, True, "linear"):
            raise MisconfigurationException(f"Argument `compensate` must be True, False or 'linear' but got {compensate!r}.")
        if max_samples is not None and max_samples < 2:
            raise MisconfigurationException(f"Argument `max_samples` must be at least 2 or None but got {max_samples}.")
        if isinstance(loader, str) and loader not in ("train", "val"):
            raise MisconfigurationException(f"Argument `loader` must be 'train', 'val' or a DataLoader but got {loader!r}.")
        if isinstance(loader, Iterator):
            raise MisconfigurationException(
                "Argument `loader` is an iterator, which runs dry (as a CombinedLoader does): give one that can be iterated over "
                "again."
            )
        if isinstance(include, str) or isinstance(exclude, str):
            raise MisconfigurationException("Arguments `include` and `exclude` are lists of patterns, not one string.")
        self.include, self.exclude, self.min_width = tuple(include), tuple(exclude), min_width
        self.round_to, self.skips, self.compensate = round_to, skips, compensate
        self.weights = weights
        self.loader, self.max_samples, self.evaluate, self.verify = loader, max_samples, evaluate, verify
        self.restart_schedule, self.reestimate_norms = restart_schedule, reestimate_norms
        self.self_distillation = SelfDistillation(distill_from_unpruned)
        self.fallback: Fallback | None = None
        if max_drop is not None:
            if not evaluate:
                raise MisconfigurationException("`max_drop` needs the value before the cut: leave `evaluate=False` out.")
            self.fallback = Fallback(
                max_drop=max_drop, monitor=self.schedule.monitor, mode=self.schedule.mode, patience=self.schedule.patience
            )
        self.reports: list[CutReport] = []
        self._first_schedule: dict[str, Any] | None = None  # if it is to be restarted
        self._random_states = RandomStates(self)
        self._final: dict[str, float] = {}  # metrics of a network that was put back at the end
        self._validated: dict[str, float] | None = None  # the monitored metric, from a validation in this epoch
        self._validated_at = -1  # the step at which the network as it is was validated

    @property
    def method(self) -> Method:
        """What the analysis looks at: the responses of the layers, as PFA does, if a subclass says nothing else."""
        return PFA()

    @abstractmethod
    def choose(self, analysis: Analysis) -> Recipe:
        """The channels to keep, from what the analysis found; with :attr:`method`, all that is a method's own.

        Raises:
            ValueError: If the method's target cannot be reached.
        """

    def limited_recipe(self, analysis: Analysis, target: Mapping[str, float]) -> Recipe:
        """What the analysis recommends for a target, or without one, for the layers and widths that this callback may cut."""
        return analysis.recipe(
            **target,
            min_width=self.min_width,
            round_to=self.round_to,
            include=self.include,
            exclude=self.exclude,
        )

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
        self._validated = None
        self._validated_at = -1
        self._final = {}
        self._random_states.reset()
        if trainer.global_step == 0:  # what is resumed brings its own state later
            self.schedule.reset()
            self.reports, self._first_schedule = [], None
            self.self_distillation.reset()
            if self.fallback is not None:
                self.fallback.reset()
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
        refuse_only_training(pl_module)
        if self.self_distillation.terms:
            refuse_manual(pl_module, NAME)
            if any(one is not self and one.self_distillation.terms for one in _pruning_callbacks(trainer)):
                raise MisconfigurationException("Two callbacks have `distill_from_unpruned`: leave it to the first that cuts.")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        try:
            for optimizer in trainer.optimizers:
                refuse_sharded(optimizer)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        refuse_several(trainer, pl_module, self.loader)
        if self.restart_schedule and self._first_schedule is None:
            self._first_schedule = first_schedule(trainer, pl_module)
        self.self_distillation.begin(pl_module)
        if self.self_distillation.lacks_teacher and any(
            report.after.parameters < report.before.parameters for report in self.reports
        ):
            raise MisconfigurationException(
                "The run that is resumed was cut without `distill_from_unpruned`, and the unpruned network is not in its "
                "checkpoint. Resume from before the cut, or leave it out."
            )
        self._random_states.on_train_start(trainer)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._random_states.on_train_epoch_start(trainer)
        if self._validated is not None:  # resumed from between a validation and the end of its epoch
            self.schedule.watch(self._validated)
            self._validated = None
        if self.fallback is not None and self.fallback.must_go_back:
            hopeless = self.fallback.strength == 0
            self._validated_at = -1
            self.reports = self.fallback.go_back(trainer, pl_module)
            write_summary(trainer, _all_reports(trainer))
            self.self_distillation.forget_if_whole(pl_module)
            if hopeless:
                self.nothing_left(trainer)
            elif self.fallback.searching:
                self.schedule.cuts.pop()  # the same cut again
                self.cut_now(trainer, pl_module)
        elif self.fallback is not None and self.fallback.searching:
            return
        elif self.schedule.due(trainer.current_epoch) or (is_dev_run(trainer) and not self.schedule.cuts):
            self.cut_now(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._validated = self._monitored(trainer)
            self._validated_at = trainer.global_step

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._validated is not None or not trainer.enable_validation:
            self.schedule.watch({**trainer.callback_metrics, **(self._validated or {}), **self._monitored(trainer)})
        if self.fallback is not None and self._validated:
            self.fallback.watch(trainer, pl_module, self.reports, self._validated)
        self._validated = None
        # Before `ModelCheckpoint`, which comes last, writes the file of the last epoch.
        if self.fallback is not None and stops_now(trainer) and self._put_back(trainer, pl_module, self.fallback):
            trainer.should_stop = True  # `EarlyStopping` now looks at the metrics of another network

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.fallback is not None and self._put_back(trainer, pl_module, self.fallback) and trainer.checkpoint_callbacks:
            rank_zero_warn(
                "Something ended training after the last checkpoint was written: that file holds the network that had lost too "
                "much. Save the one that was put back: `trainer.save_checkpoint(...)`."
            )

    def _put_back(self, trainer: Trainer, pl_module: LightningModule, fallback: Fallback) -> bool:
        """Do not leave training with a network that has lost more than it may. Returns whether another one was put back."""
        if not fallback.open:
            return False
        name = self.schedule.monitor
        if self._validated_at == trainer.global_step:
            value = self._monitored(trainer)[name]
        else:  # trained on since it was last validated, or cut
            self._final = evaluate(trainer, pl_module)
            value = self._final[name]
        if (reports := fallback.end(trainer, pl_module, value)) is None:
            return False
        self.reports, self._final = reports, evaluate(trainer, pl_module)
        self.self_distillation.forget_if_whole(pl_module)
        # What `ModelCheckpoint` ranks the network by.
        trainer.callback_metrics.update({key: torch.tensor(one, device=pl_module.device) for key, one in self._final.items()})
        return True

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        reports = _all_reports(trainer)
        known = {name for report in reports for name in report.before.metrics}
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()} | self._final
        final = over_ranks({name: value for name, value in metrics.items() if name in known})
        if self.schedule.cuts:  # perhaps all put back since
            write_summary(trainer, reports, final)
        if self.reports:
            self.reports[-1].finish(trainer, self.reports, final)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._random_states.on_exception()
        self.self_distillation.end(pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.self_distillation.end(pl_module)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume as another configuration than the one that has cut: all would be cut once more.

        Raises:
            MisconfigurationException: If the checkpoint has the state of a callback of this class with other arguments.
        """
        saved = checkpoint.get("callbacks", {})
        if trainer.state.fn != TrainerFn.FITTING or self.state_key in saved:
            return
        present = {callback.state_key for callback in trainer.callbacks}  # type: ignore[attr-defined]
        for key, state in saved.items():
            if key.startswith(f"{type(self).__qualname__}{{") and key not in present and state["schedule"]["cuts"]:
                raise MisconfigurationException(
                    f"The checkpoint's network was cut by {key}, but this run has {self.state_key}, which would cut it once "
                    "more. Resume with the arguments that it had; for further cuts, add a second "
                    f"{type(self).__name__} beside it."
                )

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        write_plan(pl_module, checkpoint)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "schedule": self.schedule.state_dict(),
            "first_schedule": self._first_schedule,
            "validated": self._validated,
            "rng": self._random_states.state_dict(),
            "reports": [report.to_dict() for report in self.reports],
            "fallback": None if self.fallback is None else self.fallback.state_dict(),
            "unpruned": self.self_distillation.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.schedule.load_state_dict(state_dict["schedule"])
        self._first_schedule = state_dict["first_schedule"] if self.restart_schedule else None
        self._validated = state_dict["validated"]
        self._random_states.load_state_dict(state_dict["rng"])
        self.reports = [CutReport.from_dict(report) for report in state_dict["reports"]]
        if self.fallback is not None and state_dict["fallback"] is not None:
            self.fallback.load_state_dict(state_dict["fallback"])
        self.self_distillation.load_state_dict(state_dict["unpruned"])

    def _monitored(self, trainer: Trainer) -> dict[str, float]:
        """The monitored metric, if it is logged, the same on all ranks, which must cut together."""
        name = self.schedule.monitor
        return over_ranks({name: float(trainer.callback_metrics[name])} if name in trainer.callback_metrics else {})

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
                stopwatch = step_stopwatch(trainer, pl_module, batch)
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
                    stopwatch=stopwatch,
                )
                recipe = self.choose(analysis)
                if self.fallback is not None and self.fallback.strength < 1:
                    recipe = analysis.milder(recipe, self.fallback.strength)
                recipe = Recipe.from_dict(share(recipe.to_dict())[0])
                # Worked out before anything is touched, so that an optimizer that cannot follow stops the cut.
                plan = plan_for(pl_module, analysis.graph, recipe)
                _refuse_disagreement(plan)
                followers = [plan.prepare(optimizer) for optimizer in optimizers_of(trainer)]
                restart = None if self._first_schedule is None else prepare_restart(trainer, self._first_schedule)
                parameters, memory = count_parameters(pl_module), count_bytes(pl_module)
                metrics = self._validate(trainer, pl_module)
                averages = averages_of(trainer)
                if self.fallback is not None:
                    self.fallback.check(metrics)
                kept = None if self.fallback is None else Kept.of(trainer, pl_module, self.reports)
            unpruned = self.self_distillation.cutting(pl_module) if plan.keep else nullcontext()
            with (
                rewrapped(trainer, pl_module),
                as_one(),
                all_or_nothing([pl_module, *averages], optimizers_of(trainer)),
                unpruned,
            ):
                trains = all(share(self.verify and training_error(trainer, pl_module, batch) is None))
                cut(
                    pl_module, recipe, example, forward_fn=silent_step, verify=self.verify, graph=analysis.graph,
                    inputs=analysis.inputs,
                )  # fmt: skip
                for follow in followers:
                    follow()
                for average in averages:
                    cut_copy(average, plan, analysis.graph, analysis.inputs)
                if self.weights == "random":
                    draw_anew(pl_module, averages, trainer.optimizers)
                share(None)  # norms that sync over ranks talk to the others in training mode
                if trains and (error := training_error(trainer, pl_module, batch)) is not None:
                    _refuse_training(pl_module, analysis, error)
                if self.reestimate_norms:
                    reestimate_norms(pl_module, loader, lambda one: silent_step(pl_module, one))
                speed = stopwatch.look_back(plan)
                before = Measurement(parameters, analysis.mult_adds(), memory, speed.before, metrics)
                after = Measurement(
                    count_parameters(pl_module), analysis.mult_adds(recipe), count_bytes(pl_module), speed.after,
                    self._validate(trainer, pl_module),
                )  # fmt: skip
                share(None)  # from here on, no rank can fail
        composed = plan_of(pl_module)
        report = CutReport(
            epoch=trainer.current_epoch,
            step=trainer.global_step,
            recipe=recipe if composed is None else composed.recipe,
            before=before,
            after=after,
            ratios=analysis.ratios(recipe),
            time_share=speed.ratio,
            batch_size=stopwatch.batch_size,
        )
        if self.fallback is not None and kept is not None:
            self.fallback.begin(kept, metrics)
        self._validated_at = -1
        self.schedule.note_cut(trainer.current_epoch)
        self.reports.append(report)
        with as_one(), rng.isolated():
            reports = _all_reports(trainer)
            report.publish(trainer, analysis, plan.recipe, len(reports) - 1)
            write_summary(trainer, reports)
        if speed.slower:
            _warn_slower(speed, stopwatch.batch_size, pl_module.device)
        if plan.keep:
            forget_bests(trainer)
            if restart is not None:
                restart()
                if not self.schedule.remaining:
                    warn_if_cut_short(trainer)
        else:
            if self.fallback is not None:
                self.fallback.settle()
            self.nothing_left(trainer)

    def nothing_left(self, trainer: Trainer) -> None:
        """There is nothing to remove: nothing at all, or nothing that ``max_drop`` allows."""
        rank_zero_warn(f"{type(self).__name__} found nothing to remove before epoch {trainer.current_epoch}.")

    @contextmanager
    def traced(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[tuple[ChannelGraph, Any]]:
        """The graph of the network as it is, and the example it was traced with; what fails inside fails on all ranks.

        Raises:
            MisconfigurationException: If there are no data for the analysis.
        """
        with as_one(), rng.isolated(), validating(trainer), as_one():
            example = first_samples(analysis_batches(trainer, pl_module, self.loader, self.max_samples).example())
            yield trace(pl_module, lambda: silent_step(pl_module, example)), example

    def _validate(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        return evaluate(trainer, pl_module) if self.evaluate else {}


def _pruning_callbacks(trainer: Trainer) -> list[PruningCallback]:
    return [callback for callback in trainer.callbacks if isinstance(callback, PruningCallback)]  # type: ignore[attr-defined]


def _all_reports(trainer: Trainer) -> list[CutReport]:
    """The cuts of all pruning callbacks, in their order."""
    reports = [report for callback in _pruning_callbacks(trainer) for report in callback.reports]
    return sorted(reports, key=lambda report: report.epoch)


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


def _warn_slower(speed: Comparison, batch_size: int, device: torch.device) -> None:
    rank_zero_warn(
        f"The cut has made the network slower: at batch size {batch_size} on {device}, a step takes {speed.after} (median and "
        f"quartiles), and took {speed.before} before, measured in turns. Odd numbers of channels may be slow to compute with: "
        "round them with `round_to=8`, or give `keep_latency`, which counts nothing but time."
    )
