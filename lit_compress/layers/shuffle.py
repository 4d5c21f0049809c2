"""Linear layers made of two grouped transforms with a shuffle between: ShuffleNet's unit without nonlinearities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lit_compress.layers.fitting import fit_by_gradient
from lit_compress.layers.structured import Path, Pointwise, StructuredLinear, draw


def dividing_groups(groups: int, *widths: int) -> int:
    """The largest number of groups, at most ``groups``, that divides every width.

    Example:
        >>> dividing_groups(7, 2048, 1000, 250)
        2
    """
    return next(count for count in range(groups, 0, -1) if all(width % count == 0 for width in widths))


class ShuffleLinear(StructuredLinear):
    r"""Linear ShuffleNet: :math:`W = B_2 D P B_1`, two block-diagonal matrices, a riffle shuffle and a scale between.

    The bottleneck between the two has a quarter of ``out_features``, as in the released code (the document says of the inputs).
    There is no nonlinearity, no norm and no skip.

    Args:
        in_features: Numbers that come in.
        out_features: Numbers that go out, at least 4.
        groups: Blocks of both matrices; lowered until it divides both widths and the bottleneck.
        bias: Whether to add a bias.
        path: See :class:`~lit_compress.layers.structured.StructuredLinear`.

    Shape:
        - input: ``(*, in_features)``.
        - output: ``(*, out_features)``.

    Raises:
        ValueError: If there is no group, or the bottleneck would be empty.

    Source: Zhang et al., *ShuffleNet*, 2017; *Efficient machine learning under a budget* (T2), section 5.2.3, equation 5.13.

    Example:
        >>> layer = ShuffleLinear(64, 128, groups=4)
        >>> layer(torch.zeros(8, 64)).shape, layer.matrix_parameters  # 32 · 64 / 4 + 32 + 128 · 32 / 4
        (torch.Size([8, 128]), 1568)
    """

    kind = "shuffle"
    few_factors = True

    def __init__(self, in_features: int, out_features: int, groups: int, bias: bool = True, path: Path = "auto") -> None:
        super().__init__(in_features, out_features, bias, path)
        if groups < 1:
            raise ValueError(f"Argument `groups` must be at least 1 but got {groups}.")
        if out_features < 4:
            raise ValueError(f"A quarter of the outputs is the bottleneck, so there must be at least 4 but got {out_features}.")
        self.bottleneck = out_features // 4
        self.groups = dividing_groups(groups, in_features, out_features, self.bottleneck)
        self.contract = nn.Parameter(draw((self.bottleneck, in_features // self.groups), self.groups / in_features))
        self.scale = nn.Parameter(torch.ones(self.bottleneck))
        self.expand = nn.Parameter(draw((out_features, self.bottleneck // self.groups), self.groups / (3 * self.bottleneck)))

    @classmethod
    @override
    def knobs(cls, setting: float, in_features: int, out_features: int) -> dict[str, Any]:
        """The setting is the number of groups."""
        return {"groups": int(setting)}

    @override
    def matrix(self) -> Tensor:
        shuffled = _riffle(_blocks(self.contract, self.groups).T, self.groups).T
        return _blocks(self.expand, self.groups) @ (self.scale[:, None] * shuffled)

    @override
    def apply_factors(self, x: Tensor) -> Tensor:
        contracted = _grouped(x, self.contract, self.groups)
        return _grouped(_riffle(contracted, self.groups) * self.scale, self.expand, self.groups)

    @property
    @override
    def factor_mult_adds(self) -> int:
        return self.contract.numel() + self.scale.numel() + self.expand.numel()

    @property
    @override
    def printed_mult_adds(self) -> int:
        return self.factor_mult_adds

    @override
    def fit(self, matrix: Tensor) -> None:
        """A near matrix by gradient steps, see :func:`~lit_compress.layers.fitting.fit_by_gradient`."""
        fit_by_gradient(self, matrix)


class ShuffleConv1x1(Pointwise, ShuffleLinear):
    """Linear ShuffleNet as a pointwise convolution.

    Args:
        in_channels: Channels that come in.
        out_channels: Channels that go out, at least 4.
        groups: As in :class:`ShuffleLinear`.
        stride: Step in pixels.
        bias, path: As in :class:`ShuffleLinear`.

    Example:
        >>> ShuffleConv1x1(16, 32, groups=2, stride=2)(torch.zeros(1, 16, 8, 8)).shape
        torch.Size([1, 32, 4, 4])
    """

    @override
    def count_mult_adds(self, x: Tensor, out: Tensor, *, printed: bool = False) -> int:
        if not printed:
            return super().count_mult_adds(x, out)
        # The released code takes the step between the two grouped transforms.
        before, after = x.numel() // self.in_channels, out.numel() // self.out_channels
        return self.contract.numel() * before + (self.scale.numel() + self.expand.numel()) * after

    @override
    def apply_factors_to_maps(self, x: Tensor) -> Tensor:
        contracted = F.conv2d(x, self.contract[:, :, None, None], groups=self.groups)
        scaled = F.channel_shuffle(contracted, self.groups) * self.scale[:, None, None]
        return F.conv2d(scaled, self.expand[:, :, None, None], groups=self.groups)


class ShuffleConv2d(ShuffleConv1x1):
    """Linear ShuffleNet in place of a k × k convolution: grouped 1×1, riffle, depthwise k × k, grouped 1×1.

    Args:
        in_channels: Channels that come in.
        out_channels: Channels that go out, at least 4.
        groups: As in :class:`ShuffleLinear`.
        kernel_size, stride, padding, dilation: Of the depthwise convolution, as ``nn.Conv2d`` takes them.
        bias, path: As in :class:`ShuffleLinear`.

    Shape:
        - input: ``(N, in_channels, H, W)``.
        - output: as of ``nn.Conv2d``.

    Example:
        >>> layer = ShuffleConv2d(16, 32, groups=2, kernel_size=3, stride=2, padding=1)
        >>> layer(torch.zeros(1, 16, 8, 8)).shape, layer.to_dense().shape
        (torch.Size([1, 32, 4, 4]), torch.Size([32, 16, 3, 3]))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        groups: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        path: Path = "auto",
    ) -> None:
        super().__init__(in_channels, out_channels, groups=groups, stride=stride, bias=bias, path=path)
        self.padding = padding
        self.dilation = dilation
        self.kernel_size = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
        area = self.kernel_size[0] * self.kernel_size[1]
        self.scale = nn.Parameter(draw((self.bottleneck, 1, *self.kernel_size), 1 / area))

    @classmethod
    @override
    def _shape_of(cls, dense: nn.Module) -> dict[str, Any]:
        if not isinstance(dense, nn.Conv2d) or dense.groups != 1 or dense.padding_mode != "zeros":
            raise ValueError(f"{cls.__name__} stands for an nn.Conv2d of one group, padded with zeros, but got {dense}.")
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
        return {name: getattr(dense, name) for name in names}

    @override
    def to_dense(self) -> Tensor:
        """The kernel that ``nn.Conv2d`` would have, ``(out_channels, in_channels, *kernel_size)``, differentiable."""
        shuffled = _riffle(_blocks(self.contract, self.groups).T, self.groups).T
        kernel = self.scale.flatten(1)[:, None] * shuffled[..., None]  # (bottleneck, in, k²)
        dense = _blocks(self.expand, self.groups) @ kernel.flatten(1)
        return dense.view(self.out_channels, self.in_channels, *self.kernel_size)

    @property
    @override
    def dense_elements(self) -> int:
        return self.in_channels * self.out_channels * self.kernel_size[0] * self.kernel_size[1]

    @override
    def matrix(self) -> Tensor:
        """The kernel as a matrix ``(out_channels, in_channels · k²)``."""
        return self.to_dense().flatten(1)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Maps to maps."""
        if not self._takes_factors(x):
            kernel = self._weight().view(self.out_channels, self.in_channels, *self.kernel_size)
            return F.conv2d(x, kernel, self.bias, self.stride, self.padding, self.dilation)
        contracted = F.conv2d(x, self.contract[:, :, None, None], groups=self.groups)
        shuffled = F.channel_shuffle(contracted, self.groups)
        between = F.conv2d(shuffled, self.scale, None, self.stride, self.padding, self.dilation, groups=self.bottleneck)
        return F.conv2d(between, self.expand[:, :, None, None], self.bias, groups=self.groups)

    @override
    def count_mult_adds(self, x: Tensor, out: Tensor, *, printed: bool = False) -> int:
        if printed or self._takes_factors():
            return super().count_mult_adds(x, out, printed=True)
        return self.dense_elements * (out.numel() // self.out_channels)


def _riffle(x: Tensor, groups: int) -> Tensor:
    """Interleave equal parts of the last dimension: first of each part, then second of each, and so on."""
    parts: Tensor = x.unflatten(-1, (groups, -1))
    return parts.transpose(-1, -2).flatten(-2)


def _blocks(weight: Tensor, groups: int) -> Tensor:
    """The block-diagonal matrix of a grouped weight ``(out, in / groups)``."""
    blocks: Tensor = torch.block_diag(*weight.chunk(groups))
    return blocks


def _grouped(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """``(*, in)`` times a grouped weight ``(out, in / groups)``."""
    blocks = weight.unflatten(0, (groups, -1)).mT  # (groups, in / groups, out / groups)
    parts = torch.bmm(x.reshape(-1, groups, blocks.shape[1]).transpose(0, 1), blocks)
    return parts.transpose(0, 1).reshape(*x.shape[:-1], -1)
