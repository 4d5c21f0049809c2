"""The 8×8 cosine transform of JPEG, orthonormal."""

from math import pi, sqrt

import torch
from torch import Tensor

SIDE = 8


def dct_matrix(size: int = SIDE) -> Tensor:
    r"""Rows are the orthonormal cosines :math:`c_k \cos(\pi (n + \tfrac12) k / N)`, ``(N, N)`` float64.

    Args:
        size: N.

    Source: DCT-II; *Resource-Efficient Feature Gathering at Test Time*, equation 3.15, with the k that is missing there.
    """
    steps = torch.arange(size, dtype=torch.float64)
    cosines = torch.cos(pi / size * (steps + 0.5) * steps[:, None]) * sqrt(2 / size)
    cosines[0] /= sqrt(2)
    return cosines


def block_dct(blocks: Tensor) -> Tensor:
    """Coefficients of blocks; row u, column v is the vertical frequency u and the horizontal frequency v.

    Args:
        blocks: ``(*, 8, 8)`` float. JPEG takes 128 off its pixels first.

    Returns:
        Like ``blocks``, with the same sum of squares.

    Example:
        >>> block_dct(torch.ones(8, 8))[0, 0].round()
        tensor(8.)
    """
    cosines = dct_matrix(blocks.shape[-1]).to(blocks)
    return cosines @ blocks @ cosines.T


def inverse_block_dct(coefficients: Tensor) -> Tensor:
    """Blocks ``(*, 8, 8)`` with these coefficients.

    Args:
        coefficients: ``(*, 8, 8)`` float.
    """
    cosines = dct_matrix(coefficients.shape[-1]).to(coefficients)
    return cosines.T @ coefficients @ cosines


def image_blocks(plane: Tensor) -> Tensor:
    """Blocks of a plane in reading order; its last row and column are repeated up to whole blocks, as encoders do.

    Args:
        plane: ``(H, W)``, any dtype.

    Returns:
        ``(ceil(H / 8) * ceil(W / 8), 8, 8)``.

    Example:
        >>> image_blocks(torch.zeros(16, 20)).shape
        torch.Size([6, 8, 8])
    """
    height, width = (-(-size // SIDE) * SIDE for size in plane.shape)
    rows = torch.arange(height).clamp_max(plane.shape[0] - 1)
    columns = torch.arange(width).clamp_max(plane.shape[1] - 1)
    return plane[rows][:, columns].unfold(0, SIDE, SIDE).unfold(1, SIDE, SIDE).flatten(0, 1)
