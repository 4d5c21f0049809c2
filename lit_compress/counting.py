"""Parameters and mult-adds of a network, layer by layer, in one forward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lit_compress import rng
from lit_compress.graph import evaluating
from lit_compress.layers.structured import Pointwise, StructuredLinear


@dataclass(frozen=True)
class LayerCost:
    """What one module costs by itself, without the modules in it.

    Args:
        name: As in ``model.named_modules()``; the network itself is ``""``.
        kind: Its class.
        shape: Of its last output, None if it gave no tensor.
        parameters: Elements of its own parameters that no row before has counted.
        mult_adds: Multiply-adds of all its calls in one forward.
    """

    name: str
    kind: str
    shape: tuple[int, ...] | None
    parameters: int
    mult_adds: int


def layer_costs(
    model: nn.Module, run: Callable[[], Any], *, count_relu: bool = False, trainable: bool = True
) -> tuple[LayerCost, ...]:
    """What each module costs: those with parameters or mult-adds of their own, in the order of ``named_modules()``.

    Convolutions, linear layers and matrix products are counted as PyTorch's flop counter sees them (half of its figure), and
    belong to the innermost module whose forward runs them. A compressed linear layer counts as the path that its evaluation
    takes.

    Args:
        model: The network.
        run: Runs it once; it is in evaluation mode meanwhile.
        count_relu: Count as the document's tables do; see :func:`lit_compress.count_mult_adds`.
        trainable: Count only parameters with ``requires_grad``.
    """
    names = {module: name for name, module in model.named_modules()}
    own = dict.fromkeys(names, 0)
    shapes: dict[nn.Module, tuple[int, ...]] = {}
    counter = FlopCounterMode(display=False)
    open_calls = [_Call(0)]  # outermost: what runs outside of any module

    def enter(module: nn.Module, args: Any) -> None:
        open_calls.append(_Call(counter.get_total_flops()))

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        call = open_calls.pop()
        total = counter.get_total_flops() - call.start
        open_calls[-1].inside += total
        if isinstance(out, Tensor):
            shapes[module] = tuple(out.shape)
        if isinstance(module, StructuredLinear):
            own[module] += module.count_mult_adds(args[0], out, printed=count_relu)
        else:
            own[module] += (total - call.inside) // 2
        if count_relu and isinstance(out, Tensor):
            own[module] += _document_extras(module, args, out)

    handles = [
        hook for module in names for hook in (module.register_forward_pre_hook(enter), module.register_forward_hook(leave))
    ]
    try:
        with evaluating(model), torch.no_grad(), rng.isolated(), counter:
            run()
    finally:
        for handle in handles:
            handle.remove()
    own[model] += (counter.get_total_flops() - open_calls[0].inside) // 2
    counted: set[nn.Parameter] = set()
    rows = []
    for module, name in names.items():
        if isinstance(module, nn.ParameterList | nn.ParameterDict):
            continue  # counted with the module that holds it
        new = {p for p in _own_parameters(module) if p.requires_grad or not trainable} - counted
        counted |= new
        rows.append(LayerCost(name, type(module).__name__, shapes.get(module), sum(p.numel() for p in new), own[module]))
    return tuple(row for row in rows if row.parameters or row.mult_adds)


@dataclass
class _Call:
    """A forward that has begun: flops before it, and those of the modules that it has called."""

    start: int
    inside: int = 0


def _own_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    yield from module.parameters(recurse=False)
    for child in module.children():
        if isinstance(child, nn.ParameterList | nn.ParameterDict):
            yield from child.parameters()


def _document_extras(module: nn.Module, args: Any, out: Tensor) -> int:
    if isinstance(module, nn.ReLU):
        return out.numel()
    if isinstance(module, nn.Linear | StructuredLinear) and not isinstance(module, Pointwise) and module.bias is not None:
        return out.numel()
    if isinstance(module, nn.AvgPool2d | nn.MaxPool2d):
        size = module.kernel_size
        return out.numel() * (math.prod(size) if isinstance(size, tuple) else size**2)
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return int(args[0].numel())
    return 0
