"""Mirrored decoders: against autograd, which transposes the same network by other means, and against loops over windows."""

from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torchvision.ops import FrozenBatchNorm2d, SqueezeExcitation, StochasticDepth

from lit_compress.detection import Autoencoders, MirroredDecoder, unpool
from lit_compress.detection.encoder import Window, follow
from lit_compress.detection.roi_autoencoder import END_TO_END, EncoderTaps


class Residual(nn.Module):
    """Two branches, one of which may be the identity."""

    def __init__(self, branch, skip=None):
        super().__init__()
        self.branch, self.skip = branch, nn.Identity() if skip is None else skip

    def forward(self, x):
        return self.branch(x) + self.skip(x)


class Calls(nn.Module):
    """Runs a function on a map."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def conv(first, last, *args, **options):
    return nn.Conv2d(first, last, *args, **options)


def between(network, size=(11, 14), channels=3, first="0", last=None):
    """Encoder, decoder, and the maps, of a Sequential from its first child's output to its last's."""
    last = str(len(network) - 1) if last is None else last
    inputs = torch.randn(2, channels, *size, dtype=next(network.parameters()).dtype)
    encoder = follow(network, [first, last], lambda: network(inputs))
    return encoder, MirroredDecoder(encoder, encoder.marks[first], encoder.marks[last], dropout=0.0), inputs


def give_weights(network, decoder):
    """The encoder's weights for those of the decoder that mirror them."""
    with torch.no_grad():
        for number, step in enumerate(decoder.steps):
            if step.kind == "convolution":
                decoder.layers[str(number)].weight.copy_(network.get_parameter(step.weight))


LINEAR = {
    "one": [conv(4, 6, 3, padding=1)],
    "a row": [conv(4, 6, 5), conv(6, 2, 3, padding=2)],
    "strides": [conv(4, 6, 3, stride=2, padding=1), conv(6, 5, (1, 3), stride=(3, 1))],
    "dilated": [conv(4, 6, 3, dilation=2, padding=1)],
    "groups": [conv(4, 8, 3, groups=2), conv(8, 8, 3, groups=8, stride=2), conv(8, 4, 1)],
    "a pool": [conv(4, 6, 3), nn.MaxPool2d(2), conv(6, 3, 2)],
    "a pool with padding": [nn.MaxPool2d(2, padding=1), conv(4, 3, 2)],
    "a pool rounded up": [conv(4, 6, 2), nn.MaxPool2d(2, ceil_mode=True)],
    "a skip": [Residual(nn.Sequential(conv(4, 5, 3, padding=1), conv(5, 4, 1)))],
    "a skip that is projected": [Residual(conv(4, 6, 3, 2, 1), conv(4, 6, 1, 2)), Residual(conv(6, 6, 1))],
    "a skip in place": [Calls(lambda x: x), Residual(conv(4, 4, 1)), conv(4, 4, 3)],
}


@pytest.mark.parametrize("size", [(11, 14), (16, 9)], ids=str)
@pytest.mark.parametrize("layers", LINEAR.values(), ids=LINEAR)
def test_with_the_encoders_own_weights_it_is_the_transpose(layers, size):
    network = nn.Sequential(conv(3, 4, 1), *layers).double()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.bias)
    encoder, decoder, inputs = between(network, size)
    autoencoders = Autoencoders(encoder, dropout=0.0).double()
    taps = EncoderTaps(network, autoencoders)
    for _ in range(2):  # the first time, copies are read, which are not on the way to the code
        with taps.reading() as reading:
            network(inputs)
    start, code = (reading.maps[name] for name in autoencoders.names)
    give_weights(network, decoder.double())
    direction = torch.randn_like(code)
    (expected,) = torch.autograd.grad(code, start, direction)
    torch.testing.assert_close(decoder(direction, start.shape[2:], reading.switches), expected)


def slow_unpool(x, pool):
    """Each window's maximum at its place, the mean where a place wins several windows; zeros elsewhere."""
    pooled, places = F.max_pool2d(x, *pool, return_indices=True)
    total, count = torch.zeros_like(x).flatten(2), torch.zeros_like(x).flatten(2)
    for image in range(x.shape[0]):
        for channel in range(x.shape[1]):
            for value, place in zip(pooled[image, channel].flatten(), places[image, channel].flatten(), strict=True):
                total[image, channel, place] += value
                count[image, channel, place] += 1
    return (total / count.clamp(min=1)).view_as(x)


