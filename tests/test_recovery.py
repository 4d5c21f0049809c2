"""A network that does not recover from a cut goes back to before it, and a milder cut is tried."""

import copy
import json
import os

import pytest
import pytorch_lightning
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Callback, LightningModule, seed_everything
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lit_compress import count_parameters, load_pruned
from lit_compress.callbacks import MagnitudePruning, PFAPruning, PIBPruning, SlimmingPruning, VIBPruning
from lit_compress.callbacks.companions import optimizers_of
from lit_compress.callbacks.fallback import Kept
from lit_compress.callbacks.recovery import Recovery
from lit_compress.datamodules import DigitsDataModule, MNISTDataModule
from lit_compress.models import LeNet5, SimpleCNN
from lit_compress.modules import LitClassifier
from lit_compress.plan import plan_of
from tests.modules import At, digits, every_epoch, needs_averaging, new_trainer, same
from tests.test_ddp import ddp_trainer

# ---------------------------------------------------------------- the search


@given(
    limit=st.floats(0, 1.2),
    patience=st.integers(1, 3),
    mode=st.sampled_from(["min", "max"]),
    slow=st.integers(0, 2),
    tries=st.integers(1, 5),
)
def test_the_search_finds_the_strongest_cut_of_its_grid_that_holds(limit, patience, mode, slow, tries):
    sign = 1 if mode == "max" else -1
    recovery = Recovery(max_drop=1.0, mode=mode, patience=patience, tries=tries)
    network, tried = 0.0, []  # strength of the cut that the network has
    for _ in range(200):
        if recovery.strength == 0 or (recovery.exhausted and recovery.strength in tried):
            network = recovery.strength
            break
        network = recovery.strength
        tried.append(network)
        recovery.begin(0.5)
        verdict, seen = "wait", 0
        while verdict == "wait":
            recovers = network <= limit and seen >= min(slow, patience - 1)
            verdict = recovery.watch(0.5 - sign * (0.005 if recovers else 0.2))
            seen += 1
        if verdict == "held":
            break
    assert len(tried) <= tries
    assert network == max([one for one in tried if one <= limit], default=0)
    if limit < 1:  # and it closes in: what failed is at most a half, a quarter... above what held
        failed = min(one for one in tried if one > limit)
        held = max([one for one in tried if one <= limit], default=0.0)
        assert failed - held <= 0.5 ** (len(tried) - 1)


def test_a_metric_that_is_no_number_never_holds():
    recovery = Recovery(max_drop=100, mode="max", patience=2)
    recovery.begin(0.9)
    assert [recovery.watch(float("nan")) for _ in range(2)] == ["wait", "back"]


# ---------------------------------------------------------------- in a Trainer


class Classifier(LightningModule):
    """A wide network that is good after an epoch."""

    def __init__(self, rate=3e-3, hidden=48):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, 32),
            nn.ReLU(),
            nn.Linear(32, 10),
        )
        self.rate, self.right = rate, MulticlassAccuracy(10, average="micro")

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        logits = self.net(batch[0])
        self.right(logits, batch[1])
        self.log("val/accuracy", self.right)
        self.log("val/loss", F.cross_entropy(logits, batch[1]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), self.rate)


class Sigmoids(Classifier):
    """The same with sigmoids, which learn more slowly."""

    def __init__(self):
        super().__init__(rate=1e-2)
        self.net[3], self.net[5] = nn.Sigmoid(), nn.Sigmoid()


class Frozen(Classifier):
    """Learns nothing any more from epoch 2 on, so that no cut is recovered from."""

    def on_train_epoch_start(self):
        if self.current_epoch >= 2:
            self.optimizers().param_groups[0]["lr"] = 0.0


def loaders():
    return DataLoader(digits(0, 1000), 64, shuffle=True), DataLoader(digits(1000, 400), 200)


def fit(folder, *callbacks, module=None, ckpt_path=None, make=new_trainer, epochs=10, **more):
    seed_everything(5, verbose=False)
    module = module or Classifier()
    options = {"max_epochs": epochs, "enable_checkpointing": True, "logger": CSVLogger(folder), **more}
    trainer = make(folder, *callbacks, every_epoch(folder / "files"), **options)
    trainer.fit(module, *loaders(), ckpt_path=ckpt_path)
    return module, trainer


def pruning(**options):
    best = {"monitor": "val/accuracy", "mode": "max", "patience": 1, "at_epoch": 2}
    return PFAPruning(**{**best, "keep_params": 0.05, "max_drop": 1.0, **options})


