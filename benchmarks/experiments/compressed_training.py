"""Compressed layers on MNIST: every kind at two budgets, with and without CRS weight decay and attention transfer.

    python -m benchmarks.experiments.compressed_training --data DIR --out docs/images/compressed_training

The teacher is the same network with ordinary convolutions, trained on the same images. Writes OUT.json after every run (and goes
on from it), OUT.png with the differences that figures 5.13 and 5.16 of the thesis show, and tables on the standard output.
"""

import argparse
import contextlib
import io
import statistics
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import get_args

import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from torch import nn

from benchmarks.experiments.training import Finished, Run, fit, grouped, mean_and_spread, quiet, test
from lit_compress import count_parameters, substitute_linear
from lit_compress.callbacks import CRSWeightDecay
from lit_compress.datamodules import MNISTDataModule
from lit_compress.layers import SeparableConv2d
from lit_compress.layers.linear_substitution import Kind
from lit_compress.losses import AttentionTransfer, CrossEntropy
from lit_compress.models.convolution import conv_bn_relu
from lit_compress.modules import LitClassifier, LitDistiller

KINDS: tuple[Kind, ...] = get_args(Kind)
TAPS = ["relu1", "relu3", "relu5"]  # the last maps of 14 × 14, 7 × 7 and 4 × 4 pixels
# The thesis has 1000 for maps of 32, 16 and 8 pixels a side. The loss is a mean over positions of maps whose squares sum to 1, so
# maps of a fifth of the pixels would count five times as much.
BETA = 200.0
ARMS = {"plain": (False, False), "CRS": (True, False), "AT": (False, True), "CRS, AT": (True, True)}


def network() -> nn.Sequential:
    """Five convolutions, of which the second to the fifth are replaced; 135,674 parameters."""
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            **conv_bn_relu("1", 1, 16, stride=2),
            **conv_bn_relu("2", 16, 32, stride=2),
            **conv_bn_relu("3", 32, 64),
            **conv_bn_relu("4", 64, 64, stride=2),
            **conv_bn_relu("5", 64, 128),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(128, 10),
        )
    )


def separable() -> nn.Sequential:
    """The same with separable convolutions whose pointwise part is dense: what the compressed kinds compress."""
    net = network()
    for name in ("conv2", "conv3", "conv4", "conv5"):
        dense = net.get_submodule(name)
        assert isinstance(dense, nn.Conv2d)
        new = SeparableConv2d(dense.in_channels, dense.out_channels, 3, dense.stride, padding=1, bias=False)
        net.set_submodule(name, new)
    return net


def compressed(kind: Kind, budget: int) -> nn.Module:
    """The network with compressed layers of one kind."""
    with contextlib.redirect_stdout(io.StringIO()):  # each would print its setting
        return substitute_linear(network(), kind, budget=budget)


class Settings:
    """How every network is trained: SGD with momentum .9 and a learning rate of .1, × .2 after 30, 60 and 80 % of the steps.

    Args:
        data: Images to train on.
        epochs: Passes over them.
        decay: Weight decay.
    """

    def __init__(self, data: MNISTDataModule, epochs: int, decay: float) -> None:
        self.data, self.epochs, self.decay = data, epochs, decay

    def train(self, build: Callable[[], nn.Module], seed: int, teacher: nn.Module | None = None, crs: bool = False) -> Run:
        """Train a network anew; its test accuracy and its size."""
        pl.seed_everything(seed, verbose=False)
        net = build()
        optimization = {"optimizer": self._optimizer, "scheduler": self._scheduler, "scheduler_interval": "step"}
        module: pl.LightningModule
        if teacher is None:
            module = LitClassifier(net, num_classes=10, **optimization)
        else:
            module = LitDistiller(teacher, net, losses=[CrossEntropy(), AttentionTransfer(TAPS, BETA)], **optimization)
        fit(module, self.data, self.epochs, [CRSWeightDecay()] if crs else [])
        return {"accuracy": test(net, self.data), "parameters": count_parameters(net), "decay": self.decay, "seed": seed}

    def _optimizer(self, parameters: object) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=self.decay)  # type: ignore[arg-type]

    def _scheduler(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        steps = self.epochs * len(self.data.train_dataloader())
        milestones = [round(share * steps) for share in (0.3, 0.6, 0.8)]
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.2)


def differences(runs: list[Run], name: str) -> dict[tuple[str, ...], list[float]]:
    """Points of accuracy that CRS, or AT, adds, for each kind, budget and setting of the other, seed by seed."""
    pairs = {"CRS": [("plain", "CRS"), ("AT", "CRS, AT")], "AT": [("plain", "AT"), ("CRS", "CRS, AT")]}[name]
    accuracies = {(run["kind"], run["budget"], run["arm"], run["seed"]): 100 * run["accuracy"] for run in runs}
    found: dict[tuple[str, ...], list[float]] = {}
    for kind, budget, arm, seed in accuracies:
        for without, with_ in pairs:
            if arm == without and (kind, budget, with_, seed) in accuracies:
                added = accuracies[kind, budget, with_, seed] - accuracies[kind, budget, without, seed]
                found.setdefault((kind, str(budget), without), []).append(added)
    return found


