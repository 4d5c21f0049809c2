"""Which channels of a network are tied to which, and which parameters run along them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import nn

from lit_compress import rng
from lit_compress.compiled import eagerly
from lit_compress.labels import FIXED
from lit_compress.operations import LabelMode
from lit_compress.skips import ActivationPoint, Marks, PadPoint, SumPoint, Vector
from lit_compress.slicing import substituted
from lit_compress.tracing import BoundsError, WeightUse, named_tensors
from lit_compress.trial import is_what_is_left, one_of_each, without

Forward: TypeAlias = Callable[[], Any]
_TRIALS = 8  # runs to find out which of the places that part channels follow a cut; the rest is left whole


@dataclass(frozen=True)
class Layer:
    """A layer whose weight makes output channels.

    Args:
        name: As in ``model.named_modules()``; the parameter's own name where it is not called ``weight``.
        weight: Name of its weight parameter.
        dim: The weight's dimension of output channels.
        classes: For each output channel, the class of channels that it is cut with; -1 where it is not cuttable at all.
        own: Whether it makes channels. A depthwise convolution passes its input's channels on.
    """

    name: str
    weight: str
    dim: int
    classes: Vector
    own: bool


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that are chosen together: those of a layer, or those that several tied layers share.

    Args:
        classes: The classes of channels to choose from; none is frozen.
        members: Layer name to, for each of its output channels, the position in ``classes`` or -1.
    """

    classes: Vector
    members: Mapping[str, Vector]

    @property
    def name(self) -> str:
        """The first member, in the order of the forward."""
        return next(iter(self.members))


