"""The documents' networks: counted in closed form, compared with slow accounts, and cut by hand."""

import copy
import re
from itertools import pairwise

import pytest
import torch
import torchvision
from torch import nn

from lit_compress.models import (
    MLP,
    VGGCIFAR,
    LeNet5,
    LeNet300100,
    ResidualBlock,
    ResNetCIFAR,
    SimpleCNN,
    VGGImageNet,
    ZeroPadShortcut,
)

# Small enough for a test, one of each.
NETWORKS = {
    "LeNet300100": (lambda: LeNet300100(in_features=192, num_classes=5), (3, 8, 8)),
    "LeNet5": (lambda: LeNet5(in_channels=3, num_classes=5, image_size=20), (3, 20, 20)),
    "SimpleCNN": (lambda: SimpleCNN(num_classes=5, width=6), (3, 8, 8)),
    "VGGCIFAR": (lambda: VGGCIFAR(depth=11, num_classes=5, width=0.125), (3, 32, 32)),
    "VGGImageNet": (lambda: VGGImageNet(depth=11, num_classes=5, width=0.0625, image_size=32), (3, 40, 33)),
    "ResNetCIFAR": (lambda: ResNetCIFAR(depth=14, num_classes=5, width=4), (3, 9, 9)),
}


def parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


def conv_bn(inputs, filters, kernel):
    """Weights of a convolution without bias, scale and shift of its batch norm."""
    return inputs * filters * kernel**2 + 2 * filters


def fc(inputs, outputs):
    return inputs * outputs + outputs


def images(shape, count=4, seed=1):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def test_lenets_have_the_published_number_of_parameters():
    assert parameters(LeNet300100()) == fc(784, 300) + fc(300, 100) + fc(100, 10) == 266_610
    # 28 - 4 = 24, pooled 12; 12 - 4 = 8, pooled 4
    assert parameters(LeNet5()) == (25 * 20 + 20) + (25 * 20 * 50 + 50) + fc(50 * 4 * 4, 500) + fc(500, 10) == 431_080


