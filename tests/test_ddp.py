"""Pruning in several processes: what they see together, one cut, one network afterwards; nobody waits for one that failed."""

import contextlib
import copy
import csv
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Callback, LightningModule, seed_everything
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, WeightedRandomSampler

from lit_compress import Stopwatch, count_parameters, ranks
from lit_compress.callbacks import (
    CompressionMonitor,
    CRSWeightDecay,
    PFAPruning,
    PIBPruning,
    SlimmingPruning,
    VIBPruning,
    pruning,
)
from lit_compress.gates import gates_of
from lit_compress.layers import RankFactorizedLinear
from lit_compress.selection import pib
from lit_compress.skips import Tap
from lit_compress.statistics import StreamingCovariance, StreamingEntropies, StreamingMean, gather_covariances
from lit_compress.statistics.covariance import spatial_max
from lit_compress.statistics.gather import Watched, gather, in_order
from tests.modules import (
    CLOCK,
    At,
    Small,
    Theirs,
    digits,
    every_epoch,
    everything,
    fit_theirs,
    new_trainer,
    rng_states,
    same,
    small_loaders,
    val_loader,
    without_times,
)
from tests.processes import Processes

THREE = pytest.param(3, marks=pytest.mark.long)


# ---------------------------------------------------------------- what they run


class Plain(LightningModule):
    """Convolutions with batch norm and nothing that draws random numbers, so that a training can be done again by hand."""

    def __init__(self, unused=False):
        super().__init__()
        torch.manual_seed(5)
        self.net = nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
            nn.Conv2d(12, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10),
        )  # fmt: skip
        self.unused = nn.Linear(3, 3) if unused else None

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train/loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


class Seen(Callback):
    """Keeps the batches of an epoch, and network and optimizer right before its first."""

    def __init__(self, epoch):
        self.epoch, self.batches, self.start = epoch, [], None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == self.epoch:
            if self.start is None:
                self.start = weights(pl_module), copy.deepcopy(trainer.optimizers[0].state_dict())
            self.batches.append(batch)


