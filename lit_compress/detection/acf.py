"""Aggregate channel features: colours, gradients and their orientations, averaged over cells."""

from __future__ import annotations

from math import pi
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

_XYZ = ((0.430574, 0.341550, 0.178325), (0.222015, 0.706655, 0.071330), (0.020183, 0.129553, 0.939180))  # of R, G and B
_NORM_RADIUS, _NORM_FLOOR = 5, 0.005


class ACFChannels(nn.Module):
    """Ten channels of an image: colours L, u and v, gradient magnitude, and the magnitude in each of six orientations.

    A layer without parameters, to stand in front of a network, and a transform; it runs where its input is, and gradients go
    through. The image is turned into Luv and smoothed; a pixel's gradient is that of the colour channel where it is greatest; its
    magnitude is divided by the mean of its surroundings; and all is averaged over cells of ``shrink`` × ``shrink`` pixels. Rows
    and columns that fill no cell are left out.

    Args:
        shrink: Side of a cell in pixels.
        orientations: Number of orientation channels; together they cover half a turn.
        smooth: Radius of the triangle that colours are smoothed with before all else; 0 does not smooth.
        smooth_channels: Radius of the triangle that the channels are smoothed with; the detector's pyramid has 1.
        reduce: ``"mean"`` over a cell, as the original, or ``"sum"``, as P1 says.
        size: Height and width that the channels are resized to, bilinearly; P1's students take (224, 224). ``None`` leaves them.

    Shape:
        - input: ``(3, H, W)`` or ``(N, 3, H, W)``, RGB, floating point in [0, 1] or uint8.
        - output: ``(4 + orientations, H // shrink, W // shrink)`` or the same behind N; the input's dtype, float32 for uint8.

    Raises:
        ValueError: If a number is out of range, or the image is no RGB image of at least ``shrink`` and 5 pixels each way.

    Source: Dollár et al., *Fast Feature Pyramids for Object Detection*, 2014, section 5.1, and its ``chnsCompute``; *In Teacher
    We Trust*, section 4.3. The original's fast reciprocals and arc cosines are replaced by exact ones.

    Example:
        >>> ACFChannels()(torch.rand(2, 3, 64, 32)).shape
        torch.Size([2, 10, 16, 8])
    """

    def __init__(
        self,
        shrink: int = 4,
        orientations: int = 6,
        smooth: int = 1,
        smooth_channels: int = 0,
        reduce: Literal["mean", "sum"] = "mean",
        size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        for name, number, least in (
            ("shrink", shrink, 1),
            ("orientations", orientations, 1),
            ("smooth", smooth, 0),
            ("smooth_channels", smooth_channels, 0),
        ):
            if number < least:
                raise ValueError(f"Argument `{name}` must be at least {least} but got {number}.")
        if reduce not in ("mean", "sum"):
            raise ValueError(f'Argument `reduce` must be "mean" or "sum" but got {reduce!r}.')
        self.shrink, self.orientations, self.smooth, self.smooth_channels = shrink, orientations, smooth, smooth_channels
        self.reduce, self.size = reduce, size

    @property
    def out_channels(self) -> int:
        """Number of channels."""
        return 4 + self.orientations

    @override
    def forward(self, images: Tensor) -> Tensor:
        """The channels."""
        least = max(self.shrink, _NORM_RADIUS, self.smooth)
        if images.ndim not in (3, 4) or images.shape[-3] != 3 or min(images.shape[-2:]) < least:
            raise ValueError(
                f"Expected RGB images (N, 3, H, W) or (3, H, W) of at least {least} pixels each way but got shape "
                f"{tuple(images.shape)}."
            )
        if images.dtype == torch.uint8:
            images = images.float() / 255
        elif not images.is_floating_point():
            raise ValueError(f"Expected images of a floating point dtype in [0, 1], or of uint8, but got {images.dtype}.")
        batch = images if images.ndim == 4 else images.unsqueeze(0)
        batch = batch[..., : batch.shape[2] // self.shrink * self.shrink, : batch.shape[3] // self.shrink * self.shrink]
        colours = smoothed(luv(batch), self.smooth)
        magnitude, orientation = gradient(colours)
        magnitude = magnitude / (smoothed(magnitude, _NORM_RADIUS) + _NORM_FLOOR)
        channels = torch.cat([colours, magnitude, oriented(magnitude, orientation, self.orientations)], dim=1)
        cells = F.avg_pool2d(channels, self.shrink) * (1 if self.reduce == "mean" else self.shrink**2)
        cells = smoothed(cells, self.smooth_channels)
        if self.size is not None:
            cells = F.interpolate(cells, size=self.size, mode="bilinear", align_corners=False)
        return cells if images.ndim == 4 else cells.squeeze(0)

    @override
    def extra_repr(self) -> str:
        return f"shrink={self.shrink}, orientations={self.orientations}, smooth={self.smooth}, size={self.size}"


def luv(images: Tensor) -> Tensor:
    """RGB to Luv, each channel scaled and shifted to about [0, 1]; without gamma.

    Args:
        images: ``(N, 3, H, W)`` in [0, 1].

    Example:
        >>> luv(torch.zeros(1, 3, 1, 1)).flatten()
        tensor([0.0000, 0.3259, 0.4963])
    """
    x, y, z = (images * images.new_tensor(row)[:, None, None] for row in _XYZ)
    x, y, z = (plane.sum(dim=1) for plane in (x, y, z))
    # The original looks lightness up in a table of 1024 steps: its values, with the formula's gradient.
    light = _lightness(y)
    light = light + (_lightness((y * 1024).floor() / 1024) - light).detach()
    total = (x + 15 * y + 3 * z).clamp(min=1e-12)  # black has no hue
    u = light * 13 * (4 * x / total - 0.197833) + 88 / 270
    v = light * 13 * (9 * y / total - 0.468331) + 134 / 270
    return torch.stack([light, u, v], dim=1)


def _lightness(y: Tensor) -> Tensor:
    knee = (6 / 29) ** 3
    return torch.where(y > knee, 116 * y.clamp(min=knee) ** (1 / 3) - 16, y * (29 / 3) ** 3) / 270


def smoothed(planes: Tensor, radius: int) -> Tensor:
    """Planes ``(N, C, H, W)`` smoothed with a triangle of that radius both ways; beyond the edge they are mirrored.

    Example:
        >>> smoothed(torch.tensor([[[[0.0, 0.0, 4.0, 0.0]]]]), 1)
        tensor([[[[0., 1., 2., 1.]]]])
    """
    if not radius:
        return planes
    rise = torch.arange(1, radius + 2, dtype=planes.dtype, device=planes.device)
    weights = torch.cat([rise, rise[:-1].flip(0)]) / (radius + 1) ** 2
    for dim in (2, 3):
        length = planes.shape[dim]
        places = torch.arange(-radius, length + radius, device=planes.device).remainder(2 * length)
        mirrored = planes.index_select(dim, torch.minimum(places, 2 * length - 1 - places))
        kernel = weights.view(1, 1, -1, 1) if dim == 2 else weights.view(1, 1, 1, -1)
        planes = F.conv2d(mirrored.flatten(0, 1).unsqueeze(1), kernel).view_as(planes)
    return planes


def gradient(planes: Tensor) -> tuple[Tensor, Tensor]:
    """Magnitude and orientation of each pixel's gradient, in the channel where it is greatest.

    Args:
        planes: ``(N, C, H, W)``.

    Returns:
        Both ``(N, 1, H, W)``; orientations in radians, in [0, π).

    Example:
        >>> magnitude, orientation = gradient(torch.arange(3.0).expand(1, 1, 3, 3))
        >>> magnitude[0, 0, 0], orientation[0, 0, 0]
        (tensor([1., 1., 1.]), tensor([0., 0., 0.]))
    """
    down, across = (torch.gradient(planes, dim=dim)[0] for dim in (2, 3))
    steepest = (down**2 + across**2).argmax(dim=1, keepdim=True)
    down, across = (part.gather(1, steepest) for part in (down, across))
    squared = down**2 + across**2
    # Where it is flat, the root has no gradient, and the angle means nothing.
    flat = squared == 0
    magnitude = torch.where(flat, 0.0, torch.where(flat, 1.0, squared).sqrt())
    orientation = torch.atan2(down, torch.where(flat, 1.0, across)).remainder(pi)
    return magnitude, torch.where(orientation >= pi, 0.0, orientation)  # rounding can make π of a small negative angle


def oriented(magnitude: Tensor, orientation: Tensor, bins: int) -> Tensor:
    """Magnitudes shared out to the two orientations next to each pixel's own.

    Args:
        magnitude: ``(N, 1, H, W)``.
        orientation: ``(N, 1, H, W)`` in radians, in [0, π).
        bins: Number of orientations; the k-th, from 0, is k π / bins, and the last is next to the first.

    Returns:
        ``(N, bins, H, W)``, which add up to the magnitude.

    Example:
        >>> oriented(torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), pi / 4), bins=2).flatten()
        tensor([0.5000, 0.5000])
    """
    place = orientation * (bins / pi)
    # A tent around each orientation, on a circle of `bins`.
    off = (place - torch.arange(bins, dtype=place.dtype, device=place.device)[:, None, None]).abs()
    return magnitude * (1 - torch.minimum(off, bins - off)).clamp(min=0)
