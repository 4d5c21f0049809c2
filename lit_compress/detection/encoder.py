"""What a network does between two of its layers, operation by operation, as one forward shows it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from lit_compress import compiled
from lit_compress.taps import Taps

_ACTIVATIONS = frozenset(
    {
        "_prelu_kernel", "celu", "elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "mish", "relu", "selu",
        "sigmoid", "silu", "softplus", "tanh",
    }
)  # fmt: skip
_COPIES = frozenset({"_to_copy", "alias", "clone", "detach"})
# What gives a map again, with another scale for each channel or each sample at most.
_PLAIN = _COPIES | {
    "_batch_norm_with_update", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
    "miopen_batch_norm", "native_batch_norm", "native_dropout", "native_group_norm", "native_layer_norm",
}  # fmt: skip
_JOINS = frozenset({"add", "div", "mul", "sub"})
# What takes a map for its shape alone, as dropout does for its noise.
_SHAPES = frozenset(
    {
        "empty_like",
        "full_like",
        "new_empty",
        "new_full",
        "new_ones",
        "new_zeros",
        "ones_like",
        "rand_like",
        "randn_like",
        "zeros_like",
    }
)
_POOLS: dict[str, Literal["max pool", "average pool"]] = {
    "max_pool2d_with_indices": "max pool", "_mps_max_pool2d": "max pool", "avg_pool2d": "average pool"
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Window:
    """How a convolution or a pooling goes over a map; everything down and across."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    _: KW_ONLY
    kernel: tuple[int, int]
    ceil: bool = False

    @property
    def overlaps(self) -> bool:
        """Whether a position may lie in several windows."""
        return any(d * (k - 1) >= s for k, s, d in zip(self.kernel, self.stride, self.dilation, strict=True))

    def size_after(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of what comes out.

        Example:
            >>> Window((2, 2), (1, 1), kernel=(3, 3)).size_after((75, 38))
            (38, 19)
        """
        height, width = (self._length(size[dim], dim) for dim in (0, 1))
        return height, width

    def _length(self, length: int, dim: int) -> int:
        kernel, stride, padding = self.kernel[dim], self.stride[dim], self.padding[dim]
        room = length + 2 * padding - self.dilation[dim] * (kernel - 1) - 1
        windows = (room + (stride - 1 if self.ceil else 0)) // stride + 1
        # Rounded up, the last window must still begin inside of the map or its left padding.
        return windows - 1 if self.ceil and (windows - 1) * stride >= length + padding else windows


@dataclass(frozen=True, slots=True)
class Value:
    """A map on its way through the network.

    Args:
        channels: Its channels.
        stride: Pixels of the network's input from one position to the next, down and across.
        origin: Name of the weight whose output channels these are; None for the input, and where no parameter says.
    """

    channels: int
    stride: tuple[int, int]
    origin: str | None


@dataclass(frozen=True, slots=True)
class Step:
    """One operation on maps.

    Args:
        kind: What it is; ``"other"`` is what has no mirror image.
        inputs: Numbers of the values that it takes.
        output: Number of the value that it gives.
        path: The module that runs it.
        operation: What PyTorch calls it.
        window: Of a convolution or a pooling.
        weight: Name of a convolution's weight; None if it is computed from others.
        shape: Shape of that weight.
        groups: Into how many groups it parts its channels.
    """

    kind: Literal["convolution", "max pool", "average pool", "activation", "sum", "other"]
    inputs: tuple[int, ...]
    output: int
    path: str
    operation: str
    window: Window | None = None
    weight: str | None = None
    shape: tuple[int, ...] = ()
    groups: int = 1

    def size_after(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of what comes out."""
        return size if self.window is None else self.window.size_after(size)


@dataclass(frozen=True)
class Encoder:
    """The maps that one forward has made, the steps between them, and which maps the layers asked for give.

    Args:
        values: All maps, by their number.
        steps: In the order of the forward.
        marks: Name of a layer to the number of the map that it gives; of one that holds the others, that it takes.
        entry: The module that takes the network's input, from which strides count: a layer, or None if no layer takes it as is.
    """

    values: tuple[Value, ...]
    steps: tuple[Step, ...]
    marks: dict[str, int]
    entry: str | None

    def between(self, first: int, last: int) -> tuple[Step, ...]:
        """The steps on any way from one map to another, with the inputs that lie on one.

        Raises:
            ValueError: If there is no way, or a step on it has no mirror image.
        """
        ahead = {first}
        for step in self.steps:
            if ahead.intersection(step.inputs):
                ahead.add(step.output)
        behind, found = {last}, []
        for step in reversed(self.steps):
            inputs = tuple(value for value in step.inputs if value in ahead)
            if step.output in behind and step.output != first and inputs:
                behind.update(inputs)
                found.append(replace(step, inputs=inputs))
        origin = next((name for name, number in self.marks.items() if number == first), first)
        goal = next((name for name, number in reversed(self.marks.items()) if number == last), last)
        if first == last or last not in ahead:
            raise ValueError(f"{goal!r} takes nothing that comes from {origin!r}: name layers in the order in which "
                             "they run, each behind the one before.")  # fmt: skip
        for step in reversed(found):
            if step.kind == "other":
                raise ValueError(
                    f"Layer {step.path!r}, between {origin!r} and {goal!r}, cannot be mirrored: {step.operation}. "
                    "Name layers with only convolutions, poolings by modules, norms, activations, dropout and skip connections "
                    "between them."
                )
        return tuple(reversed(found))

    def weights_before(self, last: int) -> tuple[str, ...]:
        """Names of the convolutions' weights that a map comes from."""
        behind, names = {last}, []
        for step in reversed(self.steps):
            if step.output in behind:
                behind.update(step.inputs)
                names += [step.weight] if step.weight is not None else []
        return tuple(dict.fromkeys(reversed(names)))


def follow(network: nn.Module, layers: Sequence[str], run: Callable[[], object]) -> Encoder:
    """Watch one forward and note what happens to maps on the way to the layers.

    Args:
        network: The network.
        layers: Names of the layers, as in ``network.named_modules()``. Of the first, the input is meant if it holds all others.
        run: Runs the network once, without gradients.

    Raises:
        ValueError: If the network has no layer of a name, one does not run or runs twice, or it gives something else than a map
            that a convolution has made.
    """
    Taps(network, layers)  # tells of names that do not exist
    first_input = layers[0] if all(name.startswith(f"{layers[0]}." if layers[0] else "") for name in layers[1:]) else None
    watch = _Watch(network)
    taken: list[Tensor] = []
    modules = dict(network.named_modules())

    def take(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        taken.extend(value for value in inputs[:1] if isinstance(value, Tensor))

    def give(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if name in watch.marks:
            raise ValueError(
                f"Layer {name!r} runs more than once in a forward, so that its name does not say which output is meant."
            )
        watch.marks[name] = watch.number_of(output, name)

    with ExitStack() as stack:
        for path, module in modules.items():
            stack.callback(module.register_forward_pre_hook(partial(watch.enter, path)).remove)
            stack.callback(module.register_forward_hook(partial(watch.leave, path)).remove)
        for name in layers:
            if name == first_input:
                stack.callback(modules[name].register_forward_pre_hook(take).remove)
            else:
                stack.callback(modules[name].register_forward_hook(partial(give, name)).remove)
        stack.enter_context(compiled.eagerly())
        torch.clear_autocast_cache()  # a cast made earlier would not be seen
        with torch.no_grad(), watch:
            run()
    if first_input is not None and taken:
        watch.marks[first_input] = watch.number_of(taken[0], first_input)
    if missing := [name for name in layers if name not in watch.marks]:
        raise ValueError(f"Layer {missing[0]!r} is named, but the training step does not run it.")
    return watch.encoder(layers)


class _Watch(TorchDispatchMode):
    """Numbers the maps that come from convolutions, and notes the operations between them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.values: list[Value] = []
        self.steps: list[Step] = []
        self.marks: dict[str, int] = {}
        self._roots: dict[int, str] = {}  # number of an input to the module that takes it
        self._stack: list[str] = []
        self._runs: Counter[str] = Counter()
        self._modules = dict(network.named_modules())
        self._numbers: Any = WeakTensorKeyDictionary()
        self._names: Any = WeakTensorKeyDictionary()
        for name, parameter in network.named_parameters():
            self._names[parameter] = name

    def enter(self, path: str, module: nn.Module, inputs: Any) -> None:
        self._runs[path] += 1
        self._stack.append(path)

    def leave(self, path: str, module: nn.Module, inputs: Any, output: Any) -> None:
        while self._stack.pop() != path:  # modules that failed, where the forward caught it, never left
            pass

    def number_of(self, output: Any, layer: str) -> int:
        if not isinstance(output, Tensor):
            raise ValueError(
                f"Layer {layer!r} gives or takes a {type(output).__name__}, and only a map can be reconstructed: name a layer "
                "inside it instead."
            )
        if output.ndim != 4 or output not in self._numbers:
            raise ValueError(
                f"Layer {layer!r} gives or takes a tensor of shape {tuple(output.shape)}, which is no map (N, C, H, W) of a "
                "convolution."
            )
        return int(self._numbers[output])

    def encoder(self, layers: Sequence[str]) -> Encoder:
        """What was seen; of poolings and their like, only those that a hook can find again keep their kind."""
        steps = [self._checked(step) for step in self.steps]
        before = {self.marks[layers[-1]]}
        for step in reversed(steps):
            if step.output in before:
                before.update(step.inputs)
        path = self._roots[min(before.intersection(self._roots))]
        entry = path if isinstance(self._modules[path], nn.Conv2d) and self._runs[path] == 1 else None
        return Encoder(tuple(self.values), tuple(steps), {name: self.marks[name] for name in layers}, entry)

    def _checked(self, step: Step) -> Step:
        if step.kind != "max pool":
            return step
        if not isinstance(self._modules[step.path], nn.MaxPool2d):
            why = "it calls max_pool2d as a function, whose switches no hook sees; use a module"
        elif self._runs[step.path] > 1:
            why = "it runs more than once in a forward; use a module for each place"
        else:
            return step
        return replace(step, kind="other", operation=why)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        taken = [(one, int(self._numbers[one])) for one in tensors if one in self._numbers]
        result = function(*args, **(kwargs or {}))
        # In place, the result is the very tensor that was taken, and from here on another map.
        name = function.overloadpacket.__name__.rstrip("_")
        outputs = [one for one in tree_leaves(result) if isinstance(one, Tensor)]
        if outputs and name in _COPIES and args[0] in self._names:
            self._names[outputs[0]] = self._names[args[0]]
        if name == "convolution" and not taken and args[0].ndim == 4:
            number = self._numbers[args[0]] = self._new(Value(args[0].shape[1], (1, 1), None))
            self._roots[number] = self._path
            taken = [(args[0], number)]
        if taken and outputs and name not in _SHAPES:
            self._note(name, args, taken, outputs)
        return result

    @property
    def _path(self) -> str:
        return self._stack[-1] if self._stack else ""

    def _new(self, value: Value) -> int:
        self.values.append(value)
        return len(self.values) - 1

    def _note(self, name: str, args: Any, taken: Sequence[tuple[Tensor, int]], outputs: Sequence[Tensor]) -> None:
        output, whole = outputs[0], [number for one, number in taken if one.shape == outputs[0].shape]
        narrow = all(one.shape[2:] == (1, 1) for one, _ in taken if one.shape != output.shape)
        if (name in _PLAIN or (name in _JOINS and output.ndim == 4 and narrow)) and len(whole) == 1:
            self._numbers[output] = whole[0]  # a norm, or with a scale or an offset for each channel at most
            return
        numbers = tuple(number for _, number in taken)
        value, step = self.values[numbers[0]], Step("other", numbers, -1, self._path, f"it calls {name}")
        if name == "convolution" and output.ndim == 4 and not args[6] and len(taken) == 1:
            window = Window(*(_pair(args[place]) for place in (3, 4, 5)), kernel=_pair(args[1].shape[2:]))
            origin = self._names.get(args[1])
            value = Value(output.shape[1], _times(value.stride, window.stride), origin)
            step = replace(step, kind="convolution", window=window, weight=origin, shape=tuple(args[1].shape), groups=args[8])
        elif name in _POOLS and output.ndim == 4:
            window = _pool_window(args, averages=name == "avg_pool2d")
            value = replace(value, stride=_times(value.stride, window.stride))
            step = replace(step, kind=_POOLS[name], window=window)
        elif name in _ACTIVATIONS and whole:
            step = replace(step, kind="activation")
        elif name == "add" and len(whole) == len(taken) == 2:
            step = replace(step, kind="sum")
        for one in outputs:
            self._numbers[one] = self._new(value)
            self.steps.append(replace(step, output=self._numbers[one]))


def _pair(numbers: Any) -> tuple[int, int]:
    first, second = (*numbers, numbers[0])[:2]  # one number stands for both
    return int(first), int(second)


def _times(first: tuple[int, int], second: tuple[int, int]) -> tuple[int, int]:
    return first[0] * second[0], first[1] * second[1]


def _pool_window(args: Sequence[Any], *, averages: bool) -> Window:
    given = [*args[1:], *[None] * 5]  # what has its default value is left out
    kernel = _pair(given[0])
    dilation, ceil = ((1, 1), given[3]) if averages else (_pair(given[3] or (1,)), given[4])
    return Window(_pair(given[1] or kernel), _pair(given[2] or (0,)), dilation, ceil=bool(ceil), kernel=kernel)
