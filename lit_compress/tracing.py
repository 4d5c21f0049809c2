"""What a run on labels finds out: which channels are tied, frozen, or run along which parameters, and in which module.

What each operation does to labels is in :mod:`lit_compress.operations`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from lit_compress.labels import FIXED, fixed, spread, to_numpy, vector_along
from lit_compress.padding import PaddedBack
from lit_compress.skips import ActivationPoint, Marks, PadPoint, SumPoint, Tap, Vector

# The (parameter or buffer, dimension) pairs that run along a dimension of a tensor made from parameters.
Axis: TypeAlias = frozenset[tuple[str, int]]
Origin: TypeAlias = tuple[Axis, ...]

# Beyond these, a network is refused: some 10 s of one core, and as much memory as a large network's weights.
_MOST_OPERATIONS = 50_000
_MOST_BYTES = 2**30
# These compare their inputs with numbers of their own before anything else.
SIZES_CHECKED = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)


class BoundsError(ValueError):
    """A forward takes too much time or memory to be followed."""


@dataclass(frozen=True)
class WeightUse:
    """One application of a weight in the traced forward.

    Args:
        weight: Name of the weight parameter.
        out_dim: Its dimension of output channels.
        in_dim: Its dimension of input channels.
        positions: How many times each element is multiplied, over the whole batch traced.
        plain: Whether the parameter is used as it is, and not multiplied with another one (a mask, say).
        groups: Into how many groups of one size the channels are parted.
    """

    weight: str
    out_dim: int
    in_dim: int
    positions: int
    plain: bool = True
    groups: int = 1


@dataclass(frozen=True)
class Supposition:
    """Channels are parted, and the parts are supposed to shrink alike if a cut takes the same channels out of each.

    Args:
        atoms: The channels parted.
        why: What to say of them if the forward turns out to part them by fixed numbers.
    """

    atoms: Vector
    why: str


class Trace(TorchDispatchMode):
    """Keeps what operations say of the channels that run through them, and where in the network they are.

    Args:
        model: The network whose parameters and buffers are recognised.
        pad_back: Paths of modules whose output is to be padded back: their channels are not tied to those they are added to.
    """

    def __init__(self, model: nn.Module, pad_back: Collection[str] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.atoms = 0
        self.ties: list[Vector] = []  # (2, n): atoms that are cut together
        self.frozen: list[tuple[Vector, str]] = []
        self.met: dict[tuple[str, int], Vector] = {}  # labels along each dimension of each parameter and buffer
        self.made: dict[str, Vector] = {}  # weight -> the channels of its first use
        self.uses: list[WeightUse] = []
        self.leaving: dict[str, bool] = {}  # weights in the order met -> whether the layer makes channels of its own
        self.called: set[str] = set()
        self.calls: Counter[str] = Counter()  # of each module
        self.supposed: list[Supposition] = []
        self.refused: dict[str, str] = {}  # path of a module -> why its weight is not a layer's
        self.sums: list[SumPoint] = []  # with atoms in place of classes
        self.activations: list[ActivationPoint] = []  # likewise
        self.activation_taps: list[list[Tap]] = []  # where each can be seen
        self.maxima: list[tuple[int, Vector]] = []  # channels whose maximum is taken, and how many activations were before
        self.pads: list[PadPoint] = []
        self.trained: tuple[str, ...] = ()  # modules that run further layers in training mode
        self._norms: dict[str, str] = {}  # weight of a layer -> the running mean of a batch norm that takes its output
        self._product: Any = WeakTensorKeyDictionary()  # output of a layer -> its weight
        self._taken: Counter[str] = Counter()  # weight of a layer -> how many operations take its output
        self._pad_back = frozenset(pad_back)
        self._own: set[tuple[int, int]] = set()  # first atom and width of each use of a layer
        self._busy: Marks = np.zeros(1, dtype=bool)  # atoms that are tied, or entered a layer so far
        self._operations = 0
        self._sum_of: Any = WeakTensorKeyDictionary()  # tensor -> index of the sum that it is
        self._activation_of: Any = WeakTensorKeyDictionary()  # the same for activations
        self._ends: Any = WeakTensorKeyDictionary()  # tensor -> path of the innermost module that returned it last
        self._known: set[str] = set()  # weights met before a run aside
        self._pinned: dict[tuple[str, int], str] = {}
        self._labels: Any = WeakTensorKeyDictionary()
        self._origins: Any = WeakTensorKeyDictionary()
        self._repeated: Any = WeakTensorKeyDictionary()  # a parameter once for each sample -> that parameter
        self._computed: Any = WeakTensorKeyDictionary()  # tensors made from parameters that hold other values than they
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._model = model
        self._parameters = {name for name, _ in model.named_parameters()}
        self._stack: list[tuple[int, str]] = [(0, "")]
        for name, tensor in named_tensors(model):
            self._origins[tensor] = tuple(frozenset({(name, dim)}) for dim in range(tensor.ndim))

    # ---------------------------------------------------------------- where we are

    @contextmanager
    def following(self) -> Iterator[Trace]:
        """Enter the mode and keep track of the module that runs, so that refusals can name it."""

        def enter(module: nn.Module, inputs: Any) -> None:
            path = self._paths.get(id(module))  # None for one that the forward made: no hook of ours will find it again
            if path is not None:
                self.called.add(path)
                self.calls[path] += 1
                for position, value in enumerate(inputs):
                    self._see(value, Tap(path, "input", self.calls[path] - 1, position))
            self._stack.append((id(module), self.path if path is None else path))
            if isinstance(module, SIZES_CHECKED):
                for parameter in module.parameters():
                    self.pin(parameter, self.checks_its_sizes(module))

        def leave(module: nn.Module, _: Any, output: Any) -> None:
            while self._stack.pop()[0] != id(module):  # modules that failed, where the forward caught it, never left
                pass
            if isinstance(output, Tensor) and id(module) in self._paths:
                self._leave(module, self._paths[id(module)], output)
            if module is self._model:
                self.freeze_outputs(output)

        hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
        torch.clear_autocast_cache()  # a cast made earlier would not be seen; one made here could not be trained
        try:
            with torch.inference_mode(False), torch.no_grad(), self:
                yield self
        finally:
            torch.clear_autocast_cache()
            for hook in hooks:
                hook.remove()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Another run of the forward: it may tie and freeze and bring further layers, and is not counted."""
        uses, kept = self.uses, (self.sums, self.activations, self.activation_taps, self.maxima)
        counts = self.calls, self._taken, self._norms
        self._known = set(self.made)
        self.uses, self.sums, self.activations, self.activation_taps, self.maxima = [], [], [], [], []
        self.calls, self._taken, self._norms = Counter(), Counter(), {}
        try:
            yield
        finally:
            self.uses = uses + [replace(use, positions=0) for use in self.uses if use.weight not in self._known]
            self.sums, self.activations, self.activation_taps, self.maxima = kept
            self.calls, self._taken, self._norms = counts

    @property
    def path(self) -> str:
        """Path of the module that is running, or in which the forward failed."""
        return self._stack[-1][1]

    @property
    def module(self) -> nn.Module:
        """The module that is running."""
        return self._model.get_submodule(self.path)

    def checks_its_sizes(self, module: nn.Module) -> str:
        """Why one of :data:`SIZES_CHECKED` is left whole."""
        return f"{self.where} ({type(module).__name__}) checks its sizes and is left whole"

    @property
    def where(self) -> str:
        """The module that is running, for a sentence."""
        return repr(self.path) if self.path else "the forward"

    # ---------------------------------------------------------------- what is found out

    def tie(self, first: Vector, second: Vector, why: str) -> None:
        """Channels at the same place of both vectors are cut together; what meets something fixed stays."""
        free = (first != FIXED) & (second != FIXED)
        differ = free & (first != second)
        if differ.any():
            pairs = np.stack([first[differ], second[differ]])
            if pairs.shape[1] > self.atoms:  # labels of many positions repeat themselves
                pairs = np.stack(np.divmod(np.unique(pairs[0] * self.atoms + pairs[1]), self.atoms))
            self.ties.append(pairs)
            self.occupy(pairs)
        if not free.all():
            self.freeze(np.where(first == FIXED, second, first)[~free], why)

    def occupy(self, atoms: Vector) -> None:
        """These channels are tied or read by a layer: where they enter a sum, no branch ends in them."""
        if len(self._busy) < self.atoms:
            self._busy = np.concatenate([self._busy, np.zeros(2 * self.atoms - len(self._busy), dtype=bool)])
        self._busy[atoms[atoms != FIXED]] = True

    def count(self, label: Tensor | None) -> None:
        """Refuse a forward that is too long to be followed, or whose labels are too large.

        Raises:
            BoundsError: If this operation, or the labels of its result, are too much.
        """
        self._operations += 1
        if self._operations > _MOST_OPERATIONS:
            raise BoundsError(
                f"more than {_MOST_OPERATIONS} operations act on channels; trace a shorter run of it by `forward_fn`"
            )
        if label is not None and label.untyped_storage().nbytes() > _MOST_BYTES:
            raise BoundsError(f"the channels of a tensor of shape {tuple(label.shape)} in {self.where} lie too far apart for "
                             "labels of reasonable size; give smaller example inputs")  # fmt: skip

    def freeze(self, atoms: Tensor | Vector | None, why: str) -> None:
        """These channels cannot be cut."""
        if atoms is None:
            return
        met = np.unique(to_numpy(atoms) if isinstance(atoms, Tensor) else atoms)
        met = met[met != FIXED]
        if len(met):
            self.frozen.append((met, why))

    def freeze_new(self, why: str) -> None:
        """Layers that only the run :meth:`aside` has met stay whole."""
        for weight in self.made.keys() - self._known:
            self.freeze(self.made[weight], why)

    def suppose(self, labels: Tensor, parts: Sequence[Tensor], why: str) -> None:
        """Labels are parted: the channels at the same place of all parts are cut together, if the parts shrink with a cut."""
        first = parts[0].reshape(-1).numpy()
        for part in parts[1:]:
            self.tie(first, part.reshape(-1).numpy(), why)
        atoms = np.unique(to_numpy(labels))
        self.supposed.append(Supposition(atoms[atoms != FIXED], why))

    def meet(self, axis: Iterable[tuple[str, int]], vector: Vector, why: str) -> None:
        """Parameters that run along `axis` have these channels there."""
        for key in axis:
            if key in self.met:
                self.tie(self.met[key], vector, self._pinned.get(key, why))
            else:
                self.met[key] = vector

    def pin(self, tensor: Tensor, why: str) -> None:
        """A parameter is used in a way that is not understood: none of its dimensions may be cut."""
        origin = self._origins.get(tensor)
        for dim, axis in enumerate(origin or ()):
            self.meet(axis, np.full(tensor.shape[dim], FIXED), why)
            for key in axis:
                self._pinned.setdefault(key, why)

    def freeze_outputs(self, outputs: Any) -> None:
        """What the network returns keeps its channels."""
        for tensor in tensors_in(outputs):
            self.freeze(self._label(tensor), "they are the output of the network")
            if tensor in self._product:
                self._taken[self._product[tensor]] += 1
            self.pin(tensor, "it is the output of the network")

    @property
    def norms(self) -> dict[str, str]:
        """Weight of a layer to the running mean of the batch norm that alone takes its output, and no other layer's."""
        users = Counter(self._norms.values())
        return {weight: mean for weight, mean in self._norms.items() if self._taken[weight] == 1 == users[mean]}

    # ---------------------------------------------------------------- skips and activations

    def _see(self, value: Any, tap: Tap) -> None:
        """A module takes or gives a tensor: if it is a sum or an activation, a hook can see it there."""
        if not isinstance(value, Tensor):
            return
        index = self._sum_of.get(value)
        if index is not None and self.sums[index].tap is None:
            self.sums[index] = replace(self.sums[index], tap=tap)
        index = self._activation_of.get(value)
        if index is not None:
            self.activation_taps[index].append(tap)

    def _leave(self, module: nn.Module, path: str, output: Tensor) -> None:
        if path in self._pad_back and not isinstance(module, PaddedBack):
            labels = self._label(output)
            vector = None if labels is None or output.ndim < 2 or self.calls[path] > 1 else vector_along(labels, 1)
            if vector is None:
                raise ValueError(f"{path!r} cannot be padded back: it runs more than once, or has no channels of its own.")
            self._scatter(path, output, vector.numpy().astype(np.int64), np.arange(output.shape[1]), present=False)
        self._see(output, Tap(path, "output", self.calls[path] - 1))
        if next(module.children(), None) is None:
            self._ends[output] = path

    def _scatter(self, path: str, output: Tensor, sources: Vector, positions: Vector, *, present: bool) -> None:
        """End the channels of a padded module, and start the slots of the skip that they are added to."""
        slots = np.arange(self.atoms, self.atoms + output.shape[1])
        self.atoms += len(slots)
        self.pads.append(PadPoint(path, sources, positions, slots, present))
        self._labels[output] = spread(torch.from_numpy(slots), output.shape, 1)

    def _label(self, tensor: Any) -> Tensor | None:
        label: Tensor | None = self._labels.get(tensor) if isinstance(tensor, Tensor) else None
        return label

    def _label_or_fixed(self, tensor: Tensor) -> Tensor:
        label = self._label(tensor)
        return fixed(tensor.shape) if label is None else label


def tensors_in(value: Any, depth: int = 4) -> Iterator[Tensor]:
    """Every tensor in nested containers and, up to some depth, in the attributes of other objects (dataclasses, say)."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif depth and not isinstance(leaf, (nn.Module, type)):
            held: list[Any] = [
                getattr(leaf, name, None) for kind in type(leaf).__mro__ for name in getattr(kind, "__slots__", ())
            ]
            held += getattr(leaf, "__dict__", {}).values()
            held += leaf.values() if isinstance(leaf, Mapping) else leaf if isinstance(leaf, (set, frozenset)) else ()
            yield from tensors_in(held, depth - 1)


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer once, under its first name."""
    yield from model.named_parameters()
    yield from model.named_buffers()
