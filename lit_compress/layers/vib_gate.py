"""A gate of multiplicative noise, which learns how much noise each unit can stand."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lit_compress.selection import vib

MapScale = Literal["height", "area", "one"]


class VIBGate(nn.Module):
    r"""Multiplies each channel by :math:`\mu + \varepsilon \sigma`, :math:`\varepsilon \sim N(0, 1)`.

    In training, one :math:`\varepsilon` is drawn for each sample and channel, the same at all positions of a feature map. In
    evaluation there is no noise, and channels whose noise is too large are 0. It belongs after the activation, and before
    pooling.

    Args:
        channels: Number of channels C.
        channel_dim: Dimension of the input that they lie along.
        threshold: A channel with a :math:`\log \alpha` of this or more is switched off.
        map_scale: How the penalty of a channel grows with its feature map ``(H, W)``: by ``"height"`` H, which is what the
            authors' factors come to (H·W positions, each weighted by 1/W), ``"area"`` H·W, or not at all.

    Attributes:
        mu: :math:`\mu` ``(C,)``, at first close to 1.
        log_var: :math:`\log \sigma^2` ``(C,)``, at first close to -9.

    Shape:
        - input: ``(N, ..., C, ...)`` with C in dimension ``channel_dim``.
        - output: as the input.

    Raises:
        ValueError: If there are no channels, ``map_scale`` is unknown, or the input has another number of channels.

    Source: VIBNet, section 3, and the authors' code for the initial values and the scale.

    Example:
        >>> gate = VIBGate(channels=3).eval()
        >>> gate(torch.ones(2, 3)).shape
        torch.Size([2, 3])
        >>> gate.keep.tolist()
        [0, 1, 2]
    """

    def __init__(self, channels: int, *, channel_dim: int = 1, threshold: float = 0.0, map_scale: MapScale = "height") -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"Argument `channels` must be at least 1 but got {channels}.")
        if map_scale not in ("height", "area", "one"):
            raise ValueError(f"Argument `map_scale` must be 'height', 'area' or 'one' but got {map_scale!r}.")
        self.channel_dim, self.threshold, self.map_scale = channel_dim, threshold, map_scale
        self.positions = 1  # how often the last input's penalty counts, by `map_scale`
        self.mu = nn.Parameter(torch.empty(channels))
        self.log_var = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Nearly no noise, and channels that are hardly changed: N(1, 0.01²) and N(-9, 0.01²)."""
        nn.init.normal_(self.mu, 1.0, 0.01)
        nn.init.normal_(self.log_var, -9.0, 0.01)

    @property
    def keep(self) -> Tensor:
        """Indices of the channels that are not switched off, ascending."""
        return vib.keep_units(self.mu.detach(), self.log_var.detach(), self.threshold)

    @property
    def scale(self) -> Tensor:
        """What evaluation multiplies each channel by ``(C,)``."""
        return torch.where(vib.log_alpha(self.mu, self.log_var) < self.threshold, self.mu, torch.zeros_like(self.mu))

    @override
    def forward(self, x: Tensor) -> Tensor:
        dim = self.channel_dim % x.ndim
        if x.shape[dim] != len(self.mu):
            raise ValueError(f"Expected {len(self.mu)} channels in dimension {dim} but got shape {tuple(x.shape)}.")
        self.positions = self._positions(x, dim)
        shape = [1] * x.ndim
        shape[dim] = -1
        if not self.training:
            return x * self.scale.to(x.dtype).view(shape)
        noise = torch.randn(len(x), len(self.mu), device=x.device, dtype=self.mu.dtype)
        factor = self.mu + noise * (0.5 * self.log_var).exp()
        shape[0] = len(x)
        return x * factor.to(x.dtype).view(shape)

    def penalty(self) -> Tensor:
        """Sum over the channels of :func:`~lit_compress.selection.vib.kl`, times the size of the last feature map; a scalar."""
        return self.positions * vib.kl(self.mu, self.log_var).sum()

    def _positions(self, x: Tensor, dim: int) -> int:
        """By ``map_scale``, of a map ``(N, C, H, W)``; a sequence ``(N, C, L)`` or ``(N, L, C)`` counts as one of height L."""
        size = [extent for other, extent in enumerate(x.shape) if other not in (0, dim)]
        if self.map_scale == "one" or not size:
            return 1
        return size[0] if self.map_scale == "height" else int(torch.Size(size).numel())

    @override
    def extra_repr(self) -> str:
        return f"{len(self.mu)}, threshold={self.threshold:g}"
