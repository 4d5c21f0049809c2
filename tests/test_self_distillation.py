"""The network before its first cut teaches what is left of it: by the loss written out, in any module, and leaving nothing."""

import copy

import pytest
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Callback, LightningModule, seed_everything
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler

from lit_compress import ranks
from lit_compress.callbacks import MagnitudePruning, PFAPruning, pruning
from lit_compress.losses import AttentionTransfer, CrossEntropy, Hint, KnowledgeDistillation, Term
from lit_compress.slicing import all_tensors
from lit_compress.teacher import Teacher
from tests.modules import At, Small, every_epoch, fit_theirs, new_trainer, same, small_loaders, vectors
from tests.test_ddp import ddp_trainer

DEFAULT_WEIGHT = 0.25
DISTIL = {"energy": 0.7, "at_epoch": 1, "evaluate": False, "distill_from_unpruned": True}


class CallsItself(Small):
    """Calls `self(x)`, so that it is the network itself; with dropout, which the teacher leaves out."""

    def __init__(self, width=16):
        super().__init__(width)
        self.net.insert(4, nn.Dropout(0.2))

    def forward(self, inputs):
        return self.net(inputs)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


class Keeps(Callback):
    """The batches of an epoch, and module and optimizer right before the first of them."""

    def __init__(self, epoch):
        self.epoch, self.batches = epoch, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == self.epoch:
            if not self.batches:
                self.module = copy.deepcopy(pl_module.net)
                self.optimizer = copy.deepcopy(trainer.optimizers[0].state_dict())
                self.rng = torch.get_rng_state()
            self.batches.append(batch)


def seeded(kind=Small):
    seed_everything(2, verbose=False)
    return kind()


def fit(folder, callback, *others, kind=Small, **options):
    module = seeded(kind)
    trainer = new_trainer(folder, *others, callback, **{"max_epochs": 2, **options})
    trainer.fit(module, *small_loaders())
    return module, trainer


@pytest.mark.parametrize("kind", [Small, CallsItself])
def test_an_epoch_after_the_cut_is_the_one_written_out_by_hand(kind, tmp_path):
    """Softened outputs at T = 4: T² times the divergence from the network right before the cut, in evaluation mode."""
    unpruned, keeps = [], Keeps(1)
    before = At(1, lambda trainer, module: unpruned.append(copy.deepcopy(module.net).eval()))
    module, trainer = fit(tmp_path, PFAPruning(**DISTIL), before, keeps, kind=kind)
    student, teacher = keeps.module, unpruned[0]
    assert student[0].out_features < teacher[0].out_features == 16

    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    optimizer.load_state_dict(keeps.optimizer)
    torch.set_rng_state(keeps.rng)
    added = []
    for inputs, labels in keeps.batches:
        logits = student(inputs)
        with torch.no_grad():
            soft = (teacher(inputs) / 4).softmax(1)
        added.append(16 * (soft * (soft.log() - (logits / 4).log_softmax(1))).sum(1).mean())
        optimizer.zero_grad()
        (F.cross_entropy(logits, labels) + DEFAULT_WEIGHT * added[-1]).backward()
        optimizer.step()
    for name, value in module.net.state_dict().items():
        torch.testing.assert_close(value, student.state_dict()[name], rtol=1e-4, atol=1e-6)
    logged = trainer.callback_metrics["train/unpruned/knowledge_distillation"].item()
    assert logged == pytest.approx(DEFAULT_WEIGHT * sum(map(float, added)) / len(added), rel=1e-4)


def test_nothing_is_different_before_the_cut_and_nothing_left_after_training(tmp_path):
    seen = []
    look = At(1, lambda trainer, module: seen.append(copy.deepcopy(module.state_dict())))
    module, _ = fit(tmp_path, PFAPruning(**DISTIL), look)
    fit(tmp_path, PFAPruning(**{**DISTIL, "distill_from_unpruned": False}), look)
    assert same(dict(seen[0]), dict(seen[1]))
    assert "training_step" not in vars(module)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert set(module.state_dict()) == set(Small().state_dict())


def test_the_teacher_stays_the_first_network_and_is_beside_the_weights_of_a_checkpoint(tmp_path):
    firsts = []
    look = At(1, lambda trainer, module: firsts.append(copy.deepcopy(dict(module.state_dict()))))
    cuts = {"energy": 0.8, "every_n_epochs": 1, "max_cuts": 2, "distill_from_unpruned": True}
    _, trainer = fit(tmp_path, PFAPruning(**cuts), look, every_epoch(tmp_path), max_epochs=4, enable_checkpointing=True)
    sizes = [report.after.parameters for report in trainer.callbacks[1].reports]
    assert sizes[0] > sizes[1]
    for epoch in (1, 2, 3):
        content = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)
        (state,) = [state["unpruned"] for name, state in content["callbacks"].items() if "PFAPruning" in name]
        assert same(state["tensors"], firsts[0])
        assert set(content["state_dict"]) == set(firsts[0])
        assert content["state_dict"]["net.0.weight"].shape[0] < 16
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert "callbacks" not in torch.load(tmp_path / "weights.ckpt", weights_only=True)


