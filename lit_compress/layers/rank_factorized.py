"""Linear layers whose matrix is a product of two thin ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lit_compress.layers.structured import Path, Pointwise, StructuredLinear


class RankFactorizedLinear(StructuredLinear):
    r"""Linear layer of limited rank, :math:`W = W_2 W_1`, without a nonlinearity between.

    ``rank · (in_features + out_features)`` parameters for the matrix. As long as that is less than the elements of the matrix,
    the factorized path is taken in training too.

    Args:
        in_features: Numbers that come in.
        out_features: Numbers that go out.
        rank: Width of the bottleneck.
        bias: Whether to add a bias.
        path: See :class:`~lit_compress.layers.structured.StructuredLinear`.

    Shape:
        - input: ``(*, in_features)``.
        - output: ``(*, out_features)``.

    Raises:
        ValueError: If the rank is below 1.

    Source: *Efficient machine learning under a budget* (T2), section 5.2.3, equation 5.2.

    Example:
        >>> layer = RankFactorizedLinear(64, 32, rank=4)
        >>> layer(torch.zeros(8, 64)).shape, layer.matrix_parameters
        (torch.Size([8, 32]), 384)
    """

    kind = "rank_factorized"
    few_factors = True

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True, path: Path = "auto") -> None:
        super().__init__(in_features, out_features, bias, path)
        if rank < 1:
            raise ValueError(f"Argument `rank` must be at least 1 but got {rank}.")
        self.rank = rank
        self.first = nn.Parameter(torch.empty(rank, in_features))
        self.second = nn.Parameter(torch.empty(out_features, rank))
        nn.init.uniform_(self.first, -1, 1)
        nn.init.uniform_(self.second, -1, 1)
        with torch.no_grad():
            # tr(W1ᵀ W2ᵀ W2 W1), without the matrix itself
            energy = ((self.second.T @ self.second) * (self.first @ self.first.T)).sum()
            scale = (out_features / 3 / energy) ** 0.25
            self.first.mul_(scale)
            self.second.mul_(scale)

    @classmethod
    @override
    def knobs(cls, setting: float, in_features: int, out_features: int) -> dict[str, Any]:
        """Rank ``setting`` of the larger width, rounded down, at least 1."""
        return {"rank": max(1, int(setting * max(in_features, out_features)))}

    @override
    def matrix(self) -> Tensor:
        return self.second @ self.first

    @override
    def apply_factors(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.first), self.second)

    @property
    @override
    def factor_mult_adds(self) -> int:
        return self.rank * (self.in_features + self.out_features)

    @property
    @override
    def printed_mult_adds(self) -> int:
        return self.factor_mult_adds

    @override
    def fit(self, matrix: Tensor) -> None:
        """Nearest matrix of this rank: the leading singular vectors, each factor scaled by the roots of the values.

        Where the rank exceeds the smaller width, the rest stays zero.
        """
        u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
        keep = min(self.rank, len(values))
        roots = values[:keep].sqrt()
        with torch.no_grad():
            self.first.zero_()[:keep] = roots[:, None] * vh[:keep]
            self.second.zero_()[:, :keep] = u[:, :keep] * roots


class RankFactorizedConv1x1(Pointwise, RankFactorizedLinear):
    """Pointwise convolution of limited rank: two pointwise convolutions, the stride on the first.

    Args:
        in_channels: Channels that come in.
        out_channels: Channels that go out.
        rank: Channels between.
        stride: Step in pixels.
        bias, path: As in :class:`RankFactorizedLinear`.

    Example:
        >>> RankFactorizedConv1x1(16, 32, rank=4, stride=2)(torch.zeros(1, 16, 8, 8)).shape
        torch.Size([1, 32, 4, 4])
    """

    @override
    def apply_factors_to_maps(self, x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, self.first[:, :, None, None]), self.second[:, :, None, None])
