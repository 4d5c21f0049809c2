"""What a checkpoint of a pruned network holds, and how the network is built again from it.

Everything lies under ``checkpoint["lit_compress"]`` as builtin types, independent of any callback's state: the plan of all cuts
so far, relative to the network as its constructor builds it. Applied to a fresh network, it makes room for the weights.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_compress.gates import make_room, sites_to_dicts
from lit_compress.migration import Migration, migrated
from lit_compress.naming import Relocation, relocation
from lit_compress.padding import Pad
from lit_compress.plan import Plan, note_plan, plan_of
from lit_compress.recipe import Recipe
from lit_compress.slicing import all_tensors
from lit_compress.surgery import ForwardFn, call, cut, under_names_of

KEY = "lit_compress"
FORMAT = 2
_MIGRATIONS: dict[int, Migration] = {1: lambda entry: entry}  # there were no gates yet
Network = TypeVar("Network", bound=nn.Module)


def write_plan(model: nn.Module, checkpoint: MutableMapping[str, Any]) -> None:
    """Put into a checkpoint what it takes to build the network again; nothing if nothing was cut or put in."""
    plan, gates = plan_of(model), sites_to_dicts(model)
    if plan is not None:
        note(checkpoint, plan=plan.to_dict())
    if gates:
        note(checkpoint, gates=gates)


def note(checkpoint: MutableMapping[str, Any], **entries: Any) -> None:
    """Put entries of builtin types under this package's key, beside those that are there."""
    checkpoint[KEY] = {**checkpoint.get(KEY, {}), "format": FORMAT, **entries}


def noted(checkpoint: Mapping[str, Any], entry: str) -> Any:
    """An entry that :func:`note` has put there, or None.

    Raises:
        ValueError: If a later version of this package wrote it.
    """
    entries = checkpoint.get(KEY)
    return None if entries is None else migrated(entries, FORMAT, _MIGRATIONS, "checkpoint").get(entry)


def read_plan(checkpoint: Mapping[str, Any]) -> Plan | None:
    """The plan that a checkpoint holds, or None if its network was never cut.

    Raises:
        ValueError: If a later version of this package wrote it.
    """
    plan = noted(checkpoint, "plan")
    return None if plan is None else Plan.from_dict(plan)


def rebuild(model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Cut a network, in place, to the sizes of a checkpoint, and give it its gates, before the weights are loaded.

    Args:
        model: The network as its constructor builds it, or one that was cut to a part of the checkpoint's plan already (by a
            recipe that each run starts from).
        checkpoint: A Lightning checkpoint.

    Raises:
        ValueError: If the network was cut in another way, or is not the one that the checkpoint was made from.
    """
    plan, gates, present = read_plan(checkpoint), noted(checkpoint, "gates") or [], plan_of(model)
    if present == plan:
        make_room(model, gates)
        return
    if present is not None:
        rest = None if plan is None else _rest(plan, present)
        if plan is None or rest is None:
            held = "an uncut network" if plan is None else f"one cut by {plan.recipe.method}"
            raise ValueError(
                f"The network was cut already, by {present.recipe.method}, but the checkpoint holds {held}. Build the network "
                "anew and load into that."
            )
        make_room(model, gates)
        rest.cut_module(model)
        note_plan(model, plan)
    elif plan is not None:
        make_room(model, gates)
        _cut_to(model, plan)


def load_pruned(
    model_or_class: Network | type[Network],
    checkpoint: str | Path | Mapping[str, Any],
    *,
    recipe: Recipe | str | Path | None = None,
    **init: Any,
) -> Network:
    """Build a pruned network again and load its weights, also for classes that know nothing of this package.

    A network that was trained as a part of a module loads from that module's checkpoint, as a student from its distiller's.

    Args:
        model_or_class: The uncut network, as its constructor builds it, or its class.
        checkpoint: File or content of a Lightning checkpoint, or of a plain state dict together with ``recipe``.
        recipe: The recipe of all cuts, or its file, for a plain state dict. A checkpoint that notes its cuts goes by its own.
        init: Arguments for the constructor of a class; they go before the hyperparameters that the checkpoint holds.

    Returns:
        The network, cut and with its weights loaded: the given one, or a new one of the given class.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the weights do not fit the network, the constructor takes more than the checkpoint holds, the file holds
            more than tensors and builtin types, or a state dict of a cut network comes without a recipe.

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
    content = read(checkpoint) if isinstance(checkpoint, (str, Path)) else checkpoint
    weights: Mapping[str, Tensor] = content.get("state_dict", content)
    model: Any = _build(model_or_class, content, init) if isinstance(model_or_class, type) else model_or_class
    if recipe is not None and read_plan(content) is None:
        recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
        if plan_of(model) is None:
            _cut_to(model, _plan_from_shapes(model, weights, under_names_of(model, recipe)))
        content = {**content}
        write_plan(model, content)  # for a module that looks for itself
    else:
        rebuild(model, content)
    if hasattr(model, "on_load_checkpoint") and "state_dict" in content:
        model.on_load_checkpoint(content)
    weights = _under_own_names(model, weights)
    try:
        model.load_state_dict(weights, strict=getattr(model, "strict_loading", True))
    except RuntimeError as error:
        hint = (
            ""
            if recipe is not None or read_plan(content) is not None
            else " A plain state dict of a cut network needs `recipe=`."
        )
        raise ValueError(f"The weights do not fit {type(model).__name__}: {error}.{hint}") from error
    loaded: Network = model
    return loaded


