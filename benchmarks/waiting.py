"""What a PFAPruning that waits for its epoch costs a training step."""

from __future__ import annotations

import logging
import warnings

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from benchmarks.page import Section, main
from benchmarks.timing import Candidate, Comparison, Span, interleaved, threads
from lit_compress.callbacks import PFAPruning
from lit_compress.models import LeNet300100, ResNetCIFAR
from lit_compress.modules import LitClassifier

EPOCH, CONVERGED = "PFAPruning(at_epoch=9_999)", 'PFAPruning(when="converged")'


class Stopwatch(Callback):
    """Time of training without setting it up; first among the callbacks, so that the others' hooks are within."""

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The first epoch warms up.
        if trainer.current_epoch == 1:
            self.start = Span.now()
            self.step = trainer.global_step

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.per_step = Span.now().since(self.start, parts=trainer.global_step - self.step)


def measure(quick: bool, rounds: int | None) -> Section:
    """A small network, whose steps are so short that any overhead shows, and a medium one."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    torch.manual_seed(0)
    subjects: dict[str, tuple[nn.Module, Tensor, int]] = {
        "LeNet-300-100 on 64 features, batch 32": (LeNet300100(in_features=64), torch.randn(32, 64), 4 if quick else 100),
        "ResNet-20 for CIFAR, batch 32": (
            ResNetCIFAR(8 if quick else 20),
            torch.randn(8 if quick else 32, 3, 32, 32),
            1 if quick else 6,
        ),
    }
    tables, verdicts = {}, []
    for caption, (net, images, steps) in subjects.items():
        with threads(1), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning's advice on workers, loggers and validation
            compared = _compared(net, images, steps, rounds or (2 if quick else 20))
        tables[f"A training step of {caption}"] = compared.table()
        for name in (EPOCH, CONVERGED):
            verdicts.append(
                f"{caption}: `{name}` {compared.beside_spread(name)}; of the CPU {compared.beside_spread(name, cpu=True)}"
            )
    return Section(
        question="What does a PFAPruning that waits cost a training step?",
        target="nothing beyond the spread of measuring the same step twice.",
        tables=tables,
        verdicts=verdicts,
        settings={"threads": 1, "epochs a fit": 4},
    )


def _compared(net: nn.Module, images: Tensor, steps: int, rounds: int) -> Comparison:
    labels = torch.zeros(len(images) * steps, dtype=torch.int64)
    loader = DataLoader(TensorDataset(images.repeat(steps, *[1] * (images.ndim - 1)), labels), batch_size=len(images))

    def fit(pruning: list[Callback]) -> Span:
        stopwatch = Stopwatch()
        # `max_epochs` leaves room for the cut that never comes; `max_steps` ends training after four epochs.
        Trainer(
            max_epochs=10_000, max_steps=4 * steps, callbacks=[stopwatch, *pruning], accelerator="cpu", logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ).fit(LitClassifier(net, num_classes=10), loader)  # fmt: skip
        return stopwatch.per_step

    return interleaved(
        Candidate("no callback", lambda _: fit([])),
        [
            # Lightning calls some eight hooks a step on every callback, whatever they do.
            Candidate("Callback(), which does nothing", lambda _: fit([Callback()])),
            Candidate(EPOCH, lambda _: fit([PFAPruning(energy=0.9, at_epoch=9_999)])),
            Candidate(CONVERGED, lambda _: fit([PFAPruning(energy=0.9, when="converged", monitor="train/loss", patience=9_999)])),
        ],
        rounds=rounds,
    )


if __name__ == "__main__":
    main("waiting", measure)
