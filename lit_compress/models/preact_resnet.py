"""Pre-activation residual networks for images of ImageNet's size."""

from __future__ import annotations

from torch import Tensor, nn

from lit_compress.models.convolution import ConvolutionalNetwork, init_convolutions
from lit_compress.models.wide_resnet import preact_stage

_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3), 200: (3, 24, 36, 3)}


class PreActResNet(ConvolutionalNetwork):
    """Residual network whose norms and ReLUs stand before the convolutions: 64.7 M parameters at depth 200, for 1000 classes.

    A 7×7 convolution of stride 2 with batch norm and ReLU, a max-pool of stride 2, four stages ``stage1`` to ``stage4`` of
    :class:`~lit_compress.models.PreActBlock`, batch norm, ReLU, average pool, ``fc``. From depth 50 on the blocks are bottlenecks
    with four times as many channels going out. Where a stage begins with stride 2, the shortcut is a 1×1 convolution also where
    widths are the same.

    Args:
        depth: Layers with weights: 18, 34, 50, 101, 152 or 200.
        num_classes: Width of the output.
        in_channels: Channels that the first convolution reads.
        widths: Channels of the four stages, before a bottleneck's factor of four; the first also of the stem.
        inputs: What images go through first, such as a standardisation, or :class:`~lit_compress.detection.ACFChannels`.

    Shape:
        - input: images ``(N, in_channels, H, W)``, or what ``inputs`` takes.
        - output: logits ``(N, num_classes)``.

    Raises:
        ValueError: If the depth is none of those, or there are not four widths of at least 1.

    Source: He et al., *Identity Mappings in Deep Residual Networks*, 2016.

    Example:
        >>> import torch
        >>> PreActResNet(depth=18, num_classes=2, widths=(8, 8, 8, 8))(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 2])
    """

    def __init__(
        self,
        depth: int = 18,
        num_classes: int = 1000,
        in_channels: int = 3,
        widths: tuple[int, int, int, int] = (64, 128, 256, 512),
        inputs: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if depth not in _BLOCKS:
            raise ValueError(f"Argument `depth` must be one of {list(_BLOCKS)} but got {depth}.")
        if len(widths) != 4 or min(widths) < 1:
            raise ValueError(f"Argument `widths` must hold four numbers of channels but got {widths}.")
        block, factor = ("S", 1) if depth < 50 else ("B(4)", 4)
        self.inputs = nn.Identity() if inputs is None else inputs
        self.conv1 = nn.Conv2d(in_channels, widths[0], kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(3, stride=2, padding=1)
        incoming = (widths[0], *(factor * width for width in widths))
        self.stage1, self.stage2, self.stage3, self.stage4 = (
            preact_stage(blocks, incoming[at], incoming[at + 1], 2 if at else 1, block)
            for at, blocks in enumerate(_BLOCKS[depth])
        )
        self.norm = nn.BatchNorm2d(incoming[-1])
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(incoming[-1], num_classes)
        init_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch."""
        maps = self.pool1(self.relu1(self.bn1(self.conv1(self.inputs(images)))))
        maps = self.stage4(self.stage3(self.stage2(self.stage1(maps))))
        logits: Tensor = self.fc(self.flatten(self.pool(self.relu(self.norm(maps)))))
        return logits
