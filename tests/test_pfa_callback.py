"""PFAPruning in a running Trainer, on modules that know nothing of it: what follows a cut, resumes, refusals, triggers."""

import copy
import pickle
import warnings
from types import SimpleNamespace

import pytest
import pytorch_lightning
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Callback, LightningDataModule, LightningModule
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, WeightedRandomSampler
from torchvision import transforms

from lit_compress import Recipe, count_mult_adds, count_parameters, load_pruned
from lit_compress.callbacks import PFAPruning
from lit_compress.modules import PrunableMixin
from lit_compress.plan import plan_of
from tests.modules import (
    EPOCHS,
    At,
    Draws,
    Small,
    Theirs,
    digits,
    every_epoch,
    fit_theirs,
    leaving_no_trace,
    needs_averaging,
    new_trainer,
    outcome,
    same,
    small_loaders,
    train_loader,
    val_loader,
    vectors,
)

CUTS = {"energy": 0.9, "every_n_epochs": 2, "max_cuts": 2}  # before epochs 2 and 4


@pytest.fixture(scope="module", params=["after the epoch", "after its validation"])
def whole(request, tmp_path_factory):
    """A run that was never stopped, with a checkpoint of every epoch."""
    folder = tmp_path_factory.mktemp("whole")
    saves = every_epoch(folder, save_on_train_epoch_end=request.param == "after the epoch")
    module, trainer = fit_theirs(folder, PFAPruning(**CUTS), Draws(), saves)
    return SimpleNamespace(folder=folder, module=module, trainer=trainer, ends=copy.deepcopy(outcome(trainer, module)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The same, with the checkpoints that Lightning writes by default; for tests that only read it."""
    folder = tmp_path_factory.mktemp("run")
    module, trainer = fit_theirs(folder, PFAPruning(**CUTS), every_epoch(folder))
    return SimpleNamespace(folder=folder, module=module, trainer=trainer, last=folder / f"epoch={EPOCHS - 1}.ckpt")


# ---------------------------------------------------------------- a run and its checkpoints


@pytest.mark.parametrize("epoch", range(EPOCHS - 1))
def test_a_resumed_run_ends_as_one_that_never_stopped(whole, epoch, tmp_path):
    """From before, between and after the two cuts, bit for bit, with shuffling, dropout, clipping and half precision."""
    saved = torch.load(whole.folder / f"epoch={epoch}.ckpt", weights_only=True)
    shapes = {tuple(saved["state_dict"]["body.0.weight"].shape)}
    assert shapes == {(12, 1, 3, 3)} if epoch < 2 else shapes != {(12, 1, 3, 3)}
    torch.rand(11)  # other random numbers than the first run had
    module, trainer = fit_theirs(tmp_path, PFAPruning(**CUTS), Draws(), ckpt_path=whole.folder / f"epoch={epoch}.ckpt")
    ends = outcome(trainer, module)
    for key, value in whole.ends.items():
        assert same(value, ends[key]), key


def test_a_run_stopped_in_the_middle_of_an_epoch_is_not_cut_again(tmp_path):
    """Lightning starts such an epoch's data anew, so that the weights differ; the cuts must not."""
    saves = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=3, filename="{step}")  # five steps an epoch
    module, _ = fit_theirs(tmp_path, PFAPruning(**CUTS), saves)
    for step, done in ((12, 1), (27, 2)):
        content = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        (state,) = [state for key, state in content["callbacks"].items() if "PFAPruning" in key]
        assert len(state["schedule"]["cuts"]) == len(state["reports"]) == done
        assert ("lit_compress" in content) == (done > 0)
        again = PFAPruning(**CUTS)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
            resumed, trainer = fit_theirs(
                tmp_path / "again", again, ckpt_path=tmp_path / f"step={step}.ckpt", enable_checkpointing=False
            )
        assert [report.epoch for report in again.reports] == [2, 4]
        assert trainer.global_step == 35
        if done == 2:
            assert plan_of(resumed) == plan_of(module)


def test_two_cuts_are_two_cuts(whole):
    reports = whole.trainer.callbacks[0].reports
    assert [report.epoch for report in reports] == [2, 4]
    sizes = [reports[0].before.parameters, reports[0].after.parameters, reports[1].before.parameters, reports[1].after.parameters]
    assert sizes[0] == count_parameters(Theirs()) > sizes[1] == sizes[2] > sizes[3] == count_parameters(whole.module)
    costs = [reports[0].before.mult_adds, reports[0].after.mult_adds, reports[1].after.mult_adds]
    assert costs[0] == count_mult_adds(Theirs(), torch.zeros(1, 1, 8, 8))
    assert costs[0] > costs[1] > costs[2] == count_mult_adds(whole.module, torch.zeros(1, 1, 8, 8))
    widths = reports[1].recipe.widths
    assert widths == {"body.0": whole.module.body[0].out_channels, "body.3": whole.module.body[3].out_channels}
    assert reports[1].recipe.original == {"body.0": 12, "body.3": 12, "head": 10}
    assert set(reports[0].recipe.keep["body.0"]) > set(reports[1].recipe.keep["body.0"])


def test_every_file_is_plain_data(run):
    for epoch in range(EPOCHS):
        content = torch.load(run.folder / f"epoch={epoch}.ckpt", weights_only=True)
        assert ("lit_compress" in content) == (epoch >= 2)


def test_a_pruned_checkpoint_is_validated_and_tested(run, tmp_path):
    loader = val_loader()
    (expected,) = new_trainer(tmp_path).validate(run.module, loader, verbose=False)
    for module in (Theirs(), copy.deepcopy(run.module)):
        module._metric_attributes = None  # Lightning keeps the ids of the metrics that were copied
        trainer = new_trainer(tmp_path, PFAPruning(**CUTS))
        assert trainer.validate(module, loader, ckpt_path=run.last, verbose=False) == [expected]
        (tested,) = trainer.test(module, loader, ckpt_path=run.last, verbose=False)
        assert tested["val/loss"] == expected["val/loss"]
        assert trainer.callbacks[0].reports, "its state was loaded"
        assert module.head.in_features == run.module.head.in_features < 48


def test_load_pruned_rebuilds_a_class_that_knows_nothing(run):
    images = digits(1000, 20).tensors[0]
    for module in (load_pruned(Theirs, run.last), load_pruned(Theirs, str(run.last), rate=1.0), load_pruned(Theirs(), run.last)):
        assert type(module) is Theirs
        assert same(module.state_dict(), run.module.state_dict())
        assert torch.equal(module.eval()(images), run.module.eval()(images))
        assert plan_of(module) == plan_of(run.module)
    assert load_pruned(Theirs, run.last, rate=1.0).rate == 1.0
    assert load_pruned(Theirs, run.folder / "epoch=0.ckpt").head.in_features == 48, "a file from before the cuts loads as well"


class Ours(PrunableMixin, Theirs):
    """One more base, and the module's own hooks go on working."""

    loaded = False

    def on_load_checkpoint(self, checkpoint):
        super().on_load_checkpoint(checkpoint)
        self.loaded = True


def test_the_mixin_loads_pruned_checkpoints_by_itself(run, tmp_path):
    module = Ours.load_from_checkpoint(run.last)
    assert same(module.state_dict(), run.module.state_dict())
    assert module.loaded
    # And its own files are read by the class without it, also when nothing but the mixin was there to note the cuts.
    trainer = new_trainer(tmp_path, enable_checkpointing=True)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "own.ckpt", weights_only=True)
    assert same(load_pruned(Theirs, tmp_path / "own.ckpt").state_dict(), module.state_dict())
    plain = Ours()
    new_trainer(tmp_path).validate(plain, val_loader(), ckpt_path=run.last, verbose=False)
    assert plan_of(plain) == plan_of(run.module), "a Trainer needs no callback for such a module"


