"""The LightningModule that trains a detector of pedestrians."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor
from typing_extensions import override

from lit_compress import rng
from lit_compress.callbacks.loaders import analysis_batches
from lit_compress.callbacks.loggers import Outlets
from lit_compress.detection.backbones import load_backbone
from lit_compress.detection.detector import PedestrianDetector
from lit_compress.detection.rpn import RegionProposalNetwork
from lit_compress.metrics import LogAverageMissRate
from lit_compress.modules.optimization import Interval, check_interval, optimization
from lit_compress.modules.parts import logged_sum
from lit_compress.modules.prunable import PrunableMixin
from lit_compress.pedestrians.pictures import plot_detections
from lit_compress.pedestrians.subsets import Subset

Target = Mapping[str, Any]
Batch = tuple[Sequence[Tensor], Sequence[Target]]


class LitPedestrianDetector(PrunableMixin, LightningModule):
    """Train a detector of pedestrians, and score it by the Caltech protocol at each validation.

    Batch: ``(images, targets)``, as :class:`~lit_compress.datamodules.PedestrianDataModule` gives it: lists of images
    ``(3, H, W)`` in [0, 1] of any size and of targets; for :class:`~lit_compress.detection.FastRCNN` with ``proposals``
    ``(n, 4)`` in them.

    Logs, as means over an epoch and over ranks: ``train/loss`` and its parts ``train/classification`` (nats) and
    ``train/boxes``; after each validation and test ``val/miss_rate`` and ``test/miss_rate`` (the log-average miss rate, in
    [0, 1]), and the pictures ``val/detections`` of the first images of the split and ``val/curve`` of miss rate against false
    positives, and likewise ``test/…``.

    When training begins, mean and deviation of the boxes to be learnt are measured on training images, unless the detector
    comes from a checkpoint.

    Args:
        net: Detector to train; ``None`` takes :class:`~lit_compress.detection.RegionProposalNetwork` on VGG-16.
        weights: File with weights that the detector's backbone begins with: its state dict, that of torchvision's classification
            network of this name, or the checkpoint of a module that holds it.
        frozen: Layers of the backbone that stay as they are. ``None`` takes the first two macro-layers of VGG-16 if there are
            ``weights``, and otherwise none, since random weights are not worth keeping; which, is said.
        optimizer: From parameters to an optimizer: a class, a ``lambda``, or ``class_path`` and ``init_args`` in a config.
            By default Adam with a learning rate of 1e-3.
        scheduler: From the optimizer to a learning rate schedule, likewise; ``None`` keeps the rate. ``ReduceLROnPlateau``
            follows its own ``monitor`` if it has one, and otherwise ``val/miss_rate``.
        scheduler_interval: Whether the schedule steps after every epoch or every optimizer step.
        subset: Whom the miss rate counts, as :class:`~lit_compress.metrics.LogAverageMissRate` takes it.
        measured_on: Training images that mean and deviation of the boxes are measured on.
        pictures: Images of the split to draw; 0 for no pictures.

    Raises:
        ValueError: If a number is out of range, weights do not fit, a layer is unknown, or there is nobody to be learnt.

    Source: Zhang et al., *Is Faster R-CNN Doing Well for Pedestrian Detection?*, 2016; T1, section 3.4.

    Example:
        >>> from lit_compress.datamodules import SyntheticPedestrianDataModule
        >>> from lit_compress.models import VGGEncoder
        >>> net = RegionProposalNetwork(VGGEncoder(width=0.125), hidden=32, image_size=None)
        >>> detector = LitPedestrianDetector(net).eval()
        >>> batch = next(iter(SyntheticPedestrianDataModule(batch_size=2).test_dataloader()))
        >>> [sorted(found) for found in detector.predict_step(batch, batch_idx=0)]
        [['boxes', 'labels', 'scores'], ['boxes', 'labels', 'scores']]
    """

    measured: Tensor

    def __init__(
        self,
        net: PedestrianDetector | None = None,
        weights: str | Path | None = None,
        frozen: Sequence[str] | None = None,
        optimizer: OptimizerCallable = torch.optim.Adam,
        scheduler: LRSchedulerCallable | None = None,
        scheduler_interval: Interval = "epoch",
        subset: str | Subset | None = "reasonable",
        measured_on: int = 1_000,
        pictures: int = 8,
    ) -> None:
        super().__init__()
        check_interval(scheduler_interval)
        for name, number, least in (("measured_on", measured_on, 1), ("pictures", pictures, 0)):
            if number < least:
                raise ValueError(f"Argument `{name}` must be at least {least} but got {number}.")
        self.save_hyperparameters(ignore=["net", "weights", "frozen", "optimizer", "scheduler", "subset"])
        self.net = RegionProposalNetwork() if net is None else net
        if weights is not None:
            load_backbone(self.net.backbone, weights)
        if frozen is None:
            frozen = getattr(self.net.backbone, "fixed", ()) if weights is not None else ()
            if weights is None:
                rank_zero_info("The detector's backbone begins without `weights`, so that none of its layers is frozen.")
        self.net.freeze(frozen)
        self.optimizer, self.scheduler, self.scheduler_interval = optimizer, scheduler, scheduler_interval
        self.measured_on, self.pictures = measured_on, pictures
        self.register_buffer("measured", torch.tensor(False))
        self.val_miss_rate, self.test_miss_rate = LogAverageMissRate(subset), LogAverageMissRate(subset)
        self._shown: list[tuple[Tensor, Mapping[str, Tensor], Target]] = []

    @override
    def forward(self, images: Sequence[Tensor], proposals: Sequence[Tensor] | None = None) -> list[dict[str, Tensor]]:
        """Detections, as :class:`~lit_compress.detection.PedestrianDetector` gives them."""
        found: list[dict[str, Tensor]] = self.net(images, proposals)
        return found

    @override
    def on_train_start(self) -> None:
        if not self.measured:
            with rng.isolated():
                self.net.measure_targets(analysis_batches(self.trainer, self, None, self.measured_on))
            self.measured.fill_(True)

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, targets = batch
        parts = self.net(images, targets=targets)  # one call of one module, in whose place a teacher can be called as well
        return logged_sum(self, parts, batch_size=len(images))

    @override
    def on_validation_epoch_start(self) -> None:
        self._shown = []

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, self.val_miss_rate)

    @override
    def on_validation_epoch_end(self) -> None:
        self._score("val", self.val_miss_rate)

    @override
    def on_test_epoch_start(self) -> None:
        self._shown = []

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, self.test_miss_rate)

    @override
    def on_test_epoch_end(self) -> None:
        self._score("test", self.test_miss_rate)

    @override
    def predict_step(self, batch: Batch | Sequence[Tensor], batch_idx: int) -> list[dict[str, Tensor]]:
        """Detections in images with or without targets."""
        if isinstance(batch[0], Tensor):
            return self(batch)  # type: ignore[no-any-return]
        images, targets = batch
        return self(images, _proposals(targets))  # type: ignore[no-any-return, arg-type]

    def roi_boxes(self, batch: Batch) -> list[Tensor]:
        """Boxes of a batch, ignore regions included, in pixels of what the backbone gets, for ``RoIAutoencoder``."""
        images, targets = batch
        return self.net.boxes_on_input(images, [target["boxes"] for target in targets])

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        return optimization(self.parameters(), self.optimizer, self.scheduler, self.scheduler_interval, monitor="val/miss_rate")

    def _evaluate(self, batch: Batch, miss_rate: LogAverageMissRate) -> None:
        images, targets = batch
        found = self(images, _proposals(targets))
        miss_rate.update(found, targets)
        room = self.pictures - len(self._shown)
        self._shown += list(zip(images, found, targets, strict=True))[:room]

    def _score(self, split: str, miss_rate: LogAverageMissRate) -> None:
        rate = miss_rate.compute()  # of all ranks together, the same on each
        self.log(f"{split}/miss_rate", rate.float(), prog_bar=True)
        if self.pictures and not self.trainer.sanity_checking:
            outlets = Outlets(self.trainer)
            if outlets.open and self._shown:
                images, found, targets = zip(*self._shown, strict=True)
                outlets.figure(f"{split}/detections", plot_detections(images, found, targets), f"{split}_detections")
                outlets.figure(f"{split}/curve", miss_rate.plot()[0], f"{split}_curve")
        self._shown = []
        miss_rate.reset()


def _proposals(targets: Sequence[Target]) -> list[Tensor] | None:
    return [target["proposals"] for target in targets] if targets and "proposals" in targets[0] else None
