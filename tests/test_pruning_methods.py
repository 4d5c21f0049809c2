"""Every method's callback lives through what PFA's does: it cuts, resumes, is saved and loaded by the shared code."""

import copy
import re
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import seed_everything
from pytorch_lightning.callbacks import EarlyStopping, StochasticWeightAveraging
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.plugins import MixedPrecision
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lit_compress import count_parameters, load_pruned
from lit_compress.callbacks import MagnitudePruning, PFAPruning, PIBPruning, SlimmingPruning, VIBPruning
from lit_compress.gates import gates_of
from lit_compress.losses import AttentionTransfer
from lit_compress.models import LeNet300100
from lit_compress.modules import LitClassifier
from lit_compress.plan import plan_of
from lit_compress.selection import pib
from tests.modules import (
    EPOCHS,
    At,
    Draws,
    Small,
    Theirs,
    digits,
    every_epoch,
    fit_theirs,
    new_trainer,
    outcome,
    same,
    small_loaders,
    train_loader,
    val_loader,
)


class Sigmoid(Theirs):
    """The same with sigmoids."""

    def __init__(self, width: int = 12, rate: float = 3e-3):
        super().__init__(width, rate)
        self.body[2], self.body[5] = nn.Sigmoid(), nn.Sigmoid()
        for norm in (self.body[1], self.body[4]):
            nn.init.constant_(norm.weight, 1.0)
            norm.weight.data[: width // 2] = torch.linspace(6, 30, width // 2)  # units that are sure


# Of VIB: so strong a penalty and so much decay that channels are given up within a few epochs.
STRONG = {"kl_scale": 0.05, "gate_lr": 0.3, "gate_weight_decay": 0.1}
CALLBACKS = {
    "magnitude": (Theirs, lambda: MagnitudePruning(keep_params=0.3, every_n_epochs=2, max_cuts=2)),
    "slimming": (Theirs, lambda: SlimmingPruning(keep_channels=0.7, strength=1e-2, every_n_epochs=2, max_cuts=2)),
    "pib": (Sigmoid, lambda: PIBPruning(every_n_epochs=2, max_cuts=2, stop=False)),
    "vib": (Theirs, lambda: VIBPruning(at_epoch=4, **STRONG)),
    "pfa, distilled": (Theirs, lambda: PFAPruning(energy=0.9, every_n_epochs=2, max_cuts=2, distill_from_unpruned=True)),
    "slimming, distilled": (
        Theirs,
        lambda: SlimmingPruning(
            keep_channels=0.7, strength=1e-2, at_epoch=3, distill_from_unpruned=[AttentionTransfer(["body.4"])]
        ),
    ),
    "vib, distilled": (Theirs, lambda: VIBPruning(at_epoch=4, distill_from_unpruned=True, **STRONG)),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*lie between 0.1 and 0.9")


@pytest.fixture(scope="module", params=CALLBACKS)
def whole(request, tmp_path_factory):
    """A run that was never stopped, with a checkpoint of every epoch."""
    folder = tmp_path_factory.mktemp("whole")
    kind, make = CALLBACKS[request.param]
    module, trainer = fit_theirs(folder, make(), Draws(), every_epoch(folder), module=seeded(kind))
    ends = copy.deepcopy(outcome(trainer, module))
    return SimpleNamespace(folder=folder, kind=kind, make=make, module=module, trainer=trainer, ends=ends)


def seeded(kind):
    seed_everything(3, verbose=False)
    return kind()


def test_channels_are_gone_and_the_network_is_plain(whole):
    widths = whole.trainer.callbacks[0].reports[-1].recipe.widths
    assert widths == {name: whole.module.get_submodule(name).out_channels for name in ("body.0", "body.3") if name in widths}
    assert widths
    assert 0 < min(widths.values()) < 12
    assert set(whole.module.state_dict()) == set(whole.kind().state_dict())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in whole.module.modules())
    assert "training_step" not in vars(whole.module)


@pytest.mark.parametrize("epoch", range(EPOCHS - 1))
def test_a_resumed_run_ends_as_one_that_never_stopped(whole, epoch, tmp_path):
    torch.rand(11)  # other random numbers than the first run had
    path = whole.folder / f"epoch={epoch}.ckpt"
    module, trainer = fit_theirs(tmp_path, whole.make(), Draws(), module=whole.kind(), ckpt_path=path)
    ends = outcome(trainer, module)
    # Of a loss that was added until the cut, a run that goes on after the cut has seen nothing.
    for name in whole.ends["metrics"].keys() & {"train/slimming", "train/vib"} - ends["metrics"].keys():
        ends["metrics"][name] = whole.ends["metrics"][name]
    for key, value in whole.ends.items():
        assert same(value, ends[key]), key


@pytest.mark.parametrize("epoch", range(EPOCHS))
def test_every_file_is_plain_data_and_loads_into_a_class_that_knows_nothing(whole, epoch, tmp_path):
    path = whole.folder / f"epoch={epoch}.ckpt"
    stored = torch.load(path, weights_only=True)
    module = load_pruned(whole.kind, path)
    assert same(dict(module.state_dict()), dict(stored["state_dict"]))
    assert (gates_of(module) is not None) == (isinstance(whole.make(), VIBPruning) and epoch < 4)
    logged = new_trainer(tmp_path).validate(module, val_loader(), verbose=False)[0]
    if epoch == EPOCHS - 1:
        assert logged["val/loss"] == pytest.approx(float(whole.trainer.callback_metrics["val/loss"]), rel=2e-2)  # bf16
        assert plan_of(module) == plan_of(whole.module)


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_fast_dev_run_tries_the_cut(name, tmp_path):
    kind, _ = CALLBACKS[name]
    callback = {
        "magnitude": lambda: MagnitudePruning(keep_params=0.5),
        "slimming": lambda: SlimmingPruning(keep_params=0.5),
        "pib": PIBPruning,
        "vib": lambda: VIBPruning(keep_params=0.5),
        "pfa, distilled": lambda: PFAPruning(keep_params=0.5, distill_from_unpruned=True),
        "slimming, distilled": lambda: SlimmingPruning(keep_params=0.5, distill_from_unpruned=True),
        "vib, distilled": lambda: VIBPruning(keep_params=0.5, distill_from_unpruned=True),
    }[name]()
    seed_everything(0, verbose=False)
    module = kind()
    before = count_parameters(module)
    new_trainer(tmp_path, callback, fast_dev_run=True).fit(module, train_loader(), val_loader())
    assert count_parameters(module) < before
    assert set(module.state_dict()) == set(kind().state_dict())


# ---------------------------------------------------------------- slimming


def test_slimming_adds_its_penalty_until_the_cut(tmp_path):
    strength = 0.01

    class ByHand(Theirs):
        def training_step(self, pair, position):
            loss = super().training_step(pair, position)
            norms = (self.body[1], self.body[4])
            return loss + strength * sum(norm.weight.abs().sum() for norm in norms) * (self.current_epoch < 2)

    options = {"keep_channels": 0.5, "at_epoch": 2, "evaluate": False}
    module, trainer = fit_theirs(
        tmp_path, SlimmingPruning(strength=strength, **options), module=seeded(Theirs), max_epochs=3, precision="32-true"
    )
    expected, _ = fit_theirs(
        tmp_path, SlimmingPruning(strength=0.0, **options), module=seeded(ByHand), max_epochs=3, precision="32-true"
    )
    assert all(width < 12 for width in trainer.callbacks[0].reports[0].recipe.widths.values())
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-4, atol=1e-5)
    assert "train/slimming" in trainer.callback_metrics


