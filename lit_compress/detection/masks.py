"""Where on a feature map somebody is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def box_masks(boxes: Sequence[Tensor], size: tuple[int, int], stride: tuple[float, float]) -> Tensor:
    """Positions of a feature map that any box of their image reaches.

    A box is divided by the stride and its edges are rounded outwards, so that the smallest one counts at the coarsest level.

    Args:
        boxes: Of each of N images ``(m, 4)``: left, top, right, bottom in pixels of the network's input; ``m`` may be 0.
        size: Height and width of the map.
        stride: Pixels from one position to the next, down and across.

    Returns:
        ``(N, 1, H, W)`` bool.

    Raises:
        ValueError: If boxes have another shape, or a stride is not positive.

    Source: *Region of Interest Autoencoders* (T1), section 3.3.2.

    Example:
        >>> box_masks([torch.tensor([[5.0, 0.0, 9.0, 4.0]])], size=(2, 4), stride=(4, 4)).long()
        tensor([[[[0, 1, 1, 0],
                  [0, 0, 0, 0]]]])
    """
    if min(stride) <= 0:
        raise ValueError(f"Argument `stride` must be positive but got {stride}.")
    for one in boxes:
        if one.ndim != 2 or one.shape[1] != 4:
            raise ValueError(f"Expected boxes (m, 4) but got shape {tuple(one.shape)}.")
    masks = []
    for one in boxes:
        left, top, right, bottom = one.unbind(1)
        rows = _reached(top / stride[0], bottom / stride[0], size[0])
        columns = _reached(left / stride[1], right / stride[1], size[1])
        masks.append((rows[:, :, None] & columns[:, None, :]).any(0, keepdim=True))
    return torch.stack(masks) if masks else torch.zeros((0, 1, *size), dtype=torch.bool)


def _reached(first: Tensor, last: Tensor, length: int) -> Tensor:
    """For each of m intervals, which of the positions it reaches, ``(m, length)``."""
    positions = torch.arange(length, device=first.device)
    return (positions >= first.floor()[:, None]) & (positions < last.ceil()[:, None])
