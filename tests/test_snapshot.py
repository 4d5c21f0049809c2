"""Back to before a cut: network, optimizer and plan are what they were, and training goes on as if there had been none."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lit_compress import Recipe, analyze, cut
from lit_compress.models import ResNetCIFAR
from lit_compress.plan import plan_of
from lit_compress.snapshot import Snapshot
from tests.modules import same
from tests.networks import randomized

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
Y = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3))


@pytest.mark.parametrize(
    ("first", "second"),
    [(nn.Conv2d(1, 5, 3), nn.Conv2d(5, 2, 1)), (nn.Conv2d(2, 5, 3), nn.Conv2d(5, 5, 3, groups=5))],
    ids=["of one input", "depthwise"],
)
def test_a_convolution_that_was_cut_to_one_channel_is_what_it_was(first, second):
    """Of one channel, a convolution and a depthwise one look alike."""
    images = torch.rand(2, first.in_channels, 8, 8)
    model = nn.Sequential(first, nn.ReLU(), second, nn.Flatten(), nn.LazyLinear(3))
    before, described = model(images), repr(model)
    snapshot = Snapshot.of(model)
    for _ in range(2):
        cut(model, Recipe(keep={"0": (3,)}), images)
        assert model(images).shape == (2, 3)
        snapshot.restore(model)
        assert repr(model) == described
        assert torch.equal(model(images), before)


def step(model, optimizer):
    def closure():
        optimizer.zero_grad()
        loss = F.mse_loss(model(X), Y)
        loss.backward()
        return loss

    optimizer.step(closure)


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}


@pytest.mark.parametrize("stored", [False, True], ids=["held", "stored"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_training_goes_on_as_if_there_had_been_no_cut(make, stored, tmp_path):
    model = mlp()
    optimizer = make(model.parameters())
    for _ in range(3):
        step(model, optimizer)
    beside = copy.deepcopy(model)
    other = make(beside.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    snapshot = Snapshot.of(model, [optimizer])
    identities = [id(parameter) for parameter in model.parameters()]
    for keep in ((0, 2, 3, 6), (1, 2)):  # cut and trained twice
        cut(model, Recipe(keep={"0": keep}), X).apply_to(optimizer)
        step(model, optimizer)
    optimizer.param_groups[0]["lr"] = other.param_groups[0]["lr"] = 0.05
    if stored:
        torch.save(snapshot.to_dict(), tmp_path / "snapshot.pt")
        snapshot = Snapshot.from_dict(torch.load(tmp_path / "snapshot.pt", weights_only=True))
    for _ in range(2):  # it can be gone back to more than once
        snapshot.restore(model, [optimizer])
        assert plan_of(model) is None
        assert [id(parameter) for parameter in model.parameters()] == identities
        assert repr(model) == repr(beside)
        step(model, optimizer)
    step(beside, other)
    assert same(dict(model.state_dict()), dict(beside.state_dict()))
    assert same(optimizer.state_dict(), other.state_dict())


def test_back_to_between_two_cuts_of_padded_blocks():
    torch.manual_seed(0)
    network = randomized(ResNetCIFAR(depth=20)).eval()
    images = torch.randn(2, 3, 16, 16)
    data = [torch.randn(80, 3, 16, 16)]
    whole = Snapshot.of(network)
    uncut = copy.deepcopy(network)
    cut(network, analyze(network, data, skips="pad").recipe(energy=0.9), images)
    between, expected = Snapshot.of(network), copy.deepcopy(network)
    cut(network, analyze(network, data, skips="pad").recipe(energy=0.7), images)
    assert repr(network) != repr(expected)
    for snapshot, right in ((between, expected), (whole, uncut)):
        snapshot.restore(network)
        assert repr(network) == repr(right)
        assert [type(module) for module in network.modules()] == [type(module) for module in right.modules()]
        assert same(dict(network.state_dict()), dict(right.state_dict()))
        assert torch.equal(network(images), right(images))
        assert plan_of(network) == plan_of(right)


def test_tied_weights_stay_tied():
    model = mlp()
    model.again = model[0]
    snapshot = Snapshot.of(model)
    with torch.no_grad():
        model[0].weight.add_(1)
    snapshot.restore(model)
    assert model.again.weight is model[0].weight
    assert torch.equal(model[0].weight, mlp()[0].weight)


def test_another_network_or_other_optimizers_are_refused_and_stay():
    model, other = mlp(), nn.Sequential(nn.Linear(4, 7))
    snapshot = Snapshot.of(model, [torch.optim.SGD(model.parameters(), lr=0.1)])
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="another network"):
        snapshot.restore(other)
    with pytest.raises(ValueError, match="other optimizers"):
        snapshot.restore(model)
    assert same(dict(other.state_dict()), dict(before))
