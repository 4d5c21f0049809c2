"""PFA and what other tools choose, on the same trained networks, at equal parameters and fine-tuned alike: MNIST.

    python -m benchmarks.experiments.compare_peers --data DIR --seeds 0 1 2 --out docs/images/compare_peers

Each seed trains a small convolutional network with batch norms. Every tool cuts copies of it, with nothing trained for the cut,
to at most a share of the parameters; then all are fine-tuned with the same settings. The sizes are that of PFA-KL, which has no
other, and shares. Writes OUT.json after every run (and goes on from it), OUT.png, and a section on the standard output, which
``--write`` puts into docs/benchmarks.md. Tools that are not installed are left out: ``pip install lit-compress[peers]``.

Torch-Pruning and fasterai are asked for channels: as in Torch-Pruning's own benchmark, they take a few more in each of 400 steps,
until the target is met. Networks of the widths that Torch-Pruning arrives at, with the channels that PFA chooses, tell what the
choice is worth. Lightning's ModelPruning only sets weights to zero: its share is that of the weights that are not.
"""

import argparse
import copy
import os
import statistics
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from math import isnan, nan
from os import devnull
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from pytorch_lightning.callbacks import ModelPruning
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from benchmarks.experiments.figures import plain_log_scales
from benchmarks.experiments.training import Finished, Run, grouped, mean_and_spread, quiet, test, train
from benchmarks.page import PAGE, Section, commit, machine, write
from benchmarks.peers import TOOLS
from benchmarks.timing import Candidate, interleaved, threads
from lit_compress import Recipe, analyze, count_mult_adds, count_parameters, cut
from lit_compress.callbacks import PFAPruning
from lit_compress.datamodules import DigitsDataModule, MNISTDataModule
from lit_compress.models.convolution import conv_bn_relu, init_convolutions

STEPS = 400  # of Torch-Pruning's benchmark, from the whole network to one channel a layer
LOOKS = 10  # batches whose gradients are taken, as there
KL_SIZE = "PFA-KL's"
SHARES = (0.1, 0.05, 0.02)
SIZES = (KL_SIZE, *(f"{100 * share:g} %" for share in SHARES))
BY_RECONSTRUCTION: dict[str, Any] = {"select": "reconstruction", "compensate": "linear"}
OURS: dict[str, dict[str, Any]] = {
    "PFA": {},
    "PFA, compensated": {"compensate": True},
    "PFA, distilled": {"distill_from_unpruned": True},
    "PFA, both": {"compensate": True, "distill_from_unpruned": True},
    "PFA by reconstruction": BY_RECONSTRUCTION,
    "PFA by reconstruction, distilled": {**BY_RECONSTRUCTION, "distill_from_unpruned": True},
}
CLAIM = "PFA by reconstruction, distilled"
WIDTHS_OF = "Torch-Pruning: magnitude"
AT_THEIR_WIDTHS = f"PFA at the widths of {WIDTHS_OF}"
MASK = "Lightning: mask"

Step = Callable[[], None]
"""Takes a little more of the channels."""


def build(data: Any) -> nn.Module:
    """Four convolutions of 16, 32, 64 and 64 channels, each with a batch norm, over two pools: 61,050 parameters on MNIST."""
    net = nn.Sequential(
        OrderedDict[str, nn.Module](
            **conv_bn_relu("1", data.image_shape[0], 16),
            pool1=nn.MaxPool2d(2),
            **conv_bn_relu("2", 16, 32),
            pool2=nn.MaxPool2d(2),
            **conv_bn_relu("3", 32, 64),
            **conv_bn_relu("4", 64, 64),
            pool3=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(64, data.num_classes),
        )
    )
    init_convolutions(net)
    return net


# ---------------------------------------------------------------- other tools


def torch_pruning(importance: str, scope: str = "global") -> Callable[[nn.Module, Any], Step]:
    """Torch-Pruning with one of its criteria, over all layers together or in each alike."""

    def start(net: nn.Module, data: Any) -> Step:
        tp = import_module("torch_pruning")
        scores = getattr(tp.importance, importance)()
        if importance == "GroupTaylorImportance":
            with_gradients(net, data)
        elif importance == "GroupHessianImportance":
            with_squared_gradients(net, data)
            scores.accumulate_grad(net)
        return tp.pruner.BasePruner(
            net,
            example_of(data),
            importance=scores,
            global_pruning=scope == "global",
            pruning_ratio=1.0,
            iterative_steps=STEPS,
            ignored_layers=[output_of(net)],
        ).step

    return start


