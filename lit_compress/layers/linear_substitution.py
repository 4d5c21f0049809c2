"""The same network with compressed linear transforms, at one setting for all layers or to a budget."""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from lit_compress.counting import layer_costs
from lit_compress.graph import evaluating
from lit_compress.layers.acdc import ACDCConv1x1, ACDCLinear
from lit_compress.layers.hashed import HashedConv1x1, HashedLinear
from lit_compress.layers.rank_factorized import RankFactorizedConv1x1, RankFactorizedLinear
from lit_compress.layers.separable import SeparableConv2d
from lit_compress.layers.shuffle import ShuffleConv1x1, ShuffleConv2d, ShuffleLinear
from lit_compress.layers.structured import Pointwise, StructuredLinear, is_pointwise
from lit_compress.layers.substitution import Substitution, Walk, describe, finish, geometry_of, is_layer
from lit_compress.layers.tensor_train import TensorTrainConv1x1, TensorTrainLinear
from lit_compress.layers.tucker import TuckerConv1x1, TuckerLinear
from lit_compress.report import count_mult_adds, count_parameters
from lit_compress.surgery import call

Kind = Literal["rank_factorized", "acdc", "hashed", "tensor_train", "tucker", "shuffle"]

_KINDS: dict[str, tuple[type[StructuredLinear], type[Pointwise]]] = {
    "rank_factorized": (RankFactorizedLinear, RankFactorizedConv1x1),
    "acdc": (ACDCLinear, ACDCConv1x1),
    "hashed": (HashedLinear, HashedConv1x1),
    "tensor_train": (TensorTrainLinear, TensorTrainConv1x1),
    "tucker": (TuckerLinear, TuckerConv1x1),
    "shuffle": (ShuffleLinear, ShuffleConv1x1),
}
_FINEST = 1_000_000  # steps of a relative setting between 0 and 1


def substitute_linear(
    network: nn.Module,
    kind: Kind,
    *,
    setting: float | None = None,
    budget: float | None = None,
    of: Literal["parameters", "mult_adds"] = "parameters",
    example_inputs: Any = None,
    trained: bool = False,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    first: bool = False,
    last: bool = False,
    **options: Any,
) -> nn.Module:
    """Replace the linear layers and convolutions of any network by compressed ones, in place.

    Linear layers and pointwise convolutions are replaced themselves; larger convolutions become a depthwise one, without bias,
    and a compressed pointwise one (with ``"shuffle"``, a :class:`~lit_compress.layers.ShuffleConv2d`). One setting is shared by
    all:

    ================================  ==========================================  =============
    kind                              setting                                     grows with it
    ================================  ==========================================  =============
    ``"rank_factorized"``             rank over the larger width                  size
    ``"hashed"``                      shared numbers over elements of the matrix  size
    ``"tensor_train"``, ``"tucker"``  ranks over dimensions                       size
    ``"acdc"``                        number of factors                           size
    ``"shuffle"``                     number of groups, lowered until it divides  compression
    ================================  ==========================================  =============

    Args:
        network: Any network.
        kind: What to put in place.
        setting: The setting. Give this or ``budget``.
        budget: Size of the whole network: a share of what it is now up to 1, a number above. The setting is searched whose
            size is the nearest at or below it, and printed.
        of: What the budget counts.
        example_inputs: Needed to count mult-adds; see :func:`lit_compress.count_mult_adds`.
        trained: Bring the new layers as near to the present weights as their form allows, instead of drawing them.
        include: Patterns over module names: what may be replaced.
        exclude: Patterns of what is left.
        first: Whether the first convolution or linear layer may be replaced too.
        last: Whether the last may.
        options: Passed to the layers, e.g. ``core="tt"``.

    Returns:
        The network. ``print(substitutions_of(network)[-1])`` lists what was left, and why.

    Raises:
        ValueError: If the kind is unknown, not exactly one of setting and budget is given, nothing can be replaced, or the budget
            is below the smallest size.

    Source: *Efficient machine learning under a budget* (T2), chapter 5.

    Example:
        >>> network = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
        >>> network = substitute_linear(network, "rank_factorized", budget=0.5)
        rank_factorized at 0.175781 for a budget of 42,501 parameters: 1 of 3 replaced, parameters 85,002 -> 41,994 (49.4%)
    """
    if kind not in _KINDS:
        raise ValueError(f"Argument `kind` must be one of {', '.join(_KINDS)} but got {kind!r}.")
    if (setting is None) == (budget is None):
        raise ValueError("Give exactly one of `setting` and `budget`.")
    if of not in ("parameters", "mult_adds"):
        raise ValueError(f"Argument `of` must be 'parameters' or 'mult_adds' but got {of!r}.")
    if of == "mult_adds" and example_inputs is None:
        raise ValueError("Mult-adds depend on the size of the input: give `example_inputs`.")
    walk = Walk(network, include, exclude, first=first, last=last)
    layers = [(name, module) for name, module in network.named_modules() if is_layer(module)]
    at, goal = setting, ""
    if budget is not None:
        at, goal = _meet(network, walk, layers, kind, budget, of, example_inputs, options)
    assert at is not None
    before = count_parameters(network, trainable=False)
    rows = []
    for name, module in layers:

        def change(module: nn.Module = module) -> str:
            new = _stand_in(module, kind=kind, setting=at, trained=trained, **options)
            walk.put(module, new)
            return describe(new)

        rows.append(walk.attempt(name, module, change))
    done = Substitution(f"{kind} at {at:g}{goal}", tuple(rows), (before, count_parameters(network, trainable=False)))
    finish(network, done)
    if budget is not None:
        print(done.summary())
    return network


