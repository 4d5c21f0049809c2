"""One network for every kind of coupling: which channels are tied, which stay and why, and that random cuts of it are exact.

The ties are written down by hand; that a cut is exact is held against zeroing by experiment (`networks.zeroed`).
"""

import contextlib
import copy
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune
from torchvision.ops import FrozenBatchNorm2d, deform_conv2d

from lit_compress import Recipe, cut, tracing
from lit_compress.graph import trace
from lit_compress.models import ResNetCIFAR, ZeroPadShortcut
from lit_compress.skips import Tap
from tests.networks import Net, clone, conv, random_recipe, randomized, relative_error, removed_by, zeroed

IMAGES = (2, 3, 6, 6)


@dataclass
class Case:
    """A network, and what must be found out about it.

    Args:
        build: Makes the network.
        tied: Channels that are cut together, each as ``(layer, channel)``.
        free: Layers all of whose channels may be cut.
        whole: Layer none of whose channels may be cut, to what the reason must say.
        follows: Parameters and buffers, beside weights and biases, that lose entries with a layer.
        zeroing: Whether zeroing by experiment sees all there is to see; else the cut's own check has to do.
    """

    build: Callable[[], nn.Module]
    tied: list[list[tuple[str, int]]] = field(default_factory=list)
    free: tuple[str, ...] = ()
    whole: dict[str, str] = field(default_factory=dict)
    follows: tuple[str, ...] = ()
    shape: tuple[int, ...] = IMAGES
    zeroing: bool = True


def pairs(*layers, width=4, shift=0):
    """Channel i of the first layer goes with channel i + shift of the others."""
    return [[(layers[0], i), *((layer, i + shift) for layer in layers[1:])] for i in range(width)]


def end(c):
    """A reader of every channel, so that what comes before may be cut."""
    return nn.Conv2d(c, 2, 3)


class Masked(nn.Module):
    """A parametrization that sets some weights to zero."""

    def __init__(self, shape):
        super().__init__()
        self.register_buffer("mask", (torch.rand(shape) > 0.3).float())

    def forward(self, weight):
        return weight * self.mask


