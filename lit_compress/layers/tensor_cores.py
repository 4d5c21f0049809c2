"""A matrix as a tensor of more dimensions: their sizes, its decompositions, and a product that never forms the matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def dimensions(elements: int, ways: int = 3) -> tuple[int, ...]:
    """Split a number of elements into factors of about one size.

    If the ``ways``-th root is whole, it is every factor. Otherwise each but the last is the smallest divisor of what remains
    that is no smaller than the rounded root.

    Args:
        elements: Rows times columns of the matrix.
        ways: Number of dimensions.

    Raises:
        ValueError: If there is no dimension.

    Source: released code of *Efficient machine learning under a budget* (T2), section 5.3.2.

    Example:
        >>> dimensions(16 * 32), dimensions(16 * 16), dimensions(10 * 784)
        ((8, 8, 8), (8, 8, 4), (20, 28, 14))
    """
    if ways < 1:
        raise ValueError(f"Argument `ways` must be at least 1 but got {ways}.")
    root = round(elements ** (1 / ways))
    if root**ways == elements:
        return (root,) * ways
    factors, rest = [], elements
    for _ in range(ways - 1):
        factors.append(next(size for size in range(min(root, rest), rest + 1) if rest % size == 0))
        rest //= factors[-1]
    return (*factors, rest)


def check_dimensions(dims: int | Sequence[int], in_features: int, out_features: int) -> tuple[int, ...]:
    """The sizes of the dimensions, from their number or as given.

    Raises:
        ValueError: If sizes are given and their product is not that of the widths.
    """
    if isinstance(dims, int):
        return dimensions(in_features * out_features, dims)
    if math.prod(dims) != in_features * out_features or min(dims) < 1:
        raise ValueError(
            f"The dimensions {tuple(dims)} must multiply to {out_features} by {in_features} = {in_features * out_features}."
        )
    return tuple(dims)


def check_rank_scale(rank_scale: float) -> None:
    """Refuse what is no share.

    Raises:
        ValueError: If the scale does not lie in (0, 1].
    """
    if not 0 < rank_scale <= 1:
        raise ValueError(f"Argument `rank_scale` must lie in (0, 1] but got {rank_scale}.")


def tt_contract(cores: Sequence[Tensor]) -> Tensor:
    """Multiply a train of cores ``(r, d, r')`` into one: outer ranks first and last, all dimensions flat between.

    Example:
        >>> tt_contract([torch.ones(1, 2, 3), torch.ones(3, 4, 1)]).shape
        torch.Size([1, 8, 1])
    """
    full = cores[0]
    for core in cores[1:]:
        full = (full.flatten(0, 1) @ core.flatten(1)).view(full.shape[0], -1, core.shape[-1])
    return full


def tt_energy(cores: Sequence[Tensor]) -> Tensor:
    """Sum of squares of the entries of a tensor train, in ``O(d r³)`` per core."""
    gram = cores[0].new_ones(1, 1)
    for core in cores:
        gram = torch.einsum("ab,adc,bde->ce", gram, core, core)
    return gram.squeeze()


def tt_svd(tensor: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """Decompose a tensor into a train of cores by truncated singular value decompositions.

    Args:
        tensor: Of d dimensions.
        ranks: The d - 1 ranks between the cores. Where the tensor has a lower one, the cores end in zeros.

    Returns:
        Cores ``(r, d, r')``. The error is at most √(d - 1) times that of the best train of these ranks.

    Source: Oseledets, *Tensor-Train Decomposition*, 2011, algorithm 1.
    """
    cores, rest, rank = [], tensor.reshape(1, -1), 1
    for size, after in zip(tensor.shape[:-1], ranks, strict=True):
        u, values, vh = torch.linalg.svd(rest.reshape(rank * size, -1), full_matrices=False)
        keep = min(after, len(values))
        core = u.new_zeros(rank * size, after)
        core[:, :keep] = u[:, :keep]
        rest = u.new_zeros(after, vh.shape[1])
        rest[:keep] = values[:keep, None] * vh[:keep]
        cores.append(core.view(rank, size, after))
        rank = after
    return [*cores, rest.view(rank, tensor.shape[-1], 1)]


def hosvd(tensor: Tensor, ranks: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """Decompose a tensor into a core and one orthonormal factor a dimension.

    Args:
        tensor: Of d dimensions.
        ranks: Size of the core in each; none larger than the dimension or than the product of the others.

    Returns:
        The core, and the factors ``(size, rank)``. The error is at most √d times that of the best core of these sizes.

    Source: De Lathauwer et al., *A Multilinear Singular Value Decomposition*, 2000, truncated.
    """
    factors = [
        torch.linalg.svd(tensor.movedim(way, 0).flatten(1), full_matrices=False)[0][:, :rank] for way, rank in enumerate(ranks)
    ]
    return multiply_ways(tensor, [factor.T for factor in factors]), factors


def multiply_ways(tensor: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Multiply each dimension of a tensor by a matrix ``(new, old)``."""
    for matrix in matrices:  # the first dimension goes to the end each time, so that all come to stand as they stood
        tensor = torch.tensordot(tensor, matrix, dims=([0], [1]))
    return tensor


class Split(NamedTuple):
    """Where the row index of a matrix ends and its column index begins, within the dimensions of its tensor.

    The dimensions before ``way`` count rows, those after it columns; ``way`` itself is ``rows × columns``.
    """

    way: int
    rows: int
    columns: int


def split(dims: Sequence[int], in_features: int, out_features: int) -> Split | None:
    """Find the :class:`Split`, None where the index of one dimension runs over rows and columns without being a grid of them.

    Example:
        >>> split((8, 8, 8), in_features=16, out_features=32)
        Split(way=1, rows=4, columns=2)
        >>> split((5, 6, 3), in_features=10, out_features=9) is None
        True
    """
    for way in range(len(dims)):
        rows, rest = divmod(out_features, math.prod(dims[:way]))
        columns, more = divmod(in_features, math.prod(dims[way + 1 :]))
        if not rest and not more and rows * columns == dims[way]:
            return Split(way, rows, columns)
    return None


def apply_train(cores: Sequence[Tensor], x: Tensor, at: Split) -> Tensor:
    """Multiply ``(*, in_features)`` by the matrix of a tensor train without forming it."""
    before, middle, after = cores[: at.way], cores[at.way], cores[at.way + 1 :]
    r, s = middle.shape[0], middle.shape[-1]
    x = x.unflatten(-1, (at.columns, -1))
    if after:
        x = x @ tt_contract(after)[..., 0].T  # (*, columns, s)
    x = x.flatten(-2) @ middle.view(r, at.rows, at.columns * s).flatten(0, 1).T  # (*, r · rows)
    x = x.unflatten(-1, (r, at.rows))
    if before:
        x = tt_contract(before)[0] @ x  # (*, sizes before, rows)
    return x.flatten(-2)


def train_mult_adds(ranks: Sequence[int], dims: Sequence[int], at: Split) -> int:
    """Mult-adds of :func:`apply_train` on one input, without what the cores alone decide.

    Args:
        ranks: The ranks between the cores, d - 1 of them.
        dims: Sizes of the dimensions.
        at: Where rows and columns meet.
    """
    r, s = (1, *ranks, 1)[at.way : at.way + 2]
    before, after = math.prod(dims[: at.way]), math.prod(dims[at.way + 1 :])
    total = r * at.rows * at.columns * s
    if at.way < len(dims) - 1:
        total += at.columns * after * s
    return total + (before * r * at.rows if at.way else 0)
