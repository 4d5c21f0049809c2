"""Statistic, budget and predictor learnt together; the test spends the budget for real; callbacks that watch it."""

import csv
from math import pi

import numpy as np
import pytest
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.loggers import CSVLogger
from scipy.optimize import minimize
from scipy.special import softmax
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lit_compress.budget import BudgetSplit, matching_total
from lit_compress.callbacks import BudgetCurve, BudgetMonitor
from lit_compress.metrics import MeanAngleError
from lit_compress.models import NormedMLP
from lit_compress.modules import LitFeatureGatherer

SPREADS = torch.tensor([1.0, 2.0, 1.0])  # deviation of one observation of each context
WEIGHTS = torch.tensor([3.0, 0.5, 0.2])


def sensors(count=2048, observations=16, seed=0, spreads=SPREADS):
    """Three sensors that read a hidden number each, with noise; the target weighs the hidden numbers."""
    generator = torch.Generator().manual_seed(seed)
    hidden = 3 * torch.randn(count, 3, 1, 1, generator=generator)
    readings = hidden + spreads.reshape(1, 3, 1, 1) * torch.randn(count, 3, observations, 1, generator=generator)
    return readings, hidden[:, :, 0, 0] @ WEIGHTS[:, None]


def gatherer(total=6.0, **arguments):
    inputs = 3 * arguments.get("features", 1) + ("totals" in arguments)
    settings = {"predictor": nn.Linear(inputs, 1), "features": 1, "loss": "squared_error"}
    budget = arguments.pop("budget", None) or BudgetSplit(["a", "b", "c"], total)
    return LitFeatureGatherer(budget, **{**settings, **arguments})


def fitted(module, data, epochs=3, callbacks=(), path=None, **arguments):
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", logger=CSVLogger(path) if path else False, callbacks=list(callbacks),
        enable_checkpointing=path is not None, enable_progress_bar=False, enable_model_summary=False, **arguments,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(*data), batch_size=64, shuffle=True))
    return trainer


def test_split_and_predictor_are_learnt_together_from_sets():
    module = gatherer(optimizer=lambda groups: torch.optim.Adam(groups, lr=0.03))
    fitted(module, sensors(), epochs=16)
    # Weights shrink to what the noise s leaves of the hidden variance of 9: the error is Σ w² 9 s / (9 + s).
    squared, variance = WEIGHTS.numpy() ** 2, SPREADS.numpy() ** 2

    def error(logits):
        noise = variance / (6 * softmax(logits))
        return (squared * 9 * noise / (9 + noise)).sum()

    optimum = softmax(minimize(error, np.zeros(3), method="Nelder-Mead").x)
    # Means of 16 are taken for the truth, and Adam is still moving.
    np.testing.assert_allclose(module.budget.shares().detach(), optimum, atol=0.03)
    torch.testing.assert_close(module.variance[:, 0], SPREADS**2, rtol=0.1, atol=0)
    torch.testing.assert_close(module.predictor.weight[0, 0], WEIGHTS[0], rtol=0.1, atol=0)


def test_noise_in_training_is_the_standard_error_of_real_gathering_for_a_learnt_statistic():
    module = gatherer(statistic=NormedMLP(1, (16,), 4), features=4, predictor=NormedMLP(12, (16,), 1))
    fitted(module, sensors(observations=8), epochs=4)
    readings, _ = sensors(count=600, observations=256, seed=1)
    with torch.no_grad():
        statistics = module.eval()._statistics(readings)
        truth = statistics.mean(2)
        for amount in (1, 2, 5):
            measured = (statistics[:, :, :amount].mean(2) - truth).square().mean(0).sqrt()
            claimed = module.budget.process.sigma(torch.tensor(float(amount)), module.variance)
            # Statistics of training are a running mean over batches in which batch norm moves; a truth of 256 lacks 1 %.
            torch.testing.assert_close(measured, claimed, rtol=0.15, atol=0)


def test_the_test_looks_at_nothing_that_is_not_bought():
    module, (readings, _) = gatherer(total=5).eval(), sensors(count=7)
    module.budget.fix([0.6, 0.4, 0.0])
    module.centre.fill_(4.0)
    bought = readings.clone()
    bought[:, 0, 3:], bought[:, 1, 2:], bought[:, 2] = torch.nan, torch.nan, torch.nan
    means = torch.stack([readings[:, 0, :3].mean((1, 2)), readings[:, 1, :2].mean((1, 2)), torch.full((7,), 4.0)], dim=1)
    torch.testing.assert_close(module.gather(bought), module.predictor(means))


