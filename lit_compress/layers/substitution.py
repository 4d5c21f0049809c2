"""The same network with other layers: what may be replaced, by what, and what was left and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

from rich.markup import escape
from rich.table import Table
from torch import nn
from torch.nn.utils import parametrize

from lit_compress.layers.blocks import BlockSpec, GroupedPointwise
from lit_compress.layers.structured import StructuredLinear
from lit_compress.naming import matches
from lit_compress.report import as_text, count_parameters

_NOTE = "_lit_compress_substitutions"


@dataclass(frozen=True)
class Replacement:
    """What became of one layer or block.

    Args:
        name: As in ``model.named_modules()``.
        before: What stood there.
        after: What stands there now; None if it was left.
        reason: Why it was left.
    """

    name: str
    before: str
    after: str | None = None
    reason: str = ""


@dataclass(frozen=True)
class Substitution:
    """What a substitution did to a network. ``str()`` gives the table for people.

    Args:
        method: What was asked for, e.g. ``"tensor_train at 0.43"``.
        rows: Every layer or block that was looked at.
        parameters: Of the whole network, before and after.
    """

    method: str
    rows: tuple[Replacement, ...]
    parameters: tuple[int, int]

    @property
    def replaced(self) -> tuple[str, ...]:
        """Names of what was replaced."""
        return tuple(row.name for row in self.rows if row.after is not None)

    @property
    def left(self) -> dict[str, str]:
        """Names of what was left, with the reasons."""
        return {row.name: row.reason for row in self.rows if row.after is None}

    def summary(self) -> str:
        """One line."""
        before, after = self.parameters
        return (
            f"{self.method}: {len(self.replaced)} of {len(self.rows)} replaced, parameters {before:,} -> {after:,} "
            f"({after / max(before, 1):.1%})"
        )

    def renderable(self) -> Table:
        """The table for a rich console."""
        table = Table(title=escape(self.summary()))
        for column in ("layer", "was", "is", "left because"):
            table.add_column(column)
        for row in self.rows:
            table.add_row(escape(row.name), row.before, row.after or "", escape(row.reason))
        return table

    def __str__(self) -> str:
        return as_text(self.renderable())


def substitutions_of(network: nn.Module) -> tuple[Substitution, ...]:
    """What was replaced in a network, in order."""
    return tuple(vars(network).get(_NOTE, ()))


@runtime_checkable
class HasBlock(Protocol):
    """A module that can replace its own convolutions by a block's, as :class:`~lit_compress.models.PreActBlock` does."""

    def use_block(self, block: str) -> None:
        """Put another kind of block in place; a ``ValueError`` if it does not fit, and nothing has changed then."""


def substitute_blocks(
    network: nn.Module, block: str, *, include: Sequence[str] = ("*",), exclude: Sequence[str] = (), first: bool = False
) -> nn.Module:
    """Replace the convolutions of any network by those of cheap blocks, newly drawn, in place.

    Blocks that know how (of :class:`~lit_compress.models.WideResNet`) are replaced whole. Elsewhere ``S-2x2`` and ``G(g)``
    replace every convolution larger than a pixel, and ``B(b)`` and ``BG(b,g)`` every module that holds two 3 × 3 convolutions
    with a batch norm between, as torchvision's ``BasicBlock``: the norm shrinks to the bottleneck. The norms and activations
    around stay, which makes the post-activation form in a post-activated network.

    Args:
        network: Any network.
        block: Name of the block, see :func:`~lit_compress.layers.conv_block`.
        include: Patterns over module names: what may be replaced.
        exclude: Patterns of what is left.
        first: Whether the first convolution may be replaced too.

    Returns:
        The network. ``print(substitutions_of(network)[-1])`` lists what was left, and why.

    Raises:
        ValueError: If the block's name is none, or nothing can be replaced.

    Source: *Efficient machine learning under a budget* (T2), section 4.3.2.

    Example:
        >>> from torchvision.models import resnet18
        >>> network = substitute_blocks(resnet18(), "G(N)")
        >>> print(substitutions_of(network)[-1].summary())
        G(N): 16 of 17 replaced, parameters 11,689,512 -> 1,961,960 (16.8%)
    """
    spec = BlockSpec.parse(block)
    if spec == BlockSpec():
        raise ValueError("Block 'S' is what stands there; give one of the others to replace it.")
    parameters = count_parameters(network, trainable=False)
    walk = Walk(network, include, exclude, first=first, last=True)
    inside: set[nn.Module] = set()
    rows = []
    for name, module in list(network.named_modules()):
        if module in inside:
            continue
        change: Callable[[], str]
        if isinstance(module, HasBlock):
            change = partial(_use_block, module, block)
        elif spec.bottleneck is not None and (pair := _pair(module)) is not None:
            change = partial(_narrow, walk, pair, spec)
        elif spec.bottleneck is None and isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
            change = partial(_cheapen, walk, module, spec)
        else:
            continue
        inside |= set(module.modules())
        rows.append(walk.attempt(name, module, change))
    return finish(network, Substitution(block, tuple(rows), (parameters, count_parameters(network, trainable=False))))


