"""Wide residual networks: for CIFAR, pre-activated, of any block; and WRN-50-2 for ImageNet."""

from typing import Any

import torchvision
from torch import Tensor, nn

from lit_compress.layers.blocks import conv_block
from lit_compress.models.convolution import init_convolutions


class PreActBlock(nn.Module):
    """Pre-activated residual block, whose branch is a :func:`~lit_compress.layers.conv_block` of any kind.

    Where widths or size change, the shortcut is a pointwise convolution that reads the branch's first activation; otherwise it is
    the input itself.

    Args:
        in_channels: Channels that come in.
        out_channels: Channels that go out.
        stride: Step in pixels.
        block: Name of the block, e.g. ``"G(N/8)"``.

    Shape:
        - input: maps ``(N, in_channels, H, W)``.
        - output: maps ``(N, out_channels, ceil(H / stride), ceil(W / stride))``.

    Source: Zagoruyko and Komodakis, *Wide Residual Networks*, 2016.

    Example:
        >>> import torch
        >>> PreActBlock(16, 32, stride=2, block="BG(2,M)")(torch.zeros(1, 16, 8, 8)).shape
        torch.Size([1, 32, 4, 4])
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, block: str = "S") -> None:
        super().__init__()
        layers = conv_block(block, in_channels, out_channels, stride)
        self.in_channels, self.out_channels, self.stride = in_channels, out_channels, stride
        self.norm, self.relu, self.branch = layers[0], layers[1], layers[2:]
        self.shortcut = None
        if stride > 1 or in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)

    def use_block(self, block: str) -> None:
        """Put another kind of block, newly drawn, in place of the branch; the first norm and the shortcut stay.

        Raises:
            ValueError: If the block does not fit; nothing has changed then.
        """
        branch = conv_block(block, self.in_channels, self.out_channels, self.stride)[2:]
        init_convolutions(branch)
        self.branch = branch.to(next(self.norm.parameters())).train(self.training)

    def forward(self, maps: Tensor) -> Tensor:
        """The sum of branch and shortcut, not activated."""
        activated = self.relu(self.norm(maps))
        skip = maps if self.shortcut is None else self.shortcut(activated)
        out: Tensor = self.branch(activated) + skip
        return out


class WideResNet(nn.Module):
    """Wide residual network for CIFAR: WRN-40-2 has 2,243,546 parameters for 10 classes, WRN-28-10 has 36,479,194.

    A 3×3 convolution, three stages of ``(depth - 4) / 6`` blocks with ``16 · width``, ``32 · width`` and ``64 · width`` channels,
    the second and third beginning with stride 2, batch norm, ReLU, average pool, one fully connected layer. Attention transfer
    taps ``stage1``, ``stage2`` and ``stage3``.

    Args:
        depth: Layers with weights where the blocks are ``"S"``, 6n + 4: 10, 16, 22, 28, 40, …
        width: Factor k on the channels.
        num_classes: Width of the output.
        block: Name of the blocks, as :func:`~lit_compress.layers.conv_block` takes it. Stem and shortcuts are the same in all.
        in_channels: Channels of an image.

    Shape:
        - input: images ``(N, in_channels, H, W)``, any H and W.
        - output: logits ``(N, num_classes)``.

    Raises:
        ValueError: If the depth is not 6n + 4 with n at least 1, the width is below 1, or the block does not fit.

    Source: Zagoruyko and Komodakis, 2016; *Efficient machine learning under a budget* (T2), section 4.4.1 and table 4.3.

    Example:
        >>> import torch
        >>> WideResNet(depth=10, width=1, block="G(N)")(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, depth: int = 40, width: int = 2, num_classes: int = 10, block: str = "S", in_channels: int = 3) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        if blocks < 1 or rest:
            raise ValueError(f"Argument `depth` must be 6n + 4 (10, 16, 22, 28, 40, …) but got {depth}.")
        if width < 1:
            raise ValueError(f"Argument `width` must be at least 1 but got {width}.")
        self.conv = nn.Conv2d(in_channels, 16, kernel_size=3, padding=1, bias=False)
        self.stage1 = preact_stage(blocks, 16, 16 * width, 1, block)
        self.stage2 = preact_stage(blocks, 16 * width, 32 * width, 2, block)
        self.stage3 = preact_stage(blocks, 32 * width, 64 * width, 2, block)
        self.norm = nn.BatchNorm2d(64 * width)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(64 * width, num_classes)
        init_convolutions(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch."""
        maps = self.stage3(self.stage2(self.stage1(self.conv(images))))
        logits: Tensor = self.fc(self.relu(self.norm(maps)).mean((2, 3)))
        return logits


def wide_resnet50_2(num_classes: int = 1000, **options: Any) -> nn.Module:
    """WRN-50-2 for ImageNet, 68,883,240 parameters: torchvision's ResNet-50 with bottlenecks twice as wide.

    Args:
        num_classes: Width of the output.
        options: Passed to :func:`torchvision.models.wide_resnet50_2`, e.g. ``weights="DEFAULT"``.
    """
    network: nn.Module = torchvision.models.wide_resnet50_2(num_classes=num_classes, **options)
    return network


def preact_stage(blocks: int, in_channels: int, out_channels: int, stride: int, block: str) -> nn.Sequential:
    """Blocks of one width one after the other, of which the first has the stride."""
    first = PreActBlock(in_channels, out_channels, stride, block)
    return nn.Sequential(first, *(PreActBlock(out_channels, out_channels, 1, block) for _ in range(blocks - 1)))