def table(runs: list[Run]) -> str:
    """Accuracy of every arm, and what CRS and AT add, as markdown."""
    lines = [f"| kind | parameters | {' | '.join(ARMS)} | CRS adds, points | AT adds, points | runs |", f"|---|{'---:|' * 8}"]
    for (kind, budget), of_kind in grouped(runs, lambda run: (run["kind"], str(run["budget"]))).items():
        arms = grouped(of_kind, lambda run: (run["arm"],))
        cells = [mean_and_spread(arms[arm,]) if (arm,) in arms else "" for arm in ARMS]
        for name in ("CRS", "AT"):
            added = [
                points for (k, b, _), values in differences(runs, name).items() if (k, b) == (kind, budget) for points in values
            ]
            cells.append(f"{statistics.mean(added):+.2f} ({min(added):+.2f} to {max(added):+.2f})" if added else "")
        size = round(statistics.mean(run["parameters"] for run in of_kind))
        lines.append(f"| {kind} | {size:,} | {' | '.join(cells)} | {len(of_kind)} |")
    return "\n".join(lines)


def picture(runs: list[Run]) -> Figure:
    """What CRS and AT add, a point a seed; the smaller budget hollow."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    smaller = str(min((run["budget"] for run in runs if run["budget"]), default=0))
    for axes, name in zip(figure.subplots(1, 2), ("CRS", "AT"), strict=True):
        for (kind, budget, without), added in differences(runs, name).items():
            place = KINDS.index(kind) + 0.15 * (-1 if budget == smaller else 1) + 0.05 * (-1 if without == "plain" else 1)  # type: ignore[arg-type]
            colour = "#D55E00" if without == "plain" else "#0072B2"
            face = "none" if budget == smaller else colour
            axes.plot([place] * len(added), added, "o", color=colour, markerfacecolor=face, markersize=5)
        other = {"CRS": "AT", "AT": "CRS"}[name]
        axes.axhline(0, color="k", linewidth=0.8)
        axes.set_xticks(range(len(KINDS)), [kind.replace("_", "\n") for kind in KINDS], fontsize="small")
        axes.set(title=f"{name} adds (orange without {other}, blue with it)", ylabel="points of test accuracy")
        axes.grid(alpha=0.3)
    return figure


def main() -> None:
    """Run what is asked for and not yet done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with MNIST; $LIT_COMPRESS_DATA or ./data by default")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--budgets", nargs="+", type=int, default=[7_750, 4_250], help="parameters of the whole network")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--teacher_epochs", type=int, default=15)
    parser.add_argument("--train_size", type=int, default=2_000)
    parser.add_argument("--decays", nargs="+", type=float, default=[5e-3], help="weight decays; tables come one for each")
    parser.add_argument("--out", type=Path, default=Path("compressed_training"))
    options = parser.parse_args()
    quiet()
    finished = Finished(options.out.with_suffix(".json"))
    data = MNISTDataModule(options.data, batch_size=50, train_size=options.train_size)
    data.prepare_data()
    data.setup("fit")
    teacher: nn.Module | None = None

    def taught(decay: float) -> nn.Module:
        nonlocal teacher
        if teacher is None:
            teacher = network()
            found = Settings(data, options.teacher_epochs, decay).train(lambda: teacher, seed=100)  # type: ignore[arg-type, return-value]
            print(f"the teacher: {found['accuracy']:.2%}", flush=True)
        return teacher

    for decay, seed in product(options.decays, options.seeds):
        settings = Settings(data, options.epochs, decay)
        planned: list[tuple[str, int, str, Callable[[], nn.Module]]] = [
            ("ordinary convolutions", 0, "plain", network),
            ("separable convolutions", 0, "plain", separable),
            *(
                (kind, budget, arm, partial(compressed, kind, budget))
                for budget, kind, arm in product(options.budgets, options.kinds, options.arms)
            ),
        ]
        for kind, budget, arm, build in planned:
            key = {"kind": kind, "budget": budget, "arm": arm}
            if not finished.holds(**key, seed=seed, decay=decay):
                crs, at = ARMS[arm]
                run = settings.train(build, seed, taught(options.decays[0]) if at else None, crs)
                finished.add([{**key, **run}])
                print(f"{key}, seed {seed}, decay {decay:g}: {run['parameters']:,} parameters, {run['accuracy']:.2%}", flush=True)
    for decay in options.decays:
        runs = [run for run in finished.runs if run["decay"] == decay]
        print(f"\nWeight decay {decay:g}\n\n{table(runs)}")
        if decay == options.decays[0]:
            picture(runs).savefig(options.out.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
