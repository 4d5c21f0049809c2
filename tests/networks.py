"""Small networks for tests, recipes drawn at random, and the account that a cut is held against: zeroing found by experiment.

Nothing here asks the label graph where a channel goes. :func:`zeroed` finds out by shaking the removed channels and watching
which inputs of which layers move.
"""

import copy
import random
from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torchvision.ops import FrozenBatchNorm2d

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
            elif tensor.is_floating_point() and (tensor.ndim < 2 or bool((tensor == tensor.flatten()[0]).all())):
                draw(tensor, 0.5, 1.5)  # also what begins as zeros or tiny, which would hide what it is multiplied with
    return model


def removed_by(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Channels gone from each layer, layers that only follow included."""
    return {layer: tuple(sorted(set(range(plan.recipe.original[layer])) - set(kept))) for layer, kept in plan.recipe.keep.items()}


def random_recipe(groups, seed: int, share: float = 0.7) -> Recipe:
    """Keep a random half or so of the channels of about ``share`` of the groups, each named through one member at random."""
    generator = torch.Generator().manual_seed(seed)

    def below(n):
        return int(torch.randint(n, (), generator=generator))

    names: set[str] = set()
    gone: list[tuple[Mapping, set[int]]] = []
    for number, group in enumerate(groups):
        size = len(group.classes)
        if size > 1 and (below(100) < 100 * share or number == len(groups) - 1):
            names.add(list(group.members)[below(len(group.members))])
            gone.append(
                (group.members, set(torch.randperm(size, generator=generator)[: 1 + below(max(1, 2 * size // 3))].tolist()))
            )
    keep: dict[str, tuple[int, ...]] = {}
    for members, positions in gone:
        for name in names & set(members):
            before = keep.get(name, range(len(members[name])))
            keep[name] = tuple(channel for channel in before if members[name][channel] not in positions)
    return Recipe(keep=keep, method=f"random({seed})")


def unsized(model: nn.Module) -> dict:
    """All that a cut leaves as it is: names, order and identity of tensors and modules, modes, attributes, hooks, state dict."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    hooks = [name for name in vars(nn.Module()) if name.endswith("hooks")]
    return {
        "tensors": [(name, id(t), type(t), t.dtype, t.device, t.requires_grad, t.is_leaf, {**vars(t)}) for name, t in tensors],
        "hooks of tensors": [
            (name, list((t._backward_hooks or {}).items()), list((t._post_accumulate_grad_hooks or {}).items()))
            for name, t in tensors
        ],
        "modules": [(name, id(m), type(m), m.training, {*m._non_persistent_buffers_set}) for name, m in model.named_modules()],
        "hooks of modules": [[list(vars(m)[name].items()) for name in hooks] for m in model.modules()],
        "state dict": list(model.state_dict()),
    }


# ---------------------------------------------------------------- zeroing, by experiment


def reading_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Layers that mix channels. A depthwise convolution only passes them on."""
    mixing = {name: layer for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd))}
    return {name: layer for name, layer in mixing.items() if not 1 < getattr(layer, "groups", 1) == layer.in_channels}


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


def places(model: nn.Module, removed: Removed, run: Callable, sizes=(1.0, -1.0, 100.0, -100.0)) -> dict:
    """Which input channels of each call of each reading layer the removed channels reach directly.

    Every reading layer gives what it gave in an undisturbed run, so a shaken channel reaches the next layers and goes no
    further; it is shaken hard against the layer's largest output and both ways, so that no activation or pool hides it.

    Returns:
        ``(layer, call)`` to a mask over the layer's input channels.
    """
    layers, inputs, outputs = reading_layers(model), {}, {}
    tied = {(type(layers[name]), id(layers[name].weight)): channels for name, channels in removed.items() if name in layers}
    removed = {
        **removed,
        **{name: tied[key] for name, layer in layers.items() if (key := (type(layer), id(layer.weight))) in tied},
    }
    with _hooked(
        layers,
        before=lambda name, call, layer, x: inputs.__setitem__((name, call), x.clone()),
        after=lambda name, call, layer, y: outputs.__setitem__((name, call), y.clone()),
    ):
        run(model)
    reached = {key: torch.zeros(x.shape[channel_dim(layers[key[0]], x)], dtype=torch.bool) for key, x in inputs.items()}
    generator = torch.Generator().manual_seed(1)
    for size in sizes:

        def watch(name, call, layer, x):
            moved = (x != inputs[name, call]).movedim(channel_dim(layer, x), 0).flatten(1).any(1)
            reached[name, call] |= moved

        def shake(name, call, layer, y, size=size):
            y = outputs[name, call].clone()
            if name in removed:
                dim = channel_dim(layer, y)
                by = (1 + torch.rand(y.shape, generator=generator, dtype=y.dtype)) * size * y.abs().max().clamp_min(1)
                y += _place(y.shape[dim], y, dim, removed[name]) * by
            return y

        with _hooked(layers, before=watch, after=shake):
            run(model)
    return reached


def silenced(model: nn.Module, reached: Mapping, run: Callable) -> list[torch.Tensor]:
    """Outputs of a network with the channels of :func:`places` set to zero where they enter the layers that read them."""

    def silence(name, call, layer, x):
        mask = reached[name, call]
        return x.masked_fill(_place(len(mask), x, channel_dim(layer, x), mask.nonzero().flatten().tolist()), 0)

    with torch.no_grad(), _hooked(reading_layers(model), before=silence):
        return clone(run(model))


def zeroed(model: nn.Module, removed: Removed, run: Callable) -> list[torch.Tensor]:
    """What an uncut network computes with the removed channels set to zero where they enter the layers that read them.

    Args:
        model: The uncut network; a copy of it is run in evaluation mode.
        removed: Layer to its removed channels, for every layer that loses some.
        run: From a network to its outputs.
    """
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        return silenced(model, places(model, removed, run), run)


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


# ---------------------------------------------------------------- networks drawn at random


def conv(in_channels: int, out_channels: int, size: int = 3, **options) -> nn.Conv2d:
    """A convolution that keeps the size of the map."""
    return nn.Conv2d(in_channels, out_channels, size, padding=size // 2, **options)


class Draw(random.Random):
    """Draws the parts of a network; ``side`` is the height and width of every map in it."""

    side = 6

    def width(self) -> int:
        return self.choice([2, 4, 4, 6, 8])

    def activation(self) -> nn.Module:
        return self.choice([nn.ReLU(), nn.ReLU(inplace=True), nn.Sigmoid(), nn.GELU(), nn.LeakyReLU(0.1, inplace=True),
                            nn.Softplus(), nn.Hardswish(), nn.Tanh(), nn.Identity(), nn.Dropout(0.5)])  # fmt: skip


def _plain(draw, c):
    out = draw.width()
    parts = [conv(c, out, draw.choice([1, 3]), bias=draw.random() < 0.5), draw.activation()]
    parts[1:1] = [nn.BatchNorm2d(out)] if draw.random() < 0.5 else []
    return nn.Sequential(*parts), out


def _squeeze_excite(draw, c):
    gate = nn.Sequential(nn.Linear(c, 3), nn.ReLU(), nn.Linear(3, c), nn.Sigmoid())
    return Net(lambda m, x: x * m.gate(x.mean((2, 3)))[:, :, None, None], gate=gate), c


def _pool(draw, c):
    return draw.choice([nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1), nn.AdaptiveMaxPool2d(draw.side),
                        nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.AvgPool2d(2))]), c  # fmt: skip


def _fork(draw, c):
    parts = {"a": conv(c, 3), "b": conv(c, 4), "d": conv(4, 2)}
    return Net(lambda m, x: torch.cat([m.a(x), m.d(m.b(x)), F.max_pool2d(x, 3, 1, 1)], 1), **parts), c + 5


def _zero_pad(draw, c):
    front, back = draw.choice([0, 1, 2]), draw.choice([1, 3])
    out = c + front + back
    return Net(lambda m, x: F.pad(x, (0, 0, 0, 0, front, back)) + m.a(x), a=conv(c, out)), out


def _slice(draw, c):
    start = draw.randrange(c)
    stop = draw.randrange(start + 1, c + 1)
    return Net(lambda m, x: x[:, start:stop]), stop - start


def _shuffle(draw, c):
    groups = 2 if c % 2 == 0 else 1
    return Net(lambda m, x: x.view(len(x), groups, -1, *x.shape[2:]).transpose(1, 2).reshape(x.shape)), c


def _moves(draw, c):
    move = draw.choice([
        lambda m, x: x.flip(2), lambda m, x: x.flip(1), lambda m, x: x.roll(1, 3), lambda m, x: x.roll(1, 1),
        lambda m, x: x.transpose(2, 3), lambda m, x: F.pad(x, (1, 1), value=2.0)[..., 1:-1],
        lambda m, x: F.pad(x, (1, 1, 1, 1), mode="reflect")[..., 1:-1, 1:-1], lambda m, x: F.pad(x, (0, 0, 0, 0, -1, 1)),
        lambda m, x: x[:, torch.arange(c - 1, -1, -1)], lambda m, x: x - x.mean((2, 3), keepdim=True),
        lambda m, x: x - x.mean(1, keepdim=True), lambda m, x: x.softmax(1), lambda m, x: F.normalize(x, dim=1),
        lambda m, x: x / x.shape[1],
    ])  # fmt: skip
    return Net(move), c


def _scale(draw, c):
    kind = draw.randrange(4)
    if kind == 0:
        return Net(lambda m, x: x * m.g[:, None, None], g=nn.Parameter(torch.rand(c))), c
    if kind == 1:
        return Net(lambda m, x: x + m.g * m.a(x), g=nn.Parameter(torch.rand(1, c, 1, 1)), a=conv(c, c)), c
    if kind == 2:
        return Net(lambda m, x: x * m.g, g=torch.rand(1, c, 1, 1)), c
    return Net(lambda m, x: torch.einsum("nchw,c->nchw", x, m.g), g=nn.Parameter(torch.rand(c))), c


def _norm(draw, c):
    return draw.choice([nn.GroupNorm(1, c), nn.InstanceNorm2d(c, affine=True), nn.BatchNorm2d(c, affine=False), nn.PReLU(c),
                        nn.BatchNorm2d(c, track_running_stats=False), nn.LocalResponseNorm(3),
                        FrozenBatchNorm2d(c)]), c  # fmt: skip


def _tokens(draw, c):
    out = draw.width()

    def run(m, x):
        return m.a(x.flatten(2).transpose(1, 2) + m.g).transpose(1, 2).reshape(len(x), -1, *x.shape[2:])

    return Net(run, a=nn.Linear(c, out), g=nn.Parameter(torch.randn(1, draw.side**2, c))), out


def _attention(draw, c):
    def run(m, x):
        q, k, v = (part(x).flatten(2) for part in (m.q, m.k, m.v))
        return x + (v @ (q.transpose(1, 2) @ k).softmax(-1)).view(x.shape)

    return Net(run, q=conv(c, 4, 1), k=conv(c, 4, 1), v=conv(c, c, 1)), c


def _written(draw, c):
    def run(m, x):
        y = x.clone()
        y[:, :, 0] = 0
        y[:, :, 1] = m.a(x)[:, :, 1]
        return y

    return Net(run, a=conv(c, c)), c


def _tied(draw, c):
    a, b = conv(c, c), conv(c, c)
    b.weight = a.weight
    return Net(lambda m, x: m.b(F.relu(m.a(x))), a=a, b=b), c


def _depthwise(draw, c):
    out = draw.width()
    return nn.Sequential(conv(c, c, groups=c), nn.BatchNorm2d(c), draw.activation(), conv(c, out, 1)), out


def _multiplied(draw, c):
    times = draw.choice([2, 3])
    return nn.Sequential(conv(c, times * c, groups=c), draw.activation()), times * c


def _grouped(draw, c):
    groups = draw.choice([g for g in (1, 2, 4, c) if c % g == 0])
    out = groups * draw.choice([1, 2, 3])
    return nn.Sequential(conv(c, out, draw.choice([1, 3]), groups=groups), draw.activation()), out


def _parted(draw, c):
    """Parts whose sizes follow the tensor's, and parts of fixed sizes."""
    if c % 2:
        return nn.Identity(), c
    part = draw.choice([
        lambda x: x.chunk(2, 1), lambda x: x.split(x.shape[1] // 2, 1),
        lambda x: (x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]),
        lambda x: x.split(c // 2, 1), lambda x: (x[:, : c // 2], x[:, c // 2 :]), lambda x: x.tensor_split(2, 1),
        lambda x: x.view(len(x), 2, -1, *x.shape[2:]).unbind(1), lambda x: x.view(len(x), -1, 2, *x.shape[2:]).unbind(2),
        lambda x: x.view(len(x), 2, c // 2, *x.shape[2:]).unbind(1),
    ])  # fmt: skip
    join = draw.choice([
        lambda a, b: a * b.sigmoid(), lambda a, b: torch.cat([b, a], 1), lambda a, b: torch.cat([a, b.relu(), a], 1),
        lambda a, b: torch.stack([a, b], 2).flatten(1, 2),
    ])  # fmt: skip
    return Net(lambda m, x: join(*part(x))), join(*part(torch.zeros(1, c, 1, 1))).shape[1]


def _pixels(draw, c):
    if draw.random() < 0.5:
        return Net(lambda m, x: F.max_pool2d(F.pixel_shuffle(m.a(x), 2), 2), a=conv(c, 12)), 3
    return nn.Sequential(nn.PixelUnshuffle(2), nn.Upsample(scale_factor=2)), 4 * c


def _unet(draw, c):
    def run(m, x):
        return torch.cat([x, m.up(F.relu(m.down(F.max_pool2d(x, 2))))], 1)

    return Net(run, down=conv(c, 5), up=nn.ConvTranspose2d(5, 4, 2, 2)), c + 4


def _normed_groups(draw, c):
    groups = draw.choice([g for g in (1, 2, 4, c) if c % g == 0])
    return nn.GroupNorm(groups, c, affine=draw.random() < 0.8), c


def _layer_norm(draw, c):
    """As in ConvNeXt: depthwise, norm over channels, two linear layers with the channels last, a scale, a skip."""

    def run(m, x):
        y = m.b(F.gelu(m.a(m.n(m.d(x).permute(0, 2, 3, 1)))))
        return x + m.g * y.permute(0, 3, 1, 2)

    parts = {"d": conv(c, c, groups=c), "n": nn.LayerNorm(c), "a": nn.Linear(c, 2 * c), "b": nn.Linear(2 * c, c)}
    return Net(run, **parts, g=nn.Parameter(torch.rand(c, 1, 1))), c


def _recurrent(draw, c):
    layer = draw.choice([nn.LSTM, nn.GRU])(c, 5, batch_first=True)

    def run(m, x):
        states, _ = m.a(x.mean(2).transpose(1, 2))
        return x + m.b(states.mean(1))[..., None, None]

    return Net(run, a=layer, b=nn.Linear(5, c)), c


def _sequences(draw, c):
    """Convolutions over one dimension and over three."""
    return Net(
        lambda m, x: m.b(F.relu(m.a(x.flatten(2))).unflatten(2, x.shape[2:])[:, :, None]).squeeze(2),
        a=nn.Conv1d(c, 6, 3, padding=1), b=nn.Conv3d(6, 4, (1, 3, 3), padding=(0, 1, 1)),
    ), 4  # fmt: skip


class _Auxiliary(nn.Module):
    """A head that only training runs; what it gives is kept in an attribute, as some losses have it."""

    def __init__(self, c):
        super().__init__()
        self.a, self.head = conv(c, 4), nn.Sequential(conv(4, 3), nn.ReLU(), conv(3, 2))

    def forward(self, x):
        y = self.a(x)
        return y + self.head(y).mean() if self.training else y


def _masked_weight(draw, c):
    class Mask(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", (torch.rand(4, c, 3, 3) > 0.3).float())

        def forward(self, weight):
            return weight * self.mask

    layer = conv(c, 4)
    nn.utils.parametrize.register_parametrization(layer, "weight", Mask())
    return layer, 4


def _heads_of_attention(draw, c):
    """Heads whose number is fixed, and heads whose width is."""
    heads = draw.choice([1, 2])

    def run(m, x):
        tokens = m.qkv(x.flatten(2).transpose(1, 2))
        q, k, v = tokens.reshape(len(x), -1, 3, heads, 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + m.out(y).transpose(1, 2).reshape(x.shape)

    return Net(run, qkv=nn.Linear(c, 3 * heads * 4), out=nn.Linear(heads * 4, c)), c


def _one(function, **widths):
    """A block of convolutions ``a``, ``b``, ... from the incoming width to that width."""
    return lambda draw, c: (Net(function, **{name: conv(c, widths[name] or c) for name in widths}), c)


BLOCKS: dict[str, Callable] = {
    "plain": _plain, "squeeze-excite": _squeeze_excite, "pool": _pool, "fork": _fork, "zero-padded skip": _zero_pad,
    "slice": _slice, "shuffle": _shuffle, "moves": _moves, "scale": _scale, "norm": _norm, "tokens": _tokens,
    "attention": _attention,
    "multiplied": _multiplied, "grouped": _grouped, "parted": _parted, "pixels": _pixels, "unet": _unet,
    "groups normed": _normed_groups, "layer norm": _layer_norm, "recurrent": _recurrent, "sequences": _sequences,
    "auxiliary": lambda draw, c: (_Auxiliary(c), 4), "masked weight": _masked_weight, "heads of attention": _heads_of_attention,
    "written in place": _written, "tied": _tied, "depthwise": _depthwise,
    "identity skip": _one(lambda m, x: F.relu(x + m.a(x)), a=None),
    "skip in place": _one(lambda m, x: m.a(x).add_(x), a=None),
    "projected skip": lambda draw, c: (Net(lambda m, x: m.a(x) + m.b(x), a=conv(c, 6), b=conv(c, 6, 1)), 6),
    "gate": lambda draw, c: (Net(lambda m, x: m.a(x) * torch.sigmoid(m.b(x)), a=conv(c, 6), b=conv(c, 6)), 6),
    "shared": _one(lambda m, x: m.a(F.relu(m.a(x))), a=None),
    "dense": lambda draw, c: (Net(lambda m, x: torch.cat([x, F.relu(m.a(x))], 1), a=conv(c, 3)), c + 3),
    "twice": lambda draw, c: (Net(lambda m, x: torch.cat([x, -x], 1)), 2 * c),
    "repeat": lambda draw, c: (Net(lambda m, x: x.repeat(1, 2, 1, 1)), 2 * c),
    "wide and back": _one(lambda m, x: torch.cat([x, m.a(x)], 2)[:, :, ::2], a=None),
    "one batch": _one(lambda m, x: sum(m.b(torch.cat([x, m.a(x)])).chunk(2)), a=None, b=None),
    "stack": _one(lambda m, x: torch.stack([x, m.a(x)], 1).amax(1), a=None),
    "spatial mask": _one(lambda m, x: x * torch.sigmoid(m.a(x)).expand_as(x), a=1),
    "where": _one(lambda m, x: torch.where(x > 0, x, m.a(x)), a=None),
    "glu": lambda draw, c: (Net(lambda m, x: F.glu(m.a(x), 1), a=conv(c, 2 * c)), c),
    "transposed": lambda draw, c: (nn.ConvTranspose2d(c, 5, 3, padding=1), 5),
    "transposed in groups": lambda draw, c: (nn.ConvTranspose2d(c, 2 * c, 3, padding=1, groups=c), 2 * c),
    "channel shuffle": lambda draw, c: (nn.ChannelShuffle(2 if c % 2 == 0 else 1), c),
    "spectral norm": lambda draw, c: (nn.utils.parametrizations.spectral_norm(conv(c, 4)), 4),
    "channels last": lambda draw, c: (Net(lambda m, x: m.a(x.to(memory_format=torch.channels_last)), a=conv(c, c)), c),
    "gated by one position": lambda draw, c: (
        Net(lambda m, x: x * m.a(F.adaptive_avg_pool2d(x.to(memory_format=torch.channels_last), 1)).sigmoid(), a=conv(c, c, 1)), c
    ),
    "blur": lambda draw, c: (Net(lambda m, x: F.conv2d(x, m.g, groups=x.shape[1], padding=1), g=torch.rand(c, 1, 3, 3)), c),
    "weight norm": lambda draw, c: (nn.utils.parametrizations.weight_norm(conv(c, 4)), 4),
    "hard view": lambda draw, c: (Net(lambda m, x: x.view(-1, c, draw.side, draw.side)), c),
    "zeros": lambda draw, c: (
        Net(lambda m, x: torch.cat([x, x.new_zeros(len(x), 1, *x.shape[2:])], 1) + m.a(x), a=conv(c, c + 1)), c + 1
    ),
}  # fmt: skip


class RandomNetwork(nn.Module):
    """Blocks drawn from :data:`BLOCKS` on images ``(N, 3, 6, 6)``, between a convolution and one of four heads.

    Args:
        seed: The same seed gives the same network.
        depth: Number of blocks.
    """

    def __init__(self, seed: int, depth: int = 4):
        super().__init__()
        draw = Draw(seed)
        torch.manual_seed(seed)
        c = draw.width()
        self.kinds: list[str] = []
        self.blocks = nn.Sequential(conv(3, c), nn.BatchNorm2d(c), nn.ReLU())
        while len(self.kinds) < depth:
            self.kinds.append(draw.choice(["plain", *BLOCKS]))
            block, c = BLOCKS[self.kinds[-1]](draw, c)
            self.blocks.append(block)
        self.head = draw.choice([
            nn.Sequential(nn.Flatten(), nn.Linear(c * draw.side**2, 6), nn.ReLU(), nn.Linear(6, 3)),
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 3)),
            nn.Sequential(nn.Conv2d(c, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)),
            nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(9 * c, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)),
        ])  # fmt: skip
        self.wrap = draw.choice([lambda y: y, lambda y: {"logits": y}, lambda y: (y, [y.sum()])])
        randomized(self, seed)

    def forward(self, images):
        return self.wrap(self.head(self.blocks(images)))