def shrink_checkpoint(
    model: nn.Module,
    checkpoint: Mapping[str, Any],
    recipe: Recipe,
    example_inputs: Any,
    *,
    optimizers: Sequence[Optimizer] = (),
    forward_fn: ForwardFn = call,
) -> dict[str, Any]:
    """Cut the network of a checkpoint, and all in the checkpoint that goes with it: training can go on from the result.

    Cut are weights, optimizer states and the weight averages of Lightning's callbacks. The ranking of ``ModelCheckpoint`` and the
    best of ``EarlyStopping`` begin anew, as after a cut in a running Trainer.

    Args:
        model: The module as its constructor builds it. Its weights become those of the checkpoint, cut.
        checkpoint: Content of a Lightning checkpoint, possibly of a network that was cut before. It is not changed.
        recipe: The channels to keep, relative to the network in the checkpoint.
        example_inputs: As for :func:`~lit_compress.cut`.
        optimizers: Over the parameters of ``model``, as the run had them. They follow as well.
        forward_fn: As for :func:`~lit_compress.cut`.

    Returns:
        The content of the smaller checkpoint.

    Raises:
        ValueError: If the checkpoint is not one of ``model``, the recipe does not fit, the cut is not exact, an optimizer's state
            cannot follow, there are not as many optimizers as in the checkpoint, or its gates are still being trained.
    """
    if any(site["kind"] == "noise" for site in noted(checkpoint, "gates") or []):
        raise ValueError(
            "The checkpoint holds gates that are still being trained, and are not to be cut by another recipe. Let VIBPruning "
            "fold them first."
        )
    states = checkpoint.get("optimizer_states", [])
    if len(states) != len(optimizers):
        raise ValueError(
            f"The checkpoint holds the states of {len(states)} optimizer(s), but {len(optimizers)} came: give those of the run, "
            "made from the parameters of `model`."
        )
    load_pruned(model, checkpoint)
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict(copy.deepcopy(state))
    plan = cut(model, recipe, example_inputs, forward_fn=forward_fn)
    for optimizer in optimizers:
        plan.apply_to(optimizer)

    def cut_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        copied = dict(weights)
        plan.apply_to(copied)
        return copied

    smaller = dict(checkpoint)
    for key in {"state_dict", "current_model_state"} & smaller.keys():  # the second beside an average in the first
        smaller[key] = cut_weights(smaller[key])
    if states:
        smaller["optimizer_states"] = [optimizer.state_dict() for optimizer in optimizers]
    smaller["callbacks"] = {name: _after_a_cut(name, state, cut_weights) for name, state in smaller.get("callbacks", {}).items()}
    write_plan(model, smaller)
    return smaller


def _after_a_cut(name: str, state: Any, cut_weights: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]) -> Any:
    """The state of one of Lightning's callbacks in a checkpoint after a cut; its name says how it is configured."""
    worst = torch.tensor(-torch.inf if "'mode': 'max'" in name else torch.inf)
    if name.startswith("EarlyStopping"):
        return {**state, "best_score": worst, "wait_count": 0}
    if name.startswith("ModelCheckpoint") and state.get("monitor") is not None:
        best: dict[str, Any] = {"best_model_score": None, "best_model_path": "", "best_k_models": {}, "kth_best_model_path": ""}
        return {**state, **best, "kth_value": worst}
    if isinstance(state, Mapping) and state.get("average_model_state") is not None:
        return {**state, "average_model_state": cut_weights(state["average_model_state"])}
    return state


def _rest(plan: Plan, done: Plan) -> Plan | None:
    """What a plan removes beyond another one; None if it keeps something that the other has removed."""
    keep: dict[str, dict[int, tuple[int, ...]]] = {}
    for name, dims in done.keep.items():
        if any(not set(plan.keep.get(name, {}).get(dim, (-1,))).issubset(indices) for dim, indices in dims.items()):
            return None
    for name, dims in plan.keep.items():
        for dim, indices in dims.items():
            left = done.keep.get(name, {}).get(dim, range(plan.shapes[name][dim]))
            if len(left) > len(indices):
                place = {index: position for position, index in enumerate(left)}
                keep.setdefault(name, {})[dim] = tuple(place[index] for index in indices)
    shapes = {name: done.shape_after(name, plan.shapes[name]) for name in keep}
    return Plan(recipe=plan.recipe, keep=keep, shapes=shapes, pads=plan.pads)