def accuracy(module):
    module.eval()
    images, labels = next(iter(DataLoader(digits(1000, 400), 400)))
    with torch.no_grad():
        return float((module.net(images).argmax(1) == labels).double().mean())


def noting(callback, before):
    """The pruning callback behind one that notes the accuracy before its first cut."""
    return At(2, lambda trainer, module: before.append(accuracy(copy.deepcopy(module)))), callback


def test_a_cut_that_is_too_strong_ends_as_a_milder_one_within_the_bound(tmp_path):
    callback, before = pruning(), []
    module, _ = fit(tmp_path, *noting(callback, before))
    uncut = count_parameters(Classifier())
    assert 0.05 * uncut < count_parameters(module) < uncut
    assert accuracy(module) >= before[0] - 0.01
    assert len(callback.reports) == 1
    assert callback.reports[0].recipe == plan_of(module).recipe
    assert "of pfa(keep_params=0.05)" in callback.reports[0].recipe.method
    last = torch.load(tmp_path / "files" / "epoch=9.ckpt", weights_only=True)
    assert same(dict(load_pruned(Classifier, last).state_dict()), dict(module.state_dict()))
    summary = json.loads(next(tmp_path.rglob("summary.json")).read_text())
    assert summary["fine_tuned"]["val/accuracy"] == pytest.approx(accuracy(module))
    drops = [line for line in next(tmp_path.rglob("metrics.csv")).read_text().splitlines()[:1] if "compress/drop" in line]
    assert drops, "the recovery curve is not logged"


@pytest.mark.parametrize("average", [False, pytest.param(True, marks=needs_averaging)])
def test_what_nothing_recovers_from_ends_uncut_and_says_so(average, tmp_path):
    callback = pruning(max_drop=0.0, keep_params=0.1)
    uncut = {}
    note = At(2, lambda trainer, module: uncut.update(copy.deepcopy(module.state_dict())))
    others = [pytorch_lightning.callbacks.EMAWeightAveraging(decay=0.5)] if average else []
    with pytest.warns(UserWarning, match="(?i)no compression was possible"):
        module, trainer = fit(tmp_path, note, callback, *others, module=Frozen())
    assert count_parameters(module) == count_parameters(Classifier())
    assert plan_of(module) is None
    assert callback.reports == []
    assert not list(tmp_path.rglob("recipe.json"))
    assert module.net[1].weight.shape == (48, 64)
    states = trainer.optimizers[0].state
    assert all(states[p]["exp_avg"].shape == p.shape for p in module.parameters())
    if not average:
        for name, parameter in module.named_parameters():
            assert torch.equal(parameter, uncut[name]), name


ENDS = {
    "in the middle of an epoch": {"epochs": -1, "max_steps": 36},  # the cut is before step 32
    "without a validation": {"epochs": 3, "check_val_every_n_epoch": 2},
    "right after the cut": {"epochs": 3},
}


@pytest.mark.parametrize("end", ENDS)
def test_a_run_that_ends_before_the_cut_has_been_judged_is_judged_at_its_end(end, tmp_path):
    before = []
    callback = pruning(max_drop=0.0, keep_params=0.05)
    with pytest.warns(UserWarning, match="Training ends with val/accuracy"):
        module, trainer = fit(tmp_path, *noting(callback, before), module=Frozen(), **ENDS[end])
    assert plan_of(module) is None
    assert accuracy(module) == pytest.approx(before[0])
    assert float(trainer.callback_metrics["val/accuracy"]) == pytest.approx(before[0]), "by which files are ranked"
    last = max((tmp_path / "files").glob("*.ckpt"), key=lambda path: torch.load(path, weights_only=True)["global_step"])
    assert accuracy(load_pruned(Classifier, last)) == pytest.approx(before[0])


@pytest.mark.parametrize("first", [True, False])
def test_early_stopping_leaves_no_file_of_a_network_that_has_lost_too_much(first, tmp_path):
    stopping = EarlyStopping("val/accuracy", mode="max", patience=1)
    best = ModelCheckpoint(tmp_path / "best", monitor="val/accuracy", mode="max", save_last=True)
    callback = pruning(max_drop=0.0, keep_params=0.05, patience=9)
    with pytest.warns(UserWarning, match="Training ends with val/accuracy"):
        module, trainer = fit(tmp_path, *([stopping, callback] if first else [callback, stopping]), best, module=Frozen())
    assert trainer.current_epoch < 9
    assert plan_of(module) is None
    for file in (best.best_model_path, best.last_model_path):
        assert same(load_pruned(Classifier, file).state_dict(), module.state_dict())
    assert float(best.best_model_score) == pytest.approx(accuracy(module))


