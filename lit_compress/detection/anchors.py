"""Anchors of the shape of pedestrians, and boxes relative to them."""

from __future__ import annotations

import torch
from torch import Tensor

SCALES = tuple(2.6 * 1.3**step for step in range(9))
"""Of the nine anchors: with a height of 24, they are 62 to 509 pixels high, for images of 720 rows."""


def pedestrian_anchors(
    shape: tuple[int, int],
    *,
    stride: int = 16,
    width: float = 10.0,
    height: float = 24.0,
    scales: tuple[float, ...] = SCALES,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Boxes of one shape and nine heights about the middle of every cell of a feature map.

    Args:
        shape: Height and width of the feature map.
        stride: Pixels of the image between two cells.
        width: Of the anchor of scale 1 in pixels.
        height: Likewise. The 10 x 24 of the original are 16 x 16 reshaped to an aspect of 0.41, and rounded.
        scales: One anchor a scale.
        dtype: Of the result.
        device: Of the result.

    Returns:
        ``(H · W · 9, 4)``: left, top, right, bottom in pixels, row by row, and in a cell from the smallest on. The image begins
        at 0; anchors reach beyond it.

    Raises:
        ValueError: If a size is not positive, or there is no scale.

    Source: Zhang et al., *Is Faster R-CNN Doing Well for Pedestrian Detection?*, 2016, section 3.1, and its ``RPN_BF``.

    Example:
        >>> pedestrian_anchors((30, 40)).shape
        torch.Size([10800, 4])
    """
    if min(*shape, stride, width, height, *scales, 1) <= 0 or not scales:
        raise ValueError(
            f"Anchors need sizes above 0 and at least one scale but got {shape}, stride {stride}, {width} x {height}, {scales}."
        )
    sizes = torch.tensor([(width * scale, height * scale) for scale in scales], dtype=torch.float64)
    cell = torch.cat([stride / 2 - sizes / 2, stride / 2 + sizes / 2], dim=1)
    down, across = (stride * torch.arange(cells, dtype=torch.float64) for cells in shape)
    corner = torch.stack(torch.meshgrid(down, across, indexing="ij")[::-1], dim=-1).repeat(1, 1, 2)
    return (corner[:, :, None] + cell).reshape(-1, 4).to(device, dtype)


def encode_boxes(boxes: Tensor, anchors: Tensor) -> Tensor:
    r"""Boxes relative to anchors.

    .. math:: \Big(\frac{x - x_a}{w_a}, \frac{y - y_a}{h_a}, \log \frac{w}{w_a}, \log \frac{h}{h_a}\Big)

    with the middles x, y and the widths w and heights h of both.

    Args:
        boxes: ``(N, 4)``: left, top, right, bottom.
        anchors: ``(N, 4)``.

    Returns:
        ``(N, 4)``.

    Source: Girshick, *Fast R-CNN*, 2015.

    Example:
        >>> encode_boxes(torch.tensor([[2.0, 0.0, 12.0, 20.0]]), torch.tensor([[0.0, 0.0, 10.0, 20.0]]))
        tensor([[0.2000, 0.0000, 0.0000, 0.0000]])
    """
    (middle, size), (anchor_middle, anchor_size) = _middles(boxes), _middles(anchors)
    return torch.cat([(middle - anchor_middle) / anchor_size, (size / anchor_size).log()], dim=1)


def decode_boxes(relative: Tensor, anchors: Tensor) -> Tensor:
    """What :func:`encode_boxes` undoes; sizes are not limited.

    Args:
        relative: ``(N, 4)``.
        anchors: ``(N, 4)``: left, top, right, bottom.

    Returns:
        ``(N, 4)``: left, top, right, bottom.

    Example:
        >>> decode_boxes(torch.tensor([[0.2, 0.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 10.0, 20.0]]))
        tensor([[ 2.,  0., 12., 20.]])
    """
    middle, size = _middles(anchors)
    middle, size = middle + relative[:, :2] * size, size * relative[:, 2:].exp()
    return torch.cat([middle - size / 2, middle + size / 2], dim=1)


def _middles(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Middles and sizes, both ``(N, 2)``."""
    size = boxes[:, 2:] - boxes[:, :2]
    return boxes[:, :2] + size / 2, size