@pytest.mark.parametrize("pool", [(2, 2), (3, 2, 1), (3, 3), (3, 1), (2, 2, 0, 1, True)], ids=str)
def test_switches_invert_max_pooling_where_the_maxima_were(pool):
    """With identity convolutions: a maximum comes back to where it was, and everything else is zero."""
    size, stride, padding, dilation, ceil = (*pool, *(0, 1, False)[len(pool) - 2 :])
    identity = [conv(4, 4, 3, padding=1, bias=False) for _ in range(2)]
    for one in identity:
        nn.init.dirac_(one.weight)
    network = nn.Sequential(
        conv(3, 4, 1), identity[0], nn.MaxPool2d(size, stride, padding, dilation, ceil_mode=ceil), identity[1]
    )
    encoder, _, inputs = between(network, (9, 12))
    autoencoders = Autoencoders(encoder, dropout=0.0)
    for parameter in autoencoders.parameters():
        nn.init.dirac_(parameter) if parameter.ndim == 4 else nn.init.zeros_(parameter)
    with EncoderTaps(network, autoencoders).reading() as reading:
        network(inputs)
    made = autoencoders(reading, autoencoders.terms)["3"]
    torch.testing.assert_close(made.made, slow_unpool(made.target, pool))
    won = made.made != 0
    torch.testing.assert_close(made.made[won], made.target[won])
    assert 0 < won.float().mean() < 1


def test_unpooling_is_pytorchs_own_where_windows_do_not_overlap():
    x = torch.randn(2, 3, 9, 11)
    pooled, switches = F.max_pool2d(x, 2, return_indices=True)
    expected = F.max_unpool2d(pooled, switches, 2, output_size=x.shape[2:])
    assert torch.equal(unpool(pooled, switches, (9, 11), overlaps=False), expected)
    assert torch.equal(unpool(pooled, switches, (9, 11), overlaps=True), expected)
    with pytest.raises(ValueError, match="Expected switches of shape"):
        unpool(pooled, switches[:1], (9, 11), overlaps=False)


@given(
    size=st.tuples(st.integers(7, 40), st.integers(7, 40)), kernel=st.integers(1, 4), stride=st.integers(1, 4),
    padding=st.integers(0, 2), dilation=st.integers(1, 2), ceil=st.booleans(),
)  # fmt: skip
def test_sizes_are_those_that_pytorch_gives(size, kernel, stride, padding, dilation, ceil):
    window = Window((stride,) * 2, (padding,) * 2, (dilation,) * 2, kernel=(kernel,) * 2)
    x = torch.zeros(1, 1, *size)
    assert window.size_after(size) == tuple(
        F.conv2d(x, torch.zeros(1, 1, kernel, kernel), None, stride, padding, dilation).shape[2:]
    )
    padding = min(padding, kernel // 2)
    window = Window((stride,) * 2, (padding,) * 2, (dilation,) * 2, kernel=(kernel,) * 2, ceil=ceil)
    assert window.size_after(size) == tuple(F.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode=ceil).shape[2:])


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm2d(4), FrozenBatchNorm2d(4), nn.GroupNorm(2, 4), nn.Dropout(), nn.Dropout2d(),
        nn.Identity(), SqueezeExcitation(4, 2), StochasticDepth(0.5, "row"), Calls(lambda x: 2 * x + 1),
        Calls(lambda x: x.half().float()),
    ],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
def test_norms_dropout_and_scales_leave_no_trace(layer):
    _, decoder, _ = between(nn.Sequential(conv(3, 4, 3), layer, conv(4, 5, 3)))
    assert [step.kind for step in decoder.steps] == ["convolution"]