def test_simple_cnn_has_the_layers_of_the_appendix():
    expected = conv_bn(3, 96, 3) + 2 * conv_bn(96, 96, 3)
    expected += conv_bn(96, 192, 3) + 3 * conv_bn(192, 192, 3) + conv_bn(192, 192, 1) + conv_bn(192, 10, 1)
    network = SimpleCNN()
    assert parameters(network) == expected == 1_370_996
    sizes = [(m.out_channels, m.kernel_size[0]) for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert sizes == [(96, 3)] * 3 + [(192, 3)] * 4 + [(192, 1), (10, 1)]
    kinds = [type(m).__name__ for m in network.modules() if not list(m.children())]
    block = ["Conv2d", "BatchNorm2d", "ReLU"]
    assert kinds == [*block * 3, "Dropout", *block * 3, "Dropout", *block * 3, "AdaptiveAvgPool2d", "Flatten"]


@pytest.mark.parametrize(("size", "last"), [(8, 2), (28, 7), (32, 8)])
def test_simple_cnn_halves_the_map_twice(size, last):
    network = SimpleCNN(num_classes=7, in_channels=1, width=4)
    maps = network.features(images((1, size, size)))
    assert maps.shape == (4, 8, last, last)
    assert network(images((1, size, size))).shape == (4, 7)


# Written from the source's listing: filters of a convolution, rate of a dropout, M for a max-pool.
VGG16 = "64 .3 64 M 128 .4 128 M 256 .4 256 .4 256 M 512 .4 512 .4 512 M 512 .4 512 .4 512 M"


def test_vgg16_has_the_layers_of_its_source():
    expected = conv_bn(3, 64, 3) + conv_bn(64, 64, 3) + conv_bn(64, 128, 3) + conv_bn(128, 128, 3)
    expected += conv_bn(128, 256, 3) + 2 * conv_bn(256, 256, 3) + conv_bn(256, 512, 3) + 5 * conv_bn(512, 512, 3)
    expected += fc(512, 512) + 2 * 512 + fc(512, 10)
    network = VGGCIFAR(depth=16)
    assert parameters(network) == expected == 14_987_722
    words, leaves = [], list(network.features)
    for module, following in zip(leaves, [*leaves[1:], None], strict=True):
        if isinstance(module, nn.Conv2d):
            assert isinstance(following, nn.BatchNorm2d)
            words.append(str(module.out_channels))
        elif isinstance(module, nn.Dropout):
            words.append(f"{module.p:.1g}".lstrip("0"))
        elif isinstance(module, nn.MaxPool2d):
            words.append("M")
    assert " ".join(words) == VGG16
    head = [type(module).__name__ for module in network.classifier]
    assert head == ["Flatten", "Dropout", "Linear", "BatchNorm1d", "ReLU", "Dropout", "Linear"]
    assert [module.p for module in network.classifier if isinstance(module, nn.Dropout)] == [0.5, 0.5]


@pytest.mark.parametrize("depth", [11, 13, 16, 19])
def test_vgg_has_three_convolutions_less_than_its_depth_and_five_pools(depth):
    kinds = [type(module) for module in VGGCIFAR(depth=depth, width=0.02).modules()]
    assert kinds.count(nn.Conv2d) == depth - 3
    assert kinds.count(nn.MaxPool2d) == 5


def test_no_vgg_drops_before_a_pool():
    for depth in (11, 13, 16, 19):
        kinds = [type(module) for module in VGGCIFAR(depth=depth, width=0.02).features]
        assert nn.MaxPool2d in kinds
        assert all(before is nn.ReLU for before, kind in pairwise(kinds) if kind is nn.MaxPool2d)


@pytest.mark.parametrize("size", [8, 28, 32, 33])
def test_vgg_takes_images_of_any_size_it_was_told(size):
    network = VGGCIFAR(depth=11, in_channels=1, width=0.05, image_size=size)
    assert network(images((1, size, size))).shape == (4, 10)


def test_resnet_56_has_the_parameters_of_option_a():
    stage = 18 * conv_bn(16, 16, 3)
    stage += conv_bn(16, 32, 3) + 17 * conv_bn(32, 32, 3)
    stage += conv_bn(32, 64, 3) + 17 * conv_bn(64, 64, 3)
    assert parameters(ResNetCIFAR(depth=56)) == conv_bn(3, 16, 3) + stage + fc(64, 10) == 853_018


@pytest.mark.parametrize("depth", [8, 20, 56])
def test_resnet_has_as_many_layers_as_its_depth(depth):
    network = ResNetCIFAR(depth=depth, width=2)
    assert sum(isinstance(module, nn.Conv2d | nn.Linear) for module in network.modules()) == depth
    assert sum(isinstance(module, ZeroPadShortcut) for module in network.modules()) == 2


@pytest.mark.parametrize(("channels", "out_channels", "size", "front"), [(2, 4, 8, 1), (3, 6, 7, 1), (4, 8, 5, 2), (1, 4, 6, 1)])
def test_zero_padded_shortcut_is_the_slow_loop(channels, out_channels, size, front):
    maps = images((channels, size, size), count=2)
    expected = torch.zeros(2, out_channels, (size + 1) // 2, (size + 1) // 2)
    for channel in range(channels):
        for row in range(0, size, 2):
            for column in range(0, size, 2):
                expected[:, front + channel, row // 2, column // 2] = maps[:, channel, row, column]
    torch.testing.assert_close(ZeroPadShortcut(channels, out_channels, stride=2)(maps), expected, rtol=0, atol=0)


def test_a_hook_on_the_last_relu_of_a_block_sees_the_sum():
    block, maps, seen = ResidualBlock(4, 8, stride=2).eval(), images((4, 6, 6)), []
    block.relu2.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    out = block(maps)
    hidden = block.bn1(block.conv1(maps)).clamp(min=0)
    expected = block.bn2(block.conv2(hidden))
    expected[:, 2:6] += maps[:, :, ::2, ::2]
    torch.testing.assert_close(seen[0], expected)
    torch.testing.assert_close(out, expected.clamp(min=0))
    assert (seen[0] < 0).any()


def test_every_hidden_layer_of_a_sigmoid_net_is_followed_by_a_sigmoid():
    for network in (LeNet300100(activation="sigmoid"), LeNet5(activation="sigmoid"), MLP(9, (7, 6), 5, "sigmoid")):
        leaves = [module for module in network.modules() if not list(module.children())]
        layers = [place for place, module in enumerate(leaves) if isinstance(module, nn.Conv2d | nn.Linear)]
        assert len(layers) >= 3
        assert all(isinstance(leaves[place + 1], nn.Sigmoid) for place in layers[:-1])
        assert layers[-1] == len(leaves) - 1


def test_lenet_5_is_what_functions_compute_from_its_weights():
    network, batch = LeNet5(activation="sigmoid"), images((1, 28, 28))
    weights = dict(network.named_parameters())
    maps = (
        torch.conv2d(batch, weights["conv1.weight"], weights["conv1.bias"]).sigmoid().unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5))
    )
    maps = (
        torch.conv2d(maps, weights["conv2.weight"], weights["conv2.bias"]).sigmoid().unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5))
    )
    hidden = (maps.reshape(4, 50 * 16) @ weights["fc1.weight"].T + weights["fc1.bias"]).sigmoid()
    torch.testing.assert_close(network(batch), hidden @ weights["fc2.weight"].T + weights["fc2.bias"])


