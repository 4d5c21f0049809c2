"""What the benchmarks measure on: networks with an input, statistics drawn at random, recipes."""

from __future__ import annotations

from importlib import import_module, metadata
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn

from benchmarks.timing import CPU
from lit_compress import Recipe
from lit_compress.graph import ChannelGraph
from lit_compress.models import ResNetCIFAR
from lit_compress.skips import Tap
from lit_compress.spectra import observed, sum_name
from lit_compress.statistics import StreamingCovariance

PEER = "torch-pruning"


class Subject(NamedTuple):
    """A network, untrained and in evaluation mode, with images for it."""

    name: str
    net: nn.Module
    images: Tensor

    def to(self, device: torch.device) -> Subject:
        """The same on a device."""
        return Subject(self.name, self.net.to(device), self.images.to(device))


def resnet56(*, quick: bool = False, batch: int = 1, device: torch.device = CPU) -> Subject:
    """ResNet-56 for CIFAR with option A shortcuts, or ResNet-8."""
    torch.manual_seed(0)
    depth = 8 if quick else 56
    return Subject(f"ResNet-{depth}, 32 px", ResNetCIFAR(depth).eval(), torch.randn(batch, 3, 32, 32)).to(device)


def resnet50(*, quick: bool = False, batch: int = 1, device: torch.device = CPU) -> Subject:
    """ResNet-50 of torchvision with projections on images of 224 pixels, or a ResNet-14 on small ones."""
    if quick:
        return Subject("ResNet-14, 16 px", ResNetCIFAR(14, width=8).eval(), torch.randn(batch, 3, 16, 16)).to(device)
    torch.manual_seed(0)
    net = torchvision.models.resnet50(weights=None).eval()
    return Subject("ResNet-50, 224 px", net, torch.randn(batch, 3, 224, 224)).to(device)


def observations(graph: ChannelGraph) -> tuple[dict[str, int], dict[str, Tap]]:
    """What an analysis looks at: name to number of channels, and where to find those that are no layer's output."""
    groups = [observed(graph, group) for group in graph.groups()]
    channels = {name: len(position) for group in groups for name, position in group.members.items()}
    taps = {sum_name(point.tap): point.tap for point in graph.sums if point.tap is not None}
    return channels, {name: tap for name, tap in taps.items() if name in channels}


def random_covariances(graph: ChannelGraph) -> dict[str, StreamingCovariance]:
    """For all that an analysis looks at, the covariance of mixed random responses of twice as many samples as channels."""
    generator = torch.Generator().manual_seed(0)
    covariances = {}
    for name, channels in observations(graph)[0].items():
        mixing = torch.randn(channels, channels, generator=generator)
        covariances[name] = StreamingCovariance(channels)
        covariances[name].update(torch.randn(2 * channels, channels, generator=generator) @ mixing)
    return covariances


def every_other_channel(graph: ChannelGraph, *, tied: bool) -> Recipe:
    """Half of each group's channels; ``tied`` says whether also of the groups that several layers share."""
    keep: dict[str, tuple[int, ...]] = {}
    for group in graph.groups():
        if len(group.members) == 1 or tied:
            position = group.members[group.name].tolist()
            before = keep.get(group.name, range(len(position)))
            keep[group.name] = tuple(channel for channel in before if position[channel] < 0 or position[channel] % 2)
    return Recipe(keep=keep, method="every other channel")


def torch_pruning() -> Any:
    """The peer, or None if it is not installed: ``pip install lit-compress[peers]``."""
    try:
        return import_module("torch_pruning")
    except ModuleNotFoundError:
        return None


def torch_pruning_version() -> str:
    """The peer's version, or that it is not installed."""
    return metadata.version(PEER) if torch_pruning() else "not installed"