def weights(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def ddp_trainer(folder, *callbacks, **options):
    size = ranks.world_size()
    several = {"strategy": "ddp", "devices": size} if size > 1 else {}
    return new_trainer(folder, *callbacks, **{**several, **options})


def only_weights_that_ranks_share(state):
    return {name: value for name, value in state.items() if "running" not in name and "tracked" not in name}


def cut_at_once(folder, options, module=Theirs, count=287):
    """Recipe, reports and weights right after a cut before any training."""
    seed_everything(1, verbose=False)
    callback, seen = PFAPruning(at_epoch=0, **options), Seen(0)
    torch.manual_seed(7)
    model = module()
    trainer = ddp_trainer(folder, callback, seen, max_epochs=1, logger=CSVLogger(folder))
    trainer.fit(model, DataLoader(digits(0, count), 32, shuffle=True), val_loader())
    report = callback.reports[0]
    return report.recipe.to_dict(), dict(report.before.metrics), dict(report.after.metrics), seen.start[0]


@pytest.mark.parametrize("size", [2, THREE])
@pytest.mark.parametrize(
    "options",
    [{}, {"energy": 0.9, "max_samples": 151, "compensate": True}, {"select": "reconstruction", "compensate": "linear"}],
    ids=["kl", "energy", "linear"],
)
def test_any_number_of_processes_gives_the_same_recipe_from_the_same_data(processes, size, options, tmp_path):
    recipe, before, after, alone = cut_at_once(tmp_path / "one", options)
    assert any(width < 12 for width in map(len, recipe["keep"].values()))  # something was cut
    for theirs in processes(size)(cut_at_once, tmp_path / "several", options):
        assert theirs[0] == recipe
        for name, value in alone.items():
            torch.testing.assert_close(theirs[3][name], value, rtol=1e-5, atol=1e-6)
        # 150 validation samples divide by 2 and 3, so that no sampler repeats one; losses are sums of each rank's samples.
        for ours, found in ((before, theirs[1]), (after, theirs[2])):
            assert found.keys() == ours.keys()
            for name in ("val/right", "val/area", "val/mean", "val/loss"):
                assert found[name] == pytest.approx(ours[name], rel=1e-4), name
            assert found["val/total"] == pytest.approx(ours["val/total"] / size, rel=1e-4)
    assert len(list((tmp_path / "several").rglob("summary.json"))) == 1


def vib_until_the_cut(folder, several):
    """Gates and weights after two epochs on the same samples, on one rank in batches as large as those of all together."""
    seed_everything(0, verbose=False)
    torch.manual_seed(7)
    model = Plain()
    for norm in (model.net[1], model.net[4]):  # statistics of a batch would differ with its size
        norm.eval(), norm.register_forward_pre_hook(lambda module, args: module.eval() and None)
    callback = VIBPruning(at_epoch=2, kl_scale=1e-3, gate_lr=0.05, keep_params=0.6, evaluate=False)

    def without_noise(trainer, module):
        for gate in gates_of(module).of_noise().values():
            gate.log_var.data.fill_(-60)
            gate.mu.data.copy_(torch.linspace(0.8, 1.2, len(gate.mu)))

    noiseless = At(0, without_noise)
    seen = {}
    cut_now = callback.cut_now

    def watched(trainer, module):
        seen.update(weights(module))
        cut_now(trainer, module)

    callback.cut_now = watched
    trainer = ddp_trainer(
        folder, noiseless, callback, max_epochs=3, precision="64-true", use_distributed_sampler=False
    )  # Adam makes much of a rounding
    mine = Subset(digits(0, 256), range(ranks.rank(), 256, ranks.world_size()))
    trainer.fit(model, DataLoader(mine, 16 if several else 32), val_loader())
    return seen, callback.reports[0].recipe.to_dict()


def test_gates_take_the_step_of_the_averaged_gradient(processes, tmp_path):
    alone, recipe = vib_until_the_cut(tmp_path / "one", several=False)
    assert any("lit_compress_gates" in name for name in alone)
    found = processes(2)(vib_until_the_cut, tmp_path / "several", True)
    for weights_of_rank, theirs in found:
        for name, value in alone.items():
            torch.testing.assert_close(weights_of_rank[name], value, rtol=1e-6, atol=1e-8)
        assert theirs == recipe


def train_on(folder, batch, epochs, count, strategy):
    """Weights after the last epoch, of which the batches are kept as well."""
    model, seen = Plain(unused=bool(strategy.get("find_unused_parameters"))), Seen(epochs - 1)
    callback = PFAPruning(at_epoch=epochs - 1, energy=0.9, evaluate=False)
    trainer = ddp_trainer(folder, callback, seen, max_epochs=epochs, strategy=DDPStrategy(**strategy))
    inside = []
    seen.on_train_batch_end = lambda *args: inside.append(only_weights_that_ranks_share(weights(model)))
    trainer.fit(model, DataLoader(digits(0, count), batch, shuffle=True), val_loader())
    return callback.reports[0].recipe.widths, seen.start, seen.batches, weights(model), inside[-len(seen.batches) :]


def by_hand(start, batches_of_ranks, widths, steps):
    """Train one network on the mean of the ranks' gradients."""
    model = Plain()
    state, optimizer_state = start
    model.net[0] = nn.Conv2d(1, widths["net.0"], 3, padding=1)
    model.net[1] = nn.BatchNorm2d(widths["net.0"])
    model.net[3] = nn.Conv2d(widths["net.0"], widths["net.3"], 3, padding=1)
    model.net[4] = nn.BatchNorm2d(widths["net.3"])
    model.net[8] = nn.Linear(4 * widths["net.3"], widths["net.8"])
    model.net[10] = nn.Linear(widths["net.8"], 10)
    model.load_state_dict({name: value for name, value in state.items() if not name.startswith("unused")})
    parameters = list(model.parameters())
    momenta = [optimizer_state["state"][index]["momentum_buffer"].clone() for index in range(len(parameters))]
    for step in range(steps):
        parts = []
        for batches in batches_of_ranks:
            inputs, labels = batches[step]
            parts.append(torch.autograd.grad(F.cross_entropy(model.net(inputs), labels), parameters))
        with torch.no_grad():
            for parameter, momentum, *grads in zip(parameters, momenta, *parts, strict=True):
                momentum.mul_(0.9).add_(sum(grads) / len(grads))
                parameter.sub_(0.02 * momentum)
    return model


@pytest.mark.parametrize(
    ("size", "batch", "count"),
    [(2, 16, 200), pytest.param(2, 13, 1300, marks=pytest.mark.long), pytest.param(3, 8, 1201, marks=pytest.mark.long)],
)
@pytest.mark.parametrize(
    "strategy", [{}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True, "static_graph": True}], ids=str
)
def test_after_the_cut_every_rank_takes_the_step_of_the_averaged_gradient(processes, size, batch, count, strategy, tmp_path):
    found = processes(size)(train_on, tmp_path, batch, 2, count, strategy)
    widths, start, batches, end, inside = found[0]
    assert len(batches) >= (50 if count > 1000 else 6)
    assert not same(batches[0], found[1][2][0])  # each rank has data of its own
    for theirs in found[1:]:
        assert theirs[0] == widths
        assert len(theirs[4]) == len(batches)
        assert same(theirs[4], inside)  # bit for bit, after every step
        assert same(only_weights_that_ranks_share(theirs[1][0]), only_weights_that_ranks_share(start[0]))
    ours = by_hand(start, [theirs[2] for theirs in found], widths, len(batches))
    assert not any(torch.equal(end[name], start[0][name]) for name in ("net.0.weight", "net.3.weight", "net.8.weight"))
    for name, value in ours.named_parameters():
        torch.testing.assert_close(end[name], value.data, rtol=1e-3, atol=1e-4)


