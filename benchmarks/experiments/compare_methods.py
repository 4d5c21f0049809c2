"""The comparison that the documents never made: every way to choose channels, on the same trained networks, at equal size.

    python -m benchmarks.experiments.compare_methods --data DIR --seeds 0 1 2 --out docs/images/compare_methods

For each seed one LeNet-300-100 is trained, whose hidden layers are linear, batch norm and sigmoid: PIB reads the sigmoids, and
slimming the scales of the norms. Each method only chooses channels; "by reconstruction", what is gone is
folded into the weights of those that stay as well. What has to train in order to see, VIB its gates and
slimming its scales, does so on a copy with all else frozen, and what is learnt there serves to choose and is then thrown away.
So all the small networks are cut out of the same weights, and fine-tuned alike. Their sizes are that of PFA-KL, which has no
other, and shares of the parameters. Writes OUT.json after every run (and goes on from it), OUT.png, and a table on the
standard output.
"""

import argparse
import copy
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.experiments.figures import plain_log_scales
from benchmarks.experiments.training import Finished, Run, grouped, mean_and_spread, quiet, test, train
from benchmarks.page import commit
from lit_compress import Analysis, Recipe, analyze, count_parameters, cut
from lit_compress.datamodules import DigitsDataModule, MNISTDataModule
from lit_compress.gates import find_sites, put_gates
from lit_compress.graph import trace
from lit_compress.information import PIB, VIB
from lit_compress.models import LeNet300100
from lit_compress.scores import Magnitude
from lit_compress.selection import vib
from lit_compress.spectra import PFA

KL_SIZE = "PFA-KL's"
SHARES = (0.2, 0.1, 0.05)
SIZES = (KL_SIZE, *(f"{100 * share:g} %" for share in SHARES))
VIB_SCALE, SLIMMING = 3e-4, 1e-3  # weights of the penalties
GAIN = 4.0  # a sigmoid is a quarter as steep as what it stands for: with norms at 1 its units stay nearly linear
LR = 0.3


def build(pixels: int) -> nn.Module:
    """LeNet-300-100 with a batch norm before each sigmoid, that spreads its units over the range."""
    net = LeNet300100(pixels, activation="sigmoid")
    for name, width in (("activation1", 300), ("activation2", 100)):
        norm = nn.BatchNorm1d(width)
        nn.init.constant_(norm.weight, GAIN)
        net.layers.set_submodule(name, nn.Sequential(norm, nn.Sigmoid()))
    return net


def seen_in_training(
    net: nn.Module,
    wanted: Callable[[nn.Module], list[nn.Parameter]],
    penalty: Callable[[nn.Module], Tensor],
    data: Any,
    epochs: int,
) -> None:
    """Train some parameters of a network alone, by cross-entropy and a penalty."""
    net.train()
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm1d):
            norm.eval()  # what it has seen is part of what is frozen
    optimizer = torch.optim.Adam(wanted(net), lr=1e-2)
    for _ in range(epochs):
        for images, labels in data.train_dataloader():
            optimizer.zero_grad()
            (F.cross_entropy(net(images), labels) + penalty(net)).backward()
            optimizer.step()


def by_gates(net: nn.Module, data: Any, epochs: int) -> Analysis:
    """VIB: what gates find that are trained on the frozen network."""
    gated, example = copy.deepcopy(net).eval(), torch.zeros(2, *data.image_shape)
    sites, _ = find_sites(trace(gated, lambda: gated(example)))
    gates = put_gates(gated, sites.values()).of_noise()
    seen_in_training(
        gated,
        lambda _: [parameter for gate in gates.values() for parameter in gate.parameters()],
        lambda _: VIB_SCALE * torch.stack([gate.penalty() for gate in gates.values()]).sum(),
        data,
        epochs,
    )
    log_alphas = {name: vib.log_alpha(gate.mu.detach(), gate.log_var.detach()) for name, gate in gates.items()}
    return analyze(net, data.analysis_dataloader(), method=VIB(log_alphas))


