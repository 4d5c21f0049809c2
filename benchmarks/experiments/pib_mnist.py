"""PIBprune's tables 4.1 to 4.3, and VIBNet's rows of them, on MNIST: how far networks shrink by themselves, and what it costs.

    python -m benchmarks.experiments.pib_mnist --data DIR --seeds 0 1 2 --out docs/images/pib_mnist

A run is one `fit` of a config, `configs/pib_mnist_*.yaml` or `configs/vib_mnist_*.yaml`. Writes OUT.json after every run, and
goes on from it; pictures of what layers carry over time, of the information plane, and of test error against R_n and R_w beside
the published points; and tables on the standard output, where rows without a run say "open".
"""

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from typing_extensions import override

from benchmarks.experiments.training import Finished, Run, quiet, test
from benchmarks.page import commit
from lit_compress.callbacks import PIBPruning
from lit_compress.callbacks.pruning import PruningCallback
from lit_compress.commands.lightning import configured
from lit_compress.metrics import CompressionRatios
from lit_compress.pictures import plot_information, plot_information_plane, plot_ratios
from lit_compress.selection import pib


@dataclass(frozen=True, kw_only=True)
class Published:
    """A row of the source's tables: percent, or None where it is not said."""

    widths: str
    R_w: float | None
    R_n: float | None
    before: float | None
    after: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to train and prune.

    Args:
        table: Of the source.
        config: In ``configs/``, without its ending.
        options: What differs from the config.
        cut_at: Share of the epochs after which the gates go, where a config names an epoch for that.
        published: What the source has.
    """

    table: str
    config: str
    options: Mapping[str, str] = field(default_factory=dict)
    cut_at: Fraction | None = None
    published: Published | None = None


CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PRUNING = "--trainer.callbacks.init_args."


def mlp(first: int, second: int, variant: pib.Variant, published: Published | None = None, **options: str) -> Row:
    """A row of table 4.1."""
    widths = {"--model.init_args.net.init_args.hidden": f"[{first},{second}]", f"{PRUNING}variant": variant}
    return Row(table="4.1", config="pib_mnist_mlp", options={**widths, **options}, published=published)


MAX_DROP = {f"{PRUNING}max_drop": "0.5"}
ROWS = {
    "120-100 A": mlp(120, 100, "A", Published(widths="49-8", R_w=36, R_n=29, before=3, after=3)),
    "120-100 C": mlp(120, 100, "C"),
    "120-100 A, max_drop": mlp(120, 100, "A", **MAX_DROP),
    "1000-200 A": mlp(1000, 200, "A", Published(widths="66-5", R_w=5.3, R_n=6.7, before=3, after=3)),
    "1000-200 C": mlp(1000, 200, "C"),
    "1000-500 A": mlp(1000, 500, "A", Published(widths="69-6", R_w=4.2, R_n=5.6, before=3, after=3)),
    "1000-500 C": mlp(1000, 500, "C"),
    "300-100 C": Row(
        table="4.2",
        config="pib_mnist_lenet300100",
        published=Published(widths="130-15", R_w=39, R_n=38, before=2.3, after=1.53),
    ),
    "300-100 VIB": Row(
        table="4.2",
        config="vib_mnist_lenet300100",
        cut_at=Fraction(2, 3),
        published=Published(widths="71-33", R_w=22, R_n=27, before=None, after=1.6),
    ),
    "LeNet-5 C": Row(
        table="4.3",
        config="pib_mnist_lenet5",
        published=Published(widths="7-26-35", R_w=4.5, R_n=41.45, before=0.93, after=0.83),
    ),
    "LeNet-5 VIB": Row(
        table="4.3",
        config="vib_mnist_lenet5",
        cut_at=Fraction(2, 3),
        published=Published(widths="", R_w=0.83, R_n=15.55, before=None, after=1.0),
    ),
}

OPTIMIZER = "--model.init_args.optimizer"
NO_DECAY = {f"{OPTIMIZER}.weight_decay": "0"}
ADAM = {OPTIMIZER: "torch.optim.Adam", f"{OPTIMIZER}.lr": "0.001"}
ADAM_WITH_DECAY = ADAM | {f"{OPTIMIZER}.weight_decay": "0.0001"}
TRIED: dict[str, Mapping[str, str]] = {
    "Adam": ADAM | NO_DECAY,
    "Adam, decay, max_drop": ADAM_WITH_DECAY | MAX_DROP | {"--trainer.max_epochs": "80"},
    "Adam, decay, max_drop, patience 6": ADAM_WITH_DECAY | MAX_DROP | {"--trainer.max_epochs": "120", f"{PRUNING}patience": "6"},
    "no decay": NO_DECAY,
    "strong decay": {f"{OPTIMIZER}.weight_decay": "0.0005"},
    "batches of 32": {"--data.batch_size": "32"},
    "patience 10": {f"{PRUNING}patience": "10"},
    "constant rate": {"--model.init_args.scheduler": "null"},
    "dropout 0.1": {"--model.init_args.input_dropout": "0.1"},
    "no companions": {"--model.init_args.companions": "null"},
    "exact marginal": {f"{PRUNING}marginal": "exact"},
}
STRONGER = {
    f"{PRUNING}kl_scale": "0.0005",
    f"{PRUNING}at_epoch": "16",
    "--trainer.max_epochs": "24",
    "--model.init_args.scheduler.init_args.milestones": "[16]",
}
OTHER_WAYS = {
    **{f"LeNet-5 C, {what}": replace(ROWS["LeNet-5 C"], options=options, published=None) for what, options in TRIED.items()},
    "LeNet-5 VIB, stronger": replace(ROWS["LeNet-5 VIB"], options=STRONGER, published=None),
}
"""To train and to prune LeNet-5, each a row of its own, that the table has once it was run."""
ROWS |= OTHER_WAYS


def built(row: Row, seed: int, options: argparse.Namespace) -> Any:
    """Trainer, module and data of a row; in few epochs, and on the digits, where that is asked for."""
    chosen = {
        "--seed_everything": str(seed),
        **{f"--trainer.{name}": "false" for name in ("logger", "enable_checkpointing", "enable_progress_bar")},
        "--trainer.num_sanity_val_steps": "0",
        "--trainer.default_root_dir": str(options.work),
        f"{PRUNING}evaluate": str(f"{PRUNING}max_drop" in row.options).lower(),  # otherwise nobody reads what it measures
        **row.options,
    }
    if options.epochs:
        chosen["--trainer.max_epochs"] = str(options.epochs)
        if row.cut_at:
            chosen[f"{PRUNING}at_epoch"] = str(int(row.cut_at * options.epochs))
    if options.digits:
        chosen |= {"--data": "lit_compress.datamodules.DigitsDataModule", "--model.init_args.net.init_args.in_features": "64"}
    elif options.data:
        chosen["--data.data_dir"] = str(options.data)
    return configured(str(CONFIGS / f"{row.config}.yaml"), [word for option in chosen.items() for word in option])


class Diary(pl.Callback):
    """Notes after each epoch how large and how good the network is, and what its sigmoid units tell of the label.

    The test images decide nothing; they are looked at for the pictures.
    """

    def __init__(self, data: Any) -> None:
        self.data = data
        self.epochs: list[dict[str, Any]] = []

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        net: nn.Module = pl_module.net  # type: ignore[assignment]
        images = torch.zeros(1, *self.data.image_shape)
        ratios = CompressionRatios()
        ratios.update(pl_module, images)  # which knows what it was built as, and does not run its companions
        layers = [module for module in net.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        self.epochs.append({
            "widths": [len(layer.weight) for layer in layers[:-1]],
            "val": round(float(trainer.callback_metrics["val/accuracy"]), 5),
            "error": round(1 - test(net, self.data), 5),
            "of_label": {name: round(bits, 2) for name, bits in of_label(net, self.data.val_dataloader()).items()},
            **{name: round(float(value), 5) for name, value in ratios.compute().items()},
        })  # fmt: skip
        net.train()


@torch.no_grad()
def of_label(net: nn.Module, loader: Any, most: int = 1000) -> dict[str, float]:
    """What the units of each sigmoid tell of the label on about so many samples, in bits."""
    seen: dict[str, list[Tensor]] = {name: [] for name, module in net.named_modules() if isinstance(module, nn.Sigmoid)}
    handles = [
        net.get_submodule(name).register_forward_hook(lambda module, inputs, output, kept=kept: kept.append(output))
        for name, kept in seen.items()
    ]
    net.eval()
    labels: list[Tensor] = []
    for images, of_batch in loader:
        if sum(map(len, labels)) >= most:
            break
        net(images)
        labels.append(of_batch)
    for handle in handles:
        handle.remove()
    return {name: float(pib.relevance(torch.cat(kept), torch.cat(labels)).sum()) for name, kept in seen.items()}


def run(name: str, row: Row, seed: int, options: argparse.Namespace) -> Run:
    """One row and seed."""
    began = time.process_time()
    cli = built(row, seed, options)
    module, data, trainer = cli.model, cli.datamodule, cli.trainer
    module.to(memory_format=torch.channels_last)  # in which CPUs pool faster
    (pruning,), diary = (one for one in trainer.callbacks if isinstance(one, PruningCallback)), Diary(data)
    trainer.callbacks.append(diary)
    trainer.fit(module, datamodule=data)
    widths = [epoch["widths"] for epoch in diary.epochs]
    changes = [epoch for epoch in range(1, len(widths)) if widths[epoch] != widths[epoch - 1]]
    return {
        "row": name,
        "seed": seed,
        "before": best(diary.epochs[: changes[0] if changes else None]),
        "after": best(diary.epochs[changes[-1] if changes else 0 :]),
        "changes": changes,  # epochs before which the network was cut, or went back to before a cut
        "cuts": sum(report.after.parameters < report.before.parameters for report in pruning.reports),
        "finished": not isinstance(pruning, PIBPruning) or not pruning.schedule.remaining,
        "epochs": diary.epochs,
        "information": getattr(pruning, "information", []),
        "cpu_minutes": round((time.process_time() - began) / 60, 2),
    }


def best(epochs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The epoch that a checkpoint by validation accuracy would keep; of equals the last."""
    return max(enumerate(epochs), key=lambda item: (item[1]["val"], item[0]))[1]


