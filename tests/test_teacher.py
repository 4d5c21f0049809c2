"""Layers read by name, and the teacher's confidence, against forwards done by hand."""

import copy
import pickle

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from lit_compress.taps import Taps
from lit_compress.teacher import Teacher


class Branching(nn.Module):
    """Two dropout layers, a layer used twice, a layer nobody runs, one that gives a pair."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.first, self.hint, self.act = nn.Dropout(0.5), nn.Linear(4, 3), nn.ReLU(inplace=True)
        self.second, self.fc = nn.Dropout(0.25, inplace=True), nn.Linear(3, 2)
        self.idle = nn.Linear(1, 1)
        self.pair = nn.LSTM(2, 2, batch_first=True)

    def forward(self, images):
        features = self.body(images).mean((2, 3))
        logits = self.fc(self.second(self.act(self.hint(self.act(self.first(features))))))
        self.pair(logits[:, None])
        return logits


def settled(network):
    """With running statistics that are not those of a fresh one."""
    network.train()
    for _ in range(3):
        network(torch.randn(8, 1, 6, 6) * 2 + 1)
    return network


# ---------------------------------------------------------------- taps


def test_a_tap_sees_what_the_layer_gave_even_if_it_is_overwritten():
    network = settled(Branching()).eval()
    images = torch.randn(5, 1, 6, 6)
    taps = Taps(network, ["body.1", "body", "hint", "", "first"])
    for _ in range(3):  # the first forward shows which outputs are overwritten, the later ones copy those alone
        with taps.reading() as found:
            logits = network(images)
        normed = network.body[1](network.body[0](images))
        torch.testing.assert_close(found["body.1"], normed)
        assert (normed < 0).any()
        torch.testing.assert_close(found["body"], normed.relu())
        torch.testing.assert_close(found["first"], normed.relu().mean((2, 3)))
        torch.testing.assert_close(found["hint"], network.hint(normed.relu().mean((2, 3)).relu()))
        assert torch.equal(found[""], logits)
    assert not any(module._forward_hooks for module in network.modules())


def test_gradients_flow_through_a_tap_before_an_in_place_layer():
    network = settled(Branching()).eval()
    twin = copy.deepcopy(network)
    twin.act.inplace = twin.body[2].inplace = False
    gradients = []
    for one in (network, twin):
        torch.manual_seed(1)
        with Taps(one, ["hint"]).reading() as found:
            logits = one(torch.ones(3, 1, 6, 6))
        (found["hint"].square().sum() + logits.sum()).backward()
        gradients.append(one.body[0].weight.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hnit", "has no layer 'hnit' to read; perhaps 'hint'"),
        ("idle", "Layer 'idle' is to be read, but this forward does not run it"),
        ("act", "Layer 'act' runs more than once"),
        ("pair", "Layer 'pair' gives a tuple, and only a tensor can be read"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(name, text):
    network = Branching()
    with pytest.raises(ValueError, match=text), Taps(network, [name]).reading():
        network(torch.zeros(2, 1, 6, 6))
    assert not any(module._forward_hooks for module in network.modules())


def test_an_output_that_is_overwritten_only_later_is_noticed():
    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.in_place = nn.Linear(2, 2), False

        def forward(self, x):
            return F.relu(self.layer(x), inplace=self.in_place)

    network = Moody()
    taps = Taps(network, ["layer"])
    with taps.reading():
        network(torch.ones(1, 2))
    network.in_place = True
    with (
        pytest.raises(ValueError, match="'layer' gives is changed in place in this forward but was not in the first"),
        taps.reading(),
    ):
        network(torch.ones(1, 2))


# ---------------------------------------------------------------- the teacher


def test_a_teacher_is_frozen_and_evaluated():
    network = settled(Branching())
    teacher = Teacher(network, ["hint", ""])
    images = torch.randn(4, 1, 6, 6)
    before = copy.deepcopy(network.state_dict())
    readings = teacher.read(images)
    assert set(readings) == set(teacher.readings) == {"hint", ""}
    assert not any(value.requires_grad for value in readings.values())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not any(module.training for module in network.modules())
    torch.testing.assert_close(readings[""], network(images))
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_moments_are_those_of_full_passes():
    """Of many passes with dropout, each a whole forward; the two agree as two samples of that size do."""
    network = settled(Branching())
    teacher = Teacher(network, ["", "body", "hint"], sampled=["hint", "fc"], passes=20_000)
    images = torch.randn(3, 1, 6, 6)
    readings = teacher.read(images)
    plain = Teacher(copy.deepcopy(network), ["", "body", "hint"]).read(images)
    for name, value in plain.items():
        torch.testing.assert_close(readings[name], value)

    for layer in (network.first, network.second):
        layer.train()
    taps = Taps(network, ["hint", "fc"])
    with torch.no_grad(), taps.reading() as found:
        network(images.repeat(20_000, 1, 1, 1))  # 20000 whole forwards
    for name in ("hint", "fc"):
        samples = found[name].unflatten(0, (20_000, 3)).double()
        for index in range(3):
            covariance = torch.cov(samples[:, index].T)
            spread = covariance.diagonal().mean().sqrt()
            # The error of a mean of 20000 is 0.7 % of the spread, of a variance about 1 %: five times that.
            torch.testing.assert_close(
                readings[f"mean({name})"][index].double(), samples[:, index].mean(0), rtol=0, atol=0.04 * spread
            )
            torch.testing.assert_close(readings[f"covariance({name})"][index].double(), covariance, rtol=0, atol=0.06 * spread**2)


def test_moments_are_of_the_passes_of_each_input():
    """Dropout that is replaced by a known table shows which row went where."""
    table = torch.randn(6 * 2, 4)

    class Table(nn.Dropout):
        def forward(self, values):
            return table[: len(values)].clone() if self.training else values

    network = nn.Sequential(nn.Identity(), Table(), nn.Linear(4, 2))
    teacher = Teacher(network, sampled=["2"], passes=6)
    inputs = torch.randn(2, 4)
    readings = teacher.read(inputs)
    samples = network[2](table).double()  # row `pass * 2 + input`
    for index in range(2):
        torch.testing.assert_close(readings["mean(2)"][index].double(), samples[index::2].mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            readings["covariance(2)"][index].double(), torch.cov(samples[index::2].T), rtol=1e-4, atol=1e-6
        )
    torch.testing.assert_close(readings[""], network[2](inputs))


def test_the_body_runs_once_and_the_head_on_all_passes():
    network = settled(Branching())
    rows = {}
    for name in ("body", "hint"):
        layer = network.get_submodule(name)
        layer.register_forward_hook(lambda layer, inputs, output, name=name: rows.setdefault(name, []).append(len(output)))
    Teacher(network, sampled=["fc"], passes=10, rows_at_once=45).read(torch.randn(9, 1, 6, 6))
    assert rows == {"body": [4, 4, 1], "hint": [44, 44, 11]}  # 45 // 10 inputs at a time, each evaluated once as well


def test_confidence_without_dropout_before_the_layer_is_refused():
    network = settled(Branching())
    images = torch.zeros(2, 1, 6, 6)
    with pytest.raises(ValueError, match=r"No dropout layer runs before layer 'body\.0'"):
        Teacher(network, sampled=["body.0"]).read(images)
    network.first.p = network.second.p = 0.0
    with pytest.raises(ValueError, match="No dropout layer runs before layer 'hint'"):
        Teacher(network, sampled=["hint"]).read(images)
    with pytest.raises(ValueError, match="3 passes give no covariance of 3 dimensions"):
        Teacher(settled(Branching()), sampled=["hint"], passes=3).read(images)
    with pytest.raises(ValueError, match=r"gives \(4, 4, 4\) for an input, but confidence is of vectors"):
        Teacher(nn.Sequential(nn.Dropout2d(), nn.Identity()), sampled=["1"], passes=99).read(torch.zeros(2, 4, 4, 4))
    with pytest.raises(ValueError, match="`passes` must be at least 1 but got 0"):
        Teacher(network, passes=0)


def test_confidence_of_torchvisions_classifiers():
    """AlexNet drops out twice, both times before a fully connected layer, with in-place activations between."""
    network = torchvision.models.alexnet(num_classes=5)
    readings = Teacher(network, sampled=[""], passes=30).read(torch.randn(2, 3, 64, 64))
    assert readings["covariance()"].shape == (2, 5, 5)
    assert (torch.linalg.eigvalsh(readings["covariance()"].double()) > 0).all()


def test_a_fingerprint_tells_weights_buffers_and_architecture():
    def build():
        torch.manual_seed(3)
        return Branching()

    same = Teacher(build()).fingerprint
    assert Teacher(build()).fingerprint == same
    weight, buffer, shape = build(), build(), build()
    with torch.no_grad():
        weight.fc.bias[0] += 1e-6
    buffer.body[1].running_mean[0] = 1e-6
    shape.first.p = 0.4
    assert len({same, *(Teacher(network).fingerprint for network in (weight, buffer, shape))}) == 4


def test_a_teacher_follows_its_inputs_and_is_shared_by_copies():
    teacher = Teacher(settled(Branching()))
    fingerprint = Teacher(copy.deepcopy(teacher.network)).fingerprint
    assert teacher.read(torch.zeros(1, 1, 6, 6, dtype=torch.bfloat16))[""].dtype == torch.bfloat16
    assert teacher.read(torch.zeros(1, 1, 6, 6))[""].dtype == torch.float32
    assert teacher.fingerprint == fingerprint  # taken before bfloat16 rounded the weights
    assert copy.deepcopy([teacher])[0] is teacher
    assert pickle.loads(pickle.dumps(teacher)).fingerprint == fingerprint
