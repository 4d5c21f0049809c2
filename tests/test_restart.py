"""Fine-tuning by the full training's schedule: after a cut, learning rates are those of a run's beginning, step by step."""

import copy
import warnings

import pytest
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import StochasticWeightAveraging
from torch.nn import functional as F
from torch.optim import SGD, Adam
from torch.optim import lr_scheduler as schedulers

from lit_compress.callbacks import PFAPruning
from tests.modules import Small, every_epoch, fit_theirs, new_trainer, same, small_loaders, without_times

EPOCHS, STEPS = 4, 3  # of one training; 3 batches an epoch


class Halves:
    """A lambda with a state, which a checkpoint holds."""

    def __init__(self):
        self.calls = 0

    def __call__(self, epoch):
        self.calls += 1
        return 0.5**epoch


# Name to the scheduler on an optimizer, and how often it steps.
SCHEDULES = {
    "epochs": (lambda o: schedulers.StepLR(o, 2, gamma=0.1), "epoch"),
    "milestones": (lambda o: schedulers.MultiStepLR(o, [1, 3], gamma=0.1), "epoch"),
    "decay from the last rate": (lambda o: schedulers.ExponentialLR(o, 0.7), "step"),
    "function": (lambda o: schedulers.LambdaLR(o, lambda epoch: 0.9**epoch), "epoch"),
    "object": (lambda o: schedulers.LambdaLR(o, [Halves(), Halves()]), "epoch"),
    "cosine": (lambda o: schedulers.CosineAnnealingLR(o, EPOCHS), "epoch"),
    "warm restarts": (lambda o: schedulers.CosineAnnealingWarmRestarts(o, 5, T_mult=2), "step"),
    "one cycle": (lambda o: schedulers.OneCycleLR(o, [0.1, 0.2], total_steps=EPOCHS * STEPS), "step"),
    "cycles": (lambda o: schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=4, cycle_momentum="momentum" in o.defaults), "step"),
    "warm-up chain": (
        lambda o: schedulers.SequentialLR(
            o, [schedulers.LinearLR(o, 0.1, total_iters=5), schedulers.CosineAnnealingLR(o, 7)], [5]
        ), "step"),
    "chain": (
        lambda o: schedulers.ChainedScheduler([schedulers.ConstantLR(o, 0.1, 2), schedulers.ExponentialLR(o, 0.8)]), "epoch"),
    "nested chain": (
        lambda o: schedulers.SequentialLR(
            o, [schedulers.ChainedScheduler([schedulers.ConstantLR(o, 0.1, 2), schedulers.ExponentialLR(o, 0.8)]),
                schedulers.StepLR(o, 2)], [2]
        ), "epoch"),
    "plateau": (lambda o: schedulers.ReduceLROnPlateau(o, patience=0, cooldown=1), "epoch"),
}  # fmt: skip


class Scheduled(Small):
    """Two parameter groups, a schedule, and a metric that never improves; notes the rates of every step."""

    def __init__(self, build, interval, kind=SGD, frequency=1):
        super().__init__()
        self.build, self.interval, self.kind, self.frequency = build, interval, kind, frequency
        self.rates = []

    def training_step(self, batch, batch_idx):
        groups = self.optimizers().param_groups
        self.rates.append([(group["lr"], group.get("momentum"), group.get("betas")) for group in groups])
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("constant", 1.0)

    def configure_optimizers(self):
        groups = [{"params": self.net[0].parameters()}, {"params": self.net[2:].parameters(), "lr": 0.02, "weight_decay": 0.1}]
        optimizer = self.kind(groups, lr=0.05, **({"momentum": 0.9} if self.kind is SGD else {}))
        options = {"interval": self.interval, "monitor": "constant", "frequency": self.frequency}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.build(optimizer), **options}}


def fit(folder, module, *callbacks, epochs=2 * EPOCHS, **options):
    with warnings.catch_warnings():
        # A chain calls its parts so itself.
        warnings.filterwarnings("ignore", "The epoch parameter in `scheduler.step")
        trainer = new_trainer(folder, *callbacks, max_epochs=epochs, enable_checkpointing=len(callbacks) > 1)
        trainer.fit(module, *small_loaders(), **options)
    return trainer