# Widths are those of hidden layers; R_w and R_n of a network that has none printed are left out of the pictures.
OTHERS = {
    "4.2": {
        "VD": (47.8, 36.9, 1.8), "L0": (81, 71, 1.4), "L0-sep": (31.9, 27.1, 1.8), "VIBNet": (27, 22, 1.6),
        "BC-GNJ": (29.5, 29.4, 1.8), "BC-GHS": (26.8, 25.8, 1.8), "PIBprune": (37.8, 39, 1.53),
    },
    "4.3": {
        "GD": (32, 1.37, 1.1), "GL": (19.35, 23.69, 1.0), "VD": (60.78, 9.29, 1.0), "L0": (85.82, 8.92, 0.9),
        "L0-sep": (40.36, 1.08, 1.0), "BC-GNJ": (35.03, 0.95, 1.0), "BC-GHS": (22.8, 0.64, 1.0), "VIBNet": (15.55, 0.83, 1.0),
        "PIBprune": (37.7, 4.5, 0.83),
    },
}  # fmt: skip
"""R_n, R_w and error of networks by other methods, percent, as PIBprune prints them; its own R_n of LeNet-5 by its equation."""


def table(runs: Sequence[Run], rows: Mapping[str, Row]) -> str:
    """What the source has and what came out, over seeds, as markdown."""
    lines = [
        "| table | network, variant | | widths | R_w | R_n | cuts | error before | error after | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        if (said := row.published) is not None:
            ratios, errors = map(_percent, (said.R_w, said.R_n)), map(_percent, (said.before, said.after))
            cells = [said.widths, *ratios, "", *errors]
            lines.append(f"| {row.table} | {name} | published | {' | '.join(cells)} | |")
        mine = [run for run in runs if run["row"] == name]
        if not mine and name in OTHER_WAYS:
            continue
        if not mine:
            lines.append(f"| {row.table} | {name} | ours | open | | | | | | |")
            continue
        widths = ", ".join("-".join(map(str, run["after"]["widths"])) for run in mine)
        ratios = [spread([run["after"][ratio] for run in mine], digits=1) for ratio in ("R_w", "R_n")]
        errors = [spread([run[when]["error"] for run in mine]) for when in ("before", "after")]
        cuts = ", ".join(f"{run['cuts']}" + " (not finished)" * (not run["finished"]) for run in mine)
        seeds = " ".join(str(run["seed"]) for run in mine)
        lines.append(
            f"| {row.table} | {name} | ours | {widths} | {' | '.join(ratios)} | {cuts} | {' | '.join(errors)} | {seeds} |"
        )
    return "\n".join(lines)


def spread(shares: Sequence[float], digits: int = 2) -> str:
    """Mean and, of several, standard deviation, in percent."""
    deviation = f" ({100 * statistics.stdev(shares):.{digits}f})" if len(shares) > 1 else ""
    return f"{100 * statistics.mean(shares):.{digits}f}{deviation} %"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:g} %"


