"""What the Region of Interest Autoencoder costs a training step, and what it leaves behind: nothing."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_fpn, ssd300_vgg16
from typing_extensions import override

from benchmarks.page import Section, main
from benchmarks.timing import Candidate, Comparison, Span, interleaved, threads
from benchmarks.waiting import Stopwatch
from lit_compress.callbacks import RoIAutoencoder
from lit_compress.datamodules import SyntheticPedestrianDataModule
from lit_compress.datamodules.pedestrian_images import PedestrianImages, together

PLAIN, DEPLOYED = "no callback", "after a training with RoIAutoencoder"
WITH, UNMASKED = "RoIAutoencoder", "RoIAutoencoder(mask=False)"


class Detector(LightningModule):
    """A detector of torchvision for persons."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    @override
    def training_step(self, batch: tuple[list[Tensor], list[dict[str, Tensor]]], batch_idx: int) -> Tensor:
        images, targets = batch
        persons = [target["labels"] == 1 for target in targets]
        targets = [
            {name: target[name][person] for name in ("boxes", "labels")} for target, person in zip(targets, persons, strict=True)
        ]
        losses: dict[str, Tensor] = self.net(images, targets)
        return torch.stack(list(losses.values())).sum()

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4, momentum=0.9)


def measure(quick: bool, rounds: int | None) -> Section:
    """Training steps of two detectors; then their forwards, one of them trained with the autoencoder."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    size, steps = ((64, 96), 1) if quick else ((240, 320), 4)
    rounds = rounds or (2 if quick else 6)
    options = {"weights": None, "weights_backbone": None, "num_classes": 2}
    small = {"min_size": size[0], "max_size": size[1]}
    subjects = {
        "Faster R-CNN with MobileNet v3": (
            lambda: fasterrcnn_mobilenet_v3_large_fpn(**small, **options),
            ["body.3", "body.6", "body.12"],
        ),
        "SSD with VGG-16, 300 × 300": (lambda: ssd300_vgg16(**options), ["features.9", "features.16", "features.22"]),
    }
    tables, verdicts = {}, []
    for caption, (build, names) in list(subjects.items())[: 1 if quick else 2]:
        layers = [f"net.backbone.{name}" for name in names]
        with threads(1), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning's advice on workers, loggers and validation
            training, forward = _compared(build, layers, size, steps, rounds)
        tables[f"A training step of {caption}, one image"] = training.table()
        tables[f"A forward of {caption}, deployed"] = forward.table()
        for name in (WITH, UNMASKED):
            verdicts.append(
                f"{caption}: a training step with `{name}` takes {training.beside_spread(name, cpu=True)}, of the CPU"
            )
        verdicts.append(f"{caption}: a forward {DEPLOYED} takes {forward.beside_spread(DEPLOYED)}")
    return Section(
        question="What does the Region of Interest Autoencoder cost?",
        target="deployed, nothing beyond the spread of measuring the baseline twice; what training costs is printed.",
        tables=tables,
        verdicts=verdicts,
        settings={"threads": 1, "rounds": rounds, "images": f"{size[0]} × {size[1]}"},
    )


def _compared(
    build: Callable[[], nn.Module], layers: list[str], size: tuple[int, int], steps: int, rounds: int
) -> tuple[Comparison, Comparison]:
    data = SyntheticPedestrianDataModule(size=size, heights=(20.0, 0.6 * size[0]), train_size=8 * steps, crowds=0.0)
    shown = [sample for sample in PedestrianImages(data.images("train")) if len(sample[1]["boxes"])][:steps]
    loader = DataLoader(shown, batch_size=1, collate_fn=together)
    trained: dict[str, nn.Module] = {}

    def fit(name: str, *callbacks: Callback) -> Span:
        torch.manual_seed(0)
        stopwatch, module = Stopwatch(), Detector(build())
        Trainer(
            max_epochs=3, callbacks=[stopwatch, *callbacks], accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        ).fit(module, loader)  # fmt: skip
        trained[name] = module.net.eval()
        return stopwatch.per_step

    def roiae(mask: bool) -> RoIAutoencoder:
        # Weights are looked for in the first batch only, which warms up; looking for them again costs a backward pass a term.
        return RoIAutoencoder(layers, balance=0.1, balance_batches=1, balance_every=None, mask=mask, draw_every_n_epochs=None)

    training = interleaved(
        Candidate(PLAIN, lambda _: fit(PLAIN)),
        [Candidate(WITH, lambda _: fit(WITH, roiae(True))), Candidate(UNMASKED, lambda _: fit(UNMASKED, roiae(False)))],
        rounds=rounds,
        warmup=0,
    )
    # How long a forward takes hangs on how much it detects. With the same weights, only what is left behind could differ.
    trained[WITH].load_state_dict(trained[PLAIN].state_dict())
    image = [torch.rand(3, *size)]

    def forward(name: str) -> None:
        with torch.inference_mode():
            trained[name](image)

    deployed = interleaved(
        Candidate("the baseline", lambda _: forward(PLAIN)),
        [Candidate(DEPLOYED, lambda _: forward(WITH))],
        rounds=10 * rounds,
    )
    return training, deployed


if __name__ == "__main__":
    main("roi_autoencoder", measure)
