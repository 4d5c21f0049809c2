"""JPEG's quantisation tables, and files written with them."""

import io
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

Subsampling = Literal["4:4:4", "4:2:2", "4:2:0"]

# The standard's examples, annex K, tables K.1 and K.2.
_LUMA = """
16 11 10 16 24 40 51 61  12 12 14 19 26 58 60 55  14 13 16 24 40 57 69 56  14 17 22 29 51 87 80 62
18 22 37 56 68 109 103 77  24 35 55 64 81 104 113 92  49 64 78 87 103 121 120 101  72 92 95 98 112 100 103 99
"""
_CHROMA = """
17 18 24 47 99 99 99 99  18 21 26 66 99 99 99 99  24 26 56 99 99 99 99 99  47 66 99 99 99 99 99 99
99 99 99 99 99 99 99 99  99 99 99 99 99 99 99 99  99 99 99 99 99 99 99 99  99 99 99 99 99 99 99 99
"""
_LARGEST = 255  # of a baseline file's 8-bit tables
_WHITE = 255


@dataclass(frozen=True)
class JPEGTables:
    """What coefficients of luma and chroma blocks are divided by.

    Args:
        luma: 64 whole numbers from 1 to 255, row by row: the vertical frequency changes slowest.
        chroma: Likewise; unused by a grey image.

    Raises:
        ValueError: If a table is not of that kind.

    Example:
        >>> standard_tables(quality=50).luma[:4]
        (16, 11, 10, 16)
    """

    luma: tuple[int, ...]
    chroma: tuple[int, ...]

    def __post_init__(self) -> None:
        for name, table in (("luma", self.luma), ("chroma", self.chroma)):
            if len(table) != 64 or not all(isinstance(step, int) and 1 <= step <= _LARGEST for step in table):
                raise ValueError(f"Table `{name}` must hold 64 whole numbers from 1 to {_LARGEST} but got {table}.")