class Stopping(Callback):
    """Ends training when everything else of an epoch is done."""

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch == 2


def test_training_that_ends_after_its_last_file_says_that_the_file_is_another_network(tmp_path):
    callback = pruning(max_drop=0.0, keep_params=0.05, patience=9)
    with pytest.warns(UserWarning, match="Something ended training after the last checkpoint was written"):
        module, _ = fit(tmp_path, callback, Stopping(), module=Frozen())
    assert plan_of(module) is None
    assert plan_of(load_pruned(Classifier, tmp_path / "files" / "epoch=2.ckpt")) is not None


def test_a_cut_that_is_recovered_from_stays_as_chosen(tmp_path):
    callback = pruning(keep_params=0.6, max_drop=5.0)
    module, _ = fit(tmp_path, callback, epochs=5)
    assert [report.recipe.method for report in callback.reports] == ["pfa(keep_params=0.6)"]
    assert count_parameters(module) <= 0.6 * count_parameters(Classifier())
    assert callback.schedule.cuts == [2]


@pytest.mark.parametrize("distil", [False, True], ids=["", "distilled"])
def test_a_run_resumed_in_the_middle_of_the_search_ends_as_one_that_never_stopped(distil, tmp_path):
    whole, _ = fit(tmp_path / "whole", pruning(distill_from_unpruned=distil))
    tried = {}
    for epoch in range(2, 9):
        path = tmp_path / "whole" / "files" / f"epoch={epoch}.ckpt"
        content = torch.load(path, weights_only=True)
        tried[epoch] = sum(tensor.numel() for tensor in content["state_dict"].values())
        if epoch % 2 == 0:
            resumed, _ = fit(tmp_path / str(epoch), pruning(distill_from_unpruned=distil), ckpt_path=path)
            assert same(dict(resumed.state_dict()), dict(whole.state_dict())), epoch
    assert len(set(tried.values())) > 2  # several cuts were tried


def searched(folder):
    callback = pruning()
    module, _ = fit(folder, callback, make=ddp_trainer)
    return dict(module.state_dict()), [report.recipe.to_dict() for report in callback.reports], accuracy(module)


def test_two_processes_search_together(processes, tmp_path):
    (one, recipes, _), (other, their_recipes, _) = processes(2)(searched, tmp_path)
    assert recipes == their_recipes
    names = [name for name in one if "running" not in name and "tracked" not in name]
    assert same({name: one[name] for name in names}, {name: other[name] for name in names})
    assert len(one["net.1.weight"]) < 48


def test_several_cuts_share_one_bound(tmp_path):
    before = []
    callback = PFAPruning(
        keep_params=0.05, max_drop=2.0, monitor="val/accuracy", mode="max", patience=1, every_n_epochs=2, max_cuts=3
    )
    module, _ = fit(tmp_path, *noting(callback, before), epochs=14)
    assert accuracy(module) >= before[0] - 0.02
    assert count_parameters(module) < count_parameters(Classifier())


