"""What else a Trainer offers goes on through a cut: compiled modules, gradient checkpointing, tuners, modes of validation."""

import copy

import pytest
import torch
from pytorch_lightning import LightningModule, seed_everything
from pytorch_lightning.callbacks import BatchSizeFinder, LearningRateFinder
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lit_compress import count_parameters
from lit_compress.callbacks import PFAPruning, VIBPruning
from lit_compress.gates import gates_of
from tests.modules import At, Small, every_epoch, new_trainer, same, small_loaders, vectors


def fit(folder, module, *callbacks, **options):
    seed_everything(0, verbose=False)
    trainer = new_trainer(folder, *callbacks, **options)
    trainer.fit(module, *small_loaders())
    return trainer


def plain():
    torch.manual_seed(1)
    return Small(width=40)


@pytest.fixture
def strict_compiler():
    """A recompilation too many is an error, not the silent end of compiling."""
    if not hasattr(torch._dynamo.config, "fail_on_recompile_limit_hit"):
        pytest.skip("this torch cannot tell that it has stopped compiling")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("what", ["module", "network", "step"])
def test_gates_come_and_go_in_a_compiled_module(what, strict_compiler, tmp_path):
    """Compiled code knows the hooks that there were when it was compiled."""
    trained = {}

    def run(name, compile_it):
        module = plain()
        network = compile_it(module)
        fit(tmp_path / name, network, max_epochs=1)
        note = At(1, lambda trainer, module: trained.update({name: copy.deepcopy(gates_of(module).state_dict())}))
        fit(tmp_path / name, network, note, VIBPruning(at_epoch=2, threshold=1e9), max_epochs=4)  # folds, and removes nothing
        return module

    def compiled(module):
        if what == "module":
            return torch.compile(module, backend="eager")
        if what == "network":
            module.net.compile(backend="eager")
        else:
            module.training_step = torch.compile(module.training_step, backend="eager")
        return module

    expected, found = run("plain", lambda module: module), run("compiled", compiled)
    assert same(trained["compiled"], trained["plain"])
    assert same(dict(found.state_dict()), dict(expected.state_dict()))
    assert gates_of(found) is None


@pytest.mark.parametrize("what", ["module", "network", "step"])
def test_a_compiled_module_is_cut_ten_times_and_stays_compiled(what, strict_compiler, tmp_path):
    sizes = set()

    def backend(graph, inputs):
        sizes.add(count_parameters(module))
        return graph.forward

    cuts = {"keep_params": 0.2, "every_n_epochs": 1, "max_cuts": 10}
    expected = plain()
    fit(tmp_path / "plain", expected, PFAPruning(**cuts), max_epochs=12)
    module = plain()
    compiled = module
    if what == "module":
        compiled = torch.compile(module, backend=backend)
    elif what == "network":
        module.net.compile(backend=backend)
    else:
        module.training_step = torch.compile(module.training_step, backend=backend)
    callback = PFAPruning(**cuts)
    fit(tmp_path / "compiled", compiled, callback, max_epochs=12)
    assert len(callback.reports) == 10
    assert sizes >= {callback.reports[0].before.parameters, *(report.after.parameters for report in callback.reports)}
    assert module.net[0].out_features == expected.net[0].out_features < 40
    for (name, one), (_, other) in zip(module.named_parameters(), expected.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, msg=name)