def pruning(at_epoch=EPOCHS, **options):
    return PFAPruning(energy=0.9, at_epoch=at_epoch, **{"restart_schedule": True, **options})


@pytest.mark.parametrize("kind", [SGD, Adam], ids=["momentum", "betas"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_fine_tuning_has_the_rates_of_the_full_training(name, kind, tmp_path):
    build, interval = SCHEDULES[name]
    module = Scheduled(build, interval, kind)
    callback = pruning()
    fit(tmp_path, module, callback)
    assert callback.reports[0].recipe.keep
    before, after = module.rates[: EPOCHS * STEPS], module.rates[EPOCHS * STEPS :]
    assert after == before
    assert len(set(map(str, before))) > 1, "the rates change"


@pytest.mark.parametrize("name", ["milestones", "warm-up chain", "plateau"])
def test_without_it_the_running_schedule_goes_on(name, tmp_path):
    cut, plain = Scheduled(*SCHEDULES[name]), Scheduled(*SCHEDULES[name])
    fit(tmp_path, cut, pruning(restart_schedule=False))
    fit(tmp_path, plain)
    assert cut.rates == plain.rates
    assert cut.rates[EPOCHS * STEPS :] != cut.rates[: EPOCHS * STEPS]


def test_every_cut_starts_it_anew(tmp_path):
    module = Scheduled(*SCHEDULES["decay from the last rate"])
    callback = PFAPruning(energy=0.9, every_n_epochs=2, max_cuts=2, restart_schedule=True)
    fit(tmp_path, module, callback, epochs=6)
    assert [report.epoch for report in callback.reports] == [2, 4]
    parts = [module.rates[start * STEPS : (start + 2) * STEPS] for start in (0, 2, 4)]
    assert parts[0] == parts[1] == parts[2]


def test_all_but_the_rates_stays(tmp_path):
    """Optimizer state, and what a callback has set in the parameter groups."""

    class Decay(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            trainer.optimizers[0].param_groups[0]["weight_decay"] = 0.3

    module, state = Scheduled(*SCHEDULES["epochs"], Adam), {}

    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            state.setdefault(trainer.current_epoch, copy.deepcopy(trainer.optimizers[0].state_dict()))

    fit(tmp_path, module, pruning(), Decay(), Watch())
    assert state[EPOCHS]["param_groups"][0]["weight_decay"] == 0.3
    assert state[EPOCHS]["state"][0]["step"] == EPOCHS * STEPS


@pytest.mark.parametrize("name", ["warm-up chain", "plateau", "one cycle", "object"])
def test_a_resumed_run_ends_as_one_that_never_stopped(name, tmp_path):
    def run(folder, *callbacks, **options):
        torch.manual_seed(1)
        callback = PFAPruning(energy=0.9, every_n_epochs=2, max_cuts=2, restart_schedule=True)
        module = Scheduled(*SCHEDULES[name])
        trainer = fit(folder, module, callback, *callbacks, epochs=6, **options)
        ends = [module.state_dict(), trainer.optimizers[0].state_dict(), trainer.lr_scheduler_configs[0].scheduler.state_dict()]
        return module.rates, [*map(copy.deepcopy, ends), without_times(callback.state_dict())]

    rates, ends = run(tmp_path, every_epoch(tmp_path))
    assert rates[6:12] == rates[:6]
    # Lightning forgets a plateau's step when it resumes, in uncut runs too; but a restart comes after the first four.
    for epoch in range(4 if name == "plateau" else 5):
        assert torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)
        again, resumed = run(tmp_path / "again", ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert again == rates[(epoch + 1) * STEPS :], epoch
        assert same(resumed, ends), epoch


def test_clipped_accumulated_and_in_half_precision_as_well(tmp_path):
    options = {"energy": 0.9, "every_n_epochs": 2, "max_cuts": 2, "restart_schedule": True}
    with pytest.warns(UserWarning, match=r"OneCycleLR starts anew and is made for 35 steps, but training ends after 15 more"):
        whole, trainer = fit_theirs(tmp_path, PFAPruning(**options), every_epoch(tmp_path))
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 15  # three epochs of five steps
    for epoch in (1, 4):
        resumed, other = fit_theirs(tmp_path / "again", PFAPruning(**options), ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert same(dict(whole.state_dict()), dict(resumed.state_dict()))
        assert same(trainer.optimizers[0].state_dict(), other.optimizers[0].state_dict())


class TwoByHand(Small):
    """Two optimizers with a schedule each, stepped by the module itself."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization, self.rates = False, []

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        self.rates.append([optimizer.param_groups[0]["lr"] for optimizer in optimizers])
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer, schedule in zip(optimizers, self.lr_schedulers(), strict=True):
            optimizer.step()
            schedule.step()

    def configure_optimizers(self):
        optimizers = [SGD(self.net[0].parameters(), lr=0.1, momentum=0.9), Adam(self.net[2:].parameters(), lr=0.01)]
        return optimizers, [schedulers.ExponentialLR(optimizers[0], 0.9), schedulers.StepLR(optimizers[1], 4)]


def test_several_optimizers_start_anew(tmp_path):
    module = TwoByHand()
    fit(tmp_path, module, pruning())
    assert module.rates[EPOCHS * STEPS :] == module.rates[: EPOCHS * STEPS]
    assert len({rates[1] for rates in module.rates}) > 1


# ---------------------------------------------------------------- what ends too early, and what cannot be restarted


@pytest.mark.parametrize(
    ("build", "interval", "epochs", "said"),
    [
        (lambda o: schedulers.CosineAnnealingLR(o, 8), "epoch", 8, "made for 8 steps, but training ends after 4 more"),
        (lambda o: schedulers.CosineAnnealingLR(o, 4), "epoch", 8, None),
        (
            lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=24),
            "step",
            8,
            "made for 24 steps, but training ends after 12 more",
        ),
        (lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=12), "step", 8, None),
        (lambda o: schedulers.StepLR(o, 100), "epoch", 8, None),
    ],
)
def test_a_schedule_that_training_cuts_short_is_told(build, interval, epochs, said, tmp_path, recwarn):
    fit(tmp_path, Scheduled(build, interval), pruning(), epochs=epochs)
    told = [str(one.message) for one in recwarn if "starts anew" in str(one.message)]
    assert [said in one for one in told] == ([True] if said else [])


def test_a_module_without_schedule_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="needs a schedule, but `configure_optimizers` of Small returns none"):
        fit(tmp_path, Small(), pruning())


def test_a_schedule_that_the_module_steps_itself_is_refused(tmp_path):
    class Own(Scheduled):
        def lr_scheduler_step(self, scheduler, metric):
            scheduler.step(self.current_epoch)

    with pytest.raises(MisconfigurationException, match="Own overrides `lr_scheduler_step`"):
        fit(tmp_path, Own(*SCHEDULES["epochs"]), pruning())


def test_a_schedule_that_something_else_replaces_is_refused_and_nothing_is_cut(tmp_path):
    module = Scheduled(*SCHEDULES["epochs"])
    said = r"that was StepLR on 2 parameter group\(s\), and now it is SWALR on 2 parameter group\(s\)"
    with pytest.raises(MisconfigurationException, match=said):
        fit(tmp_path, module, pruning(), StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2))
    assert module.net[0].out_features == 16


def test_a_schedule_out_of_step_is_refused(tmp_path):
    fit(tmp_path, in_step := Scheduled(*SCHEDULES["epochs"], frequency=2), pruning())
    assert in_step.rates[EPOCHS * STEPS :] == in_step.rates[: EPOCHS * STEPS]
    said = "StepLR steps every 3 epochs by the Trainer's count, so it cannot start anew before epoch 4"
    with pytest.raises(MisconfigurationException, match=said):
        fit(tmp_path, Scheduled(*SCHEDULES["epochs"], frequency=3), pruning())


def test_a_checkpoint_that_does_not_know_the_beginning_is_refused(tmp_path):
    fit(tmp_path, Scheduled(*SCHEDULES["epochs"]), pruning(restart_schedule=False), every_epoch(tmp_path))
    with pytest.raises(MisconfigurationException, match="the checkpoint was written without it"):
        fit(tmp_path, Scheduled(*SCHEDULES["epochs"]), pruning(), ckpt_path=tmp_path / "epoch=1.ckpt")
