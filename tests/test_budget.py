"""Noise, splits and whole units: against reference vectors, brute force, scipy, and what real gathering does."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from lit_compress.budget import (
    BudgetSplit,
    NoiseProcess,
    QuantizationNoise,
    RateNoise,
    SamplingNoise,
    bayesian_search,
    largest_remainder,
    linear_resources,
    norm_shares,
    random_search,
)

REFERENCE = json.loads((Path(__file__).parent / "reference" / "independent_vectors.json").read_text())["budget"]
PROCESSES = ("sampling", "rate", "quantization")


def split_with(logits, **arguments):
    budget = BudgetSplit(len(logits), **arguments).double()
    with torch.no_grad():
        budget.logits.copy_(torch.tensor(logits, dtype=torch.float64))
    return budget


# --- noise


@pytest.mark.parametrize(
    ("process", "variance", "key", "power"),
    [
        ("sampling", REFERENCE["v"], "var_eq3_11", 2),
        ("quantization", 1.0, "var_eq3_12", 2),
        ("rate", 1.0, "sigma_eq3_5_rate", 1),
    ],
)
def test_noise_equals_the_independent_vectors(process, variance, key, power):
    budget = split_with(REFERENCE["gamma"], total=REFERENCE["B"], process=process)
    np.testing.assert_allclose(budget.shares().detach(), REFERENCE["softmax"], rtol=1e-12)
    np.testing.assert_allclose(budget.sigma(variance).detach() ** power, REFERENCE[key], rtol=1e-12)


@pytest.mark.parametrize("limits", [{}, {"minimum": 1, "maximum": [4, 9, 3], "price": [1.0, 2.0, 0.5]}], ids=["free", "bounded"])
@pytest.mark.parametrize("process", PROCESSES)
def test_the_gradient_of_the_split_is_right(process, limits):
    budget = BudgetSplit(3, total=9, process=process, temperature=1.3, **limits).double()
    variance = torch.tensor([[1.0, 2.0], [0.5, 1.0], [3.0, 1.0]], dtype=torch.float64, requires_grad=True)
    totals = torch.tensor([9.0, 11.0], dtype=torch.float64)

    def sigma(logits, variance):
        return torch.func.functional_call(budget, {"logits": logits}, (variance, totals))

    budget.forward = budget.sigma
    logits = torch.tensor([0.4, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(sigma, (logits, variance))


def test_noise_is_added_example_by_example_with_the_deviation_said():
    budget = split_with([1.0, 0.0], total=6, samples=3)
    features = torch.randn(4000, 2, 5, dtype=torch.float64)
    variance = torch.rand(2, 5, dtype=torch.float64) + 0.5
    noise = budget(features, variance) - features.repeat(3, 1, 1)
    # 12,000 draws: a standard deviation is known to 0.65 %; five of these.
    torch.testing.assert_close(noise.std(0), budget.sigma(variance).detach(), rtol=0.033, atol=0)
    assert not torch.equal(noise[:4000], noise[4000:8000])
    assert budget(features[:, :, 0], samples=1).shape == (4000, 2)


def test_totals_may_differ_from_example_to_example():
    budget = split_with([1.0, 0.0], total=None, samples=2)
    totals = torch.tensor([4.0, 400.0], dtype=torch.float64).repeat_interleave(5000)
    for features in (torch.zeros(10_000, 2), torch.zeros(10_000, 2, 1)):
        noise = budget(features.double(), total=totals).reshape(4, 5000, 2)
        expected = torch.stack([budget.sigma(total=4), budget.sigma(total=400)] * 2).detach()
        torch.testing.assert_close(noise.std(1), expected, rtol=0.05, atol=0)  # 1 % each, five of these


@pytest.mark.parametrize("amount", [1, 3, 8])
def test_a_mean_of_so_many_observations_errs_as_the_model_says(amount):
    process, generator = SamplingNoise(), torch.Generator().manual_seed(0)
    truth = torch.randn(20_000, 1, 2, generator=generator)
    # Skewed and of unlike variance: nothing here is Gaussian.
    observations = (
        truth + torch.rand(20_000, 8, 2, generator=generator) ** 3 * torch.tensor([1.0, 7.0]) - torch.tensor([0.25, 1.75])
    )
    variance = process.spread(observations[:, None])[0]
    error = process.gather(observations, amount, variance, torch.zeros(2)) - truth[:, 0]
    torch.testing.assert_close(error.std(0), process.sigma(torch.tensor(float(amount)), variance), rtol=0.03, atol=0)
    assert error.mean(0).abs().max() < 0.1


@pytest.mark.parametrize(("process", "amounts"), [(RateNoise(), (1, 2, 9)), (QuantizationNoise(), (1, 2, 7))])
def test_a_real_clock_and_a_real_quantiser_err_as_the_model_says(process, amounts):
    centre, reach = torch.tensor([3.0, -1.0]), torch.tensor([2.0, 0.1])
    features = centre + reach * (2 * torch.rand(50_000, 1, 2, generator=torch.Generator().manual_seed(0)) - 1)
    variance = process.spread(features[:, None])[0]
    torch.testing.assert_close(variance, reach**2 / 3, rtol=0.02, atol=0)
    for amount in amounts:
        gathered = process.gather(features, amount, variance, centre)
        error = (gathered - features[:, 0]).std(0)
        torch.testing.assert_close(error, process.sigma(torch.tensor(float(amount)), variance), rtol=0.02, atol=0)
    if isinstance(process, QuantizationNoise):
        assert len(process.gather(features, 3, variance, centre)[:, 0].unique()) == 8
        beyond = process.gather(features * 50, 2, variance, centre)
        assert len(beyond[:, 0].unique()) <= 4


def test_features_that_fill_no_range_evenly_err_as_said_once_the_bits_are_several():
    process, features = QuantizationNoise(), torch.randn(50_000, 1, 1, generator=torch.Generator().manual_seed(0))
    variance, middle = process.spread(features[:, None])[0], features.mean(0)[0]
    for bits in (4, 6):
        error = (process.gather(features, bits, variance, middle) - features[:, 0]).std(0)
        torch.testing.assert_close(error, process.sigma(torch.tensor(float(bits)), variance), rtol=0.03, atol=0)


# --- the split


def test_a_split_starts_uniform_and_spends_all():
    budget = BudgetSplit(4, total=10)
    assert budget.shares().tolist() == [0.25] * 4
    assert budget.spend().tolist() == [3, 3, 2, 2]
    assert budget.names == ("context0", "context1", "context2", "context3")


def test_prices_turn_money_into_units():
    budget = split_with([0.0, 0.0], total=12, price=[1.0, 3.0])
    assert budget.resources().tolist() == pytest.approx([6.0, 2.0])
    assert budget.spend().tolist() == [6, 2]


def test_a_maximum_is_never_passed_and_far_away_it_changes_nothing():
    logits = [3.0, 0.0, -1.0]
    free = split_with(logits, total=12)
    near = split_with(logits, total=12, minimum=[0, 2, 0], maximum=[5, 9, 9])
    resources = near.resources().detach()
    assert (resources < torch.tensor([5.0, 9.0, 9.0])).all()
    assert resources[1] > 2
    assert float(resources.sum()) == pytest.approx(12, rel=1e-9)
    far = split_with(logits, total=12, maximum=10**7)
    torch.testing.assert_close(far.resources(), free.resources(), rtol=1e-5, atol=0)
    # One context without a maximum beside others that have one.
    mixed = split_with(logits, total=12, maximum=[2, torch.inf, 3]).resources().detach()
    assert mixed[0] <= 2  # nearer than rounding can tell
    assert mixed.sum().item() == pytest.approx(12)


@given(
    logits=st.lists(st.floats(-8, 8), min_size=2, max_size=7),
    total=st.integers(1, 200),
    data=st.data(),
)
def test_whole_units_never_cost_more_and_leave_nothing_that_buys_another(logits, total, data):
    count = len(logits)
    price = data.draw(st.lists(st.floats(0.3, 5), min_size=count, max_size=count))
    maximum = data.draw(st.lists(st.integers(1, 30), min_size=count, max_size=count))
    if sum(p * m for p, m in zip(price, maximum, strict=True)) <= total + 1e-3:
        return
    budget = BudgetSplit(count, total=total, price=price, maximum=maximum)
    with torch.no_grad():
        budget.logits.copy_(torch.tensor(logits))
    units, price = budget.spend(), budget.price
    cost = float(units.double() @ price.double())
    assert cost <= total * (1 + 1e-6)
    below = units < torch.tensor(maximum)
    assert (units >= 0).all()
    assert (units <= torch.tensor(maximum)).all()
    assert not below.any() or cost + float(price[below].min()) > total * (1 - 1e-6)


@given(weights=st.lists(st.floats(0.01, 1), min_size=2, max_size=4), total=st.integers(1, 7))
def test_at_equal_prices_no_whole_split_is_nearer(weights, total):
    resources = torch.tensor(weights, dtype=torch.float64)
    resources = total * resources / resources.sum()
    units = largest_remainder(resources, total)
    assert units.sum() == total
    every = [split for split in product(range(total + 1), repeat=len(weights)) if sum(split) == total]
    nearest = min(float((torch.tensor(split) - resources).abs().sum()) for split in every)
    assert float((units - resources).abs().sum()) == pytest.approx(nearest, abs=1e-9)


def test_a_fixed_split_is_what_was_asked_for_and_learns_no_more():
    budget = BudgetSplit(3, total=10, temperature=2.0)
    budget.fix([0.5, 0.3, 0.2])
    torch.testing.assert_close(budget.shares(), torch.tensor([0.5, 0.3, 0.2]))
    assert not budget.logits.requires_grad
    budget.fix([1.0, 0.0, 0.0])
    assert budget.spend().tolist() == [10, 0, 0]


def test_a_total_given_at_run_time_is_the_one_given_at_first():
    fixed, open_ended = split_with([1.0, 0.0], total=7), split_with([1.0, 0.0], total=None)
    torch.testing.assert_close(open_ended.sigma(2.0, total=7), fixed.sigma(2.0))
    assert torch.equal(open_ended.spend(7), fixed.spend())
    torch.testing.assert_close(open_ended.shares(), fixed.shares())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"contexts": 0}, "positive number, or names without repeats, but got 0"),
        ({"contexts": ["a", "a"]}, "names without repeats"),
        ({"total": 0}, "must lie above 0, what the minima cost"),
        ({"total": 6, "minimum": 2}, "must lie above 6, what the minima cost, and below inf"),
        ({"total": 9, "maximum": 3}, "below 9, what the maxima cost, but is 9.0"),
        ({"process": "photons"}, "must be one of .*'sampling', 'rate', 'quantization'.* but got 'photons'"),
        ({"temperature": 0}, "`temperature` must be positive but got 0"),
        ({"samples": 0}, "`samples` must be at least 1 but got 0"),
        ({"price": [1, 2]}, r"`price` must be one number or 3 but got \[1, 2\]"),
        ({"price": 0.0}, "`price` must be positive but got 0.0"),
        ({"minimum": 4, "maximum": 3}, "at least 0 and below its `maximum` but got 4 and 3"),
        ({"maximum": 2.5}, r"`maximum` counts whole units but got \[2.5, 2.5, 2.5\]"),
    ],
)
def test_a_budget_says_what_is_wrong(arguments, text):
    with pytest.raises(ValueError, match=text):
        BudgetSplit(**{"contexts": 3, "total": 20, **arguments})


def test_calls_say_what_is_wrong():
    with pytest.raises(ValueError, match="no total of its own; give `total` here"):
        BudgetSplit(3).spend()
    with pytest.raises(ValueError, match=r"features of 3 contexts.* got \(5, 4\)"):
        BudgetSplit(3, total=5)(torch.zeros(5, 4))
    with pytest.raises(ValueError, match="without `minimum` and `maximum`"):
        BudgetSplit(3, total=5, minimum=1).fix([0.2, 0.3, 0.5])
    with pytest.raises(ValueError, match="3 shares that sum to 1 but got"):
        BudgetSplit(3, total=5).fix([0.2, 0.3, 0.6])
    with pytest.raises(ValueError, match="buys 3 observations of a context but the data hold 2"):
        SamplingNoise().gather(torch.zeros(1, 2, 1), 3, torch.ones(1), torch.zeros(1))
    with pytest.raises(ValueError, match="cannot be measured on one observation"):
        SamplingNoise().spread(torch.zeros(5, 3, 1, 2))


# --- linear models

WEIGHTS = torch.tensor([2.0, -1.0, 0.5, 0.3, 1.0])
VARIANCE = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0])
PRICE = torch.tensor([1.0, 1.0, 2.0, 0.5, 1.5])
TOTALS = {"sampling": 10.0, "rate": 10.0, "quantization": 9.0}


def added_error(process, resources, price=None):
    """What noise adds to a linear model's squared error, written out."""
    v, r = VARIANCE.numpy(), resources
    noise = {"sampling": lambda: v / r, "rate": lambda: v / r**2, "quantization": lambda: v * 4.0**-r}[process]
    return float((WEIGHTS.numpy() ** 2 * noise()).sum())


