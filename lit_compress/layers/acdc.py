"""Linear layers made of diagonals, cosine transforms and riffle shuffles."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from typing_extensions import override

from lit_compress.layers.dct import dct, filter_spectrum, from_spectrum, idct, spectrum
from lit_compress.layers.fitting import fit_by_gradient
from lit_compress.layers.structured import Path, Pointwise, StructuredLinear

# Up to this width, multiplying by the cosines is quicker than the Fourier transform (CPU, one thread, as many rows as columns).
_COSINES_UP_TO = 256


class ACDCLinear(StructuredLinear):
    r"""Linear layer :math:`W = \prod_l A_l C D_l C^{-1} P`: two diagonals a factor, the cosine transform, the riffle shuffle.

    ``2 · layers · N`` parameters for the matrix, where N is the larger width. ``C`` is the orthonormal DCT-II whose columns are
    the cosines, ``C[i, k] ∝ cos(π (2i + 1) k / 2N)``, and ``P`` splits what it is applied to in half and interleaves the halves.
    The product itself is square. A wider output reads the input over and over; a narrower one sums consecutive groups of
    outputs, after zeros have been added to the input until it divides.

    In training the matrix is computed, and for the backward pass computed again in pieces: what is kept meanwhile are the
    diagonals. First derivatives only.

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
        rows = torch.eye(self.width, device=self.a.device, dtype=self.a.dtype)
        if self.width > self.out_features:
            rows = rows.view(self.out_features, -1, self.width).sum(1)
        product: Tensor = _Product.apply(rows, self.a, self.d, self)
        if self.in_features >= self.width:
            return product
        if self.width > self.out_features:
            return product[:, : self.in_features]
        places = torch.arange(self.width, device=product.device) % self.in_features
        return product.new_zeros(len(product), self.in_features).index_add(1, places, product)

    @override
    def apply_factors(self, x: Tensor) -> Tensor:
        if self.width > self.in_features:
            if self.width > self.out_features:
                x = F.pad(x, (0, self.width - self.in_features))
            else:
                x = x[..., torch.arange(self.width, device=x.device) % self.in_features]
        for a, d in reversed(list(zip(self.a, self.d, strict=True))):
            x = x.index_select(-1, self.interleave)
            x = self.idct((self.dct(x) * d).index_select(-1, self.interleave)) * a if self.legacy else self.filter(x, d) * a
        return x.unflatten(-1, (self.out_features, -1)).sum(-1) if self.width > self.out_features else x

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

    def filter(self, x: Tensor, d: Tensor) -> Tensor:
        """``x @ C D C⁻¹``, a symmetric matrix; the diagonal is applied to the transform in the halves that it comes in."""
        if self.cosines is None:
            return from_spectrum(filter_spectrum(spectrum(x), d), self.width).to(x.dtype)
        return self.idct(self.dct(x) * d)


class _Product(torch.autograd.Function):
    """Rows times all factors. Keeps the diagonals alone; the backward pass holds about 2 √L matrices."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, a: Tensor, d: Tensor, layer: ACDCLinear) -> Tensor:
        ctx.save_for_backward(rows, a, d)
        ctx.layer = layer
        for factor in zip(a, d, strict=True):
            rows = _times(rows, *factor, layer)
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor, None]:
        rows, a, d = ctx.saved_tensors
        layer: ACDCLinear = ctx.layer
        grad_a, grad_d = torch.empty_like(a), torch.empty_like(d)
        stride = math.isqrt(len(a) - 1) + 1
        starts = [rows]  # the product before every stride-th factor
        for factor in range((len(a) - 1) // stride * stride):
            rows = _times(rows, a[factor], d[factor], layer)
            if (factor + 1) % stride == 0:
                starts.append(rows)
        for first in reversed(range(0, len(a), stride)):
            befores = [starts.pop()]
            for factor in range(first, min(first + stride, len(a)) - 1):
                befores.append(_times(befores[-1], a[factor], d[factor], layer))
            for factor in reversed(range(first, first + len(befores))):
                grad, grad_a[factor], grad_d[factor] = _backward(befores.pop(), a[factor], d[factor], grad, layer)
        return None, grad_a, grad_d, None


def _times(rows: Tensor, a: Tensor, d: Tensor, layer: ACDCLinear) -> Tensor:
    """``rows A C D C⁻¹ P``, with ``P`` before ``D`` too in a legacy layer."""
    filtered = layer.idct(layer.dct(rows * a).index_select(-1, layer.riffle) * d) if layer.legacy else layer.filter(rows * a, d)
    return filtered.index_select(-1, layer.riffle)


def _backward(rows: Tensor, a: Tensor, d: Tensor, grad: Tensor, layer: ACDCLinear) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`_times` for its first three arguments. A transform's transpose is the other one."""
    grad = grad.index_select(-1, layer.interleave)
    if layer.cosines is None and not layer.legacy:
        mixed, grad_mixed = spectrum(rows * a), spectrum(grad)
        grad_d = _pair_up(mixed, grad_mixed, layer.width)
        grad = from_spectrum(filter_spectrum(grad_mixed, d), layer.width)
    else:
        mixed, grad_mixed = layer.dct(rows * a), layer.dct(grad)
        if layer.legacy:
            mixed = mixed[:, layer.riffle]
        grad_d = (grad_mixed * mixed).sum(0)
        grad = grad_mixed * d
        grad = layer.idct(grad[:, layer.interleave] if layer.legacy else grad)
    return grad * a, (grad * rows).sum(0), grad_d


def _pair_up(one: Tensor, other: Tensor, width: int) -> Tensor:
    """Sum over rows of the products of two cosine transforms, entry by entry, from their spectra."""
    products = (torch.view_as_real(one) * torch.view_as_real(other)).sum(0) * (2 / width)
    total = torch.cat((products[:, 0], products[1 : (width + 1) // 2, 1].flip(0)))
    total[0] /= 2
    return total


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
