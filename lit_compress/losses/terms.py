"""Summands of a distillation loss: each says which layers it reads of student and teacher, by name, and what it makes of them."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lit_compress.losses.attention import attention_transfer
from lit_compress.losses.confidence import hint, mahalanobis
from lit_compress.losses.knowledge import Form, hard_weight, knowledge_distillation, score_divergence
from lit_compress.taps import OUTPUT, pairs_of
from lit_compress.teacher import Teacher, covariance_of, mean_of

Channels: TypeAlias = Literal["first", "last"]
Readings: TypeAlias = Mapping[str, Tensor]
"""Name of a layer to what it gave for a batch; ``""`` is the network's output."""


class Term(nn.Module, ABC):
    """One summand of a loss between student and teacher. For one of your own, override :meth:`forward`.

    A term may hold parameters, such as a layer that brings the student's width to the teacher's; they are trained along.

    Args:
        student_taps: Layers that are read of the student, as in ``student.named_modules()``; ``""`` is its output.
        teacher_taps: Layers that are read of the teacher.
        sampled_taps: Layers of the teacher of which mean and covariance under dropout are read; see
            :class:`~lit_compress.teacher.Teacher`.
        passes: With dropout active, for those.
        weight: Factor of the term.
        name: Under which it is logged; by default its class in snake case.

    Attributes:
        reads_labels: Whether the term cannot do without labels, which a loss that is added to somebody else's does not know.

    Raises:
        ValueError: If the weight is negative.

    Example:
        >>> import torch
        >>> class Overlap(Term):  # of the features before the classifier, whatever their scale
        ...     def forward(self, student, teacher, labels):
        ...         return 1 - F.cosine_similarity(student["flatten"], teacher["flatten"]).mean()
        >>> term = Overlap(student_taps=["flatten"], teacher_taps=["flatten"], weight=0.1)
        >>> term.parts({"flatten": torch.eye(2)}, {"flatten": torch.eye(2)}, torch.tensor([0, 1]))
        {'overlap': tensor(0.)}
    """

    reads_labels = False

    def __init__(
        self,
        student_taps: Sequence[str] = (OUTPUT,),
        teacher_taps: Sequence[str] = (OUTPUT,),
        *,
        sampled_taps: Sequence[str] = (),
        passes: int = 200,
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__()
        if weight < 0:
            raise ValueError(f"Argument `weight` must be 0 or more but got {weight}.")
        self.student_taps, self.teacher_taps = tuple(student_taps), tuple(teacher_taps)
        self.sampled_taps, self.passes = tuple(sampled_taps), passes
        self.weight = weight
        self.name = name or re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(self).__name__).lower()

    @abstractmethod
    @override
    def forward(self, student: Readings, teacher: Readings, labels: Any) -> Tensor | dict[str, Tensor]:
        """The loss, a scalar before its weight, or a scalar for each of several parts that are added up.

        Args:
            student: What was read of the student.
            teacher: What was read of the teacher, without gradient.
            labels: Of the batch, as the data give them; None from ``distill_from_unpruned``.
        """

    def parts(self, student: Readings, teacher: Readings, labels: Tensor | None) -> dict[str, Tensor]:
        """What the term adds to the loss, weighted, by the names under which it is logged."""
        value = self(student, teacher, labels)
        if isinstance(value, Tensor):
            return {self.name: self.weight * value}
        return {f"{self.name}/{part}": self.weight * one for part, one in value.items()}


class CrossEntropy(Term):
    """Cross-entropy of the student with the labels, in nats; labels of -100 count for nothing.

    Args:
        weight: Factor of the term.
        label_smoothing: Share of the target, in [0, 1], that is spread evenly over all classes.
        name: Under which it is logged.

    Raises:
        ValueError: If a number is out of range.
    """

    reads_labels = True

    def __init__(self, weight: float = 1.0, label_smoothing: float = 0.0, name: str | None = None) -> None:
        super().__init__(teacher_taps=(), weight=weight, name=name)
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"Argument `label_smoothing` must lie in [0, 1] but got {label_smoothing}.")
        self.label_smoothing = label_smoothing

    @override
    def forward(self, student: Readings, teacher: Readings, labels: Tensor) -> Tensor:
        return F.cross_entropy(student[OUTPUT], labels, label_smoothing=self.label_smoothing)