@pytest.mark.parametrize("process", PROCESSES)
def test_the_closed_form_is_what_scipy_finds(process):
    price, total = PRICE.numpy(), TOTALS[process]
    found = minimize(
        lambda r: added_error(process, r),
        x0=total / price / len(price),
        bounds=[(0 if process == "quantization" else 1e-3, None)] * 5,
        constraints={"type": "eq", "fun": lambda r: price @ r - total},
        options={"ftol": 1e-12, "maxiter": 500},
    )
    assert found.success
    ours = linear_resources(WEIGHTS, total, process, VARIANCE, PRICE)
    np.testing.assert_allclose(ours, found.x, atol=2e-3)  # SLSQP's own accuracy
    assert added_error(process, ours.numpy()) <= found.fun * (1 + 1e-6)


def test_contexts_worth_no_bit_get_none():
    units = linear_resources(torch.tensor([8.0, 4.0, 0.01]), total=3, process="quantization")
    assert units.tolist() == pytest.approx([2.0, 1.0, 0.0])


def test_weights_of_several_features_add_up():
    weights = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    torch.testing.assert_close(linear_resources(weights, 12), torch.tensor([10.0, 2.0]))


class Cubic(NoiseProcess):
    """A process of a user's own: variance falls with the cube of what is spent."""

    def sigma(self, resources, variance):
        return (variance / resources**3).sqrt()

    def spread(self, statistics):
        raise NotImplementedError

    def gather(self, statistics, amount, variance, centre):
        raise NotImplementedError


