"""Residual networks for CIFAR whose shortcuts hold no parameters."""

from torch import Tensor, nn
from torch.nn import functional as F

from lit_compress.models.convolution import ConvolutionalNetwork, init_convolutions


class ZeroPadShortcut(nn.Module):
    """Shortcut to a wider and smaller map without parameters: keep every ``stride``-th pixel, add channels of zeros.

    The zeros stand on both sides, ``(out_channels - in_channels) // 2`` channels before and the rest after. They are amounts
    fixed here, not looked up from the input: channel ``c`` of the input is channel ``c + front`` of the output for good.

    Args:
        in_channels: Channels that come in.
        out_channels: Channels that go out, at least as many.
        stride: Step in pixels.

    Shape:
        - input: maps ``(N, in_channels, H, W)``.
        - output: maps ``(N, out_channels, ceil(H / stride), ceil(W / stride))``.

    Raises:
        ValueError: If fewer channels go out than come in.

    Source: He et al., *Deep Residual Learning for Image Recognition*, 2015, section 3.3, option A.

    Example:
        >>> import torch
        >>> ZeroPadShortcut(2, 4, stride=2)(torch.ones(1, 2, 4, 4))[0, :, 0, 0]
        tensor([0., 1., 1., 0.])
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        if out_channels < in_channels:
            raise ValueError(f"A zero-padded shortcut can only widen but got {in_channels} channels in and {out_channels} out.")
        self.stride = stride
        self.front = (out_channels - in_channels) // 2
        self.back = out_channels - in_channels - self.front

    def forward(self, maps: Tensor) -> Tensor:
        """Every ``stride``-th pixel, between channels of zeros."""
        return F.pad(maps[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.front, self.back))

    def extra_repr(self) -> str:
        """What ``print`` shows of the layer."""
        return f"front={self.front}, back={self.back}, stride={self.stride}"


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions with batch norm, added to the shortcut; a ReLU after the first and after the sum.

    ``relu2`` sees the sum: a hook on its input reads the residual stream.

    Args:
        in_channels: Channels that come in.
        out_channels: Filters of both convolutions.
        stride: Step in pixels of the first convolution and of the shortcut.

    Shape:
        - input: maps ``(N, in_channels, H, W)``.
        - output: maps ``(N, out_channels, ceil(H / stride), ceil(W / stride))``.

    Source: He et al., 2015, figure 2.

    Example:
        >>> import torch
        >>> ResidualBlock(4, 8, stride=2)(torch.zeros(1, 4, 7, 7)).shape
        torch.Size([1, 8, 4, 4])
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        same = stride == 1 and in_channels == out_channels
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Identity() if same else ZeroPadShortcut(in_channels, out_channels, stride)
        self.relu2 = nn.ReLU()

    def forward(self, maps: Tensor) -> Tensor:
        """The maps after the sum and its ReLU."""
        branch = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(maps)))))
        out: Tensor = self.relu2(branch + self.shortcut(maps))
        return out


class ResNetCIFAR(ConvolutionalNetwork):
    """ResNet for CIFAR with option A shortcuts: ResNet-56 has 853,018 parameters for 10 classes.

    A 3×3 convolution, three stages of ``(depth - 2) / 6`` blocks with ``width``, ``2 · width`` and ``4 · width`` channels, the
    second and third beginning with stride 2, average pool, one fully connected layer.

    Args:
        depth: Layers with weights, 6n + 2: 8, 14, 20, 32, 44, 56, 110, …
        num_classes: Width of the output.
        in_channels: Channels of an image.
        width: Channels of the first stage.

    Shape:
        - input: images ``(N, in_channels, H, W)``, any H and W.
        - output: logits ``(N, num_classes)``.

    Raises:
        ValueError: If the depth is not 6n + 2 with n at least 1, or the width is below 1.

    Source: He et al., 2015, section 4.2; the ResNet-56 of PFA's experiments on CIFAR.

    Example:
        >>> import torch
        >>> ResNetCIFAR(depth=8, width=4)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, depth: int = 56, num_classes: int = 10, in_channels: int = 3, width: int = 16) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if blocks < 1 or rest:
            raise ValueError(f"Argument `depth` must be 6n + 2 (8, 14, 20, 32, 44, 56, 110, …) but got {depth}.")
        if width < 1:
            raise ValueError(f"Argument `width` must be at least 1 but got {width}.")
        self.conv1 = nn.Conv2d(in_channels, width, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.stage1 = _stage(blocks, width, width, stride=1)
        self.stage2 = _stage(blocks, width, 2 * width, stride=2)
        self.stage3 = _stage(blocks, 2 * width, 4 * width, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(4 * width, num_classes)
        init_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch."""
        maps = self.relu1(self.bn1(self.conv1(images)))
        maps = self.stage3(self.stage2(self.stage1(maps)))
        logits: Tensor = self.fc(self.flatten(self.pool(maps)))
        return logits


def _stage(blocks: int, in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    first = ResidualBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(ResidualBlock(out_channels, out_channels) for _ in range(blocks - 1)))