def standard_tables(quality: int) -> JPEGTables:
    """The standard's tables at a quality, scaled as the Independent JPEG Group's encoder scales them.

    Args:
        quality: From 1 (worst) to 100.

    Raises:
        ValueError: If it is out of range.

    Source: ITU-T T.81, annex K; IJG's ``jpeg_quality_scaling``.
    """
    if not 1 <= quality <= 100:
        raise ValueError(f"Argument `quality` must lie in 1 to 100 but got {quality}.")
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality

    def scaled(table: str) -> tuple[int, ...]:
        return tuple(min(max((int(step) * percent + 50) // 100, 1), _LARGEST) for step in table.split())

    return JPEGTables(scaled(_LUMA), scaled(_CHROMA))


def steps_for_bits(bits: Tensor, depth: int = 8) -> Tensor:
    r"""Quantisation steps :math:`2^{\beta - B_{ij}}`, before rounding.

    Args:
        bits: B, given to each coefficient, any shape.
        depth: β.

    Source: *Resource-Efficient Feature Gathering at Test Time*, equation 3.17.

    Example:
        >>> steps_for_bits(torch.tensor([8.0, 5.0, 0.0]))
        tensor([  1.,   8., 256.])
    """
    return torch.exp2(depth - bits)


def whole_table(steps: Tensor) -> tuple[int, ...]:
    """Steps rounded to what a baseline file can hold, 1 to 255.

    Args:
        steps: ``(8, 8)`` or ``(64,)``.
    """
    return tuple(int(step) for step in steps.detach().flatten().round().clamp(1, _LARGEST))


def quantized(coefficients: Tensor, steps: Tensor) -> Tensor:
    """What a decoder sees of coefficients: the nearest multiples of the steps.

    Args:
        coefficients: ``(*, 8, 8)``, orthonormal, as of :func:`~lit_compress.budget.dct.block_dct`.
        steps: ``(8, 8)``.

    Source: *Resource-Efficient Feature Gathering at Test Time*, equation 3.16, multiplied back.
    """
    return (coefficients / steps).round() * steps


def read_image(source: str | Path | Image.Image | Tensor) -> Image.Image:
    """An image as JPEG can hold it: 8-bit grey (``"L"``) or colour (``"RGB"``).

    Palettes, black and white, and CMYK are converted to those; an alpha channel that is opaque everywhere is dropped.

    Args:
        source: A file, an image, or a uint8 tensor ``(H, W)``, ``(1, H, W)`` or ``(3, H, W)``.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If it is no image, has more than 8 bits a channel, or is transparent somewhere.
    """
    if isinstance(source, Tensor):
        if source.dtype != torch.uint8 or source.ndim not in (2, 3) or (source.ndim == 3 and source.shape[0] not in (1, 3)):
            raise ValueError(
                f"Expected a uint8 tensor (H, W), (1, H, W) or (3, H, W) but got {source.dtype} {tuple(source.shape)}."
            )
        pixels = source.squeeze(0) if source.ndim == 3 and source.shape[0] == 1 else source
        array = pixels.cpu().numpy()
        return Image.fromarray(array if array.ndim == 2 else np.ascontiguousarray(array.transpose(1, 2, 0)))
    if isinstance(source, Image.Image):
        image = source
    else:
        try:
            image = Image.open(source)
            image.load()
        except UnidentifiedImageError as error:
            raise ValueError(f"{source} is not an image that Pillow can read.") from error
    if image.mode in ("L", "RGB"):
        return image
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"JPEG holds 8 bits a channel but the image has mode {image.mode}; scale it to 8 bits first.")
    if "A" in image.getbands() or "transparency" in image.info:
        lowest = image.convert("RGBA").getchannel("A").getextrema()[0]
        if lowest != 255:
            raise ValueError("JPEG has no transparency; put the image on a background first.")
    return image.convert("L" if image.mode in ("1", "LA", "La") else "RGB")


def encode_jpeg(image: str | Path | Image.Image | Tensor, tables: JPEGTables, subsampling: Subsampling = "4:2:0") -> bytes:
    """A baseline JPEG file, with Huffman tables made for the image.

    Args:
        image: As :func:`read_image` takes it.
        tables: Of the quantisation.
        subsampling: Of chroma, for a colour image.

    Raises:
        ValueError: As :func:`read_image` does.
    """
    picture = read_image(image)
    given = [list(tables.luma)] if picture.mode == "L" else [list(tables.luma), list(tables.chroma)]
    file = io.BytesIO()
    picture.save(file, format="JPEG", qtables=given, subsampling=0 if picture.mode == "L" else subsampling, optimize=True)
    return file.getvalue()


def decoded_jpeg(content: bytes) -> Image.Image:
    """What a decoder shows of a file's content."""
    image = Image.open(io.BytesIO(content))
    image.load()
    return image


def psnr(image: Image.Image, other: Image.Image) -> float:
    """Peak signal-to-noise ratio in decibels, over all pixels and channels; infinite for equal images.

    Args:
        image: 8 bits a channel.
        other: Likewise, of the same size and mode.
    """
    error = np.square(np.asarray(image, dtype=float) - np.asarray(other, dtype=float)).mean()
    return float(10 * np.log10(_WHITE**2 / error)) if error else inf


def save_jpeg(
    image: str | Path | Image.Image | Tensor, path: str | Path, tables: JPEGTables, subsampling: Subsampling = "4:2:0"
) -> float:
    """Write a baseline JPEG that any viewer opens.

    Args:
        image: A file, an image, or a uint8 tensor; see :func:`read_image`.
        path: Where to; what is there is overwritten.
        tables: Of the quantisation, e.g. :func:`standard_tables`.
        subsampling: Of chroma, for a colour image.

    Returns:
        Size of the file in bits per pixel.

    Raises:
        ValueError: As :func:`read_image` does.

    Example:
        >>> ramp = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
        >>> save_jpeg(ramp, "ramp.jpg", standard_tables(quality=90)) > 1
        True
    """
    picture = read_image(image)
    content = encode_jpeg(picture, tables, subsampling)
    Path(path).write_bytes(content)
    return 8 * len(content) / (picture.width * picture.height)
