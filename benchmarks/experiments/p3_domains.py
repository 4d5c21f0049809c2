"""P3's section 4.3 on MNIST: a network for all digits, compressed for a few of them, in four arms.

    python -m benchmarks.experiments.p3_domains --data DIR --seeds 0 1 2 --out docs/images/p3_domains

For each seed a LeNet-5 is trained on all digits; for each subset of digits PFA-KL sees the training images of these digits alone.
Writes OUT.json after every run (and goes on from it), OUT.png, the widths per subset as the paper's figure 4b, and a table on the
standard output. The networks for all digits, and the recipes, go to `--work`.
"""

import argparse
import statistics
from pathlib import Path

import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure

from benchmarks.experiments.training import Finished, Run, grouped, mean_and_spread, quiet, train
from lit_compress import count_parameters
from lit_compress.callbacks import PFAPruning, StartFrom
from lit_compress.datamodules import MNISTDataModule
from lit_compress.models import LeNet5

# Halves of the digits as the twins of R1 and R2, and pairs, from an easy one to a hard one, of S1 to S4.
SUBSETS = {"R1": (0, 2, 3, 6, 8), "R2": (1, 4, 5, 7, 9), "S1": (0, 1), "S2": (5, 6), "S3": (3, 8), "S4": (4, 9)}
ARMS = ("full scratch", "full fine", "PFA scratch", "PFA fine")
LAYERS = {"conv1": 20, "conv2": 50, "fc1": 500}


def callbacks_of(arm: str, start: Path) -> list[pl.Callback]:
    """What makes an arm of a plain training: the weights it begins with, and the cut before its first epoch."""
    if arm == "full scratch":
        return []
    begin = StartFrom(start, new_layers=["net.fc2"])
    if arm == "full fine":
        return [begin]
    return [begin, PFAPruning(at_epoch=0, weights="kept" if arm == "PFA fine" else "random", evaluate=False)]


def on_all_digits(work: Path, data: MNISTDataModule, epochs: int, seed: int) -> Path:
    """The checkpoint of a LeNet-5 trained on all digits, made if it is not there."""
    path = work / f"all_digits_{len(data.analysis_dataloader().dataset)}_{epochs}_{seed}.ckpt"
    if not path.exists():
        pl.seed_everything(seed, verbose=False)
        net = LeNet5()
        train(net, data, epochs, seed)
        work.mkdir(parents=True, exist_ok=True)
        torch.save({"state_dict": {f"net.{name}": value for name, value in net.state_dict().items()}}, path)
    return path


def adapt(arm: str, data: MNISTDataModule, start: Path, epochs: int, seed: int, folder: Path) -> Run:
    """One arm on one subset."""
    pl.seed_everything(seed, verbose=False)
    net = LeNet5(num_classes=data.num_classes)
    whole = count_parameters(net)
    accuracy = train(net, data, epochs, seed, callbacks_of(arm, start), folder)
    widths = {layer: len(net.get_submodule(layer).weight) for layer in LAYERS}
    return {"arm": arm, "accuracy": accuracy, "size": count_parameters(net) / whole, "widths": widths}


def table(runs: list[Run]) -> str:
    """Accuracy of each arm on each subset, and what PFA kept, over seeds, as markdown."""
    lines = [f"| subset | digits | {' | '.join(ARMS)} | parameters kept | widths |", f"|---|---|{'---|' * len(ARMS)}---|---|"]
    for (subset,), of_subset in grouped(runs, lambda run: (run["subset"],)).items():
        arms = grouped(of_subset, lambda run: (run["arm"],))
        cells = [mean_and_spread(arms[arm,]) for arm in ARMS]
        fine = arms["PFA fine",]
        size = statistics.mean(100 * run["size"] for run in fine)
        widths = "-".join(f"{statistics.mean(run['widths'][layer] for run in fine):.0f}" for layer in LAYERS)
        digits = " ".join(map(str, SUBSETS[subset]))
        lines.append(f"| {subset} | {digits} | {' | '.join(cells)} | {size:.1f} % | {widths} |")
    return "\n".join(lines)


def picture(runs: list[Run]) -> Figure:
    """Share of each layer's channels that PFA keeps, a bar a subset, a line from the smallest to the largest seed."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    colours = ("#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#CC79A7", "#999999")
    fine = grouped((run for run in runs if run["arm"] == "PFA fine"), lambda run: (run["subset"],))
    for index, ((subset,), of_subset) in enumerate(fine.items()):
        for place, (layer, whole) in enumerate(LAYERS.items()):
            shares = [100 * run["widths"][layer] / whole for run in of_subset]
            mean = statistics.mean(shares)
            spread = [[mean - min(shares)], [max(shares) - mean]]
            label = f"{subset}: {' '.join(map(str, SUBSETS[subset]))}" if place == 0 else None
            axes.bar(place + 0.13 * (index - 2.5), mean, 0.12, yerr=spread, color=colours[index], label=label, capsize=2)
    axes.set_xticks(range(len(LAYERS)), [f"{layer} ({whole})" for layer, whole in LAYERS.items()])
    axes.set(ylabel="channels kept, %", title="LeNet-5 on subsets of MNIST's digits, PFA-KL")
    axes.legend(fontsize="small", title="digits")
    return figure


def main() -> None:
    """Run what is asked for and not yet done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with MNIST; $LIT_COMPRESS_DATA or ./data by default")
    parser.add_argument("--subsets", nargs="+", default=list(SUBSETS), choices=list(SUBSETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--train_size", type=int, default=5000, help="images of all digits; a subset has its share")
    parser.add_argument("--work", type=Path, default=Path("lit_compress_runs/p3_domains"))
    parser.add_argument("--out", type=Path, default=Path("p3_domains"))
    options = parser.parse_args()
    quiet()
    finished = Finished(options.out.with_suffix(".json"))
    everything = MNISTDataModule(data_dir=options.data, batch_size=64, train_size=options.train_size)
    everything.prepare_data()
    everything.setup("fit")
    labels = torch.cat([labels for _, labels in everything.analysis_dataloader()])
    for seed in options.seeds:
        for subset in options.subsets:
            digits = SUBSETS[subset]
            share = int(torch.isin(labels, torch.tensor(digits)).sum())  # the same images that the full network was trained on
            data = MNISTDataModule(data_dir=options.data, batch_size=64, train_size=share, classes=digits)
            for arm in ARMS:
                if finished.holds(seed=seed, subset=subset, arm=arm):
                    continue
                start = on_all_digits(options.work, everything, options.epochs, seed)
                folder = options.work / f"{subset}_{arm.replace(' ', '_')}_{seed}"
                run = adapt(arm, data, start, options.epochs, seed, folder)
                finished.add([{"seed": seed, "subset": subset, **run}])
                print(
                    f"seed {seed}, {subset}: {arm}: {run['size']:.1%} of the parameters, {run['accuracy']:.2%} right", flush=True
                )
    picture(finished.runs).savefig(options.out.with_suffix(".png"), dpi=110)
    print(table(finished.runs))


if __name__ == "__main__":
    main()
