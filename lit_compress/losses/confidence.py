"""Matching the teacher's hint layer: as it stands, or as far as the teacher is sure of it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_compress.statistics.covariance import with_float64
from lit_compress.teacher import moments


def hint(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of two hint layers, in squared units of theirs.

    Read both before the ReLU: it hides how far below zero a value lies, and stops the gradient where the student's is negative.

    Args:
        student: Values ``(N, *)``.
        teacher: Values of the same shape.

    Returns:
        Scalar, the mean over all values.

    Raises:
        ValueError: If the shapes differ.

    Source: *In Teacher We Trust: Learning Compressed Models for Pedestrian Detection*, section 4.1.

    Example:
        >>> hint(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0]]))
        tensor(2.)
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"Expected hint layers of one shape but got {tuple(student.shape)} and {tuple(teacher.shape)}. Give both networks a "
            "layer of the same width, in front of the classifier, to match."
        )
    return F.mse_loss(student, teacher)


def teacher_confidence(student: Tensor, teacher_samples: Tensor, *, ridge: float = 1e-8) -> Tensor:
    r"""Squared Mahalanobis distance of the student from what the teacher says with dropout active, without a unit.

    .. math:: (y_s - \bar y_t)^\top \hat\Sigma^{-1} (y_s - \bar y_t)

    :math:`\bar y_t` and :math:`\hat\Sigma` (with N - 1 in its denominator) are taken over the teacher's passes, for each input.
    The student is pulled less in directions in which the teacher wavers.

    Args:
        student: Values ``(N, D)``.
        teacher_samples: Values ``(passes, N, D)``, or ``(passes, D)`` for all inputs alike.
        ridge: Added to the diagonal of each covariance, as a share of its mean variance.

    Returns:
        Scalar, the mean over N. Computed in float64 whatever the type of the values.

    Raises:
        ValueError: If there are not more passes than dimensions, or the shapes do not fit.

    Source: *In Teacher We Trust: Learning Compressed Models for Pedestrian Detection*, equation 6.

    Example:
        >>> samples = torch.tensor([[[1.0]], [[3.0]], [[2.0]]])  # mean 2, variance 1
        >>> teacher_confidence(torch.tensor([[4.0]]), samples)
        tensor(4.)
    """
    mean, covariance = moments(teacher_samples)
    return mahalanobis(student, mean, covariance, ridge=ridge)


def mahalanobis(student: Tensor, mean: Tensor, covariance: Tensor, *, ridge: float = 1e-8) -> Tensor:
    """Squared Mahalanobis distance from a Gaussian for each input, averaged over the inputs.

    Args:
        student: Values ``(N, D)``.
        mean: ``(N, D)`` or ``(D,)``.
        covariance: ``(N, D, D)`` or ``(D, D)``; it may be singular.
        ridge: Added to the diagonal of each covariance, as a share of its mean variance. In a direction that never varied, the
            distance is measured in that share of the others' variance.

    Returns:
        Scalar of the student's type.

    Raises:
        ValueError: If the shapes do not fit or the ridge is not positive.
    """
    dimension = student.shape[-1]
    if student.ndim != 2 or mean.shape not in (student.shape, (dimension,)) or covariance.shape != (*mean.shape, dimension):
        raise ValueError(
            f"Expected a student (N, D) and a teacher's mean and covariance of as many inputs and dimensions, but got "
            f"{tuple(student.shape)}, {tuple(mean.shape)} and {tuple(covariance.shape)}."
        )
    if ridge <= 0:
        raise ValueError(f"Argument `ridge` must be positive but got {ridge}.")
    device = with_float64(student.device)
    mean, covariance = mean.to(device, torch.float64), covariance.to(device, torch.float64)
    # Variances below float32's resolution are noise; without the floor, a teacher that never varied would give infinity.
    floor = torch.finfo(torch.float32).eps ** 2
    scale = covariance.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=floor)
    identity = torch.eye(dimension, dtype=torch.float64, device=device)
    factor = torch.linalg.cholesky(covariance + ridge * scale[..., None, None] * identity)
    difference = (student.to(device, torch.float64) - mean).unsqueeze(-1)
    whitened = torch.linalg.solve_triangular(factor, difference, upper=False)
    distance: Tensor = whitened.square().sum((-2, -1)).mean()
    return distance.to(student)
