"""Make the tensors of a network smaller without replacing them.

A parameter stays the object it was: optimizers, tied modules, hooks and attributes on it hold on. Only its storage is new.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lit_compress import compiled
from lit_compress.layers import RankFactorizedLinear, ShuffleLinear

# The attributes of a module that repeat what its tensors' shapes say.
_SIZES: tuple[tuple[type[nn.Module], Callable[[Any], dict[str, int]]], ...] = (
    (
        nn.modules.conv._ConvTransposeNd,
        lambda m: {"in_channels": m.weight.shape[0], "out_channels": m.weight.shape[1] * m.groups},
    ),
    (nn.Linear, lambda m: {"in_features": m.weight.shape[1], "out_features": m.weight.shape[0]}),
    (nn.modules.batchnorm._NormBase, lambda m: _norm_sizes(m)),
    (nn.GroupNorm, lambda m: _group_norm_sizes(m)),
    (nn.PReLU, lambda m: {"num_parameters": m.weight.shape[0]}),
    (
        RankFactorizedLinear,
        lambda m: {"in_features": m.first.shape[1], "rank": m.first.shape[0], "out_features": m.second.shape[0]},
    ),
    (
        ShuffleLinear,
        lambda m: {
            "in_features": m.contract.shape[1] * m.groups,
            "bottleneck": m.contract.shape[0],
            "out_features": m.expand.shape[0],
        },
    ),
)
_WHOLE = "_lit_compress_whole"  # on a convolution in groups that was cut: their number before, and its output channels


def _convolution_sizes(conv: nn.modules.conv._ConvNd, left: Sequence[int] | None, whole: bool) -> dict[str, Any]:
    """Sizes of a convolution by its weight, which does not tell how many groups are left.

    Args:
        conv: With its new weight and its old sizes.
        left: Its output channels that are left; None where the weight tells, or all are.
        whole: Whether ``left`` is said of the convolution before it was ever cut, and not as it was.
    """
    now = conv.groups, conv.out_channels
    groups, before = vars(conv).get(_WHOLE, now) if whole else now
    out_channels, per_group = conv.weight.shape[:2]
    if left is not None and groups > 1:  # a group is gone with its last channel
        groups = len({channel * groups // before for channel in left})
    elif groups > 1 and groups == conv.in_channels:  # depthwise: a group for each input channel
        groups = groups * out_channels // before
    sizes = {"out_channels": out_channels, "in_channels": per_group * groups, "groups": groups}
    return sizes | {_WHOLE: now} if conv.groups > 1 and _WHOLE not in vars(conv) else sizes


def _norm_sizes(norm: nn.modules.batchnorm._NormBase) -> dict[str, int]:
    tensor = norm.weight if norm.weight is not None else norm.running_mean
    return {} if tensor is None else {"num_features": tensor.shape[0]}


def _group_norm_sizes(norm: nn.GroupNorm) -> dict[str, int]:
    channels = norm.weight.shape[0]  # without a weight, nothing of it is cut
    return {"num_channels": channels, "num_groups": norm.num_groups * channels // norm.num_channels}


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under every name it has."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def set_data(tensor: Tensor, data: Tensor) -> None:
    """Give a parameter or buffer other storage, possibly of another shape; it stays the same object.

    Autograd may still hold an accumulator for the old shape, for as long as a user keeps an old loss alive. It is only
    renewed when the dtype changes, so the dtype is changed on the way.
    """
    if tensor.requires_grad and tensor.shape != data.shape:
        other = torch.float16 if tensor.dtype == torch.float32 else torch.float32
        tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = data


class _Undo:
    """What it takes to put tensors and attributes back: references to the old storage, no copies."""

    def __init__(self) -> None:
        self._tensors: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self._attributes: list[tuple[nn.Module, str, Any]] = []

    def remember(self, tensor: Tensor) -> None:
        """Keep the present storage and gradient of a tensor."""
        self._tensors.append((tensor, tensor.data, tensor.grad))

    def remember_attribute(self, module: nn.Module, name: str) -> None:
        """Keep the present value of a module's own attribute, or that it has none."""
        self._attributes.append((module, name, vars(module).get(name)))

    def __call__(self) -> None:
        """Put everything back."""
        for module, name, value in reversed(self._attributes):
            if value is None:
                vars(module).pop(name, None)
            else:
                setattr(module, name, value)
        for tensor, data, grad in reversed(self._tensors):
            tensor.grad = None
            set_data(tensor, data)
            tensor.grad = grad


