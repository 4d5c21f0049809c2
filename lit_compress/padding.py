"""Padding back: a block is cut on its own, and its output scattered to the width of the skip that it is added to.

The module at the end of the block stays the object it was, under the same name and with the same parameters; its class becomes a
subclass that places its channels and leaves zeros between them.

Source: *Filter Distillation for Network Compression* (PFA), appendix C.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override


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

    The slots are in the state dict and move with the module, but are no buffer: what averages buffers would average indices.

    Attributes:
        padded_width: Channels W of the skip.
        slots: ``(K,)`` int64: to which of the W channels each of the module's own K channels goes.
    """

    padded_width: int
    slots: Tensor

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The module's own output ``(N, K, ...)``, scattered to ``(N, W, ...)``."""
        output: Tensor = super().forward(*args, **kwargs)
        return output.new_zeros(output.shape[0], self.padded_width, *output.shape[2:]).index_copy(1, self.slots, output)

    @override
    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]
        self.slots = self.slots.to(fn(self.slots).device)
        return self

    @override
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}slots"] = self.slots

    @override
    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        name = f"{prefix}slots"
        if name in unexpected_keys:
            unexpected_keys.remove(name)
        loaded = state_dict.get(name)
        if loaded is None:
            missing_keys.extend([name] if strict else [])
        elif loaded.shape != self.slots.shape:
            error_msgs.append(f"{name} has shape {tuple(loaded.shape)}, but {tuple(self.slots.shape)} is expected.")
        else:
            self.slots = loaded.to(self.slots, copy=True)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time, so a pickle names the class that it was made from.
        return _anew, (type(self).__bases__[1],), *super().__reduce_ex__(protocol)[2:]


def pad_back(module: nn.Module, slots: Tensor, width: int) -> None:
    """Make a module scatter its channels to the width of a skip.

    Args:
        module: Changed in place; may be padded already.
        slots: ``(K,)`` int64, ascending, below ``width``.
        width: Channels of the skip.
    """
    if not isinstance(module, PaddedBack):
        module.__class__ = _padded(type(module))
    vars(module).update(slots=slots, padded_width=width)


def pad_modules(model: nn.Module, pads: Mapping[str, Pad | None]) -> Callable[[], None]:
    """Pad back the modules at some paths of a network, all of them or, if one cannot be, none.

    None makes a module what it was before it was ever padded.

    Returns:
        What puts them back to what they were.
    """
    modules = {path: model.get_submodule(path) for path in pads}
    before = [(module, type(module), {name: vars(module).get(name) for name in _OWN}) for module in modules.values()]

    def undo() -> None:
        for module, kind, own in before:
            module.__class__ = kind
            for name, value in own.items():
                if value is None:
                    vars(module).pop(name, None)
                else:
                    vars(module)[name] = value

    try:
        for path, module in modules.items():
            if (pad := pads[path]) is None:
                module.__class__ = type(module).__bases__[1] if isinstance(module, PaddedBack) else type(module)
                continue
            held = (*module.parameters(), *module.buffers(), *model.parameters())  # a dropout, say, holds nothing
            device = next((tensor.device for tensor in held), torch.device("cpu"))
            pad_back(module, torch.tensor(pad.slots, device=device), pad.width)
    except BaseException:
        undo()
        raise
    return undo


def repad(model: nn.Module, pads: Mapping[str, Pad]) -> None:
    """Pad back the modules at these paths of a network, and no others."""
    for path, module in model.named_modules():
        if isinstance(module, PaddedBack) and path not in pads:
            module.__class__ = type(module).__bases__[1]
            for name in _OWN:
                vars(module).pop(name)
    pad_modules(model, pads)


@contextmanager
def padded_for_now(model: nn.Module, pads: Mapping[str, Pad | None]) -> Iterator[None]:
    """Pad back some modules, or leave them unpadded, for as long as the context lasts."""
    undo = pad_modules(model, pads)
    try:
        yield
    finally:
        undo()


_OWN = ("slots", "padded_width")  # attributes of a padded module
_PADDED: dict[type[nn.Module], type[nn.Module]] = {}


def _padded(kind: type[nn.Module]) -> type[nn.Module]:
    if kind not in _PADDED:
        _PADDED[kind] = type(f"PaddedBack{kind.__name__}", (PaddedBack, kind), {"__module__": kind.__module__})
    return _PADDED[kind]


def _anew(kind: type[nn.Module]) -> nn.Module:
    padded = _padded(kind)
    return padded.__new__(padded)
