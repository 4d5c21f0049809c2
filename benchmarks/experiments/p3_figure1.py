"""P3's figure 1 on MNIST: accuracy against size, for PFA, random recipes, random weights and a uniformly narrow network.

    python -m benchmarks.experiments.p3_figure1 --data DIR --seeds 0 1 2 --out docs/images/p3_figure1

Every arm trains with the settings of the full network, as in the paper. Writes OUT.json after every seed (and goes on from it),
OUT.png, and a table on the standard output.
"""

import argparse
import copy
import statistics
from pathlib import Path

import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from torch import nn

from benchmarks.experiments.figures import plain_log_scales
from benchmarks.experiments.training import Finished, Run, grouped, mean_and_spread, quiet, test, train
from lit_compress import Recipe, analyze, count_parameters, cut, reinitialize
from lit_compress.datamodules import MNISTDataModule
from lit_compress.models import LeNet5, SimpleCNN

TARGETS = {"PFA-KL": None, "PFA-En .99": 0.99, "PFA-En .95": 0.95, "PFA-En .90": 0.9}


def build(network: str, width: float = 1.0) -> nn.Module:
    """A network of the documents; `width` narrows every layer alike."""
    if network == "lenet5":
        net = LeNet5()
        widths = {name: max(round(size * width), 1) for name, size in (("conv1", 20), ("conv2", 50), ("fc1", 500))}
        return net if width == 1 else _narrowed(net, widths)
    return SimpleCNN(num_classes=10, in_channels=1, width=max(round(24 * width), 1), dropout=0.2)


def _narrowed(net: nn.Module, widths: dict[str, int]) -> nn.Module:
    """LeNet-5 with other widths: made by a cut, then given new weights."""
    layers = [name for name, module in net.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))][:-1]
    keep = {name: tuple(range(size)) for name, size in zip(layers, widths.values(), strict=True)}
    cut(net, Recipe(keep=keep), torch.rand(1, 1, 28, 28), verify=False)
    reinitialize(net)
    return net


def run_seed(network: str, data: MNISTDataModule, seed: int, epochs: int, randoms: int) -> list[Run]:
    """All arms for one seed."""
    done: list[Run] = []

    def record(arm: str, recipe: str, size: float, accuracy: float) -> None:
        done.append({"network": network, "seed": seed, "arm": arm, "recipe": recipe, "size": size, "accuracy": accuracy})
        print(f"{network}, seed {seed}: {arm}, {recipe}: {size:.1%} of the parameters, {accuracy:.2%} right", flush=True)

    pl.seed_everything(seed, verbose=False)
    full = build(network)
    record("full", "full", 1.0, train(full, data, epochs, seed))
    original = count_parameters(full)
    full.eval()
    analysis = analyze(full, data.analysis_dataloader(), compensate=True)
    example = next(iter(data.analysis_dataloader()))[0][:2]

    def small(recipe: Recipe, compensate: bool = False) -> nn.Module:
        net = copy.deepcopy(full)
        means = analysis.inputs if compensate else None
        cut(net, recipe, example, graph=analysis.graph, inputs=means)
        return net

    for name, energy in TARGETS.items():
        recipe = analysis.recipe(energy=energy)
        size = analysis.parameters(recipe) / original
        record("right after the cut", name, size, test(small(recipe), data))
        record("right after the cut, compensated", name, size, test(small(recipe, compensate=True), data))
        record("filter selection", name, size, train(small(recipe), data, epochs, seed))
        pl.seed_everything(seed, verbose=False)
        anew = small(recipe)
        reinitialize(anew)
        record("random weights", name, size, train(anew, data, epochs, seed))
        for number in range(randoms):
            chance = analysis.random_recipe(keep_params=size, seed=100 * seed + number)
            record("random recipe", name, analysis.parameters(chance) / original, train(small(chance), data, epochs, seed))
        low, high = 0.02, 1.0
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (middle, high) if count_parameters(build(network, middle)) <= size * original else (low, middle)
        pl.seed_everything(seed, verbose=False)
        narrow = build(network, low)
        record("narrow from scratch", name, count_parameters(narrow) / original, train(narrow, data, epochs, seed))
    return done


def table(done: list[Run]) -> str:
    """Mean and standard deviation over seeds, as markdown."""
    lines = ["| network | recipe | arm | parameters | accuracy, mean (sd) | runs |", "|---|---|---|---|---|---|"]
    for (network, recipe, arm), runs in grouped(done, lambda run: (run["network"], run["recipe"], run["arm"])).items():
        size = statistics.mean(100 * run["size"] for run in runs)
        lines.append(f"| {network} | {recipe} | {arm} | {size:.1f} % | {mean_and_spread(runs)} | {len(runs)} |")
    return "\n".join(lines)


def picture(done: list[Run]) -> Figure:
    """Error against share of parameters, one mark a run; better is higher, as in the paper."""
    networks = sorted({run["network"] for run in done})
    figure = Figure(figsize=(6 * len(networks), 4.5), layout="constrained")
    marks = {
        "full": ("k", "*"),
        "filter selection": ("#009E73", "s"),
        "random weights": ("#D55E00", "s"),
        "random recipe": ("#0072B2", "x"),
        "narrow from scratch": ("#999999", "v"),
    }
    for index, network in enumerate(networks):
        axes = figure.add_subplot(1, len(networks), index + 1)
        for arm, (colour, mark) in marks.items():
            runs = [run for run in done if run["network"] == network and run["arm"] == arm]
            sizes, errors = [100 * run["size"] for run in runs], [100 * (1 - run["accuracy"]) for run in runs]
            axes.plot(sizes, errors, mark, color=colour, label=arm, alpha=0.7)
        axes.set(xlabel="% of parameters", ylabel="test error, %", title=network, xscale="log", yscale="log")
        plain_log_scales(axes)
        axes.invert_yaxis()
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure


def main() -> None:
    """Run what is asked for and not yet done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with MNIST; $LIT_COMPRESS_DATA or ./data by default")
    parser.add_argument("--networks", nargs="+", default=["lenet5", "simplecnn"], choices=["lenet5", "simplecnn"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--train_size", type=int, default=6000)
    parser.add_argument("--randoms", type=int, default=2, help="random recipes for each size and seed")
    parser.add_argument("--out", type=Path, default=Path("p3_figure1"))
    options = parser.parse_args()
    quiet()
    finished = Finished(options.out.with_suffix(".json"))
    data = MNISTDataModule(data_dir=options.data, batch_size=64, train_size=options.train_size)
    data.prepare_data()
    data.setup("fit")
    for network in options.networks:
        for seed in options.seeds:
            if not finished.holds(network=network, seed=seed):
                finished.add(run_seed(network, data, seed, options.epochs, options.randoms))
    picture(finished.runs).savefig(options.out.with_suffix(".png"), dpi=110)
    print(table(finished.runs))


if __name__ == "__main__":
    main()
