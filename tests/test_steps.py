"""Steps of a user's module outside of the loop: evaluation as Lightning reports it, and nothing left behind."""

import copy
from collections import defaultdict

import numpy as np
import pytest
import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities import CombinedLoader
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC, MulticlassConfusionMatrix, MulticlassF1Score

from lit_compress import rng
from lit_compress.callbacks.steps import bare_step, evaluate, silent_step, training_error, validating
from lit_compress.graph import evaluating
from tests.modules import At, Small, fit_theirs, leaving_no_trace, new_trainer, small_loaders, vectors


class Metrics(Small):
    """Everything in one: a collection that shares states, means that weigh batches, reductions, steps and epochs."""

    def __init__(self):
        super().__init__()
        self.val_metrics = MetricCollection([MulticlassAccuracy(3), MulticlassF1Score(3), MulticlassAUROC(3)], prefix="val/")
        self.matrix = MulticlassConfusionMatrix(3)
        self.history = {"sizes": [], "seen": defaultdict(list)}

    def on_validation_start(self):
        self.started = []

    def validation_step(self, batch, batch_idx):
        logits = self.net(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        self.started.append(loss)
        self.history["sizes"].append(len(logits))
        self.history["seen"]["loss"].append(loss)
        self.val_metrics.update(logits, batch[1])
        self.matrix.update(logits, batch[1])
        self.log_dict(self.val_metrics, prog_bar=True)
        self.log("val/loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"val/weighed": loss, "val/also": 2 * loss}, batch_size=batch_idx + 1)
        self.log("val/highest", logits.max(), reduce_fx="max")
        self.log("val/lowest", logits.min(), reduce_fx=torch.min)
        self.log("val/count", float(len(logits)), reduce_fx="sum")
        self.log("val/only_last", loss, on_step=True, on_epoch=False)
        return loss

    def on_validation_batch_end(self, outputs, batch, batch_idx):
        self.log("val/later", outputs + batch_idx)

    def on_validation_epoch_end(self):
        self.log("val/mean_of_batches", torch.stack(self.started).mean())
        self.log("val/diagonal", self.matrix.compute().diagonal().sum().float())
        self.matrix.reset()
        self.history["sizes"].clear()


class SeveralLoaders(Small):
    def __init__(self):
        super().__init__()
        self.each = nn.ModuleList([MulticlassAccuracy(3), MulticlassAccuracy(3)])
        self.shared = MeanMetric()

    def validation_step(self, batch, index, dataloader_idx):
        loader = dataloader_idx
        logits = self.net(batch[0])
        self.each[loader].update(logits, batch[1])
        self.shared.update(logits.max())
        self.log("val/accuracy", self.each[loader])
        self.log("val/shared", self.shared)
        self.log("val/loss", F.cross_entropy(logits, batch[1]))
        self.log(f"val/own_{loader}", logits.mean(), add_dataloader_idx=False)


class TwoAtOnce(Small):
    """One batch holds one of each loader."""

    def validation_step(self, batch, index):
        logits = self.net(batch["a"][0]), self.net(batch["b"][0])
        self.log("val/both", (logits[0].mean() + logits[1].mean()), batch_size=len(logits[0]))


def logged_by_lightning(trainer, module):
    """What a Trainer of its own reports on a copy; epoch values only, under the names that they were logged by."""
    module = copy.deepcopy(module)
    module._metric_attributes = None  # Lightning finds metrics by their id, and a copy's are others
    loaders = trainer.fit_loop.epoch_loop.val_loop._data_source.instance
    other = new_trainer(None, precision=trainer.precision, limit_val_batches=trainer.limit_val_batches)
    other.validate(module, loaders, verbose=False)
    return {name: float(value) for name, value in other.callback_metrics.items() if not name.endswith(("_epoch", "_step"))}


def looking():
    """A function for :class:`At`, and the list to which it adds what `evaluate` finds and what Lightning finds."""
    found = []

    def look(trainer, pl_module):
        with leaving_no_trace(trainer, pl_module):
            found.append(evaluate(trainer, pl_module))
        found.append(logged_by_lightning(trainer, pl_module))

    return look, found


def evaluated(module, loaders, tmp_path, epoch=1, **options):
    """What `evaluate` finds at the start of an epoch, and what Lightning finds then."""
    look, found = looking()
    new_trainer(tmp_path, At(epoch, look), **options).fit(module, small_loaders()[0], loaders)
    return found


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("sanity", [0, 2])
def test_evaluation_is_what_validation_reports(tmp_path, epoch, sanity):
    found, expected = evaluated(Metrics(), small_loaders()[1], tmp_path, epoch, num_sanity_val_steps=sanity)
    assert found == pytest.approx(expected, rel=1e-5)
    assert len(found) == 3 + 9
    assert found["val/count"] == 50


def test_evaluation_of_a_users_module_in_mixed_precision(tmp_path):
    look, found = looking()
    fit_theirs(tmp_path, At(1, look), max_epochs=2)
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert set(found[0]) == {"val/right", "val/area", "val/mean", "val/loss", "val/total"}


def test_evaluation_over_several_loaders(tmp_path):
    loaders = [DataLoader(vectors(50, seed=1), 32), DataLoader(vectors(40, seed=2), 16)]
    found, expected = evaluated(SeveralLoaders(), loaders, tmp_path)
    assert found == pytest.approx(expected, rel=1e-5)
    assert set(found) == {f"val/{name}/dataloader_idx_{i}" for name in ("accuracy", "shared", "loss") for i in (0, 1)} | {
        "val/own_0",
        "val/own_1",
    }


def test_evaluation_over_loaders_that_go_together(tmp_path):
    loaders = CombinedLoader({"a": DataLoader(vectors(50, 1), 32), "b": DataLoader(vectors(40, 2), 16)}, mode="min_size")
    found, expected = evaluated(TwoAtOnce(), loaders, tmp_path)
    assert found == pytest.approx(expected, rel=1e-5)
    assert found


@pytest.mark.parametrize("limit", [1, 0.5, 0])
def test_evaluation_keeps_to_the_limit_of_batches(tmp_path, limit):
    found, expected = evaluated(Metrics(), small_loaders(batch_size=10)[1], tmp_path, limit_val_batches=limit)
    assert found == pytest.approx(expected, rel=1e-5)
    assert found.get("val/count", 0) == {1: 10, 0.5: 20, 0: 0}[limit]


def test_evaluation_of_a_module_that_does_not_validate_is_empty(tmp_path):
    class NoValidation(Small):
        validation_step = LightningModule.validation_step

    found = []
    look = At(1, lambda trainer, pl_module: found.append(evaluate(trainer, pl_module)))
    new_trainer(tmp_path, look).fit(NoValidation(), *small_loaders())
    assert found == [{}]


def test_evaluation_before_the_first_validation_of_rare_ones(tmp_path):
    found, expected = evaluated(Metrics(), small_loaders()[1], tmp_path, epoch=0, check_val_every_n_epoch=3)
    assert found == pytest.approx(expected, rel=1e-5)


def test_an_evaluation_that_fails_leaves_no_trace(tmp_path):
    class Fails(Metrics):
        failing = False

        def validation_step(self, batch, batch_idx):
            if self.failing and batch_idx == 1:
                raise ArithmeticError("on purpose")
            return super().validation_step(batch, batch_idx)

    def look(trainer, pl_module):
        pl_module.failing = True
        with leaving_no_trace(trainer, pl_module), pytest.raises(ArithmeticError):
            evaluate(trainer, pl_module)
        pl_module.failing = False
        looked.append(True)

    looked = []
    new_trainer(tmp_path, At(1, look)).fit(Fails(), *small_loaders())
    assert looked


# ---------------------------------------------------------------- silence


class Untidy(Small):
    """Writes to the logger itself, keeps all kinds of things, draws random numbers."""

    def __init__(self):
        super().__init__()
        self.kept, self.counts, self.names, self.best, self.calls = [], {"a": [1]}, {"x"}, None, 0
        self.register_buffer("seen", torch.zeros(()))
        self.mean = MeanMetric()
        self.net.taps = []
        self.told = []

    def validation_step(self, batch, batch_idx):
        logits = self.net(batch[0])
        self.kept.append(logits)
        self.counts["a"].append(2)
        self.counts["b"] = []
        self.names.add("y")
        self.best = logits.max()
        self.calls += 1
        self.seen += 1
        self.new = logits
        self.mean.update(logits)
        self.net.taps.append(logits)
        torch.rand(2), np.random.rand()
        self.logger.experiment.log_metrics({"direct": 1.0}, step=0)
        self.logger.log_metrics({"direct": 1.0}, step=0)
        assert self.logger.log_dir is not None
        self.log("val/loss", logits.mean())
        self.print("validated")


@pytest.mark.parametrize("what", ["evaluate", "silent_step", "training_error"])
def test_nothing_stays_on_a_module_and_nothing_reaches_its_logger(tmp_path, what):
    def look(trainer, pl_module):
        batch = vectors().tensors
        kept = pl_module.kept
        with leaving_no_trace(trainer, pl_module):
            if what == "evaluate":
                assert evaluate(trainer, pl_module)
            elif what == "training_error":
                assert training_error(trainer, pl_module, batch) is None
            else:
                with rng.isolated(), evaluating(pl_module), validating(trainer):  # as an analysis runs it
                    silent_step(pl_module, batch)
        assert pl_module.kept is kept
        assert pl_module.counts == {"a": [1]}
        assert pl_module.names == {"x"}
        assert pl_module.best is None
        assert not hasattr(pl_module, "new")
        assert pl_module.net.taps == []
        assert pl_module.mean._update_count == 0
        assert "log" not in vars(pl_module)
        looked.append(True)

    looked = []
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    written = []
    log_metrics = logger.experiment.log_metrics
    logger.experiment.log_metrics = lambda *args, **kwargs: (written.append(args), log_metrics(*args, **kwargs))
    new_trainer(tmp_path, At(0, look), logger=logger, max_epochs=1, limit_val_batches=1, check_val_every_n_epoch=9).fit(
        Untidy(), *small_loaders()
    )
    assert looked
    assert not [metrics for metrics, *_ in written if "direct" in metrics]


def test_what_a_step_keeps_on_the_module_leaves_the_network():
    class Keeps(Small):
        def __init__(self):
            super().__init__()
            self.own = [nn.Parameter(torch.zeros(3))]
            self.deep = {"a": {"b": []}}

        def validation_step(self, batch, _):
            self.deep["a"]["b"].append((batch[0] + 1, "name"))
            self.last = {"logits": batch[0] + 2}

    _, left = silent_step(Keeps(), (torch.zeros(4),))
    assert sorted(tensor.mean().item() for tensor in left) == [1, 2]
    _, left = silent_step(Small(), vectors().tensors)
    assert left == []


def test_a_step_gets_the_arguments_that_lightning_gives_it():
    calls = []

    def with_step(step, name="validation_step"):
        kind = type("Kind", (LightningModule,), {name: step})
        bare_step(kind())(kind(), "batch")
        return calls.pop()

    assert with_step(lambda self, b: calls.append((b,))) == ("batch",)
    assert with_step(lambda self, b, i: calls.append((b, i))) == ("batch", 0)
    assert with_step(lambda self, b, i, prefix="val": calls.append((b, i, prefix))) == ("batch", 0, "val")
    assert with_step(lambda self, b, i, loader: calls.append((b, i, loader))) == ("batch", 0, 0)
    assert with_step(lambda self, b, batch_idx, dataloader_idx=7: calls.append(dataloader_idx)) == 7
    assert with_step(lambda self, *args: calls.append(args)) == ("batch", 0)
    assert with_step(lambda self, b, i: calls.append((b, i)), "training_step") == ("batch", 0)


# ---------------------------------------------------------------- training


def test_a_training_step_that_fails_is_told_and_one_that_runs_is_not(tmp_path):
    class Norms(Small):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(6)
            self.average = nn.Linear(6, 6)
            self.modes = []

        def training_step(self, batch, batch_idx):
            assert self.training, "a step is tried as it is used"
            assert not self.average.training
            self.average.weight.data.mul_(0.9)  # as an average of weights is kept
            return F.cross_entropy(self.net(self.norm(batch[0])), batch[1])

    def look(trainer, pl_module):
        pl_module.average.eval()
        images, labels = vectors().tensors
        with leaving_no_trace(trainer, pl_module):
            assert training_error(trainer, pl_module, (images, labels)) is None
            error = training_error(trainer, pl_module, (images[:, :5], labels))
            assert "6" in str(error)
            assert isinstance(error, RuntimeError)
        pl_module.automatic_optimization = False
        assert training_error(trainer, pl_module, None) is None
        pl_module.automatic_optimization = True
        looked.append(True)

    looked = []
    new_trainer(tmp_path, At(0, look), max_epochs=1).fit(Norms(), *small_loaders())
    assert looked