def _under_own_names(model: nn.Module, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Weights of a module that holds the network, or that it holds, under the network's own names; else as they are."""
    change = relocation(model.state_dict(), weights) if weights else None
    if change is None or change == Relocation("", ""):
        return weights
    return {change.drop + name.removeprefix(change.add): value for name, value in weights.items() if name.startswith(change.add)}


def _cut_to(model: nn.Module, plan: Plan) -> None:
    change = relocation(plan.keep, all_tensors(model))
    if change is None:
        missing = sorted(set(plan.keep) - set(all_tensors(model)))
        raise ValueError(f"The checkpoint was made from another network: {type(model).__name__} lacks {missing[:3]}.")
    plan = plan.renamed(add=change.add, drop=change.drop)
    plan.cut_module(model)
    note_plan(model, plan)


def read(path: str | Path) -> Mapping[str, Any]:
    """The content of a checkpoint on disk, on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file holds more than tensors and builtin types.
    """
    if not Path(path).exists():
        raise FileNotFoundError(
            f"There is no checkpoint {path}. A Trainer writes them into `checkpoints` in its logger's folder, such as "
            "lightning_logs/version_0/checkpoints."
        )
    try:
        content: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        example = f", such as {found[1]}," if found else ","
        raise ValueError(
            f"{path} holds more than tensors and builtin types{example} and loading it could run code. If you trust it, pass "
            "`torch.load(path, weights_only=False)` instead of the path."
        ) from error
    return content


def _build(kind: type[Network], content: Mapping[str, Any], init: dict[str, Any]) -> Network:
    """An instance of a class, from the hyperparameters of its checkpoint and further arguments.

    Raises:
        ValueError: If the constructor takes more, or one of the hyperparameters is a network, which was cut before it was saved.
    """
    stored = dict(content.get("hyper_parameters", {}))
    parameters = inspect.signature(kind).parameters
    from_config = stored.pop("_instantiator", None) == "pytorch_lightning.cli.instantiate_module"
    open_ended = [name for name, parameter in parameters.items() if parameter.kind is inspect.Parameter.VAR_KEYWORD]
    if (holder := content.get("hparams_name")) in parameters and holder not in open_ended:  # one argument that holds them all
        stored = {holder: stored}
    arguments = {name: value for name, value in stored.items() if open_ended or name in parameters} | init
    named = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    needed = {name for name, one in parameters.items() if one.kind in named and one.default is inspect.Parameter.empty}
    cut_already = {name for name, value in arguments.items() if isinstance(value, nn.Module)} if read_plan(content) else set()
    if lacking := sorted((needed - arguments.keys()) | (cut_already - init.keys())):
        given = ", ".join(f"{name}=…" for name in lacking)
        raise ValueError(
            f"The constructor of {kind.__name__} takes {lacking}, which the checkpoint does not hold, or not as before the cut. "
            f"Give them, as in `load_pruned({kind.__name__}, checkpoint, {given})`, or an instance instead of the class."
        )
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
    """A plan that makes room for weights, whose values are all overwritten: only of groups it matters which channels it keeps."""
    tensors = all_tensors(model)
    keep: dict[str, dict[int, tuple[int, ...]]] = {}
    for name, tensor in tensors.items():
        new = tuple(weights[name].shape) if name in weights else tuple(tensor.shape)
        old = tuple(tensor.shape)
        if len(new) != len(old) or any(after > before for after, before in zip(new, old, strict=True)):
            raise ValueError(f"Tensor {name!r} has shape {new}, which is not cut out of {old}.")
        if new != old:
            keep[name] = {dim: tuple(range(after)) for dim, after in enumerate(new) if after < old[dim]}
            named = recipe.keep.get(name.rpartition(".")[0], ())
            if 0 in keep[name] and len(named) == new[0]:
                keep[name][0] = named
    cut_sizes = {tensors[name].shape[dim] for name, dims in keep.items() for dim in dims}
    for name in tensors.keys() - model.state_dict().keys() - weights.keys():
        if cut_sizes.intersection(tensors[name].shape):
            raise ValueError(
                f"Buffer {name!r} is in no state dict, and nothing says how it was cut. Load a checkpoint of the pruned network; "
                "or build the network, `cut(network, recipe, example_inputs)`, and load the weights."
            )
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
