"""Attention transfer: where the student's activations are strong is where the teacher's are."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Squared distance of two attention maps, without a unit.

    .. math:: \frac{1}{N P} \sum_{n, p} \big(F_t - F_s\big)_{np}^2, \qquad F = f(A) / \|f(A)\|_2, \qquad
        f(A) = \frac{1}{C} \sum_c A_c^2

    The norm is taken over the P positions of each sample. This is the released code's form; the document prints the distance
    without its square and without the mean over positions.

    Args:
        student: Feature maps ``(N, C, *spatial)`` with one to three spatial dimensions.
        teacher: Feature maps ``(N, C', *spatial')`` of as many dimensions. Where the maps differ in size, the larger one is
            averaged down, dimension by dimension.

    Returns:
        Scalar, the mean over samples and positions. The documents weigh it by 1000 · 3 / number of taps.

    Raises:
        ValueError: If the features are no maps of one batch, or one map is more than four times as oblong as the other: it then
            has its channels last.

    Source: Zagoruyko and Komodakis, *Paying More Attention to Attention*, 2017; equation 4.2 of the thesis on efficient learning
    under a budget, and the code released with it.

    Example:
        >>> import torch
        >>> maps = torch.rand(2, 8, 4, 4)
        >>> attention_transfer(3 * maps, maps.repeat(1, 2, 1, 1)).item() < 1e-12
        True
    """
    if student.ndim != teacher.ndim or not 3 <= student.ndim <= 5 or len(student) != len(teacher):
        raise ValueError(
            f"Expected feature maps (N, C, *spatial) of one batch but got shapes {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}. Tap layers that give maps, before they are pooled or flattened."
        )
    if _oblong(student) > 4 * _oblong(teacher) or _oblong(teacher) > 4 * _oblong(student):
        raise ValueError(
            f"Expected maps of one image but got {tuple(student.shape[2:])} and {tuple(teacher.shape[2:])} positions. "
            "Layers of some networks, as of Swin and ConvNeXt, give their channels last: move them to dimension 1, in "
            '`AttentionTransfer` by `student_channels="last"` or `teacher_channels="last"`.'
        )
    student, teacher = student.square().mean(1, keepdim=True), teacher.square().mean(1, keepdim=True)
    if student.shape != teacher.shape:
        size = [min(pair) for pair in zip(student.shape[2:], teacher.shape[2:], strict=True)]
        student, teacher = (F.interpolate(maps, size, mode="area") for maps in (student, teacher))
    return F.mse_loss(F.normalize(student.flatten(1)), F.normalize(teacher.flatten(1)))


def _oblong(maps: Tensor) -> float:
    return max(maps.shape[2:]) / max(min(maps.shape[2:]), 1)