class Walk:
    """Through the layers of a network: which may be replaced, and replacing one wherever it stands.

    Args:
        network: The network.
        include: Patterns over module names.
        exclude: Patterns over module names.
        first: Whether the first convolution or linear layer may be replaced.
        last: Whether the last may.

    Raises:
        ValueError: If a pattern matches no module, or is a string where a list is meant.
    """

    def __init__(self, network: nn.Module, include: Sequence[str], exclude: Sequence[str], *, first: bool, last: bool) -> None:
        if isinstance(include, str) or isinstance(exclude, str):
            raise ValueError("Arguments `include` and `exclude` are lists of patterns, not one string.")
        names = [name for name, _ in network.named_modules()]
        for pattern in (*include, *exclude):
            if not any(matches(name, pattern) for name in names):
                raise ValueError(f"Pattern {pattern!r} matches no module of {type(network).__name__}.")
        self.network, self.include, self.exclude = network, include, exclude
        layers = [module for module in network.modules() if is_layer(module)]
        self._ends = {layers[0]: "it is the first layer"} if layers and not first else {}
        if layers and not last:
            self._ends.setdefault(layers[-1], "it is the last layer")
        users: dict[nn.Parameter, set[nn.Module]] = {}
        for module in network.modules():
            for parameter in module.parameters(recurse=False):
                users.setdefault(parameter, set()).add(module)
        self._tied = {module for sharing in users.values() if len(sharing) > 1 for module in sharing}

    def attempt(self, name: str, module: nn.Module, change: Callable[[], str]) -> Replacement:
        """Change what stands at a name, if it may be, and say what came of it.

        Args:
            name: Of the layer or block.
            module: The layer or block.
            change: Changes it and describes what stands there then; a ``ValueError`` where that cannot be.
        """
        before = describe(module)
        reason = self.reason_to_leave(name, module)
        if not reason:
            try:
                return Replacement(name, before, after=change())
            except ValueError as error:
                reason = str(error)
        return Replacement(name, before, reason=reason)

    def reason_to_leave(self, name: str, module: nn.Module) -> str:
        """Why a layer or block is left whatever replaces it; empty if it is not."""
        if not any(matches(name, pattern) for pattern in self.include):
            return "no pattern of `include` matches"
        if any(matches(name, pattern) for pattern in self.exclude):
            return "a pattern of `exclude` matches"
        for part in module.modules():
            if part in self._ends:
                return self._ends[part]
            if part in self._tied:
                return "its parameters are shared with another module"
            if parametrize.is_parametrized(part):
                return "its weight is computed (parametrized)"
        return ""

    def put(self, old: nn.Module, new: nn.Module) -> None:
        """Let ``new`` stand wherever ``old`` stands, on its device, in its dtype and mode."""
        weight = next(old.parameters())
        new.to(weight).train(old.training)
        for parent in list(self.network.modules()):
            for name, child in parent._modules.items():  # named_children() gives a module that stands twice once
                if child is old:
                    setattr(parent, name, new)


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a convolution or linear layer, dense or compressed."""
    return isinstance(module, nn.Linear | nn.modules.conv._ConvNd | StructuredLinear)


def describe(module: nn.Module) -> str:
    """A layer in a few words, e.g. ``"Conv2d 16 -> 32, 3x3"``."""
    text = type(module).__name__
    for ends in (("in_channels", "out_channels"), ("in_features", "out_features")):
        if all(hasattr(module, end) for end in ends):
            text += f" {getattr(module, ends[0])} -> {getattr(module, ends[1])}"
            break
    size = getattr(module, "kernel_size", None)
    return f"{text}, {'x'.join(map(str, size))}" if isinstance(size, tuple) else text


def finish(network: nn.Module, done: Substitution) -> nn.Module:
    """Note on a network what was replaced, and say it in a line.

    Raises:
        ValueError: If that is nothing.
    """
    if not done.replaced:
        reasons = "; ".join(sorted(set(done.left.values()))) or "it has no layer of the kind"
        raise ValueError(f"Nothing in {type(network).__name__} can be replaced by {done.method}: {reasons}.")
    vars(network)[_NOTE] = (*substitutions_of(network), done)
    return network


def _use_block(module: HasBlock, block: str) -> str:
    module.use_block(block)
    return block


class _Pair(NamedTuple):
    """Two convolutions of a block, and the norm between them."""

    first: nn.Conv2d
    norm: nn.BatchNorm2d
    second: nn.Conv2d


def _pair(module: nn.Module) -> _Pair | None:
    """The two 3 × 3 convolutions that a module holds itself, if it does."""
    children = [child for child in module.children() if not isinstance(child, nn.Sequential)]
    places = [place for place, child in enumerate(children) if type(child) is nn.Conv2d and child.kernel_size == (3, 3)]
    if len(places) != 2:
        return None
    first, second = (children[place] for place in places)
    norms = [child for child in children[places[0] : places[1]] if type(child) is nn.BatchNorm2d]
    assert isinstance(first, nn.Conv2d)
    assert isinstance(second, nn.Conv2d)
    return _Pair(first, norms[0], second) if len(norms) == 1 and first.out_channels == second.in_channels else None


def _narrow(walk: Walk, pair: _Pair, spec: BlockSpec) -> str:
    """Pointwise convolution, the norm narrowed, and a grouped and pointwise convolution in place of two."""
    first, norm, second = pair
    if any(geometry_of(convolution)["padding"] != convolution.dilation for convolution in (first, second)):
        raise ValueError("its convolutions are not padded to keep the size of the map")
    width = spec.width(second.out_channels)
    geometry = geometry_of(second) | {"stride": (first.stride[0] * second.stride[0], first.stride[1] * second.stride[1])}
    narrow = GroupedPointwise(width, second.out_channels, spec.narrow_groups(width), **geometry)
    narrow_norm = nn.BatchNorm2d(
        width, eps=norm.eps, momentum=norm.momentum, affine=norm.affine, track_running_stats=norm.track_running_stats
    )
    walk.put(first, nn.Conv2d(first.in_channels, width, kernel_size=1, bias=first.bias is not None))
    walk.put(norm, narrow_norm)
    walk.put(second, narrow)
    return f"{second.out_channels} -> {width} -> {second.out_channels}"


def _cheapen(walk: Walk, convolution: nn.Conv2d, spec: BlockSpec) -> str:
    """What a block without a bottleneck has in place of one convolution."""
    geometry, widths = geometry_of(convolution), (convolution.in_channels, convolution.out_channels)
    new: nn.Module
    if spec.groups is not None:
        new = GroupedPointwise(*widths, spec.groups.of(widths[0]), **geometry)
    elif convolution.kernel_size == (3, 3) and convolution.padding == convolution.dilation:
        dilation = (2 * convolution.dilation[0], 2 * convolution.dilation[1])
        new = nn.Conv2d(*widths, **geometry | {"kernel_size": 2, "dilation": dilation})
    else:
        raise ValueError("dilated 2x2 filters stand for 3x3 ones that are padded to keep the size of the map")
    walk.put(convolution, new)
    return describe(new)


def geometry_of(module: nn.Module) -> dict[str, Any]:
    """Arguments by which another convolution takes a convolution's place: kernel size, stride, padding, dilation and bias.

    Raises:
        ValueError: If it is grouped, not padded with zeros, or of a class that may use its weight otherwise.
    """
    if type(module) is not nn.Conv2d:
        raise ValueError(f"{type(module).__name__} may use its weight in another way")
    if module.groups > 1:
        raise ValueError("it is grouped already")
    if module.padding_mode != "zeros":
        raise ValueError(f"it is padded by {module.padding_mode!r}")
    shared = {name: getattr(module, name) for name in ("kernel_size", "stride", "padding", "dilation")}
    return shared | {"bias": module.bias is not None}
