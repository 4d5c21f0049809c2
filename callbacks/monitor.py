"""Watch how large a network is over a run."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, Literal

from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.trainer.states import TrainerFn
from typing_extensions import override

from lit_compress.callbacks.alert import DropAlert
from lit_compress.callbacks.loggers import Outlets
from lit_compress.callbacks.look import look
from lit_compress.callbacks.progress import progress_of
from lit_compress.callbacks.ranks import shards
from lit_compress.callbacks.steps import refuse_only_training, silent_step, validating
from lit_compress.graph import trace
from lit_compress.history import Gauge, SizeHistory, share
from lit_compress.pictures import plot_history
from lit_compress.plan import plan_of
from lit_compress.statistics.gather import batch_size, first_samples, to_device


class CompressionMonitor(Callback):
    """Logs how large the network is, layer by layer, over a whole run: what was cut out of it, when, and by what.

    It goes with any number of pruning callbacks, whichever comes first in the list, with cuts of your own by
    :func:`~lit_compress.cut`, and with none. Pruning callbacks log what a cut itself did (metrics right before and after,
    spectra, a table of the layers); the monitor logs what holds over time.

    Before the first batch, the module's ``validation_step`` (``training_step`` if it has no other) runs once on two samples of
    it, to find the layers and how often each weight is used. From then on sizes are read off the shapes of the weights, once an
    epoch. Weights, random numbers and data are as they would be without the monitor.

    Logged after each epoch, and right after a cut: ``compress/parameters`` (trainable), ``compress/mult_adds`` (one sample),
    ``compress/share_of_parameters`` and ``compress/share_of_mult_adds`` (of the network before anything was cut, in [0, 1]),
    ``compress/cuts`` (how many so far) and ``compress/width/<layer>`` (output channels). After a cut and at the end: the picture
    ``compress/history`` and the tables ``compress/sizes`` and ``compress/width_history``. After a cut: the recipe of all cuts so
    far, in Weights & Biases as an artifact. If asked for: the picture ``compress/spectra``.

    Numbers go to every logger. Weights & Biases takes pictures, tables and artifacts too, TensorBoard pictures and text. On
    disk, ``history.png``, ``sizes.csv``, ``width_history.csv`` and ``recipe.json`` are in the folder ``lit_compress`` of the run.
    In a ``fast_dev_run`` the network is looked at, and nothing is logged.

    Args:
        spectra_every_n_epochs: After every n-th epoch, pass the analysis data through the network, and draw how its layers'
            responses spread over directions, with a dot where PFA-KL would cut: it shows when a layer has more channels than it
            uses. None for never, since it takes a pass.
        max_samples: For the spectra, use this many samples, drawn at random with a fixed seed. None for all.
        example_batch: What ``validation_step`` takes, if it does not take the batches of the training data.
        alert_drop: Give an alert if cuts have lost more than so many points (hundredths of a fraction such as accuracy) of
            ``monitor`` and training has not brought them back by the next cut, or by its end: a message of Weights & Biases where
            it is a logger, and a warning in any case. None for no alerts.
        monitor: What alerts go by: a fraction that the module logs on its validation data.
        mode: Whether ``monitor`` is better smaller or larger.

    Raises:
        MisconfigurationException: If a number is out of range, or alerts go by something that is not logged, or is no fraction.
            From the start of ``fit``: if the strategy shards the parameters,
            a module under manual optimization has no ``validation_step``, or the step does not run.

    Example::

        trainer = Trainer(logger=WandbLogger(), callbacks=[PFAPruning(energy=0.95), CompressionMonitor()])
    """

    def __init__(
        self,
        *,
        spectra_every_n_epochs: int | None = None,
        max_samples: int | None = None,
        example_batch: Any = None,
        alert_drop: float | None = None,
        monitor: str = "val/accuracy",
        mode: Literal["min", "max"] = "max",
    ) -> None:
        if spectra_every_n_epochs is not None and spectra_every_n_epochs < 1:
            raise MisconfigurationException(
                f"Argument `spectra_every_n_epochs` must be at least 1 or None but got {spectra_every_n_epochs}."
            )
        if max_samples is not None and max_samples < 2:
            raise MisconfigurationException(f"Argument `max_samples` must be at least 2 or None but got {max_samples}.")
        self.spectra_every_n_epochs, self.max_samples = spectra_every_n_epochs, max_samples
        self.example_batch = example_batch
        self.alert = None if alert_drop is None else DropAlert(alert_drop, monitor, mode)
        self.history = SizeHistory()
        self._gauge: Gauge | None = None
        self._outlets: Outlets | None = None  # where there is anybody to tell
        self._epoch_begins = False

    # ---------------------------------------------------------------- hooks, in the order in which they fire

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._gauge = self._outlets = None
        if trainer.global_step == 0:  # what is resumed brings its own history later
            self.history = SizeHistory()
            if self.alert is not None:
                self.alert.reset()
        if shards(trainer):
            raise MisconfigurationException(
                f"{type(trainer.strategy).__name__} shards the parameters, so that their shapes do not say how wide a layer is. "
                "Leave CompressionMonitor out."
            )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_only_training(pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        outlets = Outlets(trainer)
        self._outlets = outlets if outlets.open else None
        self._epoch_begins = True  # also when resumed in the middle of one

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epoch_begins = True

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Look at the network once an epoch, when all callbacks that cut at its start have done so."""
        if not self._epoch_begins:
            return
        self._epoch_begins = False
        is_first_look = self._gauge is None
        if self._gauge is None or not self._gauge.fits(pl_module):
            self._gauge = self._trace(trainer, pl_module, batch)
        plan = plan_of(pl_module)
        is_new = self.history.note(
            trainer.current_epoch,
            trainer.global_step,
            "" if plan is None else plan.recipe.method,
            self._gauge.read(pl_module),
            self._gauge.read_original(pl_module),
        )
        if is_new or is_first_look:
            self._log_values()
        if is_new and self.history.cuts and self.alert is not None:
            self._give_alert(self.alert)
            self.alert.begin()
        if is_new and plan is not None:
            self._log_history(trainer)
            if self._outlets is not None:
                self._outlets.recipe(plan.recipe, self._values())

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.alert is not None and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self.alert.watch(trainer.callback_metrics)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log_values()
        if self.spectra_every_n_epochs is not None and (trainer.current_epoch + 1) % self.spectra_every_n_epochs == 0:
            self._log_spectra(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log_history(trainer)
        if self.alert is not None:
            self._give_alert(self.alert)

    @override
    def state_dict(self) -> dict[str, Any]:
        alert = {} if self.alert is None else {"alert": self.alert.state_dict()}
        return {**self.history.state_dict(), **alert}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history.load_state_dict(state_dict)
        if self.alert is not None and "alert" in state_dict:  # not in a file of a run without alerts
            self.alert.load_state_dict(state_dict["alert"])

    # ---------------------------------------------------------------- what is looked at, and what is logged

    def _trace(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Gauge:
        if self.example_batch is not None:
            batch = to_device(self.example_batch, pl_module.device)
        example = deepcopy(first_samples(batch))  # a step may change its batch in place, and this one is still to be trained on
        try:
            with validating(trainer):
                graph = trace(pl_module, lambda: silent_step(pl_module, example))
        except ValueError as error:
            raise MisconfigurationException(
                f"CompressionMonitor cannot follow the forward: {error} If `validation_step` does not take the batches of the "
                "training data, give it one that it takes as `example_batch`."
            ) from error
        return Gauge(graph, batch_size(example))

    def _values(self) -> dict[str, float]:
        start, now = self.history.moments[0].sizes, self.history.moments[-1].sizes
        return {
            "compress/parameters": now.parameters,
            "compress/mult_adds": now.mult_adds,
            "compress/share_of_parameters": share(now.parameters, start.parameters),
            "compress/share_of_mult_adds": share(now.mult_adds, start.mult_adds),
            "compress/cuts": len(self.history.cuts),
            **{f"compress/width/{layer}": width for layer, width in now.widths.items()},
        }

    def _log_values(self) -> None:
        if self._outlets is not None and self.history.moments:
            self._outlets.values(self._values())

    def _log_history(self, trainer: Trainer) -> None:
        if self._outlets is not None and self.history.moments:
            self._outlets.figure("compress/history", plot_history(self.history, trainer.current_epoch), "history")
            self._outlets.table("compress/sizes", *self.history.sizes_table(), "sizes")
            self._outlets.table("compress/width_history", *self.history.widths_table(), "width_history")

    def _give_alert(self, alert: DropAlert) -> None:
        text = alert.text()
        if text is not None and self._outlets is not None:
            self._outlets.alert("A cut has lost too much", text)

    def _log_spectra(self, trainer: Trainer, pl_module: LightningModule) -> None:
        analysis = look(trainer, pl_module, max_samples=self.max_samples, progress=progress_of(trainer))
        if self._outlets is not None:
            for name, figure in analysis.figures(analysis.recipe()).items():
                self._outlets.figure(f"compress/{name}", figure, f"epoch_{trainer.current_epoch}_{name}")