def test_bits_are_really_kept():
    module = gatherer(budget=BudgetSplit(3, total=6, process="quantization"), predictor=nn.Identity(), variance=3.0)
    module.budget.fix([0.5, 1 / 3, 1 / 6])
    features = 6 * torch.rand(500, 3, 1, 1) - 3  # the range of a variance of 3 is ±3
    kept = module.eval().gather(features)
    assert [len(column.unique()) for column in kept.T] == [8, 4, 2]
    assert ((kept - features[:, :, 0, 0]).abs() <= torch.tensor([3 / 8, 3 / 4, 3 / 2]) + 1e-6).all()


def test_training_adds_noise_and_validation_too_but_the_test_none():
    module, (readings, _) = gatherer(total=3).eval(), sensors(count=5)
    assert not torch.equal(module(readings), module(readings))
    assert torch.equal(module.gather(readings), module.gather(readings))
    assert module.gather(readings).requires_grad is False


def test_a_missing_target_counts_for_nothing():
    module, (readings, targets) = gatherer(predictor=nn.Linear(3, 2)).eval(), sensors(count=6)
    targets = torch.cat([targets, 2 * targets], dim=1)
    outputs = module.gather(readings)
    holes = targets.clone()
    holes[::2, 1] = torch.nan
    present = ~holes.isnan()
    torch.testing.assert_close(module._loss(outputs, holes), ((outputs - targets)[present] ** 2).mean())
    assert module._loss(outputs, torch.full_like(targets, torch.nan)) == 0


def test_flags_reach_the_predictor_free_of_noise():
    module = gatherer(predictor=nn.Linear(5, 1), total=1.0).eval()
    with torch.no_grad():
        module.predictor.weight.copy_(torch.tensor([[0.0, 0.0, 0.0, 1.0, 10.0]]))
        module.predictor.bias.zero_()
    readings, _ = sensors(count=4)
    flags = torch.randint(2, (4, 2)).float()
    expected = flags @ torch.tensor([[1.0], [10.0]])
    assert torch.equal(module(readings, flags), expected)
    assert torch.equal(module.gather(readings, flags), expected)


def test_one_model_serves_a_range_of_totals_and_more_is_better():
    module = gatherer(
        budget=BudgetSplit(3), totals=(2, 40), test_total=10, predictor=NormedMLP(4, (32,), 1), learn=False,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    )  # fmt: skip
    fitted(module, sensors(observations=16), epochs=8)
    assert torch.equal(module.budget.logits, torch.zeros(3))
    summaries = module.summarise(DataLoader(TensorDataset(*sensors(seed=2)), batch_size=512))
    errors = [module.error_at(summaries, total) for total in (3, 12, 39)]
    assert errors[0] > 1.3 * errors[1] > 1.3**2 * errors[2]
    total = matching_total(lambda total: module.error_at(summaries, total), errors[1], 2, 40)
    assert 11 < total <= 12.2


def test_the_error_of_summaries_is_that_of_the_test():
    data = sensors(count=300)
    module = gatherer(statistic=NormedMLP(1, (8,), 2), features=2, predictor=NormedMLP(6, (8,), 1))
    trainer = fitted(module, data, epochs=1)
    loader = DataLoader(TensorDataset(*data), batch_size=128)
    (results,) = trainer.test(module, loader, verbose=False)
    assert module.error_at(module.summarise(loader)) == pytest.approx(results["test/loss"], rel=1e-5)


def test_draws_of_the_noise_multiply_the_batch():
    module = gatherer(budget=BudgetSplit(3, total=6, samples=4))
    readings, targets = sensors(count=8)
    assert module(readings).shape == (32, 1)
    assert module.training_step((readings, targets), 0).ndim == 0


def test_a_measured_scale_keeps_a_statistic_from_outgrowing_its_noise():
    """A statistic twice as large has four times the variance, and the gradient knows it."""
    module = gatherer(statistic=nn.Linear(1, 1, bias=False))
    readings, _ = sensors(count=16)
    statistics = module._statistics(readings)
    variance = module.budget.process.spread(statistics)
    (slope,) = torch.autograd.grad(variance.sum(), module.statistic.weight)
    torch.testing.assert_close(slope.squeeze(), 2 * variance.sum().detach() / module.statistic.weight.detach().squeeze())