class KnowledgeDistillation(Term):
    """Labels and the teacher's softened classes; see :func:`~lit_compress.losses.knowledge_distillation`.

    Args:
        temperature: Softens the classes. None for the form's own.
        alpha: Share of the soft part, or in the form ``"paper"`` the weight of the labels. None for the form's own.
        form: ``"thesis"``, ``"zagoruyko"``, ``"released"`` or ``"paper"``.
        weight: Factor of the term.
        name: Under which it is logged.
    """

    def __init__(
        self,
        temperature: float | None = None,
        alpha: float | None = None,
        form: Form = "thesis",
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight=weight, name=name)
        self.temperature, self.alpha, self.form = temperature, alpha, form
        self.reads_labels = hard_weight(alpha, form) != 0

    @override
    def forward(self, student: Readings, teacher: Readings, labels: Tensor | None) -> Tensor:
        return knowledge_distillation(
            student[OUTPUT], teacher[OUTPUT], labels, temperature=self.temperature, alpha=self.alpha, form=self.form
        )


class AttentionTransfer(Term):
    """Attention maps of pairs of layers; see :func:`~lit_compress.losses.attention_transfer`. Each pair is logged by itself.

    It knows no labels: add :class:`CrossEntropy`, as the document does.

    Args:
        taps: Layers that give feature maps: the student's to the teacher's, or a list where both have the same names.
        beta: Weight of three pairs. Each pair is weighed by ``beta · 3 / pairs``, which makes the documents' 750 of four taps and
            600 of five out of 1000: do not scale it once more.
        name: Under which it is logged, followed by the student's layer.
        student_channels: ``"last"`` if the student's layers give ``(N, *spatial, C)``, as those of torchvision's Swin do.
        teacher_channels: Likewise of the teacher.

    Raises:
        ValueError: If no layer is named, or channels are neither first nor last.

    Source: section 4.4 of the thesis on efficient learning under a budget.

    Example:
        >>> AttentionTransfer(taps={"stage1": "layer1", "stage2": "layer3"}).weight
        1500.0
    """

    def __init__(
        self,
        taps: Mapping[str, str] | Sequence[str],
        beta: float = 1000.0,
        name: str | None = None,
        student_channels: Channels = "first",
        teacher_channels: Channels = "first",
    ) -> None:
        pairs = pairs_of(taps, "taps")
        if not pairs:
            raise ValueError("Argument `taps` must name at least one layer.")
        for argument, place in [("student_channels", student_channels), ("teacher_channels", teacher_channels)]:
            if place not in get_args(Channels):
                raise ValueError(f"Argument `{argument}` must be 'first' or 'last' but got {place!r}.")
        super().__init__(tuple(pairs), tuple(pairs.values()), weight=beta * 3 / len(pairs), name=name)
        self.taps = pairs
        self.student_channels, self.teacher_channels = student_channels, teacher_channels

    @override
    def forward(self, student: Readings, teacher: Readings, labels: Any) -> dict[str, Tensor]:
        return {
            ours: attention_transfer(
                _channels_first(student[ours], self.student_channels), _channels_first(teacher[theirs], self.teacher_channels)
            )
            for ours, theirs in self.taps.items()
        }


class Hint(Term):
    """Mean squared difference of a hint layer; see :func:`~lit_compress.losses.hint`.

    It knows no labels: add ``CrossEntropy(weight=0.5)``, as the paper does.

    Args:
        tap: The student's hint layer: the fully connected one, which is read before any ReLU that follows it, in place or not.
        teacher_tap: The teacher's; None for the same name.
        weight: Factor of the term.
        name: Under which it is logged.

    Source: *In Teacher We Trust: Learning Compressed Models for Pedestrian Detection*, section 4.1.
    """

    def __init__(self, tap: str, teacher_tap: str | None = None, weight: float = 1.0, name: str | None = None) -> None:
        super().__init__((tap,), (tap if teacher_tap is None else teacher_tap,), weight=weight, name=name)

    @override
    def forward(self, student: Readings, teacher: Readings, labels: Tensor) -> Tensor:
        (ours,), (theirs,) = self.student_taps, self.teacher_taps
        return hint(student[ours], teacher[theirs])


