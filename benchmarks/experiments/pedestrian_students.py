"""Small students of a large teacher say pedestrian or not: P1's comparison, on drawn streets and on photographs of COCO.

    python -m benchmarks.experiments.pedestrian_students --data DIR --seeds 0 1 2 --out docs/images/pedestrian_students

A region proposal network is trained once and proposes boxes for all images, and a teacher is trained once on patches of them.
Each seed trains every student from it by every arm, on smaller patches than P1's and for a shorter time, from scratch. A network
scores the boxes proposed in test images, and Caltech's protocol scores the network. Photographs are those of COCO128, shrunk to
the size of the streets. Writes OUT.json after every run (and goes on from it), keeps networks, and what the teacher says, in
--work, and prints tables; draws the logits and the first layers of the first seed.
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
from itertools import product
from math import inf, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import scipy.stats
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torchvision.ops import box_convert, box_iou
from typing_extensions import override

from benchmarks.experiments.roi_autoencoder import SIZE, Photographs
from benchmarks.experiments.training import Finished, Run, fit, grouped, mean_and_spread, quiet
from benchmarks.page import commit
from lit_compress import count_parameters
from lit_compress.datamodules import (
    PedestrianDataModule,
    PedestrianPatchDataModule,
    SyntheticPedestrianDataModule,
    TeacherCacheDataModule,
)
from lit_compress.datamodules.pedestrian_images import SPLITS, PedestrianImage, Split
from lit_compress.detection import DetectionLimits, RegionProposalNetwork, pedestrian_resnet
from lit_compress.losses import CrossEntropy, Hint, KnowledgeDistillation, TeacherConfidence, Term
from lit_compress.models import VGGEncoder
from lit_compress.modules import LitClassifier, LitDistiller, LitPedestrianDetector
from lit_compress.pedestrians import Detections, Subset, evaluate, read_results, rescore, scenes_of, write_results

HINT, LOGITS = "fc.hint", ""
DRAWN = (16.0, 64.0)  # pixels: heights of persons in streets
LEAST = 20.0  # pixels: who is less tall is an ignore region
COUNTED = Subset(heights=(LEAST, inf), bounds=None)
TEACHER_SEED = 0
RATE = 0.05  # the highest of a cycle; P1's 0.01 is for networks that know ImageNet, and learns less from scratch in this time
CLIP = 1.0  # norm of gradients, in every arm: the losses with the teacher's covariance diverge without it
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

# The small student also learns from ACF, by the arms for which P1 has it.
ACF_ARMS = ("direct", "hint + confidence")

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

    def __init__(self, sources: Mapping[str, PedestrianDataModule], batch_size: int = 8) -> None:
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
    drawn = SyntheticPedestrianDataModule(SIZE, DRAWN, train_size=streets, val_size=4, test_size=max(streets // 2, 4))
    sources: dict[str, PedestrianDataModule] = {"streets": drawn}
    photographs = Photographs(folder, batch_size=1)
    if photographs.source.root.exists():
        sources["photographs"] = photographs
    return Images(sources)


def propose(images: Images, epochs: int, boxes: int, file: Path) -> None:
    """Train a region proposal network, and write the boxes that it scores highest in all images."""
    pl.seed_everything(0, verbose=False)
    net = RegionProposalNetwork(
        VGGEncoder(width=0.25, macro_layers=4), hidden=64, scales=tuple(0.8 * 1.3**step for step in range(7)), image_size=None,
        min_height=DRAWN[0], limits=DetectionLimits(min_width=4.0, min_height=12.0, after=boxes),
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
                sizes = corners[:, 2:] - corners[:, :2]
                rows = np.concatenate([corners[:, :2], sizes], axis=1)
                found[image.name] = Detections(rows, one["scores"].double().numpy())
    write_results(file, found)


@dataclass(frozen=True)
class Setting:
    """How much is trained on, and on what."""

    images: Images
    proposals: Path
    work: Path
    side: int
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


def learn(
    setting: Setting, net: nn.Module, seed: int, epochs: int, arm: str = "direct", teacher: nn.Module | None = None
) -> None:
    """Train a network with P1's optimizer, in one cycle of its rate. What the teacher says of all patches is kept for others."""
    options: dict[str, Any] = {
        "optimizer": lambda parameters: torch.optim.SGD(
            parameters, RATE, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True
        ),
        "scheduler": lambda optimizer: OneCycleLR(optimizer, RATE, total_steps=epochs * setting.batches),
        "scheduler_interval": "step",
    }
    data: pl.LightningDataModule = setting.patches()
    module: pl.LightningModule
    terms, copied = ARMS[arm].terms, ["fc.fc"] if ARMS[arm].copied else []
    if terms is None or teacher is None:
        module = LitClassifier(net, num_classes=2, **options)
    else:
        module = LitDistiller(teacher, net, terms(setting.passes), copy_from_teacher=copied, **options)
        data = TeacherCacheDataModule(data, setting.work / f"teacher_{arm.replace(' ', '')}", variants=2)
    pl.seed_everything(seed, verbose=False)
    fit(module, data, epochs, accelerator=setting.accelerator, clip=CLIP)


