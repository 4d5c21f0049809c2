"""Padding back: a block is cut on its own, and its output scattered to the width of the skip that it is added to.

The module at the end of the block stays the object it was, under the same name and with the same parameters; its class becomes a
subclass that places its channels and leaves zeros between them.

Source: *Filter Distillation for Network Compression* (PFA), appendix C.2.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import Tensor, nn


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


def unpad(module: nn.Module) -> None:
    """Undo :func:`pad_back`."""
    if isinstance(module, PaddedBack):
        del module._buffers["slots"], module.__dict__["padded_width"]
        module.__class__ = type(module).__bases__[1]


@lru_cache(maxsize=None)
def _padded(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"PaddedBack{kind.__name__}", (PaddedBack, kind), {"__module__": kind.__module__})


def _anew(kind: type[nn.Module]) -> nn.Module:
    padded = _padded(kind)
    return padded.__new__(padded)
