"""The LightningModule that trains a network to name the class of every pixel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassJaccardIndex
from typing_extensions import override

from lit_compress.modules.optimization import Interval, check_interval, optimization
from lit_compress.modules.prunable import PrunableMixin

Batch = tuple[Tensor, Tensor]


class LitSegmenter(PrunableMixin, LightningModule):
    """Train a network to name the class of every pixel, by cross-entropy.

    Batch: ``(images (N, C, H, W), labels (N, H, W) int64 below num_classes, or ignore_index)``.
    Logs, over an epoch and all ranks: ``train/loss``, ``val/loss``, ``test/loss`` (cross-entropy in nats, by ``class_weights``),
    ``val/iou``, ``test/iou`` (mean intersection over union of the classes that occur in labels or predictions, a fraction of all
    pixels of the split together) and ``val/iou/<class>``, ``test/iou/<class>`` of each of them.

    Args:
        net: Network to train, images to logits ``(N, num_classes, H, W)``.
        num_classes: Number of classes.
        optimizer: From parameters to an optimizer: a class, a ``lambda``, or ``class_path`` and ``init_args`` in a config.
            By default Adam with a learning rate of 1e-3.
        scheduler: From the optimizer to a learning rate schedule, likewise; ``None`` keeps the rate.
        scheduler_interval: Whether the schedule steps after every epoch or every optimizer step.
        class_weights: Weight of each class in the loss, for classes of few pixels; ``None`` weighs all alike.
        class_names: Under which the classes are logged; by default their numbers.
        ignore_index: Label of pixels that count for nothing.

    Raises:
        ValueError: If there is not one weight and one name a class, or the network's output does not fit the labels.

    Example:
        >>> from lit_compress.models import ERFNet
        >>> segmenter = LitSegmenter(ERFNet(num_classes=11, width=0.25), num_classes=11)
        >>> segmenter.predict_step(torch.zeros(1, 3, 16, 24), batch_idx=0).shape
        torch.Size([1, 11, 16, 24])
    """

    def __init__(
        self,
        net: nn.Module,
        num_classes: int,
        optimizer: OptimizerCallable = torch.optim.Adam,
        scheduler: LRSchedulerCallable | None = None,
        scheduler_interval: Interval = "epoch",
        class_weights: Sequence[float] | None = None,
        class_names: Sequence[str] | None = None,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"Argument `num_classes` must be at least 2 but got {num_classes}.")
        for name, values in [("class_weights", class_weights), ("class_names", class_names)]:
            if values is not None and len(values) != num_classes:
                raise ValueError(
                    f"Argument `{name}` must have one entry for each of {num_classes} classes but has {len(values)}."
                )
        check_interval(scheduler_interval)
        self.save_hyperparameters(ignore=["net", "optimizer", "scheduler"])
        self.net = net
        self.num_classes = num_classes
        self.optimizer, self.scheduler, self.scheduler_interval = optimizer, scheduler, scheduler_interval
        self.ignore_index = ignore_index
        self.class_names = [str(number) for number in range(num_classes)] if class_names is None else list(class_names)
        self.class_weights: Tensor | None
        weights = None if class_weights is None else torch.tensor(class_weights)
        self.register_buffer("class_weights", weights, persistent=False)  # among the hyperparameters already
        # The step checks shapes; torchmetrics' own checks would wait for the device in every batch.
        self.val_iou, self.test_iou = (
            MulticlassJaccardIndex(
                num_classes, average="none", ignore_index=ignore_index, validate_args=False, zero_division=float("nan")
            )
            for _ in range(2)
        )

    @override
    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._step(batch, "train")[0]

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss, logits = self._step(batch, "val")
        self.val_iou.update(logits, batch[1])
        return loss

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_iou(self.val_iou, "val")

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss, logits = self._step(batch, "test")
        self.test_iou.update(logits, batch[1])
        return loss

    @override
    def on_test_epoch_end(self) -> None:
        self._log_iou(self.test_iou, "test")

    @override
    def predict_step(self, batch: Batch | Tensor, batch_idx: int) -> Tensor:
        """Probability of each class, ``(N, num_classes, H, W)``, for images with or without labels."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        return self(images).softmax(dim=1)  # type: ignore[no-any-return]

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        return optimization(self.parameters(), self.optimizer, self.scheduler, self.scheduler_interval)

    def _step(self, batch: Batch, split: str) -> tuple[Tensor, Tensor]:
        images, labels = batch
        logits = self(images)
        expected = (len(labels), self.num_classes, *labels.shape[1:])
        if logits.shape != expected:
            raise ValueError(
                f"Expected logits of shape {expected}, as `num_classes={self.num_classes}` and the labels say, but the network "
                f"gave {tuple(logits.shape)}."
            )
        loss = F.cross_entropy(logits, labels, weight=self.class_weights, ignore_index=self.ignore_index)
        count = len(labels)
        self.log(f"{split}/loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=count, sync_dist=True)
        return loss, logits

    def _log_iou(self, metric: MulticlassJaccardIndex, split: str) -> None:
        iou = metric.compute()  # of all ranks together, the same on each
        metric.reset()
        self.log(f"{split}/iou", iou.nanmean(), prog_bar=True)
        self.log_dict({f"{split}/iou/{name}": one for name, one in zip(self.class_names, iou, strict=True) if not one.isnan()})
