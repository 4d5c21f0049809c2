"""Two choices of the thesis's chapter 5: three dimensions for tensor decompositions (figure 5.6), and the riffle in ACDC.

    python -m benchmarks.experiments.compressed_settings --data DIR --out docs/images/compressed_settings

The grid trains LeNet-300-100, all but its last layer decomposed, on MNIST. The permutations are compared on the regression of
ACDC's paper (section 6.1): 10,000 inputs of 32 numbers and a matrix, both uniform in [0, 1), whose products, with noise of
variance 1e-4, are to be learnt.

Writes OUT.json after every run (and goes on from it), OUT.png, and tables on the standard output.
"""

import argparse
import statistics
from itertools import product
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

from benchmarks.experiments.training import Finished, Run, grouped, mean_and_spread, quiet, train
from lit_compress import count_parameters, substitute_linear
from lit_compress.datamodules import MNISTDataModule
from lit_compress.layers import ACDCLinear
from lit_compress.models import LeNet300100

DIMENSIONS, SCALES, FACTORS = (2, 3, 4, 5), (0.1, 0.3, 0.6, 1.0), (1, 4, 16)
KINDS = ("tensor_train", "tucker")
PERMUTATIONS = ("riffle", "random")


def grid_run(kind: str, dims: int, scale: float, seed: int, data: MNISTDataModule, epochs: int) -> Run:
    """A network with decomposed layers, trained; its test accuracy and size."""
    torch.manual_seed(seed)
    net = LeNet300100()
    dense = count_parameters(net)
    substitute_linear(net, kind, setting=scale, dims=dims, first=True)  # type: ignore[arg-type]
    return {"accuracy": train(net, data, epochs, seed), "size": count_parameters(net) / dense}


def regression_run(permutation: str, factors: int, seed: int, steps: int) -> Run:
    """Mean squared error of ACDC on the regression, by Adam with a falling learning rate."""
    torch.manual_seed(seed)
    inputs, matrix = torch.rand(10_000, 32), torch.rand(32, 32)
    targets = inputs @ matrix + 0.01 * torch.randn(10_000, 32)
    layer = ACDCLinear(32, 32, layers=factors, bias=False)
    if permutation == "random":
        layer.riffle = torch.randperm(32)
        layer.interleave = layer.riffle.argsort()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = torch.randint(len(inputs), (256,))
        optimizer.zero_grad()
        nn.functional.mse_loss(layer(inputs[batch]), targets[batch]).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return {"error": nn.functional.mse_loss(layer(inputs), targets).item()}


def tables(runs: list[Run]) -> str:
    """Accuracy over the grid, and errors of both permutations, as markdown."""
    lines = [
        "| kind | dimensions | " + " | ".join(f"scale {scale:g}" for scale in SCALES) + " |",
        f"|---|---|{'---|' * len(SCALES)}",
    ]
    grid = grouped([run for run in runs if run["part"] == "grid"], lambda run: (run["kind"], str(run["dims"])))
    for (kind, dims), of_row in grid.items():
        cells = []
        for scale in SCALES:
            here = [run for run in of_row if run["scale"] == scale]
            cells.append(f"{mean_and_spread(here)}, {here[0]['size']:.1%}" if here else "")
        lines.append(f"| {kind} | {dims} | {' | '.join(cells)} |")
    lines += [
        "",
        "| permutation | " + " | ".join(f"{factors} factors" for factors in FACTORS) + " |",
        f"|---|{'---|' * len(FACTORS)}",
    ]
    for (permutation,), of_row in grouped(
        [run for run in runs if run["part"] == "regression"], lambda run: (run["kind"],)
    ).items():
        cells = []
        for factors in FACTORS:
            errors = [run["error"] for run in of_row if run["factors"] == factors]
            cells.append(f"{statistics.mean(errors):.3g} ({min(errors):.3g}–{max(errors):.3g})" if errors else "")
        lines.append(f"| {permutation} | {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(runs: list[Run]) -> Figure:
    """Error against size for each number of dimensions, and the errors of both permutations."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, kind in zip(panels, KINDS, strict=False):
        for dims in DIMENSIONS:
            here = [run for run in runs if run["part"] == "grid" and run["kind"] == kind and run["dims"] == dims]
            axes.plot([100 * run["size"] for run in here], [100 * (1 - run["accuracy"]) for run in here], "o", label=f"{dims}")
        axes.set(title=kind, xlabel="% of parameters", ylabel="test error, %")
        axes.legend(title="dimensions", fontsize="small")
    for permutation, mark in zip(PERMUTATIONS, "ox", strict=True):
        here = [run for run in runs if run["part"] == "regression" and run["kind"] == permutation]
        panels[2].plot([run["factors"] for run in here], [run["error"] for run in here], mark, label=permutation)
    panels[2].set(title="ACDC on its regression", xlabel="factors", ylabel="mean squared error")
    panels[2].legend(fontsize="small")
    for axes in panels:
        axes.grid(alpha=0.3)
        if any(len(line.get_xdata()) for line in axes.get_lines()):
            axes.set(xscale="log", yscale="log")
    return figure


def main() -> None:
    """Run what is asked for and not yet done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with MNIST; $LIT_COMPRESS_DATA or ./data by default")
    parser.add_argument("--parts", nargs="+", default=["regression", "grid"], choices=["regression", "grid"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--train_size", type=int, default=2_000)
    parser.add_argument("--steps", type=int, default=1_000, help="of the regression")
    parser.add_argument("--out", type=Path, default=Path("compressed_settings"))
    options = parser.parse_args()
    quiet()
    finished = Finished(options.out.with_suffix(".json"))
    data = MNISTDataModule(options.data, batch_size=50, train_size=options.train_size)
    if "grid" in options.parts:
        data.prepare_data()
        data.setup("fit")
    for seed in options.seeds:
        for permutation, factors in product(PERMUTATIONS, FACTORS) if "regression" in options.parts else ():
            key = {"part": "regression", "kind": permutation, "factors": factors, "seed": seed}
            if not finished.holds(**key):
                finished.add([{**key, **regression_run(permutation, factors, seed, options.steps)}])
                print(finished.runs[-1], flush=True)
        for kind, dims, scale in product(KINDS, DIMENSIONS, SCALES) if "grid" in options.parts else ():
            key = {"part": "grid", "kind": kind, "dims": dims, "scale": scale, "seed": seed}
            if not finished.holds(**key):
                finished.add([{**key, **grid_run(kind, dims, scale, seed, data, options.epochs)}])
                print(finished.runs[-1], flush=True)
    picture(finished.runs).savefig(options.out.with_suffix(".png"), dpi=110)
    print(tables(finished.runs))


if __name__ == "__main__":
    main()
