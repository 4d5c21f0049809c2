"""The residual networks for ImageNet on which cheap blocks are tried: torchvision's, with blocks or widths of their own."""

from typing import Any

import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet
from typing_extensions import override

from lit_compress.layers.substitution import substitute_blocks


def resnet34(block: str = "S", num_classes: int = 1000, **options: Any) -> nn.Module:
    """ResNet-34 with blocks of any kind: 21,797,672 parameters with ``"S"``, 8.1 M with ``"G(4)"``, 3.1 M with ``"G(N)"``.

    Args:
        block: Name of the blocks, as :func:`~lit_compress.layers.conv_block` takes it. Stem and shortcuts are the same in all.
        num_classes: Width of the output.
        options: Passed to :func:`torchvision.models.resnet34`, e.g. ``weights="DEFAULT"``, of which other blocks keep what stays.

    Raises:
        ValueError: If the block is unknown, or does not fit.

    Source: *Efficient machine learning under a budget* (T2), section 4.5.1 and table 4.4.

    Example:
        >>> sum(p.numel() for p in resnet34("G(N)").parameters())
        3132520
    """
    network: nn.Module = torchvision.models.resnet34(num_classes=num_classes, **options)
    return network if block == "S" else substitute_blocks(network, block)


class ResNet18Half(ResNet):  # type: ignore[misc]
    """ResNet-18-0.5: ResNet-18 whose last three groups are half as wide, 3.2 M parameters.

    Args:
        num_classes: Width of the output.

    Shape:
        - input: images ``(N, 3, H, W)``.
        - output: logits ``(N, num_classes)``.

    Source: *Efficient machine learning under a budget* (T2), table 4.4.

    Example:
        >>> import torch
        >>> ResNet18Half(num_classes=10)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__(BasicBlock, layers=[2, 2, 2, 2], num_classes=num_classes)
        self.fc = nn.Linear(256, num_classes)

    @override
    def _make_layer(self, block: Any, planes: int, blocks: int, stride: int = 1, dilate: bool = False) -> nn.Sequential:
        group: nn.Sequential = super()._make_layer(block, planes if planes == 64 else planes // 2, blocks, stride, dilate)
        return group
