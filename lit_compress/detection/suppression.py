"""Of detections that say the same, the best one."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torchvision.ops import nms


def suppress(boxes: Tensor, scores: Tensor, overlap: float, over: Literal["union", "smaller"] = "union") -> Tensor:
    """Detections left once each has taken away those of lower score that it overlaps by more than ``overlap``.

    Args:
        boxes: ``(N, 4)``: left, top, right, bottom.
        scores: ``(N,)``.
        overlap: Intersection over what, in [0, 1].
        over: Over the ``"union"`` of both, or over the ``"smaller"`` of them, as ACF's detectors have it (at 0.65).

    Returns:
        Indices of those left, from the highest score to the lowest.

    Raises:
        ValueError: If an argument is out of range, or shapes do not fit.

    Source: ``bbNms`` of Piotr Dollár's toolbox, its greedy kind; torchvision's ``nms`` for the union.

    Example:
        >>> boxes = torch.tensor([[0.0, 0.0, 10.0, 20.0], [3.0, 3.0, 7.0, 12.0]])
        >>> suppress(boxes, torch.tensor([0.5, 0.9]), 0.65), suppress(boxes, torch.tensor([0.5, 0.9]), 0.65, over="smaller")
        (tensor([1, 0]), tensor([1]))
    """
    if not 0 <= overlap <= 1:
        raise ValueError(f"Argument `overlap` must lie in [0, 1] but got {overlap}.")
    if over not in ("union", "smaller"):
        raise ValueError(f'Argument `over` must be "union" or "smaller" but got {over!r}.')
    if boxes.shape[1:] != (4,) or scores.shape != boxes.shape[:1]:
        raise ValueError(f"Expected boxes (N, 4) and scores (N,) but got {tuple(boxes.shape)} and {tuple(scores.shape)}.")
    if over == "union":
        kept: Tensor = nms(boxes, scores, overlap)
        return kept
    order = scores.argsort(descending=True, stable=True)
    ordered = boxes[order]
    area = (ordered[:, 2:] - ordered[:, :2]).prod(dim=1)
    left = torch.ones(len(order), dtype=torch.bool, device=boxes.device)
    for index in range(len(order) - 1):
        if left[index]:
            lower = slice(index + 1, None)
            near = torch.maximum(ordered[index, :2], ordered[lower, :2])
            far = torch.minimum(ordered[index, 2:], ordered[lower, 2:])
            shared = (far - near).clamp(min=0).prod(dim=1)
            left[lower] &= shared <= overlap * torch.minimum(area[index], area[lower])
    return order[left]


def best_detections(
    boxes: Tensor,
    scores: Tensor,
    *,
    min_width: float = 16.0,
    min_height: float = 50.0,
    before: int = 10_000,
    overlap: float = 0.5,
    after: int = 40,
) -> Tensor:
    """What is left of a network's many boxes: large enough, best, and one of those that say the same.

    Args:
        boxes: ``(N, 4)``: left, top, right, bottom in pixels of the original image.
        scores: ``(N,)``.
        min_width: Least width in pixels.
        min_height: Least height in pixels.
        before: How many of the highest score go on to be compared.
        overlap: Intersection over union above which the lower of two goes.
        after: How many are left at most.

    Returns:
        Indices, from the highest score to the lowest.

    Raises:
        ValueError: If shapes do not fit, or ``overlap`` is out of range.

    Source: Zhang et al., 2016, and its ``RPN_BF``.

    Example:
        >>> boxes = torch.tensor([[0.0, 0.0, 20.0, 50.0], [1.0, 1.0, 21.0, 51.0], [60.0, 0.0, 70.0, 60.0]])
        >>> best_detections(boxes, torch.tensor([0.5, 0.9, 0.8]))  # the first says the same as the second, the last is narrow
        tensor([1])
    """
    size = boxes[:, 2:] - boxes[:, :2]
    enough = ((size[:, 0] >= min_width) & (size[:, 1] >= min_height)).nonzero().flatten()
    best = enough[scores[enough].argsort(descending=True, stable=True)[:before]]
    return best[suppress(boxes[best], scores[best], overlap)[:after]]
