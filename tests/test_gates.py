"""Gates in networks of others: where they sit, that they act there, and that the folded and the cut network are the gated one."""

import copy
import pickle

import pytest
import torch
import torchvision
from torch import nn

from lit_compress import Recipe, cut, load_pruned, shrink_checkpoint
from lit_compress.checkpoint import write_plan
from lit_compress.gates import (
    CHILD,
    ChannelSigns,
    find_sites,
    fold_gates,
    gates_back_on_error,
    gates_of,
    hide_gates,
    put_gates,
    remove_gates,
    show_gates,
)
from lit_compress.graph import trace
from lit_compress.layers import VIBGate
from lit_compress.models import VGGCIFAR, LeNet5, LeNet300100
from lit_compress.plan import plan_of
from lit_compress.surgery import call
from tests.networks import Net, randomized


def held(*layers):
    return Net(lambda module, x: module.net(x), net=nn.Sequential(*layers))


MADE = {
    "LeNet-300-100": (lambda: LeNet300100(in_features=36), (1, 6, 6)),
    "LeNet-5": (LeNet5, (1, 28, 28)),
    "VGG": (VGGCIFAR, (3, 32, 32)),
    "ResNet-18": (lambda: torchvision.models.resnet18(num_classes=10), (3, 40, 40)),
    "tokens": (lambda: held(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3)), (4, 5)),
}
INSIDE_BLOCKS = [f"layer{stage}.{block}.conv1" for stage in range(1, 5) for block in range(2)]
LAYERS = {
    "LeNet-300-100": ["layers.fc1", "layers.fc2"],
    "LeNet-5": ["conv1", "conv2", "fc1"],
    "ResNet-18": INSIDE_BLOCKS,
    "tokens": ["net.0"],
}


def gated(name, seed=0):
    """A network in evaluation, its inputs, its graph with gates; a third of the channels off, a third negative."""
    torch.manual_seed(seed)
    make, shape = MADE[name]
    network = randomized(make()).eval()
    inputs = torch.rand(3, *shape)
    sites, _ = find_sites(trace(network, lambda: network(inputs)))
    put_gates(network, sites.values())
    for gate in gates_of(network).values():
        with torch.no_grad():
            gate.mu.copy_(1 + 0.3 * torch.randn(len(gate.mu)))
            gate.mu[1::3] *= -1
            gate.log_var[2::3] = 2.0
    return network, inputs, trace(network, lambda: network(inputs))


@pytest.mark.parametrize("name", LAYERS)
def test_gates_go_after_the_activations_of_layers_that_are_cut_on_their_own(name):
    network, _, graph = gated(name)
    assert list(gates_of(network).of_noise()) == LAYERS[name]
    for layer, gate in gates_of(network).of_noise().items():
        classes = graph.tensors[f"{CHILD}.{layer.replace('.', '/')}.mu"][0]
        assert classes.tolist() == graph.layers[layer].classes.tolist()
        assert len(gate.mu) == len(classes)


def test_what_has_no_gate_says_why():
    network = torchvision.models.resnet18(num_classes=10)
    sites, without = find_sites(trace(network, lambda: network(torch.rand(1, 3, 40, 40))))
    assert sorted([*sites, *without]) == sorted(name for name, part in network.named_modules() if hasattr(part, "weight")
                                                and part.weight.ndim > 1)  # fmt: skip
    assert without["fc"] == "they are the output of the network"
    assert without["conv1"] == "its channels are tied to those of 'layer1.0.conv2', 'layer1.1.conv2'"
    plain = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 1))
    shared = nn.ReLU()
    twice = nn.Sequential(nn.Linear(3, 4), shared, shared, nn.Linear(4, 1))
    for model, text in ((plain, "no activation function takes its channels alone"), (twice, "no module that runs once")):
        assert text in find_sites(trace(model, lambda model=model: model(torch.rand(2, 3))))[1]["0"]


def test_a_gate_multiplies_what_the_activation_gives():
    """Both ways: on the output of the activation, and on the input of the layer that reads it."""
    for name, layer, following in (("LeNet-5", "conv1", "pool1"), ("ResNet-18", "layer1.0.conv1", "layer1.0.conv2")):
        network, inputs, _ = gated(name)
        seen = {}
        network.get_submodule(following).register_forward_pre_hook(lambda module, args, seen=seen: seen.update(gated=args[0]))
        gate = gates_of(network).of_noise()[layer]
        network(inputs)
        scale = gate.scale.detach()
        with torch.no_grad():
            gate.mu.fill_(1), gate.log_var.fill_(-9)
        after = seen["gated"]
        network(inputs)
        torch.testing.assert_close(after, seen["gated"] * scale.view(1, -1, 1, 1))


def errors(found, expected):
    return (found - expected).abs().max().item() / expected.abs().max().item()