def test_a_context_without_variance_breaks_no_gradient():
    module, (readings, targets) = gatherer(statistic=nn.Linear(1, 1)), sensors(count=8)
    readings[:, 1] = 0.0
    module.training_step((readings, targets), 0).backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


def test_the_split_has_a_speed_of_its_own():
    optimizer = gatherer(budget_speed=20.0).configure_optimizers()
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 0.02]
    assert len(gatherer(learn=False).configure_optimizers().param_groups) == 1


def test_a_checkpoint_brings_everything_back(tmp_path):
    module = gatherer()
    trainer = fitted(module, sensors(count=256), path=tmp_path)
    file = tmp_path / "last.ckpt"
    trainer.save_checkpoint(file)
    torch.load(file, weights_only=True)
    again = LitFeatureGatherer.load_from_checkpoint(file, budget=BudgetSplit(3, 6.0), predictor=nn.Linear(3, 1))
    readings, _ = sensors(count=20, seed=5)
    assert torch.equal(again.eval().gather(readings), module.eval().gather(readings))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"loss": "hinge"}, "must be 'cross_entropy' or 'squared_error' but got 'hinge'"),
        ({"variance": -1.0}, "must be 'measured' or a positive number but got -1.0"),
        ({"totals": (1, 5)}, "Either the budget has a total or `totals`"),
        ({"budget": BudgetSplit(3)}, "Either the budget has a total or `totals`"),
        ({"budget": BudgetSplit(3), "totals": (5, 1)}, r"must ascend from above 0 but got \(5, 1\)"),
    ],
)
def test_a_gatherer_says_what_is_wrong(arguments, text):
    with pytest.raises(ValueError, match=text):
        gatherer(**arguments)


def test_batches_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="buys 2 observations of a context but the data hold 1"):
        gatherer(total=6).gather(sensors(count=2, observations=1)[0])
    with pytest.raises(ValueError, match=r"Expected 2 statistics of an observation.*got shape \(1,\)"):
        gatherer(features=2).gather(sensors(count=2)[0])
    with pytest.raises(ValueError, match=r"outputs of shape \(2, 2\) but the predictor gave \(2, 1\)"):
        gatherer()._loss(torch.zeros(2, 1), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="no total of its own"):
        gatherer(budget=BudgetSplit(3), totals=(1, 5)).gather(sensors(count=2)[0])


# --- callbacks


def table(path):
    (file,) = path.rglob(path.name if path.suffix else "budget_shares.csv")
    return list(csv.reader(file.open()))