def by_scales(net: nn.Module, data: Any, epochs: int) -> Analysis:
    """Slimming: what becomes of the norms' scales under its penalty on the frozen network."""
    slimmed = copy.deepcopy(net)

    def scales(model: nn.Module) -> list[nn.Parameter]:
        return [module.weight for module in model.modules() if isinstance(module, nn.BatchNorm1d)]

    seen_in_training(slimmed, scales, lambda model: SLIMMING * torch.cat(scales(model)).abs().sum(), data, epochs)
    return analyze(slimmed.eval(), data.analysis_dataloader(), method="slimming")


Key = tuple[str, str, int]
"""Method, size and, of random recipes, the number."""


def choices(
    net: nn.Module, data: Any, seed: int, looks: int, randoms: int, missing: Callable[[Key], bool]
) -> Iterator[tuple[Key, Recipe, Any]]:
    """Recipe of everything that is compared and missing, and what the cut is compensated by."""
    pfa = analyze(net, data.analysis_dataloader())
    share_of_kl = pfa.parameters(pfa.recipe()) / pfa.original("parameters")
    sizes = dict(zip(SIZES, (share_of_kl, *SHARES), strict=True))
    analyses: dict[str, Callable[[], Analysis]] = {
        "PFA": lambda: pfa,
        "PFA by reconstruction": lambda: analyze(
            net, data.analysis_dataloader(), method=PFA(select="reconstruction"), compensate="linear"
        ),
        "PIB": lambda: analyze(net, data.val_dataloader(), method=PIB(variant="C"), max_samples=100),
        "VIB": lambda: by_gates(net, data, looks),
        "FP": lambda: analyze(net, data.analysis_dataloader(), method=Magnitude("layer")),
        "NS": lambda: by_scales(net, data, looks),
    }
    for name, look in analyses.items():
        method = name.replace("PFA", "PFA-En")
        wanted = [(method, size, 0) for size in sizes]
        if name != method:
            wanted.insert(0, (name.replace("PFA", "PFA-KL"), KL_SIZE, 0))
        if wanted := [key for key in wanted if missing(key)]:
            analysis = look()
            for key in wanted:
                target = {} if "PFA-KL" in key[0] else {"keep_params": sizes[key[1]]}
                yield key, analysis.recipe(**target), analysis.inputs
    for size, share in sizes.items():
        for number in range(randoms):
            if missing(("random", size, number)):
                yield ("random", size, number), pfa.random_recipe(keep_params=share, seed=100 * seed + number), None


def run_seed(data: Any, seed: int, options: argparse.Namespace, finished: Finished) -> None:
    """All methods on the network of one seed, as far as they are not done yet."""
    pl.seed_everything(seed, verbose=False)
    full = build(data.image_shape[-1] ** 2)
    accuracy = train(full, data, options.epochs, seed, lr=LR)
    full.eval()
    whole, example = count_parameters(full), torch.zeros(2, *data.image_shape)

    def missing(key: Key) -> bool:
        return not finished.holds(seed=seed, method=key[0], size=key[1], number=key[2])

    def keep(key: Key, **found: Any) -> None:
        finished.add(
            [{"seed": seed, "commit": options.code, **dict(zip(("method", "size", "number"), key, strict=True)), **found}]
        )

    if missing(("uncut", "100 %", 0)):
        keep(("uncut", "100 %", 0), parameters=1.0, accuracy=accuracy, widths={})
    for key, recipe, inputs in choices(full, data, seed, options.looks, options.randoms, missing):
        small = copy.deepcopy(full)
        cut(small, recipe, example, inputs=inputs)
        share, at_once = count_parameters(small) / whole, test(small, data)
        accuracy = train(small, data, options.fine_tune, seed, lr=LR)
        keep(key, parameters=share, after_cut=at_once, accuracy=accuracy, widths=recipe.widths)
        print(
            f"seed {seed}: {key[0]} at {key[1]}: {share:.1%} of the parameters, {at_once:.2%}, then {accuracy:.2%} right",
            flush=True,
        )


