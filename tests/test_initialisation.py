"""Weights drawn anew: with the spread that the constructor's rule gives at the widths of now."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from lit_compress import Recipe, cut, reinitialize
from lit_compress.initialisation import initialize
from lit_compress.models import MLP, VGGCIFAR, LeNet5, ResNetCIFAR, SimpleCNN
from tests.modules import same

CONVOLUTIONAL = {
    "SimpleCNN": (lambda: SimpleCNN(in_channels=1, width=24), "features.conv5"),
    "VGGCIFAR": (lambda: VGGCIFAR(depth=11, in_channels=1, width=0.25, image_size=8), "features.conv3_1"),
    "ResNetCIFAR": (lambda: ResNetCIFAR(depth=8, in_channels=1), "stage3.0.conv1"),
}


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_convolutions_begin_as_wide_as_their_filters_of_now_ask(name):
    """N(0, 2 / (filters · kernel area)): a layer cut to a quarter begins twice as wide."""
    build, layer = CONVOLUTIONAL[name]
    torch.manual_seed(1)
    net, images = build(), torch.rand(2, 1, 8, 8)
    channels = net.get_submodule(layer).out_channels
    cut(net, Recipe(keep={layer: tuple(range(0, channels, 4))}), images)
    net.train()(images)  # so that the norms have seen something
    before = copy.deepcopy(net.state_dict())
    reinitialize(net)
    conv = net.get_submodule(layer)
    assert conv.out_channels == channels // 4
    # A standard deviation from n numbers is right to 1 / sqrt(2n); four of these.
    expected, tolerance = math.sqrt(2 / (channels // 4 * 9)), 4 / math.sqrt(2 * conv.weight.numel())
    assert conv.weight.std().item() == pytest.approx(expected, rel=tolerance)
    for tensor, value in net.state_dict().items():
        if value.ndim > 1:
            assert (value == before[tensor]).float().mean() < 1e-3, tensor
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(not norm.running_mean.any() and norm.running_var.eq(1).all() and norm.num_batches_tracked == 0 for norm in norms)


@pytest.mark.parametrize(("activation", "gain"), [("relu", 1), ("sigmoid", 4)])
@pytest.mark.parametrize("build", [LeNet5, lambda activation: MLP(784, (500,), 10, activation)], ids=["LeNet5", "MLP"])
def test_lenets_begin_xavier_uniform_and_wider_before_a_sigmoid(build, activation, gain):
    torch.manual_seed(1)
    net = build(activation=activation)
    first, *_, last = layers = [module for module in net.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    nn.init.ones_(first.bias)
    reinitialize(net)
    for layer in layers:
        area = layer.weight[0, 0].numel()
        bound = (1 if layer is last else gain) * math.sqrt(6 / (area * (layer.weight.shape[0] + layer.weight.shape[1])))
        # Of n uniform numbers the largest falls short of the bound by 1 / n of it in the mean; five of these.
        assert bound * (1 - 5 / layer.weight.numel()) < layer.weight.abs().max() <= bound
        assert not layer.bias.any()


@pytest.mark.parametrize(("activation", "gain"), [("relu", 1), ("sigmoid", 4)])
def test_orthonormal_weights_keep_lengths_but_for_the_gain(activation, gain):
    """Of a layer with more filters than inputs the columns, of others the rows: by the singular values, all the same."""
    net = LeNet5(activation=activation, weights="orthonormal")
    nn.init.ones_(net.conv1.bias)
    reinitialize(net)  # by its own rule
    for layer in (net.conv1, net.conv2, net.fc1, net.fc2):
        values = torch.linalg.svdvals(layer.weight.detach().double().flatten(1))
        np.testing.assert_allclose(values, 1 if layer is net.fc2 else gain, rtol=1e-5)  # drawn in single precision
        assert not layer.bias.any()


def test_any_network_can_begin_orthonormal_and_an_unknown_rule_is_told():
    net = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Flatten(), nn.Linear(6, 9, bias=False))
    initialize(net, gain=2)
    torch.testing.assert_close(net[0].weight.flatten(1) @ net[0].weight.flatten(1).T, 4 * torch.eye(3))
    torch.testing.assert_close(net[2].weight.T @ net[2].weight, 4 * torch.eye(6))
    with pytest.raises(ValueError, match=r"`weights` must be one of \['orthonormal', 'xavier'\] but got 'orthogonal'"):
        LeNet5(weights="orthogonal")


def test_new_weights_follow_the_global_generator():
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    torch.manual_seed(3)
    reinitialize(net)
    first = copy.deepcopy(net.state_dict())
    reinitialize(net)
    assert not same(net.state_dict(), first)
    torch.manual_seed(3)
    reinitialize(net)
    assert same(net.state_dict(), first)


class Scaled(nn.Module):
    """Holds a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))


@pytest.mark.parametrize(
    ("part", "said"),
    [(Scaled, r"'1' \(Scaled\)"), (lambda: weight_norm(nn.Linear(3, 3)), r"'1' \(ParametrizedLinear\).*parametrization removed")],
    ids=["own parameter", "parametrized"],
)
def test_what_does_not_say_how_it_begins_is_refused_and_nothing_changes(part, said):
    net = nn.Sequential(nn.Linear(3, 3), part())
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=said):
        reinitialize(net)
    assert same(net.state_dict(), before)
