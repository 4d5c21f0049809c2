"""A student alone, with knowledge distillation and with attention transfer: the thesis's tables 4.3 and 4.5, scaled down.

    python -m benchmarks.experiments.distillation mnist cifar10 camvid --data DIR --seeds 0 1 2 --out docs/images/distillation

All arms of a seed train with the same settings from the same weights, and learn from the same teacher. Writes OUT.json after
every run (and goes on from it), keeps teachers in --teachers, and prints a table.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.optim.lr_scheduler import MultiStepLR, PolynomialLR

from benchmarks.experiments import training
from benchmarks.experiments.p3_figure1 import build
from benchmarks.experiments.training import Finished, Run, fit, grouped, mean_and_spread, quiet
from lit_compress import count_parameters
from lit_compress.datamodules import CIFAR10DataModule, MNISTDataModule, SegmentationDataModule
from lit_compress.losses import AttentionTransfer, CrossEntropy, KnowledgeDistillation, Term
from lit_compress.models import ERFNet, WideResNet
from lit_compress.modules import LitClassifier, LitDistiller, LitSegmenter

ARMS: Mapping[str, Callable[[Sequence[str]], list[Term]]] = {
    "knowledge distillation": lambda taps: [KnowledgeDistillation()],
    "attention transfer": lambda taps: [CrossEntropy(), AttentionTransfer(taps)],
}


@dataclass(frozen=True)
class Setting:
    """What is trained on what.

    Args:
        data: From its folder.
        teacher: Makes it; all seeds learn from the one of ``teacher_seed``, or each from its own if that is None.
        student: Makes it.
        taps: Layers for attention transfer, which both have.
        epochs: Of every training.
        optimizer: From parameters.
        scheduler: From an optimizer.
        teacher_seed: See ``teacher``.
    """

    data: Callable[[Path | None], Any]
    teacher: Callable[[], nn.Module]
    student: Callable[[], nn.Module]
    taps: Sequence[str]
    epochs: int
    optimizer: Callable[[Any], torch.optim.Optimizer]
    scheduler: Callable[[torch.optim.Optimizer], Any]
    teacher_seed: int | None = None


SETTINGS = {
    # Adam, since the losses differ in scale and LeNet has no norms.
    "mnist": Setting(
        data=lambda folder: MNISTDataModule(data_dir=folder, batch_size=64, train_size=10_000),
        teacher=lambda: build("lenet5"),
        student=lambda: build("lenet5", 0.1),
        taps=["activation1", "activation2"],
        epochs=12,
        optimizer=lambda parameters: torch.optim.Adam(parameters, 2e-3),
        scheduler=lambda optimizer: MultiStepLR(optimizer, [7, 10], 0.2),
    ),
    # The document's optimizer; its steps of the rate at 30, 60 and 80 % of the training.
    "cifar10": Setting(
        data=lambda folder: CIFAR10DataModule(data_dir=folder, batch_size=64, train_size=2_000),
        teacher=lambda: WideResNet(depth=10, width=2, num_classes=10),
        student=lambda: WideResNet(depth=10, width=1, num_classes=10, block="G(N)"),
        taps=["stage1", "stage2", "stage3"],
        epochs=20,
        optimizer=lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=5e-4),
        scheduler=lambda optimizer: MultiStepLR(optimizer, [6, 12, 16], 0.2),
        teacher_seed=0,
    ),
    "camvid": Setting(
        data=lambda folder: SegmentationDataModule("camvid", data_dir=folder, size=(96, 128), batch_size=6),
        teacher=lambda: ERFNet(num_classes=11),
        student=lambda: ERFNet(num_classes=11, width=0.25),
        taps=["layer7", "layer12", "layer16", "layer19", "layer22"],
        epochs=40,
        optimizer=lambda parameters: torch.optim.Adam(parameters, 2e-3, weight_decay=1e-4),
        scheduler=lambda optimizer: PolynomialLR(optimizer, total_iters=40, power=0.9),
        teacher_seed=0,
    ),
}


def learn(setting: Setting, net: nn.Module, data: Any, seed: int, teacher: nn.Module | None = None, arm: str = "alone") -> float:
    """Train a network, from a teacher unless it is alone; returns its score on images that it was not trained on."""
    options = {"optimizer": setting.optimizer, "scheduler": setting.scheduler}
    segmenter = LitSegmenter(net, data.num_classes, **options) if isinstance(data, SegmentationDataModule) else None
    module: pl.LightningModule
    if teacher is not None:
        module = LitDistiller(teacher, net, ARMS[arm](setting.taps), **options)
    else:
        module = segmenter or LitClassifier(net, data.num_classes, **options)
    pl.seed_everything(seed, verbose=False)
    fit(module, data, setting.epochs)
    if segmenter is None:
        return training.test(net, data)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    (logged,) = trainer.validate(segmenter, datamodule=data, verbose=False)
    return logged["val/iou"]


def run_seed(name: str, setting: Setting, data: Any, seed: int, finished: Finished, teachers: Path) -> None:
    """All arms for one seed that are not there yet."""

    def record(arm: str, seed: int, net: nn.Module, score: float) -> None:
        finished.add([{"data": name, "arm": arm, "seed": seed, "parameters": count_parameters(net), "score": score}])
        print(f"{name}, seed {seed}: {arm}: {score:.2%}", flush=True)

    teacher_seed = seed if setting.teacher_seed is None else setting.teacher_seed
    pl.seed_everything(teacher_seed, verbose=False)
    teacher, file = setting.teacher(), teachers / f"{name}_{teacher_seed}.pt"
    if not file.exists():
        score = learn(setting, teacher, data, teacher_seed)
        teachers.mkdir(parents=True, exist_ok=True)
        torch.save(teacher.state_dict(), file)
        record("teacher", teacher_seed, teacher, score)
    teacher.load_state_dict(torch.load(file, weights_only=True))
    for arm in ("alone", *ARMS):
        if not finished.holds(data=name, arm=arm, seed=seed):
            pl.seed_everything(seed, verbose=False)
            student = setting.student()
            record(arm, seed, student, learn(setting, student, data, seed, None if arm == "alone" else teacher, arm))


def table(done: list[Run]) -> str:
    """Mean and standard deviation over seeds, as markdown."""
    lines = ["| data | arm | parameters | score, mean (sd) | runs |", "|---|---|---:|---|---|"]
    for (data, arm), runs in grouped(done, lambda run: (run["data"], run["arm"])).items():
        lines.append(f"| {data} | {arm} | {runs[0]['parameters']:,} | {mean_and_spread(runs, of='score')} | {len(runs)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is asked for and not yet done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sets", nargs="+", choices=list(SETTINGS))
    parser.add_argument("--data", type=Path, help="folder of the data sets; $LIT_COMPRESS_DATA or ./data by default")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="of every training, in place of the setting's own")
    parser.add_argument("--teachers", type=Path, default=Path("lit_compress_runs/distillation"))
    parser.add_argument("--out", type=Path, default=Path("distillation"))
    options = parser.parse_args()
    quiet()
    finished = Finished(options.out.with_suffix(".json"))
    for name in options.sets:
        setting = SETTINGS[name]
        if options.epochs is not None:
            setting = replace(setting, epochs=options.epochs)
        data = setting.data(options.data)
        data.prepare_data()
        for seed in options.seeds:
            run_seed(name, setting, data, seed, finished, options.teachers)
    print(table(finished.runs))


if __name__ == "__main__":
    main()