def fasterai(net: nn.Module, data: Any) -> Step:
    """The pruner of fasterai as in its tutorial: by magnitude, all layers alike."""
    pruner_of, criteria = import_module("fasterai.prune.pruner").Pruner, import_module("fasterai.core.criteria")
    with open(devnull, "w") as nothing, redirect_stdout(nothing):
        pruner = pruner_of(
            net,
            1.0,
            "local",
            criteria.large_final,
            ignored_layers=[output_of(net)],
            example_inputs=example_of(data),
            iterative_steps=STEPS,
        )
    return pruner.prune_model


PEERS: dict[str, Callable[[nn.Module, Any], Step]] = {
    "Torch-Pruning: magnitude": torch_pruning("GroupMagnitudeImportance"),
    "Torch-Pruning: magnitude, layers alike": torch_pruning("GroupMagnitudeImportance", "local"),
    "Torch-Pruning: LAMP": torch_pruning("LAMPImportance"),
    "Torch-Pruning: Taylor": torch_pruning("GroupTaylorImportance"),
    "Torch-Pruning: Hessian": torch_pruning("GroupHessianImportance"),
    "Torch-Pruning: norms' scales": torch_pruning("BNScaleImportance"),
    "fasterai: magnitude, layers alike": fasterai,
}


def output_of(net: nn.Module) -> nn.Module:
    """The layer whose channels are the classes."""
    return [module for module in net.modules() if isinstance(module, nn.Linear)][-1]


def example_of(data: Any) -> Tensor:
    """Two black images."""
    return torch.zeros(2, *data.image_shape)


