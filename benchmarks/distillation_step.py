"""What a step of distillation costs beside its parts: a teacher's forward and a student's training step."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset, default_collate

from benchmarks.page import Section, main
from benchmarks.timing import Candidate, Comparison, interleaved, threads
from lit_compress.losses import KnowledgeDistillation, knowledge_distillation
from lit_compress.losses.confidence import hint, mahalanobis
from lit_compress.models import WideResNet
from lit_compress.modules import LitDistiller
from lit_compress.teacher import Teacher
from lit_compress.teacher_cache import SamplesWithReadings, SeededSamples, TeacherCache

UNCACHED, CACHED, PLAIN = "LitDistiller", "LitDistiller, cached", "student's step"
HEADS, CONFIDENCE = "200 passes of the head", "confidence loss, cached statistics"


def measure(quick: bool, rounds: int | None) -> Section:
    """Steps with and without a cache; then what confidence costs."""
    torch.manual_seed(0)
    size = 4 if quick else 64
    rounds = rounds or (2 if quick else 4)
    depths = (10, 10) if quick else (40, 16)
    teacher, student = WideResNet(depths[0], 2, num_classes=10), WideResNet(depths[1], 1, num_classes=10)
    with threads(1), tempfile.TemporaryDirectory() as folder:
        uncached, cached = _steps(teacher, student, size, rounds, Path(folder))
        heads = _heads(20 if quick else 200, 32 if quick else 224)
        losses = _losses(nn.Linear(512, 64), torch.randn(size, 512), 20 * rounds)
        hinted = WideResNet(depths[1], 1, num_classes=64)  # its last layer as the hint
        steps = _losses(hinted, torch.randn(size, 3, 32, 32), rounds)
    ratio = 1 / heads[HEADS].ratio(heads.baseline, cpu=True).median
    wider = steps[CONFIDENCE].ratio(steps.baseline, cpu=True)
    return Section(
        question="What does a step of distillation cost?",
        target=(
            "at most 1.02× a teacher's forward and a student's step; from a cache, at most 1.05× the student's step. Mean and "
            "covariance of 200 passes at least 20 times as cheap as the passes; a step of the confidence loss from cached "
            "statistics at most 2× one of the hint loss"
        ),
        tables={
            f"WRN-{depths[0]}-2 teaches WRN-{depths[1]}-1, batch {size}": uncached.table(),
            "the same from a cache, with loading a batch": cached.table(),
            f"ResNet-18 with dropout before its classifier, one image of {32 if quick else 224} px": heads.table(),
            f"steps of WRN-{depths[1]}-1 with a hint layer of 64 dimensions, batch {size}": steps.table(),
            f"the losses alone: a student of one linear layer, batch {size}": losses.table(),
        },
        verdicts=[
            f"uncached: of the CPU's time, {uncached.beside_spread(UNCACHED, cpu=True)}",
            f"cached: of the CPU's time, {cached.beside_spread(CACHED, cpu=True)}",
            f"passes of the head are {ratio:.0f} times as cheap as full passes, of the CPU's time",
            f"a confidence step takes {wider.median:.2f} ({wider.lower:.2f}–{wider.upper:.2f})× a hint step, of the CPU's time",
        ],
        settings={"threads": 1, "rounds": rounds},
    )


def _steps(teacher: nn.Module, student: nn.Module, size: int, rounds: int, folder: Path) -> tuple[Comparison, Comparison]:
    data = TensorDataset(torch.randn(2 * size, 3, 32, 32), torch.randint(10, (2 * size,)))
    distiller = LitDistiller(teacher, student, [KnowledgeDistillation()])
    distiller.log = lambda *args, **kwargs: None  # type: ignore[method-assign]  # there is no Trainer
    optimizer = torch.optim.SGD(student.parameters(), 1e-3, momentum=0.9)

    def step(loss: Callable[[], Tensor]) -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    samples = SeededSamples(data)
    cache = TeacherCache(folder / "cache", distiller.teacher, samples)
    cache.fill(distiller.teacher, torch.device("cpu"))
    indices = list(range(size))

    def batch(source: Any) -> Any:
        return default_collate(source.__getitems__(indices))

    inputs, labels = batch(samples)
    with torch.no_grad():
        given = teacher(inputs)

    def by_hand() -> Tensor:
        with torch.no_grad():
            theirs = teacher(inputs)
        return knowledge_distillation(student(inputs), theirs, labels)

    def plain() -> Tensor:
        images, classes = batch(samples)
        return knowledge_distillation(student(images), given, classes)

    uncached = interleaved(
        Candidate("teacher's forward and student's step", lambda _: step(by_hand)),
        [Candidate(UNCACHED, lambda _: step(lambda: distiller.training_step((inputs, labels), 0)))],
        rounds=rounds,
    )
    cached = interleaved(
        Candidate(PLAIN, lambda _: step(plain)),
        [Candidate(CACHED, lambda _: step(lambda: distiller.training_step(batch(SamplesWithReadings(cache)), 0)))],
        rounds=2 * rounds,
    )
    return uncached, cached


def _heads(passes: int, pixels: int) -> Comparison:
    from torchvision.models import resnet18

    network = resnet18(num_classes=10)
    network.fc = nn.Sequential(nn.Dropout(), nn.Linear(512, 10))
    teacher = Teacher(network, taps=[], sampled=["fc"], passes=passes)
    inputs = torch.randn(1, 3, pixels, pixels)

    def full(_: Any) -> Tensor:
        with torch.no_grad():
            network.fc[0].train()
            samples = torch.stack([network(inputs) for _ in range(passes)])
            network.fc[0].eval()
        return torch.stack([torch.cov(one.T) for one in samples.unbind(1)])

    name = f"{passes} full passes"
    return interleaved(Candidate(name, full), [Candidate(HEADS, lambda _: teacher.read(inputs))], rounds=1, warmup=0)


def _losses(student: nn.Module, inputs: Tensor, rounds: int) -> Comparison:
    size = len(inputs)
    mean = torch.randn(size, 64)
    samples = torch.randn(size, 64, 200)
    covariance = samples @ samples.mT / 199

    def step(loss: Callable[[Tensor], Tensor]) -> None:
        student.zero_grad()
        loss(student(inputs)).backward()

    return interleaved(
        Candidate("hint loss", lambda _: step(lambda ours: hint(ours, mean))),
        [Candidate(CONFIDENCE, lambda _: step(lambda ours: mahalanobis(ours, mean, covariance, ridge=1e-3)))],
        rounds=rounds,
    )


if __name__ == "__main__":
    main("distillation_step", measure)
