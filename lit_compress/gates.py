"""Gates in somebody else's network: where they go, how they come and go, and how they are folded into the weights.

A gate multiplies each channel of an activation by a number of its own. It is no part of the network's code: a hook applies it,
and the network holds all of them in one child, so that they train, move, are copied and are saved with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from typing_extensions import override

from lit_compress import compiled, rng
from lit_compress.graph import ChannelGraph, evaluating
from lit_compress.layers import VIBGate
from lit_compress.layers.vib_gate import MapScale
from lit_compress.plan import note_plan, plan_of
from lit_compress.skips import Vector
from lit_compress.slicing import all_tensors, set_data, substituted
from lit_compress.surgery import ForwardFn
from lit_compress.tracing import tensors_in

CHILD = "lit_compress_gates"
# Of the largest output: the rounding of two products in another order in float64, through a deep network, leaves 1e-12.
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Site:
    """Where a gate sits.

    Args:
        layer: The layer whose channels it gates.
        module: Path of the module that a hook is on.
        side: Whether what it takes is gated, or what it gives.
        position: Which of its positional inputs.
        channels: Channels of the layer when the gate was put in.
        dim: The dimension of the activation that they lie along.
        kind: A gate of noise, or the signs that are left of one.
        threshold: As for :class:`~lit_compress.layers.VIBGate`.
        map_scale: As there.
    """

    layer: str
    module: str
    side: Literal["input", "output"]
    position: int
    channels: int
    dim: int
    kind: Literal["noise", "sign"] = "noise"
    threshold: float = 0.0
    map_scale: MapScale = "height"

    def gate(self) -> nn.Module:
        """A new gate for this place."""
        if self.kind == "sign":
            return ChannelSigns(self.channels, self.dim)
        return VIBGate(self.channels, channel_dim=self.dim, threshold=self.threshold, map_scale=self.map_scale)


class ChannelSigns(nn.Module):
    """Multiplies each channel by 1 or -1: what is left of a gate before a max-pool, which does not commute with a sign.

    Args:
        channels: Number of channels C.
        channel_dim: Dimension of the input that they lie along.
    """

    signs: Tensor

    def __init__(self, channels: int, channel_dim: int) -> None:
        super().__init__()
        self.channel_dim = channel_dim
        self.register_buffer("signs", torch.ones(channels))

    @override
    def forward(self, x: Tensor) -> Tensor:
        shape = [1] * x.ndim
        shape[self.channel_dim] = -1
        return x * self.signs.to(x.dtype).view(shape)


class Gates(nn.ModuleDict):
    """The gates of a network, by the name of their layer with its dots written as slashes.

    Attributes:
        sites: Where they are, in the same order.
    """

    def __init__(self, sites: Iterable[Site]) -> None:
        found = tuple(sites)
        super().__init__({_key(site.layer): site.gate() for site in found})
        self.sites = found

    def by_site(self) -> dict[Site, nn.Module]:
        """Each gate at its place."""
        return dict(zip(self.sites, self.values(), strict=True))

    def of_noise(self) -> dict[str, VIBGate]:
        """Layer name to its gate of noise."""
        return {site.layer: gate for site, gate in self.by_site().items() if isinstance(gate, VIBGate)}


def find_sites(graph: ChannelGraph, **options: Any) -> tuple[dict[str, Site], dict[str, str]]:
    """Where gates can go: after the activation of each layer that is cut on its own.

    After the activation in fully connected networks, and in convolutional ones after norm and activation, before pooling.

    Args:
        graph: The network's graph.
        options: ``threshold`` and ``map_scale`` of the gates.

    Returns:
        Layer name to its site, and layer name to the reason why it has none.

    Source: VIBNet, and the authors' code.
    """
    sites: dict[str, Site] = {}
    without = {name: graph.why_whole(name) for name in graph.layers if graph.why_whole(name)}
    read = graph.read_classes()
    for group in graph.groups():
        point, layer = graph.activation_of(group), graph.layers[group.name]
        if read.isdisjoint(group.classes.tolist()):
            why = "no layer reads its channels"
        elif len(group.members) > 1:
            why = f"its channels are tied to those of {', '.join(map(repr, list(group.members)[1:]))}"
        elif point is None or not np.array_equal(point.channels, layer.classes):
            why = "no activation function takes its channels alone"
        elif point.tap is None or point.tap.call is not None:
            why = f"no module that runs once gives or takes its {point.function}, where a gate could be; use a module for it"
        else:
            tap = point.tap
            sites[layer.name] = Site(layer.name, tap.module, tap.side, tap.position, len(layer.classes), point.dim, **options)
            continue
        without |= dict.fromkeys(group.members, why)
    return {name: site for name, site in sites.items() if name not in without}, without


def put_gates(model: nn.Module, sites: Iterable[Site]) -> Gates:
    """Put new gates into a network that has none.

    Args:
        model: The network, changed in place.
        sites: Where they go.

    Raises:
        ValueError: If the network has gates already, lacks a module, or is a ``Sequential``, which would run them as a layer.
    """
    if isinstance(model, nn.Sequential):
        raise ValueError("A Sequential runs all its children, also the one that holds its gates: give a module that holds it.")
    if gates_of(model) is not None:
        raise ValueError(f"{type(model).__name__} has gates already.")
    like = next(model.parameters())
    precision = torch.promote_types(like.dtype, torch.float32)  # of a network in half precision, gates are learned in single
    held = Gates(sites).train(model.training).to(like.device, precision)
    _attach(model, held)
    return held


def _attach(model: nn.Module, held: Gates) -> None:
    places = {site: model.get_submodule(site.module) for site in held.sites}
    compiled.forget()  # compiled code runs the hooks that there were
    for site, gate in held.by_site().items():
        applied, place = _Applied(gate, site.position), places[site]
        # Before the hooks of others, who see what the network goes on with.
        if site.side == "output":
            place.register_forward_hook(applied.to_output, prepend=True)
        else:
            place.register_forward_pre_hook(applied.to_input, prepend=True)
    model.add_module(CHILD, held)


def remove_gates(model: nn.Module) -> None:
    """Take all gates out of a network, hidden ones too; what they did is gone."""
    compiled.forget()
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for number, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), _Applied):
                    del hooks[number]
    model._modules.pop(CHILD, None)


@contextmanager
def gates_back_on_error(model: nn.Module) -> Iterator[None]:
    """If anything fails inside, the network has the gates that it had before."""
    held = gates_of(model)
    try:
        yield
    except BaseException:
        if gates_of(model) is not held:
            remove_gates(model)
            if held is not None:
                _attach(model, held)
        raise


def gates_of(model: nn.Module) -> Gates | None:
    """The gates in a network, or None."""
    held = model._modules.get(CHILD)
    return held if isinstance(held, Gates) else None


def hide_gates(model: nn.Module) -> Gates | None:
    """A network no longer lists its gates among its children, though they work; :func:`show_gates` takes what this returns."""
    held = gates_of(model)
    model._modules.pop(CHILD, None)
    return held


def show_gates(model: nn.Module, held: Gates) -> None:
    """The network lists its gates again, which are moved to its device."""
    model.add_module(CHILD, held.to(next(model.parameters()).device))


def sites_to_dicts(model: nn.Module) -> list[dict[str, Any]]:
    """Where the gates of a network are, as builtin types for a checkpoint; empty if it has none."""
    held = gates_of(model)
    return [] if held is None else [asdict(site) for site in held.sites]


def make_room(model: nn.Module, sites: Sequence[Mapping[str, Any]]) -> None:
    """Give a network the gates that :func:`sites_to_dicts` found and no others, for values that are loaded afterwards."""
    wanted = tuple(Site(**site) for site in sites)
    held = gates_of(model)
    if held is not None and held.sites == wanted:
        return
    remove_gates(model)
    if wanted:
        with rng.isolated():  # first values that nobody will see
            put_gates(model, wanted)


def fold_gates(
    model: nn.Module,
    graph: ChannelGraph,
    inputs: Any,
    forward_fn: ForwardFn,
    *,
    keep_signs: bool = True,
    only_check: bool = False,
) -> dict[str, list[int]]:
    """Multiply what each gate does in evaluation into the weights that read its channels, and take the gates out.

    Exact in evaluation, and checked on ``inputs`` in float64. The maximum of negative multiples is not the multiple of a maximum:
    where a max-pool takes a channel whose factor is negative, its size is folded and its sign stays where it is, as a factor of
    ±1.

    Args:
        model: The network with its gates, changed in place.
        graph: Its graph, traced with the gates.
        inputs: Real inputs.
        forward_fn: How to run the network on them.
        keep_signs: Keep signs before a max-pool. Otherwise these channels are switched off, which changes the network.
        only_check: Change nothing, and make the check for any values that training may lead to: on values near the present ones,
            drawn at random. A norm as it is built, for one, keeps ratios, and one that has seen data does not.

    Returns:
        Layer name to the channels whose sign stays, or that were switched off for it; empty for a network that is plain again.

    Raises:
        ValueError: If the folded network is not the gated one, naming the layers. The network is then as it was.
    """
    held = gates_of(model)
    if held is None:
        return {}
    tensors = all_tensors(model)
    drawn = _drawn(tensors) if only_check else {}
    folded = {name: drawn.get(tensors[name], tensors[name].data) for name in {use.weight for use in graph.uses}}
    switched_off: dict[Tensor, Tensor] = {}
    signs: dict[Site, Tensor] = {}  # that stay
    stuck: dict[str, list[int]] = {}
    stand_in: dict[Tensor, Tensor] = {}  # for the gates, once the rest of them is in the weights
    for site, gate in held.by_site().items():
        if not isinstance(gate, VIBGate):
            signs[site] = gate.get_buffer("signs")
            continue
        classes, scale = graph.layers[site.layer].classes, gate.scale.detach().double()
        pooled = torch.from_numpy(np.isin(classes, list(_pooled(graph, site.layer)))).to(scale.device) & (scale < 0)
        if pooled.any():
            stuck[site.layer] = pooled.nonzero().flatten().tolist()
            if keep_signs:
                signs[site] = torch.where(pooled, -1.0, 1.0).to(gate.mu)
            else:
                switched_off[gate.mu] = gate.mu.detach().masked_fill(pooled, 0)
        _multiply(graph, folded, classes, torch.where(pooled, scale.abs() if keep_signs else 0.0, scale))
        stand_in[gate.mu] = signs.get(site, torch.ones_like(gate.mu)).detach()
        stand_in[gate.log_var] = torch.full_like(gate.log_var, -100).detach()  # no noise: none is switched off
    before = _outputs(model, graph, forward_fn, inputs, {**drawn, **switched_off})
    changed = {tensors[name]: value for name, value in folded.items() if value is not tensors[name].data}
    _refuse_difference(before, _outputs(model, graph, forward_fn, inputs, {**drawn, **changed, **stand_in}), held)
    if only_check:
        return stuck
    torch.clear_autocast_cache()  # it holds casts of the old weights
    for tensor, value in changed.items():
        set_data(tensor, value.to(tensor))
    remove_gates(model)
    if signs:
        left = [replace(site, kind="sign", channels=len(value)) for site, value in signs.items()]
        for value, gate in zip(signs.values(), put_gates(model, left).values(), strict=True):
            gate.get_buffer("signs").copy_(value)
    _forget(model)
    return stuck


def _drawn(tensors: Mapping[str, Tensor]) -> dict[Tensor, Tensor]:
    """Values near those of a network's floating point tensors, but for the gates; what was positive stays so."""
    generator = torch.Generator().manual_seed(0)
    return {
        tensor: tensor.data + (0.1 * torch.rand(tensor.shape, generator=generator)).to(tensor)
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not name.startswith(f"{CHILD}.")
    }


