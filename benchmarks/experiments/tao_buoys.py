"""TAO: ten imputation tasks, how much dearer a uniform budget is, which buoys are paid for (the thesis's figures 3.9, 3.10).

    python -m benchmarks.experiments.tao_buoys --data DIR --seeds 0 1 2 3 4 --out docs/images/tao_buoys

Writes OUT.json after every run (and goes on from it), OUT.png, and a table on the standard output.
"""

import argparse
from math import isinf
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.experiments.gathering import Runs, extra, fit, interval, quiet
from lit_compress.budget import BudgetSplit, matching_total
from lit_compress.datamodules import TAODataModule
from lit_compress.models import NormedMLP
from lit_compress.modules import LitFeatureGatherer

TOTAL = 18.0
RANGE = (4.0, 250.0)


def gatherer(learn: bool) -> LitFeatureGatherer:
    """The thesis's network: three hidden layers of 96 with batch norm; told the flags of what is missing, and the total."""
    return LitFeatureGatherer(
        BudgetSplit(9),
        predictor=NormedMLP(9 * 5 + 9 * 5 + 1, (96, 96, 96), 5),
        features=5,
        loss="squared_error",
        variance=1.0,
        totals=RANGE,
        test_total=TOTAL,
        learn=learn,
        optimizer=lambda groups: torch.optim.Adam(groups, lr=1e-3),
        budget_speed=5.0,
    )


def run_task(data: TAODataModule, seed: int, epochs: int) -> dict:
    """One buoy told from the nine others, by a learnt and by a uniform split."""
    learnt, uniform = (fit(lambda learn=learn: gatherer(learn), data, epochs, seed) for learn in (True, False))
    ours, theirs = (module.summarise(data.test_dataloader()) for module in (learnt, uniform))
    error = learnt.error_at(ours)
    matched = matching_total(lambda total: uniform.error_at(theirs, total), error, *RANGE)
    targets = torch.cat([batch[1] for batch in data.test_dataloader()])
    return {
        "learnt": error,
        "uniform": uniform.error_at(theirs, TOTAL),
        "mean": float(targets.square().nanmean()),
        "matched": None if isinf(matched) else matched,
        "shares": learnt.budget.shares().tolist(),
        "seconds": learnt.seconds,
    }


def distances(positions: np.ndarray) -> np.ndarray:
    """Great-circle distances between all buoys, in thousands of kilometres."""
    north, east = np.deg2rad(positions).T
    cosine = np.sin(north[:, None]) * np.sin(north) + np.cos(north[:, None]) * np.cos(north) * np.cos(east[:, None] - east)
    return 6.371 * np.arccos(cosine.clip(-1, 1))


def table(done: list[dict], data: TAODataModule) -> str:
    """A row a buoy, as markdown."""
    apart = distances(data.positions)
    lines = [
        "| buoy | predicting the mean | uniform | learnt | uniform costs more by, median (range) | share of the nearest | runs |",
        "|---|---|---|---|---|---|---|",
    ]
    every: list[float | None] = []
    for target in sorted({run["target"] for run in done}):
        found = [run for run in done if run["target"] == target]
        matched = [run["matched"] for run in found]
        every += matched
        cost = extra(matched, TOTAL, RANGE[1])
        others = [buoy for buoy in range(10) if buoy != target]
        nearest = int(np.argmin(apart[target][others]))
        share = interval([run["shares"][nearest] for run in found], percent=True)
        columns = [interval([run[name] for run in found]) for name in ("mean", "uniform", "learnt")]
        name = TAODataModule(target=target, data_dir=data.data_dir, synthetic=data.synthetic).target_name
        lines.append(f"| {target} ({name}) | {' | '.join(columns)} | {cost} | {share} | {len(found)} |")
    if every:
        better = sum(run["learnt"] < run["uniform"] for run in done)
        lines += ["", f"Over all: {extra(every, TOTAL, RANGE[1])}; the learnt split errs less in {better} of {len(done)} runs."]
    return "\n".join(lines)


def picture(done: list[dict], data: TAODataModule) -> Figure:
    """The split of each task over the map: a disc a buoy, its area the share; the cross is the buoy that is told."""
    figure = Figure(figsize=(11, 9), layout="constrained")
    north, east = data.positions.T
    for target, axes in enumerate(figure.subplots(5, 2, sharex=True, sharey=True).flat):
        found = [run["shares"] for run in done if run["target"] == target]
        if found:
            others = [buoy for buoy in range(10) if buoy != target]
            axes.scatter(east[others], north[others], s=1200 * np.mean(found, axis=0), alpha=0.6)
            axes.plot(east[target], north[target], "kx")
            axes.set_title(f"buoy {target}", fontsize="small")
        axes.grid(alpha=0.3)
    figure.supxlabel("degrees east")
    figure.supylabel("degrees north")
    return figure


def main() -> None:
    """Run what is asked for and not yet done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with tao/; $LIT_COMPRESS_DATA or ./data by default")
    parser.add_argument("--synthetic", action="store_true", help="made-up buoys, without a file")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--targets", nargs="+", type=int, default=list(range(10)))
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("tao_buoys"))
    options = parser.parse_args()
    quiet()
    runs = Runs(options.out.with_suffix(".json"))

    def data(target: int, seed: int = 0) -> TAODataModule:
        return TAODataModule(target=target, data_dir=options.data, synthetic=options.synthetic, readings=250, seed=seed)

    for seed in options.seeds:
        for target in options.targets:
            task = data(target, seed if not options.synthetic else 0)
            runs.get({"target": target, "seed": seed}, lambda task=task, seed=seed: run_task(task, seed, options.epochs))
    picture(runs.done, data(0)).savefig(options.out.with_suffix(".png"), dpi=100)
    print(table(runs.done, data(0)))


if __name__ == "__main__":
    main()