BEST = {"monitor": "val/accuracy", "mode": "max", "patience": 1}
METHODS = {
    "magnitude": (Classifier, lambda: MagnitudePruning(keep_params=0.05, at_epoch=2, max_drop=1.0, **BEST)),
    "slimming": (Classifier, lambda: SlimmingPruning(keep_params=0.12, at_epoch=2, max_drop=1.0, **BEST)),
    "pib": (Sigmoids, lambda: PIBPruning(variant="C", marginal="exact", at_epoch=2, max_drop=1.0, **BEST)),
    "vib": (Classifier, lambda: VIBPruning(keep_params=0.05, at_epoch=2, max_drop=1.0, **BEST)),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_tries_a_milder_cut_also_in_a_resumed_run(method, tmp_path):
    """VIB goes back to the network that its gates are folded into, and cuts again by what they had found."""
    kind, make = METHODS[method]
    callback, before = make(), []
    module, trainer = fit(tmp_path, *noting(callback, before), module=kind())
    (report,) = callback.reports
    assert " of " + method in report.recipe.method
    assert report.after.parameters == count_parameters(module) < count_parameters(kind())
    assert accuracy(module) >= before[0] - 0.01
    assert optimizers_of(trainer) == trainer.optimizers
    assert set(module.state_dict()) == set(kind().state_dict())
    assert "training_step" not in vars(module)
    resumed, _ = fit(tmp_path / "again", make(), module=kind(), ckpt_path=tmp_path / "files" / "epoch=3.ckpt")
    assert same(dict(resumed.state_dict()), dict(module.state_dict()))


def test_pib_ends_training_once_no_cut_is_within_the_bound(tmp_path):
    class Still(Frozen, Sigmoids):
        pass

    module = Still()
    callback = PIBPruning(variant="C", marginal="exact", max_drop=0.0, **BEST)
    with pytest.warns(UserWarning, match="No compression was possible"):
        _, trainer = fit(tmp_path, callback, module=module, epochs=30)
    assert plan_of(module) is None
    assert callback.reports == []
    assert trainer.current_epoch < 20
    assert not callback.schedule.remaining


def test_what_callbacks_optimize_themselves_goes_back_as_well(tmp_path):
    callback, module = VIBPruning(at_epoch=2, kl_scale=0.1), Classifier()
    found = {}

    def go_back(trainer, module):
        kept, states = Kept.of(trainer, module, []), copy.deepcopy(callback.own_optimizer.state_dict()["state"])
        assert states
        callback.own_optimizer.step(lambda: module.net(torch.rand(8, 64)).sum().backward())
        found["changed"] = not same(callback.own_optimizer.state_dict()["state"], states)
        kept.restore(trainer, module)
        found["back"] = same(callback.own_optimizer.state_dict()["state"], states)

    fit(tmp_path, At(1, go_back), callback, module=module, epochs=3)
    assert found == {"changed": True, "back": True}


def test_max_drop_of_another_callback_is_refused_beside_gates(tmp_path):
    with pytest.raises(MisconfigurationException, match="`max_drop` of PFAPruning may go back to a network with gates"):
        fit(tmp_path, pruning(), VIBPruning(at_epoch=4), epochs=6)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_drop": -1.0}, "`max_drop` must be a number of points"),
        ({"max_drop": float("nan")}, "`max_drop` must be a number of points"),
        ({"evaluate": False}, "leave `evaluate=False` out"),
        ({"monitor": "val/missing"}, "does not log on its validation data"),
        ({"monitor": "val/loss", "mode": "min", "at_epoch": 0}, "hundredths of a fraction"),
    ],
)
def test_what_cannot_be_bounded_is_refused_before_anything_is_cut(options, says, tmp_path):
    module = Classifier()
    with pytest.raises(MisconfigurationException, match=says):
        fit(tmp_path, pruning(**options), module=module, epochs=3)
    assert plan_of(module) is None


def test_norms_are_taken_anew_after_a_cut_if_asked_for(tmp_path):
    found = {}
    for anew in (False, True):
        callback = PFAPruning(energy=0.7, at_epoch=2, reestimate_norms=anew)
        taken = At(2, lambda trainer, module, anew=anew: found.update({anew: copy.deepcopy(module)}))
        fit(tmp_path / str(anew), callback, taken, epochs=3)
    plain, anew = found[False].net, found[True].net
    assert torch.equal(plain[1].weight, anew[1].weight)
    assert not torch.equal(plain[2].running_mean, anew[2].running_mean)
    images = torch.cat([batch for batch, _ in DataLoader(digits(0, 1000), 64)])
    with torch.no_grad():
        inputs = anew[:2](images)
    torch.testing.assert_close(anew[2].running_mean, inputs.mean(0), rtol=0.02, atol=0.02)  # of batches, the last a smaller one


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("data", ["digits", "mnist"])
def test_max_drop_of_one_point_is_kept_on_real_data(data, seed, tmp_path):
    """As users write it: our module, our data, one callback; the target is far too small on purpose."""
    if data == "mnist":
        if "LIT_COMPRESS_DATA" not in os.environ:
            pytest.skip("MNIST is not here: set LIT_COMPRESS_DATA")
        datamodule, net = MNISTDataModule(train_size=3000, seed=seed), LeNet5()
    else:
        datamodule, net = DigitsDataModule(seed=seed), SimpleCNN(num_classes=10, in_channels=1, width=12)
    seed_everything(seed, verbose=False)
    module = LitClassifier(net, num_classes=10)
    callback = PFAPruning(keep_params=0.02, at_epoch=4, max_drop=1.0, monitor="val/accuracy", mode="max", patience=2)
    trainer = new_trainer(tmp_path, callback, max_epochs=16)
    trainer.fit(module, datamodule=datamodule)
    reference = callback.fallback.recovery.reference
    (found,) = new_trainer(tmp_path).validate(module, datamodule=datamodule, verbose=False)
    assert found["val/accuracy"] >= reference - 0.01 - 1e-6
    assert len(callback.reports) == (plan_of(module) is not None)