def test_slimming_needs_norms(tmp_path):
    with pytest.raises(MisconfigurationException, match="Small has no batch norm with a scale"):
        new_trainer(tmp_path, SlimmingPruning(keep_params=0.5)).fit(Small(), *small_loaders())


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: MagnitudePruning(), "Give exactly one of .* but got"),
        (lambda: MagnitudePruning(keep_params=0.5, keep_channels=0.5), "Give exactly one of"),
        (lambda: MagnitudePruning(keep_params=1.0), r"`keep_params` must lie in \(0, 1\) but got 1.0"),
        (lambda: MagnitudePruning(keep_channels=1.5), r"`keep_channels` must lie in \(0, 1\] but got 1.5"),
        (lambda: MagnitudePruning(keep_params=0.5, scope="all"), "`scope` must be"),
        (lambda: SlimmingPruning(keep_params=0.5, strength=-1), "`strength` must not be negative"),
        (lambda: PIBPruning(variant="D"), "`variant` must be"),
        (lambda: PIBPruning(marginal="mean"), "`marginal` must be"),
        (lambda: PIBPruning(information_every_n_epochs=0), "`information_every_n_epochs` must be at least 1 or None"),
        (lambda: VIBPruning(kl_scale=-1), "`kl_scale` must not be negative"),
        (lambda: VIBPruning(gate_lr=0), "`gate_lr` must be positive"),
        (lambda: VIBPruning(map_scale="width"), "`map_scale` must be"),
        (lambda: VIBPruning(every_n_epochs=2, max_cuts=2), "folds its gates at one cut"),
    ],
)
def test_refuses_contradictions_when_it_is_made(make, text):
    with pytest.raises(MisconfigurationException, match=text):
        make()


