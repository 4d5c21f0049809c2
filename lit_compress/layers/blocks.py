"""Cheap stand-ins for a block of two k × k convolutions: grouped, with a bottleneck, or both."""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

Activation = Literal["pre", "post"]

_FORMS = "S, S-2x2, G(g), B(b) or BG(b,g), where g is a number, N, N/x, M or M/x"


@dataclass(frozen=True)
class Groups:
    """Groups of a convolution: ``count``, or one for every ``count`` channels.

    Args:
        count: Groups, or channels of a group.
        relative: Whether ``count`` is channels of a group, written ``N/count`` (of those that come in) or ``M/count`` (of those
            after the bottleneck).
    """

    count: int
    relative: bool = False

    def of(self, channels: int) -> int:
        """Number of groups of a convolution that keeps the number of channels.

        Raises:
            ValueError: If they do not divide the channels.
        """
        if self.count < 1 or channels % self.count:
            asked = f"groups of {self.count} channels" if self.relative else f"{self.count} groups"
            raise ValueError(f"A convolution of {channels} channels cannot have {asked}.")
        return channels // self.count if self.relative else self.count


@dataclass(frozen=True)
class BlockSpec:
    """What a block is made of; :meth:`parse` reads the names that the document gives.

    Args:
        kernel_size: Side of the k × k filters; 2 stands for dilated ones.
        groups: Of the k × k convolutions, None if they are whole.
        bottleneck: Factor b by which the channels shrink, None if there is no bottleneck.

    Example:
        >>> BlockSpec.parse("BG(2,M/4)")
        BlockSpec(kernel_size=3, groups=Groups(count=4, relative=True), bottleneck=2)
    """

    kernel_size: int = 3
    groups: Groups | None = None
    bottleneck: int | None = None

    @classmethod
    def parse(cls, text: str) -> BlockSpec:
        """Read ``S``, ``S-2x2``, ``G(g)``, ``B(b)`` or ``BG(b,g)``.

        Raises:
            ValueError: If the text is none of them.
        """
        plain = text.replace(" ", "")
        if plain == "S":
            return cls()
        if plain == "S-2x2":
            return cls(kernel_size=2)
        if match := re.fullmatch(r"G\((\d+|N(?:/\d+)?)\)", plain):
            return cls(groups=_groups(match[1]))
        if match := re.fullmatch(r"B\(([1-9]\d*)\)", plain):
            return cls(bottleneck=int(match[1]))
        if match := re.fullmatch(r"BG\(([1-9]\d*),(\d+|M(?:/\d+)?)\)", plain):
            return cls(bottleneck=int(match[1]), groups=_groups(match[2]))
        raise ValueError(f"A block is written as {_FORMS}; got {text!r}.")

    def convolution(self, in_channels: int, out_channels: int, stride: int = 1, dilation: int = 1) -> nn.Module:
        """What stands for one 3 × 3 convolution in a block without a bottleneck, padded so that stride 1 keeps the size."""
        if self.kernel_size == 2:
            return nn.Conv2d(in_channels, out_channels, 2, stride, padding=dilation, dilation=2 * dilation, bias=False)
        if self.groups is None:
            return nn.Conv2d(in_channels, out_channels, 3, stride, padding=dilation, dilation=dilation, bias=False)
        groups = self.groups.of(in_channels)
        return GroupedPointwise(in_channels, out_channels, groups, 3, stride, padding=dilation, dilation=dilation)

    def bottleneck_convolution(self, in_channels: int, out_channels: int, stride: int = 1, dilation: int = 1) -> Bottleneck:
        """What stands for both convolutions in a block with a bottleneck.

        Raises:
            ValueError: If the bottleneck would be empty.
        """
        width = self.width(out_channels)
        return Bottleneck(in_channels, out_channels, width, self.narrow_groups(width), stride, dilation)

    def width(self, out_channels: int) -> int:
        """Channels after the bottleneck: M = N / b.

        Raises:
            ValueError: If there are none, or no bottleneck.
        """
        if self.bottleneck is None or out_channels < self.bottleneck:
            raise ValueError(f"{out_channels} channels cannot shrink by a factor of {self.bottleneck}.")
        return out_channels // self.bottleneck

    def narrow_groups(self, width: int) -> int:
        """Groups of the narrow convolution of so many channels."""
        return 1 if self.groups is None else self.groups.of(width)


