"""Linear layers whose matrix is a tensor train."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lit_compress.layers import tensor_cores
from lit_compress.layers.structured import Path, Pointwise, StructuredLinear


class TensorTrainLinear(StructuredLinear):
    r"""Linear layer whose matrix, row by row as a tensor, is a train of cores: :math:`A(i_1, …, i_d) = G_1(i_1) ⋯ G_d(i_d)`.

    :math:`G_k(i_k)` is a matrix :math:`r_{k-1} × r_k`. Each rank is ``rank_scale`` times the smaller of the two dimensions that
    it joins, rounded, at least 1. The factorized path exists where the index of a row ends at a dimension or within one that is
    a grid of rows and columns, as with powers of two.

    Args:
        in_features: Numbers that come in.
        out_features: Numbers that go out.
        rank_scale: Ranks over dimensions, in (0, 1].
        dims: How many dimensions, of about one size; or their sizes.
        bias: Whether to add a bias.
        path: See :class:`~lit_compress.layers.structured.StructuredLinear`.

    Shape:
        - input: ``(*, in_features)``.
        - output: ``(*, out_features)``.

    Raises:
        ValueError: If the scale is no share, or the dimensions do not multiply to the elements of the matrix.

    Source: Oseledets, *Tensor-Train Decomposition*, 2011; *Efficient machine learning under a budget* (T2), sections 5.2.3
    (equation 5.10) and 5.3.2.

    Example:
        >>> layer = TensorTrainLinear(16, 32, rank_scale=0.5)
        >>> [tuple(core.shape) for core in layer.cores]
        [(1, 8, 4), (4, 8, 4), (4, 8, 1)]
    """

    kind = "tensor_train"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank_scale: float,
        dims: int | Sequence[int] = 3,
        bias: bool = True,
        path: Path = "auto",
    ) -> None:
        super().__init__(in_features, out_features, bias, path)
        tensor_cores.check_rank_scale(rank_scale)
        self.dims = tensor_cores.check_dimensions(dims, in_features, out_features)
        self.ranks = tuple(max(1, round(rank_scale * min(pair))) for pair in pairwise(self.dims))
        self.split = tensor_cores.split(self.dims, in_features, out_features)
        self._refuse_missing_path()
        shapes = zip((1, *self.ranks), self.dims, (*self.ranks, 1), strict=True)
        self.cores = nn.ParameterList(nn.init.uniform_(torch.empty(shape), -1, 1) for shape in shapes)
        with torch.no_grad():
            scale = (out_features / 3 / tensor_cores.tt_energy(list(self.cores))) ** (0.5 / len(self.cores))
            for core in self.cores:
                core.mul_(scale)

    @classmethod
    @override
    def knobs(cls, setting: float, in_features: int, out_features: int) -> dict[str, Any]:
        """The setting is the scale of the ranks."""
        return {"rank_scale": setting}

    @override
    def matrix(self) -> Tensor:
        return tensor_cores.tt_contract(list(self.cores)).view(self.out_features, self.in_features)

    @override
    def apply_factors(self, x: Tensor) -> Tensor:
        assert self.split is not None
        return tensor_cores.apply_train(list(self.cores), x, self.split)

    @property
    @override
    def factor_mult_adds(self) -> int | None:
        return tensor_cores.train_mult_adds(self.ranks, self.dims, self.split) if self.split else None

    @override
    def fit(self, matrix: Tensor) -> None:
        """A near train by truncated singular value decompositions, at most √(d - 1) times as far as the nearest."""
        with torch.no_grad():
            for core, best in zip(self.cores, tensor_cores.tt_svd(matrix.reshape(self.dims), self.ranks), strict=True):
                core.copy_(best)


class TensorTrainConv1x1(Pointwise, TensorTrainLinear):
    """Pointwise convolution whose matrix is a tensor train.

    Args:
        in_channels: Channels that come in.
        out_channels: Channels that go out.
        rank_scale: Ranks over dimensions, in (0, 1].
        stride: Step in pixels.
        dims, bias, path: As in :class:`TensorTrainLinear`.

    Example:
        >>> TensorTrainConv1x1(16, 32, rank_scale=0.5, stride=2)(torch.zeros(1, 16, 8, 8)).shape
        torch.Size([1, 32, 4, 4])
    """

    slowness = 4.0  # maps are turned so that channels come last, and back (256 channels of 32 × 32, batch 16, one CPU thread)