# ---------------------------------------------------------------- PIB


def lenet():
    seed_everything(0, verbose=False)
    net = LeNet300100(in_features=64, activation="sigmoid")
    return LitClassifier(net, num_classes=10, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9))


def test_pib_prunes_each_time_that_training_has_converged_until_nothing_is_left(tmp_path):
    callback = PIBPruning(patience=1, monitor="val/accuracy", mode="max", evaluate=False)
    module = lenet()
    trainer = new_trainer(tmp_path, callback, max_epochs=60)
    trainer.fit(module, train_loader(), val_loader())
    rounds = callback.reports
    assert len(rounds) > 2
    sizes = [report.after.parameters for report in rounds]
    assert all(small < large for large, small in pairwise(sizes[:-1]))
    assert sizes[-1] == sizes[-2] == count_parameters(module)  # the last round found nothing
    assert trainer.current_epoch == rounds[-1].epoch + 1 < 60  # and training ends with its epoch
    assert not callback.schedule.remaining


def test_pib_cuts_by_the_first_hundred_validation_samples_drawn(tmp_path):
    """Rebuilt by hand from the network right before the cut."""
    kept = {}

    class Kept(PIBPruning):
        def choose(self, analysis):
            with torch.no_grad():
                images = torch.stack([image for image, _ in data]).flatten(1)
                layers = module.net.layers
                kept["first"] = pib.keep_units(first := layers.fc1(images).sigmoid(), "C").tolist()
                kept["second"] = pib.keep_units(layers.fc2(first).sigmoid(), "C").tolist()
            kept["samples"] = analysis.samples
            return super().choose(analysis)

    data = [digits(1000, 150)[i] for i in sorted(torch.randperm(150, generator=torch.Generator().manual_seed(0))[:100].tolist())]
    module, callback = lenet(), Kept(variant="C", at_epoch=2, evaluate=False)
    new_trainer(tmp_path, callback, max_epochs=3).fit(module, train_loader(), val_loader())
    recipe = callback.reports[0].recipe
    assert kept["samples"] == 100
    assert list(recipe.keep["net.layers.fc1"]) == kept["first"]
    assert list(recipe.keep["net.layers.fc2"]) == kept["second"]
    assert recipe.method == "pib(variant=C, marginal=jensen)"


