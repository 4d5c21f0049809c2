"""Weight decay scaled by compression ratio: its ratios, the optimizer's groups, schedulers, resume, and pruning beside it."""

import copy
import json
from pathlib import Path

import pytest
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.optim import SGD, AdamW, lr_scheduler
from torch.utils.data import DataLoader

from lit_compress import substitute_linear
from lit_compress.callbacks import CRSWeightDecay, PFAPruning
from lit_compress.layers import HashedLinear, RankFactorizedLinear, TensorTrainLinear
from lit_compress.models import wide_resnet50_2
from lit_compress.weight_decay import crs_ratios, scale_decay, split_groups
from tests.modules import Small, every_epoch, new_trainer, same, small_loaders, vectors

REFERENCE = json.loads((Path(__file__).parent / "reference" / "compressed_counts.json").read_text())["wrn_50_2"]
KINDS = {
    "Generic": ("rank_factorized", {}),
    "TensorTrain": ("tensor_train", {}),
    "Tucker": ("tucker", {"core": "tt"}),
    "Shuffle": ("shuffle", {}),
}


class Compressed(Small):
    """Its middle layer is of rank 2, its last a hashed one; biases and norms have no decay, as many have it."""

    def __init__(self, schedule=None, optimizer=SGD):
        super().__init__()
        self.net[2] = RankFactorizedLinear(16, 16, rank=2)
        self.net[4] = HashedLinear(16, 3, weights=12, seed=0)
        self.schedule, self.optimizer = schedule, optimizer

    def configure_optimizers(self):
        matrices = [p for p in self.parameters() if p.ndim > 1 or p is self.net[4].shared]
        biases = [p for p in self.parameters() if not any(p is other for other in matrices)]
        groups = [{"params": matrices, "name": "matrices"}, {"params": biases, "weight_decay": 0.0, "name": "biases", "mine": 7}]
        optimizer = self.optimizer(groups, lr=0.05, weight_decay=0.1)
        return optimizer if self.schedule is None else ([optimizer], [self.schedule(optimizer)])


RATIOS = {"net.2": 2 * 32 / 256, "net.4": 12 / 48}


def fit(folder, module, *callbacks, ckpt_path=None, **options):
    torch.manual_seed(5)
    trainer = new_trainer(folder, *callbacks, **options)
    trainer.fit(module, *small_loaders(), ckpt_path=ckpt_path)
    return trainer


def decay_of(trainer, parameter):
    (decay,) = (
        group["weight_decay"]
        for optimizer in trainer.optimizers
        for group in optimizer.param_groups
        if any(parameter is other for other in group["params"])
    )
    return decay


# --- ratios ----------------------------------------------------------------------------------------------------------------


def test_a_matrix_counts_its_own_numbers():
    module = Compressed()
    assert crs_ratios(module) == RATIOS
    assert crs_ratios(nn.Sequential(TensorTrainLinear(16, 32, rank_scale=0.5)))["0"] == (8 * 4 + 4 * 8 * 4 + 4 * 8) / 512


def test_a_layer_without_compression_has_the_plain_decay():
    assert crs_ratios(nn.Sequential(HashedLinear(8, 8, weights=64, seed=0))) == {"0": 1.0}


@pytest.mark.parametrize("row", [row for row in REFERENCE if row["conv"].split("_")[0] in KINDS], ids=lambda row: row["conv"])
def test_the_networks_ratio_is_that_of_the_released_runs(row):
    name, setting = row["conv"].split("_")
    kind, options = KINDS[name]
    with torch.device("meta"):
        network = substitute_linear(wide_resnet50_2(), kind, setting=float(setting), **options)
    (ratio,) = set(crs_ratios(network, "network").values())
    assert ratio == pytest.approx(row["crs_ratio_vs_Conv"], rel=1e-12)


# --- groups ----------------------------------------------------------------------------------------------------------------


def test_users_groups_stay_where_they_are_with_their_options(tmp_path):
    module = Compressed()
    trainer = fit(tmp_path, module, CRSWeightDecay(), max_epochs=1)
    matrices, biases, *new = trainer.optimizers[0].param_groups
    assert (matrices["weight_decay"], biases["weight_decay"], biases["mine"]) == (0.1, 0.0, 7)
    assert [p.shape for p in matrices["params"]] == [(16, 6)]
    assert len(biases["params"]) == 3  # those of the compressed layers too
    assert [group["name"] for group in new] == ["matrices/net.2", "matrices/net.4"]
    assert all(group["momentum"] == matrices["momentum"] and group["lr"] == 0.05 for group in new)
    assert decay_of(trainer, module.net[2].first) == decay_of(trainer, module.net[2].second) == pytest.approx(0.1 * 0.25)
    held = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert len(held) == len(set(held)) == len(list(module.parameters()))


@pytest.mark.parametrize("optimizer", [SGD, AdamW])
def test_one_step_is_that_of_an_optimizer_with_these_decays(optimizer):
    module = Compressed(optimizer=optimizer)
    twin = copy.deepcopy(module)
    ours = module.configure_optimizers()
    split_groups(ours, {name: module.get_submodule(name) for name in RATIOS})
    scale_decay(ours, crs_ratios(module))
    decays = [(p, 0.0 if "bias" in name else 0.1 * RATIOS.get(name.rpartition(".")[0], 1)) for name, p in twin.named_parameters()]
    theirs = optimizer([{"params": [p], "weight_decay": decay} for p, decay in decays], lr=0.05)
    batch = next(iter(small_loaders()[0]))
    for network, stepper in ((module, ours), (twin, theirs)):
        network.training_step(batch, 0).backward()
        stepper.step()
    for mine, other in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)