def test_convolutions_begin_with_the_variance_of_he():
    torch.manual_seed(3)
    weight = dict(VGGCIFAR().named_modules())["features.conv4_2"].weight
    assert weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)
    assert weight.mean().item() == pytest.approx(0, abs=1e-4)


def test_a_sigmoid_net_begins_four_times_as_wide_except_at_its_output():
    torch.manual_seed(3)
    wide, plain = LeNet300100(activation="sigmoid").layers, LeNet300100(activation="relu").layers
    xavier = (2 / (784 + 300)) ** 0.5  # standard deviation of the uniform draw
    assert plain.fc1.weight.std().item() == pytest.approx(xavier, rel=0.01)
    assert wide.fc1.weight.std().item() == pytest.approx(4 * xavier, rel=0.01)
    assert wide.fc3.weight.std().item() == pytest.approx((2 / 110) ** 0.5, rel=0.1)
    assert not wide.fc1.bias.any()


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_gets_a_gradient(name):
    build, shape = NETWORKS[name]
    network = build()
    logits = network(images(shape, count=8))
    assert logits.shape == (8, 5)
    nn.functional.cross_entropy(logits, torch.arange(8) % 5).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in network.parameters())
    # A bias's gradient may cancel, a weight's may not.
    assert all(p.grad.abs().sum() > 0 for key, p in network.named_parameters() if re.search(r"(conv|fc).*weight", key))


def with_lively_batch_norms(network):
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return network.eval()


def keep(module, channels):
    """Every tensor of a layer at these channels of its output."""
    for key, parameter in list(module.named_parameters()):
        setattr(module, key, nn.Parameter(parameter[channels]))
    for key, buffer in list(module.named_buffers()):
        if buffer.ndim:  # batch norm also counts its batches
            setattr(module, key, buffer[channels])


# Layer that loses channels, its batch norm, the layer that reads them.
CUTS = [
    ("LeNet300100", "layers.fc1", None, "layers.fc2"),
    ("LeNet5", "conv1", None, "conv2"),
    ("LeNet5", "conv2", None, "fc1"),
    ("SimpleCNN", "features.conv3", "features.bn3", "features.conv4"),
    ("SimpleCNN", "features.conv8", "features.bn8", "classifier.conv9"),
    ("VGGCIFAR", "features.conv3_1", "features.bn3_1", "features.conv3_2"),
    ("VGGCIFAR", "features.conv5_2", "features.bn5_2", "classifier.fc1"),
    ("VGGCIFAR", "classifier.fc1", "classifier.bn", "classifier.fc2"),
    ("VGGImageNet", "features.conv5_2", "features.bn5_2", "classifier.conv6"),
    ("VGGImageNet", "classifier.conv7", "classifier.bn7", "classifier.conv8"),
    ("ResNetCIFAR", "stage1.0.conv1", "stage1.0.bn1", "stage1.0.conv2"),
    ("ResNetCIFAR", "stage3.1.conv1", "stage3.1.bn1", "stage3.1.conv2"),
]


