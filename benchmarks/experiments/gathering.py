"""What the experiments on budgets share: one fit, a file of runs to go on from, intervals."""

import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from math import sqrt
from pathlib import Path

import pytorch_lightning as pl
from scipy.stats import t as student
from torch import nn

from lit_compress.modules import LitFeatureGatherer


def quiet() -> None:
    """One thread, and nothing on the standard error that is not ours."""
    import torch

    torch.set_num_threads(1)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def fit(build: Callable[[], LitFeatureGatherer], data: pl.LightningDataModule, epochs: int, seed: int) -> LitFeatureGatherer:
    """Train a gatherer on the CPU; it then says its `seconds` and its `val_loss` under the noise of its budget."""
    pl.seed_everything(seed, verbose=False)
    module = build()
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, num_sanity_val_steps=0,
    )  # fmt: skip
    start = time.perf_counter()
    trainer.fit(module, datamodule=data)
    module.seconds = time.perf_counter() - start
    return module


def validated(module: LitFeatureGatherer, data: pl.LightningDataModule) -> float:
    """The metric (or loss) on the validation set: what a search may look at."""
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    (results,) = trainer.validate(module, datamodule=data, verbose=False)
    return results.get("val/error", results["val/loss"])


class Runs:
    """Runs in a JSON file, each under what identifies it; what is there is not run again."""

    def __init__(self, file: Path) -> None:
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        self.done: list[dict] = json.loads(file.read_text()) if file.exists() else []

    def get(self, key: dict, run: Callable[[], dict]) -> dict:
        """The run under `key`, from the file or run now."""
        for known in self.done:
            if all(known.get(name) == value for name, value in key.items()):
                return known
        self.done.append({**key, **run()})
        self.file.write_text("[\n" + ",\n".join(map(json.dumps, self.done)) + "\n]\n")
        print(f"{key}: done", flush=True)
        return self.done[-1]


def extra(matched: Sequence[float | None], total: float, most: float) -> str:
    """Median, least and most by which a uniform total must be larger; `None` where even `most` was not enough."""
    shares = sorted((most if value is None else value) / total - 1 for value in matched)

    def shown(share: float) -> str:
        return f"> {100 * share:.0f} %" if share >= most / total - 1 else f"{100 * share:.0f} %"

    return f"{shown(statistics.median(shares))} ({shown(shares[0])} to {shown(shares[-1])})"


def interval(values: Sequence[float], percent: bool = False) -> str:
    """Mean and half the width of its 95 % interval by Student's t."""
    scale, unit = (100, " %") if percent else (1, "")
    mean = statistics.mean(values) * scale
    if len(values) < 2:
        return f"{mean:.3g}{unit}"
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) * scale / sqrt(len(values))
    return f"{mean:.3g} ± {half:.2g}{unit}"


def first_layer(module: LitFeatureGatherer) -> nn.Linear:
    """The layer that combines the statistics of all contexts."""
    return next(layer for layer in module.predictor.modules() if isinstance(layer, nn.Linear))