def cut_tensors(model: nn.Module, keep: Mapping[str, Any], take: Callable[[str, Tensor], Tensor]) -> None:
    """Slice the parameters and buffers of a network, their gradients, and the sizes that its modules note.

    Args:
        model: The network, changed in place.
        keep: The names to slice.
        take: From a name and a tensor of its shape to what remains, as :meth:`Plan.take`.

    Raises:
        ValueError: If a tensor is missing or has another shape. Nothing is changed then.
    """
    tensors = all_tensors(model)
    if missing := sorted(set(keep) - set(tensors)):
        raise ValueError(f"{type(model).__name__} lacks {missing[:3]}, which the plan cuts; it is another network.")
    once = {id(tensors[name]): name for name in keep}
    torch.clear_autocast_cache()  # it holds casts of the old weights
    compiled.forget()
    with torch.inference_mode(False), torch.no_grad():
        data = {name: take(name, tensors[name].data) for name in once.values()}
        grads = {name: take(name, grad) for name in once.values() if (grad := tensors[name].grad) is not None}
    undo = _Undo()
    try:
        for name in once.values():
            tensor = tensors[name]
            undo.remember(tensor)
            tensor.grad = None
            set_data(tensor, data[name])
            tensor.grad = grads.get(name)
        for path in sorted({_owner(name) for name in keep}):
            _note_sizes(model.get_submodule(path), undo, _left(path, keep))
    except BaseException:
        undo()
        raise


def fill_tensors(model: nn.Module, values: Mapping[str, Tensor], keep: Mapping[str, Any]) -> None:
    """Give parameters and buffers copies of values, of other sizes possibly, and the modules the sizes to note; no gradients.

    Args:
        model: The network, changed in place.
        values: Name of a tensor to its value.
        keep: What the values are of the network that was never cut, as :class:`Plan` has it.
    """
    compiled.forget()
    torch.clear_autocast_cache()
    tensors = all_tensors(model)
    undo = _Undo()
    filled: set[int] = set()
    with torch.inference_mode(False), torch.no_grad():
        for name, value in values.items():
            tensor = tensors[name]
            if id(tensor) in filled:  # tied
                continue
            filled.add(id(tensor))
            tensor.grad = None
            set_data(tensor, value.detach().to(tensor.device, copy=True))
    for path in sorted({_owner(name) for name in values}):
        _note_sizes(model.get_submodule(path), undo, _left(path, keep), whole=True)


def _owner(name: str) -> str:
    """Path of the module that uses a parameter or buffer; with a parametrization, that is not the one which holds it."""
    path = "." + name.rpartition(".")[0]
    return path.partition(".parametrizations.")[0].removeprefix(".")


def _left(path: str, keep: Mapping[str, Any]) -> Sequence[int] | None:
    """Output channels that are left of the layer at a path; None if all are."""
    names = (f"{path}.{weight}".removeprefix(".") for weight in ("weight", "parametrizations.weight.original"))
    left: Sequence[int] | None = next((keep[name].get(0) for name in names if name in keep), None)
    return left


def _note_sizes(module: nn.Module, undo: _Undo, left: Sequence[int] | None = None, whole: bool = False) -> None:
    kinds = (sizes(module) for kind, sizes in _SIZES if isinstance(module, kind))
    found = next(kinds, None)
    if found is None and isinstance(module, nn.modules.conv._ConvNd):
        found = _convolution_sizes(module, left, whole)
    for name, size in (found or {}).items():
        undo.remember_attribute(module, name)
        setattr(module, name, size)


@contextmanager
def substituted(model: nn.Module, values: Mapping[Tensor, Tensor], keep: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Run a network on other values, possibly of other shapes, for as long as the context lasts.

    Args:
        model: The network. Entries of its modules are exchanged; the parameters themselves are not touched, nor anything that
            autograd or a DDP wrapper has attached to them.
        values: Parameter or buffer to what stands in for it.
        keep: What the values are of the network that was never cut, as :class:`Plan` has it; None if they are cut out of it as
            it is.
    """
    exchanged: list[tuple[dict[str, Any], str, Tensor]] = []
    resized: set[str] = set()
    undo = _Undo()
    try:
        for path, module in model.named_modules():
            for entries in (module._parameters, module._buffers):
                for name, tensor in list(entries.items()):
                    if tensor is not None and tensor in values:
                        exchanged.append((entries, name, tensor))
                        entries[name] = values[tensor]
                        if values[tensor].shape != tensor.shape:
                            resized.add(_owner(f"{path}.{name}" if path else name))
        for path in sorted(resized):
            _note_sizes(model.get_submodule(path), undo, _left(path, keep or {}), whole=keep is not None)
        yield
    finally:
        undo()
        for entries, name, tensor in exchanged:
            entries[name] = tensor
