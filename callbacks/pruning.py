"""What all pruning callbacks share: when to cut in a running Trainer, and everything that must follow a cut."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader
from typing_extensions import override

from lit_compress import rng
from lit_compress.analysis import Analysis, analyze
from lit_compress.callbacks.loaders import analysis_batches
from lit_compress.callbacks.outcome import CutReport, Measurement
from lit_compress.callbacks.progress import progress_of
from lit_compress.callbacks.schedule import CutSchedule
from lit_compress.callbacks.steps import bare_step, drop, evaluate, silent_step, untouched, validating
from lit_compress.checkpoint import rebuild, write_plan
from lit_compress.graph import evaluating
from lit_compress.plan import plan_of
from lit_compress.recipe import Recipe
from lit_compress.report import count_parameters, measure_latency
from lit_compress.statistics.gather import batch_size, first_samples
from lit_compress.surgery import cut, plan_for


class PruningCallback(Callback, ABC):
    """Cuts channels out of any LightningModule while it trains; subclasses choose which.

    At the start of an epoch the module's data are passed through it once in evaluation mode, a recipe is chosen, and the network is
    cut in place. The module, its parameters and its optimizers stay the objects they were: optimizer state is sliced, schedules go
    on. A checkpoint says what was cut, so that ``fit(ckpt_path=...)`` rebuilds the network before it loads the weights, also for a
    module that knows nothing of this package; the run then goes on exactly as if it had not stopped.

    Args:
        at_epoch: Cut once, before this epoch, counted from 0. If no trigger is given, half of ``max_epochs``.
        every_n_epochs: Cut before every n-th epoch, ``max_cuts`` times.
        when: ``"converged"``: cut when ``monitor`` has not improved for ``patience`` epochs.
        max_cuts: How often to cut. Needed by ``every_n_epochs``; otherwise 1.
        monitor: Metric that the module logs.
        mode: Whether ``monitor`` is better when lower (``"min"``) or higher (``"max"``).
        patience: Epochs without improvement that count as convergence.
        include: Patterns over module names, as ``"net.layer1.*"``: the layers that may be cut.
        exclude: Patterns of layers to leave whole.
        min_width: Channels that each layer keeps at least.
        loader: Data for the analysis: ``"train"``, ``"val"`` or a ``DataLoader``. By default ``analysis_dataloader()`` of the module or
            the datamodule if there is one, otherwise the training data.
        max_samples: Use this many samples of it, drawn at random with a fixed seed. None for all.
        evaluate: Run the validation data before and after each cut, to tell what the cut itself costs.
        verify: Check on real data that the cut is exact, and otherwise put everything back and raise.

    Raises:
        MisconfigurationException: If the triggers contradict each other or the Trainer. From the start of ``fit``: if the strategy
            cannot be cut in flight.
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
        loader: Literal["train", "val"] | DataLoader[Any] | Iterable[Any] | None = None,
        max_samples: int | None = None,
        evaluate: bool = True,
        verify: bool = True,
    ) -> None:
        self.schedule = CutSchedule(
            at_epoch=at_epoch, every_n_epochs=every_n_epochs, when=when, max_cuts=max_cuts, monitor=monitor, mode=mode, patience=patience
        )
        if min_width < 1:
            raise MisconfigurationException(f"Argument `min_width` must be at least 1 but got {min_width}.")
        if max_samples is not None and max_samples < 2:
            raise MisconfigurationException(f"Argument `max_samples` must be at least 2 or None but got {max_samples}.")
        if isinstance(loader, str) and loader not in ("train", "val"):
            raise MisconfigurationException(f"Argument `loader` must be 'train', 'val' or a DataLoader but got {loader!r}.")
        if isinstance(include, str) or isinstance(exclude, str):
            raise MisconfigurationException("Arguments `include` and `exclude` are lists of patterns, not one string.")
        self.include, self.exclude, self.min_width = tuple(include), tuple(exclude), min_width
        self.loader, self.max_samples, self.evaluate, self.verify = loader, max_samples, evaluate, verify
        self.reports: list[CutReport] = []
        self._resumed_rng: dict[str, Any] | None = None

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
        return self._generate_state_key(schedule=str(self.schedule))

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, and see to it that a checkpoint of the cut network finds room for its weights."""
        if stage == "fit":
            self.schedule.resolve(trainer.max_epochs)
            _refuse_strategy(trainer)
        _rebuild_on_load(pl_module)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._resumed_rng is not None:
            _resume_rng(trainer, self._resumed_rng)
            self._resumed_rng = None
        if self.schedule.due(trainer.current_epoch):
            self.cut_now(trainer, pl_module)
            self.schedule.note_cut(trainer.current_epoch)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.schedule.watch(trainer.callback_metrics)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.reports:
            return
        report = self.reports[-1]
        final = {name: float(value) for name, value in trainer.callback_metrics.items() if name in self.reports[0].before.metrics}
        report.finish(trainer, self.reports[0].before, final)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        write_plan(pl_module, checkpoint)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"schedule": self.schedule.state_dict(), "rng": rng.collect(), "reports": [report.to_dict() for report in self.reports]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.schedule.load_state_dict(state_dict["schedule"])
        self._resumed_rng = state_dict["rng"]
        self.reports = [CutReport.from_dict(report) for report in state_dict["reports"]]

    # ---------------------------------------------------------------- the cut

    def cut_now(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Analyse, choose, cut, and bring everything along that goes with the network. If anything fails, nothing has changed."""
        with rng.isolated(), validating(trainer):
            loader = analysis_batches(trainer, pl_module, self.loader, self.max_samples)
            batch = next(iter(loader), None)
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
            )
            recipe = self.choose(analysis)
            # Worked out before anything is touched, so that an optimizer that cannot follow stops the cut.
            plan = plan_for(pl_module, analysis.graph, recipe)
            followers = [plan.prepare(optimizer) for optimizer in trainer.optimizers]
            before = self._measure(trainer, pl_module, batch, analysis.mult_adds())
            cut(pl_module, recipe, example, forward_fn=silent_step, verify=self.verify, graph=analysis.graph)
            for follow in followers:
                follow()
            after = self._measure(trainer, pl_module, batch, analysis.mult_adds(recipe))
        composed = plan_of(pl_module)
        report = CutReport(
            epoch=trainer.current_epoch,
            recipe=recipe if composed is None else composed.recipe,
            before=before,
            after=after,
            batch_size=batch_size(batch),
        )
        self.reports.append(report)
        report.publish(trainer, analysis, recipe, index=len(self.reports) - 1)
        if not plan.keep:
            rank_zero_warn(f"{type(self).__name__} found nothing to remove before epoch {trainer.current_epoch}.")

    def _measure(self, trainer: Trainer, pl_module: LightningModule, batch: Any, mult_adds: int) -> Measurement:
        step = bare_step(pl_module)
        with evaluating(pl_module), untouched(pl_module, drop):
            latency = measure_latency(lambda: step(pl_module, batch), device=pl_module.device)
        return Measurement(
            parameters=count_parameters(pl_module),
            mult_adds=mult_adds,
            latency=latency,
            metrics=evaluate(trainer, pl_module) if self.evaluate else {},
        )


