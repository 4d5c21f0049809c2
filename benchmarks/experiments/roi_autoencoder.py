"""Table 3.1 on streets and photographs: does the Region of Interest Autoencoder detect persons better, and what of it matters?

    python -m benchmarks.experiments.roi_autoencoder --seeds 0 1 2 --out docs/images/roi_autoencoder
    python -m benchmarks.experiments.roi_autoencoder --arms baseline ROIAE --images 60 1000 --shares 0.03 0.3 --out ...
    python -m benchmarks.experiments.roi_autoencoder --photographs DIR --arms baseline ROIAE --out ...
    python -m benchmarks.experiments.roi_autoencoder --images 60 --pretrained 1000 --left_out 2 --arms baseline ROIAE --out ...

A Faster R-CNN on a small VGG, trained from scratch: as it is, without batch norms, and with autoencoders that count the whole
map (SWWAE) or what lies in boxes (ROIAE), on the same images for the same number of steps. Weights of the terms are found by
their gradients. A pretrained detector has learnt from other streets before, and its first two macro-layers are then frozen.
Photographs are those of COCO128, shrunk to the size of the streets. Prints the log-average miss rate on training and on held-
out images, with 95 % intervals over seeds. Writes OUT.json after every run and goes on from it.
"""

import argparse
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from math import ceil, sqrt
from pathlib import Path

import pytorch_lightning as pl
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign
from typing_extensions import override

from benchmarks.experiments.training import Finished, Run, fit, grouped, quiet
from benchmarks.page import commit
from benchmarks.roi_autoencoder import Detector
from lit_compress.callbacks import RoIAutoencoder
from lit_compress.datamodules import CocoPedestrianDataModule, PedestrianDataModule, SyntheticPedestrianDataModule
from lit_compress.datamodules.pedestrian_images import PedestrianImage, PedestrianImages, Split, together
from lit_compress.metrics import LogAverageMissRate
from lit_compress.pedestrians import SUBSETS
from lit_compress.pedestrians.subsets import ASPECT_RATIO

SIZE = (96, 128)
HEIGHTS = (20.0, 66.0)
WIDTHS = (16, 32, 64, 64)  # of the macro-layers, as VGG's first four at a quarter
ARMS: dict[str, tuple[bool, bool | None]] = {  # batch norms, and the mask of the autoencoder if there is one
    "baseline": (True, None),
    "without BatchNorm": (False, None),
    "SWWAE": (True, False),
    "ROIAE": (True, True),
}


def backbone(norms: bool) -> nn.Sequential:
    """Macro-layers of two convolutions, with a batch norm and a pooling after each but the last, which is not pooled."""
    layers: list[nn.Module] = []
    for number, (before, after) in enumerate(zip((3, *WIDTHS), WIDTHS, strict=False)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(after, after, 3, padding=1)]
        layers += [nn.BatchNorm2d(after)] if norms else []
        layers += [nn.ReLU(inplace=True)] + ([nn.MaxPool2d(2)] if number < len(WIDTHS) - 1 else [])
    return nn.Sequential(*layers)


def detector(norms: bool) -> FasterRCNN:
    """For persons, one aspect ratio and heights a factor of 1.3 apart, as Zhang et al. have it."""
    body = backbone(norms)
    body.out_channels = WIDTHS[-1]
    heights = [HEIGHTS[0] * 1.3**step for step in range(5)]
    return FasterRCNN(
        body,
        min_size=SIZE[0],
        max_size=SIZE[1],
        rpn_anchor_generator=AnchorGenerator((tuple(height * sqrt(ASPECT_RATIO) for height in heights),), ((1 / ASPECT_RATIO,),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], output_size=5, sampling_ratio=2),
        box_head=nn.Sequential(nn.Flatten(), nn.Linear(25 * WIDTHS[-1], 128), nn.ReLU()),
        box_predictor=Predictor(128),
        rpn_pre_nms_top_n_train=400, rpn_post_nms_top_n_train=100, rpn_pre_nms_top_n_test=300, rpn_post_nms_top_n_test=60,
        box_batch_size_per_image=64, box_detections_per_img=40, box_score_thresh=0.01,
    )  # fmt: skip