def _multiply(graph: ChannelGraph, data: dict[str, Tensor], classes: Vector, factor: Tensor) -> None:
    """Multiply the columns of every weight that read some classes."""
    by_class = dict(zip(classes.tolist(), factor.tolist(), strict=True))
    for weight, dim in {(use.weight, use.in_dim) for use in graph.uses}:
        entering = graph.tensors.get(weight, {}).get(dim, np.zeros(0, np.int64))
        columns = torch.tensor([by_class.get(channel, 1.0) for channel in entering.tolist()], dtype=torch.float64)
        if len(columns) and not set(by_class).isdisjoint(entering.tolist()):
            shape = [1] * data[weight].ndim
            shape[dim] = -1
            data[weight] = data[weight].double() * columns.view(shape).to(data[weight].device)


def _pooled(graph: ChannelGraph, layer: str) -> frozenset[int]:
    mine = graph.layers[layer].classes
    return next((point.pooled for point in graph.activations if np.array_equal(point.channels, mine)), frozenset())


def _outputs(
    model: nn.Module, graph: ChannelGraph, forward_fn: ForwardFn, inputs: Any, values: Mapping[Tensor, Tensor]
) -> list[tuple[str, Tensor]]:
    """Output of each layer and of the network in evaluation, in float64, with some tensors exchanged for others."""
    seen: list[tuple[str, Tensor]] = []

    def precise(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    def listen(name: str) -> Any:
        return lambda module, inputs, output: (
            seen.append((f"layer {name!r}", output.clone())) if isinstance(output, Tensor) else None
        )

    exchanged = {tensor: precise(values.get(tensor, tensor.data)) for tensor in all_tensors(model).values()}
    modules = dict(model.named_modules())
    # A depthwise convolution passes on channels whose factor comes later. The network itself may return what it likes.
    layers = [name for name, layer in graph.layers.items() if layer.own and name and name in modules]
    handles = [modules[name].register_forward_hook(listen(name)) for name in layers]
    try:
        with (
            rng.isolated(), compiled.eagerly(), evaluating(model), torch.inference_mode(False), torch.no_grad(),
            substituted(model, exchanged),
        ):  # fmt: skip
            torch.manual_seed(0)
            found = forward_fn(model, tree_map(precise, inputs))
    finally:
        for handle in handles:
            handle.remove()
    seen += [("the output", tensor) for tensor in tensors_in(found)]
    return [(name, precise(tensor.detach())) for name, tensor in seen]


def _refuse_difference(before: list[tuple[str, Tensor]], after: list[tuple[str, Tensor]], held: Gates) -> None:
    for (name, expected), (_, found) in zip(before, after, strict=True):
        largest = expected.abs().max().item() if expected.numel() else 0.0
        error = (found - expected).abs().max().item() if expected.numel() else 0.0
        if not error <= _TOLERANCE * max(largest, 1e-12):
            layers = ", ".join(repr(site.layer) for site in held.sites)
            raise ValueError(
                f"The gates of {layers} cannot be folded into the weights that read them: {name} differs by "
                f"{error / max(largest, 1e-12):.1e} of its largest value. Something between a gate and the next layer does not "
                "keep the ratio of its inputs (a norm, a sum with the channels as they were before the gate). Leave the layer "
                "before it out with `exclude`."
            )


def _forget(model: nn.Module) -> None:
    """Let the plan of a network say nothing of gates that are gone."""
    plan, present = plan_of(model), all_tensors(model)
    if plan is not None:
        keep = {name: dims for name, dims in plan.keep.items() if name in present or not name.startswith(f"{CHILD}.")}
        note_plan(model, replace(plan, keep=keep, shapes={name: plan.shapes[name] for name in keep}))


def _key(layer: str) -> str:
    return layer.replace(".", "/")  # names of modules hold no dots


class _Applied:
    """What a hook does; an object, so that a copy of the network has hooks on its own gates."""

    def __init__(self, gate: nn.Module, position: int) -> None:
        self.gate, self.position = gate, position

    def to_output(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        gated: Tensor = self.gate(output)
        return gated

    def to_input(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        here = self.position
        return (*inputs[:here], self.gate(inputs[here]), *inputs[here + 1 :])
