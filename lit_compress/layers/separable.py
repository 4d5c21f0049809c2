"""A depthwise convolution before any pointwise transform."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lit_compress.layers.structured import draw


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

    def forward(self, x: Tensor) -> Tensor:
        """Maps to maps."""
        out: Tensor = self.pointwise(self.depthwise(x))
        return out