@torch.no_grad()
def logits_of(net: nn.Module, data: PedestrianPatchDataModule) -> tuple[Tensor, Tensor]:
    """What a network says of the test patches ``(N, 2)``, and what they are ``(N,)``."""
    device = next(net.parameters()).device
    net.eval()
    rows = [(net(patches.to(device)).cpu(), labels) for patches, labels in data.test_dataloader()]
    return torch.cat([logits for logits, _ in rows]), torch.cat([labels for _, labels in rows])


Scorer = Callable[[PedestrianImage, Detections], Detections]


def miss_rates(scorer: Scorer, setting: Setting) -> Run:
    """Log-average miss rate of the proposals by other scores, in each kind of image."""
    proposals = read_results(setting.proposals)
    rates = {}
    for place in setting.images.sources:
        images = setting.images.of(place, "test")
        found = [scorer(image, proposals[image.name]) for image in images]
        rates[place] = evaluate(scenes_of([image.annotations for image in images], found), COUNTED).log_average
    return rates


def as_proposed(image: PedestrianImage, proposals: Detections) -> Detections:
    """By the scores of the region proposal network."""
    return proposals


def oracle(image: PedestrianImage, proposals: Detections) -> Detections:
    """By how much they overlap a person: what the boxes allow."""
    corners = [
        box_convert(torch.from_numpy(boxes), "xywh", "xyxy")
        for boxes in (proposals.boxes, image.annotations.boxes[~image.annotations.ignore])
    ]
    overlaps = torch.cat([box_iou(*corners), torch.zeros(len(corners[0]), 1)], dim=1)  # there may be nobody
    return Detections(proposals.boxes, overlaps.amax(1).double().numpy())