def test_pib_logs_the_information_of_each_layer_over_the_run_and_draws_it(tmp_path):
    """Before each epoch, after each cut and at the end; by hand from the weights of that moment."""
    expected, rows = [], []

    def note(trainer, pl_module):
        with torch.no_grad():
            first = pl_module.net.layers.fc1(images).sigmoid()
            units = {"net.layers.fc1": first, "net.layers.fc2": pl_module.net.layers.fc2(first).sigmoid()}
        expected.append({name: float(pib.entropies(q).information.sum()) for name, q in units.items()})

    class Watched(PIBPruning):
        def cut_now(self, trainer, pl_module):
            super().cut_now(trainer, pl_module)
            note(trainer, pl_module)

        def on_train_epoch_start(self, trainer, pl_module):
            note(trainer, pl_module)
            super().on_train_epoch_start(trainer, pl_module)

        def on_train_end(self, trainer, pl_module):
            note(trainer, pl_module)
            super().on_train_end(trainer, pl_module)

    class Rows(CSVLogger):
        def log_metrics(self, metrics, step=None):
            rows.append(dict(metrics))

    images = torch.stack([image for image, _ in digits(1000, 100)]).flatten(1)
    callback = Watched(every_n_epochs=2, max_cuts=1, stop=False, evaluate=False)
    new_trainer(tmp_path, callback, max_epochs=4, logger=Rows(tmp_path)).fit(lenet(), train_loader(), val_loader(100))
    assert [epochs for epochs, _ in callback.information] == [0, 1, 2, 2, 3, 4]
    for (_, found), by_hand in zip(callback.information, expected, strict=True):
        assert found == pytest.approx(by_hand, rel=1e-5)
    name = "compress/information/net.layers.fc1"
    logged = [row[name] for row in rows if name in row and "compress/parameters" not in row]  # the cut's own row says it again
    assert logged == [bits["net.layers.fc1"] for _, bits in callback.information]
    assert callback.information[3][1]["net.layers.fc1"] < callback.information[2][1]["net.layers.fc1"]
    assert list(tmp_path.glob("**/information_over_time.png"))


def test_pib_looks_as_often_as_it_is_told(tmp_path):
    for every, epochs in ((2, [0, 2, 3, 4]), (None, [])):  # with the cut before epoch 3, and the end
        callback = PIBPruning(at_epoch=3, information_every_n_epochs=every, evaluate=False)
        new_trainer(tmp_path, callback, max_epochs=4).fit(lenet(), train_loader(), val_loader(100))
        assert [epoch for epoch, _ in callback.information] == epochs


def test_layers_without_a_sigmoid_are_refused_by_name_before_training(tmp_path):
    module = Theirs()
    with pytest.raises(
        MisconfigurationException, match=r"'body.0': a relu follows it, not a sigmoid; 'body.3': a relu.*`exclude`"
    ):
        fit_theirs(tmp_path, PIBPruning(), module=module)
    assert module.body[0].out_channels == 12
    mixed = Sigmoid()
    mixed.body[2] = nn.ReLU()
    fit_theirs(tmp_path, PIBPruning(at_epoch=1, exclude=["body.0"]), module=mixed, max_epochs=2)
    assert mixed.body[0].out_channels == 12 > mixed.body[3].out_channels


def test_inputs_and_units_in_the_middle_are_told(tmp_path):
    """Of a normal distribution over its range, more than half lies in the middle; of pixels near 0 and 1, little."""
    module = lenet()
    with torch.no_grad():
        for layer in (module.net.layers.fc1, module.net.layers.fc2):
            layer.weight.mul_(0.01)
    inputs = torch.rand(64, 1, 8, 8)
    loader = DataLoader(TensorDataset(inputs, torch.arange(64) % 10), 32)
    with pytest.warns(UserWarning, match="lie") as told:
        new_trainer(tmp_path, PIBPruning(at_epoch=0), max_epochs=1).fit(module, loader, loader)
    texts = [str(one.message) for one in told]
    assert any(re.match(r"[78]\d% of the input's values lie in the middle", text) for text in texts)
    assert sum("100% of the activations of" in text for text in texts) == 2


# ---------------------------------------------------------------- VIB