def test_a_file_of_weights_alone_and_one_saved_after_the_fit_say_what_was_cut(tmp_path):
    weights = every_epoch(tmp_path, save_weights_only=True)
    trainer = new_trainer(tmp_path, PFAPruning(energy=0.8, at_epoch=1), weights, enable_checkpointing=True)
    module = Small()
    trainer.fit(module, *small_loaders())
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    trainer.save_checkpoint(tmp_path / "after_weights.ckpt", weights_only=True)
    for name in ("epoch=2.ckpt", "after.ckpt", "after_weights.ckpt"):
        assert same(load_pruned(Small, tmp_path / name).state_dict(), module.state_dict()), name


def test_a_checkpoint_of_another_cut_is_refused(run, tmp_path):
    module = copy.deepcopy(run.module)
    with pytest.raises(ValueError, match=r"cut already, by pfa.*, 2 times, but the checkpoint holds one cut by pfa"):
        new_trainer(tmp_path, PFAPruning(**CUTS)).validate(module, val_loader(), ckpt_path=run.folder / "epoch=2.ckpt")
    with pytest.raises(ValueError, match=r"but the checkpoint holds an uncut network\. Build the network anew"):
        load_pruned(module, run.folder / "epoch=0.ckpt")
    assert same(module.state_dict(), run.module.state_dict())


@pytest.mark.parametrize("other", [{"every_n_epochs": 3, "max_cuts": 2}, {"exclude": ["net.4"]}], ids=str)
def test_a_run_is_not_resumed_by_a_callback_that_would_cut_once_more(other, tmp_path):
    cuts = {"energy": 0.8, "at_epoch": 1}
    new_trainer(tmp_path, PFAPruning(**cuts), every_epoch(tmp_path), enable_checkpointing=True).fit(Small(), *small_loaders())
    options = {"energy": 0.8, **({"at_epoch": 1} if "exclude" in other else {}), **other}
    module, file = Small(), tmp_path / "epoch=1.ckpt"
    with pytest.raises(MisconfigurationException, match=r"was cut by PFAPruning.*'before epoch 1'.*which would cut it once more"):
        new_trainer(tmp_path, PFAPruning(**options), max_epochs=5).fit(module, *small_loaders(), ckpt_path=file)
    both = PFAPruning(**cuts), PFAPruning(energy=0.8, at_epoch=3)  # the way out for a second cut
    new_trainer(tmp_path, *both, max_epochs=5).fit(Small(), *small_loaders(), ckpt_path=file)
    assert [callback.schedule.cuts for callback in both] == [[1], [3]]


def test_a_later_format_is_refused_by_name(run, tmp_path):
    content = torch.load(run.last, weights_only=True)
    content["lit_compress"]["format"] = 9
    torch.save(content, tmp_path / "later.ckpt")
    for load in (
        lambda: load_pruned(Theirs, tmp_path / "later.ckpt"),
        lambda: Ours.load_from_checkpoint(tmp_path / "later.ckpt"),
        lambda: new_trainer(tmp_path, PFAPruning(**CUTS)).validate(Theirs(), val_loader(), ckpt_path=tmp_path / "later.ckpt"),
    ):
        with pytest.raises(ValueError, match="has format 9 but this version of lit-compress reads formats up to 2; upgrade"):
            load()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"])