@pytest.mark.parametrize("name", MADE)
def test_the_gated_the_folded_and_the_cut_network_agree(name):
    network, inputs, graph = gated(name)
    network.double(), (inputs := inputs.double())
    expected = network(inputs).detach()
    keep = {layer: tuple(gate.keep.tolist()) for layer, gate in gates_of(network).of_noise().items()}
    assert all(len(kept) < len(graph.layers[layer].classes) for layer, kept in keep.items())
    fold_gates(network, graph, inputs, call)
    assert errors(network(inputs), expected) < 1e-9
    cut(network, Recipe(keep=keep), inputs)
    assert errors(network(inputs), expected) < 1e-9
    assert all(network.get_submodule(layer).weight.shape[0] == len(kept) for layer, kept in keep.items())


@pytest.mark.parametrize("name", ["LeNet-300-100", "ResNet-18", "tokens"])
def test_a_folded_network_is_plain(name):
    network, inputs, graph = gated(name)
    names, parameters = set(MADE[name][0]().state_dict()), [id(parameter) for parameter in network.parameters()]
    assert fold_gates(network, graph, inputs, call) == {}
    assert set(network.state_dict()) == names
    assert [id(parameter) for parameter in network.parameters()] == parameters[: len(list(network.parameters()))]
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in network.modules())


def test_before_a_max_pool_signs_stay_and_are_told():
    network, inputs, graph = gated("LeNet-5")
    negative = {layer: [c for c in gate.keep.tolist() if gate.mu[c] < 0] for layer, gate in gates_of(network).of_noise().items()}
    assert fold_gates(network, graph, inputs, call) == {layer: negative[layer] for layer in ("conv1", "conv2")}
    left = gates_of(network).by_site()
    assert [site.layer for site in left] == ["conv1", "conv2"]
    for site, signs in left.items():
        assert isinstance(signs, ChannelSigns)
        assert (signs.signs == -1).nonzero().flatten().tolist() == negative[site.layer]
    # Another cut takes its signs along, and the next fold leaves them.
    keep = {"conv1": tuple(range(0, 20, 2))}
    expected = copy.deepcopy(network)
    cut(network, Recipe(keep=keep), inputs)
    assert gates_of(network)["conv1"].signs.tolist() == gates_of(expected)["conv1"].signs[::2].tolist()
    outputs = network(inputs)
    fold_gates(network, trace(network, lambda: network(inputs)), inputs, call)
    torch.testing.assert_close(network(inputs), outputs)


def test_channels_with_a_sign_can_be_switched_off_instead():
    network, inputs, graph = gated("LeNet-5")
    expected = copy.deepcopy(network)
    told = fold_gates(network, graph, inputs, call, keep_signs=False)
    assert gates_of(network) is None
    for layer, channels in told.items():
        with torch.no_grad():
            gates_of(expected).of_noise()[layer].mu[channels] = 0
    torch.testing.assert_close(network(inputs), expected(inputs), rtol=1e-4, atol=1e-5)


def test_without_the_sign_left_behind_the_fold_would_be_wrong():
    """The trap itself: a max-pool does not commute with a negative factor."""
    network, inputs, _ = gated("LeNet-5")
    expected = network(inputs)
    blind = copy.deepcopy(network)
    remove_gates(blind)
    for layer, reader, repeats in (("conv1", "conv2", 1), ("conv2", "fc1", 16), ("fc1", "fc2", 1)):
        scale = gates_of(network).of_noise()[layer].scale.detach().repeat_interleave(repeats)
        weight = blind.get_submodule(reader).weight
        weight.data *= scale.view(1, -1, *[1] * (weight.ndim - 2))
    assert errors(blind(inputs), expected) > 0.01


def test_a_fold_that_is_not_exact_is_refused_and_changes_nothing():
    torch.manual_seed(0)
    network = randomized(held(nn.Linear(4, 6), nn.ReLU(), nn.BatchNorm1d(6), nn.Linear(6, 2))).eval()
    inputs = torch.rand(5, 4)
    sites, _ = find_sites(trace(network, lambda: network(inputs)))
    put_gates(network, sites.values())
    nn.init.normal_(gates_of(network)["net/0"].mu)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"The gates of 'net.0' cannot be folded into the weights that read them: layer 'net.3' differs"
    ):
        fold_gates(network, trace(network, lambda: network(inputs)), inputs, call)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert gates_of(network) is not None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))], ids=["copy", "pickle"])
def test_copies_have_gates_of_their_own(copied):
    network, inputs, _ = gated("LeNet-5")
    twin = copied(network)
    before = network(inputs)
    torch.testing.assert_close(twin(inputs), before)
    with torch.no_grad():
        gates_of(twin)["fc1"].mu.zero_()
    assert not torch.allclose(twin(inputs), before)
    torch.testing.assert_close(network(inputs), before)
    remove_gates(twin)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in twin.modules())


