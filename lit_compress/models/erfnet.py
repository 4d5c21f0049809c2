"""ERFNet: segmentation with residual blocks of factorised convolutions."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_compress.layers.blocks import conv_block

_EPSILON = 1e-3  # of every batch norm, as in the released code


class Downsampler(nn.Module):
    """Half the resolution: a 3×3 convolution of stride 2 beside a max pool, one after the other in the channels.

    Args:
        in_channels: Channels that come in, and that the pool gives.
        out_channels: Channels that go out; the convolution gives those that the pool does not.

    Shape:
        - input: maps ``(N, in_channels, H, W)``, H and W even.
        - output: maps ``(N, out_channels, H / 2, W / 2)``.

    Raises:
        ValueError: If no more channels go out than come in.

    Source: Romera et al., *ERFNet*, 2017, section III; after Paszke et al., *ENet*, 2016.

    Example:
        >>> Downsampler(3, 16)(torch.zeros(1, 3, 8, 6)).shape
        torch.Size([1, 16, 4, 3])
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        if out_channels <= in_channels:
            raise ValueError(f"A downsampler must widen but got {in_channels} channels in and {out_channels} out.")
        self.conv = nn.Conv2d(in_channels, out_channels - in_channels, kernel_size=3, stride=2, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.bn = nn.BatchNorm2d(out_channels, eps=_EPSILON)
        self.relu = nn.ReLU()

    def forward(self, maps: Tensor) -> Tensor:
        """Maps of half the resolution."""
        out: Tensor = self.relu(self.bn(torch.cat([self.conv(maps), self.pool(maps)], 1)))
        return out


class Upsampler(nn.Sequential):
    """Double the resolution by a transposed 3×3 convolution, batch norm and ReLU.

    Args:
        in_channels: Channels that come in.
        out_channels: Channels that go out.

    Shape:
        - input: maps ``(N, in_channels, H, W)``.
        - output: maps ``(N, out_channels, 2 H, 2 W)``.

    Source: Romera et al., *ERFNet*, 2017, section III.

    Example:
        >>> Upsampler(4, 2)(torch.zeros(1, 4, 3, 5)).shape
        torch.Size([1, 2, 6, 10])
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        conv = nn.ConvTranspose2d(in_channels, out_channels, kernel_size=3, stride=2, padding=1, output_padding=1)
        super().__init__(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_channels, eps=_EPSILON), relu=nn.ReLU()))


class CheapBlock(nn.Module):
    """A block of :func:`~lit_compress.layers.conv_block` in the place of a :class:`FactorizedBlock`, batch norm and ReLU after.

    Args:
        block: Name of the block, e.g. ``"G(N)"``.
        channels: Channels throughout.
        dilation: Of the second convolution, or of the only one of a bottleneck.
        dropout: Probability that a channel of the branch is zeroed.

    Shape:
        - input, output: maps ``(N, channels, H, W)``.

    Source: *Efficient machine learning under a budget* (T2), section 4.5.2.

    Example:
        >>> CheapBlock("G(N)", 4, dilation=2, dropout=0.3)(torch.zeros(1, 4, 6, 6)).shape
        torch.Size([1, 4, 6, 6])
    """

    def __init__(self, block: str, channels: int, dilation: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.branch = conv_block(block, channels, channels, dilation=(1, dilation), activation="post")
        self.branch.append(nn.Dropout2d(dropout))
        for module in self.branch.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = _EPSILON
        self.relu = nn.ReLU()

    def forward(self, maps: Tensor) -> Tensor:
        """The maps after the sum and its ReLU."""
        out: Tensor = self.relu(self.branch(maps) + maps)
        return out


class FactorizedBlock(nn.Module):
    """Non-bottleneck-1D: two 3×3 convolutions, each a 3×1 and a 1×3 one, added to the input; the second pair is dilated.

    Args:
        channels: Channels throughout.
        dilation: Of the second pair.
        dropout: Probability that a channel of the branch is zeroed.

    Shape:
        - input, output: maps ``(N, channels, H, W)``.

    Source: Romera et al., *ERFNet*, 2017, figure 2(c).

    Example:
        >>> FactorizedBlock(4, dilation=2, dropout=0.3)(torch.zeros(1, 4, 6, 6)).shape
        torch.Size([1, 4, 6, 6])
    """

    def __init__(self, channels: int, dilation: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            OrderedDict[str, nn.Module](
                conv1_rows=nn.Conv2d(channels, channels, (3, 1), padding=(1, 0)),
                relu1=nn.ReLU(),
                conv1_columns=nn.Conv2d(channels, channels, (1, 3), padding=(0, 1)),
                bn1=nn.BatchNorm2d(channels, eps=_EPSILON),
                relu2=nn.ReLU(),
                conv2_rows=nn.Conv2d(channels, channels, (3, 1), padding=(dilation, 0), dilation=(dilation, 1)),
                relu3=nn.ReLU(),
                conv2_columns=nn.Conv2d(channels, channels, (1, 3), padding=(0, dilation), dilation=(1, dilation)),
                bn2=nn.BatchNorm2d(channels, eps=_EPSILON),
                dropout=nn.Dropout2d(dropout),
            )
        )
        self.relu = nn.ReLU()

    def forward(self, maps: Tensor) -> Tensor:
        """The maps after the sum and its ReLU."""
        out: Tensor = self.relu(self.branch(maps) + maps)
        return out


class ERFNet(nn.Module):
    """ERFNet: 2.06 million parameters for 20 classes at full width, 0.49 million with ``block="G(N)"``.

    The layers are called ``layer1`` to ``layer23`` as the paper's table numbers them: 1 to 16 are the encoder, and attention is
    transferred at 7, 12, 16, 19 and 22.

    Args:
        num_classes: Classes of a pixel.
        in_channels: Channels of an image.
        width: Factor on the 16, 64 and 128 channels inside; below 1 for a thinner student.
        block: Name of cheap blocks in the place of the factorised ones, as :func:`~lit_compress.layers.conv_block` takes it.

    Shape:
        - input: images ``(N, in_channels, H, W)``, any H and W; other than multiples of 8 are padded, and the output cropped.
        - output: logits ``(N, num_classes, H, W)``.

    Raises:
        ValueError: If the width leaves the first layer too few channels, or the block is unknown or does not fit.

    Source: Romera et al., *ERFNet: Efficient Residual Factorized ConvNet for Real-Time Semantic Segmentation*, 2017, table I; the
    segmentation teacher of the thesis on efficient learning under a budget, section 4.5.2, and with ``"G(N)"`` its student.

    Example:
        >>> ERFNet(num_classes=11, width=0.25)(torch.zeros(1, 3, 30, 40)).shape
        torch.Size([1, 11, 30, 40])
    """

    def __init__(self, num_classes: int = 20, in_channels: int = 3, width: float = 1.0, block: str = "factorized") -> None:
        super().__init__()
        residual = FactorizedBlock if block == "factorized" else partial(CheapBlock, block)
        narrow, middle, wide = (round(channels * width) for channels in (16, 64, 128))
        if not in_channels < narrow < middle < wide:
            raise ValueError(
                f"Argument `width` must leave the first layer more channels than the {in_channels} of an image but {width} gives "
                f"{narrow} of 16."
            )
        layers: list[nn.Module] = [
            Downsampler(in_channels, narrow),
            Downsampler(narrow, middle),
            *(residual(middle, dropout=0.03) for _ in range(5)),
            Downsampler(middle, wide),
            *(residual(wide, dilation, dropout=0.3) for dilation in (2, 4, 8, 16) * 2),
            Upsampler(wide, middle),
            *(residual(middle) for _ in range(2)),
            Upsampler(middle, narrow),
            *(residual(narrow) for _ in range(2)),
            nn.ConvTranspose2d(narrow, num_classes, kernel_size=2, stride=2),
        ]
        for number, layer in enumerate(layers, start=1):
            self.add_module(f"layer{number}", layer)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of every pixel."""
        height, width = images.shape[2:]
        maps = F.pad(images, (0, -width % 8, 0, -height % 8))
        for layer in self.children():
            maps = layer(maps)
        return maps[:, :, :height, :width]
