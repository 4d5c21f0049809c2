"""What begins anew after a cut: schedules with `restart_schedule`, weights with `weights="random"`."""

import copy

import pytest
import pytorch_lightning
import torch
from pytorch_lightning import Callback
from torch.optim import lr_scheduler

from lit_compress.callbacks import PFAPruning
from lit_compress.schedules import WarmupStepLR
from tests.modules import (
    EPOCHS,
    At,
    Small,
    every_epoch,
    fit_theirs,
    needs_averaging,
    new_trainer,
    same,
    small_loaders,
    without_times,
)


class Rates(Callback):
    """Each optimizer step's options, as every group has them."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append([{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups])


class Scheduled(Small):
    def __init__(self, schedule):
        super().__init__()
        self.schedule = schedule

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.schedule(optimizer), "monitor": "val/loss"}}


SCHEDULES = {
    "steps": lambda optimizer: lr_scheduler.StepLR(optimizer, 2, gamma=0.1),
    "warm-up": lambda optimizer: WarmupStepLR(optimizer, warmup=2, start=0.1, step_size=1, gamma=0.5),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=4),
    "in turn": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.ConstantLR(optimizer, 0.1, 2), lr_scheduler.ExponentialLR(optimizer, 0.5)], milestones=[2]
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_begins_anew_at_the_cut(name, tmp_path):
    rates = Rates()
    trainer = new_trainer(tmp_path, PFAPruning(at_epoch=4, restart_schedule=True), rates, max_epochs=8)
    trainer.fit(Scheduled(SCHEDULES[name]), *small_loaders())
    assert len(rates.seen) == 24  # 3 steps an epoch
    assert rates.seen[12:] == rates.seen[:12]
    assert rates.seen[0] != rates.seen[11]


def test_a_plateau_is_waited_for_anew(tmp_path):
    """A schedule that goes by a metric forgets the best one that it has seen."""
    module = Scheduled(lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", patience=0))  # the loss only falls
    rates, state = Rates(), []
    look = At(4, lambda trainer, _: state.append(trainer.lr_scheduler_configs[0].scheduler.state_dict()))
    trainer = new_trainer(tmp_path, PFAPruning(at_epoch=4, restart_schedule=True), look, rates, max_epochs=5)
    trainer.fit(module, *small_loaders())
    assert rates.seen[11][0]["lr"] < 0.05 == rates.seen[12][0]["lr"]
    assert (state[0]["best"], state[0]["num_bad_epochs"]) == (-torch.inf, 0)


def test_a_schedule_of_steps_begins_anew_and_is_resumed(tmp_path):
    """OneCycleLR over two groups of AdamW, which also moves their momentum; resumed from before and from after the cut."""

    def run(folder, **options):
        rates, pruning = Rates(), PFAPruning(at_epoch=4, energy=0.9, restart_schedule=True)
        module, trainer = fit_theirs(folder, pruning, rates, every_epoch(folder), **options)
        state = trainer.lr_scheduler_configs[0].scheduler.state_dict()
        return rates.seen, {"weights": module.state_dict(), "schedule": state, "callback": without_times(pruning.state_dict())}

    seen, ends = run(tmp_path)
    steps = len(seen) // EPOCHS
    assert seen[4 * steps :] == seen[: 3 * steps]
    for epoch in (1, 5):
        again, resumed = run(tmp_path / "again", ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert again == seen[(epoch + 1) * steps :]
        assert same(ends, resumed), epoch


def after_a_cut(folder, weights, *callbacks, module=None, seed=0):
    """Module and optimizer right after the cut before epoch 1."""
    torch.manual_seed(seed)
    module, seen = module or Small(), []
    look = At(1, lambda trainer, module: seen.append(copy.deepcopy((module.state_dict(), trainer.optimizers[0].state_dict()))))
    pruning = PFAPruning(energy=0.9, at_epoch=1, weights=weights)
    new_trainer(folder, *callbacks, pruning, look, max_epochs=3).fit(module, *small_loaders())
    return *seen[0], module, pruning


def test_random_weights_are_new_ones_in_the_same_architecture(tmp_path):
    kept, steps, *_ = after_a_cut(tmp_path, "kept")
    drawn, none, module, pruning = after_a_cut(tmp_path, "random")
    assert {name: value.shape for name, value in drawn.items()} == {name: value.shape for name, value in kept.items()}
    assert not any((drawn[name] == kept[name]).any() for name in kept)
    for layer in ("net.2", "net.4"):  # as torch begins a linear layer: uniform within 1 / sqrt(inputs), as many as are left
        bound = drawn[f"{layer}.weight"].shape[1] ** -0.5
        assert 0.8 * bound < drawn[f"{layer}.weight"].abs().max() <= bound
    assert steps["state"]
    assert not none["state"]
    assert pruning.reports[0].after.metrics["val/loss"] > 1  # ln 3 is chance
    assert not any(torch.equal(value, drawn[name]) for name, value in module.state_dict().items())  # and it has learnt


def test_random_weights_follow_the_seed_of_the_run(tmp_path):
    first, again, other = (after_a_cut(tmp_path, "random", seed=seed)[0] for seed in (0, 0, 1))
    assert same(first, again)
    assert not torch.equal(first["net.4.bias"], other["net.4.bias"])


@needs_averaging
def test_an_average_begins_at_the_random_weights(tmp_path):
    average, seen = pytorch_lightning.callbacks.EMAWeightAveraging(decay=0.5), []
    look = At(1, lambda *_: seen.append(copy.deepcopy(average._average_model.module.state_dict())))
    torch.manual_seed(0)
    pruning = PFAPruning(energy=0.9, at_epoch=1, weights="random")
    drawn = []
    also = At(1, lambda trainer, module: drawn.append(copy.deepcopy(module.state_dict())))
    new_trainer(tmp_path, average, pruning, look, also, max_epochs=2).fit(Small(), *small_loaders())
    assert same(seen[0], drawn[0])
