"""The network that differentiable architecture search found for CIFAR, with its auxiliary head and drop-path."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

# Operation and source of each pair that is summed to a node: sources 0 and 1 are the outputs of the two cells before, 2 the first
# node, and so on. Both cells give the four nodes, concatenated.
_NORMAL = (
    ("sep_conv", 0), ("sep_conv", 1), ("sep_conv", 0), ("sep_conv", 1),
    ("sep_conv", 1), ("skip", 0), ("skip", 0), ("dil_conv", 2),
)  # fmt: skip
_REDUCE = (
    ("max_pool", 0), ("max_pool", 1), ("skip", 2), ("max_pool", 1),
    ("max_pool", 0), ("skip", 2), ("skip", 2), ("max_pool", 1),
)  # fmt: skip
_NODES = 4
_STEM = 3  # times as many channels leave the stem as a node of the first cell has


class DARTSOutput(NamedTuple):
    """Logits of the network, and of its auxiliary head."""

    logits: Tensor
    auxiliary: Tensor


class DropPath(nn.Module):
    """Zero whole samples of a branch at random in training, and scale the others up.

    Args:
        probability: That a sample is zeroed; may be changed while training.

    Source: Larsson et al., *FractalNet*, 2016.

    Example:
        >>> drop = DropPath(0.5)
        >>> sorted(drop(torch.ones(100, 1, 1, 1)).unique().tolist())
        [0.0, 2.0]
    """

    def __init__(self, probability: float = 0.0) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, branch: Tensor) -> Tensor:
        """The branch, of some samples zero."""
        if not self.training or self.probability == 0:
            return branch
        kept = branch.new_empty(len(branch), 1, 1, 1).bernoulli_(1 - self.probability)
        return branch * kept / (1 - self.probability)


class DARTS(nn.Module):
    """The published cell (DARTS, second order), 20 of them: 3,349,342 parameters for 10 classes without the auxiliary head.

    The cells at one third and two thirds halve the map and double the channels. With ``auxiliary``, the cell at two thirds also
    feeds a classifier that is used in training alone: the output is then a :class:`DARTSOutput`. Attention transfer taps
    ``cells.6`` and ``cells.13`` of the 20.

    Args:
        num_classes: Width of the output.
        channels: Channels of a node in the first cells.
        layers: Cells.
        auxiliary: Whether there is an auxiliary head.
        drop_path: Probability of dropping the branches that are no skips; see :meth:`set_drop_path`.
        in_channels: Channels of an image.

    Shape:
        - input: images ``(N, in_channels, 32, 32)``; other sizes without the auxiliary head.
        - output: logits ``(N, num_classes)``; in training with the auxiliary head, two of them.

    Raises:
        ValueError: If there are fewer than three cells, or the probability is none.

    Source: Liu et al., *DARTS: Differentiable Architecture Search*, 2018, figure 4 and section 3.3.

    Example:
        >>> network = DARTS(channels=4, layers=5, auxiliary=True)
        >>> network(torch.zeros(2, 3, 32, 32)).auxiliary.shape, network.eval()(torch.zeros(2, 3, 32, 32)).shape
        (torch.Size([2, 10]), torch.Size([2, 10]))
    """

    def __init__(
        self,
        num_classes: int = 10,
        channels: int = 36,
        layers: int = 20,
        auxiliary: bool = False,
        drop_path: float = 0.0,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if layers < 3:
            raise ValueError(f"Argument `layers` must be at least 3, two of which halve the map, but got {layers}.")
        reductions = (layers // 3, 2 * layers // 3)
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, _STEM * channels, 3, padding=1, bias=False), nn.BatchNorm2d(_STEM * channels)
        )
        self.cells = nn.ModuleList()
        before = previous = _STEM * channels
        reduced = False
        for place in range(layers):
            reduces = place in reductions
            channels *= 1 + reduces
            self.cells.append(_Cell(before, previous, channels, reduces=reduces, reduced=reduced))
            before, previous, reduced = previous, _NODES * channels, reduces
            if place == reductions[1]:
                at_two_thirds = previous
        self.auxiliary_after = reductions[1]
        self.auxiliary = _auxiliary_head(at_two_thirds, num_classes) if auxiliary else None
        self.fc = nn.Linear(previous, num_classes)
        self.set_drop_path(drop_path)

    def set_drop_path(self, probability: float) -> None:
        """Set the probability of dropping a branch; :class:`~lit_compress.callbacks.DropPathSchedule` raises it over the epochs.

        Raises:
            ValueError: If it does not lie in [0, 1).
        """
        if not 0 <= probability < 1:
            raise ValueError(f"The probability of dropping a branch must lie in [0, 1) but got {probability}.")
        for module in self.modules():
            if isinstance(module, DropPath):
                module.probability = probability

    def forward(self, images: Tensor) -> Tensor | DARTSOutput:
        """Logits of a batch; in training with an auxiliary head, of both heads."""
        before = previous = self.stem(images)
        auxiliary = None
        for place, cell in enumerate(self.cells):
            before, previous = previous, cell(before, previous)
            if place == self.auxiliary_after and self.auxiliary is not None and self.training:
                auxiliary = self.auxiliary(previous)
        logits: Tensor = self.fc(previous.mean((2, 3)))
        return logits if auxiliary is None else DARTSOutput(logits, auxiliary)


class _Cell(nn.Module):
    """Four nodes, each the sum of two operations on earlier ones."""

    def __init__(self, before: int, previous: int, channels: int, *, reduces: bool, reduced: bool) -> None:
        super().__init__()
        self.preprocess0 = _FactorizedReduce(before, channels) if reduced else _pointwise(before, channels)
        self.preprocess1 = _pointwise(previous, channels)
        genotype = _REDUCE if reduces else _NORMAL
        self.sources = [source for _, source in genotype]
        self.operations = nn.ModuleList(
            _operation(name, channels, stride=2 if reduces and source < 2 else 1) for name, source in genotype
        )

    def forward(self, before: Tensor, previous: Tensor) -> Tensor:
        """The nodes, concatenated along the channels."""
        states = [self.preprocess0(before), self.preprocess1(previous)]
        for node in range(_NODES):
            first, second = (self.operations[place](states[self.sources[place]]) for place in (2 * node, 2 * node + 1))
            states.append(first + second)
        return torch.cat(states[2:], dim=1)


def _operation(name: str, channels: int, stride: int) -> nn.Module:
    """An operation of a cell; what is no identity is followed by drop-path."""
    if name == "skip" and stride == 1:
        return nn.Identity()
    if name == "skip":
        operation: nn.Module = _FactorizedReduce(channels, channels)
    elif name == "max_pool":
        operation = nn.MaxPool2d(3, stride=stride, padding=1)
    elif name == "sep_conv":
        operation = nn.Sequential(*_separable(channels, stride), *_separable(channels, 1))
    else:
        operation = nn.Sequential(*_separable(channels, stride, dilation=2))
    return nn.Sequential(operation, DropPath())


def _separable(channels: int, stride: int, dilation: int = 1) -> tuple[nn.Module, ...]:
    return (
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, stride, padding=dilation, dilation=dilation, groups=channels, bias=False),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels),
    )


def _pointwise(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(nn.ReLU(), nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels))


class _FactorizedReduce(nn.Module):
    """Halve a map without losing pixels: one half of the channels from the even pixels, the other from the odd ones."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.even = nn.Conv2d(in_channels, out_channels // 2, 1, stride=2, bias=False)
        self.odd = nn.Conv2d(in_channels, out_channels - out_channels // 2, 1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, maps: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, C', H / 2, W / 2)``."""
        maps = self.relu(maps)
        out: Tensor = self.norm(torch.cat((self.even(maps), self.odd(maps[:, :, 1:, 1:])), dim=1))
        return out


def _auxiliary_head(channels: int, num_classes: int) -> nn.Sequential:
    """Classifier of maps of 8 × 8."""
    return nn.Sequential(
        nn.ReLU(), nn.AvgPool2d(5, stride=3, count_include_pad=False),
        nn.Conv2d(channels, 128, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU(),
        nn.Conv2d(128, 768, 2, bias=False), nn.BatchNorm2d(768), nn.ReLU(),
        nn.Flatten(), nn.Linear(768, num_classes),
    )  # fmt: skip