def test_the_penalty_trains_gates_and_weights_as_a_hand_written_one(tmp_path):
    """A step by hand: the loss of the gated network plus the penalty; Adam on gates, the module's SGD on the rest."""
    seen = {}

    class Probe(VIBPruning):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if not seen:
                gates = gates_of(pl_module)
                seen[0] = copy.deepcopy((pl_module.net.state_dict(), gates.state_dict())), batch, torch.get_rng_state()

        def on_train_batch_end(self, trainer, pl_module, *args):
            if "after" not in seen:
                seen["after"] = copy.deepcopy((pl_module.net.state_dict(), gates_of(pl_module).state_dict()))

    seed_everything(1, verbose=False)
    module = Small()
    callback = Probe(kl_scale=0.1, gate_lr=0.01, gate_weight_decay=0.0, at_epoch=1, evaluate=False)
    new_trainer(tmp_path, callback, max_epochs=2).fit(module, *small_loaders())
    (weights, gates), (inputs, labels), state = seen[0]
    net = Small().net
    net.load_state_dict(weights)
    values = {name: value.clone().requires_grad_() for name, value in gates.items()}
    torch.set_rng_state(state)
    hidden, penalty = inputs, 0.0
    for place, layer in (("net/0", net[0]), ("net/2", net[2])):
        mu, log_var = values[f"{place}.mu"], values[f"{place}.log_var"]
        hidden = layer(hidden).relu() * (mu + torch.randn(len(inputs), 16) * (log_var / 2).exp())
        penalty = penalty + 0.5 * torch.log(1 + mu**2 / (log_var.exp() + 1e-8)).sum()
    (F.cross_entropy(net[4](hidden), labels) + 0.1 * penalty).backward()
    torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9).step()
    torch.optim.Adam(values.values(), lr=0.01).step()
    for name, value in net.state_dict().items():
        torch.testing.assert_close(seen["after"][0][name], value, rtol=1e-5, atol=1e-6)
    for name, value in values.items():
        torch.testing.assert_close(seen["after"][1][name], value.detach(), rtol=1e-5, atol=1e-6)


def test_a_warm_up_grows_the_penalty_and_the_gates_follow_the_schedule(tmp_path):
    logged, rates = [], []

    class Probe(VIBPruning):
        def on_train_epoch_end(self, trainer, pl_module):
            super().on_train_epoch_end(trainer, pl_module)
            if self.own_optimizer is not None:
                rates.append(self.own_optimizer.param_groups[0]["lr"])
                logged.append(trainer.callback_metrics["train/vib"].item())

    class Falls(Small):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)]

    callback = Probe(kl_scale=1.0, warmup_epochs=4, gate_lr=1e-7, at_epoch=5, evaluate=False, keep_params=0.8)
    new_trainer(tmp_path, callback, max_epochs=6).fit(Falls(), *small_loaders())
    assert rates == pytest.approx([1e-7, 1e-7, 5e-8, 5e-8, 2.5e-8])
    ratios = [value / logged[0] for value in logged]
    assert ratios == pytest.approx([1, 2, 3, 4, 4], rel=1e-3)  # the gates hardly move


def test_the_cut_network_computes_what_the_gated_one_did(tmp_path):
    """What the callback measures right before the cut, gates folded, is what a validation with gates logged."""
    callback = VIBPruning(at_epoch=4, **STRONG)
    logged = []

    module = seeded(Theirs)
    original = callback.on_train_epoch_end

    def record(trainer, pl_module):
        logged.append({name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")})
        original(trainer, pl_module)

    callback.on_train_epoch_end = record
    fit_theirs(tmp_path, callback, module=module, max_epochs=5, precision="32-true")
    (report,) = callback.reports
    for name in ("val/loss", "val/right", "val/area", "val/total"):
        assert report.before.metrics[name] == pytest.approx(logged[3][name], rel=1e-4), name
        assert report.after.metrics[name] == pytest.approx(logged[3][name], rel=1e-4), name
    assert report.after.parameters < report.before.parameters == count_parameters(Theirs())


def test_a_fold_that_fails_gives_everything_back(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("made to fail")

    callback, seen = VIBPruning(at_epoch=1, evaluate=False), {}

    cut_now = callback.cut_now

    def watched(trainer, pl_module):
        seen.update(before=copy.deepcopy(pl_module.state_dict()))
        monkeypatch.setattr("lit_compress.callbacks.pruning.cut", fail)
        cut_now(trainer, pl_module)

    callback.cut_now = watched
    module = Small()
    with pytest.raises(ValueError, match="made to fail"):
        new_trainer(tmp_path, callback).fit(module, *small_loaders())
    assert same(dict(module.state_dict()), dict(seen["before"]))
    assert list(gates_of(module).of_noise()) == ["net.0", "net.2"]
    assert "training_step" not in vars(module)


class NormAfter(Small):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.BatchNorm1d(16), nn.Linear(16, 3))


class NoActivation(Small):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 3))