def halved(state, bucket):
    """A communication hook: sums the gradients of all ranks in half their size and twice their number."""
    parts = bucket.buffer().double() / ranks.world_size()
    future = torch.distributed.all_reduce(parts, async_op=True).get_future()
    return future.then(lambda done: done.value()[0].float())


def test_a_communication_hook_is_there_again_after_the_cut(processes, tmp_path):
    (widths, start, mine, end, _), (_, _, theirs, _, _) = processes(2)(train_on, tmp_path, 16, 2, 200, {"ddp_comm_hook": halved})
    ours = by_hand(start, [mine, theirs], widths, len(mine))
    for name, value in ours.named_parameters():
        torch.testing.assert_close(end[name], value.data, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gradients_compressed_to_half_precision_survive_a_cut_on_cuda(tmp_path):
    strategy = DDPStrategy(process_group_backend="nccl", ddp_comm_hook=fp16_compress_hook)
    callback, model = PFAPruning(at_epoch=1, energy=0.9), Plain()
    trainer = new_trainer(tmp_path, callback, strategy=strategy, accelerator="gpu", devices=1, max_epochs=2)
    trainer.fit(model, DataLoader(digits(0, 100), 16), val_loader())
    assert callback.reports[0].recipe.widths["net.0"] == len(model.net[0].weight) < 12
    assert all(parameter.isfinite().all() for parameter in model.parameters())


class Sleepy(Theirs):
    """Takes a millisecond for each channel of its first layer."""

    def forward(self, images):
        CLOCK.sleep(0.001 * len(self.body[0].weight))
        return super().forward(images)


def cut_to_a_latency(folder, options):
    """As :func:`cut_at_once`, and how many networks this rank has timed against the original."""
    timed, compare = [], Stopwatch.compare
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stopwatch, "compare", lambda self, plan: timed.append(plan) or compare(self, plan))
        patch.setattr("lit_compress.callbacks.steps.Stopwatch", partial(Stopwatch, seconds=0.02))
        patch.setattr("lit_compress.report.time", CLOCK)
        try:
            return *cut_at_once(folder, options, module=Sleepy), len(timed)
        except ValueError as error:
            return str(error)


