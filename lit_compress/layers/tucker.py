"""Linear layers whose matrix is a small core, multiplied by a matrix in each dimension."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lit_compress.layers import tensor_cores
from lit_compress.layers.structured import Path, Pointwise, StructuredLinear


class TuckerLinear(StructuredLinear):
    r"""Linear layer whose matrix, row by row as a tensor, is a core times a matrix a dimension: :math:`A = G ×_0 U_0 ⋯ ×_d U_d`.

    The core's sizes are ``rank_scale`` times the dimensions, rounded, at least 1. With ``core="tt"`` the core is itself a tensor
    train of full rank, as the released code stores it: more parameters for the same scale. The factorized path exists as for
    :class:`~lit_compress.layers.TensorTrainLinear`.

    Args:
        in_features: Numbers that come in.
        out_features: Numbers that go out.
        rank_scale: Sizes of the core over dimensions, in (0, 1].
        dims: How many dimensions, of about one size; or their sizes.
        core: How the core is stored; ``"tt"`` for three dimensions only.
        bias: Whether to add a bias.
        path: See :class:`~lit_compress.layers.structured.StructuredLinear`.

    Shape:
        - input: ``(*, in_features)``.
        - output: ``(*, out_features)``.

    Raises:
        ValueError: If the scale is no share, the dimensions do not multiply to the elements of the matrix, or the core is
            unknown.

    Source: *Efficient machine learning under a budget* (T2), section 5.2.3, equation 5.11, and section 5.3.2.

    Example:
        >>> layer = TuckerLinear(16, 32, rank_scale=0.5)
        >>> layer.ranks, layer.matrix_parameters, TuckerLinear(16, 32, rank_scale=0.5, core="tt").matrix_parameters
        ((4, 4, 4), 160, 272)
    """

    kind = "tucker"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank_scale: float,
        dims: int | Sequence[int] = 3,
        core: Literal["dense", "tt"] = "dense",
        bias: bool = True,
        path: Path = "auto",
    ) -> None:
        super().__init__(in_features, out_features, bias, path)
        tensor_cores.check_rank_scale(rank_scale)
        self.dims = tensor_cores.check_dimensions(dims, in_features, out_features)
        if core not in ("dense", "tt") or (core == "tt" and len(self.dims) != 3):
            raise ValueError(f"Argument `core` must be 'dense', or 'tt' with three dimensions, but got {core!r} for {self.dims}.")
        elements = in_features * out_features
        self.ranks = tuple(min(max(1, round(rank_scale * size)), elements // size) for size in self.dims)
        self.split = tensor_cores.split(self.dims, in_features, out_features)
        # The ways before and behind the split one are each folded into one.
        self._folded = None if self.split is None else self.split._replace(way=1)
        self._refuse_missing_path()
        self.core = nn.ParameterList(nn.init.uniform_(torch.empty(shape), -1, 1) for shape in self._core_shapes(core))
        self.factors = nn.ParameterList(
            nn.init.uniform_(torch.empty(shape), -1, 1) for shape in zip(self.dims, self.ranks, strict=True)
        )
        with torch.no_grad():
            parameters = [*self.core, *self.factors]
            inner = self._full_core()
            energy = (tensor_cores.multiply_ways(inner, [factor.T @ factor for factor in self.factors]) * inner).sum()
            scale = (out_features / 3 / energy) ** (0.5 / len(parameters))
            for parameter in parameters:
                parameter.mul_(scale)

    def _core_shapes(self, core: str) -> list[tuple[int, ...]]:
        if core == "dense":
            return [self.ranks]
        first, second, third = self.ranks
        joint = min(self.dims[0], second * third)
        return [(1, first, joint), (joint, second, third), (third, third, 1)]

    @classmethod
    @override
    def knobs(cls, setting: float, in_features: int, out_features: int) -> dict[str, Any]:
        """The setting is the scale of the core."""
        return {"rank_scale": setting}

    @override
    def matrix(self) -> Tensor:
        return tensor_cores.multiply_ways(self._full_core(), list(self.factors)).reshape(self.out_features, self.in_features)

    @override
    def apply_factors(self, x: Tensor) -> Tensor:
        assert self._folded is not None
        return tensor_cores.apply_train(self._train(), x, self._folded)

    @property
    @override
    def factor_mult_adds(self) -> int | None:
        if self.split is None or self._folded is None:
            return None
        way = self.split.way
        dims = (math.prod(self.dims[:way]), self.dims[way], math.prod(self.dims[way + 1 :]))
        ranks = (math.prod(self.ranks[:way]), math.prod(self.ranks[way + 1 :]))
        return tensor_cores.train_mult_adds(ranks, dims, self._folded)

    @override
    def fit(self, matrix: Tensor) -> None:
        """A near core and orthonormal factors by singular value decompositions, at most √d times as far as the nearest."""
        core, factors = tensor_cores.hosvd(matrix.reshape(self.dims), self.ranks)
        pieces = [core]
        if len(self.core) > 1:
            pieces = tensor_cores.tt_svd(core, [piece.shape[-1] for piece in self.core[:-1]])
        with torch.no_grad():
            for parameter, best in zip([*self.core, *self.factors], [*pieces, *factors], strict=True):
                parameter.copy_(best)

    def _full_core(self) -> Tensor:
        return self.core[0] if len(self.core) == 1 else tensor_cores.tt_contract(list(self.core)).view(self.ranks)

    def _train(self) -> list[Tensor]:
        """The same tensor as a train of three: rows, where rows and columns meet, columns."""
        assert self.split is not None
        way, factors = self.split.way, list(self.factors)
        one = factors[0].new_ones(1, 1)
        before, after = reduce(torch.kron, factors[:way], one), reduce(torch.kron, factors[way + 1 :], one)
        core = self._full_core().reshape(before.shape[1], self.ranks[way], after.shape[1])
        return [before[None], factors[way] @ core, after.T[..., None]]


class TuckerConv1x1(Pointwise, TuckerLinear):
    """Pointwise convolution whose matrix is a small core, multiplied by a matrix in each dimension.

    Args:
        in_channels: Channels that come in.
        out_channels: Channels that go out.
        rank_scale: Sizes of the core over dimensions, in (0, 1].
        stride: Step in pixels.
        dims, core, bias, path: As in :class:`TuckerLinear`.

    Example:
        >>> TuckerConv1x1(16, 32, rank_scale=0.5, stride=2)(torch.zeros(1, 16, 8, 8)).shape
        torch.Size([1, 32, 4, 4])
    """

    slowness = 4.0  # maps are turned so that channels come last, and back (256 channels of 32 × 32, batch 16, one CPU thread)
