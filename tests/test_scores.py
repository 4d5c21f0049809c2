"""Methods that score channels one by one, asked through an analysis: whom they remove, and how many."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from lit_compress import analyze, count_parameters, cut
from lit_compress.graph import trace
from lit_compress.information import PIB, VIB, why_no_bits
from lit_compress.models import LeNet5, LeNet300100, ResNetCIFAR
from lit_compress.scores import Magnitude, Slimming
from lit_compress.selection import pib
from tests.networks import Net, randomized

IMAGES = torch.rand(24, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def lenet(**options):
    torch.manual_seed(0)
    return LeNet5(**options).eval()


def normed():
    """Two convolutions with norms, the second tied to a third one by a sum."""
    torch.manual_seed(0)
    parts = {
        "a": nn.Conv2d(1, 6, 3, padding=1), "na": nn.BatchNorm2d(6),
        "b": nn.Conv2d(6, 8, 3, padding=1), "nb": nn.BatchNorm2d(8),
        "c": nn.Conv2d(1, 8, 3, padding=1), "nc": nn.BatchNorm2d(8),
        "bare": nn.Conv2d(8, 5, 3), "head": nn.Linear(5, 3),
    }  # fmt: skip

    def forward(m, x):
        summed = m.nb(m.b(m.na(m.a(x)).relu())) + m.nc(m.c(x))
        return m.head(m.bare(summed.relu()).amax((2, 3)).relu())

    return randomized(Net(forward, **parts)).eval()


# ---------------------------------------------------------------- magnitude


def test_the_filters_of_the_smallest_norm_go():
    network = lenet()
    for scope in ("layer", "global"):
        recipe = analyze(network, [IMAGES], method=Magnitude(scope)).recipe(keep_channels=0.6)
        assert recipe.method == f"magnitude(scope={scope}, keep_channels=0.6)"
        for layer, kept in recipe.keep.items():
            norms = np.abs(network.get_submodule(layer).weight.detach().double().numpy()).reshape(-1)
            norms = norms.reshape(network.get_submodule(layer).weight.shape[0], -1).sum(1)
            assert set(kept) == set(np.argsort(norms)[len(norms) - len(kept) :])


def test_each_layer_keeps_the_same_share_or_all_do_together():
    network = lenet()
    assert analyze(network, [IMAGES], method=Magnitude("layer")).recipe(keep_channels=0.07).widths == {
        "conv1": 2, "conv2": 4, "fc1": 35
    }  # 1.4, 3.5 and exactly 35 of 500, rounded up  # fmt: skip
    together = analyze(network, [IMAGES], method="magnitude").recipe(keep_channels=0.5)
    norms = {name: network.get_submodule(name).weight.detach().double().flatten(1).abs().sum(1) for name in LAYERS}
    relative = {name: values / values.mean() for name, values in norms.items()}
    threshold = torch.cat(list(relative.values())).sort(descending=True).values[284]  # the 285th of 570
    assert together.widths == {name: int((values >= threshold).sum()) for name, values in relative.items()}
    assert all(0.2 < width / len(norms[name]) < 0.8 for name, width in together.widths.items())


LAYERS = ("conv1", "conv2", "fc1")


@pytest.mark.parametrize(
    "method", [Magnitude("layer"), Magnitude("global"), Slimming("global")], ids=lambda m: m.options + m.name
)
@pytest.mark.parametrize("share", [0.15, 0.4, 0.8])
def test_a_size_is_met_and_the_next_step_would_not_meet_it(method, share):
    torch.manual_seed(0)
    network, images = randomized(ResNetCIFAR(depth=8)), torch.rand(4, 3, 32, 32)
    analysis = analyze(network, [images], method=method)
    recipe = analysis.recipe(keep_params=share)
    sizes = [analysis.parameters(analysis.recipe(keep_channels=step)) for step in method.steps(analysis.rankings)]
    target = share * count_parameters(network)
    assert sizes == sorted(sizes)
    assert analysis.parameters(recipe) == max(size for size in sizes if size <= target)
    cut(network, recipe, images[:1])
    assert count_parameters(network) == analysis.parameters(recipe)


def test_a_method_without_a_rule_of_its_own_needs_a_target():
    with pytest.raises(ValueError, match="magnitude needs a target: give `keep_channels`, `keep_params`, `keep_mult_adds` or"):
        analyze(lenet(), [IMAGES], method="magnitude").recipe()
    with pytest.raises(ValueError, match=r"`keep_channels` must lie in \(0, 1\] but got 1.5"):
        analyze(lenet(), [IMAGES], method="magnitude").recipe(keep_channels=1.5)
    with pytest.raises(ValueError, match="`scope` must be 'global' or 'layer' but got 'net'"):
        Magnitude("net")


def test_nothing_is_run_where_nothing_is_gathered():
    ran = []
    analysis = analyze(lenet(), [IMAGES, IMAGES], method="magnitude", example_inputs=IMAGES[:1],
                       forward_fn=lambda net, batch: ran.append(len(batch)) or net(batch))  # fmt: skip
    assert ran == [1]
    assert analysis.samples == 0


# ---------------------------------------------------------------- slimming


def test_channels_of_the_smallest_scale_go_and_tied_ones_by_their_mean():
    network = normed()
    network.nb.weight.data *= -1
    analysis = analyze(network, [IMAGES], method="slimming")
    assert set(analysis.rankings) == {"a", "b"}
    assert "no batch norm with a scale takes the output of 'bare' alone" in analysis.whole["bare"]
    tied = (network.nb.weight.abs() + network.nc.weight.abs()) / 2
    scores = {"a": network.na.weight.detach(), "b": tied.detach()}
    for name, expected in scores.items():
        torch.testing.assert_close(analysis.rankings[name].scores, expected.double())
    together = torch.cat(list(scores.values())).sort().values
    recipe = analysis.recipe(keep_channels=0.5)  # 7 of 14
    assert recipe.keep["b"] == recipe.keep["c"]
    assert [list(recipe.keep[name]) for name in scores] == [
        (values >= together[7]).nonzero().flatten().tolist() for values in scores.values()
    ]


# ---------------------------------------------------------------- information


def test_sigmoid_units_are_judged_by_what_they_give():
    """Against the units' activations, taken from the network by hand."""
    network = lenet(activation="sigmoid")
    maps = network.activation1(network.conv1(IMAGES))
    deeper = network.activation2(network.conv2(network.pool1(maps)))
    units = network.activation3(network.fc1(network.flatten(network.pool2(deeper))))
    for variant, marginal in itertools.product("ABC", ("jensen", "exact")):
        analysis = analyze(network, IMAGES.split(7), method=PIB(variant, marginal))
        recipe = analysis.recipe()
        assert recipe.method == f"pib(variant={variant}, marginal={marginal})"
        for name, q in {"conv1": maps, "conv2": deeper, "fc1": units}.items():
            expected = pib.keep_units(q.detach(), variant, marginal=marginal).tolist()
            assert list(recipe.keep.get(name, range(q.shape[1]))) == expected
            found = analysis.rankings[name]
            assert found.middle == pytest.approx(float(((q > 0.1) & (q < 0.9)).double().mean()))
            information = pib.entropies(q.detach(), marginal).information.sum()
            assert analysis.method.values(analysis.rankings)[f"information/{name}"] == pytest.approx(float(information), rel=1e-5)


