"""What the experiments share: one training, its test, and a file of finished runs from which a stopped experiment goes on."""

import json
import logging
import statistics
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from lit_compress.datamodules import MNISTDataModule
from lit_compress.datamodules.image_classification import ImageClassificationDataModule
from lit_compress.modules import LitClassifier

Run = dict[str, Any]


def quiet() -> None:
    """Let Lightning say nothing."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def train(
    net: nn.Module,
    data: MNISTDataModule,
    epochs: int,
    seed: int,
    callbacks: Sequence[pl.Callback] = (),
    folder: Path | None = None,
    lr: float = 0.05,
) -> float:
    """Train with the settings of P3's appendix C.1, scaled to MNIST; returns the test accuracy. Callbacks write to ``folder``."""
    pl.seed_everything(seed, verbose=False)
    module = LitClassifier(
        net,
        num_classes=data.num_classes,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=1e-4),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [round(0.6 * epochs)], gamma=0.1),
    )
    fit(module, data, epochs, callbacks, folder)
    return test(net, data)


def fit(
    module: pl.LightningModule,
    data: pl.LightningDataModule,
    epochs: int,
    callbacks: Sequence[pl.Callback] = (),
    folder: Path | None = None,
    accelerator: str = "cpu",
    clip: float | None = None,
) -> None:
    """Train in silence and without validation; ``clip`` is the norm that gradients may have."""
    module.train()  # Lightning leaves a network that was tested before in evaluation mode
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator=accelerator, devices=1, gradient_clip_val=clip, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, num_sanity_val_steps=0,
        callbacks=list(callbacks), default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)


@torch.no_grad()
def test(net: nn.Module, data: ImageClassificationDataModule) -> float:
    """Accuracy on the test images of the chosen classes."""
    data.setup("test")
    net.eval()
    right = torch.cat([net(images).argmax(1) == labels for images, labels in data.test_dataloader()])
    return float(right.float().mean())


class Finished:
    """The runs done so far, kept in a JSON file."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.runs: list[Run] = json.loads(path.read_text()) if path.exists() else []

    def holds(self, **key: Any) -> bool:
        """Whether a run with these entries is among them."""
        return any(all(run.get(name) == value for name, value in key.items()) for run in self.runs)

    def add(self, runs: Iterable[Run]) -> None:
        """Keep further runs, from now on and on disk."""
        self.runs += runs
        self.path.write_text(json.dumps(self.runs, indent=1) + "\n")


def grouped(runs: Iterable[Run], key: Callable[[Run], tuple[str, ...]]) -> dict[tuple[str, ...], list[Run]]:
    """Runs by what ``key`` says of them, in the order in which each first appears."""
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups


def mean_and_spread(runs: Sequence[Run], of: str = "accuracy") -> str:
    """Mean of a fraction over some runs and, of several, its standard deviation, in percent."""
    values = [100 * run[of] for run in runs]
    spread = f" ({statistics.stdev(values):.2f})" if len(runs) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread} %"
