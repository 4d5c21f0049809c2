"""Linear layers made of diagonals, cosine transforms and riffle shuffles."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from typing_extensions import override

from lit_compress.layers.dct import CosineFilters, dct, idct
from lit_compress.layers.fitting import fit_by_gradient
from lit_compress.layers.structured import Path, Pointwise, StructuredLinear

# Up to this width, evaluation multiplies by the cosines, which exports as what it is.
_COSINES_UP_TO = 256
_AT_ONCE = 2**16  # numbers that go through all factors at once


class ACDCLinear(StructuredLinear):
    r"""Linear layer :math:`W = \prod_l A_l C D_l C^{-1} P`: two diagonals a factor, the cosine transform, the riffle shuffle.

    ``2 · layers · N`` parameters for the matrix, where N is the larger width. ``C`` is the orthonormal DCT-II whose columns are
    the cosines, ``C[i, k] ∝ cos(π (2i + 1) k / 2N)``, and ``P`` splits what it is applied to in half and interleaves the halves.
    The product itself is square. A wider output reads the input over and over; a narrower one sums consecutive groups of
    outputs, after zeros have been added to the input until it divides.

    In training the factors are applied to the inputs, or, where these are more than the matrix has rows or columns, to the
    identity, which gives the matrix. For the backward pass all of it is computed again, a few rows at a time: what is kept
    meanwhile are the rows that came in and the diagonals. First derivatives only.

    Args:
        in_features: Numbers that come in.
        out_features: Numbers that go out.
        layers: Factors L.
        bias: Whether to add a bias.
        legacy: The released order ``A C P D C⁻¹ P``, and one factor less than ``layers``.
        path: See :class:`~lit_compress.layers.structured.StructuredLinear`.

    Shape:
        - input: ``(*, in_features)``.
        - output: ``(*, out_features)``.

    Raises:
        ValueError: If there is no factor.

    Source: Moczulski et al., *ACDC: A Structured Efficient Linear Layer*, 2015; *Efficient machine learning under a budget* (T2),
    section 5.2.3, equation 5.4.

    Example:
        >>> layer = ACDCLinear(64, 128, layers=3)
        >>> layer(torch.zeros(8, 64)).shape, layer.matrix_parameters
        (torch.Size([8, 128]), 768)
    """

    kind = "acdc"
    slowness = 12.0  # transforms wait for memory (1024 to 1024 numbers, batches of 1024, one CPU thread)

    riffle: Tensor
    interleave: Tensor
    cosines: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        layers: int,
        bias: bool = True,
        legacy: bool = False,
        path: Path = "auto",
    ) -> None:
        super().__init__(in_features, out_features, bias, path)
        if layers < 1 + legacy:
            raise ValueError(f"Argument `layers` must be at least {1 + legacy} but got {layers}.")
        self.layers = layers - legacy
        self.legacy = legacy
        self.width = out_features * math.ceil(in_features / out_features)
        self.a = nn.Parameter(torch.empty(self.layers, self.width))
        self.d = nn.Parameter(torch.empty(self.layers, self.width))
        places = torch.arange(self.width)
        # As a matrix on columns P interleaves halves; on rows, the even places come first.
        riffle = torch.cat((places[::2], places[1::2]))
        self.register_buffer("riffle", riffle, persistent=False)
        self.register_buffer("interleave", riffle.argsort(), persistent=False)
        cosines = dct(torch.eye(self.width, dtype=torch.float64)).to(self.a.dtype) if self.width <= _COSINES_UP_TO else None
        self.register_buffer("cosines", cosines, persistent=False)
        # A factor scales the energy of its input by E[a²] E[d²]; repetition adds energy, sums of groups keep it.
        scale = (min(1.0, out_features / in_features) / 3) ** (1 / (4 * self.layers))
        nn.init.normal_(self.a, scale, 0.01 * scale)
        nn.init.normal_(self.d, scale, 0.01 * scale)

    @classmethod
    @override
    def knobs(cls, setting: float, in_features: int, out_features: int) -> dict[str, Any]:
        """The setting is the number of factors."""
        return {"layers": int(setting)}

    @override
    def matrix(self) -> Tensor:
        if self.a.is_meta:  # a search for a size asks for hundreds of factors
            return self.a.new_empty(self.out_features, self.in_features)
        if self.in_features < self.out_features or not self._recomputes():
            return self.apply_factors(torch.eye(self.in_features, device=self.a.device, dtype=self.a.dtype)).T
        # Rows that are summed after all factors may as well be summed before them.
        matrix: Tensor = _Filtered.apply(self.out_features, self.a, self.d, self.riffle)
        return matrix[:, : self.in_features]

    @override
    def apply_factors(self, x: Tensor) -> Tensor:
        if self.width > self.in_features:
            if self.width > self.out_features:
                x = F.pad(x, (0, self.width - self.in_features))
            else:
                x = x[..., torch.arange(self.width, device=x.device) % self.in_features]
        if self._recomputes():
            x = self._before(x.to(self.a.dtype).reshape(-1, self.width)).view(x.shape).to(x.dtype)
        else:
            for a, d in reversed(list(zip(self.a, self.d, strict=True))):
                mixed = self.dct(x.index_select(-1, self.interleave)) * d
                x = self.idct(mixed.index_select(-1, self.interleave) if self.legacy else mixed) * a
        return x.unflatten(-1, (self.out_features, -1)).sum(-1) if self.width > self.out_features else x

    @override
    def _fewer_rows(self, x: Tensor) -> bool:
        if self.legacy or torch.is_autocast_enabled(x.device.type):  # of which a dense product alone gains
            return False
        return x.numel() // self.in_features <= min(self.in_features, self.out_features)

    def _recomputes(self) -> bool:
        return torch.is_grad_enabled() and not self.legacy

    def _before(self, rows: Tensor) -> Tensor:
        """``rows (R, width)`` times the transpose of the square product: the factors backwards, each of them backwards."""
        a = torch.cat((torch.ones_like(self.a[:1]), self.a[1:].flip(0).index_select(1, self.interleave)))
        out: Tensor = _Filtered.apply(rows.index_select(1, self.interleave), a, self.d.flip(0), self.interleave)
        return out.index_select(1, self.riffle) * self.a[0]

    @property
    @override
    def factor_mult_adds(self) -> int:
        return self.layers * math.ceil(self.width * (4 + 5 * math.log2(self.width)))

    @property
    @override
    def printed_mult_adds(self) -> int:
        return self.factor_mult_adds

    @override
    def fit(self, matrix: Tensor) -> None:
        """A near matrix by gradient steps, see :func:`~lit_compress.layers.fitting.fit_by_gradient`."""
        fit_by_gradient(self, matrix)

    def dct(self, x: Tensor) -> Tensor:
        """Cosine transform of the last dimension, ``x @ C``."""
        return dct(x) if self.cosines is None else x @ self.cosines.to(x.dtype)

    def idct(self, x: Tensor) -> Tensor:
        """Inverse transform of the last dimension, ``x @ C⁻¹``."""
        return idct(x) if self.cosines is None else x @ self.cosines.T.to(x.dtype)


class _Filtered(torch.autograd.Function):
    """Rows that are scaled, filtered and reordered, again and again. Keeps what it is given alone.

    A number in place of rows stands for as many that sum consecutive groups: the identity, where they are as many as the width.
    """

    @staticmethod
    def forward(ctx: Any, given: Tensor | int, a: Tensor, d: Tensor, reorder: Tensor) -> Tensor:
        ctx.given = given if isinstance(given, int) else None
        ctx.save_for_backward(a, d, reorder, *([] if isinstance(given, int) else [given]))
        rows = _sums(given, a) if isinstance(given, int) else given
        filters = CosineFilters(rows)
        scales, a, between = filters.scales(d), a[:, filters.order], filters.back[reorder[filters.order]]
        out = torch.empty_like(rows)
        for piece, result in zip(*_pieces(rows, out), strict=True):
            piece = piece.index_select(1, filters.order)
            for factor in range(len(a)):
                spectra = filters.spectra(piece.mul_(a[factor]))
                torch.index_select(filters.rows(spectra, scales[factor]), 1, between, out=piece)
            torch.index_select(piece, 1, filters.back, out=result)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        a, d, reorder, *given = ctx.saved_tensors
        rows = given[0] if given else _sums(ctx.given, a)
        filters = CosineFilters(rows)
        scales, a, between = filters.scales(d), a[:, filters.order], filters.back[reorder[filters.order]]
        back = between.argsort()
        grad_rows, grad_a, grad_d = torch.empty_like(rows), torch.zeros_like(a), torch.zeros_like(d)
        for piece, above, result in zip(*_pieces(rows, grad, grad_rows), strict=True):
            befores, mixed = [piece.index_select(1, filters.order)], []
            for factor in range(len(a)):
                mixed.append(filters.spectra(befores[-1] * a[factor]))
                if factor + 1 < len(a):
                    befores.append(filters.rows(mixed[-1].clone(), scales[factor]).index_select(1, between))
            above = above.index_select(1, filters.order)
            for factor in reversed(range(len(a))):
                spectra = filters.spectra(torch.index_select(above, 1, back))
                grad_d[factor] += filters.products(mixed.pop(), spectra)
                above = filters.rows(spectra, scales[factor])  # a filter is symmetric
                grad_a[factor] += (above * befores.pop()).sum(0)
                above.mul_(a[factor])
            torch.index_select(above, 1, filters.back, out=result)
        return grad_rows if given else None, grad_a[:, filters.back], grad_d, None


def _sums(count: int, like: Tensor) -> Tensor:
    """Rows ``(count, width)``, of which each sums a group of consecutive numbers."""
    return torch.eye(count, device=like.device, dtype=like.dtype).repeat_interleave(like.shape[1] // count, dim=1)


def _pieces(*all_rows: Tensor) -> list[tuple[Tensor, ...]]:
    """Pieces of the same rows of several tensors, small enough for a processor's cache."""
    return [rows.split(max(1, _AT_ONCE // rows.shape[1])) for rows in all_rows]


class ACDCConv1x1(Pointwise, ACDCLinear):
    """Pointwise convolution made of diagonals, cosine transforms and riffle shuffles.

    Args:
        in_channels: Channels that come in.
        out_channels: Channels that go out.
        layers: Factors.
        stride: Step in pixels.
        bias, legacy, path: As in :class:`ACDCLinear`.

    Example:
        >>> ACDCConv1x1(16, 32, layers=2, stride=2)(torch.zeros(1, 16, 8, 8)).shape
        torch.Size([1, 32, 4, 4])
    """
