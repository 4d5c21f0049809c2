"""Compensation: what removed channels gave on average goes into the biases of the layers that read them."""

import copy
import re
import warnings

import numpy as np
import pytest
import pytorch_lightning
import torch
from pytorch_lightning import LightningModule, seed_everything
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lit_compress import Recipe, analyze, cut, load_pruned
from lit_compress.callbacks import PFAPruning
from lit_compress.callbacks.companions import averages_of
from lit_compress.compensation import compensated
from lit_compress.graph import trace
from lit_compress.inputs import readers
from lit_compress.plan import plan_of
from lit_compress.statistics.mean import StreamingMean
from lit_compress.surgery import plan_for
from tests.modules import every_epoch, needs_averaging, new_trainer, same
from tests.networks import Net, clone, conv, randomized, relative_error

GONE = (1, 4)  # channels of 6 that give the same whatever comes in
KEPT = (0, 2, 3, 5)
NOWHERE_TO_PUT_IT = (
    "have no bias to fold their mean into, and no norm that takes their output alone: there, nothing is compensated"
)
UNKNOWN = (
    "are grouped or transposed, did not run in the analysis, or their weight is used twice or not as it is: there, nothing is "
    "compensated"
)


def constant(layer: nn.Module, value: float = 0.7) -> nn.Module:
    """Make the channels in :data:`GONE` of a layer constant, above zero. In place."""
    layer.weight.data[list(GONE)] = 0
    layer.bias.data[list(GONE)] = torch.tensor([value, 2 * value])
    return layer


def images(count: int = 40, size: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def vectors(count: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))


def pooled(m, y):
    return m.f(y.mean((2, 3)))