class Predictor(nn.Module):
    """Person or not, and where."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.score, self.box = nn.Linear(features, 2), nn.Linear(features, 8)

    @override
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.score(x), self.box(x)


class Trained(Detector):
    """With the optimizer of the document, its rate scaled to training from scratch."""

    def __init__(self, net: nn.Module, steps: int) -> None:
        super().__init__(net)
        self.steps = steps

    @override
    def configure_optimizers(self) -> object:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)
        # A tenth after three quarters, as 60,000 of 80,000 iterations; a few steps to begin with, since no layer knows anything.
        warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=min(100, self.steps // 4))
        falls = torch.optim.lr_scheduler.MultiStepLR(optimizer, [round(0.75 * self.steps)])
        chained = torch.optim.lr_scheduler.ChainedScheduler([warm, falls], optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": chained, "interval": "step"}}


class Photographs(PedestrianDataModule):
    """Persons of COCO128's photographs, shrunk to fit into a street and kept in memory; 40 of the 128 are held out."""

    def __init__(self, folder: Path | None, batch_size: int) -> None:
        super().__init__(batch_size=batch_size)
        self.source = CocoPedestrianDataModule(
            folder, "coco128", "val2017", "annotations/instances_val2017.json", val_annotations=None, val_size=40
        )

    @override
    def find_images(self, split: Split) -> Sequence[PedestrianImage]:
        return [shrunk(image) for image in self.source.images(split)]


def shrunk(image: PedestrianImage) -> PedestrianImage:
    """An image whose sides are at most those of a street, and its boxes."""
    scale = min(SIZE[0] / min(image.size), SIZE[1] / max(image.size))
    size = (round(scale * image.size[0]), round(scale * image.size[1]))
    pixels = F.interpolate(image.read()[None].float(), size, mode="bilinear", antialias=True)[0].round().byte()
    boxes, visible = scale * image.annotations.boxes, scale * image.annotations.visible
    return image._replace(
        size=size, read=partial(_itself, pixels), annotations=replace(image.annotations, boxes=boxes, visible=visible)
    )


def _itself(image: torch.Tensor) -> torch.Tensor:
    return image


def adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Trains decoders whatever the weight of their loss is, which a gradient descent by the detector's rate does not."""
    return torch.optim.Adam(parameters, lr=1e-3)


def run(
    data: PedestrianDataModule,
    arm: str,
    share: float,
    decoders: str,
    seed: int,
    steps: int,
    folder: Path,
    left_out: int,
    before: Mapping[str, torch.Tensor] | None,
) -> Run:
    """Train one arm and score it; so many of the first macro-layers are not reconstructed. ``before``: pretrained weights."""
    norms, mask = ARMS[arm]
    pl.seed_everything(seed, verbose=False)
    module = Trained(detector(norms), steps)
    if before is not None:
        module.net.load_state_dict(before)
        freeze(module.net.backbone)
    callbacks: list[pl.Callback] = []
    if mask is not None:
        layers, optimizer = macro_layers(module.net.backbone)[left_out:], adam if decoders == "adam" else None
        callbacks.append(RoIAutoencoder(layers, balance=share, mask=mask, optimizer=optimizer, draw_every_n_epochs=None))
    began = time.process_time()
    fit(module, data, ceil(steps / len(data.train_dataloader())), callbacks, folder)
    minutes = (time.process_time() - began) / 60
    splits: tuple[Split, ...] = ("train", "test")
    return {**{split: miss_rate(module.net, data, split) for split in splits}, "cpu_minutes": round(minutes, 2)}


def pretrained(streets: int, norms: bool, seed: int, steps: int, folder: Path) -> dict[str, torch.Tensor]:
    """Weights of a detector that has learnt from other streets."""
    pl.seed_everything(seed, verbose=False)
    module = Trained(detector(norms), steps)
    data = SyntheticPedestrianDataModule(size=SIZE, heights=HEIGHTS, train_size=streets, batch_size=2, seed=1 + seed)
    fit(module, data, ceil(steps / len(data.train_dataloader())), (), folder)
    return module.net.state_dict()


def freeze(body: nn.Sequential) -> None:
    """Leave the first two macro-layers as they are, their batch norms as well."""
    second = [number for number, layer in enumerate(body) if isinstance(layer, nn.MaxPool2d)][1]
    for layer in body[:second]:
        layer.requires_grad_(False)
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.0  # of the running statistics, which then stay


def macro_layers(body: nn.Sequential) -> list[str]:
    """Names of the ends of all macro-layers: what the first gives is reconstructed, as the document leaves the first two out."""
    pools = [name for name, layer in body.named_children() if isinstance(layer, nn.MaxPool2d)]
    return [f"net.backbone.{name}" for name in [*pools, str(len(body) - 1)]]