def learnt_resources(process, total, train_weights):
    """The split that gradients through the noise find for the linear-Gaussian problem y = w x."""
    budget = BudgetSplit(5, total, process=process, price=PRICE.tolist())
    weights = WEIGHTS.clone().requires_grad_(train_weights)
    parameters = [{"params": budget.parameters(), "lr": 0.03}, {"params": [weights], "lr": 0.01}]
    optimizer = torch.optim.Adam(parameters if train_weights else parameters[:1], betas=(0.9, 0.99))
    steps = 1200
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        features = torch.randn(512, 5, generator=generator)
        loss = (budget(features, VARIANCE, samples=2) @ weights - (features @ WEIGHTS).repeat(2)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return budget.shares().detach()


@pytest.mark.parametrize("process", PROCESSES)
def test_the_learnt_split_of_a_linear_model_is_the_closed_form(process):
    optimum = linear_resources(WEIGHTS, TOTALS[process], process, VARIANCE, PRICE) * PRICE / TOTALS[process]
    learnt = learnt_resources(process, TOTALS[process], train_weights=False)
    assert (learnt - optimum).abs().max() < 0.02


@pytest.mark.parametrize("process", [*PROCESSES, Cubic()], ids=[*PROCESSES, "a user's own"])
def test_split_and_weights_learnt_together_reach_the_joint_optimum(process):
    """With weights that may shrink, the error is Σ w² s / (1 + s) with s = σ²: x is standard normal."""
    total = TOTALS.get(process, 10.0) if isinstance(process, str) else 10.0
    reference = BudgetSplit(5, total, process=process, price=PRICE.tolist()).double()

    def error(logits):
        with torch.no_grad():
            reference.logits.copy_(torch.from_numpy(logits))
            noise = reference.sigma(VARIANCE).square()
        return float((WEIGHTS.double() ** 2 * noise / (1 + noise)).sum())

    options = {"maxiter": 4000, "xatol": 1e-7, "fatol": 1e-10}
    starts = np.random.default_rng(0).normal(size=(4, 5))
    found = [minimize(error, start, method="Nelder-Mead", options=options) for start in starts]
    best = min(found, key=lambda result: result.fun)
    error(best.x)
    optimum, least = reference.shares().detach().float(), best.fun
    learnt = learnt_resources(process, total, train_weights=True)
    assert error(learnt.double().log().numpy()) < 1.02 * least
    if isinstance(process, str):  # the optimum of the user's own gives two contexts nothing, which a softmax nears slowly
        assert (learnt - optimum).abs().max() < 0.02


# --- splits without gradients


def test_norms_are_of_each_context_s_columns_alone():
    weights = torch.randn(7, 3 * 4 + 2, generator=torch.Generator().manual_seed(0))  # two columns of flags
    norms = [float(np.linalg.norm(weights[:, 4 * c : 4 * c + 4])) for c in range(3)]
    np.testing.assert_allclose(norm_shares(weights, 3), np.array(norms) / sum(norms), rtol=1e-6)


def test_random_splits_are_spread_evenly_over_the_simplex():
    tried = np.array([trial.shares for trial in random_search(lambda shares: 0.0, contexts=4, trials=4000, seed=1)])
    np.testing.assert_allclose(tried.sum(1), 1, rtol=1e-12)
    # Dirichlet(1, 1, 1, 1): each share is Beta(1, 3), with mean 1/4, variance 3/80 and a 3/4 chance to the 3 of exceeding 1/4.
    np.testing.assert_allclose(tried.mean(0), 0.25, atol=0.012)
    np.testing.assert_allclose(tried.var(0), 3 / 80, rtol=0.1)
    np.testing.assert_allclose((tried > 0.25).mean(0), 0.75**3, atol=0.03)


def test_bayesian_optimisation_comes_nearer_than_chance():
    pytest.importorskip("optuna")
    squared = np.array([25.0, 4.0, 1.0, 0.5, 0.3, 0.1])

    def error(shares):  # of a linear model whose weights shrink as the noise asks
        noise = 1 / (10 * np.array(shares))
        return float((squared * noise / (1 + noise)).sum())

    found = [min(trial.error for trial in bayesian_search(error, contexts=6, trials=25, seed=seed)) for seed in range(2)]
    chance = [min(trial.error for trial in random_search(error, 6, 25, seed)) for seed in range(20)]
    assert np.mean(found) < np.mean(chance) - np.std(chance)


@pytest.mark.parametrize("search", [random_search, bayesian_search])
def test_a_search_refuses_nothing_to_do(search):
    with pytest.raises(ValueError, match="2 contexts and 1 trial but got 1 and 0"):
        search(lambda shares: 0.0, contexts=1, trials=0)


def test_norms_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"at least 4 columns of weights but got shape \(2, 3\)"):
        norm_shares(torch.ones(2, 3), 4)
    with pytest.raises(ValueError, match="All weights are 0"):
        norm_shares(torch.zeros(2, 4), 4)