def _rebuild_on_load(pl_module: LightningModule) -> None:
    """Cut the module to a checkpoint's sizes before its weights load.

    A callback's own load hooks run after the weights; the module's runs before, and gets the whole checkpoint.
    """
    own = pl_module.on_load_checkpoint
    if getattr(own, "rebuilds_pruned", False):
        return

    def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
        rebuild(pl_module, checkpoint)
        own(checkpoint)

    on_load_checkpoint.rebuilds_pruned = True  # type: ignore[attr-defined]  # so that several callbacks wrap it once
    vars(pl_module)["on_load_checkpoint"] = on_load_checkpoint


def _resume_rng(trainer: Trainer, states: dict[str, Any]) -> None:
    """Go on with the random numbers where the checkpoint was written, so that a resumed run is the same run.

    The Trainer has made the iterator of a resumed epoch before this, with other random numbers; it is made again here, where an
    uninterrupted run makes it.
    """
    rng.restore(states)
    loop = trainer.fit_loop
    fetcher = loop._data_fetcher
    if fetcher is not None and (getattr(loop, "is_resuming", False) or loop.epoch_loop.restarting):
        iter(fetcher)


def _refuse_strategy(trainer: Trainer) -> None:
    name = type(trainer.strategy).__name__
    if "FSDP" in name or "DeepSpeed" in name or "ModelParallel" in name:
        raise MisconfigurationException(
            f"{name} shards the parameters, which cannot be cut in flight. Cut before sharding: apply a recipe in `configure_model`."
        )
    if trainer.world_size > 1:
        raise MisconfigurationException(f"Pruning runs in one process so far but {name} uses {trainer.world_size}. Set `devices=1`.")
