"""What a detector is trained for: the persons that it is to find, and the loss of what it says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_compress.detection.assignment import POSITIVE
from lit_compress.pedestrians.protocol import PERSON
from lit_compress.pedestrians.subsets import ASPECT_RATIO

Target = Mapping[str, Any]


def persons_to_learn(target: Target, min_height: float, min_visible: float) -> tuple[Tensor, Tensor]:
    """Boxes, those of persons in the aspect ratio of pedestrians, and which of them are ignore regions.

    Args:
        target: ``boxes`` ``(m, 4)``, and any of ``labels``, ``visible`` and ``ignore``, as
            :class:`~lit_compress.metrics.LogAverageMissRate` takes them.
        min_height: Least height of a person in pixels.
        min_visible: Least share of a person that is visible; who has no visible box is not occluded.

    Returns:
        ``(m, 4)`` and ``(m,)`` bool.

    Source: ``RPN_BF``, which takes persons of 50 pixels and more who are not occluded.

    Example:
        >>> persons_to_learn({"boxes": torch.tensor([[0.0, 0.0, 61.0, 100.0], [0.0, 0.0, 9.0, 20.0]])}, 50.0, 1.0)
        (tensor([[ 10.,   0.,  51., 100.],
                [  0.,   0.,   9.,  20.]]), tensor([False,  True]))
    """
    boxes = target["boxes"]
    ignore = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    if "ignore" in target:
        ignore |= target["ignore"]
    if "labels" in target:
        ignore |= target["labels"] != PERSON
    size = boxes[:, 2:] - boxes[:, :2]
    ignore |= size[:, 1] < min_height
    if "visible" in target:
        visible = target["visible"]
        share = (visible[:, 2:] - visible[:, :2]).prod(dim=1) / size.prod(dim=1).clamp(min=1e-9)
        ignore |= visible.any(dim=1) & (share < min_visible)
    middle, half = boxes[:, [0, 2]].mean(dim=1, keepdim=True), ASPECT_RATIO / 2 * size[:, 1:]
    pedestrian = torch.cat([middle - half, boxes[:, 1:2], middle + half, boxes[:, 3:]], dim=1)
    return torch.where(ignore[:, None], boxes, pedestrian), ignore


def detection_losses(logits: Tensor, relative: Tensor, labels: Tensor, wanted: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    r"""Loss of what boxes hold, and of where they are.

    .. math:: \frac{1}{W} \sum_i w_i \, CE(p_i, y_i), \qquad
        \frac{1}{W} \sum_{i: y_i = 1} w_i \sum_{j=1}^4 h(b_{ij} - b^*_{ij}), \qquad
        h(x) = \begin{cases} x^2 / 2 & |x| < 1 \\ |x| - 1/2 & \text{else} \end{cases}

    Args:
        logits: ``(K,)``, of holding a person.
        relative: ``(K, 4)``.
        labels: ``(K,)``: 1 for a person, 0 for none.
        wanted: ``(K, 4)``, of persons.
        weights: ``(K,)``, W together.

    Returns:
        Two scalars; 0 if K is.

    Source: Ren et al., *Faster R-CNN*, 2015, equation 1, with both sums over the same W. A logit stands for the difference of
    the two that its softmax takes.

    Example:
        >>> detection_losses(torch.zeros(2), torch.zeros(2, 4), torch.tensor([1, 0]), torch.ones(2, 4), torch.ones(2))
        (tensor(0.6931), tensor(1.))
    """
    total = weights.sum().clamp(min=1e-9)
    positive = labels == POSITIVE
    entropy = F.binary_cross_entropy_with_logits(logits, positive.to(logits.dtype), reduction="none")
    distance = F.smooth_l1_loss(relative[positive], wanted[positive], reduction="none").sum(dim=1)
    return (weights * entropy).sum() / total, (weights[positive] * distance).sum() / total
