"""Rotational MNIST: a learnt budget beside uniform, ℓ2 norm, random search and Bayesian optimisation (figure 3.6 of the thesis).

    python -m benchmarks.experiments.rotated_mnist --data DIR --seeds 0 1 2 --out docs/images/rotated_mnist

Writes OUT.json after every run (and goes on from it), OUT.png, and tables on the standard output.
"""

import argparse
import time
from collections.abc import Sequence
from math import isinf
from pathlib import Path

import torch
from matplotlib.figure import Figure

from benchmarks.experiments.gathering import Runs, extra, first_layer, fit, interval, quiet, validated
from lit_compress.budget import BudgetSplit, bayesian_search, matching_total, norm_shares, random_search
from lit_compress.datamodules import MNISTDataModule, RotatedMNISTDataModule
from lit_compress.metrics import MeanAngleError
from lit_compress.models import NormedMLP
from lit_compress.modules import LitFeatureGatherer

# Share of black images for each digit, 0 to 9.
SPARSITIES = {
    "half": (0.5,) * 10,
    "graded": (0.9, 0.5, 0.8, 0.3, 0.95, 0.2, 0.7, 0.6, 0.4, 0.85),
    "strong": (0.97, 0.5, 0.97, 0.9, 0.97, 0.2, 0.97, 0.9, 0.97, 0.5),
}
MAIN = "strong"
TOTALS = (5, 10, 20)
RANGE = (4.0, 160.0)
SIDE, STATISTICS, BINS = 14, 16, 256


def gatherer(contexts: int, total: float | None, shares: Sequence[float] | None = None, learn: bool = True) -> LitFeatureGatherer:
    """The thesis's networks, smaller: 128-128-16 where it has 800-800-32, and no dropout."""
    budget = BudgetSplit(contexts, total)
    if shares is not None:
        budget.fix(shares)
    return LitFeatureGatherer(
        budget,
        predictor=NormedMLP(contexts * STATISTICS + (total is None), (128,), BINS),
        features=STATISTICS,
        statistic=NormedMLP(SIDE * SIDE, (128, 128), STATISTICS),
        metric=MeanAngleError(bins=BINS),
        totals=RANGE if total is None else None,
        learn=learn,
        optimizer=lambda groups: torch.optim.Adam(groups, lr=2e-3),
        budget_speed=5.0,
    )


def match(runs: Runs, sparsity: str, seed: int, data: RotatedMNISTDataModule, epochs: int) -> None:
    """How much larger a uniform budget must be; both models are for the whole range of totals."""

    def run() -> dict:
        learnt = fit(lambda: gatherer(10, None), data, epochs, seed)
        uniform = fit(lambda: gatherer(10, None, learn=False), data, epochs, seed)
        ours, theirs = (module.summarise(data.test_dataloader()) for module in (learnt, uniform))
        found: dict = {"shares": learnt.budget.shares().tolist(), "seconds": learnt.seconds}
        for total in TOTALS:
            error = learnt.error_at(ours, total)
            matched = matching_total(lambda asked: uniform.error_at(theirs, asked), error, *RANGE)
            found[str(total)] = {
                "learnt": error,
                "uniform": uniform.error_at(theirs, total),
                "matched": None if isinf(matched) else matched,  # JSON has no infinity
            }
        return found

    runs.get({"part": "extra", "sparsity": sparsity, "seed": seed}, run)


def compare(runs: Runs, seed: int, data: RotatedMNISTDataModule, epochs: int, trials: int) -> None:
    """All ways to a split, at a total of 10."""

    def measured(module: LitFeatureGatherer, seconds: float) -> dict:
        test = module.error_at(module.summarise(data.test_dataloader()))
        shares = module.budget.shares().tolist()
        return {"error": test, "validation": validated(module, data), "seconds": seconds, "shares": shares}

    def trained(shares: Sequence[float] | None, learn: bool = False) -> tuple[dict, LitFeatureGatherer]:
        module = fit(lambda: gatherer(10, 10.0, shares, learn), data, epochs, seed)
        return measured(module, module.seconds), module

    def key(arm: str) -> dict:
        return {"part": "compare", "arm": arm, "seed": seed}

    runs.get(key("gradient"), lambda: trained(None, learn=True)[0])

    def uniform() -> dict:
        found, module = trained(None)
        return {**found, "norms": norm_shares(first_layer(module).weight, 10).tolist()}

    norms = runs.get(key("uniform"), uniform)["norms"]
    runs.get(key("l2 norm"), lambda: trained(norms)[0])
    for arm, search in (("random search", random_search), ("Bayesian optimisation", bayesian_search)):
        if not trials:
            continue

        def searched(search: object = search) -> dict:
            tried: list[dict] = []

            def objective(shares: Sequence[float]) -> float:
                tried.append(trained(shares)[0])
                return tried[-1]["validation"]

            start = time.perf_counter()
            search(objective, 10, trials, seed)  # type: ignore[operator]
            best = min(tried, key=lambda trial: trial["validation"])
            return {**best, "seconds": time.perf_counter() - start, "trials": [trial["error"] for trial in tried]}

        runs.get(key(arm), searched)


def noise(runs: Runs, data: RotatedMNISTDataModule, epochs: int) -> None:
    """Standard error of really gathered statistics over the model's σ, for each digit; the mean of 64 stands for the truth."""

    def run() -> dict:
        module = fit(lambda: gatherer(10, 10.0), data, epochs, seed=0)
        statistics = torch.cat([batch[0] for batch in module.summarise(data.test_dataloader())])
        truth = statistics.mean(2)
        ratios = {}
        for amount in (1, 2, 4):
            # The truth holds the observations themselves, which makes the error look smaller by this factor.
            square = (statistics[:, :, :amount].mean(2) - truth).square().mean((0, 2)) / (1 - amount / statistics.shape[2])
            ratios[str(amount)] = (square / (module.variance.mean(1) / amount)).sqrt().tolist()
        return ratios

    runs.get({"part": "noise"}, run)