@dataclass(frozen=True)
class ChannelGraph:
    """What a trace found out about a network. Nothing here refers to the network's tensors.

    Args:
        layers: Every layer met, in the order of the forward.
        tensors: Name of a parameter or buffer to the dimensions that carry channels: the class at each index, -1 for a
            channel that stays whatever is cut.
        shapes: Shape of every parameter and buffer.
        trainable: Names of the parameters with ``requires_grad``.
        frozen: Class to the reason why it must stay.
        uses: Each application of a weight.
        unused: Layers with parameters that the traced forward never ran.
        refused: What looks like a layer but is not in ``layers``, to the reason why.
        sums: Where two branches are added.
        norms: Weight of a layer to the running mean of the batch norm that takes its output directly.
        activations: What activation functions give, in the order of the forward.
        pads: Modules whose channels are scattered to the slots of a skip. A slot that goes takes its channel along.
        trained: Modules that run further layers in training mode (auxiliary heads, say), which the graph therefore holds.
    """

    layers: Mapping[str, Layer]
    tensors: Mapping[str, Mapping[int, Vector]]
    shapes: Mapping[str, tuple[int, ...]]
    trainable: frozenset[str]
    frozen: Mapping[int, str]
    uses: tuple[WeightUse, ...]
    unused: tuple[str, ...]
    refused: Mapping[str, str] = field(default_factory=dict)
    sums: tuple[SumPoint, ...] = ()
    pads: tuple[PadPoint, ...] = ()
    norms: Mapping[str, str] = field(default_factory=dict)
    activations: tuple[ActivationPoint, ...] = ()
    trained: tuple[str, ...] = ()

    def groups(self) -> list[ChannelGroup]:
        """Channels that may be cut, sorted into groups that share the same layers."""
        where: dict[int, list[tuple[str, int]]] = {}
        for layer in self.layers.values():
            for index, channel_class in enumerate(layer.classes.tolist()):
                if layer.own and channel_class != FIXED and channel_class not in self.frozen:
                    where.setdefault(channel_class, []).append((layer.name, index))
        alike: dict[tuple[str, ...], list[int]] = {}
        for channel_class, places in where.items():
            alike.setdefault(tuple(name for name, _ in places), []).append(channel_class)
        groups = []
        for names, classes in alike.items():
            position = {channel_class: index for index, channel_class in enumerate(classes)}
            members = {
                name: np.array([position.get(c, FIXED) for c in self.layers[name].classes.tolist()], dtype=np.int64)
                for name in dict.fromkeys(names)
            }
            groups.append(ChannelGroup(np.array(classes, dtype=np.int64), members))
        return groups

    def mark(self, removed: Vector | Sequence[int] = ()) -> Marks:
        """Marks on the classes to remove, and on the channels of padded blocks whose slot in the skip is among them."""
        marks = np.zeros(self._classes + 1, dtype=bool)
        marks[np.asarray(removed, dtype=np.int64)] = True
        self.mark_slots(marks)
        return marks

    def mark_slots(self, marks: Marks) -> None:
        """Mark, in place, the channels of padded blocks whose slot in the skip is marked."""
        before = -1
        while before != (now := int(marks.sum())):
            before = now
            for pad in self.pads:
                marks[pad.sources[marks[pad.slots[pad.positions]]]] = True

    def shape_without(self, tensor: str, marks: Marks) -> tuple[int, ...]:
        """Shape of a parameter or buffer once the marked classes are removed."""
        shape = list(self.shapes[tensor])
        for dim, classes in self.tensors.get(tensor, {}).items():
            shape[dim] -= int(marks[classes].sum())
        return tuple(shape)

    def mult_adds(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Mult-adds of the batch that was traced, if the weights had these shapes."""
        return sum(use.positions * prod(shapes[use.weight]) for use in self.uses)

    def outputs_and_weights(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        """Numbers that layers give for the batch that was traced, and weights that they have, if the weights had these shapes."""
        outputs = sum(shapes[use.weight][use.out_dim] * use.positions for use in self.uses)
        return outputs, sum(prod(shapes[weight]) for weight in {use.weight for use in self.uses})

    @cached_property
    def _classes(self) -> int:
        found = [classes for dims in self.tensors.values() for classes in dims.values()]
        found += [layer.classes for layer in self.layers.values()]
        found += [classes for pad in self.pads for classes in (pad.sources, pad.slots)]
        return max((int(classes.max(initial=FIXED)) for classes in found), default=FIXED) + 1

    def read_classes(self) -> set[int]:
        """Classes of channels that enter a weight. What no weight reads leaves the network, though the trace saw no output."""
        read: set[int] = {source for pad in self.pads for source in pad.sources.tolist()}
        for use in self.uses:
            read.update(self.tensors.get(use.weight, {}).get(use.in_dim, np.zeros(0)).tolist())
        return read

    def activation_of(self, group: ChannelGroup) -> ActivationPoint | None:
        """The first activation function that a group's channels go through, if the group is one layer's alone and all of it."""
        if len(group.members) > 1:
            return None
        mine = set(group.classes.tolist())
        for point in self.activations:
            if not mine.isdisjoint(point.channels.tolist()):
                return point
        return None

    def why_whole(self, layer: str) -> str:
        """The reason why channels of a layer cannot be cut, or an empty string if they all can."""
        for channel_class in self.layers[layer].classes.tolist():
            if channel_class == FIXED:
                return "its channels come from the network's input"
            if channel_class in self.frozen:
                return self.frozen[channel_class]
        return ""


def trace(model: nn.Module, forward: Forward, *, pad_back: Collection[str] | Literal["identity"] = ()) -> ChannelGraph:
    """Run a forward once on labels and find out which channels are tied.

    Args:
        model: The network. Names in the result are relative to it. It runs in evaluation mode and is left as it was.
        forward: Runs ``model`` as it is used, on real inputs, and returns what leaves the network. A batch of one is enough.
        pad_back: Paths of modules at the end of a residual block whose output is to be scattered back to the width of the skip,
            so that the block is cut on its own; ``"identity"`` finds them all where the skip is an identity or zero-padded.

    Returns:
        The graph. What an unknown operation touches is frozen in it, never guessed.

    Raises:
        ValueError: If the forward meets no layer of ``model``, or a parameter is not yet materialised.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
        >>> graph = trace(net, lambda: net(torch.zeros(1, 1, 4, 4)))
        >>> [(group.name, len(group.classes)) for group in graph.groups()]
        [('0', 4)]
        >>> graph.why_whole("3")
        'they are the output of the network'
    """
    for name, tensor in named_tensors(model):
        kind = "Parameter" if isinstance(tensor, nn.Parameter) or nn.parameter.is_lazy(tensor) else "Buffer"
        if nn.parameter.is_lazy(tensor):
            raise ValueError(f"{kind} {name!r} has no shape yet; run the network once before analysing it.")
        if tensor.is_meta:
            raise ValueError(
                f"{kind} {name!r} is on the meta device and has no values; give it some before analysing the network, by "
                "`to_empty` and loading weights."
            )
    if pad_back == "identity":
        pad_back = {point.block for point in trace(model, forward).sums if point.block is not None}
    mode = _followed(model, forward, pad_back)
    if missing := sorted(set(pad_back) - {point.module for point in mode.pads}):
        raise ValueError(f"{missing[0]!r} cannot be padded back: {type(model).__name__} has no such module, or does not run it.")
    if not mode.leaving:
        raise ValueError(
            f"The forward ran no convolution or linear layer of {type(model).__name__}; "
            "it must run the network that is to be cut."
        )
    return _proven(model, forward, mode, pad_back)


def _followed(model: nn.Module, forward: Forward, pad_back: Collection[str]) -> LabelMode:
    """One run of the forward on labels, and one more for layers that run in training only (auxiliary heads, say)."""
    mode = LabelMode(model, pad_back)
    with evaluating(model), rng.isolated(), eagerly(), mode.following():
        try:
            outputs = forward()
        except BoundsError as error:
            raise ValueError(f"{type(model).__name__} cannot be followed: {error}.") from error
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__} does not run on the example inputs; it failed in {mode.where}: {error}"
            ) from error
        mode.freeze_outputs(outputs)
        # Slots of a skip are made anew in each run, and could not be told to be the same.
        owners = [] if mode.pads else sorted({path.rpartition(".")[0] for path in _unused(model, mode)} - {""})
        owners = [path for path in _ancestors(owners) if path in mode.called]
        if owners:
            with mode.aside(), in_training(model, owners):
                try:
                    mode.freeze_outputs(forward())
                    mode.trained = tuple(owners)
                except Exception:  # it may want targets, say; what it has run until then was followed
                    mode.freeze_new(f"the forward of {type(model).__name__} runs it in training mode only, and fails there")
    return mode


def _ancestors(paths: Iterable[str]) -> list[str]:
    """Paths of modules and of all that hold them, the network itself included."""
    return sorted({".".join(parts[:end]) for path in paths for parts in [path.split(".")] for end in range(len(parts) + 1)})


def _proven(model: nn.Module, forward: Forward, mode: LabelMode, pad_back: Collection[str]) -> ChannelGraph:
    """The graph, with channels that the forward parts frozen where it does not part fewer of them alike."""
    graph, classes, tensors = _graph(model, mode), _classes(mode), dict(named_tensors(model))
    queue, trials = [mode.supposed], 0
    while queue and queue[0]:
        some = queue.pop()
        marks = one_of_each(graph, [classes[supposition.atoms] for supposition in some])
        if not marks.any():
            continue  # frozen anyway
        trials += 1
        if trials <= _TRIALS:
            try:
                with substituted(model, without(graph, marks, tensors)):
                    if is_what_is_left(_graph(model, _followed(model, forward, pad_back)), graph, marks):
                        continue
            except ValueError:
                pass
        if trials <= _TRIALS and len(some) > 1:
            queue += [some[len(some) // 2 :], some[: len(some) // 2]]
        else:
            for supposition in some:
                mode.freeze(supposition.atoms, supposition.why)
    return _graph(model, mode) if trials else graph


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and then every submodule's own mode and buffers again.

    The modes are set one by one: `eval()` may be overridden with something that cannot be undone, and some forwards count in a
    buffer whatever the mode.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = [(module, name, buffer, buffer.clone()) for module in modes for name, buffer in module.named_buffers(recurse=False)]
    for module in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for module, name, buffer, content in buffers:
            module._buffers[name] = buffer
            if buffer.shape == content.shape and not buffer.is_meta and not torch.equal(buffer, content):
                buffer.copy_(content)


@contextmanager
def in_training(model: nn.Module, paths: Iterable[str]) -> Iterator[None]:
    """Training mode for some modules alone, and not for those that they hold."""
    modules = [model.get_submodule(path) for path in paths]
    before = [module.training for module in modules]
    for module in modules:
        module.training = True
    try:
        yield
    finally:
        for module, training in zip(modules, before, strict=True):
            module.training = training


def _graph(model: nn.Module, mode: LabelMode) -> ChannelGraph:
    classes = _classes(mode)
    frozen: dict[int, str] = {}
    for atoms, why in mode.frozen:
        for channel_class in np.unique(classes[atoms]).tolist():
            frozen.setdefault(channel_class, why)

    def classify(vector: Vector) -> Vector:
        return np.where(vector == FIXED, FIXED, classes[vector])

    tensors: dict[str, dict[int, Vector]] = {}
    for (name, dim), vector in mode.met.items():
        if (vector != FIXED).any():
            tensors.setdefault(name, {})[dim] = classify(vector)
    layers: dict[str, Layer] = {}
    for use in mode.uses:
        name = _layer_name(use.weight)
        made = classify(mode.made[use.weight])
        layers.setdefault(name, Layer(name, use.weight, use.out_dim, made, mode.leaving[use.weight]))
    unused = _unused(model, mode)
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(model)}
    trainable = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    refused = {
        **{_layer_name(name): "the forward does not run it" for path in unused for name in (f"{path}.weight",) if name in shapes},
        **{path: why for path, why in mode.refused.items() if path not in layers},
        **_aliases(model, layers),
    }
    # One that runs twice cannot be padded back: each run would need a skip of the same channels.
    sums = tuple(
        replace(point, channels=classify(point.channels), block=point.block if mode.calls[point.block or ""] == 1 else None)
        for point in mode.sums
    )
    activations = tuple(
        _activation(mode, index, replace(point, channels=classify(point.channels)), classify)
        for index, point in enumerate(mode.activations)
    )
    pads = tuple(replace(point, sources=classify(point.sources), slots=classify(point.slots)) for point in mode.pads)
    _freeze_slots(pads, frozen)
    return ChannelGraph(
        layers,
        tensors,
        shapes,
        trainable,
        frozen,
        tuple(mode.uses),
        tuple(unused),
        refused,
        sums,
        pads,
        mode.norms,
        activations,
        mode.trained,
    )


def _activation(mode: LabelMode, index: int, point: ActivationPoint, classify: Callable[[Vector], Vector]) -> ActivationPoint:
    """An activation with where it can be seen, best by a module that runs only once, and what is pooled of it later."""
    later = [classify(atoms) for before, atoms in mode.maxima if before > index]
    pooled = frozenset(np.intersect1d(point.channels, np.concatenate([np.zeros(0, np.int64), *later])).tolist()) - {FIXED}
    taps = mode.activation_taps[index]
    alone = next((replace(tap, call=None) for tap in taps if mode.calls[tap.module] == 1), None)
    return replace(point, tap=alone or next(iter(taps), None), pooled=pooled)


def _unused(model: nn.Module, mode: LabelMode) -> list[str]:
    """Modules with parameters of their own that the forward did not run."""
    met = {name for name, _ in mode.met}
    return [
        path
        for path, module in model.named_modules()
        if path not in mode.called
        and (own := [f"{path}.{name}" if path else name for name, _ in module.named_parameters(recurse=False)])
        and not met.intersection(own)
    ]


def _freeze_slots(pads: Sequence[PadPoint], frozen: dict[int, str]) -> None:
    """A slot whose channel must stay must stay as well; so on through blocks whose channels are slots of others."""
    changed = True
    while changed:
        changed = False
        for pad in pads:
            for source, slot in zip(pad.sources.tolist(), pad.slots[pad.positions].tolist(), strict=True):
                if (source == FIXED or source in frozen) and slot not in frozen:
                    frozen[slot] = f"a channel that cannot be cut goes there from {pad.module!r}"
                    changed = True


def _aliases(model: nn.Module, layers: Mapping[str, Layer]) -> dict[str, str]:
    """Layers whose weight goes by the name of another one's."""
    first = {
        id(parameter): _layer_name(name) for name, parameter in reversed(list(model.named_parameters(remove_duplicate=False)))
    }
    names = {_layer_name(name): first[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}
    return {
        name: f"its weight is that of layer {layer!r}; name that one"
        for name, layer in names.items()
        if layer in layers and name not in layers and not name.endswith(".bias")
    }


def _classes(mode: LabelMode) -> Vector:
    """The class of each atom, numbered by first appearance; the last entry serves FIXED and is never read."""
    pairs = np.concatenate([np.zeros((2, 0), np.int64), *mode.ties], axis=1)
    ones = np.ones(pairs.shape[1], dtype=np.int8)
    matrix = coo_matrix((ones, (pairs[0], pairs[1])), shape=(mode.atoms, mode.atoms))
    _, component = connected_components(matrix, directed=False)
    return np.append(component.astype(np.int64), FIXED)


def _layer_name(weight: str) -> str:
    owner, _, leaf = weight.removesuffix(".original").replace("parametrizations.weight", "weight").rpartition(".")
    return owner if leaf == "weight" else weight
