"""Autoencoders along a detector's backbone: what they read of its forward, and what they make of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lit_compress.detection.encoder import Encoder
from lit_compress.detection.mirror import MirroredDecoder
from lit_compress.taps import Taps

END_TO_END = "end_to_end"


@dataclass
class Reading:
    """What one forward of the encoder shows.

    Attributes:
        maps: Layer name to its map; empty where the forward did not run the encoder.
        switches: Path of a max-pooling module to the places of its maxima.
        input_size: Height and width of the network's input; None where no module takes it as it is.
    """

    maps: dict[str, Tensor] = field(default_factory=dict)
    switches: dict[str, Tensor] = field(default_factory=dict)
    input_size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Reconstruction:
    """A map, and what a decoder has made of what was left of it.

    Args:
        layer: The layer whose map it is.
        made: The reconstruction ``(N, C, H, W)``.
        target: The map, of the same shape.
        stride: Pixels of the network's input from one position to the next, down and across.
    """

    layer: str
    made: Tensor
    target: Tensor
    stride: tuple[int, int]


class Autoencoders(nn.Module):
    """The decoders of a detector: one for each pair of neighbouring layers, and all of them in a row.

    Args:
        encoder: What the network does to the maps of its layers; see :func:`~lit_compress.detection.encoder.follow`.
        dropout: Probability with which each number that enters a decoder is set to zero in training.

    Raises:
        ValueError: If fewer than two layers are marked, or something between them cannot be mirrored.

    Source: *Region of Interest Autoencoders* (T1), section 3.3.2.
    """

    def __init__(self, encoder: Encoder, dropout: float = 0.5) -> None:
        super().__init__()
        self.encoder = encoder
        self.names = tuple(encoder.marks)
        if len(self.names) < 2:
            raise ValueError(
                f"Name at least two layers, one to reconstruct from and one to reconstruct, but got {list(self.names)}."
            )
        marks = encoder.marks
        decoders = [MirroredDecoder(encoder, marks[first], marks[last], dropout) for first, last in pairwise(self.names)]
        self.decoders = nn.ModuleList(decoders)
        self.steps = tuple(step for decoder in decoders for step in decoder.steps)
        self.pools = tuple(pool for decoder in decoders for pool in decoder.pools)
        self.axes = {f"decoders.{i}.{name}": axes for i, one in enumerate(decoders) for name, axes in one.axes.items()}

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the reconstructions: of each layer but the first, from it; and end to end, if that is another one."""
        return self.names[1:] if len(self.names) == 2 else (*self.names[1:], END_TO_END)

    @override
    def forward(self, reading: Reading, wanted: Sequence[str]) -> dict[str, Reconstruction]:
        """Reconstruct what is wanted.

        Args:
            reading: Of one forward.
            wanted: Of :attr:`terms`.

        Returns:
            Name of a term to the reconstruction. That of a layer is of the map before it, from its own; the one end to end is of
            the first map from the last, through all decoders.
        """
        made: dict[str, Reconstruction] = {}
        chain = reading.maps[self.names[-1]]
        layers = list(zip(self.decoders, pairwise(self.names), strict=True))
        for decoder, (first, last) in reversed(layers):
            target = reading.maps[first]
            decode = partial(decoder, size=target.shape[2:], switches=reading.switches)
            stride = self.encoder.values[self.encoder.marks[first]].stride
            is_last = last == self.names[-1]  # the chain begins with that layer's own reconstruction
            if END_TO_END in wanted or is_last:
                chain = decode(chain)
            if last in wanted:
                one = chain if is_last else decode(reading.maps[last])
                made[last] = Reconstruction(first, one, target, stride)
            if END_TO_END in wanted and first == self.names[0]:
                made[END_TO_END] = Reconstruction(first, chain, target, stride)
        return {name: made[name] for name in wanted}


class EncoderTaps:
    """Reads what autoencoders need of a network while it runs.

    Args:
        network: The network that the encoder was followed through. Hooks are on it inside of :meth:`reading` alone.
        autoencoders: Made for it.
    """

    def __init__(self, network: nn.Module, autoencoders: Autoencoders) -> None:
        names, modules = autoencoders.names, dict(network.named_modules())
        first = names[0]
        self._holder = (
            (first, modules[first]) if all(name.startswith(f"{first}." if first else "") for name in names[1:]) else None
        )
        self._outputs = Taps(network, names if self._holder is None else names[1:])
        self._pools = {path: modules[path] for path in autoencoders.pools}
        entry = autoencoders.encoder.entry
        self._entry = None if entry is None else modules[entry]

    @contextmanager
    def reading(self) -> Iterator[Reading]:
        """Fill what is yielded with what the one forward inside shows; with nothing if there is none.

        Raises:
            ValueError: If some layers run and others do not, or one runs twice.
        """
        reading = Reading()
        with ExitStack() as stack:
            for path, pool in self._pools.items():
                stack.callback(pool.register_forward_pre_hook(partial(_keep_switches, reading, path)).remove)
            if self._holder is not None:
                name, holder = self._holder
                stack.callback(holder.register_forward_pre_hook(partial(_keep_input, reading, name)).remove)
            if self._entry is not None:
                stack.callback(self._entry.register_forward_pre_hook(partial(_keep_size, reading)).remove)
            found = stack.enter_context(self._outputs.reading(or_nothing=True))
            yield reading
        reading.maps = {**reading.maps, **found} if found else {}


def _keep_switches(reading: Reading, path: str, pool: Any, inputs: tuple[Tensor, ...]) -> None:
    with torch.no_grad():
        reading.switches[path] = F.max_pool2d(
            inputs[0], pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode, return_indices=True
        )[1]


def _keep_input(reading: Reading, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    reading.maps[name] = inputs[0]


def _keep_size(reading: Reading, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    height, width = inputs[0].shape[2:]
    reading.input_size = height, width