def tables(done: list[dict]) -> str:
    """Both comparisons, as markdown."""
    lines = ["| split | angle error, rad | runs | fits a run | seconds a run |", "|---|---|---|---|---|"]
    for arm in ("gradient", "uniform", "l2 norm", "random search", "Bayesian optimisation"):
        found = [run for run in done if run["part"] == "compare" and run["arm"] == arm]
        if found:
            fits = len(found[0].get("trials", [arm])) + (arm == "l2 norm")
            seconds = sum(run["seconds"] for run in found) / len(found)
            lines.append(f"| {arm} | {interval([run['error'] for run in found])} | {len(found)} | {fits} | {seconds:.0f} |")
    lines += [
        "",
        "| black images | total | learnt, rad | uniform, rad | uniform must be larger by, median (range) | runs |",
        "|---|---|---|---|---|---|",
    ]
    every: list[float] = []
    for sparsity in SPARSITIES:
        found = [run for run in done if run["part"] == "extra" and run["sparsity"] == sparsity]
        for total in TOTALS if found else ():
            here = [run[str(total)] for run in found]
            matched = [one["matched"] for one in here]
            every += [(value or RANGE[1]) / total - 1 for value in matched]
            more = extra(matched, total, RANGE[1])
            ours, theirs = (interval([one[name] for one in here]) for name in ("learnt", "uniform"))
            lines.append(f"| {sparsity} | {total} | {ours} | {theirs} | {more} | {len(here)} |")
    if every:
        lines += [
            "",
            f"Over all: {interval(every, percent=True)} ({len(every)} comparisons; beyond the range counts as its end).",
        ]
    for run in done:
        if run["part"] == "noise":
            lines += ["", "| images gathered | measured standard error over σ, each digit | mean |", "|---|---|---|"]
            for amount in ("1", "2", "4"):
                ratios = run[amount]
                every_digit = " ".join(f"{ratio:.2f}" for ratio in ratios)
                lines.append(f"| {amount} | {every_digit} | {sum(ratios) / len(ratios):.3f} |")
    return "\n".join(lines)


def picture(done: list[dict]) -> Figure:
    """The two histograms of figure 3.6."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    groups = {
        sparsity: [
            run[str(total)]["matched"]
            for run in done
            if run["part"] == "extra" and run["sparsity"] == sparsity
            for total in (10,)
            if run[str(total)]["matched"] is not None
        ]
        for sparsity in SPARSITIES
    }
    left.hist(list(groups.values()), bins=12, stacked=True, label=list(groups))
    left.axvline(10, color="k", linestyle=":", label="learnt")
    left.set(xlabel="total of a uniform split that does as well as a learnt 10", ylabel="runs")
    left.legend(fontsize="small", title="black images")
    compared = [run for run in done if run["part"] == "compare"]
    trials = {
        arm: [error for run in compared if run["arm"] == arm for error in run["trials"]]
        for arm in ("random search", "Bayesian optimisation")
        if any(run["arm"] == arm for run in compared)
    }
    if trials:
        right.hist(list(trials.values()), bins=12, label=list(trials), color=["#56B4E9", "#999999"][: len(trials)])
    for arm, colour in (("gradient", "#009E73"), ("uniform", "#D55E00"), ("l2 norm", "#CC79A7")):
        errors = [run["error"] for run in compared if run["arm"] == arm]
        if errors:
            right.axvline(sum(errors) / len(errors), color=colour, label=arm)
    right.set(xlabel="angle error, rad", ylabel="trials")
    right.legend(fontsize="small")
    return figure


def main() -> None:
    """Run what is asked for and not yet done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with MNIST; $LIT_COMPRESS_DATA or ./data by default")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=3, help="of 150 steps of 64 sets")
    parser.add_argument("--sets", type=int, default=64 * 150, help="in an epoch")
    parser.add_argument("--test_sets", type=int, default=1024)
    parser.add_argument("--trials", type=int, default=8, help="of random search and of Bayesian optimisation")
    parser.add_argument("--search_seeds", nargs="*", type=int, default=[0], help="seeds for which to search")
    parser.add_argument("--out", type=Path, default=Path("rotated_mnist"))
    options = parser.parse_args()
    quiet()
    runs = Runs(options.out.with_suffix(".json"))

    def data(sparsity: str, offered: int = 24, test_sets: int = options.test_sets) -> RotatedMNISTDataModule:
        return RotatedMNISTDataModule(
            MNISTDataModule(options.data), observations=4, test_observations=offered, sparsity=SPARSITIES[sparsity], bins=BINS,
            side=SIDE, train_size=options.sets, val_size=512, test_size=test_sets,
        )  # fmt: skip

    for seed in options.seeds:
        compare(runs, seed, data(MAIN), options.epochs, trials=0)
        for sparsity in SPARSITIES:
            match(runs, sparsity, seed, data(sparsity), options.epochs)
    for seed in options.search_seeds:
        compare(runs, seed, data(MAIN), options.epochs, options.trials)
    noise(runs, data("graded", offered=64, test_sets=min(400, options.test_sets)), options.epochs)
    picture(runs.done).savefig(options.out.with_suffix(".png"), dpi=110)
    print(tables(runs.done))


if __name__ == "__main__":
    main()