def test_copies_of_a_pruned_module_are_modules_of_their_own(run, copied, tmp_path):
    module = copied(run.module)
    assert plan_of(module) == plan_of(run.module)
    assert same(module.state_dict(), run.module.state_dict())
    with torch.no_grad():
        module.head.weight.zero_()
    assert run.module.head.weight.any()

    fresh = Theirs()
    new_trainer(tmp_path, PFAPruning(**CUTS)).validate(fresh, val_loader(), verbose=False)  # which prepares it for checkpoints
    other = copied(fresh)
    other._metric_attributes = None
    new_trainer(tmp_path, PFAPruning(**CUTS)).validate(other, val_loader(), ckpt_path=run.last, verbose=False)
    assert other.head.in_features < fresh.head.in_features == 48, "what is done to a copy must not reach what it was copied from"
    checkpoint = {}
    other.on_save_checkpoint(checkpoint)
    assert checkpoint["lit_compress"]["plan"]


def test_a_second_fit_composes_and_loads_into_the_class_as_it_was(run, tmp_path):
    module = load_pruned(Theirs, run.last)
    before = plan_of(module)
    pruning = PFAPruning(keep_params=0.2, at_epoch=1)
    fit_theirs(tmp_path, pruning, every_epoch(tmp_path), module=module, max_epochs=3)
    assert count_parameters(module) <= 0.2 * count_parameters(Theirs()), "of the network that was never cut"
    assert plan_of(module).shapes == before.shapes
    (report,) = pruning.reports
    assert report.recipe.method == "pfa(energy=0.9), 2 times then pfa(keep_params=0.2)"
    again = load_pruned(Theirs, tmp_path / "epoch=2.ckpt")
    assert same(again.state_dict(), module.state_dict())
    # What is kept is told in the channels of the class as it was.
    assert set(report.recipe.keep["body.3"]) < set(before.recipe.keep["body.3"])


