"""Cut channels out of a network: turn a recipe into a plan, apply it, and prove that the result is right."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor, nn

from lit_compress.compensation import compensated
from lit_compress.graph import ChannelGraph, trace
from lit_compress.inputs import LayerInput
from lit_compress.labels import FIXED
from lit_compress.naming import relocation
from lit_compress.padding import Pad
from lit_compress.plan import Plan, note_plan, plan_of
from lit_compress.recipe import Recipe
from lit_compress.selfcheck import SelfCheck
from lit_compress.skips import Marks
from lit_compress.slicing import all_tensors, set_data

# How to run the network on inputs as it is used; returns what leaves it.
ForwardFn: TypeAlias = Callable[[nn.Module, Any], Any]


def call(model: nn.Module, inputs: Any) -> Any:
    """The default way to run a network: a tuple or list holds its positional arguments, anything else is the only one."""
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def cut(
    model: nn.Module,
    recipe: Recipe,
    example_inputs: Any,
    *,
    forward_fn: ForwardFn = call,
    verify: bool = True,
    graph: ChannelGraph | None = None,
    inputs: Mapping[str, LayerInput] | None = None,
) -> Plan:
    """Remove channels from a network, in place, and from everything inside it that runs along them.

    The cut network computes what the uncut one computes with the removed channels set to zero where they enter their consumers.
    Parameters stay the objects they were, with their hooks, attributes and ``requires_grad``; so do all modules.

    Args:
        model: The network. Training mode, hooks and order of parameters stay as they are.
        recipe: The channels to keep, relative to ``model`` as it is now. Layers tied to a named one follow it. Names may also be
            those of a module that holds ``model``, or of one that ``model`` holds.
        example_inputs: Real inputs; a batch of one or two is enough. A tuple or list holds positional arguments.
        forward_fn: How to run the network on ``example_inputs``, where ``model(*example_inputs)`` is not it.
        verify: Check the cut on ``example_inputs`` and put everything back if it is not exact.
        graph: From :func:`~lit_compress.graph.trace`, if the network was traced already.
        inputs: From ``analysis.inputs``: what the removed channels give is then folded into the layers that read them, their
            mean into biases and, if the covariances are known, what the channels kept tell about them into weights. The check
            is made before that.

    Returns:
        What was cut, for :meth:`Plan.apply_to` on optimizers, weight averages and state dicts.

    Raises:
        ValueError: If the recipe names an unknown layer, was made for another network, removes channels that cannot be cut,
            contradicts itself on tied layers, or the self-check fails. The network is then as it was.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> plan = cut(net, Recipe(keep={"0": (1, 5)}), torch.rand(1, 4))
        >>> net
        Sequential(
          (0): Linear(in_features=4, out_features=2, bias=True)
          (1): ReLU()
          (2): Linear(in_features=2, out_features=2, bias=True)
        )
    """
    if graph is None:
        recipe = under_names_of(model, recipe)
        graph = trace(model, lambda: forward_fn(model, example_inputs), pad_back=tuple(recipe.padded))
    plan = plan_for(model, graph, recipe)
    if not plan.keep:
        return plan
    if verify:
        SelfCheck(model, graph, plan, forward_fn, example_inputs).compare()
    before = plan_of(model)
    composed = plan if before is None else before.then(plan)
    compensation = _compensation(model, graph, plan, inputs)
    plan.cut_module(model)
    _put(model, compensation)
    note_plan(model, composed)
    return plan


def cut_copy(copy: nn.Module, plan: Plan, graph: ChannelGraph, inputs: Mapping[str, LayerInput] | None = None) -> None:
    """Cut a copy of a network, such as an average of its weights, as the network was cut: by its own weights, compensated alike.

    Args:
        copy: Of the names and sizes that the network had before the cut.
        plan: From :func:`cut`.
        graph: Of the network before the cut.
        inputs: As for :func:`cut`.

    Raises:
        ValueError: If the copy does not fit the plan. It is then unchanged.
    """
    if inputs is not None:
        tensors = all_tensors(copy)
        if odd := [name for name, shape in graph.shapes.items() if name not in tensors or tensors[name].shape != shape]:
            raise ValueError(f"{type(copy).__name__} is no copy of the network before the cut: it differs in {odd[0]!r}.")
    compensation = _compensation(copy, graph, plan, inputs, warn=False)  # it was said of the network
    plan.apply_to(copy)
    _put(copy, compensation)


def _compensation(
    model: nn.Module, graph: ChannelGraph, plan: Plan, inputs: Mapping[str, LayerInput] | None, *, warn: bool = True
) -> dict[str, Tensor]:
    """Name of a tensor to what it will be after the cut, compensated."""
    if not inputs:
        return {}
    change = relocation(inputs.keys(), graph.layers.keys())
    if change is not None:  # names of a module that holds the network, or that it holds
        inputs = {change.add + name.removeprefix(change.drop): given for name, given in inputs.items()}
    values, left_out = compensated(model, graph, plan, inputs)
    for why, layers in left_out.items() if warn else ():
        warnings.warn(f"Layers {_listed(layers)} read removed channels but {why}.", stacklevel=3)
    return {name: plan.take(name, value) for name, value in values.items()}


def _put(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    tensors = all_tensors(model)
    for name, value in values.items():
        set_data(tensors[name], value)


def under_names_of(model: nn.Module, recipe: Recipe) -> Recipe:
    """A recipe under the names that a network gives its layers; as it is, if they are not found."""
    names = [*recipe.keep, *recipe.padded]
    change = relocation(names, [*dict(model.named_modules()), *all_tensors(model)]) if names else None
    return recipe if change is None else recipe.renamed(add=change.add, drop=change.drop)


def make_plan(graph: ChannelGraph, recipe: Recipe) -> Plan:
    """Work out what a recipe removes from every parameter and buffer, without touching the network.

    Args:
        graph: The network's graph.
        recipe: The channels to keep, relative to the network traced.

    Returns:
        The plan, with a recipe that names every layer that loses channels.

    Raises:
        ValueError: As :func:`cut`.
    """
    recipe, removed = _understood(graph, recipe)
    keep: dict[str, dict[int, tuple[int, ...]]] = {}
    for name, dims in graph.tensors.items():
        for dim, classes in dims.items():
            stays = ~removed[classes]
            if not stays.all():
                keep.setdefault(name, {})[dim] = tuple(np.flatnonzero(stays).tolist())
    kept = {
        name: keep[layer.weight][layer.dim] for name, layer in graph.layers.items() if layer.dim in keep.get(layer.weight, {})
    }
    widths = {name: len(layer.classes) for name, layer in graph.layers.items()}
    pads = _pads(graph, removed)
    padded = {path: pad.width for path, pad in pads.items()}
    complete = Recipe(keep=kept, method=recipe.method, original=widths, padded=padded)
    return Plan(recipe=complete, keep=keep, shapes={name: graph.shapes[name] for name in keep}, pads=pads)


def removed_by(graph: ChannelGraph, recipe: Recipe) -> Marks:
    """Which classes of channels a recipe removes.

    Raises:
        ValueError: As :func:`cut`.
    """
    return _understood(graph, recipe)[1]


def _understood(graph: ChannelGraph, recipe: Recipe) -> tuple[Recipe, Marks]:
    """The recipe under the names of the traced network, and what it removes."""
    recipe = _placed(graph, recipe)
    removed = graph.mark(_removed_classes(graph, recipe))
    _refuse_contradictions(graph, recipe, removed)
    return recipe, removed


def _pads(graph: ChannelGraph, removed: Marks) -> dict[str, Pad]:
    """How the blocks that can be padded back are after the cut; those that keep all that their skip keeps need none."""
    pads = {}
    for point in graph.pads:
        stays = ~removed[point.slots]
        new_place = np.cumsum(stays) - 1
        kept = point.positions[~removed[point.sources]]
        slots = tuple(new_place[kept].tolist())
        if point.present or len(slots) < int(stays.sum()):
            pads[point.module] = Pad(int(stays.sum()), slots)
    return pads


def plan_for(model: nn.Module, graph: ChannelGraph, recipe: Recipe) -> Plan:
    """The plan with every name that a tensor of the network goes by, bound to its parameters; nothing is cut yet.

    Raises:
        ValueError: As :func:`cut`.
    """
    plan = make_plan(graph, recipe)
    tensors = all_tensors(model)
    if missing := sorted(set(plan.keep) - set(tensors)):
        raise ValueError(f"{type(model).__name__} lacks {missing[:3]}; the graph was traced on another network.")
    first = {id(tensors[name]): name for name in plan.keep}
    names = {name: first[id(tensor)] for name, tensor in tensors.items() if id(tensor) in first}
    stored = model.state_dict(keep_vars=True).keys()
    return replace(
        plan,
        keep={name: plan.keep[source] for name, source in names.items()},
        shapes={name: plan.shapes[source] for name, source in names.items()},
        transient=tuple(name for name in names if name not in stored),
    ).bound_to(model)


def _placed(graph: ChannelGraph, recipe: Recipe) -> Recipe:
    """The recipe under the names of the traced network, after checking that it was made for it."""
    names = {*recipe.keep, *recipe.original}
    if not names:
        return recipe
    change = relocation(names, graph.layers.keys())
    if change is None:
        unknown = sorted(names - graph.layers.keys())
        for name in unknown:
            if name in graph.refused:
                raise ValueError(f"Layer {name!r} cannot be cut: {graph.refused[name]}.")
        raise ValueError(
            f"The recipe names {_listed(unknown)}, which the network does not have or does not run; "
            f"its layers are {_listed(graph.layers)}."
        )
    recipe = recipe.renamed(add=change.add, drop=change.drop)
    for name, width in recipe.original.items():
        if width != len(graph.layers[name].classes):
            raise ValueError(
                f"The recipe was made for another network: its layer {name!r} has {width} channels, this network's has "
                f"{len(graph.layers[name].classes)}."
            )
    for name, channels in recipe.keep.items():
        if channels[-1] >= len(graph.layers[name].classes):
            raise ValueError(
                f"Layer {name!r} has {len(graph.layers[name].classes)} channels but would keep channel {channels[-1]}."
            )
    return recipe


def _removed_classes(graph: ChannelGraph, recipe: Recipe) -> list[int]:
    removed = []
    for name, channels in recipe.keep.items():
        classes = graph.layers[name].classes
        for index in sorted(set(range(len(classes))) - set(channels)):
            channel_class = int(classes[index])
            if channel_class == FIXED or channel_class in graph.frozen:
                why = graph.frozen.get(channel_class, "its channels come from the network's input")
                raise ValueError(
                    f"Channel {index} of layer {name!r} cannot be removed: {why}. Leave the layer out of the recipe."
                )
            removed.append(channel_class)
    return removed


def _refuse_contradictions(graph: ChannelGraph, recipe: Recipe, removed: Marks) -> None:
    for name, layer in graph.layers.items():
        gone = removed[layer.classes]
        if gone.all():
            raise ValueError(f"Layer {name!r} would keep no channel.")
        wanted = gone[list(recipe.keep.get(name, ()))]
        if wanted.any():
            channel = recipe.keep[name][int(np.argmax(wanted))]
            other = next(
                (other for other in recipe.keep if int(layer.classes[channel]) in graph.layers[other].classes[
                    sorted(set(range(len(graph.layers[other].classes))) - set(recipe.keep[other]))
                ]), None
            )  # fmt: skip
            if other is None:
                raise ValueError(
                    f"The recipe keeps channel {channel} of layer {name!r} but removes the channel of the skip that it is padded "
                    "back to; remove both or none."
                )
            raise ValueError(
                f"The recipe keeps channel {channel} of layer {name!r} but removes it from {other!r}, which is tied to it; "
                "name only one of them."
            )


def _listed(names: Iterable[str], most: int = 6) -> str:
    listed = list(names)
    return ", ".join(repr(name) for name in listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")
