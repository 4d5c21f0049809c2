"""The LightningModule in which a student learns from a teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from typing_extensions import override

from lit_compress.checkpoint import load_pruned, note, noted
from lit_compress.losses.terms import KnowledgeDistillation, Readings, Term, loss_parts, student_taps, teacher_for
from lit_compress.modules.optimization import Interval, check_interval, optimization
from lit_compress.modules.parts import logged_sum
from lit_compress.modules.prunable import PrunableMixin
from lit_compress.ranks import as_one, share
from lit_compress.taps import Taps, pairs_of
from lit_compress.teacher import copy_layers

Batch = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, dict[str, Tensor]]


class LitDistiller(PrunableMixin, LightningModule):
    """Train a student on what a frozen teacher gives: its outputs, its layers by name, and how sure it is of them.

    Batch: ``(inputs (N, *), labels (N,) or (N, *) int64)``; labels of -100 count for nothing. A third part, if there is one, is
    what the teacher gives for these inputs, by name of reading, and the teacher does not run: see
    :class:`~lit_compress.datamodules.TeacherCacheDataModule`.

    Logs, each as the mean over an epoch and over ranks: ``train/loss``, and every part of it as it is weighted,
    ``train/knowledge_distillation``, ``train/attention_transfer/<layer>``, …; of the student alone ``val/loss``, ``test/loss``
    (cross-entropy in nats) and ``val/accuracy``, ``test/accuracy`` (fraction of the labels), or whatever ``metrics`` names.

    The networks are read where they are, by hooks that are there during a forward. The teacher is frozen and in evaluation mode,
    and is no submodule: no optimizer, no DDP bucket, no average of weights and no checkpoint holds it. A checkpoint notes where
    it came from, and a hash of its weights; a run goes on with the same teacher alone. The student loads by itself:
    ``load_pruned(student, "distilled.ckpt")``.

    Args:
        teacher: Network to learn from; frozen in place.
        student: Network to train.
        losses: Terms of the loss, which are added up. By default :class:`~lit_compress.losses.KnowledgeDistillation`.
        teacher_weights: File with the teacher's weights: a state dict, or the checkpoint of a module that holds it.
        student_weights: File with weights that the student begins with, likewise.
        copy_from_teacher: Layers whose weights the student begins with, as the classifier behind a hint layer: the student's
            names to the teacher's, or a list where they are the same.
        optimizer: From parameters to an optimizer: a class, a ``lambda``, or ``class_path`` and ``init_args`` in a config.
            By default Adam with a learning rate of 1e-3.
        scheduler: From the optimizer to a learning rate schedule, likewise; ``None`` keeps the rate. ``ReduceLROnPlateau``
            follows its own ``monitor`` if it has one, and otherwise ``val/loss``.
        scheduler_interval: Whether the schedule steps after every epoch or every optimizer step.
        metrics: Name to a metric of the student's outputs and the labels, logged in validation and test. None for the accuracy.

    Raises:
        ValueError: If a layer is unknown, the networks share parameters, weights do not fit, or an argument is out of range.

    Example:
        >>> from lit_compress.losses import AttentionTransfer, CrossEntropy
        >>> from lit_compress.models import ResNetCIFAR
        >>> teacher, student = ResNetCIFAR(depth=14, width=8), ResNetCIFAR(depth=8, width=4)
        >>> taps = ["stage1", "stage2", "stage3"]
        >>> distiller = LitDistiller(teacher, student, losses=[CrossEntropy(), AttentionTransfer(taps)])
        >>> distiller.teacher.readings
        ('stage1', 'stage2', 'stage3')
        >>> sum(parameter.numel() for parameter in distiller.parameters()) == sum(p.numel() for p in student.parameters())
        True
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        losses: Sequence[Term] | None = None,
        teacher_weights: str | Path | None = None,
        student_weights: str | Path | None = None,
        copy_from_teacher: Mapping[str, str] | Sequence[str] = (),
        optimizer: OptimizerCallable = torch.optim.Adam,
        scheduler: LRSchedulerCallable | None = None,
        scheduler_interval: Interval = "epoch",
        metrics: Mapping[str, Metric] | None = None,
    ) -> None:
        super().__init__()
        check_interval(scheduler_interval)
        terms = [KnowledgeDistillation()] if losses is None else list(losses)
        if not terms:
            raise ValueError("Argument `losses` must hold at least one term.")
        if {id(parameter) for parameter in teacher.parameters()} & {id(parameter) for parameter in student.parameters()}:
            raise ValueError(
                "Teacher and student share parameters, and the teacher is frozen. Give `copy.deepcopy(student)` as the teacher, "
                "or build it anew."
            )
        if teacher_weights is not None:
            load_pruned(teacher, teacher_weights)
        if student_weights is not None:
            load_pruned(student, student_weights)
        copy_layers(student, teacher, pairs_of(copy_from_teacher, "copy_from_teacher"))
        self.student = student
        self.terms = nn.ModuleList(terms)
        self.teacher = teacher_for(teacher, terms)
        # By what is left out: named, they would lose the class that Lightning's command line adds.
        objects = ["teacher", "student", "losses", "optimizer", "scheduler", "metrics"]
        self.save_hyperparameters(ignore=[*objects, "teacher_weights", "student_weights", "copy_from_teacher"])
        kind = type(teacher)
        self.teacher_origin = {
            "class": f"{kind.__module__}.{kind.__qualname__}",
            "weights": None if teacher_weights is None else str(teacher_weights),
        }
        self._taps = Taps(student, student_taps(terms))
        self.optimizer, self.scheduler, self.scheduler_interval = optimizer, scheduler, scheduler_interval
        metrics = {"accuracy": Accuracy()} if metrics is None else metrics
        self.val_metrics = nn.ModuleDict({name: metric.clone() for name, metric in metrics.items()})
        self.test_metrics = nn.ModuleDict({name: metric.clone() for name, metric in metrics.items()})

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        """What the student gives."""
        outputs: Tensor = self.student(inputs)
        return outputs

    @override
    def on_fit_start(self) -> None:
        """Refuse ranks that would learn from different teachers."""
        with as_one():
            if len(set(share(self.teacher.fingerprint))) > 1:
                raise ValueError(
                    "The ranks hold teachers of different weights. Load them with `teacher_weights`, or call `seed_everything` "
                    "before the teacher is built."
                )

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs, labels, *cached = batch
        theirs: Readings = cached[0] if cached else self.teacher.read(inputs)  # first: it leaves no activations behind
        if missing := [name for name in self.teacher.readings if name not in theirs]:
            raise ValueError(f"The batch brings the teacher's readings, but {missing} are missing; it holds {sorted(theirs)}.")
        with self._taps.reading() as ours:
            self.student(inputs)
        parts = loss_parts(cast("Sequence[Term]", self.terms), ours, theirs, labels)
        return logged_sum(self, parts, batch_size=len(labels))

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "val", self.val_metrics)

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "test", self.test_metrics)

    @override
    def predict_step(self, batch: Batch | Tensor, batch_idx: int) -> Tensor:
        """Probability of each class, ``(N, K, *)``, for inputs with or without labels."""
        inputs = batch if isinstance(batch, Tensor) else batch[0]
        return self(inputs).softmax(dim=1)  # type: ignore[no-any-return]

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        return optimization(self.parameters(), self.optimizer, self.scheduler, self.scheduler_interval)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        note(checkpoint, teacher={**self.teacher_origin, "fingerprint": self.teacher.fingerprint})

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        noted_teacher = noted(checkpoint, "teacher")
        if noted_teacher is not None and noted_teacher["fingerprint"] != self.teacher.fingerprint:
            raise ValueError(
                f"The checkpoint was distilled from another teacher: {noted_teacher['class']} with weights from "
                f"{noted_teacher['weights']}, hash {noted_teacher['fingerprint'][:12]}, but this one has hash "
                f"{self.teacher.fingerprint[:12]}. Give the same teacher, or load the student alone: "
                "`load_pruned(student, checkpoint)`."
            )

    def _evaluate(self, batch: Batch, split: str, metrics: nn.ModuleDict) -> None:
        inputs, labels = batch[0], batch[1]
        outputs = self(inputs)
        count = len(labels)
        loss = F.cross_entropy(outputs, labels)
        self.log(f"{split}/loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=count, sync_dist=True)
        for name, metric in metrics.items():
            cast("Metric", metric).update(outputs, labels)
            # A metric adds up over ranks by itself.
            self.log(f"{split}/{name}", cast("Metric", metric), on_step=False, on_epoch=True, prog_bar=True, batch_size=count)


class Accuracy(Metric):
    """Share of the labels whose class has the largest output; those of -100 are left out.

    Shape:
        - ``update``: outputs ``(N, K, *)`` and labels ``(N, *)``.

    Example:
        >>> accuracy = Accuracy()
        >>> accuracy.update(torch.eye(3), torch.tensor([0, 2, -100]))
        >>> accuracy.compute()
        tensor(0.5000)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    right: Tensor
    counted: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("right", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("counted", torch.tensor(0), dist_reduce_fx="sum")

    @override
    def update(self, outputs: Tensor, labels: Tensor) -> None:
        """Add a batch."""
        self.right += (outputs.argmax(1) == labels).sum()  # no class is -100
        self.counted += (labels != -100).sum()

    @override
    def compute(self) -> Tensor:
        """The share of everything seen since the last reset."""
        return self.right / self.counted
