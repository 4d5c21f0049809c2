"""Small networks for tests, recipes drawn at random, and the account that a cut is held against: zeroing found by experiment.

Nothing here asks the label graph where a channel goes. :func:`zeroed` finds out by shaking the removed channels and watching
which inputs of which layers move.
"""

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from lit_compress.plan import Plan
from lit_compress.recipe import Recipe

Removed = Mapping[str, tuple[int, ...]]


class Net(nn.Module):
    """A forward written in place: ``Net(lambda m, x: m.b(m.a(x)), a=..., b=...)``."""

    def __init__(self, function: Callable, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw norms, biases and the like anew, so that no two channels are alike and none passes unchanged. In place."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor, low, high):
        tensor.data.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if name == "running_var":
                draw(tensor, 0.5, 1.5)
            elif name == "running_mean" or name == "bias":
                draw(tensor, -0.3, 0.3)
            elif tensor.is_floating_point() and tensor.ndim < 2:
                draw(tensor, 0.5, 1.5)
    return model


def removed_by(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Channels gone from each layer, layers that only follow included."""
    return {
        layer: tuple(sorted(set(range(plan.recipe.original[layer])) - set(kept))) for layer, kept in plan.recipe.keep.items()
    }


def random_recipe(groups, seed: int, share: float = 0.7) -> Recipe:
    """Keep a random half or so of the channels of about ``share`` of the groups, each named through one member at random."""
    generator = torch.Generator().manual_seed(seed)

    def below(n):
        return int(torch.randint(n, (), generator=generator))

    keep = {}
    for number, group in enumerate(groups):
        if len(group.classes) < 2 or (torch.rand((), generator=generator) > share and number < len(groups) - 1):
            continue
        size = len(group.classes)
        gone = set(torch.randperm(size, generator=generator)[: 1 + below(max(1, 2 * size // 3))].tolist())
        gone = gone if len(gone) < size else gone - {0}
        name = list(group.members)[below(len(group.members))]
        before = keep.get(name, range(len(group.members[name])))
        keep[name] = tuple(channel for channel in before if group.members[name][channel] not in gone)
    return Recipe(keep=keep, method=f"random({seed})")


# ---------------------------------------------------------------- zeroing, by experiment


def reading_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Layers that mix channels. A depthwise convolution only passes them on."""
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds) and not 1 < getattr(m, "groups", 1) == m.in_channels}


def channel_dim(layer: nn.Module, tensor: torch.Tensor) -> int:
    """Where inputs and outputs of a layer have their channels, counted from the end."""
    return -1 if isinstance(layer, nn.Linear) else 1 - layer.weight.ndim


def clone(outputs) -> list[torch.Tensor]:
    return [leaf.detach().clone() for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


@contextmanager
def _hooked(layers: Mapping[str, nn.Module], before=None, after=None):
    """Call ``before(name, call, layer, input)`` and ``after(name, call, layer, output)``; what they return is used instead."""
    calls = dict.fromkeys(layers, 0)

    def pre(name):
        def hook(layer, args):
            changed = before and before(name, calls[name], layer, args[0])
            return None if changed is None else (changed, *args[1:])

        return hook

    def post(name):
        def hook(layer, _, output):
            changed = after and after(name, calls[name], layer, output)
            calls[name] += 1
            return changed

        return hook

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(pre(name)).remove)
            stack.callback(layer.register_forward_hook(post(name)).remove)
        yield


def _place(size: int, tensor: torch.Tensor, dim: int, channels) -> torch.Tensor:
    """True at ``channels`` along ``dim``, shaped to broadcast over ``tensor``."""
    mask = torch.zeros(size, dtype=torch.bool)
    mask[list(channels)] = True
    return mask.view([-1 if d == dim % tensor.ndim else 1 for d in range(tensor.ndim)])


def places(model: nn.Module, removed: Removed, run: Callable) -> dict[tuple[str, int], torch.Tensor]:
    """Which input channels of each call of each reading layer the removed channels reach directly.

    Every reading layer gives what it gave in an undisturbed run, so a shaken channel reaches the next layers and goes no
    further; it is shaken hard and several times, so that no activation or pool hides it.
    """
    layers, inputs, outputs = reading_layers(model), {}, {}
    with _hooked(
        layers,
        before=lambda name, call, layer, x: inputs.__setitem__((name, call), x.clone()),
        after=lambda name, call, layer, y: outputs.__setitem__((name, call), y.clone()),
    ):
        run(model)
    reached = {key: torch.zeros(x.shape[channel_dim(layers[key[0]], x)], dtype=torch.bool) for key, x in inputs.items()}
    generator = torch.Generator().manual_seed(1)
    for size in (1.0, 30.0, 1000.0):

        def watch(name, call, layer, x):
            moved = (x != inputs[name, call]).movedim(channel_dim(layer, x), 0).flatten(1).any(1)
            reached[name, call] |= moved

        def shake(name, call, layer, y, size=size):
            y = outputs[name, call].clone()
            if name in removed:
                dim = channel_dim(layer, y)
                y += _place(y.shape[dim], y, dim, removed[name]) * torch.randn(y.shape, generator=generator, dtype=y.dtype) * size
            return y

        with _hooked(layers, before=watch, after=shake):
            run(model)
    return reached


def zeroed(model: nn.Module, removed: Removed, run: Callable) -> list[torch.Tensor]:
    """What an uncut network computes with the removed channels set to zero where they enter the layers that read them.

    Args:
        model: The uncut network; a copy of it is run in evaluation mode.
        removed: Layer to its removed channels, for every layer that loses some.
        run: From a network to its outputs.
    """
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        reached = places(model, removed, run)

        def silence(name, call, layer, x):
            mask = reached[name, call]
            return x.masked_fill(_place(len(mask), x, channel_dim(layer, x), mask.nonzero().flatten().tolist()), 0)

        with _hooked(reading_layers(model), before=silence):
            return clone(run(model))


def relative_error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Largest difference, as a share of the largest expected value of the same output."""
    assert [t.shape for t in found] == [t.shape for t in expected]
    assert expected, "nothing to compare"
    worst = 0.0
    for actual, wanted in zip(found, expected, strict=True):
        assert wanted.abs().max() > 0, "zero against zero proves nothing"
        error = (actual - wanted).abs().max() / wanted.abs().max()
        assert error.isfinite()
        worst = max(worst, error.item())
    return worst