class Worsens(Small):
    """Says that it gets worse after the cut, however it trains."""

    def validation_step(self, batch, batch_idx):
        self.net(batch[0])
        self.log("val/accuracy", 0.9 if self.net[0].out_features == 16 else 0.2)


def test_a_network_that_is_put_back_whole_has_nothing_to_learn_from_itself(tmp_path):
    options = {"monitor": "val/accuracy", "mode": "max", "patience": 1, "max_drop": 1.0, "evaluate": True}
    callback = PFAPruning(**{**DISTIL, **options})
    teachers = []

    class Looks(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 0:
                teachers.append((pl_module.net[0].out_features, callback.self_distillation.state_dict() is not None))

    module, _ = fit(tmp_path, callback, Looks(), kind=Worsens, max_epochs=8)
    assert module.net[0].out_features == 16
    assert callback.self_distillation.state_dict() is None
    assert {has for width, has in teachers if width < 16} == {True}
    assert {has for width, has in teachers if width == 16} == {False}


# ---------------------------------------------------------------- any module


class TakesMore(LightningModule):
    """Its network takes two inputs, one by name, and gives a dict, of which a layer inside is read; a batch is skipped."""

    def __init__(self):
        super().__init__()
        self.network = TwoInputs()
        self.configure_optimizers = lambda: torch.optim.SGD(self.parameters(), lr=0.05)

    def training_step(self, batch, batch_idx):
        if batch_idx == 1:
            return None
        inputs, labels = batch
        return F.cross_entropy(self.network(inputs, scale=torch.tensor(2.0))["logits"], labels)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", F.cross_entropy(self.network(batch[0], scale=torch.tensor(2.0))["logits"], batch[1]))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, inputs, scale):
        return {"logits": self.head(self.hidden(scale * inputs).relu())}


class Squares(Term):
    def forward(self, student, teacher, labels):
        assert labels is None
        return (student["head"] - teacher["head"]).square().mean()


@pytest.mark.filterwarnings("ignore:.*`training_step` returned `None`")
def test_terms_read_layers_of_a_network_of_any_form(tmp_path):
    terms = [Squares(["head"], ["head"], name="mine"), Squares(["head"], ["head"], weight=3.0, name="thrice")]
    _, trainer = fit(tmp_path, PFAPruning(**{**DISTIL, "distill_from_unpruned": terms}), kind=TakesMore)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items() if "unpruned" in name}
    assert logged["train/unpruned/thrice"] == pytest.approx(3 * logged["train/unpruned/mine"])
    assert logged["train/unpruned/mine"] > 0


def test_a_teacher_takes_what_its_network_takes():
    network = TwoInputs()
    inputs = torch.rand(5, 6, dtype=torch.float64)
    found = Teacher(network, ["head"]).read(inputs, scale=torch.tensor(2.0, dtype=torch.float64))
    assert torch.equal(found["head"], network(inputs, torch.tensor(2.0, dtype=torch.float64))["logits"])


def test_with_accumulation_clipping_and_half_precision(tmp_path):
    options = {"energy": 0.8, "at_epoch": 1, "distill_from_unpruned": [AttentionTransfer(["body.4"])], "evaluate": False}
    _, trainer = fit_theirs(tmp_path, PFAPruning(**options), max_epochs=2)
    assert trainer.callback_metrics["train/unpruned/attention_transfer/body.4"] > 0


# ---------------------------------------------------------------- several processes


def learn_on_ranks(folder, batch_size):
    callback = PFAPruning(**DISTIL)
    trainer = ddp_trainer(folder, callback, max_epochs=3)
    module = seeded(Small)
    order = DistributedSampler(vectors(96), ranks.world_size(), ranks.rank(), shuffle=False)
    trainer.fit(module, DataLoader(vectors(96), batch_size, sampler=order), small_loaders()[1])
    return dict(module.state_dict()), callback.self_distillation.state_dict(), dict(trainer.callback_metrics)


def test_two_processes_learn_as_one_and_from_one_teacher(processes, tmp_path):
    """The order of samples is the loader's own, of which each rank takes every second: batches of 32 are 2 of 16."""
    alone, teacher, logged = learn_on_ranks(tmp_path / "one", 32)
    one, other = processes(2)(learn_on_ranks, tmp_path / "two", 16)
    assert ranks.world_size() == 1
    assert same(one[:2], other[:2])
    assert one[0]["net.0.weight"].shape == alone["net.0.weight"].shape
    for name, value in alone.items():
        torch.testing.assert_close(one[0][name], value, rtol=1e-4, atol=1e-6)  # sums of another order
    for name, value in teacher["tensors"].items():
        torch.testing.assert_close(one[1]["tensors"][name], value, rtol=1e-4, atol=1e-6)
    key = "train/unpruned/knowledge_distillation"
    assert one[2][key].item() == pytest.approx(logged[key].item(), rel=1e-4)


# ---------------------------------------------------------------- refusals


class InParts(Small):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net[4](self.net[:4](batch[0])), batch[1])