def _stand_in(module: nn.Module, *, kind: str, setting: float, trained: bool = False, **options: Any) -> nn.Module:
    """What takes a layer's place.

    Raises:
        ValueError: If nothing can.
    """
    linear, pointwise = _KINDS[kind]
    if isinstance(module, StructuredLinear):
        raise ValueError("it is compressed already")
    if type(module) is nn.Linear:
        knobs = linear.knobs(setting, module.in_features, module.out_features) | options
        return linear.from_dense(module, **knobs) if trained else linear.like(module, **knobs)
    geometry = geometry_of(module)
    assert isinstance(module, nn.Conv2d)
    widths = (module.in_channels, module.out_channels)
    knobs = pointwise.knobs(setting, *widths) | options
    if kind == "shuffle" and not is_pointwise(module):
        pointwise = ShuffleConv2d
    elif not is_pointwise(module):
        if trained:
            return SeparableConv2d.from_dense(module, pointwise, **knobs)
        return SeparableConv2d(*widths, **geometry, transform=partial(pointwise, **knobs))
    return pointwise.from_dense(module, **knobs) if trained else pointwise.like(module, **knobs)


class _Prices:
    """Size of a network if some of its layers were others, without building it.

    Args:
        network: The network.
        layers: Those that may be replaced.
        of: ``"parameters"`` or ``"mult_adds"``.
        example_inputs: What the network runs on, for mult-adds.
    """

    def __init__(self, network: nn.Module, layers: Sequence[nn.Module], of: str, example_inputs: Any) -> None:
        self._of = of
        # Twins without data, from which stand-ins without data can be made.
        self._twins = {layer: copy.deepcopy(layer).to("meta") for layer in layers}
        self._inputs: dict[nn.Module, list[torch.Size]] = {layer: [] for layer in layers}
        if of == "parameters":
            self.whole = count_parameters(network, trainable=False)
        else:
            self.whole = count_mult_adds(network, example_inputs)
            self._watch(network, example_inputs)
        self._fixed = self.whole - sum(self._price(layer, layer) for layer in layers)

    def of(self, stand_in: Callable[[nn.Module], nn.Module]) -> int:
        """Size with stand-ins for the layers; where there is none, the layer stays."""
        total = self._fixed
        for layer, twin in self._twins.items():
            try:
                with torch.device("meta"):
                    new = stand_in(twin)
            except ValueError:
                new = twin
            total += self._price(layer, new)
        return total

    def _price(self, layer: nn.Module, new: nn.Module) -> int:
        if self._of == "parameters":
            return count_parameters(new, trainable=False)
        device = next(new.parameters()).device

        def run() -> None:
            for shape in self._inputs[layer]:
                new(torch.empty(shape, device=device))

        return sum(row.mult_adds for row in layer_costs(new, run))

    def _watch(self, network: nn.Module, example_inputs: Any) -> None:
        handles = [
            layer.register_forward_pre_hook(lambda module, args: self._inputs[module].append(args[0].shape))
            for layer in self._twins
        ]
        try:
            with evaluating(network), torch.no_grad():
                call(network, example_inputs)
        finally:
            for handle in handles:
                handle.remove()


def _meet(
    network: nn.Module,
    walk: Walk,
    layers: Sequence[tuple[str, nn.Module]],
    kind: str,
    budget: float,
    of: str,
    example_inputs: Any,
    options: dict[str, Any],
) -> tuple[float, str]:
    """The setting of the largest size that is no larger than a budget, and the budget in words."""
    replaceable = [module for name, module in layers if not walk.reason_to_leave(name, module)]
    prices = _Prices(network, replaceable, of, example_inputs)
    limit = int(budget * prices.whole) if budget <= 1 else int(budget)

    def price(setting: float) -> int:
        return prices.of(partial(_stand_in, kind=kind, setting=setting, **options))

    settings: Sequence[float] = _Shares()
    if kind == "acdc":
        settings = range(1, _most_factors(replaceable) + 1)
    elif kind == "shuffle":
        settings = range(_most_groups(replaceable), 0, -1)
    best = bisect_right(settings, limit, key=price) - 1
    unit = of.replace("_", "-")
    if best < 0:
        raise ValueError(
            f"With {kind}, the network has at least {price(settings[0]):,} {unit}, more than {limit:,}. Raise the budget, or "
            "replace more layers: see `include`, `first` and `last`."
        )
    return settings[best], f" for a budget of {limit:,} {unit}"


def _most_factors(layers: Sequence[nn.Module]) -> int:
    """As many as leave the largest layer about the parameters of its matrix, 2 L N of N²."""
    return max((len(next(layer.parameters())) for layer in layers), default=1)


def _most_groups(layers: Sequence[nn.Module]) -> int:
    """As many as any layer could have: one for each channel of its bottleneck."""
    return max((max(1, len(next(layer.parameters())) // 4) for layer in layers), default=1)


class _Shares(Sequence[float]):
    """Shares of 1 in ascending order: 0.000001, 0.000002, … 1."""

    def __len__(self) -> int:
        return _FINEST

    def __getitem__(self, index: Any) -> Any:
        return (index + 1) / _FINEST
