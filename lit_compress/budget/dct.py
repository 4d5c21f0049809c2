"""The 8×8 cosine transform of JPEG, orthonormal."""

from collections.abc import Sequence
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


def plane_blocks(plane: Tensor) -> Tensor:
    """Blocks ``(M, 8, 8)`` of planes ``(N, P, H, W)`` whose sides are multiples of 8, plane after plane in reading order."""
    return plane.unfold(2, SIDE, SIDE).unfold(3, SIDE, SIDE).reshape(-1, SIDE, SIDE)


def joined_blocks(blocks: Tensor, shape: Sequence[int]) -> Tensor:
    """Planes of the shape ``(N, P, H, W)`` from their blocks: undoes :func:`plane_blocks`."""
    count, planes, height, width = shape
    grid = blocks.reshape(count, planes, height // SIDE, width // SIDE, SIDE, SIDE)
    return grid.transpose(3, 4).reshape(count, planes, height, width)