def looks(data: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches whose gradients tell what channels are worth."""
    for _, batch in zip(range(LOOKS), data.analysis_dataloader(), strict=False):
        yield batch


def with_gradients(net: nn.Module, data: Any) -> None:
    """Put the gradient of the loss on the parameters."""
    for images, labels in looks(data):
        F.cross_entropy(net(images), labels).backward()


def with_squared_gradients(net: nn.Module, data: Any) -> None:
    """Put the root of the mean squared gradient of a sample's loss on the parameters.

    Torch-Pruning 1.6.1 means to add the squares of one sample after another up, but each call of ``accumulate_grad`` forgets the
    one before, so that the last sample alone would count. Here it is called once, with what it should have come to.
    """
    parameters = list(net.parameters())
    squares = [torch.zeros_like(parameter) for parameter in parameters]
    samples = 0
    for images, labels in looks(data):
        for image, label in zip(images, labels, strict=True):
            gradients = torch.autograd.grad(F.cross_entropy(net(image[None]), label[None]), parameters)
            for total, gradient in zip(squares, gradients, strict=True):
                total += gradient**2
        samples += len(labels)
    for parameter, total in zip(parameters, squares, strict=True):
        parameter.grad = (total / samples).sqrt()


def on_the_way_down(net: nn.Module, step: Step, sizes: Mapping[str, float]) -> Iterator[tuple[str, nn.Module]]:
    """Copies of a network that is being pruned, each the first with at most a share of the parameters, from the largest."""
    whole = count_parameters(net)
    steps = iter(range(STEPS))
    for size, share in sorted(sizes.items(), key=lambda item: -item[1]):
        while count_parameters(net) > share * whole:
            if next(steps, None) is None:
                raise RuntimeError(f"{STEPS} steps do not reach {share:.1%}.")
            step()
        yield size, copy.deepcopy(net)


class MaskedFromTheStart(ModelPruning):
    """Lightning's callback, which would mask after an epoch, masking before the first step, and then never again."""

    def __init__(self, share: float) -> None:
        super().__init__("l1_unstructured", amount=1 - share, use_global_unstructured=True, apply_pruning=False)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.apply_pruning(self.amount)


# ---------------------------------------------------------------- the runs


class Look(pl.Callback):
    """Tests the network right after the cut of a callback before it."""

    def __init__(self, data: Any) -> None:
        self.data = data
        self.accuracy = nan

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isnan(self.accuracy):
            self.accuracy = test(pl_module.net, self.data)  # type: ignore[arg-type]
            pl_module.train()


class Comparison:
    """All runs on the network of one seed.

    Args:
        seed: Of the training and of each fine-tuning.
        data: What is learnt.
        finished: Runs that are not to be repeated.
        options: Of the command line.
    """

    def __init__(self, seed: int, data: Any, finished: Finished, options: argparse.Namespace) -> None:
        self.seed, self.data, self.finished, self.options = seed, data, finished, options
        pl.seed_everything(seed, verbose=False)
        self.full = build(data)
        accuracy = self._train(self.full, options.epochs)
        self.full.eval()
        self.pfa = analyze(self.full, data.analysis_dataloader())
        share_of_kl = self.pfa.parameters(self.pfa.recipe()) / self.pfa.original("parameters")
        self.sizes = dict(zip(SIZES, (share_of_kl, *SHARES), strict=True))
        if not self._done("uncut", "100 %"):
            self._keep("uncut", "100 %", self.full, accuracy, accuracy)

    def run(self) -> None:
        """Whatever is not yet done."""
        for method, how in OURS.items():
            for size, share in self.sizes.items():
                target = {} if size == KL_SIZE else {"keep_params": share}
                self._tuned(method, size, PFAPruning(at_epoch=0, evaluate=False, **target, **how))
        for method, start in PEERS.items():
            missing = {size: share for size, share in self.sizes.items() if not self._done(method, size)}
            if missing and not TOOLS[method.partition(":")[0]].missing:
                net = copy.deepcopy(self.full)
                for size, small in on_the_way_down(net, start(net, self.data), missing):
                    self._keep(method, size, small, test(small, self.data), self._train(small, self.options.fine_tune))
        for size, share in self.sizes.items():
            self._tuned(MASK, size, MaskedFromTheStart(share))
        self._at_their_widths()

    def _at_their_widths(self) -> None:
        """Networks of the widths that another tool gives each layer, with the channels that PFA chooses."""
        theirs = {
            run["size"]: run["widths"] for run in self.finished.runs if (run["seed"], run["method"]) == (self.seed, WIDTHS_OF)
        }
        for size in theirs:
            if self._done(AT_THEIR_WIDTHS, size):
                continue
            keep = {
                name: tuple(found.kept(width, 1, 1, torch.ones(len(found.group.classes), dtype=torch.bool)).tolist())
                for (name, found), width in zip(self.pfa.rankings.items(), theirs[size], strict=False)  # all but the classes
            }
            net = copy.deepcopy(self.full)
            cut(net, Recipe(keep=keep), example_of(self.data))
            self._keep(AT_THEIR_WIDTHS, size, net, test(net, self.data), self._train(net, self.options.fine_tune))

    def _tuned(self, method: str, size: str, callback: pl.Callback) -> None:
        """A copy of the full network, fine-tuned with a callback that makes it smaller before the first step."""
        if not self._done(method, size):
            net, look = copy.deepcopy(self.full), Look(self.data)
            accuracy = self._train(net, self.options.fine_tune, callback, look)
            self._keep(method, size, net, look.accuracy, accuracy)

    def _train(self, net: nn.Module, epochs: int, *callbacks: pl.Callback) -> float:
        with tempfile.TemporaryDirectory() as folder:
            return train(net, self.data, epochs, self.seed, callbacks, Path(folder))

    def _done(self, method: str, size: str) -> bool:
        return self.finished.holds(seed=self.seed, method=method, size=size)

    def _keep(self, method: str, size: str, net: nn.Module, at_once: float, accuracy: float) -> None:
        """Write down what a method came to: its accuracy right after the cut, and fine-tuned."""
        whole, example = count_parameters(self.full), example_of(self.data)
        run: Run = {
            "seed": self.seed, "method": method, "size": size, "at_once": at_once, "accuracy": accuracy,
            "parameters": count_parameters(net) / whole,
            "not_zero": sum(int(parameter.count_nonzero()) for parameter in net.parameters()) / whole,
            "mult_adds": count_mult_adds(net, example) / count_mult_adds(self.full, example),
            "time": self._time(net), "widths": widths(net), "commit": self.options.code,
        }  # fmt: skip
        self.finished.add([run])
        print(
            f"seed {self.seed}: {method} at {size}: {run['parameters']:.2%} of the parameters, {accuracy:.2%} right", flush=True
        )

    @torch.no_grad()
    def _time(self, net: nn.Module) -> float:
        """Seconds of the CPU that a batch takes, as a share of the full network's: both in turns, with one thread."""
        images, _ = next(iter(self.data.test_dataloader()))
        with threads(1):
            timed = interleaved(
                Candidate("full", lambda _: self.full(images)),
                [Candidate("small", lambda _: net(images))],
                rounds=self.options.rounds,
            )
        return timed["small"].ratio(timed.baseline, cpu=True).median


def widths(net: nn.Module) -> list[int]:
    """Channels that each layer gives."""
    return [len(module.weight) for module in net.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]


# ---------------------------------------------------------------- what is shown


def section(runs: Sequence[Run]) -> Section:
    """The page's section about who is right how often at which size."""
    uncut = [run for run in runs if run["method"] == "uncut"]
    small = [run for run in runs if run["method"] != "uncut"]
    chosen = [run for run in small if run["method"] not in (*list(OURS)[1:], MASK, AT_THEIR_WIDTHS)]  # each network once
    versions = {tool: TOOLS[tool].version for tool in dict.fromkeys(method.partition(":")[0] for method in PEERS)}
    return Section(
        question="How good is a network that others cut to the same size?",
        target=f"'{CLAIM}' at least equal to the best of the other tools that make networks smaller, at every size.",
        tables={
            f"Test accuracy, fine-tuned; mean (deviation) over seeds; uncut {mean_and_spread(uncut)}": _by_size(small, _accuracy),
            "Right after the cut, before any fine-tuning": _by_size(small, lambda cell: mean_and_spread(cell, of="at_once")),
            "Left of the uncut network, in percent: parameters / mult-adds / time of a batch": _by_size(
                chosen, lambda cell: " / ".join(_percent(cell, of) for of in ("parameters", "mult_adds", "time"))
            ),
            "Channels of the four convolutions, of 16-32-64-64": _by_size(chosen, _widths),
        },
        verdicts=[verdict(small, size) for size in SIZES],
        settings={"seeds": " ".join(str(run["seed"]) for run in uncut), "threads": torch.get_num_threads(), **versions},
    )


def _by_size(runs: Sequence[Run], cell: Callable[[Sequence[Run]], str]) -> str:
    groups = grouped(runs, lambda run: (run["method"], run["size"]))
    lines = ["| | " + " | ".join(SIZES) + " |", "|---|" + "---:|" * len(SIZES)]
    for method in dict.fromkeys(method for method, _ in groups):
        cells = [cell(groups[method, size]) if (method, size) in groups else "" for size in SIZES]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _accuracy(runs: Sequence[Run]) -> str:
    return mean_and_spread(runs) + (f", {len(runs)} seed(s)" if len(runs) < 3 else "")


def verdict(runs: Sequence[Run], size: str) -> str:
    """Ours beside the best of the others at a size, by its mean, over the seeds that all of them have."""
    found = {
        method: {run["seed"]: 100 * run["accuracy"] for run in some}
        for (method,), some in grouped(
            (run for run in runs if run["size"] == size and run["method"] in (CLAIM, *PEERS)), lambda run: (run["method"],)
        ).items()
    }
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in found.values()))) if CLAIM in found and len(found) > 1 else []
    if not seeds:
        return f"{size}: open, no seed has all methods"
    means = {method: statistics.mean(by_seed[seed] for seed in seeds) for method, by_seed in found.items()}
    best = max((method for method in means if method != CLAIM), key=lambda method: means[method])
    differences = [found[CLAIM][seed] - found[best][seed] for seed in seeds]
    spread = f" (deviation {statistics.stdev(differences):.2f})" if len(seeds) > 1 else ""
    met = "met" if means[CLAIM] >= means[best] else "NOT met"
    return f"{size}: {met}, {means[CLAIM] - means[best]:+.2f} points{spread} to {best}, {len(seeds)} seed(s)"