def test_splitting_twice_is_splitting_once():
    module = Compressed()
    optimizer = module.configure_optimizers()
    layers = {name: module.get_submodule(name) for name in RATIOS}
    split_groups(optimizer, layers)
    before = [dict(group) for group in optimizer.param_groups]
    split_groups(optimizer, layers)
    assert before == optimizer.param_groups


SCHEDULES = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 1, gamma=0.5),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda e: 0.9**e, lambda e: 0.5**e]),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, [0.1, 0.2], total_steps=10),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, [0.01, 0.02], [0.1, 0.2], step_size_up=2, cycle_momentum=False),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 1), lr_scheduler.CosineAnnealingLR(o, 5)], milestones=[1]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.ConstantLR(o, 0.5, 2)], optimizer=o
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_new_groups_have_the_rates_of_those_they_came_from(schedule, tmp_path):
    plain, scaled = [], []
    for seen, callbacks in ((plain, []), (scaled, [CRSWeightDecay()])):
        module = Compressed(schedule)
        module.on_train_epoch_end = lambda seen=seen, module=module: seen.append(
            [group["lr"] for group in module.trainer.optimizers[0].param_groups]
        )
        fit(tmp_path, module, *callbacks, LearningRateMonitor(), logger=CSVLogger(tmp_path))
    assert len(plain) == 3
    assert [rates[:2] for rates in scaled] == plain
    assert all(rates[2:] == [rates[0]] * 2 for rates in scaled)


def test_the_decay_follows_the_users(tmp_path):
    """Who changes the weight decay of a group while training changes that of the layers split off it, at the next epoch."""
    module, seen = Compressed(), []

    def halve():
        seen.append(decay_of(module.trainer, module.net[2].first))
        module.trainer.optimizers[0].param_groups[0]["weight_decay"] /= 2

    module.on_train_epoch_end = halve
    fit(tmp_path, module, CRSWeightDecay())
    assert seen == pytest.approx([0.1 * 0.25, 0.05 * 0.25, 0.025 * 0.25])


# --- lives -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["matrix", "network"])
def test_a_resumed_run_ends_as_one_that_never_stopped(mode, tmp_path):
    loader = DataLoader(vectors(), 32)  # in one order: Lightning alone restores no random states
    whole, again = Compressed(SCHEDULES["StepLR"]), Compressed(SCHEDULES["StepLR"])
    straight = new_trainer(tmp_path, CRSWeightDecay(mode), every_epoch(tmp_path), enable_checkpointing=True, max_epochs=4)
    straight.fit(whole, loader)
    resumed = new_trainer(tmp_path, CRSWeightDecay(mode), max_epochs=4)
    resumed.fit(again, loader, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert same(dict(again.state_dict()), dict(whole.state_dict()))
    one, other = (trainer.optimizers[0].state_dict() for trainer in (straight, resumed))
    assert same(one, other)
    assert len(one["param_groups"]) == 4


@pytest.mark.parametrize("crs_first", [True, False])
def test_a_pruning_callback_changes_the_ratio(crs_first, tmp_path):
    module = Compressed()
    callbacks = [CRSWeightDecay(), PFAPruning(energy=0.7, at_epoch=1)]
    trainer = fit(tmp_path, module, *(callbacks if crs_first else callbacks[::-1]))
    layer = module.net[2]
    assert layer.in_features < 16
    assert layer.first.shape == (layer.rank, layer.in_features)
    ratio = layer.rank * (layer.in_features + layer.out_features) / (layer.in_features * layer.out_features)
    assert crs_ratios(module)["net.2"] == pytest.approx(ratio)
    assert decay_of(trainer, layer.first) == pytest.approx(0.1 * ratio)
    assert decay_of(trainer, module.net[0].weight) == 0.1


def test_the_decays_are_logged_when_they_change(tmp_path):
    logger = CSVLogger(tmp_path)
    fit(tmp_path, Compressed(), CRSWeightDecay(), logger=logger)
    logger.save()
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    header = rows[0].split(",")
    columns = [header.index(f"compress/weight_decay/{name}") for name in RATIOS]
    logged = [[float(row.split(",")[c]) for c in columns] for row in rows[1:] if row.split(",")[columns[0]]]
    assert logged == [pytest.approx([0.025, 0.025])]


# --- refusals --------------------------------------------------------------------------------------------------------------


class Undecayed(Compressed):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


class Frozen(Compressed):
    def configure_optimizers(self):
        return SGD(self.net[0].parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Small, "Small has no compressed layer; replace some with"),
        (Undecayed, "LBFGS has no option `weight_decay`"),
        (Frozen, "No optimizer holds a parameter of a compressed layer"),
    ],
)
def test_says_what_is_wrong(module, message, tmp_path):
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, module(), CRSWeightDecay())
    with pytest.raises(MisconfigurationException, match="'matrix' or 'network' but got 'layer'"):
        CRSWeightDecay("layer")


def test_a_decay_of_zero_is_said_aloud(tmp_path):
    module = Compressed()
    module.configure_optimizers = lambda: SGD(module.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="it is 0 in all groups"):
        fit(tmp_path, module, CRSWeightDecay())
