"""What a step of distillation costs beside its parts: a teacher's forward and a student's training step."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset, default_collate

from benchmarks.allocation import allocated
from benchmarks.page import Section, main
from benchmarks.timing import CPU, Candidate, Comparison, interleaved, threads
from lit_compress.losses import KnowledgeDistillation, knowledge_distillation
from lit_compress.losses.confidence import hint, mahalanobis
from lit_compress.models import WideResNet
from lit_compress.modules import LitDistiller
from lit_compress.statistics.gather import to_device
from lit_compress.teacher import Teacher
from lit_compress.teacher_cache import SamplesWithReadings, SeededSamples, TeacherCache

UNCACHED, CACHED, PLAIN = "LitDistiller", "LitDistiller, cached", "student's step"
BY_HAND, PEER = "teacher's forward and student's step", "torchdistill"
LOSS: Any = {"form": "zagoruyko", "temperature": 4.0, "alpha": 0.9}  # a form that the peer has too
HEADS, CONFIDENCE = "200 passes of the head", "confidence loss, cached statistics"


def measure(quick: bool, rounds: int | None, device: torch.device = CPU) -> Section:
    """Steps with and without a cache; then what confidence costs."""
    torch.manual_seed(0)
    size = 4 if quick else 64
    rounds = rounds or (2 if quick else 4)
    depths = (10, 10) if quick else (40, 16)
    teacher = WideResNet(depths[0], 2, num_classes=10).to(device)
    student = WideResNet(depths[1], 1, num_classes=10).to(device)
    with threads(1), tempfile.TemporaryDirectory() as folder:
        steps = Steps(teacher, student, size, Path(folder))
        uncached, cached = steps.compared(rounds)
        heads = _heads(20 if quick else 200, 32 if quick else 224, device)
        losses = _losses(nn.Linear(512, 64).to(device), torch.randn(size, 512, device=device), 20 * rounds)
        held = steps.held()
        hinted = WideResNet(depths[1], 1, num_classes=64).to(device)  # its last layer as the hint
        hints = _losses(hinted, torch.randn(size, 3, 32, 32, device=device), rounds)
    cpu = device == CPU  # a GPU's time is on the wall alone
    clock = "of the CPU's time" if cpu else "on the wall"
    ratio = 1 / heads[HEADS].ratio(heads.baseline, cpu=cpu).median
    wider = hints[CONFIDENCE].ratio(hints.baseline, cpu=cpu)
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
            "what a step holds at once, beyond networks, gradients and moments": _memory_table(held),
            f"ResNet-18 with dropout before its classifier, one image of {32 if quick else 224} px": heads.table(),
            f"steps of WRN-{depths[1]}-1 with a hint layer of 64 dimensions, batch {size}": hints.table(),
            f"the losses alone: a student of one linear layer, batch {size}": losses.table(),
        },
        verdicts=[
            f"uncached: {clock}, {uncached.beside_spread(UNCACHED, cpu=cpu)}",
            *([f"torchdistill: {clock}, {uncached.beside_spread(PEER, cpu=cpu)}"] if PEER in held else []),
            f"cached: {clock}, {cached.beside_spread(CACHED, cpu=cpu)}",
            f"passes of the head are {ratio:.0f} times as cheap as full passes, {clock}",
            f"a confidence step takes {wider.median:.2f} ({wider.lower:.2f}–{wider.upper:.2f})× a hint step, {clock}",
        ],
        settings={"threads": 1, "rounds": rounds, "torchdistill": _version()},
    )


class Steps:
    """One training step of the same student under the same loss, in each way.

    Args:
        teacher: Of the student.
        student: Takes the steps of all ways in turn.
        size: Samples in a batch.
        folder: For the cache.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, size: int, folder: Path) -> None:
        self.device = next(student.parameters()).device
        data = TensorDataset(torch.randn(2 * size, 3, 32, 32), torch.randint(10, (2 * size,)))
        distiller = LitDistiller(teacher, student, [KnowledgeDistillation(**LOSS)])
        distiller.log = lambda *args, **kwargs: None  # type: ignore[method-assign]  # there is no Trainer
        self.optimizer = torch.optim.SGD(student.parameters(), 1e-3, momentum=0.9)
        samples = SeededSamples(data)
        cache = TeacherCache(folder / "cache", distiller.teacher, samples)
        cache.fill(distiller.teacher, self.device)
        cached = SamplesWithReadings(cache)
        indices = list(range(size))

        def batch(source: Any) -> Any:
            return to_device(default_collate(source.__getitems__(indices)), self.device)

        inputs, labels = batch(samples)
        with torch.no_grad():
            given = teacher.eval()(inputs)

        def by_hand() -> Tensor:
            with torch.no_grad():
                theirs = teacher(inputs)
            return self.loss(student(inputs), theirs, labels)

        def plain() -> Tensor:
            images, classes = batch(samples)
            return self.loss(student(images), given, classes)

        self.losses: dict[str, Callable[[], Tensor]] = {
            BY_HAND: by_hand,
            UNCACHED: lambda: distiller.training_step((inputs, labels), 0),
            PLAIN: plain,
            CACHED: lambda: distiller.training_step(batch(cached), 0),
        }
        if find_spec("torchdistill"):
            box = _torchdistill(teacher, student)
            self.losses[PEER] = lambda: box.forward_process(inputs, labels)

    @staticmethod
    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """What all ways compute."""
        return knowledge_distillation(student, teacher, labels, **LOSS)

    def step(self, way: str) -> None:
        """One step."""
        self.optimizer.zero_grad()
        self.losses[way]().backward()
        self.optimizer.step()

    def compared(self, rounds: int) -> tuple[Comparison, Comparison]:
        """Time of the ways that run the teacher, and of those that read what it said."""
        ways = {way: Candidate(way, lambda _, way=way: self.step(way)) for way in self.losses}
        running = [ways[way] for way in (UNCACHED, PEER) if way in ways]
        return (
            interleaved(ways[BY_HAND], running, rounds=rounds),
            interleaved(ways[PLAIN], [ways[CACHED]], rounds=2 * rounds),
        )

    def held(self) -> dict[str, float]:
        """The most MiB that a step of each way allocates at once."""
        return {way: allocated(lambda way=way: self.step(way), self.device) for way in self.losses}  # type: ignore[misc]


