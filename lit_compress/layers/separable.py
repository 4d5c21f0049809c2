"""A depthwise convolution before any pointwise transform."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lit_compress.layers.structured import Pointwise, draw


class SeparableConv2d(nn.Module):
    """A k × k convolution as a depthwise one, without bias, and a pointwise transform; nothing between.

    At initialisation, the output has the variance of a dense convolution's, if the transform's has that of a pointwise one.

    Args:
        in_channels: Channels that come in.
        out_channels: Channels that go out.
        kernel_size, stride, padding, dilation: Of the depthwise convolution, as ``nn.Conv2d`` takes them.
        bias: Whether the transform has a bias.
        transform: Makes the pointwise transform from ``(in_channels, out_channels, bias=bias)``, e.g.
            ``partial(TensorTrainConv1x1, rank_scale=0.3)``. None makes a dense one.

    Shape:
        - input: ``(N, in_channels, H, W)``.
        - output: as of ``nn.Conv2d``.

    Source: *Efficient machine learning under a budget* (T2), equation 4.4 and section 5.2.

    Example:
        >>> from functools import partial
        >>> from lit_compress.layers import HashedConv1x1
        >>> layer = SeparableConv2d(16, 32, 3, padding=1, bias=False, transform=partial(HashedConv1x1, weights=50))
        >>> layer(torch.zeros(1, 16, 8, 8)).shape, sum(p.numel() for p in layer.parameters())
        (torch.Size([1, 32, 8, 8]), 194)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        transform: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(
            in_channels, in_channels, kernel_size, stride, padding, dilation, groups=in_channels, bias=False
        )
        with torch.no_grad():
            self.depthwise.weight.copy_(draw(self.depthwise.weight.shape, 1 / self.depthwise.weight[0].numel()))
        if transform is None:
            self.pointwise: nn.Module = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=bias)
        else:
            self.pointwise = transform(in_channels, out_channels, bias=bias)

    @classmethod
    def from_dense(cls, dense: nn.Conv2d, transform: type[Pointwise] | None = None, **knobs: Any) -> SeparableConv2d:
        """The nearest separable convolution to a trained one, its pointwise part then brought into the transform's form.

        For every input channel, filters over its k × k taps are a matrix; the separable one has it of rank 1.

        Args:
            dense: Convolution of one group, padded with zeros.
            transform: Class of the pointwise transform, None for a dense one.
            knobs: What its constructor takes besides.
        """
        shared = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
        layer = cls(**{name: getattr(dense, name) for name in shared}, bias=dense.bias is not None).to(dense.weight)
        u, values, vh = torch.linalg.svd(dense.weight.detach().flatten(2).transpose(0, 1), full_matrices=False)  # (in, out, k²)
        pointwise = nn.Conv2d(dense.in_channels, dense.out_channels, kernel_size=1, bias=dense.bias is not None).to(dense.weight)
        with torch.no_grad():
            layer.depthwise.weight.copy_(vh[:, :1].view_as(layer.depthwise.weight))
            pointwise.weight.copy_((u[..., 0] * values[:, :1]).T[:, :, None, None])
            if pointwise.bias is not None and dense.bias is not None:
                pointwise.bias.copy_(dense.bias)
        layer.pointwise = pointwise if transform is None else transform.from_dense(pointwise, **knobs)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Maps to maps."""
        out: Tensor = self.pointwise(self.depthwise(x))
        return out