def _widths(runs: Sequence[Run]) -> str:
    convolutions = zip(*(run["widths"][:-1] for run in runs), strict=True)
    return "-".join(f"{statistics.mean(layer):.0f}" for layer in convolutions)


def _percent(runs: Sequence[Run], of: str) -> str:
    return f"{statistics.mean(100 * run[of] for run in runs):.3g}"


COLOURS = {"PFA": "#0072B2", "Torch-Pruning": "#D55E00", "fasterai": "#009E73", "Lightning": "#999999"}
MARKERS = "osv^DPX<>"


def picture(runs: Sequence[Run]) -> Figure:
    """Test error over parameters, mult-adds and time: means over seeds, and bars from least to most."""
    figure = Figure(figsize=(17, 5.5), layout="constrained")
    shown = (run for run in runs if run["method"] not in ("uncut", AT_THEIR_WIDTHS))
    methods = grouped(shown, lambda run: (run["method"],))
    uncut = statistics.mean(100 * (1 - run["accuracy"]) for run in runs if run["method"] == "uncut")
    for axes, measure in zip(figure.subplots(1, 3, sharey=True), ("parameters", "mult_adds", "time"), strict=True):
        drawn: Counter[str] = Counter()
        for (method,), of_method in methods.items():
            if method == MASK and measure != "parameters":
                continue  # it saves none
            tool = "PFA" if method in OURS else method.partition(":")[0]
            where = "not_zero" if method == MASK else measure
            cells = sorted(
                grouped(of_method, lambda run: (run["size"],)).values(),
                key=lambda cell, where=where: statistics.mean(run[where] for run in cell),
            )
            errors = [[100 * (1 - run["accuracy"]) for run in cell] for cell in cells]
            means = [statistics.mean(cell) for cell in errors]
            least = [mean - min(cell) for mean, cell in zip(means, errors, strict=True)]
            most = [max(cell) - mean for mean, cell in zip(means, errors, strict=True)]
            axes.errorbar(
                [statistics.mean(100 * run[where] for run in cell) for cell in cells], means, yerr=(least, most),
                fmt=f"{MARKERS[drawn[tool]]}-", color=COLOURS[tool], label=method, markersize=4, linewidth=0.8, elinewidth=0.6,
            )  # fmt: skip
            drawn[tool] += 1
        axes.axhline(uncut, color="black", linestyle=":", linewidth=1, label="uncut")
        axes.set(
            xlabel=f"% of the {measure.replace('_', '-')}{' of a batch' if measure == 'time' else ''}",
            ylabel="test error, %",
            xscale="log",
            yscale="log",
        )
        plain_log_scales(axes)
        axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small")
    return figure


