"""Which anchors are to find whom, and which of them a loss looks at."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_iou

POSITIVE, NEGATIVE, NEITHER = 1, 0, -1


class Assignment(NamedTuple):
    """What anchors are to find."""

    labels: Tensor
    """``(A,)`` int64: 1 for a person, 0 for none, -1 for anchors that are left out."""
    persons: Tensor
    """``(A,)`` int64: which box a positive anchor is to find; 0 for the others."""


def assign_anchors(
    anchors: Tensor, boxes: Tensor, ignore: Tensor, image_size: tuple[int, int], *, overlap: float = 0.5
) -> Assignment:
    """Give anchors the persons that they overlap.

    An anchor is positive if it lies in the image and overlaps a person by ``overlap``, or as much as any anchor in the image
    does; and negative if it overlaps nobody and no ignore region so much.

    Args:
        anchors: ``(A, 4)``: left, top, right, bottom.
        boxes: ``(m, 4)``, persons and ignore regions.
        ignore: ``(m,)`` bool: which of them are ignore regions.
        image_size: Height and width of the image in pixels.
        overlap: Least intersection over union, in (0, 1].

    Raises:
        ValueError: If shapes do not fit, or ``overlap`` is out of range.

    Source: Zhang et al., 2016, and its ``RPN_BF``.

    Example:
        >>> anchors = torch.tensor([[0.0, 0.0, 10.0, 20.0], [50.0, 0.0, 60.0, 20.0]])
        >>> assign_anchors(anchors, anchors[:1] + 2, torch.tensor([False]), (100, 100)).labels
        tensor([1, 0])
    """
    if not 0 < overlap <= 1:
        raise ValueError(f"Argument `overlap` must lie in (0, 1] but got {overlap}.")
    if anchors.shape[1:] != (4,) or boxes.shape[1:] != (4,) or ignore.shape != boxes.shape[:1]:
        raise ValueError(
            f"Expected anchors (A, 4), boxes (m, 4) and ignore (m,) but got {tuple(anchors.shape)}, {tuple(boxes.shape)} and "
            f"{tuple(ignore.shape)}."
        )
    labels = anchors.new_full((len(anchors),), NEGATIVE, dtype=torch.int64)
    persons = torch.zeros_like(labels)
    if not len(boxes):
        return Assignment(labels, persons)
    ignore = ignore.bool()
    shared = box_iou(anchors, boxes)
    labels[shared.amax(dim=1) >= overlap] = NEITHER
    if ignore.all():
        return Assignment(labels, persons)
    height, width = image_size
    within = (anchors[:, :2] >= 0).all(dim=1) & (anchors[:, 2] <= width) & (anchors[:, 3] <= height)
    with_persons = shared.masked_fill(~within[:, None] | ignore, 0.0)
    most, persons = with_persons.max(dim=1)
    best = with_persons.amax(dim=0)
    labels[(most >= overlap) | ((with_persons == best) & (best > 0)).any(dim=1)] = POSITIVE
    return Assignment(labels, torch.where(labels == POSITIVE, persons, 0))


def sample_anchors(
    labels: Tensor,
    *,
    positives: int = 20,
    negatives: int = 100,
    balanced: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Weights of anchors in a loss: some positives and some negatives, drawn at random, the others 0.

    A negative weighs 1, and so does a positive unless it is one of few.

    Args:
        labels: ``(A,)``, as :func:`assign_anchors` gives them.
        positives: How many positives at most.
        negatives: How many negatives at most.
        balanced: Whether positives weigh as much together as if there were ``positives`` of them, however few there are.
        generator: What draws, on the device of the labels; torch's global RNG if None.

    Returns:
        ``(A,)`` float32.

    Raises:
        ValueError: If a number is negative.

    Source: ``RPN_BF``: 120 anchors an image, a sixth of them positive.

    Example:
        >>> sample_anchors(torch.tensor([1, -1, 0, 0]), positives=3, negatives=2)
        tensor([3., 0., 1., 1.])
    """
    if positives < 0 or negatives < 0:
        raise ValueError(f"Arguments `positives` and `negatives` must be at least 0 but got {positives} and {negatives}.")
    weights = torch.zeros(len(labels), device=labels.device)
    for label, count in ((POSITIVE, positives), (NEGATIVE, negatives)):
        found = (labels == label).nonzero().flatten()
        drawn = found[torch.randperm(len(found), generator=generator, device=labels.device)[:count]]
        weights[drawn] = positives / max(len(drawn), 1) if balanced and label == POSITIVE else 1.0
    return weights