def test_one_rank_times_for_all(processes, tmp_path):
    found = processes(2)(cut_to_a_latency, tmp_path, {"keep_latency": 0.6, "include": ["body.0"]})
    assert found[0][0] == found[1][0]
    assert len(found[0][0]["keep"]["body.0"]) == 7  # of 12, 0.6 are 7.2
    assert same(only_weights_that_ranks_share(found[0][3]), only_weights_that_ranks_share(found[1][3]))
    assert found[0][4] > 5
    assert found[1][4] == 0


def test_a_latency_out_of_reach_is_so_for_all(processes, tmp_path):
    found = processes(2)(cut_to_a_latency, tmp_path, {"keep_latency": 0.2, "include": ["body.0"], "min_width": 6})
    assert "`keep_latency=0.2` cannot be reached: with `min_width=6` the smallest network has 0." in found[0]
    assert found[1] == found[0]


class Sharded(Plain):
    """Its optimizer's state is divided among the ranks."""

    def configure_optimizers(self):
        return ZeroRedundancyOptimizer(self.parameters(), optimizer_class=torch.optim.Adam, lr=0.01)


def fit_sharded(folder):
    trainer = ddp_trainer(folder, PFAPruning(at_epoch=1, energy=0.9), max_epochs=2)
    with pytest.raises(MisconfigurationException, match="ZeroRedundancyOptimizer keeps on each rank the state of some") as caught:
        trainer.fit(Sharded(), DataLoader(digits(0, 100), 25), val_loader())
    return trainer.global_step, str(caught.value)


def test_an_optimizer_divided_among_the_ranks_is_refused_at_the_start(processes, tmp_path):
    for steps, said in processes(2)(fit_sharded, tmp_path):
        assert steps == 0
        assert "Use the optimizer that it wraps" in said


# ---------------------------------------------------------------- failures


class Broken(Dataset):
    """Digits that one rank cannot read."""

    def __init__(self):
        self.digits = digits(0, 100)

    def __len__(self):
        return 100

    def __getitem__(self, index):
        if ranks.rank() == 1 and index > 60:
            raise OSError("the disk is gone")
        return self.digits[index]


def _fails_on_one_rank(where, monkeypatch):
    """Something goes wrong on rank 1 alone."""
    if ranks.rank() != 1:
        return

    def fail(*args, **kwargs):
        raise RuntimeError(f"no {where} today")

    original = Plain.validation_step
    calls = []

    def later(self, batch, batch_idx):
        calls.append(batch_idx)
        if len(batch[0]) == 11:  # the last batch of the validation data, not of the analysis
            fail()
        return original(self, batch, batch_idx)

    tried = []

    def stops_training(*args):
        tried.append(args)
        return None if len(tried) == 1 else RuntimeError("no training_step today")

    patches = {
        "choose": (PFAPruning, "choose", fail),
        "self-check": (pruning, "cut", fail),
        "training_step": (pruning, "training_error", stops_training),
        "validation": (Plain, "validation_step", later),
        "mean": (StreamingMean, "update", fail),
    }
    if where in patches:
        monkeypatch.setattr(*patches[where])


def fail_then_go_on(folder, where):
    """Try to cut while something fails on rank 1; then train on, and cut after all."""
    told = []

    def try_it(trainer, module):
        attempt = PFAPruning(energy=0.9, compensate=True, loader=DataLoader(Broken(), 25) if where == "data" else None)
        attempt.schedule.resolve(2)
        before = everything(trainer, module)
        with pytest.MonkeyPatch.context() as patch:
            _fails_on_one_rank(where, patch)
            try:
                attempt.cut_now(trainer, module)
            except Exception as error:
                told.append(f"{type(error).__name__}: {error}")
        after = everything(trainer, module)
        told.append([key for key in before if not same(before[key], after[key])])
        told.append((attempt.reports, attempt.schedule.cuts, trainer.strategy.model.module is module))

    callbacks = [At(1, try_it)] if where else []
    model = Plain()
    callback = PFAPruning(at_epoch=2, energy=0.9)
    seed_everything(2, verbose=False)
    ddp_trainer(folder, *callbacks, callback, max_epochs=3).fit(
        model, DataLoader(digits(0, 150), 16, shuffle=True), DataLoader(digits(1000, 150), 64)
    )
    return told, weights(model), callback.reports[0].recipe.to_dict()