class ScoreDivergence(Term):
    """Divergence of yes-or-no scores, as a detector's; see :func:`~lit_compress.losses.score_divergence`.

    Args:
        tap: The student's layer of logits.
        teacher_tap: The teacher's; None for the same name.
        weight: Factor of the term. It is a mean over all scores; a detector's own loss looks at some of them, a hundred or so.
        name: Under which it is logged.
    """

    def __init__(self, tap: str, teacher_tap: str | None = None, weight: float = 1.0, name: str | None = None) -> None:
        super().__init__((tap,), (tap if teacher_tap is None else teacher_tap,), weight=weight, name=name)

    @override
    def forward(self, student: Readings, teacher: Readings, labels: Any) -> Tensor:
        (ours,), (theirs,) = self.student_taps, self.teacher_taps
        return score_divergence(student[ours], teacher[theirs])


class TeacherConfidence(Term):
    """Distance of a layer from what the teacher says of it under dropout; see :func:`~lit_compress.losses.teacher_confidence`.

    It knows no labels: add ``CrossEntropy(weight=0.5)``, as the paper does. The teacher must hold a dropout layer in front of the
    one that is read.

    Args:
        tap: The student's layer, of vectors ``(N, D)``: a hint layer, or ``""`` for the logits.
        teacher_tap: The teacher's; None for the same name.
        passes: Of the teacher with dropout active, for each input; more than D.
        ridge: Share of a covariance's mean variance that is added to its diagonal. Lower trusts the teacher more in directions in
            which dropout hardly moves it, and lets them dominate the gradient.
        weight: Factor of the term.
        name: Under which it is logged.

    Raises:
        ValueError: If a number is not positive.

    Source: *In Teacher We Trust: Learning Compressed Models for Pedestrian Detection*, section 4.2.
    """

    def __init__(
        self,
        tap: str,
        teacher_tap: str | None = None,
        passes: int = 200,
        ridge: float = 1e-3,
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        for argument, number in [("passes", passes), ("ridge", ridge)]:
            if number <= 0:
                raise ValueError(f"Argument `{argument}` must be positive but got {number}.")
        theirs = tap if teacher_tap is None else teacher_tap
        super().__init__((tap,), (), sampled_taps=(theirs,), passes=passes, weight=weight, name=name)
        self.ridge = ridge

    @override
    def forward(self, student: Readings, teacher: Readings, labels: Tensor) -> Tensor:
        (ours,), (theirs,) = self.student_taps, self.sampled_taps
        return mahalanobis(student[ours], teacher[mean_of(theirs)], teacher[covariance_of(theirs)], ridge=self.ridge)


def _channels_first(maps: Tensor, channels: Channels) -> Tensor:
    return maps if channels == "first" else maps.movedim(-1, 1)


def student_taps(terms: Sequence[Term]) -> tuple[str, ...]:
    """Layers that the terms read of the student, each once."""
    return tuple(dict.fromkeys(tap for term in terms for tap in term.student_taps))


def teacher_for(network: nn.Module, terms: Sequence[Term]) -> Teacher:
    """A network, frozen, and read for all that the terms want of it.

    Args:
        network: The teacher's network; frozen and put into evaluation mode in place.
        terms: Of the loss.

    Raises:
        ValueError: If a layer is unknown, or terms want samples of different numbers of passes.
    """
    passes = {term.passes for term in terms if term.sampled_taps}
    if len(passes) > 1:
        raise ValueError(f"All terms of the teacher's confidence share their passes, but they ask for {sorted(passes)}.")
    return Teacher(
        network,
        [tap for term in terms for tap in term.teacher_taps],
        sampled=[tap for term in terms for tap in term.sampled_taps],
        passes=passes.pop() if passes else 200,
    )


def loss_parts(terms: Sequence[Term], student: Readings, teacher: Readings, labels: Tensor | None) -> dict[str, Tensor]:
    """What each term adds to the loss, weighted, by name; the loss is their sum.

    Raises:
        ValueError: If two parts have the same name.
    """
    parts: dict[str, Tensor] = {}
    for term in terms:
        for name, value in term.parts(student, teacher, labels).items():
            if name in parts:
                raise ValueError(f"Two terms of the loss are called {name!r}: give one of them another `name`.")
            parts[name] = value
    return parts