class Comparison:
    """A teacher, and students of it.

    Args:
        setting: What is trained on.
        teacher: Size of the teacher.
        epochs: Of a student's training.
        done: The runs so far.
    """

    def __init__(self, setting: Setting, teacher: str, epochs: int, done: Finished) -> None:
        self.setting, self.size, self.epochs, self.done = setting, teacher, epochs, done
        self.data, self.commit = setting.patches(), commit()
        self.teacher = self.build(TEACHER_SEED, teacher, "rgb", dropout=0.5)

    def build(self, seed: int, size: str, inputs: str, dropout: float = 0.0) -> nn.Module:
        """A network that has learnt nothing."""
        pl.seed_everything(seed, verbose=False)
        return pedestrian_resnet(size, inputs, dropout, self.setting.side)  # type: ignore[arg-type]

    def teach(self, epochs: int) -> None:
        """Train the teacher, if it is not there yet."""
        file = self.setting.file(TEACHER_SEED, self.size, "rgb", "teacher")
        if not self.done.holds(arm="teacher"):
            start = time.process_time()
            learn(self.setting, self.teacher, TEACHER_SEED, epochs)
            self.finish(self.teacher, TEACHER_SEED, self.size, "rgb", "teacher", start)
        kept = torch.load(file, weights_only=True)
        self.teacher.load_state_dict(kept["state_dict"])
        self.judge: Tensor = kept["right"]

    def run(self, seed: int, student: str, inputs: str, arm: str) -> None:
        """Train a student, if it is not there yet."""
        if not self.done.holds(seed=seed, student=student, inputs=inputs, arm=arm):
            net, start = self.build(seed, student, inputs), time.process_time()
            learn(self.setting, net, seed, self.epochs, arm, self.teacher)
            self.finish(net, seed, student, inputs, arm, start)

    def finish(self, net: nn.Module, seed: int, student: str, inputs: str, arm: str, start: float) -> None:
        """Score a network, and keep it."""
        seconds = time.process_time() - start
        logits, labels = logits_of(net, self.data)
        right = logits.argmax(1) == labels

        def scorer(image: PedestrianImage, proposals: Detections) -> Detections:
            return rescore(net, image.read(), proposals, side=self.setting.side)

        run: Run = {
            "seed": seed, "student": student, "inputs": inputs, "arm": arm, "parameters": count_parameters(net),
            **miss_rates(scorer, self.setting), "error": float((~right).float().mean()), "cpu_seconds": round(seconds),
            "commit": self.commit,
        }  # fmt: skip
        if arm != "teacher":
            run["agreement"] = [int((one & other).sum()) for one in (self.judge, ~self.judge) for other in (right, ~right)]
        kept = {"state_dict": net.state_dict(), "logits": logits, "right": right}
        torch.save(kept, self.setting.file(seed, student, inputs, arm))
        self.done.add([run])
        print(f"seed {seed}, {student}, {inputs}, {arm}: {json.dumps({place: run.get(place) for place in PLACES})}", flush=True)


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
    for size in ("identity", *sizes) if sizes else ():
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
    for run in done.runs:
        if "proposals" in run:
            rates = " | ".join(f"{run[place]:.2%}".replace("%", " %") for place in places)
            lines.append(f"| proposals, {run['proposals']} | | | | {rates} | |")
    lines += ["", "| P1 finds | student | " + " | ".join(f"{place}: difference, 95 %" for place in places) + " |"]
    lines.append("|---|---|" + "---|" * len(places))
    claims = [(better, "rgb", worse, "rgb", size) for better, worse, sizes in CLAIMS for size in sizes]
    claims += [(arm, "rgb", arm, "acf", "small") for arm in ACF_ARMS]
    claims.append(("hint + confidence", "acf", "direct", "acf", "small"))
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
    shown = ("teacher", "direct", "KD", "hint + confidence")
    chosen = [key for key in keys if key[2] in shown and key[0] in (keys[0][0], "small") and key[1] == "rgb"]
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
    parser.add_argument("--side", type=int, default=32, help="of a patch in pixels; P1 has 224")
    parser.add_argument("--batches", type=int, default=500, help="of 16 patches in an epoch; P1 has 1000")
    parser.add_argument("--epochs", type=int, default=3, help="of a student's training; P1 has 70")
    parser.add_argument("--teacher_epochs", type=int, default=6)
    parser.add_argument("--passes", type=int, default=200, help="of the teacher with dropout")
    parser.add_argument("--streets", type=int, default=1000, help="drawn streets to train on")
    parser.add_argument("--proposer_epochs", type=int, default=6, help="of the region proposal network")
    parser.add_argument("--boxes", type=int, default=10, help="proposed in an image")
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
        propose(images, options.proposer_epochs, options.boxes, proposals)
    accelerator = "cuda" if cuda else "cpu"
    setting = Setting(images, proposals, options.work, options.side, options.batches, options.passes, accelerator)
    for name, scorer in (("as they are", as_proposed), ("by an oracle", oracle)):
        if not finished.holds(proposals=name):
            finished.add([{"proposals": name, **miss_rates(scorer, setting)}])
    comparison = Comparison(setting, options.teacher, options.epochs, finished)
    comparison.teach(options.teacher_epochs)
    for student, seed, arm in product(options.students, options.seeds, options.arms):
        for inputs in ("rgb", "acf") if student == "small" and arm in ACF_ARMS else ("rgb",):
            comparison.run(seed, student, inputs, arm)
    measure(options.resources, options.resources_side, 16, cuda, finished)
    draw(setting, options.seeds[0], finished.runs, options.out)
    print(tables(finished))


def _itself(image: Tensor) -> Tensor:
    return image


if __name__ == "__main__":
    main()