def test_a_callback_prunes_every_run_that_it_is_given_to(tmp_path):
    pruning = PFAPruning(energy=0.8)
    for epochs in (4, 2):
        module = Small()
        new_trainer(tmp_path, pruning, max_epochs=epochs).fit(module, *small_loaders())
        assert [report.epoch for report in pruning.reports] == [epochs // 2]
        assert module.net[0].out_features < 16


# ---------------------------------------------------------------- what follows a cut


def test_optimizer_and_schedule_go_on(tmp_path):
    looked = []

    def before(trainer, module):
        optimizer = trainer.optimizers[0]
        looked.append(
            {
                "optimizer": optimizer,
                "parameters": [id(p) for group in optimizer.param_groups for p in group["params"]],
                "options": copy.deepcopy([{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]),
                "state": copy.deepcopy(optimizer.state_dict()["state"]),
                "schedule": copy.deepcopy(trainer.lr_scheduler_configs[0].scheduler.state_dict()),
                "hooks": [module.head.weight.register_post_accumulate_grad_hook(lambda _: calls.append(1)), calls.clear()],
            }
        )
        module.body[4].bias.requires_grad_(False)
        module.head.weight.of_the_user = "kept"

    def after(trainer, module):
        (was,) = looked
        optimizer, plan = trainer.optimizers[0], plan_of(module)
        assert optimizer is was["optimizer"]
        assert [id(p) for group in optimizer.param_groups for p in group["params"]] == was["parameters"]
        assert [id(p) for p in module.parameters()] == was["parameters"]
        options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        assert options == was["options"]
        assert [group["part"] for group in options] == ["body", "head"]
        assert same(trainer.lr_scheduler_configs[0].scheduler.state_dict(), was["schedule"])
        names = [name for name, _ in module.named_parameters()]
        for index, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                expected = was["state"][index][key]
                if key != "step":
                    for dim, kept in plan.keep.get(names[index], {}).items():  # taken where the weights were taken
                        expected = expected.index_select(dim, torch.tensor(kept))
                assert torch.equal(value, expected), (names[index], key)
                assert key == "step" or value.shape == module.get_parameter(names[index]).shape
        assert not module.body[4].bias.requires_grad
        assert module.head.weight.of_the_user == "kept"
        assert module.training
        looked.append("after")

    calls = []
    _, trainer = fit_theirs(tmp_path, At(2, before), PFAPruning(energy=0.9, at_epoch=2), At(2, after))
    assert looked[1:] == ["after"]
    assert len(calls) == (EPOCHS - 2) * 9, "hooks on parameters fire at every backward"
    _, uncut = fit_theirs(tmp_path)
    schedules = [t.lr_scheduler_configs[0].scheduler.state_dict() for t in (trainer, uncut)]
    assert same(*schedules)
    assert trainer.global_step == uncut.global_step


def test_a_cut_leaves_the_random_numbers_of_training_alone(tmp_path):
    """The data come in the order of the run without a cut, in the epoch of the cut as well; later, dropout draws less."""

    class Records(Callback):
        def __init__(self):
            self.labels = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.labels += batch[1].tolist()

    with_cut, without = Records(), Records()
    fit_theirs(tmp_path, PFAPruning(energy=0.9, at_epoch=1), with_cut, max_epochs=2)
    fit_theirs(tmp_path, without, max_epochs=2)
    assert with_cut.labels == without.labels


def test_the_network_learns_after_the_cut(tmp_path):
    pruning = PFAPruning(keep_params=0.5, at_epoch=3)
    _, trainer = fit_theirs(tmp_path, pruning, max_epochs=EPOCHS)
    (report,) = pruning.reports
    assert report.after.parameters <= 0.5 * report.before.parameters
    names = {f"val/{name}" for name in ("right", "area", "mean", "loss", "total")}
    assert report.before.metrics.keys() == report.after.metrics.keys() == names
    assert trainer.callback_metrics["val/loss"] < report.after.metrics["val/loss"]
    assert report.before.latency.median > 0
    assert report.batch_size == 32


# ---------------------------------------------------------------- failures


class HardCoded(Small):
    """Its forward knows a width."""

    def validation_step(self, batch, batch_idx):
        hidden = self.net[1](self.net[0](batch[0])).view(-1, 16)
        self.log("val/loss", F.cross_entropy(self.net[2:](hidden), batch[1]))


class KnowsWidthInTraining(Small):
    def training_step(self, batch, batch_idx):
        hidden = self.net[0](batch[0])
        return super().training_step(batch, batch_idx) + 0 * hidden.view(len(hidden), 16).sum()


class Auxiliary(Small):
    """A head that only training runs."""

    def __init__(self):
        super().__init__()
        self.extra = nn.Linear(16, 3)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + F.cross_entropy(self.extra(self.net[:2](batch[0])), batch[1])


class Diverged(Small):
    def on_train_epoch_end(self):
        with torch.no_grad():
            self.net[2].bias[1] = float("nan")


class FailsOnceCut(Small):
    """Validates as long as it is whole."""

    def on_validation_epoch_end(self):
        if self.net[0].out_features < 16:
            raise ArithmeticError("on purpose")


class HoldsParameter(Small):
    """Does not say how its parameter begins."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


class Factored(torch.optim.SGD):
    """Keeps a row sum for each matrix, as memory-saving optimizers do."""

    def step(self, closure=None):
        loss = super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["rows"] = parameter.detach().flatten(1).sum(1) if parameter.ndim > 1 else None
        return loss


class WithFactored(Small):
    def configure_optimizers(self):
        return Factored(self.parameters(), lr=0.01, momentum=0.9)


FAILURES = {
    "unreachable": (
        Small,
        {"keep_params": 0.001},
        r"cannot be reached: with `min_width=1` the smallest network has 0\.\d+ of the",
    ),
    "self-check": (HardCoded, {"energy": 0.8}, r"does not run \(last layer that did: 'net\.0'\): shape '\[-1, 16\]' is invalid"),
    "training only": (KnowsWidthInTraining, {"energy": 0.8}, r"the `training_step` of KnowsWidthInTraining fails: .*16"),
    "auxiliary": (Auxiliary, {"energy": 0.8}, r"`validation_step`, which does not run 'extra'\. Run the same layers in both"),
    "not finite": (Diverged, {}, r"Layer 'net\.2' cannot be analysed: Responses must be finite but channels \[1\]"),
    "optimizer": (WithFactored, {"energy": 0.8}, r"Factored keeps 'rows' of shape \(16,\) for parameter 'net\.0\.weight'"),
    "no data": (Small, {"loader": DataLoader(TensorDataset(torch.zeros(0, 6)))}, "needs data, but its loader gave no batch"),
    "pattern": (Small, {"exclude": ["net.1"]}, r"Pattern 'net\.1' matches no layer; the layers are net\.0, net\.2, net\.4"),
    "after the cut": (FailsOnceCut, {"energy": 0.8}, "on purpose"),
    "after weights were drawn": (FailsOnceCut, {"energy": 0.8, "weights": "random"}, "on purpose"),
    "drawing weights": (
        HoldsParameter,
        {"energy": 0.8, "weights": "random"},
        r"'at the top' \(HoldsParameter\) holds",
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_cut_that_fails_changes_nothing_and_says_why(name, tmp_path):
    kind, options, text = FAILURES[name]
    pruning, module = PFAPruning(at_epoch=2, **options), kind()
    looked = []

    def cut(trainer, pl_module):
        state = copy.deepcopy(pruning.state_dict())
        pl_module.net[0].weight.grad = torch.ones_like(pl_module.net[0].weight)  # of an accumulation that is not over
        errors = (ValueError, ArithmeticError, MisconfigurationException)
        with leaving_no_trace(trainer, pl_module), pytest.raises(errors, match=text):
            pruning.cut_now(trainer, pl_module)
        assert same(state, pruning.state_dict())
        assert pruning.reports == []
        looked.append(True)

    new_trainer(tmp_path, At(1, cut), max_epochs=2).fit(module, *small_loaders())
    assert looked
    assert not (tmp_path / "compress").exists()
    assert "lit_compress_plan" not in vars(module)


def test_a_failed_cut_ends_the_fit_with_its_error(tmp_path):
    module = HardCoded()
    with pytest.raises(ValueError, match="cut"):
        new_trainer(tmp_path, PFAPruning(energy=0.8, at_epoch=1)).fit(module, *small_loaders())
    assert module.net[0].out_features == 16
    new_trainer(tmp_path, PFAPruning(energy=0.8, at_epoch=1, exclude=["net.0"])).fit(module, *small_loaders())
    assert module.net[0].out_features == 16 > module.net[2].out_features


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"energy": 0.9, "keep_params": 0.5}, r"at most one of .* but got \['energy', 'keep_params'\]"),
        ({"energy": 1.1}, r"`energy` must lie in \(0, 1\] but got 1.1"),
        ({"energy": 0}, r"`energy` must lie in \(0, 1\] but got 0"),
        ({"keep_params": 1.0}, r"`keep_params` must lie in \(0, 1\) but got 1.0"),
        ({"keep_mult_adds": 0.0}, r"`keep_mult_adds` must lie in \(0, 1\) but got 0.0"),
        ({"at_epoch": 1, "when": "converged"}, r"exactly one of .* but got \['at_epoch', 'when'\]"),
        ({"every_n_epochs": 2}, "needs `max_cuts`"),
        ({"include": "net.*"}, "`include` and `exclude` are lists of patterns"),
        ({"exclude": "net.*"}, "`include` and `exclude` are lists of patterns"),
        ({"min_width": 0}, "`min_width` must be at least 1 but got 0"),
        ({"weights": "new"}, "`weights` must be 'kept' or 'random' but got 'new'"),
        ({"weights": "random", "compensate": True}, "no bias is kept that `compensate=True` could be folded into"),
        ({"max_samples": 1}, "`max_samples` must be at least 2 or None but got 1"),
        ({"loader": "test"}, "`loader` must be 'train', 'val' or a DataLoader but got 'test'"),
        ({"loader": iter([1])}, "`loader` is an iterator, which runs dry"),
    ],
    ids=lambda value: (
        value if isinstance(value, str) else "-".join(value)
    ),  # values may hold addresses, which no two processes share
)
def test_refuses_contradictions_when_it_is_made(options, text):
    with pytest.raises(MisconfigurationException, match=text):
        PFAPruning(**options)


@pytest.mark.parametrize(
    ("options", "trainer_options", "text"),
    [
        ({"at_epoch": 3}, {}, r"due before epoch 3 \(counted from 0\), but training ends after 3 epochs"),
        ({}, {"max_epochs": -1, "max_steps": 5}, "has no `max_epochs`"),
        ({"exclude": ["net.9"]}, {}, r"Pattern 'net\.9' matches no module of Small"),
        ({"include": ["layer1.*"]}, {}, r"Pattern 'layer1\.\*' matches no module of Small"),
    ],
    ids=str,
)
def test_refuses_at_the_start_of_a_fit(options, trainer_options, text, tmp_path, monkeypatch):
    monkeypatch.setattr("pytorch_lightning.strategies.DDPStrategy.setup_environment", lambda self: None)
    with pytest.raises(MisconfigurationException, match=text):
        new_trainer(tmp_path, PFAPruning(**options), **trainer_options).fit(Small(), *small_loaders())


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"])
def test_refuses_strategies_that_shard_the_parameters(name):
    trainer = SimpleNamespace(strategy=type(name, (), {})(), world_size=1, global_step=0, max_epochs=4, fast_dev_run=False)
    with pytest.raises(MisconfigurationException, match=f"{name} shards the parameters.* `ApplyRecipe`"):
        PFAPruning().setup(trainer, Small(), "fit")
    PFAPruning().setup(trainer, Small(), "test")


def test_refuses_several_processes():
    trainer = SimpleNamespace(strategy=object(), world_size=4, global_step=0, max_epochs=4, fast_dev_run=False)
    with pytest.raises(MisconfigurationException, match="uses 4"):
        PFAPruning().setup(trainer, Small(), "fit")


def test_a_monitor_that_is_not_logged_is_told_after_the_first_validation(tmp_path):
    pruning = PFAPruning(when="converged", monitor="val/accuracy")
    with pytest.raises(MisconfigurationException, match=r"`monitor='val/accuracy'` is not logged; there are \['val/loss'\]"):
        new_trainer(tmp_path, pruning).fit(Small(), *small_loaders())


# ---------------------------------------------------------------- when


class Scripted(Small):
    """Logs what it is told to."""

    def __init__(self, values, name="val/loss"):
        super().__init__()
        self.values, self.name = values, name

    def validation_step(self, batch, batch_idx):
        self.net(batch[0])
        if self.name.startswith("val"):
            self.log(self.name, float(self.values[self.trainer.current_epoch]))

    def training_step(self, batch, batch_idx):
        if self.name.startswith("train"):
            self.log(self.name, float(self.values[self.trainer.current_epoch]))
        return super().training_step(batch, batch_idx)


def cuts_of(tmp_path, options, module=None, loaders=None, **trainer_options):
    pruning = PFAPruning(**{"energy": 0.97, "evaluate": False, **options})
    new_trainer(tmp_path, pruning, **trainer_options).fit(module or Small(), *(loaders or small_loaders()))
    return [report.epoch for report in pruning.reports]


@pytest.mark.parametrize(
    ("options", "epochs", "cuts"),
    [
        ({}, 5, [2]),
        ({"at_epoch": 0}, 2, [0]),
        ({"at_epoch": 1}, 2, [1]),
        ({"every_n_epochs": 2, "max_cuts": 2}, 8, [2, 4]),
        ({"every_n_epochs": 1, "max_cuts": 9}, 4, [1, 2, 3]),
    ],
    ids=str,
)
def test_cuts_before_the_epochs_asked_for(options, epochs, cuts, tmp_path):
    assert cuts_of(tmp_path, options, max_epochs=epochs) == cuts


@pytest.mark.parametrize(
    ("options", "values", "every", "cuts"),
    [
        ({"patience": 2}, [3, 2, 2, 2, 1, 1], 1, [4]),
        ({"patience": 2, "mode": "max"}, [1, 2, 2, 1, 1, 1], 1, [4]),
        ({"patience": 1, "max_cuts": 2}, [1, 2, 3, 4, 5, 6], 1, [2, 4]),
        # validated after epochs 1, 3, 5, 7: worse after 3 and 5
        ({"patience": 2}, [0, 1, 0, 2, 0, 3, 0, 4], 2, [6]),
    ],
    ids=str,
)
def test_cuts_when_converged(options, values, every, cuts, tmp_path):
    found = cuts_of(
        tmp_path, {"when": "converged", **options}, Scripted(values), max_epochs=len(values), check_val_every_n_epoch=every
    )
    assert found == cuts


def test_converges_on_a_metric_of_training_where_nothing_validates(tmp_path):
    options = {"when": "converged", "monitor": "train/loss", "patience": 1}
    module = Scripted([2, 1, 1, 1], "train/loss")
    assert cuts_of(tmp_path, options, module, max_epochs=4, limit_val_batches=0) == [3]
    assert cuts_of(tmp_path, options, Scripted([2, 1, 1, 1], "train/loss"), max_epochs=4) == [3]


@pytest.mark.parametrize("after", ["the epoch", "its validation"])
def test_waiting_for_convergence_is_resumed(after, tmp_path):
    values = [3, 2, 2, 2, 2, 2]
    options = {"when": "converged", "patience": 2, "energy": 0.97}
    pruning = PFAPruning(**options)
    saves = every_epoch(tmp_path, save_on_train_epoch_end=after == "the epoch")
    new_trainer(tmp_path, pruning, saves, max_epochs=6, enable_checkpointing=True).fit(Scripted(values), *small_loaders())
    for epoch in range(5):
        again = PFAPruning(**options)
        trainer = new_trainer(tmp_path / "again", again, max_epochs=6)
        trainer.fit(Scripted(values), *small_loaders(), ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert [report.epoch for report in again.reports] == [report.epoch for report in pruning.reports] == [4], epoch


def test_nothing_is_cut_without_training(tmp_path):
    pruning, module = PFAPruning(at_epoch=0), Small()
    trainer = new_trainer(tmp_path, pruning)
    trainer.validate(module, small_loaders()[1], verbose=False)
    module.test_step = module.validation_step
    assert pruning.reports == []
    assert plan_of(module) is None


def test_two_callbacks_cut_at_their_own_times(tmp_path):
    first = PFAPruning(energy=0.9, at_epoch=1, include=["net.0"])
    second = PFAPruning(energy=0.9, at_epoch=2, include=["net.2"])
    saves = every_epoch(tmp_path)
    trainer = new_trainer(tmp_path, first, second, saves, max_epochs=4, enable_checkpointing=True)
    module = Small()
    trainer.fit(module, *small_loaders())
    assert [[report.epoch for report in callback.reports] for callback in (first, second)] == [[1], [2]]
    assert set(second.reports[0].recipe.keep) == {"net.0", "net.2"}
    names = sorted(path.name for path in (tmp_path / "compress").glob("cut_*.txt"))
    assert names == ["cut_0_layers.txt", "cut_1_layers.txt"]
    for epoch in range(3):
        one, two = (PFAPruning(energy=0.9, at_epoch=n + 1, include=[f"net.{2 * n}"]) for n in range(2))
        again = Small()
        resumed = new_trainer(tmp_path / "again", one, two, max_epochs=4)
        resumed.fit(again, *small_loaders(), ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert same(again.state_dict(), module.state_dict()), epoch
        assert [len(one.reports), len(two.reports)] == [1, 1]


def test_two_callbacks_at_one_epoch_cut_their_own_layers(tmp_path):
    first, second = (PFAPruning(energy=0.9, at_epoch=1, include=[f"net.{n}"]) for n in (0, 2))
    module = Small()
    new_trainer(tmp_path, first, second, max_epochs=2).fit(module, *small_loaders())
    assert module.net[0].out_features < 16
    assert module.net[2].out_features < 16


def test_a_target_in_several_cuts_is_approached_in_equal_ratios(tmp_path):
    pruning = PFAPruning(keep_params=0.25, every_n_epochs=1, max_cuts=2)
    module, _ = fit_theirs(tmp_path, pruning, max_epochs=3)
    whole = pruning.reports[0].before.parameters
    kept = [report.after.parameters / whole for report in pruning.reports]
    assert 0.4 < kept[0] <= 0.5
    assert 0.15 < kept[1] <= 0.25
    assert count_parameters(module) == pruning.reports[1].after.parameters


# ---------------------------------------------------------------- kinds of runs


@pytest.mark.parametrize("options", [{}, {"at_epoch": 7}, {"every_n_epochs": 3, "max_cuts": 2}, {"when": "converged"}], ids=str)
def test_a_fast_dev_run_tries_the_cut(options, tmp_path, capsys):
    pruning, module = PFAPruning(keep_params=0.5, **options), Small()
    # Batches of 5, and the widest layer needs 16 samples to have a spectrum.
    new_trainer(tmp_path, pruning, fast_dev_run=True).fit(module, *small_loaders(batch_size=5))
    assert len(pruning.reports) == 1
    assert pruning.reports[0].after.parameters <= 0.5 * pruning.reports[0].before.parameters
    assert not (tmp_path / "compress").exists()


def test_a_run_on_a_few_batches_over_and_over(tmp_path):
    assert cuts_of(tmp_path, {"at_epoch": 1}, overfit_batches=2) == [1]


def test_a_module_without_validation_is_analysed_by_its_training_step(tmp_path):
    class OnlyTrains(Small):
        validation_step = LightningModule.validation_step

    module, pruning = OnlyTrains(), PFAPruning(energy=0.9, at_epoch=1)
    new_trainer(tmp_path, pruning).fit(module, small_loaders()[0])
    assert module.net[0].out_features < 16
    assert pruning.reports[0].before.metrics == {}


class Manual(Small):
    """Two optimizers, driven by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        return torch.optim.Adam(self.net[0].parameters()), torch.optim.SGD(self.net[2:].parameters(), lr=0.1, momentum=0.9)


def test_several_optimizers_under_manual_optimization(tmp_path):
    module = Manual()
    trainer = new_trainer(tmp_path, PFAPruning(energy=0.9, at_epoch=1))
    trainer.fit(module, *small_loaders())
    assert module.net[0].out_features < 16
    for optimizer in trainer.optimizers:
        for parameter, state in optimizer.state.items():
            for key in state.keys() & {"exp_avg", "exp_avg_sq", "momentum_buffer"}:
                assert state[key].shape == parameter.shape
    assert trainer.optimizers[0].state[module.net[0].weight]["step"] == 9


def test_manual_optimization_without_validation_is_refused(tmp_path):
    class Blind(Manual):
        validation_step = LightningModule.validation_step

    with pytest.raises(MisconfigurationException, match=r"Blind optimizes manually.* Give it a `validation_step`"):
        new_trainer(tmp_path, PFAPruning()).fit(Blind(), small_loaders()[0])


def test_the_best_checkpoint_is_one_of_the_cut_network(tmp_path):
    """An uncut network cannot be the best cut one, however much better it was; its file stays."""
    values = [1.0, 0.5, 9.0, 7.0, 8.0]
    best = ModelCheckpoint(tmp_path, monitor="val/loss", filename="{epoch}")
    stopping = EarlyStopping("val/loss", patience=2)
    pruning = PFAPruning(energy=0.97, at_epoch=2)
    trainer = new_trainer(tmp_path, best, stopping, pruning, max_epochs=5, enable_checkpointing=True)
    trainer.fit(Scripted(values), *small_loaders())
    assert trainer.current_epoch == 5, "patience begins anew as well"
    assert best.best_model_path == str(tmp_path / "epoch=3.ckpt")
    assert best.best_model_score == 7
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["epoch=1.ckpt", "epoch=3.ckpt"]
    module = Scripted([*values, 6.0])  # validated after the last epoch
    trainer.validate(module, small_loaders()[1], ckpt_path="best", verbose=False)
    assert plan_of(module) == plan_of(load_pruned(Scripted, tmp_path / "epoch=3.ckpt", values=values))
    assert "lit_compress" not in torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)


def test_the_best_network_starts_anew_at_the_top_as_well(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="val/loss", mode="max", filename="{epoch}")
    stopping = EarlyStopping("val/loss", mode="max", patience=2)
    pruning = PFAPruning(energy=0.97, at_epoch=1)
    trainer = new_trainer(tmp_path, best, stopping, pruning, max_epochs=4, enable_checkpointing=True)
    trainer.fit(Scripted([9.0, 1.0, 3.0, 2.0]), *small_loaders())
    assert trainer.current_epoch == 4
    assert best.best_model_score == 3


def average_of(trainer):
    (average,) = [callback._average_model for callback in trainer.callbacks if hasattr(callback, "_average_model")]
    return getattr(average, "module", average)


@needs_averaging
@pytest.mark.parametrize("first", [True, False])
def test_an_average_of_the_weights_is_cut_and_resumed_alike(first, tmp_path):
    def run(folder, **options):
        average = pytorch_lightning.callbacks.EMAWeightAveraging(decay=0.5)
        both = [average, PFAPruning(energy=0.9, at_epoch=1)]
        trainer = new_trainer(folder, *(both if first else both[::-1]), every_epoch(folder), enable_checkpointing=True)
        module = Small()
        trainer.fit(module, *small_loaders(), **options)
        return module, average_of(trainer)

    torch.manual_seed(5)
    module, average = run(tmp_path)
    assert module.net[0].out_features == average.net[0].out_features < 16
    for epoch in (0, 1):
        again, resumed = run(tmp_path / "again", ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert same(again.state_dict(), module.state_dict()), epoch
        assert same(resumed.state_dict(), average.state_dict()), epoch


def test_stochastic_averaging_goes_on(tmp_path):
    """The average before the cut is of the channels that stay."""
    averaging, seen = StochasticWeightAveraging(1e-2, swa_epoch_start=1), []
    before = At(3, lambda trainer, module: seen.append(copy.deepcopy(average_of(trainer).state_dict())))
    after = At(3, lambda trainer, module: seen.append(copy.deepcopy(average_of(trainer).state_dict())))
    module = Small()
    trainer = new_trainer(tmp_path, averaging, before, PFAPruning(energy=0.9, at_epoch=3), after, max_epochs=5)
    trainer.fit(module, *small_loaders())
    plan = plan_of(module)
    plan.apply_to(seen[0])
    assert same(seen[0], seen[1])
    assert module.net[0].out_features < 16


def test_a_cut_without_anything_to_remove_is_told(tmp_path):
    module = Small()
    with pytest.warns(UserWarning, match="PFAPruning found nothing to remove before epoch 1"):
        new_trainer(tmp_path, PFAPruning(energy=1.0, at_epoch=1, min_width=16)).fit(module, *small_loaders())
    assert plan_of(module) is None


# ---------------------------------------------------------------- data


class Watches(PFAPruning):
    """Notes what it was given to choose from."""

    def choose(self, analysis):
        self.analysis = analysis
        return super().choose(analysis)


def samples_seen(tmp_path, module=None, loaders=None, datamodule=None, **options):
    pruning = Watches(energy=0.9, at_epoch=1, evaluate=False, **options)
    data = (
        {"datamodule": datamodule}
        if datamodule
        else dict(zip(("train_dataloaders", "val_dataloaders"), loaders or small_loaders(), strict=True))
    )
    new_trainer(tmp_path, pruning, max_epochs=2).fit(module or Small(), **data)
    return pruning.analysis.samples


class Data(LightningDataModule):
    def train_dataloader(self):
        return small_loaders()[0]

    def val_dataloader(self):
        return small_loaders()[1]


class OffersData(Data):
    def analysis_dataloader(self):
        return DataLoader(vectors(40), 20)


class Offers(Small):
    def analysis_dataloader(self):
        return DataLoader(vectors(30), 20)


def test_the_data_asked_for_are_read(tmp_path):
    assert samples_seen(tmp_path) == 96
    assert samples_seen(tmp_path, loader="train") == 96
    assert samples_seen(tmp_path, loader="val") == 50
    assert samples_seen(tmp_path, loader=DataLoader(vectors(70), 32)) == 70
    assert samples_seen(tmp_path, loader=[vectors(20).tensors, vectors(30).tensors]) == 50
    assert samples_seen(tmp_path, max_samples=41) == 41
    assert samples_seen(tmp_path, datamodule=Data()) == 96
    assert samples_seen(tmp_path, datamodule=OffersData()) == 40
    assert samples_seen(tmp_path, datamodule=OffersData(), loader="train") == 96
    assert samples_seen(tmp_path, Offers()) == 30
    assert samples_seen(tmp_path, Offers(), datamodule=OffersData()) == 30


class Stream(IterableDataset):
    def __iter__(self):
        return zip(*vectors(48).tensors, strict=True)


def test_a_stream_is_read_from_its_start(tmp_path):
    assert samples_seen(tmp_path, loaders=(DataLoader(Stream(), 16), small_loaders()[1])) == 48


def test_several_training_loaders_need_a_choice(tmp_path):
    loaders = ({"a": small_loaders()[0], "b": small_loaders()[0]}, small_loaders()[1])

    class OfBoth(Small):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"], batch_idx)

    untrained = OfBoth()
    before = copy.deepcopy(untrained.state_dict())
    with pytest.raises(MisconfigurationException, match=r"needs one train loader but the Trainer has 2. Pass `loader=`"):
        samples_seen(tmp_path, untrained, loaders)
    assert same(untrained.state_dict(), before), "and not only at the cut"
    assert samples_seen(tmp_path, OfBoth(), loaders, loader="val") == 50


def test_a_weighted_sampler_is_kept(tmp_path):
    """The weights say which data the small network is for."""
    sampler = WeightedRandomSampler([1.0] * 48 + [0.0] * 48, 64)
    seen = []

    class Notes(Small):
        def validation_step(self, batch, batch_idx):
            seen.append(batch[0])
            return super().validation_step(batch, batch_idx)

    inputs = vectors().tensors[0]
    loaders = (DataLoader(vectors(), 32, sampler=sampler), small_loaders()[1])
    pruning = PFAPruning(energy=0.9, at_epoch=0, evaluate=False)
    new_trainer(tmp_path, pruning, max_epochs=1, limit_val_batches=0).fit(Notes(), *loaders)
    assert seen
    rows = torch.cat([batch for batch in seen if len(batch) == 32])
    assert all((inputs[:48] == row).all(1).any() for row in rows)


class Images(Dataset):
    def __init__(self, transform):
        self.transform, self.inputs = transform, vectors()

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        return self.inputs[index]


@pytest.mark.parametrize(
    ("transform", "told"),
    [
        (transforms.Compose([transforms.RandomHorizontalFlip()]), "RandomHorizontalFlip"),
        (transforms.TrivialAugmentWide(), "TrivialAugmentWide"),
        (transforms.ColorJitter(0.1), "ColorJitter"),
        (transforms.Normalize([0.5], [0.5]), None),
        (None, None),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "wrap", [lambda data: data, lambda data: Subset(data, range(90)), lambda data: data + data], ids=["", "subset", "sum"]
)
def test_augmented_data_are_used_with_a_warning(transform, told, wrap, tmp_path, recwarn):
    loaders = (DataLoader(wrap(Images(transform)), 32), small_loaders()[1])
    samples_seen(tmp_path, loaders=loaders)
    warned = [str(warning.message) for warning in recwarn if "augmented at random" in str(warning.message)]
    assert bool(warned) == (told is not None)
    if told:
        assert told in warned[0]
        assert "`analysis_dataloader()`" in warned[0]


def test_the_transfer_hooks_of_the_module_run(tmp_path):
    class Transfers(Small):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            if self.trainer.training:
                batch = (batch[0] + 1000, batch[1])  # an augmentation, for training alone
            return batch

        def training_step(self, batch, batch_idx):
            return super().training_step((batch[0] - 1000, batch[1]), batch_idx)

        def validation_step(self, batch, batch_idx):
            assert batch[0].abs().max() < 100
            return super().validation_step(batch, batch_idx)

    # Tried on the batch that validation sees, the training step would not be on its ground.
    assert samples_seen(tmp_path, Transfers()) == 96


def test_a_recipe_on_disk_rebuilds_a_plain_state_dict(run):
    recipe = run.trainer.callbacks[0].reports[-1].recipe
    assert recipe == Recipe.load(run.folder / "compress" / "recipe.json")
    again = load_pruned(Theirs(), run.module.state_dict(), recipe=run.folder / "compress" / "recipe.json")
    assert same(again.state_dict(), run.module.state_dict())
    trained = train_loader()
    assert len(trained) == 9