def test_the_split_is_logged_over_time_and_over_a_resume(tmp_path):
    data = sensors(count=256)
    trainer = fitted(gatherer(), data, epochs=2, path=tmp_path, callbacks=[BudgetMonitor()])
    file = tmp_path / "half.ckpt"
    trainer.save_checkpoint(file)
    again, monitor = gatherer(), BudgetMonitor()
    trainer = Trainer(
        max_epochs=3, accelerator="cpu", logger=CSVLogger(tmp_path / "again"), callbacks=[monitor], enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(again, DataLoader(TensorDataset(*data), batch_size=64), ckpt_path=file)
    rows = table(tmp_path / "again")
    assert rows[0] == ["epoch", "a", "b", "c"]
    assert [row[0] for row in rows[1:]] == ["0", "1", "2", "3"]
    shares = np.array(rows[1:], dtype=float)[:, 1:]
    np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(shares[0], 1 / 3)
    np.testing.assert_allclose(shares[-1], again.budget.shares().detach(), rtol=1e-6)
    assert next((tmp_path / "again").rglob("budget_split.png")).stat().st_size > 1000
    logged = next((tmp_path / "again").rglob("metrics.csv")).read_text()
    assert "budget/share/a" in logged


def test_the_curve_says_how_much_more_a_uniform_split_must_spend(tmp_path):
    settings = {
        "totals": (2.0, 60.0), "test_total": 6.0, "optimizer": lambda parameters: torch.optim.Adam(parameters, lr=0.05),
    }  # fmt: skip
    data = sensors(observations=24)
    modules = {learn: gatherer(budget=BudgetSplit(3), learn=learn, **settings) for learn in (True, False)}
    for learn, module in modules.items():
        trainer = fitted(module, data, epochs=6, path=tmp_path / str(learn))
    file = tmp_path / "uniform.ckpt"
    trainer.save_checkpoint(file)

    learnt, loader = modules[True], DataLoader(TensorDataset(*sensors(seed=3, observations=60)), batch_size=256)
    callback = BudgetCurve([3, 6, 12], uniform=file)
    tester = Trainer(accelerator="cpu", logger=CSVLogger(tmp_path / "test"), callbacks=[callback], enable_progress_bar=False)
    (results,) = tester.test(learnt, loader, verbose=False)
    assert "budget/uniform_extra" in next((tmp_path / "test").rglob("metrics.csv")).read_text()
    (file,) = (tmp_path / "test").rglob("budget_curve.csv")
    (header, *rows) = csv.reader(file.open())
    assert header == ["total", "learnt", "uniform"]
    errors = {float(total): (float(ours), float(theirs)) for total, ours, theirs in rows}
    assert errors[6][0] == pytest.approx(results["test/loss"], rel=1e-4)
    # The first sensor matters most: (3 + 1 + .2)² / (3 · (9 + 1 + .04)) = .59 of the total would do as well in theory.
    assert errors[6][0] < 0.8 * errors[6][1]
    assert file.with_suffix(".png").stat().st_size > 1000


def test_callbacks_refuse_what_they_cannot_watch():
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    with pytest.raises(MisconfigurationException, match="has no BudgetSplit as its attribute `budget`"):
        BudgetMonitor().setup(trainer, LightningModule(), "fit")
    with pytest.raises(MisconfigurationException, match="needs a LitFeatureGatherer with `totals`"):
        BudgetCurve([3]).setup(trainer, gatherer(), "test")
    with pytest.raises(MisconfigurationException, match=r"totals from 2 to 8 but got \(1, 3\)"):
        BudgetCurve([3, 1]).setup(trainer, gatherer(budget=BudgetSplit(3), totals=(2, 8)), "test")
    with pytest.raises(MisconfigurationException, match="at least one total"):
        BudgetCurve([])


# --- matching and the metric


def test_a_matching_total_is_found_or_said_to_be_out_of_reach():
    assert matching_total(lambda total: total**-0.5, 0.25, 1, 1000, tolerance=1e-4) == pytest.approx(16, rel=1e-4)
    assert matching_total(lambda total: 0.0, 0.25, 3, 1000) == 3
    assert matching_total(lambda total: 1.0, 0.25, 3, 1000) == float("inf")
    with pytest.raises(ValueError, match="0 < low < high but got 5 and 5"):
        matching_total(lambda total: total, 1, 5, 5)


@pytest.mark.parametrize("split", [(90,), (1, 40, 49)], ids=str)
def test_angles_err_the_short_way_round(split):
    generator = np.random.default_rng(0)
    ours, truth = generator.integers(256, size=(2, 90))
    apart = np.abs(np.angle(np.exp(2j * pi * (ours - truth) / 256)))  # complex numbers know the short way
    bins, radians = MeanAngleError(bins=256), MeanAngleError()
    for a, b in zip(torch.tensor(ours).split(split), torch.tensor(truth).split(split), strict=True):
        bins.update(torch.nn.functional.one_hot(a, 256).float(), b)
        radians.update(a * 2 * pi / 256 + 8 * pi, b * 2 * pi / 256)
    assert float(bins.compute()) == pytest.approx(apart.mean(), rel=1e-5)
    assert float(radians.compute()) == pytest.approx(apart.mean(), rel=1e-4)


def test_the_angle_error_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"or logits \(N, 4\), but got \(3, 5\) and \(3,\)"):
        MeanAngleError(bins=4).update(torch.zeros(3, 5), torch.zeros(3))
    with pytest.raises(ValueError, match="at least 1 but got 0"):
        MeanAngleError(bins=0)
    with (
        pytest.raises(ValueError, match="at least 1 angle but has none"),
        pytest.warns(UserWarning, match="before the ``update``"),
    ):
        MeanAngleError().compute()


def test_a_normed_mlp_has_the_published_layers():
    net = NormedMLP(784, (800, 800), 32, dropout=0.5)
    kinds = [type(module).__name__ for module in net.layers]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Dropout"] * 2 + ["Linear"]
    with pytest.raises(ValueError, match="width of at least 1"):
        NormedMLP(3, (0,), 1)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\) but got 1.0"):
        NormedMLP(3, (4,), 1, dropout=1.0)