def test_informative_units_are_told_from_the_others():
    """Units that copy a bit of the input stay, and those that hover around a half go."""
    network = LeNet300100(in_features=8, activation="sigmoid")
    with torch.no_grad():
        for layer in (network.layers.fc1, network.layers.fc2):
            layer.weight.zero_(), layer.bias.zero_()
            layer.weight[:8, :8] = 40 * torch.eye(8)
            layer.bias[:8] = -20
    bits = (torch.rand(200, 8) < 0.5).float()
    recipe = analyze(network, [bits], method=PIB("C", "exact")).recipe()
    assert recipe.keep == {"layers.fc1": tuple(range(8)), "layers.fc2": tuple(range(8))}


def test_layers_without_bits_say_why():
    parts = {"a": nn.Linear(4, 5), "b": nn.Linear(5, 6), "c": nn.Linear(6, 7), "d": nn.Linear(6, 7), "e": nn.Linear(7, 2)}
    network = Net(lambda m, x: m.e((m.c(y := m.b(m.a(x).relu()).sigmoid()) + m.d(y)).sigmoid()), **parts)
    graph = trace(network, lambda: network(torch.rand(2, 4)))
    assert {group.name: why_no_bits(graph, group) for group in graph.groups()} == {
        "a": "a relu follows it, not a sigmoid",
        "b": "",
        "c": "its channels are tied to those of 'd'",
    }
    analysis = analyze(network, [torch.rand(20, 4)], method="pib")
    assert set(analysis.rankings) == {"b"}
    assert analysis.whole["a"] == "a relu follows it, not a sigmoid"


@pytest.mark.parametrize(
    "forward", [lambda m, x: m.b(m.a(x).sigmoid()), lambda m, x: m.b(m.unit(m.a(x)))], ids=["function", "module"]
)
def test_tokens_are_positions(forward):
    network = Net(forward, a=nn.Linear(4, 5), unit=nn.Sigmoid(), b=nn.Linear(5, 2))
    tokens = torch.rand(20, 3, 4)
    q = network.a(tokens).sigmoid().detach().movedim(-1, 1)
    found = analyze(network, tokens.split(6), method="pib").rankings["a"].entropies
    torch.testing.assert_close(found.noise, pib.entropies(q).noise, rtol=1e-9, atol=1e-9)
    assert found.positions == 3


def test_noise_is_read_as_it_is_given():
    network = lenet()
    log_alphas = {name: torch.randn(width, generator=torch.Generator().manual_seed(1)) for name, width in
                  {"conv1": 20, "fc1": 500}.items()}  # fmt: skip
    log_alphas["conv1"][:] = 3.0  # all are noise: one stays
    log_alphas["conv1"][7] = 2.0
    analysis = analyze(network, [IMAGES], method=VIB(log_alphas, threshold=0.5))
    recipe = analysis.recipe()
    assert recipe.method == "vib(threshold=0.5)"
    assert recipe.keep == {"conv1": (7,), "fc1": tuple((log_alphas["fc1"] < 0.5).nonzero().flatten().tolist())}
    assert analysis.whole["conv2"] == "it had no gate"
    smaller = analysis.recipe(keep_params=0.5)
    assert analysis.parameters(smaller) <= 0.5 * count_parameters(network)
    assert set(smaller.keep["fc1"]) < set(recipe.keep["fc1"])