# Name to network and input; the layer `a` has the constant channels, and `b` reads them with no border in the way.
EXACT = {
    "convolution with norm": (
        lambda: Net(lambda m, x: pooled(m, F.relu(m.n(m.b(F.relu(m.a(x)))))), a=constant(conv(3, 6)),
                    b=nn.Conv2d(6, 4, 3, bias=False), n=nn.BatchNorm2d(4), f=nn.Linear(4, 2)), images()),
    "convolution with bias": (
        lambda: Net(lambda m, x: pooled(m, F.relu(m.b(F.relu(m.a(x))))), a=constant(conv(3, 6)), b=nn.Conv2d(6, 4, 3),
                    f=nn.Linear(4, 2)), images()),
    "convolution with bias and norm": (
        lambda: Net(lambda m, x: pooled(m, F.relu(m.n(m.b(F.relu(m.a(x)))))), a=constant(conv(3, 6)),
                    b=nn.Conv2d(6, 4, 3, stride=2), n=nn.BatchNorm2d(4), f=nn.Linear(4, 2)), images()),
    "convolution with reflected border": (
        lambda: Net(lambda m, x: pooled(m, F.relu(m.b(F.relu(m.a(x))))), a=constant(conv(3, 6)),
                    b=nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"), f=nn.Linear(4, 2)), images()),
    "linear": (
        lambda: Net(lambda m, x: m.f(F.relu(m.b(F.relu(m.a(x))))), a=constant(nn.Linear(5, 6)), b=nn.Linear(6, 4),
                    f=nn.Linear(4, 2)), vectors()),
    "linear with norm": (
        lambda: Net(lambda m, x: m.f(F.relu(m.n(m.b(torch.sigmoid(m.a(x)))))), a=constant(nn.Linear(5, 6)),
                    b=nn.Linear(6, 4, bias=False), n=nn.BatchNorm1d(4), f=nn.Linear(4, 2)), vectors()),
    "linear over a flattened map": (
        lambda: Net(lambda m, x: m.f(F.relu(m.b(F.relu(m.a(x)).flatten(1)))), a=constant(conv(3, 6)), b=nn.Linear(6 * 36, 4),
                    f=nn.Linear(4, 2)), images()),
    "linear over tokens": (
        lambda: Net(lambda m, x: m.f(F.relu(m.b(F.relu(m.a(x)))).mean(1)), a=constant(nn.Linear(6, 6)), b=nn.Linear(6, 4),
                    f=nn.Linear(4, 2)), images()[:, 0]),
    "pointwise convolution, padded for nothing": (
        lambda: Net(lambda m, x: pooled(m, F.relu(m.b(F.relu(m.a(x))))), a=constant(conv(3, 6)), b=nn.Conv2d(6, 4, 1),
                    f=nn.Linear(4, 2)), images()),
}  # fmt: skip


def built(build) -> nn.Module:
    torch.manual_seed(0)
    model = randomized(build()).eval()
    constant(model.a)
    return model


def cut_a(model, x, *, inputs):
    return cut(model, Recipe(keep={"a": KEPT}), x[:2], inputs=inputs)


@pytest.mark.parametrize("name", EXACT)
def test_constant_channels_are_compensated_exactly(name):
    build, x = EXACT[name]
    model = built(build)
    uncut, plain = copy.deepcopy(model), copy.deepcopy(model)
    means = analyze(model, x.split(16), compensate=True).inputs
    cut_a(model, x, inputs=means)
    cut_a(plain, x, inputs=None)
    other = x.flip(0) * 1.5  # constant on any data
    with torch.no_grad():
        expected = clone(uncut(other))
        assert relative_error(clone(model(other)), expected) < 1e-5
        assert relative_error(clone(plain(other)), expected) > 1e-3  # the channels had counted


def test_the_border_of_a_zero_padded_convolution_is_off_and_its_interior_exact():
    model = built(lambda: Net(lambda m, x: m.f(F.relu(m.b(F.relu(m.a(x))))), a=conv(3, 6), b=conv(6, 4), f=conv(4, 2, 1)))
    uncut, x = copy.deepcopy(model), images()
    means = analyze(model, [x], compensate=True).inputs
    cut_a(model, x, inputs=means)
    with torch.no_grad():
        found, expected = model(x), uncut(x)
    inside = (..., slice(1, -1), slice(1, -1))
    assert relative_error([found[inside]], [expected[inside]]) < 1e-5
    # At a corner, 4 of the kernel's 9 places meet a channel; the bias stands for all 9.
    corner = (..., 0, 0)
    missed = uncut.b.weight.data[:, list(GONE)].clone()
    missed[:, :, 1:, 1:] = 0
    shift = missed.sum((2, 3)) @ torch.tensor([0.7, 1.4])
    with torch.no_grad():
        before = uncut.b(F.relu(uncut.a(x)))[corner] + shift
        by_hand = torch.einsum("nc,oc->no", F.relu(before), uncut.f.weight[:, :, 0, 0]) + uncut.f.bias
    assert relative_error([found[corner]], [by_hand]) < 1e-5
    assert relative_error([found[corner]], [expected[corner]]) > 1e-3


def test_varying_channels_are_compensated_by_their_mean():
    model = randomized(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4)))
    x = vectors(100)
    uncut = copy.deepcopy(model)
    means = analyze(model, x.split(30), compensate=True).inputs
    with torch.no_grad():
        hidden = model[1](model[0](x)).double().numpy()
    np.testing.assert_allclose(means["2"].mean.numpy(), hidden.mean(0), atol=1e-6)
    cut(model, Recipe(keep={"0": KEPT}), x[:2], inputs=means)
    expected = uncut[2].bias.detach().numpy() + uncut[2].weight.detach().numpy()[:, list(GONE)] @ hidden.mean(0)[list(GONE)]
    np.testing.assert_allclose(model[2].bias.detach().numpy(), expected, atol=1e-6)
    with torch.no_grad():
        assert (model(x).mean(0) - uncut(x).mean(0)).abs().max() < 1e-5  # what is compensated is the mean


def test_nothing_moves_when_nothing_is_removed():
    build, x = EXACT["convolution with norm"]
    model = built(build)
    before = copy.deepcopy(model.state_dict())
    analysis = analyze(model, [x], compensate=True)
    plan = plan_for(model, analysis.graph, Recipe(keep={"a": range(6)}))
    assert compensated(model, analysis.graph, plan, analysis.inputs) == ({}, {})
    cut(model, Recipe(keep={"a": range(6)}), x, inputs=analysis.inputs)
    assert same(dict(before), dict(model.state_dict()))


