"""The orthonormal discrete cosine transform (DCT-II), its inverse, and filters between them, in O(N log N)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def dct(x: Tensor) -> Tensor:
    r"""Cosine transform of the last dimension, :math:`X_k = c_k \sum_i x_i \cos\frac{\pi (2i + 1) k}{2N}`, orthonormal.

    Args:
        x: ``(*, N)``. Half precision is computed in float32.

    Returns:
        ``(*, N)`` in the dtype of ``x``; as a product, ``x @ C`` with :math:`C^{-1} = C^\top`.

    Source: Makhoul, *A Fast Cosine Transform in One and Two Dimensions*, 1980: even samples, then odd ones backwards, through one
    real Fourier transform.

    Example:
        >>> dct(torch.ones(4)).round(decimals=3).abs()
        tensor([2., 0., 0., 0.])
    """
    n, half = x.shape[-1], spectrum(x)
    # The second half of the transform is in the imaginary parts of the first, backwards.
    out = torch.cat((half.real, -half.imag[..., 1 : (n + 1) // 2].flip(-1)), -1)
    return (out * _norms(n, out)).to(x.dtype)


def idct(x: Tensor) -> Tensor:
    """Inverse of :func:`dct`, which is its transpose too: ``x @ C.T``.

    Args:
        x: ``(*, N)``.

    Example:
        >>> idct(torch.tensor([2.0, 0.0, 0.0, 0.0])).round(decimals=3)
        tensor([1., 1., 1., 1.])
    """
    n = x.shape[-1]
    wide = _wide(x)
    wide = wide / _norms(n, wide)
    mirrored = torch.cat((torch.zeros_like(wide[..., :1]), wide[..., n - n // 2 :].flip(-1)), -1)
    return from_spectrum(torch.complex(wide[..., : n // 2 + 1], -mirrored), n).to(x.dtype)


def spectrum(x: Tensor) -> Tensor:
    """What holds the cosine transform without its norms: real parts are entries ``k``, negative imaginary ones ``N - k``.

    Args:
        x: ``(*, N)``.

    Returns:
        Complex, ``(*, N // 2 + 1)``.
    """
    half: Tensor = torch.fft.rfft(_wide(x).index_select(-1, _fold(x)))
    return half * _twiddle(x).conj()


def from_spectrum(half: Tensor, n: int) -> Tensor:
    """Inverse of :func:`spectrum`, ``(*, n)``."""
    folded: Tensor = torch.fft.irfft(half * _twiddle(half.real, n), n=n)
    places = torch.arange(n, device=folded.device)
    return folded.index_select(-1, torch.where(places % 2 == 0, places // 2, n - 1 - places // 2))


class CosineFilters:
    """Filters ``x C D C⁻¹``, for rows that stay in the order which the Fourier transform wants between one and the next.

    Args:
        like: Rows ``(R, N)``, for their length, device and dtype.

    Attributes:
        order: Places ``(N,)`` of a plain row in the order used here: even samples, then odd ones backwards.
        back: Places in that order of a plain row.
    """

    def __init__(self, like: Tensor) -> None:
        self.n = like.shape[-1]
        self.order = _fold(like)
        self.back = self.order.argsort()
        self._twiddle = _twiddle(like)
        self._untwiddle = self._twiddle.conj().resolve_conj()

    def spectra(self, rows: Tensor) -> Tensor:
        """:func:`spectrum` of ordered rows, complex ``(R, N // 2 + 1)``."""
        half: Tensor = torch.fft.rfft(rows)
        return half.mul_(self._untwiddle)

    def scales(self, d: Tensor) -> Tensor:
        """What multiplies spectra, real parts and imaginary ones in turn, for diagonals ``(*, N)`` of D."""
        places = torch.arange(self.n // 2 + 1, device=d.device)
        return torch.stack((d[..., places], d[..., -places % self.n]), -1).flatten(-2)

    def rows(self, spectra: Tensor, scales: Tensor) -> Tensor:
        """The ordered rows whose spectra these are, once scaled; they are overwritten."""
        torch.view_as_real(spectra).flatten(1).mul_(scales)
        rows: Tensor = torch.fft.irfft(spectra.mul_(self._twiddle), n=self.n)
        return rows

    def products(self, one: Tensor, other: Tensor) -> Tensor:
        """Sum over rows of the products of two cosine transforms, ``(N,)``, from their spectra."""
        products = (torch.view_as_real(one) * torch.view_as_real(other)).sum(0) * (2 / self.n)
        total = torch.cat((products[:, 0], products[1 : (self.n + 1) // 2, 1].flip(0)))
        total[0] /= 2
        return total


def _fold(x: Tensor) -> Tensor:
    """Places of the even samples, then of the odd ones backwards."""
    places = torch.arange(x.shape[-1], device=x.device)
    return torch.cat((places[::2], places[1::2].flip(0)))


def _norms(n: int, like: Tensor) -> Tensor:
    norms = torch.full((n,), math.sqrt(2 / n), device=like.device, dtype=like.dtype)
    norms[0] = math.sqrt(1 / n)
    return norms


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _twiddle(x: Tensor, n: int | None = None) -> Tensor:
    n = x.shape[-1] if n is None else n
    angles = torch.arange(n // 2 + 1, device=x.device, dtype=_wide(x[..., :0]).dtype) * (math.pi / (2 * n))
    return torch.polar(torch.ones_like(angles), angles)