def table(runs: list[Run]) -> str:
    """Accuracy of each method at each size, over seeds, as markdown."""
    lines = [
        "| size | method | parameters | widths | right after the cut | fine-tuned | runs |",
        "|---|---|---|---|---|---|---|",
    ]
    for (size, method), some in sorted(
        grouped(runs, lambda run: (run["size"], run["method"])).items(), key=lambda item: ["100 %", *SIZES].index(item[0][0])
    ):
        share = statistics.mean(100 * run["parameters"] for run in some)
        widths = "-".join(
            f"{statistics.mean(run['widths'].get(layer, whole) for run in some):.0f}"
            for layer, whole in (("layers.fc1", 300), ("layers.fc2", 100))
        )
        at_once = "" if method == "uncut" else mean_and_spread([{"accuracy": run["after_cut"]} for run in some])
        lines.append(f"| {size} | {method} | {share:.1f} % | {widths} | {at_once} | {mean_and_spread(some)} | {len(some)} |")
    return "\n".join(lines)


def picture(runs: list[Run]) -> Figure:
    """Test error over size: right after the cut, and fine-tuned; means over seeds, and bars from least to most."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    colours = {
        "PFA-KL": "k", "PFA-En": "#0072B2", "PFA-En by reconstruction": "#56B4E9", "PIB": "#009E73", "VIB": "#D55E00",
        "FP": "#E69F00", "NS": "#CC79A7", "random": "#999999",
    }  # fmt: skip
    for axes, (when, title) in zip(
        figure.subplots(1, 2), {"after_cut": "right after the cut", "accuracy": "fine-tuned"}.items(), strict=True
    ):
        for place, (method, colour) in enumerate(colours.items()):
            some = grouped((run for run in runs if run["method"] == method), lambda run: (run["size"],)).values()
            errors = [[100 * (1 - run[when]) for run in of_size] for of_size in some]
            sizes = [statistics.mean(100 * run["parameters"] for run in of_size) for of_size in some]
            means = [statistics.mean(of_size) for of_size in errors]
            low = [mean - min(of_size) for mean, of_size in zip(means, errors, strict=True)]
            high = [max(of_size) - mean for mean, of_size in zip(means, errors, strict=True)]
            apart = [size * (1 + 0.02 * (place - 3)) for size in sizes]  # beside each other
            axes.errorbar(
                apart, means, yerr=(low, high), fmt="o-", color=colour, label=method, markersize=4, linewidth=1, capsize=2
            )
        uncut = [100 * (1 - run["accuracy"]) for run in runs if run["method"] == "uncut"]
        axes.axhline(statistics.mean(uncut), color="black", linestyle=":", linewidth=1, label="uncut")
        axes.set(xlabel="% of parameters", ylabel="test error, %", title=title, xscale="log", yscale="log")
        plain_log_scales(axes)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    return figure


def main() -> None:
    """Run what is asked for and not yet done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with MNIST; $LIT_COMPRESS_DATA or ./data by default")
    parser.add_argument("--digits", action="store_true", help="scikit-learn's digits instead")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10, help="of the full network")
    parser.add_argument("--fine_tune", type=int, default=5, help="epochs after the cut")
    parser.add_argument("--looks", type=int, default=3, help="epochs that gates and scales are trained for")
    parser.add_argument("--train_size", type=int, help="images to train on; all by default")
    parser.add_argument("--randoms", type=int, default=2, help="random recipes for each size and seed")
    parser.add_argument("--out", type=Path, default=Path("compare_methods"))
    options = parser.parse_args()
    options.code = commit()
    quiet()
    finished = Finished(options.out.with_suffix(".json"))
    data = DigitsDataModule() if options.digits else MNISTDataModule(data_dir=options.data, train_size=options.train_size)
    data.prepare_data()
    data.setup("fit")
    for seed in options.seeds:
        run_seed(data, seed, options, finished)
    picture(finished.runs).savefig(options.out.with_suffix(".png"), dpi=110)
    print(table(finished.runs))


if __name__ == "__main__":
    main()
