"""The planes of an image that JPEG transforms, patches of them, and the way back to pixels."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from lit_compress.budget.dct import SIDE
from lit_compress.budget.jpeg import Subsampling

Planes = tuple[Tensor, ...]
"""Luma ``(*, 1, H, W)`` and, of a colour image, chroma ``(*, 2, h, w)``, on the scale of 0 to 255."""

# Factors by which chroma planes are smaller, down and across.
_FACTORS: dict[Subsampling, tuple[int, int]] = {"4:4:4": (1, 1), "4:2:2": (1, 2), "4:2:0": (2, 2)}
# Of JFIF: luma and both chroma planes, from red, green and blue.
_FROM_PIXELS = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
# And back: what red, green and blue get of both chroma planes.
_FROM_CHROMA = ((0.0, 1.402), (-0.344136, -0.714136), (1.772, 0.0))
_MOST_PIXELS = 2**21  # that patches are drawn up to, so that learning does not take longer for more images


def chroma_factors(subsampling: Subsampling) -> tuple[int, int]:
    """By how much chroma is smaller, down and across.

    Raises:
        ValueError: If the subsampling is unknown.
    """
    if subsampling not in _FACTORS:
        raise ValueError(f"Argument `subsampling` must be one of {list(_FACTORS)} but got {subsampling!r}.")
    return _FACTORS[subsampling]


def unit_side(colour: bool, subsampling: Subsampling) -> int:
    """Pixels that whole blocks of all planes cover, down and across: 8, or 16 where chroma is halved.

    Args:
        colour: Whether there is chroma.
        subsampling: Of chroma.
    """
    return SIDE * max(chroma_factors(subsampling)) if colour else SIDE


def image_planes(picture: Image.Image, subsampling: Subsampling) -> Planes:
    """Planes as an encoder sees them, uint8.

    Args:
        picture: Grey (``"L"``) or in colour (``"RGB"``).
        subsampling: Of chroma, by means of neighbours.
    """
    pixels = torch.from_numpy(np.array(picture))
    if picture.mode == "L":
        return (pixels[None],)
    planes = torch.einsum("rc,hwc->rhw", torch.tensor(_FROM_PIXELS), pixels.float())
    down, across = chroma_factors(subsampling)
    padded = F.pad(planes[1:], (0, -picture.width % across, 0, -picture.height % down), mode="replicate")
    chroma = F.avg_pool2d(padded, (down, across)) + 128
    return planes[:1].round().byte(), chroma.round().clamp(0, 255).byte()


def pixels_of(planes: Planes) -> Tensor:
    """Pixels ``(N, 1, H, W)`` or ``(N, 3, H, W)`` in [0, 1], as a decoder shows them, before rounding; differentiable.

    Args:
        planes: Of N images. Chroma is interpolated linearly, as the common decoder (libjpeg) does.

    Example:
        >>> grey = torch.full((1, 1, 16, 16), 51.0)
        >>> pixels_of((grey, torch.full((1, 2, 8, 8), 128.0))).unique()
        tensor([0.2000])
    """
    luma, *rest = planes
    if rest:
        chroma = F.interpolate(rest[0] - 128, size=luma.shape[-2:], mode="bilinear", align_corners=False)
        luma = luma + torch.einsum("rc,nchw->nrhw", luma.new_tensor(_FROM_CHROMA), chroma)
    return (luma / 255).clamp(0, 1)


class ImagePatches(Dataset[Planes]):
    """Patches of images, as planes, in places where an encoder's blocks begin.

    An item is ``(luma (1, S, S),)`` of grey images, or ``(luma (1, S, S), chroma (2, s, s'))``, uint8. Patches lie side by side,
    the last of a row or column flush with the end. Of large sets at most 2 million pixels are taken, drawn at random, evenly
    over the images.

    Args:
        pictures: All grey (``"L"``) or all in colour (``"RGB"``).
        side: S, a multiple of what whole blocks of all planes cover (8, or 16 where chroma is halved).
        subsampling: Of chroma.
        seed: Of the draw.

    Raises:
        ValueError: If there is no image, grey and colour are mixed, the side does not fit the blocks, or an image is smaller.

    Example:
        >>> patches = ImagePatches([Image.new("RGB", (768, 512))], side=16)
        >>> len(patches), [plane.shape for plane in patches[0]]
        (1536, [torch.Size([1, 16, 16]), torch.Size([2, 8, 8])])
    """

    def __init__(self, pictures: Sequence[Image.Image], side: int, subsampling: Subsampling = "4:2:0", seed: int = 0) -> None:
        modes = {picture.mode for picture in pictures}
        if modes not in ({"L"}, {"RGB"}):
            raise ValueError(f"Expected images that are all grey (L) or all in colour (RGB) but got {sorted(modes) or 'none'}.")
        self.colour = modes == {"RGB"}
        self.side = side
        unit = unit_side(self.colour, subsampling)
        if side < unit or side % unit:
            raise ValueError(f"Argument `side` must be a multiple of {unit} with {subsampling} here but got {side}.")
        generator = torch.Generator().manual_seed(seed)
        most = max(_MOST_PIXELS // side**2 // len(pictures), 1)
        patches = [_patches(picture, side, unit, subsampling, most, generator) for picture in pictures]
        self.planes: Planes = tuple(torch.cat(planes) for planes in zip(*patches, strict=True))
        """All patches, stacked."""

    def __len__(self) -> int:
        return len(self.planes[0])

    def __getitem__(self, index: int) -> Planes:
        return tuple(plane[index] for plane in self.planes)


def _patches(
    picture: Image.Image, side: int, unit: int, subsampling: Subsampling, most: int, generator: torch.Generator
) -> Planes:
    luma, *chroma = image_planes(_padded(picture, unit), subsampling)
    height, width = luma.shape[1:]
    if min(height, width) < side:
        raise ValueError(f"Patches of {side} pixels do not fit an image of {picture.width} x {picture.height}.")
    places = [(top, left) for top in _starts(height, side) for left in _starts(width, side)]
    chosen = [places[index] for index in torch.randperm(len(places), generator=generator)[:most].tolist()]

    def cut(plane: Tensor) -> Tensor:
        down, across = height // plane.shape[1], width // plane.shape[2]
        high, wide = side // down, side // across
        corners = [(top // down, left // across) for top, left in chosen]
        return torch.stack([plane[:, top : top + high, left : left + wide] for top, left in corners])

    return tuple(cut(plane) for plane in (luma, *chroma))


def _starts(length: int, side: int) -> list[int]:
    """Where patches begin: side by side, the last flush with the end."""
    return [*range(0, length - side, side), length - side]


def _padded(picture: Image.Image, unit: int) -> Image.Image:
    """The last row and column repeated up to whole blocks, as encoders do."""
    right, bottom = -picture.width % unit, -picture.height % unit
    array = np.asarray(picture)
    return Image.fromarray(np.pad(array, [(0, bottom), (0, right), (0, 0)][: array.ndim], mode="edge"))