class Twins(nn.Module):
    """Two convolutions with one parameter as their weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.end = conv(3, 3), conv(3, 3), end(3)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.end(F.relu(self.b(F.relu(self.a(x)))))


@torch.library.custom_op("lit_compress_tests::swap_halves", mutates_args=())
def swap_halves(x: torch.Tensor) -> torch.Tensor:
    """An operation that the tracer cannot know."""
    return x.roll(x.shape[1] // 2, 1)


def write(x, y, *place):
    x = x.clone()
    x[place] = y
    return x


def attend(m, x):
    q, k, v = (part(x).flatten(2) for part in (m.q, m.k, m.v))
    return m.end((v @ (q.transpose(1, 2) @ k).softmax(-1)).view(x.shape[0], -1, 6, 6))


def after(function, c=4, **parts):
    """``a`` makes four channels, the function does something to them with further parts, ``end`` reads ``c`` channels."""

    def build():
        made = {name: part() for name, part in parts.items()}
        return Net(lambda m, x: m.end(function(m, m.a(x))), a=conv(3, 4), **made, end=end(c))

    return build


def weight_norm_by_hook(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # kept for old networks
        return nn.utils.weight_norm(layer)


OUTPUT = "they are the output of the network"
CASES = {
    "chain": Case(
        lambda: nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 5), nn.Sigmoid(), end(5)),
        free=("0", "3"),
        whole={"5": OUTPUT},
        follows=("1.weight", "1.bias", "1.running_mean", "1.running_var"),
    ),
    "mlp": Case(
        lambda: nn.Sequential(nn.Linear(6, 5), nn.PReLU(5), nn.Linear(5, 3), nn.PReLU(), nn.Linear(3, 2)),
        free=("0", "2"),
        whole={"4": OUTPUT},
        follows=("1.weight",),
        shape=(2, 6),
    ),
    "flatten into linear": Case(lambda: nn.Sequential(conv(3, 4), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 2)), free=("0",)),
    "identity skip": Case(
        lambda: Net(lambda m, x: m.end(F.relu(m.b(s := m.a(x)) + s)), a=conv(3, 4), b=conv(4, 4), end=end(4)),
        tied=pairs("a", "b"),
        free=("a", "b"),
    ),
    "projected skip": Case(
        after(lambda m, x: m.b(x) + m.p(x), 5, b=lambda: conv(4, 5), p=lambda: conv(4, 5, 1)),
        tied=pairs("b", "p", width=5),
        free=("a", "b", "p"),
    ),
    "zero-padded skip": Case(
        after(lambda m, x: m.s(x) + m.b(x), 8, b=lambda: conv(4, 8), s=lambda: ZeroPadShortcut(4, 8)),
        tied=pairs("a", "b", shift=2),
        free=("a",),
        whole={"b": r"something of fixed size in the forward \(add\), such as zero padding"},
    ),
    "concatenation": Case(after(lambda m, x: torch.cat([x, m.b(x)], 1), 7, b=lambda: conv(4, 3)), free=("a", "b")),
    "concatenation added": Case(
        after(lambda m, x: m.d(x) + torch.cat([x, m.b(x)], 1), 7, b=lambda: conv(4, 3), d=lambda: conv(4, 7)),
        tied=[*pairs("a", "d"), *pairs("b", "d", width=3, shift=4)],
        free=("a", "b", "d"),
    ),
    "depthwise": Case(
        after(lambda m, x: m.n(m.b(x)), b=lambda: conv(4, 4, groups=4), n=lambda: nn.BatchNorm2d(4)),
        tied=pairs("a", "b"),
        free=("a",),
        follows=("b.weight", "n.weight"),
    ),
    "grouped": Case(
        after(lambda m, x: m.b(x), 6, b=lambda: conv(4, 6, groups=2)),
        tied=[[("a", i), ("a", i + 2)] for i in range(2)] + [[("b", i), ("b", i + 3)] for i in range(3)],
    ),
    "groups of groups": Case(
        after(lambda m, x: m.d(m.b(x)), 8, b=lambda: conv(4, 8, groups=2), d=lambda: conv(8, 8, groups=4)),
        tied=[
            *([("a", i), ("a", i + 2)] for i in range(2)),
            *([("b", i + 2 * j) for j in range(4)] for i in range(2)),
            *([("d", i + 2 * j) for j in range(4)] for i in range(2)),
        ],
    ),
    "transposed in groups": Case(
        after(lambda m, x: m.b(x), 6, b=lambda: nn.ConvTranspose2d(4, 6, 2, groups=2)),
        whole={"a": "'b' is a transposed convolution in groups", "b": "'b' is a transposed convolution in groups"},
    ),
    "depthwise with a multiplier": Case(
        after(lambda m, x: m.n(m.b(x)), 12, b=lambda: conv(4, 12, groups=4), n=lambda: nn.BatchNorm2d(12)),
        tied=[[("a", i), *(("b", 3 * i + j) for j in range(3))] for i in range(4)],
        free=("a",),
        follows=("b.weight", "n.weight"),
    ),
    "transposed": Case(after(lambda m, x: m.b(x), 5, b=lambda: nn.ConvTranspose2d(4, 5, 2)), free=("a", "b")),
    "used twice": Case(after(lambda m, x: m.b(F.relu(m.b(x))), b=lambda: conv(4, 4)), tied=pairs("a", "b"), free=("a", "b")),
    "norm used twice": Case(
        after(lambda m, x: m.n(x) + m.b(m.n(x)), b=lambda: conv(4, 4), n=lambda: nn.BatchNorm2d(4)),
        tied=pairs("a", "b"),
        free=("a",),
        follows=("n.running_var",),
    ),
    "tied weights on the image": Case(Twins, whole={"a": "shared with a part of the network that is left whole"}),
    "tied weights": Case(
        lambda: Net(lambda m, x: m.end(m.t.b(F.relu(m.t.a(m.p(x))))), p=conv(3, 3), t=Twins(), end=end(3)),
        tied=pairs("p", "t.a", width=3),
        free=("p",),
        whole={},
    ),
    "squeeze and excite": Case(
        after(
            lambda m, x: x * torch.sigmoid(m.u(F.relu(m.d(x.mean((2, 3))))))[:, :, None, None],
            d=lambda: nn.Linear(4, 3),
            u=lambda: nn.Linear(3, 4),
        ),
        tied=pairs("a", "u"),
        free=("a", "d", "u"),
    ),
    "frozen batch norm": Case(
        after(lambda m, x: m.n(x), n=lambda: FrozenBatchNorm2d(4)), free=("a",), follows=("n.weight", "n.running_var")
    ),
    "instance norm": Case(after(lambda m, x: m.n(x), n=lambda: nn.InstanceNorm2d(4)), free=("a",)),
    "instance norm with a scale": Case(
        after(lambda m, x: m.n(x), n=lambda: nn.InstanceNorm2d(4, affine=True)), free=("a",), follows=("n.weight", "n.bias")
    ),
    "bare scale": Case(
        after(
            lambda m, x: x * m.g[:, None, None] + m.h.view(1, -1, 1, 1),
            g=lambda: nn.Parameter(torch.rand(4)),
            h=lambda: nn.Parameter(torch.rand(4)),
        ),
        free=("a",),
        follows=("g", "h"),
    ),
    "layer scale": Case(
        after(lambda m, x: x + m.g * m.b(x), b=lambda: conv(4, 4), g=lambda: nn.Parameter(torch.rand(1, 4, 1, 1))),
        tied=pairs("a", "b"),
        free=("a",),
        follows=("g",),
    ),
    "buffer mask": Case(after(lambda m, x: x * m.g, g=lambda: torch.rand(4, 1, 1)), free=("a",), follows=("g",)),
    "scalar scale": Case(after(lambda m, x: x * m.g, g=lambda: nn.Parameter(torch.rand(1))), free=("a",)),
    "constant scale": Case(
        after(lambda m, x: x * torch.arange(1.0, 5).view(4, 1, 1)), whole={"a": r"fixed size in the forward \(mul"}
    ),
    "softmax over channels": Case(
        after(lambda m, x: m.s(x), s=lambda: nn.Softmax(1)), whole={"a": "_softmax in 's' is not known"}
    ),
    "softmax over positions": Case(after(lambda m, x: x.softmax(2)), free=("a",)),
    "mean over channels": Case(after(lambda m, x: x - x.mean(1, keepdim=True)), whole={"a": "mean in the forward is not known"}),
    "layer norm": Case(
        after(lambda m, x: m.n(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), n=lambda: nn.LayerNorm(4)),
        whole={"a": "'n' normalises over all channels at once"},
    ),
    "group norm": Case(
        after(lambda m, x: m.n(x), n=lambda: nn.GroupNorm(2, 4)),
        tied=[[("a", 0), ("a", 1)], [("a", 2), ("a", 3)]],
    ),
    "group norm over all": Case(
        after(lambda m, x: m.n(x), n=lambda: nn.GroupNorm(1, 4)), whole={"a": "'n' normalises over all channels at once"}
    ),
    "group norm without a scale": Case(
        after(lambda m, x: m.n(x), n=lambda: nn.GroupNorm(2, 4, affine=False)),
        whole={"a": "native_group_norm in 'n' is not known"},
    ),
    "attention": Case(
        lambda: Net(attend, q=conv(3, 4, 1), k=conv(3, 4, 1), v=conv(3, 4, 1), end=end(4)),
        whole={"q": "bmm in the forward", "k": "bmm in the forward", "v": "bmm in the forward"},
    ),
    "attention module": Case(
        lambda: Net(
            lambda m, x: m.end(m.t(h := m.a(x), h, h)[0]), a=nn.Linear(6, 4), t=nn.MultiheadAttention(4, 2), end=nn.Linear(4, 2)
        ),
        whole={"a": "'t'", "t.in_proj_weight": "'t'"},
        shape=(2, 5, 6),
        zeroing=False,
    ),
    "recurrent": Case(
        lambda: Net(lambda m, x: m.end(m.t(m.a(x))[0]), a=nn.Linear(6, 4), t=nn.GRU(4, 5), end=nn.Linear(5, 2)),
        whole={"a": r"'t' \(GRU\) checks its sizes"},
        shape=(2, 5, 6),
    ),
    "channel shuffle": Case(
        after(lambda m, x: x.view(len(x), 2, -1, 6, 6).transpose(1, 2).reshape(len(x), -1, 6, 6)),
        tied=[[("a", 0), ("a", 2)], [("a", 1), ("a", 3)]],
    ),
    "channel shuffle of a fixed width": Case(
        after(lambda m, x: x.view(-1, 2, 2, 6, 6).transpose(1, 2).reshape(-1, 4, 6, 6)),
        whole={"a": "the forward splits the channels"},
    ),
    "channel shuffle module": Case(
        after(lambda m, x: m.s(x), s=lambda: nn.ChannelShuffle(2)), tied=[[("a", 0), ("a", 2)], [("a", 1), ("a", 3)]]
    ),
    "pixel shuffle": Case(
        after(lambda m, x: m.b(m.s(x)), b=lambda: conv(1, 4), s=lambda: nn.PixelShuffle(2)), tied=[[("a", i) for i in range(4)]]
    ),
    "pixels made channels": Case(after(lambda m, x: m.s(x[..., :6, :6]), 16, s=lambda: nn.PixelUnshuffle(2)), free=("a",)),
    "chunk": Case(after(lambda m, x: torch.mul(*x.chunk(2, 1)), 2), tied=[[("a", 0), ("a", 2)], [("a", 1), ("a", 3)]]),
    "halves by their size": Case(
        after(lambda m, x: torch.cat([x[:, x.shape[1] // 2 :], x[:, : x.shape[1] // 2]], 1)),
        tied=[[("a", 0), ("a", 2)], [("a", 1), ("a", 3)]],
    ),
    "split by a number": Case(
        after(lambda m, x: torch.mul(*x.split(2, 1)), 2), whole={"a": r"picks channels by their position \(split"}
    ),
    "one split by its size and one by a number": Case(
        after(lambda m, x: torch.cat([torch.mul(*x.chunk(2, 1)), torch.mul(*m.b(x).split(2, 1))], 1), b=lambda: conv(4, 4)),
        tied=[[("a", 0), ("a", 2)], [("a", 1), ("a", 3)]],
        whole={"b": r"picks channels by their position \(split"},
    ),
    "gated linear unit": Case(after(lambda m, x: F.glu(x, 1), 2), tied=[[("a", 0), ("a", 2)], [("a", 1), ("a", 3)]]),
    "pool to one position, channels last": Case(
        after(lambda m, x: x * F.adaptive_avg_pool2d(x.contiguous(memory_format=torch.channels_last), 1)), free=("a",)
    ),
    "roll": Case(after(lambda m, x: x.roll(1, 1)), whole={"a": r"by their position \(roll"}),
    "crop of channels": Case(
        after(lambda m, x: F.pad(x, (0, 0, 0, 0, -1, 0)), 3), whole={"a": "crops channels by their position"}
    ),
    "gather": Case(
        after(lambda m, x: x.gather(3, torch.zeros(len(x), 3, 6, 6, dtype=torch.long)), 3), whole={"a": r"position \(gather"}
    ),
    "index": Case(after(lambda m, x: x[:, [3, 0, 1, 2]]), whole={"a": r"position \(index"}),
    "flip": Case(after(lambda m, x: x.flip(1)), free=("a",)),
    "slice of everything": Case(after(lambda m, x: x[:, :4, 1:]), free=("a",)),
    "repeat": Case(after(lambda m, x: x.repeat(1, 2, 1, 1), 8), free=("a",)),
    "zeros of the same shape": Case(after(lambda m, x: torch.cat([torch.zeros_like(x), x], 1), 8), free=("a",)),
    "joined along the height": Case(
        after(lambda m, x: torch.cat([x, m.b(x)], 2), b=lambda: conv(4, 4)), tied=pairs("a", "b"), free=("a",)
    ),
    "joined in the batch": Case(
        after(lambda m, x: sum(m.d(torch.cat([x, m.b(x)])).chunk(2)), b=lambda: conv(4, 4), d=lambda: conv(4, 4)),
        tied=pairs("a", "b"),
        free=("a", "d"),
    ),
    "joined with something fixed": Case(
        after(lambda m, x: torch.cat([x, x.new_ones(len(x), 4, 1, 6)], 2)), whole={"a": "fixed size"}
    ),
    "stacked": Case(
        after(lambda m, x: torch.stack([x, m.b(x)], 1).amax(1), b=lambda: conv(4, 4)), tied=pairs("a", "b"), free=("a", "b")
    ),
    "unpooled": Case(
        after(
            lambda m, x: (lambda y, places: F.max_unpool2d(m.b(y), places, 2))(*F.max_pool2d(x, 2, return_indices=True)),
            b=lambda: conv(4, 4),
        ),
        tied=pairs("a", "b"),
        free=("a", "b"),
    ),
    "weight norm": Case(
        after(lambda m, x: m.b(x), b=lambda: parametrizations.weight_norm(conv(4, 4))),
        whole={"a": r"weight of convolution in 'b' is computed", "b": r"weight of convolution in 'b' is computed"},
    ),
    "weight norm by hook": Case(
        after(lambda m, x: m.b(x), b=lambda: weight_norm_by_hook(conv(4, 4))), whole={"a": "in 'b' is computed"}, zeroing=False
    ),
    "spectral norm": Case(
        after(lambda m, x: m.b(x), b=lambda: parametrizations.spectral_norm(conv(4, 4))),
        whole={"b": r"'b\.parametrizations\.weight\.0' reshapes a parameter"},
    ),
    "orthogonal": Case(
        after(lambda m, x: m.b(x), b=lambda: parametrizations.orthogonal(conv(4, 4))), whole={"a": "in 'b' is computed"}
    ),
    "pruned by masks": Case(
        after(lambda m, x: m.b(x), b=lambda: prune.random_unstructured(conv(4, 4), "weight", 0.3)),
        whole={"a": "in 'b' is computed", "b": "in 'b' is computed"},
        zeroing=False,
    ),
    "masked weight": Case(
        after(lambda m, x: m.b(x), b=lambda: parametrize.register_parametrization(conv(4, 4), "weight", Masked((4, 4, 3, 3)))),
        free=("a", "b"),
        follows=("b.parametrizations.weight.0.mask", "b.parametrizations.weight.original"),
    ),
    "spatial mask": Case(
        after(lambda m, x: x * torch.sigmoid(m.b(x)), b=lambda: conv(4, 1)),
        free=("a",),
        whole={"b": "one channel is applied to many"},
    ),
    "spatial mask expanded": Case(
        after(lambda m, x: x * m.b(x).expand_as(x), b=lambda: conv(4, 1)), free=("a",), whole={"b": "applied to many"}
    ),
    "spatial mask copied": Case(
        after(lambda m, x: x * torch.cat([m.b(x)] * 4, 1), b=lambda: conv(4, 1)), whole={"a": "fixed size", "b": "to many"}
    ),
    "in place": Case(
        after(lambda m, x: m.b(F.relu_(x)).add_(x).mul_(2), b=lambda: conv(4, 4)), tied=pairs("a", "b"), free=("a", "b")
    ),
    "written to positions": Case(
        after(lambda m, x: write(x, m.b(x)[:, :, 0], slice(None), slice(None), 0), b=lambda: conv(4, 4)),
        tied=pairs("a", "b"),
        free=("a", "b"),
    ),
    "written to channels": Case(after(lambda m, x: write(x, 0, slice(None), 1)), whole={"a": r"by their position \(select"}),
    "a channel picked from the last dimension": Case(
        after(lambda m, x: x * x.mean((2, 3))[:, 1].view(-1, 1, 1, 1)), whole={"a": r"by their position \(select"}
    ),
    "written into zeros": Case(
        after(lambda m, x: write(x.new_zeros(len(x), 6, 6, 6), x, slice(None), slice(1, 5)), 6),
        whole={"a": r"fixed size in the forward \(copy_"},
    ),
    "padding before a convolution": Case(after(lambda m, x: F.pad(x, (1, 1, 2, 0), value=3.0)), free=("a",)),
    "padding modes": Case(
        after(
            lambda m, x: m.d(m.b(x)), b=lambda: conv(4, 4, padding_mode="reflect"), d=lambda: conv(4, 4, padding_mode="replicate")
        ),
        free=("a", "b", "d"),
    ),
    "padded channels": Case(after(lambda m, x: F.pad(x, (0, 0, 0, 0, 1, 2)), 7), free=("a",)),
    "image added": Case(
        lambda: Net(lambda m, x: m.end(m.a(x) + x), a=conv(3, 3), end=end(3)), whole={"a": "fixed size in the forward"}
    ),
    "image joined": Case(lambda: Net(lambda m, x: m.end(torch.cat([x, m.a(x)], 1)), a=conv(3, 4), end=end(7)), free=("a",)),
    "depthwise on the image": Case(
        lambda: Net(lambda m, x: m.end(m.n(m.k(m.n(m.d(x))))), d=conv(3, 3, groups=3), k=conv(3, 3), n=nn.PReLU(3), end=end(3)),
        whole={"d": "come from the network's input", "k": "fixed size"},
    ),
    "custom operation": Case(
        after(lambda m, x: torch.ops.lit_compress_tests.swap_halves(x)), whole={"a": "swap_halves in the forward"}
    ),
    "operation of another library": Case(
        after(lambda m, x: deform_conv2d(x, x.new_zeros(len(x), 18, 4, 4), m.b.weight), b=lambda: nn.Conv2d(4, 4, 3)),
        whole={"a": "deform_conv2d in the forward"},
        zeroing=False,
    ),
    "tuple of outputs": Case(
        lambda: Net(lambda m, x: (m.end(y := m.a(m.b(x))), [y]), b=conv(3, 4), a=conv(4, 4), end=end(4)),
        free=("b",),
        whole={"a": OUTPUT, "end": OUTPUT},
    ),
    "dict of outputs": Case(
        lambda: Net(lambda m, x: {"y": m.end(m.a(x)), "x": x}, a=conv(3, 4), end=end(4)), free=("a",), whole={"end": OUTPUT}
    ),
    "output in an object": Case(
        lambda: Net(lambda m, x: SimpleNamespace(y=[m.end(m.a(x))]), a=conv(3, 4), end=end(4)),
        free=("a",),
        whole={"end": OUTPUT},
        zeroing=False,
    ),
    "output in a distribution": Case(
        lambda: Net(
            lambda m, x: torch.distributions.Bernoulli(logits=m.end(m.a(x)), validate_args=False), a=conv(3, 4), end=end(4)
        ),
        free=("a",),
        whole={"end": OUTPUT},
        zeroing=False,
    ),
    "parameter as an output": Case(
        lambda: Net(lambda m, x: (m.end(m.a(x) * m.g), m.g), a=conv(3, 4), g=nn.Parameter(torch.rand(4, 1, 1)), end=end(4)),
        whole={"a": "output|fixed size"},
    ),
    "tokens": Case(
        after(
            lambda m, x: (m.b(x.flatten(2).transpose(1, 2) + m.g)).transpose(1, 2).reshape(len(x), -1, 6, 6),
            5,
            b=lambda: nn.Linear(4, 5),
            g=lambda: nn.Parameter(torch.randn(1, 36, 4)),
        ),
        free=("a", "b"),
        follows=("g",),
    ),
    "blur by a buffer": Case(
        after(lambda m, x: F.conv2d(x, m.g, groups=x.shape[1]), g=lambda: torch.rand(4, 1, 3, 3)), free=("a",), follows=("g",)
    ),
    "blur by one kernel": Case(
        after(lambda m, x: F.conv2d(x, m.g.expand(4, 1, 3, 3), groups=4), g=lambda: torch.rand(1, 1, 3, 3)),
        whole={"a": "is computed from other tensors"},
    ),
    "residual in addmm": Case(
        lambda: Net(
            lambda m, x: m.end(torch.addmm(y := m.a(x), y, m.b.weight.t())),
            a=nn.Linear(6, 4),
            b=nn.Linear(4, 4),
            end=nn.Linear(4, 2),
        ),
        whole={"a": "bias of the forward is computed", "b": "bias of the forward is computed"},
        shape=(2, 6),
        zeroing=False,
    ),
    "product of weights": Case(
        lambda: Net(
            lambda m, x: m.end(F.linear(m.a(x), m.u @ m.v)),
            a=nn.Linear(6, 4),
            u=nn.Parameter(torch.randn(5, 3)),
            v=nn.Parameter(torch.randn(3, 4)),
            end=nn.Linear(5, 2),
        ),
        whole={"a": "mm in the forward"},
        shape=(2, 6),
        zeroing=False,
    ),
    "low rank": Case(
        lambda: Net(
            lambda m, x: m.end(m.a(x) + x @ m.u @ m.v),
            a=nn.Linear(6, 4),
            u=nn.Parameter(torch.randn(6, 3)),
            v=nn.Parameter(torch.randn(3, 4)),
            end=nn.Linear(4, 2),
        ),
        tied=pairs("a", "v"),
        free=("a", "u"),
        shape=(2, 6),
        zeroing=False,
    ),
    "tied autoencoder": Case(
        lambda: Net(lambda m, x: m.end(F.relu(F.linear(F.relu(m.a(x)), m.a.weight.t()))), a=nn.Linear(6, 4), end=nn.Linear(6, 2)),
        free=("a",),
        shape=(2, 6),
        zeroing=False,
    ),
    "embedding": Case(
        lambda: Net(lambda m, x: m.end(F.relu(m.a(m.e(x)))), e=nn.Embedding(6, 4), a=nn.Linear(4, 5), end=nn.Linear(5, 2)),
        free=("a",),
        shape=(2, 3),
    ),
    "nothing selected": Case(
        lambda: Net(
            lambda m, x: (m.end(y := m.a(x)), torch.stack(m.b(y[x.amax((1, 2, 3)) > 1e9]).unbind(1), 1)),
            a=conv(3, 4),
            b=conv(4, 5),
            end=end(4),
        ),
        whole={"a": "gives an empty tensor on the example inputs", "b": "convolution in 'b' gives an empty tensor"},
        zeroing=False,
    ),
    "one dimension": Case(
        lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.MaxPool1d(2), nn.Conv1d(4, 5, 1), nn.AvgPool1d(2), nn.Conv1d(5, 2, 1)),
        free=("0", "2"),
        shape=(2, 3, 10),
    ),
    "three dimensions": Case(
        lambda: nn.Sequential(nn.Conv3d(3, 4, 2), nn.BatchNorm3d(4), nn.AvgPool3d(2), nn.Conv3d(4, 2, 1)),
        free=("0",),
        shape=(2, 3, 5, 5, 5),
    ),
}


def writes_its_statistics_in_evaluation(norm):
    """As older versions of torch do, in which a layer before such a norm stays whole."""
    before = norm.running_mean._version
    norm.eval()(torch.rand(2, 4, 3, 3))
    return norm.running_mean._version > before


if not writes_its_statistics_in_evaluation(nn.InstanceNorm2d(4, track_running_stats=True)):
    CASES["instance norm with statistics"] = Case(
        after(lambda m, x: m.n(x), n=lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True)),
        free=("a",),
        follows=("n.weight", "n.running_mean"),
    )

case_by_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def built(case):
    torch.manual_seed(0)
    model = randomized(case.build()).double()
    x = torch.randint(6, case.shape) if hasattr(model, "e") else torch.randn(case.shape, dtype=torch.float64)
    return model, x


def classes(graph):
    return {name: layer.classes.tolist() for name, layer in graph.layers.items()}


@case_by_case
def test_what_is_tied_and_what_stays(case):
    model, x = built(case)
    graph = trace(model, lambda: model(x))
    found = classes(graph)
    for channels in case.tied:
        assert len({found[layer][channel] for layer, channel in channels}) == 1, channels
    # Nothing else is tied: as many classes as the hand-written ties leave.
    listed = {layer for channels in case.tied for layer, _ in channels}
    if listed:
        together = len(case.tied) + sum(len(found[layer]) for layer in listed) - sum(map(len, case.tied))
        assert len({c for layer in listed for c in found[layer]}) == together
    for layer in case.free:
        assert graph.why_whole(layer) == ""
        assert len(set(found[layer])) == len(found[layer])
    cuttable = {name for group in graph.groups() for name in group.members}
    assert cuttable.issuperset(case.free)
    for layer in case.whole:
        assert layer in graph.refused or any(c in graph.frozen or c == -1 for c in found[layer])
    assert {name.partition(".")[0] for name in graph.layers} <= {
        name.partition(".")[0] for name, _ in model.named_parameters()
    } | {"g"}


@case_by_case
def test_what_stays_is_refused_with_its_reason(case):
    model, x = built(case)
    graph = trace(model, lambda: model(x))
    for layer, why in case.whole.items():
        assert re.search(why, graph.refused.get(layer) or graph.why_whole(layer))
        width = len(graph.layers[layer].classes) if layer in graph.layers else 4
        if width > 1:
            with pytest.raises(ValueError, match=why) as refusal:
                cut(model, Recipe(keep={layer: range(1, width)}), x, verify=False)  # the graph alone knows
            assert repr(layer) in str(refusal.value)


@case_by_case
@pytest.mark.parametrize("seed", range(3))
def test_random_cuts_are_exact(case, seed):
    model, x = built(case)
    groups = trace(model, lambda: model(x)).groups()
    recipe = random_recipe(groups, seed, share=0.6)
    if not recipe.keep:
        assert not any(len(group.classes) > 1 for group in groups)
        assert not case.free
        return
    uncut = copy.deepcopy(model)
    plan = cut(model, recipe, x)  # checks itself
    assert plan.recipe.keep
    if case.zeroing:
        with torch.no_grad():
            found = clone(model.eval()(x))
        # float64 leaves about 1e-15 a sum; wrong channels give errors of order 1.
        assert relative_error(found, zeroed(uncut, removed_by(plan), lambda network: network(x))) < 1e-10


@pytest.mark.parametrize(
    "case", [case for case in CASES.values() if case.follows], ids=[n for n, c in CASES.items() if c.follows]
)
def test_everything_that_runs_along_a_channel_follows(case):
    model, x = built(case)
    widths = {name: len(found) for name, found in classes(trace(model, lambda: model(x))).items()}
    before = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    sizes = {name: before[name].numel() for name in case.follows}
    cut(model, Recipe(keep={layer: range(1, widths[layer]) for layer in case.free}), x)
    for name, size in sizes.items():
        assert before[name].numel() < size, name


def test_resnet56_ties_the_stem_to_the_middle_of_the_wider_stages():
    model = ResNetCIFAR(depth=56)
    graph = trace(model, lambda: model(torch.zeros(1, 3, 16, 16)))
    stem, second, third = (graph.layers[name].classes for name in ("conv1", "stage2.3.conv2", "stage3.8.conv2"))
    assert stem.tolist() == second[8:24].tolist() == third[24:40].tolist()
    assert second.tolist() == third[16:48].tolist()
    assert not set(stem) & set(graph.frozen)
    # Of the second stage's channels, those that meet zeros on the way in stay.
    assert set(graph.frozen) >= {*second[:8], *second[24:], *third[:16], *third[48:]}
    assert "zero padding" in graph.why_whole("stage2.0.conv2")
    inner = [f"stage{stage}.{block}.conv1" for stage in (1, 2, 3) for block in range(9)]
    assert [group.name for group in graph.groups()] == ["conv1", *inner]


@case_by_case
def test_the_number_of_samples_makes_no_difference(case):
    model, x = built(case)
    more, fewer = (trace(model, lambda batch=batch: model(batch)) for batch in (torch.cat([x, x])[:3], x))
    assert {name: ties(more)[name] for name in more.layers} == {name: ties(fewer)[name] for name in fewer.layers}
    assert [more.why_whole(name) == "" for name in more.layers] == [fewer.why_whole(name) == "" for name in fewer.layers]


def ties(graph):
    """For each channel of each layer, the first channel that it is tied to."""
    first = {}
    for name, found in classes(graph).items():
        for index, channel_class in enumerate(found):
            first.setdefault(channel_class, (name, index))
    return {name: [first[channel_class] for channel_class in found] for name, found in classes(graph).items()}


def test_groups_are_the_channels_that_share_their_layers():
    case = CASES["concatenation added"]
    model, x = built(case)
    graph = trace(model, lambda: model(x))
    first, second = graph.groups()
    assert {name: v.tolist() for name, v in first.members.items()} == {"a": [0, 1, 2, 3], "d": [0, 1, 2, 3, -1, -1, -1]}
    assert {name: v.tolist() for name, v in second.members.items()} == {"d": [-1, -1, -1, -1, 0, 1, 2], "b": [0, 1, 2]}
    assert (first.name, second.name) == ("a", "d")  # in the order of the forward, in which `d` runs before `b`


def test_each_use_of_a_weight_is_counted():
    model = Net(
        lambda m, x: m.b(m.a(x) + m.a(x.flip(3))).flatten(1), a=nn.Conv2d(3, 3, 3), b=nn.ConvTranspose2d(3, 2, 2, stride=2)
    )
    uses = trace(model, lambda: model(torch.zeros(2, 3, 6, 5))).uses
    assert [use.weight for use in uses] == ["a.weight", "a.weight", "b.weight"]
    assert [use.positions for use in uses] == [2 * 4 * 3, 2 * 4 * 3, 2 * 4 * 3]  # a transposed one reads its input's positions


def test_what_the_forward_does_not_run_is_named():
    model = Net(
        lambda m, x: m.end(m.a(x)), a=conv(3, 4), end=end(4), aux=nn.Sequential(nn.Linear(4, 2)), own=nn.Parameter(torch.ones(1))
    )
    assert trace(model, lambda: model(torch.zeros(1, *IMAGES[1:]))).unused == ("aux.0",)
    with pytest.raises(ValueError, match=r"Layer 'aux\.0' cannot be cut: the forward does not run it"):
        cut(model, Recipe(keep={"aux.0": (0,)}), torch.zeros(1, *IMAGES[1:]))


class Auxiliary(nn.Module):
    """A head that only training runs; with ``targets``, its training goes on to what the example inputs lack."""

    def __init__(self, targets=False):
        super().__init__()
        self.a, self.end, self.targets = conv(3, 4), end(4), targets
        self.aux = nn.Sequential(conv(4, 5), nn.ReLU(), conv(5, 2))
        self.late = conv(4, 2)

    def forward(self, x):
        y = self.a(x)
        if not self.training:
            return self.end(y)
        z = self.aux(y)
        if self.targets:
            raise RuntimeError("targets are missing")
        return self.end(y), z + self.late(y)


def test_what_only_training_runs_is_cut_as_well_and_proven():
    model = randomized(Auxiliary()).double()
    x = torch.randn(IMAGES, dtype=torch.float64)
    uncut = copy.deepcopy(model)
    graph = trace(model, lambda: model(x))
    assert graph.trained == ("",)
    assert graph.unused == ()
    assert {use.weight: use.positions > 0 for use in graph.uses} == {
        "a.weight": True, "end.weight": True, "aux.0.weight": False, "aux.2.weight": False, "late.weight": False
    }  # fmt: skip
    assert [group.name for group in graph.groups()] == ["a", "aux.0"]
    assert graph.why_whole("aux.2") == graph.why_whole("late") == OUTPUT
    plan = cut(model, Recipe(keep={"a": (0, 3), "aux.0": (1, 2, 4)}), x)
    assert model.training

    def in_training(network):
        network.training = True  # nothing in it has a mode of its own
        return network(x)

    with torch.no_grad():
        assert relative_error(clone(in_training(model)), zeroed(uncut, removed_by(plan), in_training)) < 1e-10


def test_what_training_runs_before_it_fails_on_the_example_inputs_is_cut_on_its_input_side_alone():
    model = randomized(Auxiliary(targets=True))
    graph = trace(model, lambda: model(torch.zeros(IMAGES)))
    assert graph.trained == ()
    assert graph.unused == ("late",)
    assert [group.name for group in graph.groups()] == ["a"]
    assert graph.why_whole("aux.0") == "the forward of Auxiliary runs it in training mode only, and fails there"
    cut(model, Recipe(keep={"a": (0, 3)}), torch.zeros(IMAGES))
    assert model.aux[0].in_channels == 2


def test_a_second_run_in_training_mode_leaves_counts_and_sums_alone():
    def run(m, x):
        y = m.a(x) + m.b(x)
        return (m.end(y), m.aux(y)) if m.training else m.end(y)

    model = Net(run, a=conv(3, 4), b=conv(3, 4), aux=end(4), end=end(4))
    graph = trace(model, lambda: model(torch.zeros(IMAGES)))
    model.aux = nn.Identity()
    without = trace(model, lambda: model(torch.zeros(IMAGES)))
    assert len(graph.sums) == len(without.sums) == 1
    assert graph.mult_adds(graph.shapes) == without.mult_adds(without.shapes)


def test_a_layer_by_its_second_name_is_told_its_first():
    model = Twins()
    with pytest.raises(ValueError, match=r"Layer 'b' cannot be cut: its weight is that of layer 'a'; name that one"):
        cut(model, Recipe(keep={"b": (0,)}), torch.zeros(IMAGES))


def test_the_output_stays_also_where_the_caller_drops_it():
    model = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 5))

    def loss_only(network, x):
        network(x)

    with pytest.raises(ValueError, match=f"Channel 0 of layer '2' cannot be removed: {OUTPUT}"):
        cut(model, Recipe(keep={"2": (1,)}), torch.zeros(IMAGES), forward_fn=loss_only)


def test_a_weight_of_the_network_itself_is_a_layer_without_a_name():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.end = nn.Parameter(torch.randn(2, 3)), nn.Linear(2, 2)

        def forward(self, x):
            return self.end(torch.tanh(F.linear(x, self.weight))) / max(len(self.weight), 1)

    model, x = Bare(), torch.rand(2, 3)
    assert list(trace(model, lambda: model(x)).layers) == ["", "end"]
    # Its two channels are not taken for the two outputs, which the size of the weight changes here.
    with pytest.raises(ValueError, match="not exact: the output of the network differs"):
        cut(model, Recipe(keep={"": (1,)}), x)


def test_reasons_name_the_right_module_after_one_that_failed_and_was_caught():
    def run(m, x):
        with contextlib.suppress(RuntimeError):
            m.b(x)
        return m.end(m.s(m.a(x)))

    model = Net(run, a=conv(3, 4), b=nn.Sequential(conv(7, 4)), s=nn.Sequential(nn.Softmax(1)), end=end(4))
    graph = trace(model, lambda: model(torch.zeros(IMAGES)))
    assert graph.why_whole("a") == "_softmax in 's.0' is not known to keep channels apart"


def test_a_forward_that_fails_is_told_where():
    model = nn.Sequential(conv(3, 4), nn.Sequential(nn.ReLU(), conv(5, 2)))
    with pytest.raises(
        ValueError, match=r"Sequential does not run on the example inputs; it failed in '1\.1': .*5 channels"
    ) as failure:
        trace(model, lambda: model(torch.zeros(IMAGES)))
    assert isinstance(failure.value.__cause__, RuntimeError)


class Loop(nn.Module):
    """One layer many times over."""

    def __init__(self, steps):
        super().__init__()
        self.a, self.b, self.end, self.steps = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2), steps

    def forward(self, x):
        y = self.a(x)
        for _ in range(self.steps):
            y = torch.tanh(self.b(y)) + y
        return self.end(y)


def test_a_forward_that_is_too_long_to_follow_is_refused(monkeypatch):
    model, x = Loop(50), torch.zeros(1, 3)
    assert [group.name for group in trace(model, lambda: model(x)).groups()] == ["a"]
    monkeypatch.setattr(tracing, "_MOST_OPERATIONS", 100)
    with pytest.raises(ValueError, match="Loop cannot be followed: more than 100 operations act on channels; trace a shorter"):
        trace(model, lambda: model(x))


def test_labels_that_take_too_much_memory_are_refused(monkeypatch):
    model = nn.Sequential(conv(3, 4), nn.Flatten(), nn.ReLU(), nn.Linear(144, 2))
    trace(model, lambda: model(torch.zeros(IMAGES)))
    monkeypatch.setattr(tracing, "_MOST_BYTES", 1000)
    with pytest.raises(ValueError, match=r"Sequential cannot be followed: .* of shape \(2, 144\) .* smaller example inputs"):
        trace(model, lambda: model(torch.zeros(IMAGES)))


def test_the_number_of_operations_counts_linearly():
    # Each sum once looked through all ties before it; 1000 steps took 50 times what 100 take.
    operations = []
    for steps in (100, 1000):
        model, x = Loop(steps), torch.zeros(1, 3)
        start = time.process_time()
        trace(model, lambda model=model, x=x: model(x))
        operations.append(time.process_time() - start)
    assert operations[1] < 25 * operations[0]


def test_networks_without_values_or_layers_are_refused():
    with pytest.raises(ValueError, match=r"Parameter '0\.weight' has no shape yet; run the network once"):
        trace(lazy := nn.Sequential(nn.LazyLinear(2)), lambda: lazy(torch.zeros(1, 2)))
    with pytest.raises(ValueError, match=r"Parameter '0\.weight' is on the meta device and has no values"):
        trace(meta := nn.Sequential(nn.Linear(2, 2, device="meta")), lambda: meta(torch.zeros(1, 2, device="meta")))
    with pytest.raises(ValueError, match="ran no convolution or linear layer of ReLU"):
        trace(relu := nn.ReLU(), lambda: relu(torch.zeros(1, 2)))
    other = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="ran no convolution or linear layer of Linear"):
        trace(nn.Linear(2, 2), lambda: other(torch.zeros(1, 2)))


class Counting(nn.Module):
    """Counts in two buffers, the second of which it replaces, and merges something when it is switched to evaluation."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(4))
        self.merged = False

    def train(self, mode=True):
        self.merged |= not mode
        return super().train(mode)

    def forward(self, x):
        self.calls += 1
        self.mean = self.mean + x.mean((0, 2, 3))
        return x