@pytest.fixture(scope="module")
def undisturbed(pools, tmp_path_factory):
    if 2 not in pools or not pools[2].alive:
        pools[2] = Processes(2)
    return pools[2](fail_then_go_on, tmp_path_factory.mktemp("undisturbed"), None)


@pytest.mark.parametrize("where", ["choose", "self-check", "training_step", "validation", "mean", "data"])
def test_what_fails_on_one_rank_fails_on_all_and_changes_nothing(processes, undisturbed, where, tmp_path):
    found = processes(2)(fail_then_go_on, tmp_path, where)
    text = "the disk is gone" if where == "data" else "no training_step" if where == "training_step" else f"no {where} today"
    for rank, (told, _, _) in enumerate(found):
        error, changed, kept = told
        assert text in error
        assert error.startswith("OtherRankError: Rank 1 failed: ") == (rank == 0)
        assert changed == []
        assert kept == ([], [], True)
    # The wrapper still works: the run ends as one in which nothing was tried.
    for theirs, ours in zip(found, undisturbed, strict=True):
        assert same(theirs[1:], ours[1:])


class Peeks(PFAPruning):
    """Looks at the running statistics that the analysis has seen, and does not go on."""

    def choose(self, analysis):
        self.seen = self.module.net[1].running_mean.clone()
        raise ValueError("seen enough")


def statistics_of_a_failed_cut(folder):
    model, peeks, found = Plain(), Peeks(), []

    def look(trainer, module):
        peeks.module = module
        before = module.net[1].running_mean.clone()
        with pytest.raises(ValueError, match="seen enough"):
            peeks.cut_now(trainer, module)
        found.extend([before, peeks.seen, module.net[1].running_mean.clone()])

    options = {"max_epochs": 2, "limit_val_batches": 0}  # a validation would bring the ranks' statistics together
    ddp_trainer(folder, At(1, look), **options).fit(model, DataLoader(digits(0, 100), 16, shuffle=True))
    return found


def test_all_ranks_analyse_the_network_of_the_first_and_have_their_own_back(processes, tmp_path):
    (one, seen_by_one, one_after), (other, seen_by_other, other_after) = processes(2)(statistics_of_a_failed_cut, tmp_path)
    assert not torch.equal(one, other)  # or this shows nothing
    assert torch.equal(seen_by_one, one)
    assert torch.equal(seen_by_other, one)
    assert torch.equal(one_after, one)
    assert torch.equal(other_after, other)


def _nested_failures():
    told = []
    for guilty in (0, 1):
        try:
            with ranks.as_one(), ranks.as_one():
                ranks.share("together")
                try:
                    with ranks.as_one():
                        if ranks.rank() == guilty:
                            raise KeyError("mine")
                        ranks.share("another")
                        ranks.share("never reached")
                except KeyError as error:
                    raise ValueError("said better") from error
        except ValueError as error:
            told.append(f"{type(error).__name__}: {error}")
    told.append(ranks.share(ranks.rank()))
    return told


def test_a_failure_is_told_once_however_deep_it_happens(processes):
    other = "OtherRankError: Rank {} failed: KeyError: 'mine'"
    mine = "ValueError: said better"
    assert processes(2)(_nested_failures) == [[mine, other.format(1), [0, 1]], [other.format(0), mine, [0, 1]]]


# ---------------------------------------------------------------- watching


def watched(folder):
    """Steps and values that rank 0 has logged are in the file; what each rank knows of its network is returned."""
    watch, model = CompressionMonitor(spectra_every_n_epochs=2), Plain()
    options = {"max_epochs": 3, "logger": CSVLogger(folder, flush_logs_every_n_steps=1)}
    callbacks = watch, PFAPruning(at_epoch=1, energy=0.9, evaluate=False)
    ddp_trainer(folder, *callbacks, **options).fit(model, DataLoader(digits(0, 96), 16, shuffle=True), val_loader())
    return watch.history.state_dict(), count_parameters(model), watch.history.moments[-1].sizes.parameters


