"""A detector of pedestrians, pruned by PFA and fine-tuned, with and without the unpruned one as a teacher: drawn streets.

    python -m benchmarks.experiments.pruned_detector --seeds 0 1 2 --out docs/images/pruned_detector

Each seed trains a detector by `configs/roiae_synthetic.yaml`; what detects best on validation streets is cut, by the paper's rule
or by reconstruction, and trained on with the labels alone or with the unpruned detector's scores as well; and, to compare with,
trained on uncut. Prints
log-average miss rates on test streets. Writes OUT.json after every arm and goes on from it; keeps detectors in --work.
"""

import argparse
import copy
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.optim.lr_scheduler import OneCycleLR
from typing_extensions import override

from benchmarks.experiments.training import Finished, Run, fit, grouped, mean_and_spread, quiet
from benchmarks.page import commit
from lit_compress import count_mult_adds, count_parameters
from lit_compress.callbacks import PFAPruning
from lit_compress.commands.lightning import lightning_cli
from lit_compress.datamodules import PedestrianDataModule
from lit_compress.losses import ScoreDivergence
from lit_compress.modules import LitPedestrianDetector

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "roiae_synthetic.yaml"
FULL, ON = "as trained", "trained on, uncut"
# Of all 960 anchors; the detector's own loss looks at 120 of them, so that 8 would weigh each as much.
TAUGHT = {"distill_from_unpruned": [ScoreDivergence("score", weight=4.0)]}
BY_RECONSTRUCTION = {"select": "reconstruction", "compensate": "linear"}
CUTS: dict[str, dict[str, Any]] = {
    "cut, labels": {},
    "cut, labels and the unpruned detector": TAUGHT,
    "cut by reconstruction, labels": BY_RECONSTRUCTION,
    "cut by reconstruction, labels and the unpruned detector": {**BY_RECONSTRUCTION, **TAUGHT},
}


def trained(seed: int, work: Path, overrides: Sequence[str]) -> Path:
    """The checkpoint of a detector trained by the config, the best on validation streets; trained now if it is not there."""
    kept = work / f"seed_{seed}.ckpt"
    if not kept.exists():
        place = {"save_dir": work, "name": "", "version": f"seed_{seed}"}
        arguments = [f"--trainer.logger.init_args.{name}={value}" for name, value in place.items()]
        arguments += [f"--seed_everything={seed}", "--trainer.enable_progress_bar=false", *overrides]
        done = lightning_cli(["fit", "--config", str(CONFIG), *arguments])
        shutil.copy(done.trainer.checkpoint_callback.best_model_path, kept)
    return kept


def detector(checkpoint: Path, seed: int, overrides: Sequence[str]) -> tuple[LitPedestrianDetector, PedestrianDataModule]:
    """As it was trained, and its streets."""
    built = lightning_cli(["--config", str(CONFIG), f"--seed_everything={seed}", *overrides], run=False)
    built.model.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    built.datamodule.setup("fit")
    return built.model, built.datamodule


@torch.no_grad()
def miss_rate(module: LitPedestrianDetector, data: PedestrianDataModule) -> float:
    """Log-average miss rate on the test streets."""
    seen = copy.deepcopy(module).eval()
    for images, targets in data.test_dataloader():
        seen.test_miss_rate.update(seen(images), targets)
    return float(seen.test_miss_rate.compute())


class RightAfterTheCut(pl.Callback):
    """Scores the detector before any fine-tuning; stands behind the one that cuts."""

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: LitPedestrianDetector) -> None:
        if trainer.current_epoch == 0:
            self.missed = miss_rate(pl_module, trainer.datamodule)


def run(module: LitPedestrianDetector, data: PedestrianDataModule, arm: str, kept: float, epochs: int, folder: Path) -> Run:
    """Cut, train on, and score one arm."""
    steps = epochs * len(data.train_dataloader())
    module.scheduler, module.scheduler_interval = (lambda optimizer: OneCycleLR(optimizer, 1e-3, total_steps=steps)), "step"
    found: Run = {}
    if arm == ON:
        fit(module, data, epochs)
    elif arm in CUTS:
        pruning = PFAPruning(keep_params=kept, at_epoch=0, evaluate=False, **CUTS[arm])
        after = RightAfterTheCut()
        fit(module, data, epochs, [pruning, after], folder)
        found = {"kept": kept, "right_after": after.missed}
    image = [data.images("test")[0].read().float() / 255]
    mult_adds = count_mult_adds(module.net.eval(), image, forward_fn=lambda net, images: net(images))
    sizes = {"parameters": count_parameters(module.net), "mult_adds": mult_adds}
    return {**found, **sizes, "missed": miss_rate(module, data)}


def table(done: Sequence[Run]) -> str:
    """Sizes, and mean and standard deviation of miss rates over seeds, as markdown."""
    lines = [
        "| detector | parameters | mult-adds | right after the cut | miss rate, mean (sd) | runs |",
        "|---|---:|---:|---|---|---:|",
    ]
    whole = {size: statistics.mean(one[size] for one in done if one["arm"] == FULL) for size in ("parameters", "mult_adds")}
    for (arm, kept), runs in grouped(done, lambda one: (one["arm"], str(one.get("kept", "")))).items():
        cells = [arm]
        for size, total in whole.items():
            mean = statistics.mean(one[size] for one in runs)
            cells.append(f"{mean:,.0f} ({mean / total:.0%})" if kept else f"{mean:,.0f}")
        cells += [mean_and_spread(runs, of="right_after") if kept else "", mean_and_spread(runs, of="missed"), str(len(runs))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is asked for and not yet done."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="Whatever else is given overrides the config, as --data.train_size=16"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--kept", type=float, default=0.25, help="of the parameters")
    parser.add_argument("--epochs", type=int, default=6, help="after the cut")
    parser.add_argument("--test_images", type=int, default=300)
    parser.add_argument("--work", type=Path, default=Path("lit_compress_runs/pruned_detector"))
    parser.add_argument("--out", type=Path, default=Path("pruned_detector"))
    options, overrides = parser.parse_known_args()
    quiet()
    options.work.mkdir(parents=True, exist_ok=True)
    finished, code = Finished(options.out.with_suffix(".json")), commit()  # what runs is what was checked out at the start
    for seed in options.seeds:
        for arm in (FULL, ON, *CUTS):
            if finished.holds(seed=seed, arm=arm):
                continue
            began = time.process_time()
            checkpoint = trained(seed, options.work, overrides)
            module, data = detector(checkpoint, seed, [f"--data.test_size={options.test_images}", *overrides])
            with tempfile.TemporaryDirectory() as folder:
                found = run(module, data, arm, options.kept, options.epochs, Path(folder))
            minutes = round((time.process_time() - began) / 60, 2)
            finished.add([{"seed": seed, "arm": arm, **found, "cpu_minutes": minutes, "commit": code}])
            print(f"seed {seed}, {arm}: {found['missed']:.1%}", flush=True)
    print(table(finished.runs))


if __name__ == "__main__":
    main()
