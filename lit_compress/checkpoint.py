"""What a checkpoint of a pruned network holds, and how the network is built again from it.

Everything lies under ``checkpoint["lit_compress"]`` as builtin types, independent of any callback's state: the plan of all cuts
so far, relative to the network as its constructor builds it. Applied to a fresh network, it makes room for the weights.
"""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lit_compress.gates import make_room, sites_to_dicts
from lit_compress.naming import relocation
from lit_compress.padding import Pad
from lit_compress.plan import Plan, note_plan, plan_of
from lit_compress.recipe import Recipe
from lit_compress.slicing import all_tensors
from lit_compress.surgery import under_names_of

KEY = "lit_compress"
FORMAT = 1
Network = TypeVar("Network", bound=nn.Module)


def write_plan(model: nn.Module, checkpoint: MutableMapping[str, Any]) -> None:
    """Put into a checkpoint what it takes to build the network again; nothing if nothing was cut or put in."""
    plan, gates = plan_of(model), sites_to_dicts(model)
    if plan is not None or gates:
        checkpoint[KEY] = {"format": FORMAT, "plan": None if plan is None else plan.to_dict(), "gates": gates}


def read_plan(checkpoint: Mapping[str, Any]) -> Plan | None:
    """The plan that a checkpoint holds, or None if its network was never cut.

    Raises:
        ValueError: If a later version of this package wrote it.
    """
    entry = _entry(checkpoint)
    return None if entry is None or entry["plan"] is None else Plan.from_dict(entry["plan"])


def _entry(checkpoint: Mapping[str, Any]) -> Mapping[str, Any] | None:
    entry: Mapping[str, Any] | None = checkpoint.get(KEY)
    if entry is not None and entry.get("format") != FORMAT:
        raise ValueError(
            f"The checkpoint was written in format {entry.get('format')} but this version of lit-compress reads format {FORMAT}; "
            "upgrade lit-compress."
        )
    return entry


