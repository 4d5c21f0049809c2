"""The LightningModule that trains a network to classify."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from lit_compress.modules.optimization import Interval, check_interval, optimization
from lit_compress.modules.prunable import PrunableMixin

Batch = tuple[Tensor, Tensor]


class LitClassifier(PrunableMixin, LightningModule):
    """Train a network to name the class of each sample, by cross-entropy.

    Batch: ``(samples (N, *), labels (N,) int64 below num_classes)``.
    Logs, each as the mean over an epoch and over ranks: ``train/loss``, ``val/loss``, ``test/loss`` (cross-entropy in nats; label
    smoothing counts in training alone) and ``train/accuracy``, ``val/accuracy``, ``test/accuracy`` (fraction of the samples).
    With companions, ``train/companion_loss`` and so on (nats, the sum over companions) are logged beside, and not in ``loss``;
    likewise ``train/auxiliary_loss`` of a network's own auxiliary heads.

    Checkpoints hold weights and the plain numbers given here, so ``torch.load(weights_only=True)`` reads them. The network, the
    optimizer and the scheduler are not among those numbers: give them again to ``load_from_checkpoint``; a run of the command
    line has its config as their record.

    Args:
        net: Network to train, samples to logits ``(N, num_classes)``; or to a tuple of them, the network's own and those of
            auxiliary heads, as :class:`~lit_compress.models.DARTS` and torchvision's Inception give it in training.
        num_classes: Number of classes.
        optimizer: From parameters to an optimizer: a class, a ``lambda``, or ``class_path`` and ``init_args`` in a config.
            By default Adam with a learning rate of 1e-3.
        scheduler: From the optimizer to a learning rate schedule, likewise; ``None`` keeps the rate. A ``ReduceLROnPlateau``
            follows its own ``monitor`` if it has one, as Lightning's does, and otherwise ``val/loss``.
        label_smoothing: Share of the target, in [0, 1], that is spread evenly over all classes in training.
        scheduler_interval: Whether the schedule steps after every epoch or every optimizer step, as ``OneCycleLR`` wants it.
        companions: Deep supervision: path of a hidden module of ``net`` to the numbers that it gives for one sample. On each, a
            linear classifier of its own is trained along, and its cross-entropy added to the loss. They belong to this module and
            not to ``net``, and follow its cuts.
        input_dropout: Share of the input's numbers that are set to 0 in training, the others scaled up, in [0, 1).
        auxiliary_weight: Factor on the cross-entropy of each auxiliary head; 0.4 is that of DARTS.

    Raises:
        ValueError: If a number is out of range, the network's output is not ``num_classes`` wide, or a companion's module is none
            of its modules or gives another number.

    Source of the companions: Lee et al., *Deeply-Supervised Nets*, 2015, as PIBprune uses them.

    Example:
        >>> from lit_compress.datamodules import DigitsDataModule
        >>> from lit_compress.models import LeNet300100
        >>> classifier = LitClassifier(LeNet300100(in_features=64), num_classes=10)
        >>> batch = next(iter(DigitsDataModule().test_dataloader()))
        >>> classifier.predict_step(batch, batch_idx=0).shape
        torch.Size([64, 10])
    """

    def __init__(
        self,
        net: nn.Module,
        num_classes: int,
        optimizer: OptimizerCallable = torch.optim.Adam,
        scheduler: LRSchedulerCallable | None = None,
        label_smoothing: float = 0.0,
        scheduler_interval: Interval = "epoch",
        companions: Mapping[str, int] | None = None,
        input_dropout: float = 0.0,
        auxiliary_weight: float = 0.4,
    ) -> None:
        super().__init__()
        if not 0 <= input_dropout < 1:
            raise ValueError(f"Argument `input_dropout` must lie in [0, 1) but got {input_dropout}.")
        if auxiliary_weight < 0:
            raise ValueError(f"Argument `auxiliary_weight` must be 0 or more but got {auxiliary_weight}.")
        if unknown := sorted(set(companions or ()) - dict(net.named_modules()).keys()):
            raise ValueError(f"Argument `companions` names {unknown}, which are no modules of the network.")
        if num_classes < 2:
            raise ValueError(f"Argument `num_classes` must be at least 2 but got {num_classes}.")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"Argument `label_smoothing` must lie in [0, 1] but got {label_smoothing}.")
        check_interval(scheduler_interval)
        self.save_hyperparameters(ignore=["net", "optimizer", "scheduler"])
        self.net = net
        self.num_classes = num_classes
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.label_smoothing = label_smoothing
        self.scheduler_interval = scheduler_interval
        self.input_dropout = input_dropout
        self.auxiliary_weight = auxiliary_weight
        self.supervised = tuple(companions or ())
        self.companions = nn.ModuleList(nn.Linear(width, num_classes) for width in (companions or {}).values())
        self.train_accuracy = _accuracy(num_classes)
        self.val_accuracy = _accuracy(num_classes)
        self.test_accuracy = _accuracy(num_classes)

    @override
    def forward(self, samples: Tensor) -> Tensor:
        logits: Tensor = self.net(samples)
        return logits

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._step(batch, "train", self.train_accuracy, self.label_smoothing)

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._step(batch, "val", self.val_accuracy)

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._step(batch, "test", self.test_accuracy)

    @override
    def predict_step(self, batch: Batch | Tensor, batch_idx: int) -> Tensor:
        """Probability of each class, ``(N, num_classes)``, for samples with or without labels."""
        samples = batch if isinstance(batch, Tensor) else batch[0]
        return self(samples).softmax(dim=-1)  # type: ignore[no-any-return]

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        return optimization(self.parameters(), self.optimizer, self.scheduler, self.scheduler_interval)

    def _step(self, batch: Batch, split: str, accuracy: MulticlassAccuracy, label_smoothing: float = 0.0) -> Tensor:
        samples, labels = batch
        if self.training and self.input_dropout:
            samples = F.dropout(samples, self.input_dropout)
        with _listening(self.net, self.supervised) as hidden:
            outputs = self(samples)
        logits, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)
        if logits.shape != (len(labels), self.num_classes):
            raise ValueError(
                f"Expected logits of shape {(len(labels), self.num_classes)}, as `num_classes={self.num_classes}` says, but the "
                f"network gave {tuple(logits.shape)}."
            )
        loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        accuracy.update(logits, labels)
        count = len(labels)
        self.log(f"{split}/loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=count, sync_dist=True)
        # A metric adds up over ranks by itself.
        self.log(f"{split}/accuracy", accuracy, on_step=False, on_epoch=True, prog_bar=True, batch_size=count)
        if auxiliary:
            heads = torch.stack([F.cross_entropy(head, labels, label_smoothing=label_smoothing) for head in auxiliary]).sum()
            self.log(f"{split}/auxiliary_loss", heads, on_step=False, on_epoch=True, batch_size=count, sync_dist=True)
            loss = loss + self.auxiliary_weight * heads
        if not self.supervised:
            return loss
        # In validation as well: an analysis follows the channels through it.
        added = torch.stack([
            F.cross_entropy(self._companion(companion, name, hidden[name]), labels, label_smoothing=label_smoothing)
            for name, companion in zip(self.supervised, self.companions, strict=True)
        ]).sum()  # fmt: skip
        self.log(f"{split}/companion_loss", added, on_step=False, on_epoch=True, batch_size=count, sync_dist=True)
        return loss + added

    def _companion(self, companion: nn.Module, name: str, hidden: Tensor) -> Tensor:
        numbers, expected = hidden.flatten(1), cast(Tensor, companion.weight).shape[1]
        if numbers.shape[1] != expected:
            raise ValueError(f"Module {name!r} gives {numbers.shape[1]} numbers a sample, but `companions` says {expected}.")
        logits: Tensor = companion(numbers)
        return logits


@contextmanager
def _listening(net: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """What modules of a network give inside the context, by name; the network keeps no hook."""
    seen: dict[str, Tensor] = {}

    def listen(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, inputs, output: seen.update({name: output})

    handles = [net.get_submodule(name).register_forward_hook(listen(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _accuracy(num_classes: int) -> MulticlassAccuracy:
    # The shape is checked in the step; torchmetrics' own checks would wait for the device in every batch.
    return MulticlassAccuracy(num_classes, average="micro", validate_args=False)