@pytest.mark.parametrize(
    "activation",
    [
        nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.Hardswish(inplace=True), nn.SiLU(), nn.GELU(), nn.LeakyReLU(), nn.ELU(),
        nn.Sigmoid(), nn.Tanh(), nn.PReLU(), nn.Mish(), nn.Softplus(),
    ],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
def test_activations_become_prelus_with_a_slope_a_channel(activation):
    _, decoder, _ = between(nn.Sequential(conv(3, 4, 3), conv(4, 6, 3), activation, conv(6, 5, 3)))
    (prelu,) = (layer for layer in decoder.layers.values() if isinstance(layer, nn.PReLU))
    assert prelu.weight.tolist() == [0.25] * 6


def test_average_pooling_repeats_its_values():
    _, decoder, _ = between(nn.Sequential(conv(3, 4, 1), nn.AvgPool2d(2)), (4, 6))
    code = torch.randn(2, 4, 2, 3)
    expected = code.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(decoder(code, (4, 6), {}), expected)


REFUSED = {
    "cat": (Calls(lambda x: torch.cat([x, x], 1)), 8),
    "max_pool2d as a function": (Calls(lambda x: F.max_pool2d(x, 2)), 4),
    "upsample_nearest2d": (nn.Upsample(scale_factor=2), 4),
    "convolution": (nn.ConvTranspose2d(4, 4, 3), 4),
    "reflection_pad2d": (nn.ReflectionPad2d(1), 4),
    "mul": (Calls(lambda x: x * x), 4),
    "_adaptive_avg_pool2d": (nn.AdaptiveAvgPool2d(3), 4),
    "pixel_shuffle": (nn.PixelShuffle(2), 1),
}


@pytest.mark.parametrize(("operation", "layer", "channels"), [(name, *one) for name, one in REFUSED.items()], ids=REFUSED)
def test_a_layer_without_a_mirror_image_is_refused_by_name(operation, layer, channels):
    network = nn.Sequential(OrderedDict(first=conv(3, 4, 3), odd=layer, last=conv(channels, 5, 1)))
    with pytest.raises(ValueError, match=rf"Layer 'odd', between 'first' and 'last', cannot be mirrored: .*{operation}"):
        between(network, first="first", last="last")


def test_a_pool_that_runs_twice_is_refused():
    pool = nn.MaxPool2d(2)
    network = nn.Sequential(conv(3, 4, 1), pool, conv(4, 4, 1), pool, conv(4, 4, 1))
    with pytest.raises(ValueError, match="Layer '1', between '0' and '4', cannot be mirrored: it runs more than once"):
        between(network)


@pytest.mark.parametrize(
    ("network", "names", "text"),
    [
        (nn.Sequential(conv(3, 4, 1), conv(4, 4, 1)), ["1", "0"], "'0' takes nothing that comes from '1'"),
        (nn.Sequential(conv(3, 4, 1), nn.BatchNorm2d(4)), ["0", "1"], "'1' takes nothing that comes from '0'"),
        (nn.Sequential(conv(3, 4, 1), conv(4, 4, 1)), ["0", "7"], "has no layer '7'"),
        (
            nn.Sequential(conv(3, 4, 1), nn.Flatten()),
            ["0", "1"],
            r"Layer '1' gives or takes a tensor of shape \(2, 616\), which is no map",
        ),
        (nn.Sequential(conv(3, 4, 1), Calls(lambda x: {"a": x})), ["0", "1"], "Layer '1' gives or takes a dict"),
        (nn.Sequential(nn.ReLU(), conv(3, 4, 1)), ["0", "1"], "Layer '0' gives or takes a tensor .* no map"),
    ],
)
def test_layers_that_are_no_places_along_the_way_are_refused(network, names, text):
    with pytest.raises(ValueError, match=text):
        between(network, first=names[0], last=names[1])


def test_a_layer_that_does_not_run_or_runs_twice_is_refused():
    network = nn.Sequential(conv(3, 3, 1), conv(3, 3, 1))
    with pytest.raises(ValueError, match="Layer '1' is named, but the training step does not run it"):
        follow(network, ["0", "1"], lambda: network[0](torch.zeros(1, 3, 4, 4)))
    with pytest.raises(ValueError, match="Layer '0' runs more than once"):
        follow(network, ["0", "1"], lambda: network(network(torch.zeros(1, 3, 4, 4))))


def test_a_place_inside_of_a_block_leaves_the_skip_around_it_out():
    """The decoder then runs along the branch that it can see."""
    inner = nn.Sequential(conv(4, 4, 1), nn.ReLU(), conv(4, 4, 1))
    network = nn.Sequential(conv(3, 4, 1), Residual(inner), conv(4, 5, 1))
    encoder = follow(network, ["1.branch.0", "2"], lambda: network(torch.zeros(1, 3, 4, 4)))
    kinds = [step.kind for step in encoder.between(*encoder.marks.values())]
    assert kinds == ["activation", "convolution", "sum", "convolution"]


def test_the_first_layer_stands_for_its_input_if_it_holds_the_others():
    body = nn.Sequential(conv(3, 4, 3, stride=2), nn.ReLU(), conv(4, 6, 3))
    network = nn.Sequential(OrderedDict(body=body, head=conv(6, 2, 1)))
    images = torch.rand(2, 3, 17, 20)
    encoder = follow(network, ["body", "body.0", "body.2"], lambda: network(images))
    assert [encoder.values[number].stride for number in encoder.marks.values()] == [(1, 1), (2, 2), (2, 2)]
    autoencoders = Autoencoders(encoder)
    with EncoderTaps(network, autoencoders).reading() as reading:
        network(images)
    made = autoencoders(reading, autoencoders.terms)
    assert torch.equal(made["body.0"].target, images)
    assert made[END_TO_END].made.shape == images.shape
    assert reading.input_size == (17, 20)


def test_the_row_of_decoders_shares_its_parameters_with_the_single_ones():
    network = nn.Sequential(conv(3, 4, 1), nn.ReLU(), conv(4, 5, 3, stride=2), nn.ReLU(), conv(5, 6, 3), nn.ReLU())
    images = torch.rand(2, 3, 9, 10)
    encoder = follow(network, ["1", "3", "5"], lambda: network(images))
    autoencoders = Autoencoders(encoder, dropout=0.0)
    with EncoderTaps(network, autoencoders).reading() as reading:
        network(images)
    made = autoencoders(reading, autoencoders.terms)
    assert list(made) == ["3", "5", END_TO_END]
    first, last = autoencoders.decoders
    by_hand = last(reading.maps["5"], reading.maps["3"].shape[2:], {})
    torch.testing.assert_close(made["5"].made, by_hand)
    torch.testing.assert_close(made[END_TO_END].made, first(by_hand, reading.maps["1"].shape[2:], {}))
    torch.testing.assert_close(made["3"].made, first(reading.maps["3"], reading.maps["1"].shape[2:], {}))
    assert [made[name].layer for name in made] == ["1", "3", "1"]
    only = autoencoders(reading, ["3"])
    assert list(only) == ["3"]
    made[END_TO_END].made.sum().backward()
    assert all(parameter.grad is not None for parameter in autoencoders.parameters())


def test_half_of_what_enters_a_decoder_is_dropped_in_training():
    _, decoder, _ = between(nn.Sequential(conv(3, 4, 1), nn.AvgPool2d(1)), (40, 40))
    decoder.dropout.p = 0.5
    made = decoder(torch.ones(1, 4, 40, 40), (40, 40), {})
    assert set(made.unique().tolist()) == {0.0, 2.0}
    assert (made == 0).float().mean().item() == pytest.approx(0.5, abs=0.03)  # 6,400 draws: a standard error of 0.006
    assert (decoder.eval()(torch.ones(1, 4, 40, 40), (40, 40), {}) == 1).all()


def test_a_weight_that_is_computed_can_be_mirrored_as_well():
    _, decoder, _ = between(nn.Sequential(conv(3, 4, 1), parametrizations.weight_norm(conv(4, 5, 3))))
    assert [step.weight for step in decoder.steps] == [None]
    assert decoder(torch.rand(2, 5, 9, 12), (11, 14), {}).shape == (2, 4, 11, 14)


def test_a_code_of_another_size_is_refused():
    _, decoder, _ = between(nn.Sequential(conv(3, 4, 1), conv(4, 5, 3)))
    with pytest.raises(ValueError, match=r"of \(11, 14\) positions is encoded in \(9, 12\) but the code has \(8, 12\)"):
        decoder(torch.rand(1, 5, 8, 12), (11, 14), {})


def test_one_layer_is_not_enough():
    network = nn.Sequential(conv(3, 4, 1))
    with pytest.raises(ValueError, match=r"at least two layers.* but got \['0'\]"):
        Autoencoders(follow(network, ["0"], lambda: network(torch.zeros(1, 3, 4, 4))))