@pytest.mark.parametrize("fails", ["warning", "cut"])
def test_a_cut_that_fails_has_compensated_nothing(fails, monkeypatch):
    build, x = EXACT["linear"] if fails == "cut" else (NOWHERE["no bias, no norm"], images())
    model = built(build)
    before, sizes = copy.deepcopy(model.state_dict()), repr(model)
    means = analyze(model, [x], compensate=True).inputs
    if fails == "cut":
        monkeypatch.setattr("lit_compress.slicing._note_sizes", lambda *args: 1 / 0)
    warnings.simplefilter("error", UserWarning)  # as pytest leaves a test, it puts the filters back
    with pytest.raises((UserWarning, ZeroDivisionError)):
        cut(model, Recipe(keep={"a": KEPT}), x[:2], inputs=means, verify=False)
    assert same(dict(before), dict(model.state_dict()))
    assert repr(model) == sizes
    assert plan_of(model) is None


@pytest.mark.parametrize("name", ["linear", "convolution with bias"])
def test_a_layer_called_by_keyword_is_compensated_as_any_other(name):
    build, x = EXACT[name]
    plain, model = built(build), built(build)
    run = model.function
    model.function = lambda m, x: run(Keywords(m), x)
    expected, found = (analyze(network, x.split(16), compensate=True).inputs for network in (plain, model))
    assert "b" in found
    assert all(torch.equal(found[name].mean, given.mean) for name, given in expected.items())


class Keywords:
    """A network whose layer `b` is called as ``b(input=...)``."""

    def __init__(self, model):
        self._model = model

    def __getattr__(self, name):
        layer = getattr(self._model, name)
        return (lambda x: layer(input=x)) if name == "b" else layer


def test_only_the_readers_of_removed_channels_move():
    build, x = EXACT["convolution with norm"]
    model = built(build)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    analysis = analyze(model, [x], compensate=True)
    plan = plan_for(model, analysis.graph, Recipe(keep={"a": KEPT}))
    values, left_out = compensated(model, analysis.graph, plan, analysis.inputs)
    assert (values.keys(), left_out) == ({"n.running_mean"}, {})
    assert not torch.equal(values["n.running_mean"], before["n.running_mean"])
    assert same(before, dict(model.state_dict()))  # to be put there after the cut, which may fail
    parameters = dict(model.named_parameters())
    cut_a(model, x, inputs=analysis.inputs)
    assert torch.equal(model.n.running_mean, values["n.running_mean"])
    assert dict(model.named_parameters()) == parameters  # the same objects