class GroupedPointwise(nn.Module):
    """A grouped convolution, batch norm, ReLU, and a pointwise convolution, where one convolution stood.

    Args:
        in_channels: Channels that come in; the grouped convolution keeps their number.
        out_channels: Channels that go out.
        groups: Groups, which divide ``in_channels``.
        kernel_size, stride, padding, dilation: Of the grouped convolution.
        bias: Whether the pointwise convolution has one.

    Example:
        >>> import torch
        >>> GroupedPointwise(16, 32, groups=4, stride=2)(torch.zeros(1, 16, 8, 8)).shape
        torch.Size([1, 32, 4, 4])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        groups: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 1,
        dilation: int | tuple[int, int] = 1,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(in_channels, in_channels, kernel_size, stride, padding, dilation, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(in_channels)
        self.pointwise = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=bias)

    def forward(self, maps: Tensor) -> Tensor:
        """Maps to maps."""
        out: Tensor = self.pointwise(F.relu(self.norm(self.grouped(maps))))
        return out


class Bottleneck(nn.Module):
    """Pointwise convolution, batch norm, ReLU, and a :class:`GroupedPointwise`, where two convolutions stood.

    Args:
        in_channels: Channels that come in.
        out_channels: Channels that go out.
        width: Channels between.
        groups: Groups of the narrow convolution.
        stride: Of the narrow convolution.
        dilation: Of the narrow convolution, 3 × 3 and padded so that stride 1 keeps the size.

    Example:
        >>> import torch
        >>> Bottleneck(16, 32, width=8, stride=2)(torch.zeros(1, 16, 8, 8)).shape
        torch.Size([1, 32, 4, 4])
    """

    def __init__(
        self, in_channels: int, out_channels: int, width: int, groups: int = 1, stride: int = 1, dilation: int = 1
    ) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(in_channels, width, kernel_size=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.narrow = GroupedPointwise(width, out_channels, groups, 3, stride, padding=dilation, dilation=dilation)

    def forward(self, maps: Tensor) -> Tensor:
        """Maps to maps."""
        out: Tensor = self.narrow(F.relu(self.norm(self.reduce(maps))))
        return out


def conv_block(
    block: str,
    in_channels: int,
    out_channels: int,
    stride: int = 1,
    *,
    dilation: int | tuple[int, int] = 1,
    activation: Activation = "pre",
) -> nn.Sequential:
    """What stands on the residual branch of a block: two 3 × 3 convolutions, or what is cheaper. The skip is the network's.

    ===========  ===================================  =======================================
    block        convolutions                         their parameters, N channels in and out
    ===========  ===================================  =======================================
    ``S``        3×3, 3×3                             ``18 N²``
    ``S-2x2``    2×2, 2×2, dilated                    ``8 N²``
    ``G(g)``     grouped 3×3, 1×1, grouped 3×3, 1×1   ``2 N² (9/g + 1)``
    ``B(b)``     1×1 to N/b, 3×3, 1×1 to N            ``N² (9/b² + 2/b)``
    ``BG(b,g)``  1×1 to N/b, grouped 3×3, 1×1 to N    ``N² (9/(g b²) + 2/b)``
    ===========  ===================================  =======================================

    ``g`` is a number of groups; or ``N``, ``N/x`` for groups of one or x of the channels that come into the grouped convolution;
    or ``M``, ``M/x``, the same for the channels after the bottleneck. Convolutions have no biases.

    Args:
        block: The block's name, e.g. ``"BG(2,M/4)"``.
        in_channels: Channels that come in.
        out_channels: Channels that go out.
        stride: Step in pixels, of the first k × k convolution.
        dilation: Of the k × k convolutions, or of the first and of the second, of which a bottleneck has the second alone; those
            of ``S-2x2`` are dilated by twice as much.
        activation: ``"pre"`` puts batch norm and ReLU before every convolution. ``"post"`` puts them after each, without the last
            ReLU, which follows the sum with the skip.

    Returns:
        Layers in order. With ``"pre"`` the first two are the norm and the ReLU that a shortcut may share. ReLUs inside the cheap
        convolutions are no modules.

    Raises:
        ValueError: If the name is none of these, or a number of groups does not divide the channels.

    Source: *Efficient machine learning under a budget* (T2), section 4.3.2 and table 4.1.

    Example:
        >>> import torch
        >>> list(conv_block("G(4)", 16, 32, stride=2)._modules)
        ['norm1', 'relu1', 'conv1', 'norm2', 'relu2', 'conv2']
        >>> conv_block("BG(2,M/4)", 16, 32, stride=2, activation="post")(torch.zeros(1, 16, 8, 8)).shape
        torch.Size([1, 32, 4, 4])
    """
    if activation not in ("pre", "post"):
        raise ValueError(f"Argument `activation` must be 'pre' or 'post' but got {activation!r}.")
    spec = BlockSpec.parse(block)
    first, second = (dilation, dilation) if isinstance(dilation, int) else dilation
    convolutions: list[nn.Module]
    if spec.bottleneck is not None:
        convolutions = [spec.bottleneck_convolution(in_channels, out_channels, stride, second)]
    else:
        convolutions = [
            spec.convolution(in_channels, out_channels, stride, first),
            spec.convolution(out_channels, out_channels, 1, second),
        ]
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, convolution in enumerate(convolutions, start=1):
        if activation == "pre":
            layers[f"norm{number}"] = nn.BatchNorm2d(in_channels if number == 1 else out_channels)
            layers[f"relu{number}"] = nn.ReLU()
        layers[f"conv{number}"] = convolution
        if activation == "post":
            layers[f"norm{number}"] = nn.BatchNorm2d(out_channels)
            if number < len(convolutions):
                layers[f"relu{number}"] = nn.ReLU()
    return nn.Sequential(layers)


def _groups(text: str) -> Groups:
    if text[0] in "NM":
        return Groups(int(text[2:] or 1), relative=True)
    return Groups(int(text))