def _torchdistill(teacher: nn.Module, student: nn.Module) -> Any:
    """Its box of one stage with the same loss and a frozen teacher, as its examples for CIFAR configure it."""
    logits = {
        f"{who}_module_{what}": value for who in ("student", "teacher") for what, value in (("path", "."), ("io", "output"))
    }
    term = {"key": "KDLoss", "kwargs": {**logits, "temperature": LOSS["temperature"], "alpha": 1 - LOSS["alpha"]}}
    criterion = {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"kd": {"criterion": term, "weight": 1.0}}}}
    settings = {
        "num_epochs": 1,
        "teacher": {"sequential": [], "forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"sequential": [], "forward_proc": "forward_batch_only"},
        "criterion": criterion,
    }
    frozen = {parameter: parameter.requires_grad for parameter in teacher.parameters()}
    box = import_module("torchdistill.core.distillation").DistillationBox(
        teacher, student, {}, settings, next(student.parameters()).device, None, distributed=False, lr_factor=1
    )
    for parameter, wanted in frozen.items():
        parameter.requires_grad_(wanted)
    box.teacher_model.eval()
    box.student_model.train()
    return box


def _memory_table(held: dict[str, float]) -> str:
    lines = ["| what | MiB | ratio |", "|---|---:|---:|"]
    for way, amount in held.items():
        beside = PLAIN if way in (PLAIN, CACHED) else BY_HAND
        lines.append(f"| {way} | {amount:.1f} | {amount / held[beside]:.3f} |")
    return "\n".join(lines)


def _version() -> str:
    return metadata.version("torchdistill") if find_spec("torchdistill") else "not installed"


def _heads(passes: int, pixels: int, device: torch.device) -> Comparison:
    from torchvision.models import resnet18

    network = resnet18(num_classes=10)
    network.fc = nn.Sequential(nn.Dropout(), nn.Linear(512, 10))
    teacher = Teacher(network.to(device), taps=[], sampled=["fc"], passes=passes)
    inputs = torch.randn(1, 3, pixels, pixels, device=device)

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
    mean = torch.randn(size, 64, device=inputs.device)
    samples = torch.randn(size, 64, 200, device=inputs.device)
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
