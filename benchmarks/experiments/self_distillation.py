"""PFA at strong compression, fine-tuned with and without the unpruned network as a teacher: LeNet-5 on MNIST.

    python -m benchmarks.experiments.self_distillation --data DIR --seeds 0 1 2 --out docs/images/self_distillation

Each seed trains one full network, which every arm cuts and fine-tunes with the same settings. Writes OUT.json after every seed
(and goes on from it), and a table on the standard output.
"""

import argparse
import copy
import statistics
import tempfile
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from typing_extensions import override

from benchmarks.experiments.training import Finished, Run, grouped, mean_and_spread, quiet, test, train
from lit_compress.callbacks import PFAPruning
from lit_compress.datamodules import MNISTDataModule
from lit_compress.models import LeNet5

KEPT = [0.015, 0.007, 0.004]  # of the parameters
ARMS = {"labels alone": False, "labels and the unpruned network": True}  # `distill_from_unpruned`


class RightAfterTheCut(pl.Callback):
    """Tests the network before any fine-tuning; stands behind the one that cuts."""

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 0:
            self.accuracy = test(copy.deepcopy(pl_module).net, trainer.datamodule)


def run_seed(data: MNISTDataModule, seed: int, epochs: int, fine_tuning: int) -> list[Run]:
    """All sizes and arms for one seed."""
    pl.seed_everything(seed, verbose=False)
    full = LeNet5()
    done: list[Run] = [{"seed": seed, "arm": "full", "kept": 1.0, "size": 1.0, "accuracy": train(full, data, epochs, seed)}]
    for kept in KEPT:
        for arm, distil in ARMS.items():
            net = copy.deepcopy(full)
            pruning = PFAPruning(keep_params=kept, at_epoch=0, evaluate=False, distill_from_unpruned=distil)
            cut = RightAfterTheCut()
            with tempfile.TemporaryDirectory() as folder:
                accuracy = train(net, data, fine_tuning, seed, [pruning, cut], Path(folder))
            report = pruning.reports[0]
            size = report.after.parameters / report.before.parameters
            found: dict[str, Any] = {"size": size, "cut": cut.accuracy, "accuracy": accuracy}
            done.append({"seed": seed, "arm": arm, "kept": kept, **found})
            print(f"seed {seed}, {arm}, {size:.2%} of the parameters: {cut.accuracy:.2%}, then {accuracy:.2%}", flush=True)
    return done


def table(done: list[Run]) -> str:
    """Mean and standard deviation over seeds, as markdown."""
    lines = ["| parameters | fine-tuned with | right after the cut | fine-tuned, mean (sd) | runs |", "|---|---|---|---|---|"]
    for (_, arm), runs in grouped(done, lambda run: (str(run["kept"]), run["arm"])).items():
        size = statistics.mean(100 * run["size"] for run in runs)
        cut = mean_and_spread(runs, of="cut") if "cut" in runs[0] else ""
        lines.append(f"| {size:.2f} % | {arm} | {cut} | {mean_and_spread(runs)} | {len(runs)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is asked for and not yet done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with MNIST; $LIT_COMPRESS_DATA or ./data by default")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=6, help="of the full network")
    parser.add_argument("--fine_tuning", type=int, default=5, help="epochs after the cut")
    parser.add_argument("--train_size", type=int, default=5000)
    parser.add_argument("--out", type=Path, default=Path("self_distillation"))
    options = parser.parse_args()
    quiet()
    finished = Finished(options.out.with_suffix(".json"))
    data = MNISTDataModule(data_dir=options.data, batch_size=64, train_size=options.train_size)
    data.prepare_data()
    data.setup("fit")
    for seed in options.seeds:
        if not finished.holds(seed=seed):
            finished.add(run_seed(data, seed, options.epochs, options.fine_tuning))
    print(table(finished.runs))


if __name__ == "__main__":
    main()
