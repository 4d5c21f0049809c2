"""Knowledge distillation: the student learns the teacher's softened classes along with the labels."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

from torch import Tensor
from torch.nn import functional as F

Form: TypeAlias = Literal["thesis", "zagoruyko", "released", "paper"]
_ALPHA: dict[Form, float] = {"thesis": 0.9, "zagoruyko": 0.9, "released": 0.9, "paper": 0.5}


def knowledge_distillation(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    *,
    temperature: float | None = None,
    alpha: float | None = None,
    form: Form = "thesis",
) -> Tensor:
    r"""Cross-entropy with the labels and with the teacher's softened classes, in nats, in one of four published forms.

    With :math:`CE(y, s)` the cross-entropy of the student with the labels, :math:`p = \sigma(t / T)`, :math:`q = \sigma(s / T)`
    and *K* classes:

    ================= ====================================================== ===========
    ``form``          loss                                                   T, α
    ================= ====================================================== ===========
    ``"thesis"``      :math:`(1 - α) CE(y, s) + 2 α T^2 CE(p, q)`            4, 0.9
    ``"zagoruyko"``   :math:`(1 - α) CE(y, s) + α T^2 KL(p, q)`              4, 0.9
    ``"released"``    :math:`(1 - α) CE(y, s) + 2 α T^2 KL(p, q) / K`        4, 0.9
    ``"paper"``       :math:`CE(p, q) + α CE(y, s)`                          2, 0.5
    ================= ====================================================== ===========

    The first and third are the thesis' equation and the code that was run for it, a mean over batch *and* classes: with ten
    classes its soft part is ten times smaller. In the last, α is the weight λ of the labels, and no :math:`T^2` makes up for
    the smaller gradients of softer classes. Cross-entropy and divergence differ by the teacher's entropy, which no gradient sees.

    Args:
        student: Logits ``(N, K)``, or ``(N, K, *)`` with one prediction a position.
        teacher: Logits of the same shape.
        labels: Classes ``(N,)`` or ``(N, *)`` int64. A position labelled -100 counts in the soft part alone. May be None where
            alpha leaves them no weight.
        temperature: T. Above 1 it brings out the classes that the teacher nearly chose. None for the form's own.
        alpha: Share of the soft part, in [0, 1]; in the form ``"paper"`` the weight of the labels, 0 or more. None for the form's
            own.
        form: Which of the above.

    Returns:
        Scalar, the mean over N and positions.

    Raises:
        ValueError: If the logits differ in shape, an argument is out of its range, or labels are missing.

    Source: equation 4.1 of the thesis on efficient learning under a budget, and the code released with it; Zagoruyko and
    Komodakis, *Paying More Attention to Attention*, 2017; *In Teacher We Trust*, equations 2 to 4; all after Hinton et al.,
    *Distilling the Knowledge in a Neural Network*, 2015.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0]])
        >>> knowledge_distillation(logits, logits, torch.tensor([0]), alpha=1.0, form="zagoruyko")
        tensor(0.)
    """
    if form not in get_args(Form):
        raise ValueError(f"Argument `form` must be one of {', '.join(map(repr, get_args(Form)))} but got {form!r}.")
    if student.shape != teacher.shape:
        raise ValueError(f"Expected logits of one shape but got {tuple(student.shape)} and {tuple(teacher.shape)}.")
    if temperature is None:
        temperature = 2.0 if form == "paper" else 4.0
    if alpha is None:
        alpha = _ALPHA[form]
    if temperature <= 0:
        raise ValueError(f"Argument `temperature` must be positive but got {temperature}.")
    if alpha < 0 or (alpha > 1 and form != "paper"):
        raise ValueError(f"Argument `alpha` must {'be 0 or more' if form == 'paper' else 'lie in [0, 1]'} but got {alpha}.")

    if form == "paper":
        soft = _soft_cross_entropy(student, teacher, temperature)
    elif form == "thesis":
        soft = alpha * temperature**2 * 2 * _soft_cross_entropy(student, teacher, temperature)
    elif form == "zagoruyko":
        soft = alpha * temperature**2 * _soft_divergence(student, teacher, temperature)
    else:
        soft = alpha * temperature**2 * 2 * _soft_divergence(student, teacher, temperature) / student.shape[1]
    weight = hard_weight(alpha, form)
    if not weight:
        return soft
    if labels is None:
        raise ValueError(f"With `alpha={alpha}`, the form {form!r} needs labels but got None.")
    return weight * F.cross_entropy(student, labels) + soft


def score_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Divergence of the student's yes-or-no scores from the teacher's, in nats: each value is a question of its own.

    .. math:: \frac{1}{n} \sum_i D_{KL}\big(B(\sigma(t_i)) \,\|\, B(\sigma(s_i))\big), \qquad
        \frac{\partial}{\partial s_i} = \frac{\sigma(s_i) - \sigma(t_i)}{n}

    For the scores of a detector, nearly all of which say no. Where both are sure of it nothing is asked for, while a squared
    difference asks for the teacher's logit of -8 exactly, and does so at a thousand anchors for each one with a person.

    Args:
        student: Logits ``(N, *)``.
        teacher: Logits of the same shape.

    Returns:
        Scalar, the mean over all values.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> import torch
        >>> score_divergence(torch.tensor([[-8.0, 0.0]]), torch.tensor([[-12.0, 0.0]])) < 1e-3
        tensor(True)
    """
    if student.shape != teacher.shape:
        raise ValueError(f"Expected logits of one shape but got {tuple(student.shape)} and {tuple(teacher.shape)}.")
    soft = teacher.sigmoid()
    return F.binary_cross_entropy_with_logits(student, soft) - F.binary_cross_entropy_with_logits(teacher, soft)


def hard_weight(alpha: float | None, form: Form) -> float:
    """Factor of the cross-entropy with the labels."""
    if alpha is None:
        alpha = _ALPHA[form]
    return alpha if form == "paper" else 1 - alpha


def _soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    return F.cross_entropy(student / temperature, (teacher / temperature).softmax(1))


def _soft_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    # `F.kl_div` takes the student first.
    soft_student, soft_teacher = (student / temperature).log_softmax(1), (teacher / temperature).log_softmax(1)
    return F.kl_div(soft_student, soft_teacher, reduction="none", log_target=True).sum(1).mean()