def rounds(one: Run) -> list[tuple[float, float, float]]:
    """R_n, R_w and error, percent, at the best epoch of each round of a run."""
    edges = [0, *one["changes"], len(one["epochs"])]
    chosen = [best(one["epochs"][begin:end]) for begin, end in pairwise(edges)]
    return [tuple(100 * epoch[name] for name in ("R_n", "R_w", "error")) for epoch in chosen]


def plane(one: Run) -> dict[str, list[tuple[float, float]]]:
    """The information plane of a run: what each layer keeps, at the end of an epoch, beside what it tells of the label."""
    kept = {}
    for epochs, bits in reversed(one["information"]):
        kept[epochs] = bits  # before a cut, of the two entries at one
    layers = list(one["information"][0][1])
    return {
        unit: [
            (kept[number][layer], epoch["of_label"][unit])
            for number, epoch in enumerate(one["epochs"], start=1)
            if layer in kept[number]  # a layer of a single unit is not looked at any more
        ]
        for layer, unit in zip(layers, one["epochs"][0]["of_label"], strict=True)
    }


def main() -> None:
    """Run what is asked for and not yet done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with MNIST; $LIT_COMPRESS_DATA or ./data by default")
    parser.add_argument("--digits", action="store_true", help="scikit-learn's digits instead; not for LeNet-5")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS), metavar="ROW", help=f"of {list(ROWS)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="at most so many, to try it out")
    parser.add_argument("--work", type=Path, default=Path("lit_compress_runs/pib_mnist"))
    parser.add_argument("--out", type=Path, default=Path("pib_mnist"))
    options = parser.parse_args()
    quiet()
    code = commit()  # what runs is what was checked out at the start
    finished = Finished(options.out.with_suffix(".json"))
    for name in options.rows:
        for seed in options.seeds:
            if finished.holds(row=name, seed=seed):
                continue
            done = run(name, ROWS[name], seed, options)
            finished.add([{**done, "commit": code}])
            widths = "-".join(map(str, done["after"]["widths"]))
            print(f"{name}, seed {seed}: {widths}, {done['before']['error']:.2%} to {done['after']['error']:.2%}", flush=True)
    draw(finished.runs, options.out)
    print(table(finished.runs, ROWS))


def draw(runs: Sequence[Run], out: Path) -> None:
    """The thesis's figures 4.8.1 and 4.8.2, as far as there are runs."""
    informed = [one for one in runs if one["information"] and ROWS[one["row"]].table in OTHERS and ROWS[one["row"]].published]
    for name in dict.fromkeys(one["row"] for one in informed):
        one = next(one for one in informed if one["row"] == name)
        place = f"{out.name}_{name.replace(' ', '_').replace(',', '')}"
        plot_information(one["information"], one["changes"]).savefig(out.with_name(f"{place}_time.png"), dpi=110)
        plot_information_plane(plane(one)).savefig(out.with_name(f"{place}_plane.png"), dpi=110)
    for number, others in OTHERS.items():
        paths = {f"{one['row']}, seed {one['seed']}": rounds(one) for one in runs if ROWS[one["row"]].table == number}
        if paths:
            plot_ratios(paths, others).savefig(out.with_name(f"{out.name}_ratios_{number}.png"), dpi=110)


if __name__ == "__main__":
    main()