class Recomputing(Small):
    """Keeps no activations of its first layers."""

    def __init__(self, reentrant, width=16):
        super().__init__(width)
        self.reentrant = reentrant

    def training_step(self, batch, batch_idx):
        inputs = batch[0].requires_grad_()  # the reentrant kind asks for it
        return F.cross_entropy(self.net[2:](checkpoint(self.net[:2], inputs, use_reentrant=self.reentrant)), batch[1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_activations_that_are_recomputed_change_nothing(reentrant, tmp_path):
    torch.manual_seed(1)
    expected = Small()
    fit(tmp_path, expected, PFAPruning(energy=0.9, at_epoch=1))
    torch.manual_seed(1)
    module = Recomputing(reentrant)
    fit(tmp_path, module, PFAPruning(energy=0.9, at_epoch=1))
    assert module.net[0].out_features < 16
    assert same(dict(module.state_dict()), dict(expected.state_dict()))


@pytest.mark.parametrize("inference_mode", [True, False])
def test_either_mode_of_validation_gives_the_same_run(inference_mode, tmp_path):
    module = plain()
    fit(tmp_path, module, PFAPruning(energy=0.9, at_epoch=1), inference_mode=inference_mode)
    other = plain()
    fit(tmp_path, other, PFAPruning(energy=0.9, at_epoch=1), inference_mode=not inference_mode)
    assert module.net[0].out_features < 40
    assert same(dict(module.state_dict()), dict(other.state_dict()))


class Tuned(LightningModule):
    """Has the attributes that Lightning's tuners write to."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.net, self.lr, self.batch_size = Small(width=40).net, 0.05, 4

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def train_dataloader(self):
        return DataLoader(vectors(), self.batch_size)

    def val_dataloader(self):
        return DataLoader(vectors(50, seed=1), 32)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


@pytest.mark.parametrize("first", [True, False], ids=["tuner first", "pruning first"])
@pytest.mark.parametrize(
    "tuner",
    [
        lambda: BatchSizeFinder(mode="power", steps_per_trial=2, init_val=2, max_trials=3),
        lambda: LearningRateFinder(num_training_steps=12),
    ],
    ids=["batch size", "learning rate"],
)
def test_a_tuner_before_training_neither_cuts_nor_hinders_the_cut(tuner, first, tmp_path):
    callback = PFAPruning(energy=0.9, at_epoch=1)
    callbacks = (tuner(), callback) if first else (callback, tuner())
    module = Tuned()
    new_trainer(tmp_path, *callbacks).fit(module)
    assert callback.schedule.cuts == [1]
    assert len(callback.reports) == 1
    assert callback.reports[0].before.parameters == count_parameters(Tuned())  # nothing was cut before
    assert module.net[0].out_features == callback.reports[0].recipe.widths["net.0"] < 40


class ByHand(Small):
    """Optimizes by itself, with two optimizers, and scaled gradients if asked to."""

    def __init__(self, scale):
        super().__init__(width=40)
        self.automatic_optimization = False
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=4)

    def training_step(self, batch, batch_idx):
        optimizers = [optimizer.optimizer for optimizer in self.optimizers()]
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(self.scaler.scale(F.cross_entropy(self.net(batch[0]), batch[1])))
        for optimizer in optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[:3].parameters(), 0.05, momentum=0.9), torch.optim.Adam(self.net[3:].parameters(), 0.01)]


def test_a_gradient_scaler_goes_on_through_two_cuts(tmp_path):
    runs = []
    for scale in (1.0, 1024.0):  # powers of two, so that scaling is exact
        torch.manual_seed(1)
        module = ByHand(scale)
        callback = PFAPruning(keep_params=0.4, every_n_epochs=2, max_cuts=2)
        fit(tmp_path / str(scale), module, callback, max_epochs=6)
        assert callback.schedule.cuts == [2, 4]
        assert module.scaler.get_scale() == scale * 2 ** (18 // 4)  # it has counted all 18 steps
        runs.append(module)
    assert runs[0].net[0].out_features < 40
    assert same(dict(runs[0].state_dict()), dict(runs[1].state_dict()))


# ---------------------------------------------------------------- what plain Lightning does not resume exactly


class Rates(Small):
    """A rate that falls when the loss stops falling."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.net, self.rates = Small(width=8).net, []

    def on_train_epoch_end(self):
        self.rates.append(self.optimizers().param_groups[0]["lr"])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.3)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", patience=1)  # a loss only falls
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val/loss"}}


@pytest.mark.parametrize("module", [plain, Rates], ids=["shuffled data", "ReduceLROnPlateau"])
def test_an_uncut_run_without_our_callbacks_is_not_resumed_exactly(module, tmp_path):
    """If this fails, Lightning has got better: take the entry out of docs/checkpoints.md."""

    def run(folder, ckpt_path=None):
        seed_everything(0, verbose=False)
        model = module()
        train, val = small_loaders()
        train = train if module is plain else DataLoader(vectors(), 32)
        trainer = new_trainer(folder, every_epoch(folder), max_epochs=6, enable_checkpointing=True)
        trainer.fit(model, train, val, ckpt_path=ckpt_path)
        return dict(model.state_dict())

    whole = run(tmp_path)
    assert same(run(tmp_path / "same"), whole)
    assert not same(run(tmp_path / "again", tmp_path / "epoch=2.ckpt"), whole)