def rebuild(model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Cut a network, in place, to the sizes of a checkpoint, and give it its gates, before the weights are loaded.

    Args:
        model: The network as its constructor builds it; nothing happens if it was cut to the same plan already.
        checkpoint: A Lightning checkpoint.

    Raises:
        ValueError: If the network was cut in another way, or is not the one that the checkpoint was made from.
    """
    entry, plan, present = _entry(checkpoint), read_plan(checkpoint), plan_of(model)
    if present == plan:
        make_room(model, [] if entry is None else entry.get("gates", []))
        return
    if present is not None:
        held = "an uncut network" if plan is None else f"one cut by {plan.recipe.method}"
        raise ValueError(
            f"The network was cut already, by {present.recipe.method}, but the checkpoint holds {held}. Build the network anew "
            "and load into that."
        )
    if plan is not None and entry is not None:
        make_room(model, entry.get("gates", []))
        _cut_to(model, plan)


def load_pruned(
    model_or_class: Network | type[Network],
    checkpoint: str | Path | Mapping[str, Any],
    *,
    recipe: Recipe | str | Path | None = None,
    **init: Any,
) -> Network:
    """Build a pruned network again and load its weights, also for classes that know nothing of this package.

    Args:
        model_or_class: The uncut network, as its constructor builds it, or its class.
        checkpoint: File or content of a Lightning checkpoint, or of a plain state dict together with ``recipe``.
        recipe: The recipe of all cuts, or its file, for a plain state dict. A checkpoint that notes its cuts goes by its own.
        init: Arguments for the constructor of a class; they go before the hyperparameters that the checkpoint holds.

    Returns:
        The network, cut and with its weights loaded: the given one, or a new one of the given class.

    Raises:
        ValueError: If the weights do not fit the network, the file holds more than tensors and builtin types, or a state dict of
            a cut network comes without a recipe.

    Example:
        >>> import torch
        >>> from lit_compress import cut
        >>> def build():
        ...     return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> small, recipe = build(), Recipe(keep={"0": (1, 5)})
        >>> _ = cut(small, recipe, torch.rand(1, 4))
        >>> again = load_pruned(build(), small.state_dict(), recipe=recipe)
        >>> x = torch.rand(3, 4)
        >>> torch.equal(small(x), again(x))
        True
    """
    content = _read(checkpoint) if isinstance(checkpoint, (str, Path)) else checkpoint
    weights: Mapping[str, Tensor] = content.get("state_dict", content)
    model: Any = _build(model_or_class, content, init) if isinstance(model_or_class, type) else model_or_class
    if recipe is not None and KEY not in content:
        recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
        if plan_of(model) is None:
            _cut_to(model, _plan_from_shapes(model, weights, under_names_of(model, recipe)))
        content = {**content}
        write_plan(model, content)  # for a module that looks for itself
    else:
        rebuild(model, content)
    if hasattr(model, "on_load_checkpoint") and "state_dict" in content:
        model.on_load_checkpoint(content)
    try:
        model.load_state_dict(weights, strict=getattr(model, "strict_loading", True))
    except RuntimeError as error:
        hint = "" if recipe is not None or KEY in content else " A plain state dict of a cut network needs `recipe=`."
        raise ValueError(f"The weights do not fit {type(model).__name__}: {error}.{hint}") from error
    loaded: Network = model
    return loaded


def _cut_to(model: nn.Module, plan: Plan) -> None:
    change = relocation(plan.keep, all_tensors(model))
    if change is None:
        missing = sorted(set(plan.keep) - set(all_tensors(model)))
        raise ValueError(f"The checkpoint was made from another network: {type(model).__name__} lacks {missing[:3]}.")
    plan = plan.renamed(add=change.add, drop=change.drop)
    plan.cut_module(model)
    note_plan(model, plan)


def _read(path: str | Path) -> Mapping[str, Any]:
    try:
        content: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors and builtin types, and loading it could run code: {error} "
            "If you trust it, pass `torch.load(path, weights_only=False)` instead of the path."
        ) from error
    return content


def _build(kind: type[Network], content: Mapping[str, Any], init: dict[str, Any]) -> Network:
    """An instance of a class, from the hyperparameters of its checkpoint and further arguments."""
    stored = dict(content.get("hyper_parameters", {}))
    parameters = inspect.signature(kind).parameters
    from_config = stored.pop("_instantiator", None) == "pytorch_lightning.cli.instantiate_module"
    open_ended = [name for name, parameter in parameters.items() if parameter.kind is inspect.Parameter.VAR_KEYWORD]
    if (holder := content.get("hparams_name")) in parameters and holder not in open_ended:  # one argument that holds them all
        stored = {holder: stored}
    arguments = {name: value for name, value in stored.items() if open_ended or name in parameters} | init
    if from_config:  # written by a LightningCLI: networks among the arguments are still `class_path` and `init_args`
        from pytorch_lightning.cli import instantiate_module

        model: Any = instantiate_module(kind, arguments)
    else:
        model = kind(**arguments)
    if callable(getattr(model, "configure_model", None)):
        model.configure_model()
    built: Network = model
    return built


def _plan_from_shapes(model: nn.Module, weights: Mapping[str, Tensor], recipe: Recipe) -> Plan:
    """A plan that makes room for weights; which indices it keeps is of no account, since all values are overwritten."""
    tensors = all_tensors(model)
    keep: dict[str, dict[int, tuple[int, ...]]] = {}
    for name, tensor in tensors.items():
        new = tuple(weights[name].shape) if name in weights else tuple(tensor.shape)
        old = tuple(tensor.shape)
        if len(new) != len(old) or any(after > before for after, before in zip(new, old, strict=True)):
            raise ValueError(f"Tensor {name!r} has shape {new}, which is not cut out of {old}.")
        if new != old:
            keep[name] = {dim: tuple(range(after)) for dim, after in enumerate(new) if after < old[dim]}
    for layer, channels in recipe.keep.items():
        weight = weights.get(f"{layer}.weight")
        if weight is not None and len(channels) not in weight.shape[:2]:
            raise ValueError(
                f"The recipe keeps {len(channels)} channels of layer {layer!r}, whose weight has shape {tuple(weight.shape)}."
            )
    pads = {
        path: Pad(width, tuple(weights[f"{path}.slots"].tolist()))
        for path, width in recipe.padded.items()
        if f"{path}.slots" in weights
    }
    return Plan(pads=pads, recipe=recipe, keep=keep, shapes={name: tuple(tensors[name].shape) for name in keep})