def test_all_ranks_see_one_history_and_the_first_logs_it(processes, tmp_path):
    one, other = processes(2)(watched, tmp_path)
    assert one == other
    history, parameters, seen = one
    assert seen == parameters < count_parameters(Plain())
    assert [(moment["epoch"], moment["step"]) for moment in history["moments"]] == [(0, 0), (1, 3)]
    (file,) = tmp_path.rglob("metrics.csv")
    with open(file, encoding="utf-8", newline="") as content:
        told = [(int(row["step"]), int(row["compress/cuts"])) for row in csv.DictReader(content) if row["compress/cuts"]]
    assert told == [(0, 0), (3, 0), (3, 1), (6, 1), (9, 1)]
    assert {path.name for path in file.parent.rglob("*.png")} >= {"history.png", "epoch_1_spectra.png"}


# ---------------------------------------------------------------- resuming


class Sure(Theirs):
    """With sigmoids, half of which are mostly sure."""

    def __init__(self, width=12, rate=3e-3):
        super().__init__(width, rate)
        self.body[2], self.body[5] = nn.Sigmoid(), nn.Sigmoid()
        for norm in (self.body[1], self.body[4]):
            norm.weight.data[: width // 2] = torch.linspace(6, 30, width // 2)


METHODS = {
    "pfa": (Theirs, lambda: PFAPruning(at_epoch=3, energy=0.9)),
    "pfa, distilled": (Theirs, lambda: PFAPruning(at_epoch=3, energy=0.9, distill_from_unpruned=True)),
    "slimming": (Theirs, lambda: SlimmingPruning(at_epoch=3, keep_params=0.5, strength=1e-2)),
    "pib": (Sure, lambda: PIBPruning(at_epoch=3)),
    "vib": (Theirs, lambda: VIBPruning(at_epoch=3, kl_scale=0.05, gate_lr=0.3, gate_weight_decay=0.1)),
}


def whole_and_resumed(folder, first, resume_at, method="pfa"):
    kind, make = METHODS[method]

    def run(name, callbacks, ckpt_path=None):
        size = ranks.world_size()
        options = {"ckpt_path": ckpt_path, "strategy": "ddp", "devices": size, "precision": "32-true"}
        seed_everything(3, verbose=False)
        return fit_theirs(folder / name, *callbacks, module=kind(), **options)

    if first:
        apart = At(0, lambda trainer, module: torch.rand(1 + ranks.rank()))  # Lightning seeds all ranks alike
        module, trainer = run("whole", [make(), apart, every_epoch(folder)])
    else:
        path = str(folder / f"epoch={resume_at}.ckpt")
        module, trainer = run("resumed", [make()], path)
    state = without_times(trainer.callbacks[0].state_dict())
    return weights(module), trainer.optimizers[0].state_dict(), state, rng_states()


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_of_two_processes_ends_bit_for_bit_as_one_that_never_stopped(method, processes, tmp_path):
    whole = processes(2)(whole_and_resumed, tmp_path, True, None, method)
    assert not same(whole[0][3], whole[1][3])  # each rank draws its own random numbers
    assert same(*(only_weights_that_ranks_share(theirs[0]) for theirs in whole))
    assert min(len(kept) for kept in whole[0][2]["reports"][0]["recipe"]["keep"].values()) < 12
    for epoch in (2, 4):  # before the cut and after it
        resumed = processes(2)(whole_and_resumed, tmp_path, False, epoch, method)
        for theirs, ours in zip(resumed, whole, strict=True):
            assert same(theirs, ours)


def test_a_run_resumed_with_fewer_processes_says_so(processes, tmp_path):
    processes(2)(whole_and_resumed, tmp_path, True, None)
    seed_everything(3, verbose=False)
    with pytest.warns(UserWarning, match=r"PFAPruning does not restore .* those of 2 process\(es\) and the Trainer has 1"):
        fit_theirs(tmp_path, PFAPruning(at_epoch=3, energy=0.9), ckpt_path=str(tmp_path / "epoch=4.ckpt"), precision="32-true")


# ---------------------------------------------------------------- what each rank reads


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("max_samples", [None, 7])
def test_ranks_share_out_the_samples_and_read_each_once(size, max_samples):
    loader = DataLoader(list(range(20)), batch_size=3, shuffle=True)
    parts = [in_order(loader, max_samples=max_samples, rank=rank, world_size=size) for rank in range(size)]
    read = [torch.cat(list(part)).tolist() for part in parts]
    alone = torch.cat(list(in_order(loader, max_samples=max_samples))).tolist()
    assert sorted(sample for samples in read for sample in samples) == sorted(alone)
    assert max(map(len, read)) - min(map(len, read)) <= 1


def test_a_rank_may_have_nothing_to_read():
    loader = DataLoader(list(range(2)), batch_size=3)
    assert list(in_order(loader, rank=2, world_size=3)) == []


class Stream(IterableDataset):
    def __iter__(self):
        yield from digits(0, 40)


def test_what_cannot_be_shared_out_is_left_as_it_is():
    weighted = DataLoader(digits(0, 40), 8, sampler=WeightedRandomSampler([1.0] * 40, 40))
    for loader in (weighted, DataLoader(Stream(), 8)):
        assert in_order(loader, rank=1, world_size=2) is loader


def _gather(by_rank):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    batches = torch.randn(30, 4).split(by_rank)
    metrics = {"0": StreamingCovariance(5, sync_on_compute=False), "2": StreamingMean(5, sync_on_compute=False)}
    watched = {
        "0": Watched(Tap("0"), metrics["0"], spatial_max),
        "2": Watched(Tap("2", "input"), metrics["2"], at_once=True),
    }
    gather(model, batches[ranks.rank() :: 2] if ranks.world_size() > 1 else batches, watched, model)
    return int(metrics["0"].count), metrics["0"].compute(), metrics["2"].compute()


def _all_have_nothing():
    try:
        gather_covariances(nn.Linear(2, 2), [], {"": 2}, lambda batch: batch)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("by_rank", [[17, 13], [30]], ids=str)  # of one batch, rank 1 has none
def test_all_ranks_hold_what_all_have_seen(processes, by_rank):
    count, covariance, mean = _gather(by_rank)
    found = processes(2)(_gather, by_rank)
    assert same(found[0], found[1])
    assert found[0][0] == count == 30
    torch.testing.assert_close(found[0][1], covariance, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found[0][2], mean, rtol=1e-6, atol=1e-9)
    assert all("gave no batch" in text for text in processes(2)(_all_have_nothing))


def cut_to_random_weights(folder):
    """Weights right after the cut, and after training, of a run whose ranks hold other random numbers."""
    torch.manual_seed(ranks.rank())
    model, seen = Theirs(), Seen(0)
    trainer = ddp_trainer(folder, PFAPruning(at_epoch=0, energy=0.9, weights="random", evaluate=False), seen, max_epochs=2)
    trainer.fit(model, DataLoader(digits(0, 128), 16), val_loader())
    return seen.start[0], weights(model)


def test_all_ranks_begin_at_the_same_random_weights(processes, tmp_path):
    (first, first_after), (second, second_after) = processes(2)(cut_to_random_weights, tmp_path)
    assert same(first, second)
    assert same(only_weights_that_ranks_share(first_after), only_weights_that_ranks_share(second_after))
    assert not torch.equal(first["head.weight"], first_after["head.weight"])


def cut_from_a_stream(folder):
    callback = PFAPruning(at_epoch=0, energy=0.9, evaluate=False, loader=DataLoader(Stream(), 8))
    model = Plain()
    with pytest.warns(UserWarning, match="cannot share out its data") if ranks.rank() == 0 else contextlib.nullcontext():
        ddp_trainer(folder, callback, max_epochs=1).fit(model, DataLoader(digits(0, 64), 16), val_loader())
    return callback.reports[0].recipe.to_dict(), only_weights_that_ranks_share(weights(model))


def test_a_stream_is_read_by_every_rank_with_a_warning(processes, tmp_path):
    one, other = processes(2)(cut_from_a_stream, tmp_path)
    assert one[0]["keep"]
    assert same(one, other)


# ---------------------------------------------------------------- deciding together


class Opinions(Small):
    """Logs, without a sync, a loss that improves on rank 0 alone; asks other ranks in its steps."""

    def validation_step(self, batch, batch_idx):
        logits = self.net(batch[0])
        assert self.all_gather(logits.sum()).numel() == ranks.world_size()
        sign = -1 if self.global_rank == 0 else 1
        self.log("val/loss", float(sign * self.current_epoch))


def cut_when_converged(folder):
    callback = PFAPruning(when="converged", patience=2, energy=0.9)
    ddp_trainer(folder, callback, max_epochs=6).fit(Opinions(), *small_loaders())
    return callback.schedule.cuts


def test_ranks_that_see_different_losses_cut_before_the_same_epoch(processes, tmp_path):
    # The mean over ranks is 0 in every epoch: best at 0, stale at 1 and 2.
    assert processes(2)(cut_when_converged, tmp_path) == [[3], [3]]


# ---------------------------------------------------------------- refusals


def _trainer_of(strategy):
    return SimpleNamespace(strategy=strategy, world_size=2, global_step=0, max_epochs=4, fast_dev_run=False)


def test_allows_one_device_and_ddp():
    for strategy in (SingleDeviceStrategy("cpu"), DDPStrategy()):
        PFAPruning().setup(_trainer_of(strategy), Small(), "fit")


def test_refuses_other_strategies_by_name():
    class Tower:
        """A strategy of somebody's own."""

    with pytest.raises(MisconfigurationException, match="2 processes under Tower"):
        PFAPruning().setup(_trainer_of(Tower()), Small(), "fit")


@pytest.mark.parametrize("start", ["spawn", "fork"])
def test_refuses_processes_that_hand_their_weights_back(start):
    with pytest.raises(MisconfigurationException, match=f"DDPStrategy starts its processes by '{start}'.* Run a script"):
        PFAPruning().setup(_trainer_of(DDPStrategy(start_method=start)), Small(), "fit")


def test_refuses_a_communication_hook_that_keeps_a_state():
    with pytest.raises(MisconfigurationException, match="keeps a state, dict, of the gradients' sizes"):
        PFAPruning().setup(_trainer_of(DDPStrategy(ddp_comm_state={})), Small(), "fit")


def _entropies_of_a_share():
    q = torch.rand(20, 3, 2, generator=torch.Generator().manual_seed(0))
    metric = StreamingEntropies(shape=(3, 2))
    metric.update(q[:13] if ranks.rank() else q[13:])
    return metric.compute()


def test_entropies_of_two_ranks_are_those_of_one(processes):
    q = torch.rand(20, 3, 2, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([pib.entropies(q).noise, pib.entropies(q).marginal, pib.entropies(q, "exact").marginal])
    for found in processes(2)(_entropies_of_a_share):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- weight decay of compressed layers


class Factorized(Small):
    def __init__(self):
        super().__init__()
        self.net[2] = RankFactorizedLinear(16, 16, rank=2)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, weight_decay=0.5)


def scaled_decay(folder):
    seed_everything(0, verbose=False)
    module = Factorized()
    trainer = ddp_trainer(folder, CRSWeightDecay(), max_epochs=2)
    trainer.fit(module, small_loaders()[0])
    groups = [(group["weight_decay"], len(group["params"])) for group in trainer.optimizers[0].param_groups]
    return groups, weights(module)


def test_all_ranks_scale_the_decay_alike(processes, tmp_path):
    (groups, one), (others, other) = processes(2)(scaled_decay, tmp_path)
    assert groups == others == [(0.5, 5), (0.5 * 2 * 32 / 256, 2)]
    assert same(one, other)