@torch.no_grad()
def miss_rate(net: nn.Module, data: PedestrianDataModule, split: Split) -> float:
    """Log-average miss rate on the images of a split, none mirrored."""
    metric = LogAverageMissRate(replace(SUBSETS["reasonable"], heights=(HEIGHTS[0] * 1.2, float("inf")), bounds=None), floor=1e-3)
    net.eval()
    for images, targets in DataLoader(PedestrianImages(data.images(split)), batch_size=8, collate_fn=together):
        metric.update(net(images), targets)
    return float(metric.compute())


def interval(fractions: Sequence[float], sign: str = "") -> str:
    """Mean and its 95 % interval (Student's t), in percent; of fewer than three, themselves."""
    values = [100 * fraction for fraction in fractions]
    if len(values) < 3:
        return ", ".join(f"{value:{sign}.1f}" for value in values)
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / sqrt(len(values))
    return f"{statistics.mean(values):{sign}.1f} ± {half:.1f}"


def table(done: Sequence[Run]) -> str:
    """Miss rates in percent with intervals over seeds, and points above the baseline of the same seed, as markdown."""
    lines = [
        "| images | pretrained on | arm | share | decoders by | layers from | training, % | held out, % "
        "| above the baseline, points | CPU minutes | seeds |",
        "|---|---|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    baseline = {(one["images"], one["pretrained"], one["seed"]): one["test"] for one in done if one["arm"] == "baseline"}
    names = ("images", "pretrained", "arm", "share", "decoders", "left_out")
    for key, runs in grouped(done, lambda one: tuple(str(one[name]) for name in names)).items():
        images, before, arm, share, decoders, left_out = key
        beside = [
            one["test"] - baseline[same] for one in runs if (same := (one["images"], one["pretrained"], one["seed"])) in baseline
        ]
        plain = ARMS[arm][1] is None
        cells = [
            images,
            "" if before == "0" else f"{before} streets",
            arm,
            "" if plain else share,
            decoders,
            "" if plain else str(int(left_out) + 1),
        ]
        cells += [interval([one[split] for one in runs]) for split in ("train", "test")]
        cells.append(interval(beside, "+") if beside and arm != "baseline" else "")
        cells += [f"{statistics.mean(one['cpu_minutes'] for one in runs):.1f}", str(len(runs))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is asked for and not yet done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--images", type=int, nargs="+", default=[250], help="streets to train on")
    parser.add_argument("--photographs", type=Path, help="folder with coco128, to train on in place of streets")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1], help="of the gradient, for each term")
    parser.add_argument("--pretrained", type=int, default=0, help="other streets that the detector has learnt from before")
    parser.add_argument("--left_out", type=int, default=0, help="macro-layers that autoencoders leave out, from the first")
    parser.add_argument("--decoders", choices=["sgd", "adam"], default="adam", help="trained as the detector is, or by Adam")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=900, help="of two images, up to the end of an epoch")
    parser.add_argument("--test_images", type=int, default=500, help="streets")
    parser.add_argument("--out", type=Path, default=Path("roi_autoencoder"))
    options = parser.parse_args()
    quiet()
    finished, code = Finished(options.out.with_suffix(".json")), commit()  # what runs is what was checked out at the start
    sets: dict[str, PedestrianDataModule] = {
        f"{images} streets": SyntheticPedestrianDataModule(
            size=SIZE, heights=HEIGHTS, train_size=images, val_size=1, test_size=options.test_images, batch_size=2
        )
        for images in options.images
    }
    if options.photographs is not None:
        sets = {"photographs": Photographs(options.photographs, batch_size=2)}
    for (images, data), seed, arm in product(sets.items(), options.seeds, options.arms):
        plain = ARMS[arm][1] is None
        for share in [0.0] if plain else options.shares:
            decoders = "" if plain else options.decoders
            left_out = 0 if plain else options.left_out
            key = {
                "images": images, "seed": seed, "arm": arm, "share": share, "decoders": decoders, "left_out": left_out,
                "pretrained": options.pretrained, "steps": options.steps,
            }  # fmt: skip
            if finished.holds(**key):
                continue
            norms, steps, folder = ARMS[arm][0], options.steps, options.out.parent
            before = pretrained(options.pretrained, norms, seed, steps, folder) if options.pretrained else None
            done = run(data, arm, share, decoders, seed, steps, folder, left_out, before)
            finished.add([{**key, **done, "commit": code}])
            print(f"done: {key}: {done['train']:.1%} training, {done['test']:.1%} held out", flush=True)
    print(table(finished.runs))


if __name__ == "__main__":
    main()