def test_tracing_leaves_no_trace():
    model = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), Counting(), nn.Dropout(), end(4))
    model.train()
    model[1].eval()
    # A batch norm that updates its statistics whatever the mode.
    model[1].forward = lambda x: F.batch_norm(x, model[1].running_mean, model[1].running_var, training=True)
    modes = [module.training for module in model.modules()]
    tensors = {name: (id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    random_state = torch.get_rng_state()
    trace(model, lambda: model(torch.rand(IMAGES)))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not model[2].merged
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert id(tensor) == tensors[name][0]
        assert torch.equal(tensor, tensors[name][1])


# ---------------------------------------------------------------- activations


class Functional(nn.Module):
    """The first activation is seen where the next layer takes it, the second by its module, which runs twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 5, 3), nn.Linear(5, 6)
        self.norm, self.unit, self.last = nn.BatchNorm2d(4), nn.Sigmoid(), nn.Linear(6, 2)

    def forward(self, images):
        maps = nn.functional.max_pool2d(nn.functional.relu(self.norm(self.first(images))), 2)
        return self.last(self.unit(self.third(self.unit(self.second(maps)).amax((2, 3)))))


def test_activations_are_found_where_hooks_see_them():
    torch.manual_seed(0)
    network = Functional()
    graph = trace(network, lambda: network(torch.rand(2, 1, 12, 12)))
    found = {group.name: graph.activation_of(group) for group in graph.groups()}
    assert {name: (point.function, point.dim, point.shape, point.tap) for name, point in found.items()} == {
        "first": ("relu", 1, (2, 4, 10, 10), None),  # the pool is a function, too
        "second": ("sigmoid", 1, (2, 5, 3, 3), Tap("unit", call=0)),
        "third": ("sigmoid", 1, (2, 6), Tap("last", "input")),
    }
    for name, point in found.items():
        assert point.channels.tolist() == graph.layers[name].classes.tolist()
    assert [len(found[name].pooled) for name in ("first", "second", "third")] == [4, 5, 0]


def test_tied_layers_have_no_activation_of_their_own():
    network = Tied()
    graph = trace(network, lambda: network(torch.rand(1, 3)))
    assert [graph.activation_of(group) for group in graph.groups()] == [None]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.out = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.out((self.one(x) + self.two(x)).relu())
