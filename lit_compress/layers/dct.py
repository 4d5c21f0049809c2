"""The orthonormal discrete cosine transform (DCT-II) and its inverse, in O(N log N)."""

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
    wide, n = _wide(x), x.shape[-1]
    spectrum = torch.fft.rfft(torch.cat((wide[..., ::2], wide[..., 1::2].flip(-1)), -1)) * _twiddle(n, wide).conj()
    # The second half of the real transform is the conjugate of the first, backwards: it turns into the imaginary parts.
    out = torch.cat((spectrum.real, -spectrum.imag[..., 1 : (n + 1) // 2].flip(-1)), -1) * math.sqrt(2 / n)
    out[..., 0] *= math.sqrt(0.5)
    return out.to(x.dtype)


def idct(x: Tensor) -> Tensor:
    """Inverse of :func:`dct`, which is its transpose too: ``x @ C.T``.

    Args:
        x: ``(*, N)``.

    Example:
        >>> idct(torch.tensor([2.0, 0.0, 0.0, 0.0])).round(decimals=3)
        tensor([1., 1., 1., 1.])
    """
    wide, n = _wide(x) * math.sqrt(x.shape[-1] / 2), x.shape[-1]
    half = n // 2 + 1
    imaginary = torch.cat((torch.zeros_like(wide[..., :1]), wide[..., n - half + 1 :].flip(-1)), -1)
    real = torch.cat((wide[..., :1] * math.sqrt(2), wide[..., 1:half]), -1)
    shuffled = torch.fft.irfft(torch.complex(real, -imaginary) * _twiddle(n, wide), n=n)
    out = torch.empty_like(shuffled)
    out[..., ::2] = shuffled[..., : (n + 1) // 2]
    out[..., 1::2] = shuffled[..., (n + 1) // 2 :].flip(-1)
    return out.to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _twiddle(n: int, like: Tensor) -> Tensor:
    angles = torch.arange(n // 2 + 1, device=like.device, dtype=like.dtype) * (math.pi / (2 * n))
    return torch.polar(torch.ones_like(angles), angles)