def test_gates_can_be_hidden():
    network, inputs, _ = gated("LeNet-5")
    expected = network(inputs)
    hidden = hide_gates(network)
    assert len(list(network.parameters())) == 8
    torch.testing.assert_close(network(inputs), expected)
    show_gates(network, hidden)
    assert len(list(network.parameters())) == 14
    hide_gates(network)
    remove_gates(network)  # finds hidden ones
    assert not torch.allclose(network(inputs), expected)


def test_what_fails_gives_the_gates_back():
    network, inputs, graph = gated("LeNet-5")
    expected, held = network(inputs), gates_of(network)
    before = {name: value.clone() for name, value in network.state_dict().items()}

    def fail():
        fold_gates(network, graph, inputs, call)
        network.load_state_dict({name: value for name, value in before.items() if CHILD not in name}, strict=False)
        raise KeyError

    with pytest.raises(KeyError), gates_back_on_error(network):
        fail()
    assert gates_of(network) is held
    torch.testing.assert_close(network(inputs), expected)


@pytest.mark.parametrize("stage", ["gated", "cut with gates", "cut, then gated", "folded, signs left, cut"])
def test_a_checkpoint_builds_gates_again(stage):
    network, inputs, graph = gated("LeNet-5")
    keep = Recipe(keep={"conv1": tuple(range(10)), "fc1": tuple(range(100))})
    if stage == "cut with gates":
        cut(network, keep, inputs)
    elif stage == "cut, then gated":
        remove_gates(network)
        cut(network, keep, inputs)
        put_gates(network, find_sites(trace(network, lambda: network(inputs)), threshold=1.5)[0].values())
    elif stage == "folded, signs left, cut":
        fold_gates(network, graph, inputs, call)
        cut(network, keep, inputs)
    checkpoint = {"state_dict": network.state_dict()}
    write_plan(network, checkpoint)
    again = load_pruned(LeNet5(), checkpoint).eval()
    assert torch.equal(again(inputs), network(inputs))
    assert [gate.threshold for gate in gates_of(again).values() if isinstance(gate, VIBGate)] == [
        gate.threshold for gate in gates_of(network).values() if isinstance(gate, VIBGate)
    ]


def test_a_run_that_starts_from_a_recipe_makes_room_for_what_was_folded_and_cut_since():
    start, further = Recipe(keep={"conv1": tuple(range(10))}), Recipe(keep={"conv1": (0, 2, 5), "fc1": tuple(range(100))})
    network, inputs, _ = gated("LeNet-5")
    remove_gates(network)
    cut(network, start, inputs)
    gates = put_gates(network, find_sites(trace(network, lambda: network(inputs)))[0].values())
    gates["conv1"].mu.data[::2] *= -1  # before a max-pool, so that signs stay
    fold_gates(network, trace(network, lambda: network(inputs)), inputs, call)
    cut(network, further, inputs)
    checkpoint = {"state_dict": network.state_dict()}
    write_plan(network, checkpoint)
    again = LeNet5().eval()
    cut(again, start, inputs)
    load_pruned(again, checkpoint)
    assert len(gates_of(again)["conv1"].signs) == 3
    assert torch.equal(again(inputs), network(inputs))
    assert plan_of(again) == plan_of(network)


def test_a_checkpoint_with_gates_that_are_trained_is_not_shrunk():
    network, inputs, _ = gated("LeNet-5")
    checkpoint = {"state_dict": network.state_dict()}
    write_plan(network, checkpoint)
    with pytest.raises(ValueError, match=r"holds gates that are still being trained.* Let VIBPruning fold them first"):
        shrink_checkpoint(LeNet5(), checkpoint, Recipe(keep={"conv1": (0, 1)}), inputs)


def test_a_fold_after_a_cut_leaves_no_gate_in_the_plan():
    network, inputs, _ = gated("LeNet-300-100")
    cut(network, Recipe(keep={"layers.fc1": tuple(range(50))}), inputs)
    assert any(CHILD in name for name in plan_of(network).keep)
    fold_gates(network, trace(network, lambda: network(inputs)), inputs, call)
    assert not any(CHILD in name for name in plan_of(network).keep)
    checkpoint = {"state_dict": network.state_dict()}
    write_plan(network, checkpoint)
    assert torch.equal(load_pruned(MADE["LeNet-300-100"][0](), checkpoint).eval()(inputs), network(inputs))


def test_gates_are_put_in_once():
    network, _, _ = gated("tokens")
    with pytest.raises(ValueError, match="Net has gates already"):
        put_gates(network, gates_of(network).sites)
    with pytest.raises(ValueError, match="give a module that holds it"):
        put_gates(network.net, ())
