"""Decoders that undo, step by step in reverse, what an encoder does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lit_compress.detection.encoder import Encoder, Step

_SLOPE = 0.25  # of a PReLU, to begin with


class MirroredDecoder(nn.Module):
    """The mirror image of what a network does from one map to another, which gives the first from the second.

    Steps are undone in reverse order. A convolution becomes a transposed one of the same kernel, stride and groups, with a bias;
    max-pooling becomes unpooling to where the maxima were; average pooling repeats its values; an activation becomes a PReLU with
    a slope for each channel. A sum passes on to all of its branches, and where branches part their mirror images are added up:
    the skip connection of a residual block runs along its decoder as well. Norms, dropout and scales for a channel
    (squeeze-and-excitation) leave no trace, since the decoder's convolutions find scales of their own. What enters is dropped
    out.

    Args:
        encoder: What the network does.
        first: Number of the map to reconstruct.
        last: Number of the map to reconstruct it from.
        dropout: Probability with which each number that enters is set to zero in training.

    Attributes:
        pools: Paths of the max-pooling modules whose switches :meth:`forward` needs.

    Shape:
        - code: ``(N, C', H', W')``, the map ``last``.
        - returned: ``(N, C, H, W)``, as the map ``first``.

    Raises:
        ValueError: If there is no way from one map to the other, or a layer on it has no mirror image; the error names it.

    Source: *Region of Interest Autoencoders* (T1), section 3.3.2; unpooling by switches after Zhao et al., *Stacked What-Where
    Auto-encoders*, 2015.

    Example:
        >>> from lit_compress.detection.encoder import follow
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2))
        >>> encoder = follow(network, ["0", "2"], lambda: network(torch.rand(1, 3, 9, 12)))
        >>> decoder = MirroredDecoder(encoder, encoder.marks["0"], encoder.marks["2"])
        >>> decoder(torch.rand(1, 16, 4, 5), size=(9, 12), switches={}).shape
        torch.Size([1, 8, 9, 12])
    """

    def __init__(self, encoder: Encoder, first: int, last: int, dropout: float = 0.5) -> None:
        super().__init__()
        self.first, self.last = first, last
        self.steps = encoder.between(first, last)
        self.dropout = nn.Dropout(dropout)
        self.pools = tuple(step.path for step in self.steps if step.kind == "max pool")
        self.layers = nn.ModuleDict()  # by the number of the step
        # Along which encoder weight's dimension each dimension of a parameter runs; None where no parameter says.
        self.axes: dict[str, dict[int, tuple[str, int] | None]] = {}
        for number, step in enumerate(self.steps):
            taken = encoder.values[step.inputs[0]]
            along = None if taken.origin is None else (taken.origin, 0)
            if step.kind == "convolution":
                self.layers[str(number)] = _mirrored_convolution(step, taken.channels)
                weight = step.weight
                rows = None if weight is None else (weight, 0)
                columns = {} if step.groups > 1 else {1: None if weight is None else (weight, 1)}
                self.axes |= {f"layers.{number}.weight": {0: rows, **columns}, f"layers.{number}.bias": {0: along}}
            elif step.kind == "activation":
                self.layers[str(number)] = nn.PReLU(taken.channels, _SLOPE)
                self.axes[f"layers.{number}.weight"] = {0: along}

    @override
    def forward(self, code: Tensor, size: Sequence[int], switches: Mapping[str, Tensor]) -> Tensor:
        """Reconstruct.

        Args:
            code: The map ``last``.
            size: Height and width of the map ``first``.
            switches: Path of a max-pooling module to the places of its maxima, as ``return_indices=True`` gives them.
        """
        sizes = {self.first: (int(size[0]), int(size[1]))}
        for step in self.steps:
            sizes[step.output] = step.size_after(sizes[step.inputs[0]])
        if tuple(code.shape[2:]) != sizes[self.last]:
            raise ValueError(
                f"A map of {tuple(size)} positions is encoded in {sizes[self.last]} but the code has {tuple(code.shape[2:])}."
            )
        held = {self.last: self.dropout(code)}
        for number in reversed(range(len(self.steps))):
            step = self.steps[number]
            given = self._undone(number, step, held.pop(step.output), sizes[step.inputs[0]], switches)
            for value in step.inputs:
                held[value] = held[value] + given if value in held else given
        made: Tensor = held[self.first]
        return made

    def _undone(self, number: int, step: Step, x: Tensor, size: tuple[int, int], switches: Mapping[str, Tensor]) -> Tensor:
        if step.kind == "sum":
            return x
        if step.kind == "average pool":
            return F.interpolate(x, size, mode="nearest")
        if step.kind == "max pool":
            return unpool(x, switches[step.path], size, overlaps=step.window is not None and step.window.overlaps)
        layer: Any = self.layers[str(number)]
        undone: Tensor = layer(x, output_size=size) if step.kind == "convolution" else layer(x)
        return undone


def unpool(x: Tensor, switches: Tensor, size: tuple[int, int], *, overlaps: bool) -> Tensor:
    """Put pooled values back to where they came from, and zeros elsewhere.

    Args:
        x: ``(N, C, H', W')``.
        switches: Of the same shape: places in the map of ``size``, counted row by row, as
            :func:`~torch.nn.functional.max_pool2d` gives them.
        size: Height and width of the map before pooling.
        overlaps: Whether a place may have won several windows; it then gets their mean.

    Returns:
        ``(N, C, H, W)``.

    Raises:
        ValueError: If the switches have another shape.

    Example:
        >>> x = torch.tensor([[[[1.0, 5.0], [2.0, 3.0]]]])
        >>> pooled, switches = F.max_pool2d(x, 2, return_indices=True)
        >>> unpool(pooled, switches, (2, 2), overlaps=False)
        tensor([[[[0., 5.],
                  [0., 0.]]]])
    """
    if x.shape != switches.shape:
        raise ValueError(f"Expected switches of shape {tuple(x.shape)} but got {tuple(switches.shape)}.")
    empty = x.new_zeros(*x.shape[:2], prod(size))
    places, values = switches.flatten(2), x.flatten(2)
    if overlaps:
        return empty.scatter_reduce(2, places, values, "mean", include_self=False).view(*x.shape[:2], *size)
    return empty.scatter(2, places, values).view(*x.shape[:2], *size)


def _mirrored_convolution(step: Step, channels: int) -> nn.ConvTranspose2d:
    """A transposed convolution whose weight has the shape of the one that it mirrors."""
    assert step.window is not None  # of every convolution
    window = step.window
    layer = nn.ConvTranspose2d(
        step.shape[0], channels, window.kernel, window.stride, window.padding, groups=step.groups, dilation=window.dilation
    )
    assert layer.bias is not None
    # PyTorch's own beginning, by as many terms as are really added up: it counts them for the convolution the other way round.
    # Beside a skip it is small, so that a row of residual blocks does not begin by doubling and doubling.
    terms = step.shape[0] / step.groups * prod(window.kernel) / prod(window.stride)
    bound = 1 / sqrt(max(terms, 1.0))
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound)
        layer.bias.zero_()
    return layer