# Networks in which `b` has nowhere to put a mean, and why.
NOWHERE = {
    "no bias, no norm": lambda: Net(
        lambda m, x: pooled(m, F.relu(m.b(F.relu(m.a(x))))), a=conv(3, 6), b=conv(6, 4, bias=False), f=nn.Linear(4, 2)),
    "norm after the activation": lambda: Net(
        lambda m, x: pooled(m, m.n(F.relu(m.b(F.relu(m.a(x)))))), a=conv(3, 6), b=conv(6, 4, bias=False), n=nn.BatchNorm2d(4),
        f=nn.Linear(4, 2)),
    "norm that keeps no mean": lambda: Net(
        lambda m, x: pooled(m, F.relu(m.n(m.b(F.relu(m.a(x)))))), a=conv(3, 6), b=conv(6, 4, bias=False),
        n=nn.BatchNorm2d(4, track_running_stats=False), f=nn.Linear(4, 2)),
    "output that goes past the norm as well": lambda: Net(
        lambda m, x: (lambda y: pooled(m, F.relu(m.n(y)) + y))(m.b(F.relu(m.a(x)))), a=conv(3, 6), b=conv(6, 4, bias=False),
        n=nn.BatchNorm2d(4), f=nn.Linear(4, 2)),
    "two norms": lambda: Net(
        lambda m, x: (lambda y: pooled(m, F.relu(m.n(y)) + m.o(y)))(m.b(F.relu(m.a(x)))), a=conv(3, 6),
        b=conv(6, 4, bias=False), n=nn.BatchNorm2d(4), o=nn.BatchNorm2d(4), f=nn.Linear(4, 2)),
    "transposed": lambda: Net(
        lambda m, x: pooled(m, F.relu(m.b(F.relu(m.a(x))))), a=conv(3, 6), b=nn.ConvTranspose2d(6, 4, 3), f=nn.Linear(4, 2)),
    "masked weight": lambda: Net(
        lambda m, x: pooled(m, F.relu(F.conv2d(F.relu(m.a(x)), m.b.weight * m.g, m.b.bias))), a=conv(3, 6),
        b=conv(6, 4), g=nn.Parameter(torch.rand(4, 6, 1, 1)), f=nn.Linear(4, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", NOWHERE)
def test_layers_with_nowhere_to_put_the_mean_are_reported_and_left_alone(name):
    model, x = built(NOWHERE[name]), images()
    analysis = analyze(model, [x], compensate=True)
    plan = plan_for(model, analysis.graph, Recipe(keep={"a": KEPT}))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    why = UNKNOWN if name in ("transposed", "masked weight") else NOWHERE_TO_PUT_IT
    assert compensated(model, analysis.graph, plan, analysis.inputs) == ({}, {why: ["b"]})
    assert same(before, dict(model.state_dict()))
    with pytest.warns(UserWarning, match=f"Layers 'b' read removed channels but {re.escape(why)}"):
        cut_a(model, x, inputs=analysis.inputs)


def test_a_norm_of_two_layers_takes_no_mean():
    def run(m, x):
        return pooled(m, F.relu(m.n(m.b(F.relu(m.a(x)))) + m.n(m.c(x))))

    parts = {"b": conv(6, 4, bias=False), "c": conv(3, 4, bias=False), "n": nn.BatchNorm2d(4), "f": nn.Linear(4, 2)}
    model, x = built(lambda: Net(run, a=conv(3, 6), **parts)), images()
    assert trace(model, lambda: model(x[:1])).norms == {}


def test_the_readers_are_the_layers_whose_input_may_be_cut():
    build, x = EXACT["convolution with norm"]
    model = built(build)
    found = readers(trace(model, lambda: model(x)))
    assert {name: reader.size for name, reader in found.items()} == {"b": 6, "f": 4}  # `a` reads the image


def test_without_asking_nothing_is_gathered():
    build, x = EXACT["linear"]
    assert analyze(built(build), [x]).inputs is None


# ---------------------------------------------------------------- the mean


@pytest.mark.parametrize("shape", [(50, 3), (50, 3, 4), (50, 3, 4, 2)], ids=str)
@pytest.mark.parametrize("split", [50, 7, 1])
def test_the_streaming_mean_is_numpys(shape, split):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3 + 1000
    metric = StreamingMean(3)
    for batch in values.split(split):
        metric.update(batch)
    axes = (0, *range(2, len(shape)))
    np.testing.assert_allclose(metric.compute().numpy(), values.double().numpy().mean(axes), rtol=1e-6)


def test_the_streaming_mean_of_half_precision_keeps_its_digits():
    values = torch.randn(8, 2, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    metric = StreamingMean(2)
    metric.update(values)
    np.testing.assert_allclose(metric.compute().numpy(), values.double().mean((0, 2)).numpy(), rtol=1e-5, atol=1e-7)


def test_the_streaming_mean_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"3 channels but got shape \(2, 4\)"):
        StreamingMean(3).update(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="at least 1 sample"):
        StreamingMean(3).compute()


# ---------------------------------------------------------------- in a running Trainer


class Plain(LightningModule):
    """Two convolutions, the second without bias before its norm."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3, 6), nn.Conv2d(6, 4, 3, bias=False)
        self.n, self.f = nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.f(F.relu(self.n(self.b(F.relu(self.a(x))))).mean((2, 3)))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def fit_plain(folder, *callbacks, ckpt_path=None, **options):
    seed_everything(2, verbose=False)
    data = TensorDataset(x := images(64), x.mean((2, 3)).argmax(1))
    pruning = PFAPruning(energy=0.7, at_epoch=2, include=["a"], **options)
    trainer = new_trainer(folder, pruning, *callbacks, max_epochs=4, enable_checkpointing=bool(callbacks))
    module = Plain()
    trainer.fit(module, DataLoader(data, 16, shuffle=True), DataLoader(data, 16), ckpt_path=ckpt_path)
    return module, pruning


@pytest.mark.parametrize("compensated", [True, False])
def test_the_callback_compensates(tmp_path, compensated):
    found = {}

    class Watch(PFAPruning):
        def cut_now(self, trainer, pl_module):
            constant(pl_module.a)
            pl_module.eval()
            with torch.no_grad():
                found["before"] = pl_module(images(seed=7))
                super().cut_now(trainer, pl_module)
                found["after"] = pl_module(images(seed=7))
            pl_module.train()

    seed_everything(2, verbose=False)
    data = TensorDataset(x := images(64), x.mean((2, 3)).argmax(1))
    pruning = Watch(energy=1.0, at_epoch=2, include=["a"], compensate=compensated)
    module = Plain()
    new_trainer(tmp_path, pruning, max_epochs=3).fit(module, DataLoader(data, 16), DataLoader(data, 16))
    assert pruning.reports[0].recipe.keep["a"] == KEPT  # what hardly varies goes
    error = relative_error([found["after"]], [found["before"]])
    assert (error < 1e-5) == compensated


LINEAR = {"compensate": "linear", "select": "reconstruction"}


@pytest.mark.parametrize("options", [{"compensate": True}, LINEAR], ids=["mean", "linear"])
def test_a_compensated_run_resumed_is_the_same_run(tmp_path, options):
    whole, pruning = fit_plain(tmp_path, every_epoch(tmp_path), **options)
    assert len(pruning.reports[0].recipe.keep["a"]) < 6
    without, _ = fit_plain(tmp_path / "without", **{**options, "compensate": False})
    assert not torch.equal(without.n.running_mean, whole.n.running_mean)
    for epoch in (1, 2):  # before the cut, and after
        resumed, again = fit_plain(tmp_path / "resumed", ckpt_path=tmp_path / f"epoch={epoch}.ckpt", **options)
        assert len(again.reports) == 1
        assert same(dict(whole.state_dict()), dict(resumed.state_dict()))
    loaded = load_pruned(Plain(), tmp_path / "epoch=3.ckpt").eval()
    assert torch.equal(loaded(images()), whole.eval()(images()))


@needs_averaging
@pytest.mark.parametrize("how", [True, "linear"])
def test_an_average_of_the_weights_is_compensated_by_its_own(tmp_path, how):
    found = {}

    class Watch(PFAPruning):
        def cut_now(self, trainer, pl_module):
            (average,) = averages_of(trainer)
            for network in (pl_module, average):  # channels that the mean, and the channels kept, tell about
                network.a.weight.data[1], network.a.bias.data[1] = 0, 0.7
                network.a.weight.data[4], network.a.bias.data[4] = network.a.weight.data[0], network.a.bias.data[0]
            uncut = copy.deepcopy(average).eval()
            super().cut_now(trainer, pl_module)
            with torch.no_grad():
                found.update(before=uncut(images()), after=average.eval()(images()), now=pl_module.eval()(images()))

    seed_everything(2, verbose=False)
    data = TensorDataset(x := images(256), x.mean((2, 3)).argmax(1))
    pruning = Watch(energy=0.99, at_epoch=2, include=["a"], compensate=how, select="reconstruction")
    trainer = new_trainer(tmp_path, pruning, pytorch_lightning.callbacks.EMAWeightAveraging(decay=0.9), max_epochs=3)
    trainer.fit(Plain(), DataLoader(data, 16), DataLoader(data, 16))
    assert len(pruning.reports[0].recipe.keep["a"]) <= 4
    assert relative_error([found["after"]], [found["now"]]) > 1e-2  # not the same weights
    error = relative_error([found["after"]], [found["before"]])
    assert error < (0.05 if how == "linear" else 0.5), error
