"""Small students of a large teacher say pedestrian or not: P1's comparison, on drawn streets and on photographs of COCO.

    python -m benchmarks.experiments.pedestrian_students --data DIR --seeds 0 1 2 --out docs/images/pedestrian_students

A region proposal network is trained once and proposes boxes for all images. Each seed trains a teacher on patches of them, and
every student from it by every arm, with P1's optimizer and schedule over fewer and smaller patches, and with clipped gradients.
A network scores the boxes proposed in test images, and Caltech's protocol scores the network. Writes OUT.json after every run
(and goes on from it), keeps networks in --work, and prints tables; draws the logits and the first layers of the first seed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import scipy.stats
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim.lr_scheduler import MultiStepLR
from typing_extensions import override

from benchmarks.experiments.training import Finished, Run, fit, grouped, mean_and_spread, quiet
from lit_compress import count_parameters
from lit_compress.datamodules import (
    CocoPedestrianDataModule,
    PedestrianDataModule,
    PedestrianPatchDataModule,
    SyntheticPedestrianDataModule,
)
from lit_compress.datamodules.pedestrian_images import SPLITS, PedestrianImage, Split
from lit_compress.detection import DetectionLimits, RegionProposalNetwork, pedestrian_resnet
from lit_compress.losses import CrossEntropy, Hint, KnowledgeDistillation, TeacherConfidence, Term
from lit_compress.models import VGGEncoder
from lit_compress.modules import LitClassifier, LitDistiller, LitPedestrianDetector
from lit_compress.pedestrians import Detections, Subset, evaluate, read_results, rescore, scenes_of, write_results

HINT, LOGITS = "fc.hint", ""
LEAST = 24.0  # pixels: who is less tall is an ignore region
COUNTED = Subset(heights=(LEAST, inf), bounds=None)
CLIP = 1.0  # norm of gradients, in every arm: at P1's rate, the losses with the teacher's covariance diverge without it
PLACES = ("streets", "photographs")
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Arm:
    """What a student learns from.

    Args:
        terms: Of the loss, for a number of passes of the teacher with dropout; None for the labels alone.
        copied: Whether the student begins with the teacher's last layer.
    """

    terms: Callable[[int], list[Term]] | None
    copied: bool = False


# P1, sections 4 and 6; the labels weigh 0.5 beside what the teacher says.
ARMS: Mapping[str, Arm] = {
    "direct": Arm(None),
    "KD": Arm(lambda passes: [KnowledgeDistillation(form="paper")]),
    "hint": Arm(lambda passes: [Hint(HINT), CrossEntropy(weight=0.5)], copied=True),
    "confidence": Arm(lambda passes: [TeacherConfidence(LOGITS, passes=passes), CrossEntropy(weight=0.5)]),
    "hint + confidence": Arm(lambda passes: [TeacherConfidence(HINT, passes=passes), CrossEntropy(weight=0.5)], copied=True),
}

# What P1 finds: the first arm has the lower miss rate, for students of these sizes.
CLAIMS = [
    ("direct", "KD", ("thin", "small")),
    ("hint", "direct", ("18", "thin", "small")),
    ("confidence", "direct", ("18", "thin", "small")),
    ("hint + confidence", "hint", ("18", "thin", "small")),
    ("hint + confidence", "confidence", ("18", "thin", "small")),
]


class Images(PedestrianDataModule):
    """Drawn streets, and the persons of a few photographs where there are any, all in memory."""

    def __init__(self, sources: Mapping[str, PedestrianDataModule], batch_size: int = 4) -> None:
        super().__init__(batch_size=batch_size)
        self.sources = sources

    @override
    def find_images(self, split: Split) -> Sequence[PedestrianImage]:
        return [image for place in self.sources for image in self.of(place, split)]

    def of(self, place: str, split: Split) -> Sequence[PedestrianImage]:
        """The images of one source."""
        images = self.sources[place].images(split)
        return [image._replace(read=partial(_itself, image.read())) for image in images]


def images_of(folder: Path | None, streets: int) -> Images:
    """As many streets to train on, half as many to test on, and COCO128's photographs if they are in the folder."""
    sources: dict[str, PedestrianDataModule] = {
        "streets": SyntheticPedestrianDataModule(train_size=streets, val_size=4, test_size=max(streets // 2, 4))
    }
    photographs = CocoPedestrianDataModule(
        folder, "coco128", "val2017", "annotations/instances_val2017.json", val_annotations=None, val_size=40
    )
    if photographs.root.exists():
        sources["photographs"] = photographs
    return Images(sources)


def propose(images: Images, epochs: int, file: Path) -> None:
    """Train a region proposal network, and write what it proposes in all images."""
    pl.seed_everything(0, verbose=False)
    limits = DetectionLimits(min_width=8.0, min_height=0.8 * LEAST)
    net = RegionProposalNetwork(
        VGGEncoder(width=0.25, macro_layers=4), hidden=64, scales=tuple(0.8 * 1.3**step for step in range(9)),
        image_size=(192, 256), min_height=0.8 * LEAST, limits=limits,
    )  # fmt: skip
    steps = epochs * -(-len(images.images("train")) // images.batch_size)
    detector = LitPedestrianDetector(
        net,
        optimizer=lambda parameters: torch.optim.Adam(parameters, 1e-3),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps),
        scheduler_interval="step",
        pictures=0,
    )
    fit(detector, images, epochs)
    found = {}
    detector.eval()
    with torch.no_grad():
        for split in SPLITS:
            for image in images.images(split):
                (one,) = detector([image.read() / 255])
                corners = one["boxes"].double().numpy()
                boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
                found[image.name] = Detections(boxes, one["scores"].double().numpy())
    write_results(file, found)


@dataclass(frozen=True)
class Setting:
    """How much is trained on, and on what."""

    images: Images
    proposals: Path
    work: Path
    side: int
    epochs: int
    batches: int
    passes: int
    accelerator: str

    def patches(self) -> PedestrianPatchDataModule:
        """P1's batches: 16, one positive to three negatives."""
        return PedestrianPatchDataModule(
            self.images, self.proposals, min_height=LEAST, side=self.side, batch_size=16, batches=self.batches
        )

    def file(self, seed: int, *names: str) -> Path:
        """Where a network is kept, with what it says of the test patches."""
        return self.work / f"{'_'.join([str(seed), *names]).replace(' ', '')}.pt"


def learn(setting: Setting, net: nn.Module, seed: int, arm: Arm, teacher: nn.Module | None, data: pl.LightningDataModule) -> None:
    """Train a network as P1 does: its rate is divided by 5 after 20, 40 and 60 of 70 epochs, here in proportion."""
    options: dict[str, Any] = {
        "optimizer": lambda parameters: torch.optim.SGD(parameters, 0.01, momentum=0.9, nesterov=True, weight_decay=5e-4),
        "scheduler": lambda optimizer: MultiStepLR(optimizer, [round(setting.epochs * part / 7) for part in (2, 4, 6)], 0.2),
    }
    module: pl.LightningModule
    if arm.terms is None or teacher is None:
        module = LitClassifier(net, num_classes=2, **options)
    else:
        copied = ["fc.fc"] if arm.copied else []
        module = LitDistiller(teacher, net, arm.terms(setting.passes), copy_from_teacher=copied, **options)
    pl.seed_everything(seed, verbose=False)
    fit(module, data, setting.epochs, accelerator=setting.accelerator, clip=CLIP)


@torch.no_grad()
def logits_of(net: nn.Module, data: PedestrianPatchDataModule) -> tuple[Tensor, Tensor]:
    """What a network says of the test patches ``(N, 2)``, and what they are ``(N,)``."""
    device = next(net.parameters()).device
    net.eval()
    rows = [(net(patches.to(device)).cpu(), labels) for patches, labels in data.test_dataloader()]
    return torch.cat([logits for logits, _ in rows]), torch.cat([labels for _, labels in rows])


def miss_rates(net: nn.Module, setting: Setting) -> Run:
    """Log-average miss rate of the proposals as a network scores them, in each kind of image."""
    proposals = read_results(setting.proposals)
    rates = {}
    for place in setting.images.sources:
        images = setting.images.of(place, "test")
        found = [rescore(net, image.read(), proposals[image.name], side=setting.side) for image in images]
        rates[place] = evaluate(scenes_of([image.annotations for image in images], found), COUNTED).log_average
    return rates


def run_seed(
    setting: Setting, seed: int, teacher_size: str, students: Sequence[str], arms: Sequence[str], done: Finished
) -> None:
    """A teacher, and every student by every arm, as far as they are not there yet."""
    data = setting.patches()

    def finish(net: nn.Module, student: str, inputs: str, arm: str, seconds: float, judge: Tensor | None) -> Tensor:
        logits, labels = logits_of(net, data)
        right = logits.argmax(1) == labels
        run: Run = {
            "seed": seed, "student": student, "inputs": inputs, "arm": arm, "parameters": count_parameters(net),
            **miss_rates(net, setting), "error": float((~right).float().mean()), "seconds": seconds,
        }  # fmt: skip
        if judge is not None:
            run["agreement"] = [int((one & other).sum()) for one in (judge, ~judge) for other in (right, ~right)]
        torch.save({"state_dict": net.state_dict(), "logits": logits, "right": right}, setting.file(seed, student, inputs, arm))
        done.add([run])
        print(f"seed {seed}, {student}, {inputs}, {arm}: {json.dumps({place: run.get(place) for place in PLACES})}", flush=True)
        return right

    def build(size: str, inputs: str, dropout: float = 0.0) -> nn.Module:
        pl.seed_everything(seed, verbose=False)
        return pedestrian_resnet(size, inputs, dropout, setting.side)  # type: ignore[arg-type]

    teacher = build(teacher_size, "rgb", dropout=0.5)
    if not done.holds(seed=seed, arm="teacher"):
        start = time.perf_counter()
        learn(setting, teacher, seed, ARMS["direct"], None, data)
        finish(teacher, teacher_size, "rgb", "teacher", time.perf_counter() - start, None)
    kept = torch.load(setting.file(seed, teacher_size, "rgb", "teacher"), weights_only=True)
    teacher.load_state_dict(kept["state_dict"])
    for student in students:
        for inputs in ("rgb", "acf") if student == "small" else ("rgb",):
            for arm in arms:
                if not done.holds(seed=seed, student=student, inputs=inputs, arm=arm):
                    net, start = build(student, inputs), time.perf_counter()
                    learn(setting, net, seed, ARMS[arm], teacher, data)
                    finish(net, student, inputs, arm, time.perf_counter() - start, kept["right"])


def resources(size: str, side: int, batch: int, cuda: bool) -> tuple[float, float]:
    """Median milliseconds of a forward, and the most memory in MiB that it takes beside the images; ``"identity"`` does nothing.

    On the CPU, it is the growth of a process of its own, which Linux tells.
    """
    device = torch.device("cuda" if cuda else "cpu")
    images = torch.rand(batch, 3, side, side, device=device)
    before = torch.cuda.memory_allocated() / 2**20 if cuda else resident("VmRSS")
    if not cuda:
        Path("/proc/self/clear_refs").write_text("5")  # forget the most so far
    net = nn.Identity() if size == "identity" else pedestrian_resnet(size)  # type: ignore[arg-type]
    net, seconds = net.to(device).eval(), []
    with torch.no_grad():
        for _ in range(6):
            start = time.perf_counter()
            net(images)
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    most = torch.cuda.max_memory_allocated() / 2**20 if cuda else resident("VmHWM")
    return 1000 * statistics.median(seconds[1:]), most - before


def resident(what: str) -> float:
    """Memory of this process in MiB: ``"VmRSS"`` now, ``"VmHWM"`` the most."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) / 2**10


def measure(sizes: Sequence[str], side: int, batch: int, cuda: bool, done: Finished) -> None:
    """Time and memory of each network, each in a process of its own."""
    for size in ("identity", *sizes):
        if not done.holds(resources=size, side=side, cuda=cuda):
            call = f"resources({size!r}, {side}, {batch}, {cuda})"
            code = f"import json; from benchmarks.experiments.pedestrian_students import resources; print(json.dumps({call}))"
            shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
            milliseconds, memory = json.loads(shown.splitlines()[-1])
            done.add([{"resources": size, "side": side, "batch": batch, "cuda": cuda, "ms": milliseconds, "MiB": memory}])


def tables(done: Finished) -> str:
    """Miss rates, what P1 finds against what is found here, agreement with the teacher, and resources, as markdown."""
    runs = [run for run in done.runs if "arm" in run]
    places = [place for place in PLACES if any(place in run for run in runs)]
    lines = ["| network | inputs | parameters | arm | " + " | ".join(f"{place}, mean (sd)" for place in places) + " | runs |"]
    lines.append("|---|---|---:|---|" + "---|" * len(places) + "---:|")
    for (student, inputs, arm), some in grouped(runs, lambda run: (run["student"], run["inputs"], run["arm"])).items():
        rates = " | ".join(mean_and_spread(some, of=place) for place in places)
        lines.append(f"| {student} | {inputs} | {some[0]['parameters']:,} | {arm} | {rates} | {len(some)} |")
    lines += ["", "| P1 finds | student | " + " | ".join(f"{place}: difference, 95 %" for place in places) + " |"]
    lines.append("|---|---|" + "---|" * len(places))
    claims = [(better, "rgb", worse, "rgb", size) for better, worse, sizes in CLAIMS for size in sizes]
    claims += [(arm, "rgb", arm, "acf", "small") for arm in ("direct", "hint + confidence")]
    for better, ours, worse, theirs, size in claims:
        cells = [compared(runs, place, (size, ours, better), (size, theirs, worse)) for place in places]
        if all(cells):
            lines.append(f"| {better} ({ours}) below {worse} ({theirs}) | {size} | " + " | ".join(cells) + " |")
    lines += ["", "| network | arm | both right | teacher alone | student alone | neither |", "|---|---|---:|---:|---:|---:|"]
    judged = [run for run in runs if "agreement" in run]
    for (student, inputs, arm), some in grouped(judged, lambda run: (run["student"], run["inputs"], run["arm"])).items():
        counts = np.sum([run["agreement"] for run in some], axis=0)
        cells = [f"{count / counts.sum():.2%}" for count in counts]
        lines.append(f"| {student} ({inputs}) | {arm} | " + " | ".join(cells) + " |")
    lines += ["", "| network | a batch of | forward, ms | memory, MiB |", "|---|---|---:|---:|"]
    for run in done.runs:
        if "resources" in run:
            shape = f"{run['batch']} × {run['side']} × {run['side']}, {'CUDA' if run['cuda'] else 'CPU'}"
            lines.append(f"| {run['resources']} | {shape} | {run['ms']:.1f} | {run['MiB']:.0f} |")
    return "\n".join(lines)


def compared(runs: Sequence[Run], place: str, better: tuple[str, str, str], worse: tuple[str, str, str]) -> str:
    """The mean difference of two arms over the seeds that have both, with its interval, and what it says; else nothing."""
    rates = [
        {run["seed"]: run[place] for run in runs if (run["student"], run["inputs"], run["arm"]) == key and place in run}
        for key in (better, worse)
    ]
    differences = [100 * (rates[0][seed] - rates[1][seed]) for seed in sorted(rates[0].keys() & rates[1].keys())]
    if not differences:
        return ""
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return f"{mean:+.1f}"
    reach = scipy.stats.t.ppf(0.975, len(differences) - 1) * statistics.stdev(differences) / sqrt(len(differences))
    verdict = "confirmed" if mean + reach < 0 else "refuted" if mean - reach > 0 else "open"
    return f"{mean:+.1f} ± {reach:.1f}: {verdict}"


def draw(setting: Setting, seed: int, runs: Sequence[Run], out: Path) -> None:
    """Histograms of both logits over the test patches, and the filters of the first layers that see colours."""
    keys = [(run["student"], run["inputs"], run["arm"]) for run in runs if run.get("seed") == seed]
    chosen = [key for key in keys if key[2] in ("teacher", "KD", "hint + confidence") and key[1] == "rgb"]
    figure = Figure(figsize=(3 * len(chosen), 3), layout="constrained")
    for panel, key in zip(figure.subplots(1, len(chosen), squeeze=False)[0], chosen, strict=True):
        logits = torch.load(setting.file(seed, *key), weights_only=True)["logits"].numpy()
        panel.hist2d(logits[:, 0], logits[:, 1], bins=40, cmap="magma_r", cmin=1)
        panel.set(title=f"{key[0]}, {key[2]}", xlabel="logit of no pedestrian", ylabel="logit of a pedestrian")
    figure.savefig(out.with_name(f"{out.name}_logits.png"), dpi=100)
    figure = Figure(figsize=(3 * len(chosen), 3), layout="constrained")
    for panel, key in zip(figure.subplots(1, len(chosen), squeeze=False)[0], chosen, strict=True):
        weights = torch.load(setting.file(seed, *key), weights_only=True)["state_dict"]["conv1.weight"][:64]
        scaled = (weights - weights.amin((1, 2, 3), keepdim=True)) / (weights.amax((1, 2, 3)) - weights.amin((1, 2, 3)))[
            :, None, None, None
        ]
        tiles = torch.nn.functional.pad(scaled, (0, 1, 0, 1), value=1.0).unflatten(0, (-1, 8))  # rows of eight
        panel.imshow(tiles.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).numpy())
        panel.set_title(f"{key[0]}, {key[2]}")
        panel.axis("off")
    figure.savefig(out.with_name(f"{out.name}_filters.png"), dpi=100)


def main() -> None:
    """Run what is asked for and not yet done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with coco128; $LIT_COMPRESS_DATA or ./data by default")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    cuda = torch.cuda.is_available()
    parser.add_argument("--teacher", choices=["18", "200"], default="200" if cuda else "18")
    parser.add_argument("--students", nargs="+", choices=["18", "thin", "small"], default=["small", "thin", "18"])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--side", type=int, default=64, help="of a patch in pixels; P1 has 224")
    parser.add_argument("--epochs", type=int, default=7, help="of every training; P1 has 70")
    parser.add_argument("--batches", type=int, default=150, help="of 16 patches in an epoch; P1 has 1000")
    parser.add_argument("--passes", type=int, default=200, help="of the teacher with dropout")
    parser.add_argument("--streets", type=int, default=400, help="drawn streets to train on")
    parser.add_argument("--proposer_epochs", type=int, default=12, help="of the region proposal network")
    parser.add_argument("--resources", nargs="*", default=["200", "18", "thin", "small"], help="networks to time; Linux or CUDA")
    parser.add_argument("--resources_side", type=int, default=224)
    parser.add_argument("--work", type=Path, default=Path("lit_compress_runs/pedestrian_students"))
    parser.add_argument("--out", type=Path, default=Path("pedestrian_students"))
    options = parser.parse_args()
    quiet()
    finished = Finished(options.out.with_suffix(".json"))
    options.work.mkdir(parents=True, exist_ok=True)
    images, proposals = images_of(options.data, options.streets), options.work / "proposals.json"
    if not proposals.exists():
        propose(images, options.proposer_epochs, proposals)
    setting = Setting(
        images, proposals, options.work, options.side, options.epochs, options.batches, options.passes, "cuda" if cuda else "cpu"
    )
    for seed in options.seeds:
        run_seed(setting, seed, options.teacher, options.students, options.arms, finished)
    measure(options.resources, options.resources_side, 16, cuda, finished)
    draw(setting, options.seeds[0], finished.runs, options.out)
    print(tables(finished))


def _itself(image: Tensor) -> Tensor:
    return image


if __name__ == "__main__":
    main()