@pytest.mark.parametrize(("name", "layer", "norm", "reader"), CUTS, ids=str)
def test_channels_can_be_cut_out_by_hand(name, layer, norm, reader):
    build, shape = NETWORKS[name]
    silenced = with_lively_batch_norms(build())
    cut, batch = copy.deepcopy(silenced), images(shape)
    whole_logits = silenced(batch)
    width = len(silenced.get_submodule(layer).weight)
    kept, dropped = torch.arange(0, width, 2), torch.arange(1, width, 2)

    for place in filter(None, (layer, norm)):
        for parameter in silenced.get_submodule(place).parameters():
            parameter.data[dropped] = 0
        keep(cut.get_submodule(place), kept)
    weight = cut.get_submodule(reader).weight  # (outputs, channels · positions) where the map was flattened
    columns = torch.arange(weight.shape[1]).reshape(width, -1)[kept].flatten()
    cut.get_submodule(reader).weight = nn.Parameter(weight[:, columns])

    torch.testing.assert_close(cut(batch), silenced(batch))
    assert not torch.allclose(cut(batch), whole_logits)
    assert parameters(cut) < parameters(silenced)


def test_vgg_for_imagenet_has_the_parameters_of_the_original_and_its_batch_norms():
    with torch.device("meta"):
        network, original = VGGImageNet(), torchvision.models.vgg16()
    filters = 64 * 2 + 128 * 2 + 256 * 3 + 512 * 6 + 4096 * 2
    # One bias a filter less, scale and shift of a batch norm more.
    assert parameters(network) == parameters(original) + filters == 138_369_960


def test_vgg_for_imagenet_averages_what_it_says_of_every_place():
    network = with_lively_batch_norms(VGGImageNet(depth=11, num_classes=5, width=0.0625, image_size=32)).eval()
    maps = []
    network.classifier.conv8.register_forward_hook(lambda module, inputs, output: maps.append(output))
    logits = network(images((3, 64, 96), count=2))
    assert maps[0].shape == (2, 5, 2, 3)
    torch.testing.assert_close(logits, maps[0].mean((2, 3)))


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: LeNet300100(activation="tanh"), r"`activation` must be one of \['relu', 'sigmoid'\] but got 'tanh'"),
        (lambda: LeNet5(activation="elu"), r"`activation` must be one of \['relu', 'sigmoid'\] but got 'elu'"),
        (lambda: LeNet5(image_size=8), r"at least 16 by 16 pixels but got `image_size=8`; enlarge them, or take LeNet300100"),
        (lambda: MLP(4, (0,), 2), r"width of at least 1 but got \(4, 0, 2\)"),
        (lambda: SimpleCNN(width=0), r"`width` must be at least 1 but got 0"),
        (lambda: VGGCIFAR(depth=17), r"`depth` must be one of \[11, 13, 16, 19\] but got 17"),
        (lambda: VGGCIFAR(width=0.001), r"`width` must leave the first convolution a filter of its 64 but got 0.001"),
        (lambda: VGGCIFAR(image_size=0), r"`image_size` must be at least 1 pixel but got 0"),
        (lambda: VGGImageNet(depth=12), r"`depth` must be one of \[11, 13, 16, 19\] but got 12"),
        (lambda: VGGImageNet(image_size=31), r"`image_size` must be at least 32 pixels but got 31"),
        (lambda: ResNetCIFAR(depth=18), r"`depth` must be 6n \+ 2 \(8, 14, .*\) but got 18"),
        (lambda: ResNetCIFAR(depth=2), r"`depth` must be 6n \+ 2 .* but got 2"),
        (lambda: ResNetCIFAR(width=0), r"`width` must be at least 1 but got 0"),
        (lambda: ZeroPadShortcut(4, 2), r"can only widen but got 4 channels in and 2 out"),
    ],
)
def test_says_what_is_wrong(build, text):
    with pytest.raises(ValueError, match=text):
        build()
