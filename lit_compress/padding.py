"""Padding back: a block is cut on its own, and its output scattered to the width of the skip that it is added to.

The module at the end of the block stays the object it was, under the same name and with the same parameters; its class becomes a
subclass that places its channels and leaves zeros between them.

Source: *Filter Distillation for Network Compression* (PFA), appendix C.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Pad:
    """How a module is padded back.

    Args:
        width: Channels of the skip.
        slots: To which of them each of the module's own channels goes, ascending.
    """

    width: int
    slots: tuple[int, ...]


class PaddedBack(nn.Module):
    """Mixed into the class of a module whose output has fewer channels than the skip that it is added to.

    Attributes:
        padded_width: Channels W of the skip.
        slots: Buffer ``(K,)``: to which of the W channels each of the module's own K channels goes. It is part of the state dict.
    """

    padded_width: int
    slots: Tensor

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The module's own output ``(N, K, ...)``, scattered to ``(N, W, ...)``."""
        output: Tensor = super().forward(*args, **kwargs)
        return output.new_zeros(len(output), self.padded_width, *output.shape[2:]).index_copy(1, self.slots, output)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time, so a pickle names the class that it was made from.
        return _anew, (type(self).__bases__[1],), self.__dict__


def pad_back(module: nn.Module, slots: Tensor, width: int) -> None:
    """Make a module scatter its channels to the width of a skip.

    Args:
        module: Changed in place; may be padded already.
        slots: ``(K,)`` int64, ascending, below ``width``.
        width: Channels of the skip.
    """
    if not isinstance(module, PaddedBack):
        module.__class__ = _padded(type(module))
    module.register_buffer("slots", slots)
    module.padded_width = width  # type: ignore[assignment]


def pad_modules(model: nn.Module, pads: Mapping[str, Pad]) -> None:
    """Pad back the modules at some paths of a network."""
    for path, pad in pads.items():
        module = model.get_submodule(path)
        device = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))
        pad_back(module, torch.tensor(pad.slots, device=device), pad.width)


@contextmanager
def padded_for_now(model: nn.Module, pads: Mapping[str, Pad]) -> Iterator[None]:
    """Pad back some modules for as long as the context lasts."""
    before = [
        (module, type(module), module._buffers.get("slots"), vars(module).get("padded_width"))
        for module in map(model.get_submodule, pads)
    ]
    try:
        pad_modules(model, pads)
        yield
    finally:
        for module, kind, slots, width in before:
            module.__class__ = kind
            if slots is None:
                module._buffers.pop("slots", None)
                vars(module).pop("padded_width", None)
            else:
                module._buffers["slots"], vars(module)["padded_width"] = slots, width


_PADDED: dict[type[nn.Module], type[nn.Module]] = {}


def _padded(kind: type[nn.Module]) -> type[nn.Module]:
    if kind not in _PADDED:
        _PADDED[kind] = type(f"PaddedBack{kind.__name__}", (PaddedBack, kind), {"__module__": kind.__module__})
    return _PADDED[kind]


def _anew(kind: type[nn.Module]) -> nn.Module:
    padded = _padded(kind)
    return padded.__new__(padded)