class Twice(Small):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]) + self.net(-batch[0]), batch[1])


class CallsNone(Small):
    def training_step(self, batch, batch_idx):
        hidden = F.linear(batch[0], self.net[0].weight, self.net[0].bias).relu()
        hidden = F.linear(hidden, self.net[2].weight, self.net[2].bias).relu()
        return F.cross_entropy(F.linear(hidden, self.net[4].weight, self.net[4].bias), batch[1])


class ManuallyTrained(Small):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.parametrize(
    ("kind", "terms", "text"),
    [
        (InParts, True, "the training step calls 'net.0' and then 'net.2'"),
        (Twice, True, "the training step calls 'net' and then 'net'"),
        (CallsNone, True, "CallsNone calls no module with parameters"),
        (ManuallyTrained, True, "ManuallyTrained optimizes manually.*`train/unpruned` cannot be added"),
        (Small, [Hint("2.weight")], "Sequential has no layer '2.weight' to read"),
    ],
)
def test_what_cannot_be_observed_is_refused_by_name_before_any_cut(kind, terms, text, tmp_path):
    module = seeded(kind)
    with pytest.raises(MisconfigurationException, match=text):
        new_trainer(tmp_path, PFAPruning(**{**DISTIL, "at_epoch": 2, "distill_from_unpruned": terms})).fit(
            module, *small_loaders()
        )
    assert module.net[0].out_features == 16
    assert "training_step" not in vars(module)


class Trainable(Term):
    def __init__(self):
        super().__init__()
        self.projection = nn.Linear(3, 3)

    def forward(self, student, teacher, labels):
        return self.projection(student[""]).sum()


@pytest.mark.parametrize(
    ("terms", "text"),
    [
        ([], "True, False, or hold at least one term"),
        (["logits"], "holds a str"),
        ([CrossEntropy()], "CrossEntropy in `distill_from_unpruned` reads labels"),
        ([KnowledgeDistillation()], r"KnowledgeDistillation .* reads labels.*`alpha=1.0`"),
        ([KnowledgeDistillation(alpha=0.5, form="paper")], "reads labels"),
        ([Trainable()], "Trainable in `distill_from_unpruned` has parameters"),
    ],
)
def test_terms_that_cannot_be_added_to_a_loss_are_refused_at_once(terms, text):
    with pytest.raises(MisconfigurationException, match=text):
        MagnitudePruning(keep_params=0.5, distill_from_unpruned=terms)


def test_two_callbacks_do_not_both_distil(tmp_path):
    first, second = (PFAPruning(energy=0.8, at_epoch=epoch, distill_from_unpruned=True) for epoch in (1, 2))
    with pytest.raises(MisconfigurationException, match="Two callbacks have `distill_from_unpruned`"):
        new_trainer(tmp_path, first, second).fit(Small(), *small_loaders())


def test_a_term_that_does_not_fit_the_cut_network_stops_the_cut_and_changes_nothing(tmp_path):
    callback = PFAPruning(**{**DISTIL, "distill_from_unpruned": [Hint("2")]})
    module, before = seeded(Small), []
    look = At(1, lambda trainer, pl_module: before.append(copy.deepcopy(dict(pl_module.state_dict()))))
    with pytest.raises(ValueError, match=r"After the cut, the `training_step` of Small fails: Expected hint layers of one shape"):
        new_trainer(tmp_path, look, callback).fit(module, *small_loaders())
    assert same(dict(module.state_dict()), before[0])
    assert callback.self_distillation.state_dict() is None


def test_a_cut_that_fails_leaves_no_teacher(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise ValueError("not today")

    monkeypatch.setattr(pruning, "cut", fails)
    callback = PFAPruning(**DISTIL)
    with pytest.raises(ValueError, match="not today"):
        fit(tmp_path, callback)
    assert callback.self_distillation.state_dict() is None


def test_a_run_that_was_cut_without_a_teacher_is_not_resumed_with_one(tmp_path):
    plain = {**DISTIL, "distill_from_unpruned": False}
    fit(tmp_path, PFAPruning(**plain), every_epoch(tmp_path), enable_checkpointing=True)
    with pytest.raises(MisconfigurationException, match="was cut without `distill_from_unpruned`"):
        new_trainer(tmp_path, PFAPruning(**DISTIL)).fit(Small(), *small_loaders(), ckpt_path=tmp_path / "epoch=1.ckpt")


class Uncopied(Small):
    def on_train_epoch_start(self):
        self.held = (thread for thread in ())


def test_a_module_that_cannot_be_copied_is_refused_by_name(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"Uncopied cannot be copied: .*generator"):
        fit(tmp_path, PFAPruning(**DISTIL), kind=Uncopied)


def test_the_teachers_tensors_are_its_own(tmp_path):
    callback = PFAPruning(**DISTIL)
    module, _ = fit(tmp_path, callback)
    ours = {tensor.data_ptr() for tensor in all_tensors(module).values()}
    assert not ours & {tensor.data_ptr() for tensor in callback.self_distillation.state_dict()["tensors"].values()}