def main() -> None:
    """Run what is asked for and not yet done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with MNIST; $LIT_COMPRESS_DATA or ./data by default")
    parser.add_argument("--digits", action="store_true", help="scikit-learn's digits instead")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2], help="none: only show what is there")
    parser.add_argument("--epochs", type=int, default=8, help="of the full network")
    parser.add_argument("--fine_tune", type=int, default=4, help="epochs after the cut")
    parser.add_argument("--train_size", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=10, help="of measuring the time")
    parser.add_argument("--out", type=Path, default=Path("compare_peers"))
    parser.add_argument("--write", action="store_true", help="put the section into docs/benchmarks.md")
    options = parser.parse_args()
    options.code, load = commit(), os.getloadavg()[0]
    quiet()
    finished = Finished(options.out.with_suffix(".json"))
    data = (
        DigitsDataModule()
        if options.digits
        else MNISTDataModule(data_dir=options.data, batch_size=64, train_size=options.train_size)
    )
    data.prepare_data()
    data.setup("fit")
    for seed in options.seeds:
        Comparison(seed, data, finished, options).run()
    picture(finished.runs).savefig(options.out.with_suffix(".png"), dpi=110)
    text = section(finished.runs).markdown("python -m benchmarks.experiments.compare_peers", machine(load))
    print(text)
    if options.write:
        write(PAGE, "compare_peers", text)


if __name__ == "__main__":
    main()