class Manual(Small):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.parametrize(
    ("kind", "callbacks", "text"),
    [
        (NormAfter, [], r"The gates of 'net.0' cannot be folded"),
        (NoActivation, [], r"no place for a gate. .*'net.0': no activation function takes its channels alone"),
        (Manual, [], "Manual optimizes manually"),
        (Small, [StochasticWeightAveraging(1e-3)], "which the copy lacks"),
    ],
)
def test_vib_refuses_at_the_start_what_it_cannot_do(kind, callbacks, text, tmp_path):
    module = kind()
    names = set(module.state_dict())
    with pytest.raises((ValueError, MisconfigurationException), match=text):
        new_trainer(tmp_path, VIBPruning(), *callbacks).fit(module, *small_loaders())
    assert set(module.state_dict()) == names


def test_other_callbacks_and_a_second_fit_go_with_gates(tmp_path):
    """PFA cuts a gated network along with its gates; a fit that ended before the cut is taken up by the next."""
    module = seeded(Theirs)
    vib = VIBPruning(at_epoch=6, exclude=["head"], **STRONG)
    first = [vib, PFAPruning(energy=0.9, at_epoch=1, evaluate=False), EarlyStopping("val/loss", patience=0, min_delta=10.0)]
    fit_theirs(tmp_path, *first, module=module, min_epochs=3)
    gates = gates_of(module).of_noise()
    assert {name: len(gate.mu) for name, gate in gates.items()} == {
        name: module.get_submodule(name).out_channels for name in ("body.0", "body.3")
    }
    assert module.body[0].out_channels < 12
    held = {name: gate.mu.clone() for name, gate in gates.items()}
    again = VIBPruning(at_epoch=1, **STRONG)
    taken = []
    again.on_train_epoch_start, start = (
        lambda trainer, module: (taken.append({n: g.mu.clone() for n, g in gates_of(module).of_noise().items()})
                                 if not taken else None, start(trainer, module))[1]
    ), again.on_train_epoch_start  # fmt: skip
    fit_theirs(tmp_path, again, module=module, max_epochs=2)
    assert same(taken[0], held)
    assert gates_of(module) is None
    checkpoint = tmp_path / "end.ckpt"
    again_trainer = new_trainer(tmp_path)
    again_trainer.strategy.connect(module)
    again_trainer.save_checkpoint(checkpoint)
    assert same(dict(load_pruned(Theirs, checkpoint).state_dict()), dict(module.state_dict()))


def test_gates_train_alike_under_a_gradient_scaler(tmp_path):
    """Their gradients come scaled by 65536. Adam itself would not notice, but their weight decay would count for nothing."""

    def gates_after(name, **options):
        seed_everything(0, verbose=False)
        module = Small()
        without_noise = At(0, lambda trainer, module: [gate.log_var.data.fill_(-30) for gate in gates_of(module).values()])
        callback = VIBPruning(at_epoch=5, kl_scale=0.0, gate_lr=0.02, gate_weight_decay=1.0)
        limited = EarlyStopping("val/loss", patience=0, min_delta=100.0)  # two epochs, before the cut
        new_trainer(tmp_path / name, without_noise, callback, limited, max_epochs=6, **options).fit(module, *small_loaders())
        return torch.cat([gate.mu.detach() for gate in gates_of(module).values()])

    scaler = torch.amp.GradScaler("cpu")
    found = gates_after("scaled", plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert scaler.get_scale() >= 2.0**15
    torch.testing.assert_close(found, gates_after("plain"), rtol=0, atol=5e-3)  # half precision has three digits
