"""Pedestrian or not: patches cut from images with pedestrians."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from typing_extensions import override

from lit_compress.datamodules.pedestrian_images import SPLITS, PedestrianDataModule, PedestrianImage, Split
from lit_compress.datamodules.synthetic_pedestrians import SyntheticPedestrianDataModule
from lit_compress.pedestrians.annotations import Annotations, Detections
from lit_compress.pedestrians.patches import warp
from lit_compress.pedestrians.protocol import PERSON, Flags, Floats
from lit_compress.pedestrians.results import read_results
from lit_compress.pedestrians.subsets import ASPECT_RATIO

_NEGATIVES = 3  # to one positive
_JITTER = 0.12  # of a box's height: about three in four such boxes overlap it by more than half


class Patch(NamedTuple):
    """A part of an image."""

    image: int
    """Number of the image in its split."""
    box: tuple[float, float, float, float]
    """Left, top, width and height in pixels; it may reach beyond the image, whose edge is then repeated."""
    label: int
    """1 for a pedestrian, 0 for none."""


class PedestrianPatchDataModule(LightningDataModule):
    """Patches with and without a pedestrian, one to three, warped to one size: what P1's students learn from.

    Batch: ``(patches (N, 3, side, side) float32 in [0, 1], labels (N,) int64)``, 1 for a pedestrian. Means and variances are left
    to the network, since RGB and ACF want different ones of the same patch.

    A pedestrian is an annotated box, or one that overlaps it by more than half (intersection over union). All other boxes are
    negatives, but for those more than half of which lies in an ignore region. Boxes are those of a detector, or else drawn:
    around each pedestrian, and anywhere.

    Args:
        source: Where the images come from; ``None`` takes ``SyntheticPedestrianDataModule()``.
        proposals: A detector's boxes for all splits, as :func:`~lit_compress.pedestrians.read_results` reads them; ``None`` draws
            boxes.
        min_height: Pedestrians less tall, in pixels, are ignore regions.
        min_visible: And so are those of whom a smaller share is visible.
        side: Height and width that patches are warped to.
        batch_size: Patches in a batch, a multiple of 4.
        batches: Batches in a training epoch; ``None`` takes as many as show every positive once. P1 has 1000.
        boxes_per_image: Boxes drawn anywhere in an image, and around each pedestrian a quarter as many.
        num_workers: Processes that load data; 0 loads in the main process.
        augment: Whether training patches are mirrored at random.
        seed: Of the boxes drawn.

    Raises:
        ValueError: If a number is out of range, or a split has no positives or no negatives.

    Source: *In Teacher We Trust*, sections 5.1 and 5.4.

    Example:
        >>> from lit_compress.datamodules import SyntheticPedestrianDataModule
        >>> data = PedestrianPatchDataModule(SyntheticPedestrianDataModule(train_size=4), side=64, batch_size=8)
        >>> patches, labels = next(iter(data.train_dataloader()))
        >>> patches.shape, labels.tolist()
        (torch.Size([8, 3, 64, 64]), [1, 1, 0, 0, 0, 0, 0, 0])
    """

    def __init__(
        self,
        source: PedestrianDataModule | None = None,
        proposals: str | Path | None = None,
        min_height: float = 0.0,
        min_visible: float = 0.65,
        side: int = 224,
        batch_size: int = 16,
        batches: int | None = None,
        boxes_per_image: int = 12,
        num_workers: int = 0,
        augment: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, number, least in (
            ("min_height", min_height, 0),
            ("side", side, 1),
            ("batches", batches, 1),
            ("boxes_per_image", boxes_per_image, 1),
            ("num_workers", num_workers, 0),
        ):
            if number is not None and number < least:
                raise ValueError(f"Argument `{name}` must be at least {least} but got {number}.")
        if batch_size < 1 or batch_size % (1 + _NEGATIVES):
            raise ValueError(
                f"Argument `batch_size` must be a multiple of 4, one positive to three negatives, but got {batch_size}."
            )
        if not 0 <= min_visible <= 1:
            raise ValueError(f"Argument `min_visible` must lie in [0, 1] but got {min_visible}.")
        self.source = SyntheticPedestrianDataModule() if source is None else source
        self.proposals = None if proposals is None else Path(proposals)
        self.min_height, self.min_visible, self.side = min_height, min_visible, side
        self.batch_size, self.batches, self.boxes_per_image = batch_size, batches, boxes_per_image
        self.num_workers, self.augment, self.seed = num_workers, augment, seed

    @property
    def num_classes(self) -> int:
        """Two: no pedestrian, and a pedestrian."""
        return 2

    @property
    def class_names(self) -> tuple[str, str]:
        """Name of each class."""
        return "no pedestrian", "pedestrian"

    @override
    def setup(self, stage: str) -> None:
        self.source.setup(stage)

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        patches = self.patches("train")
        return DataLoader(
            WarpedPatches(self.source.images("train"), patches, self.side, mirror=self.augment),
            batch_size=self.batch_size,
            sampler=OneToThree([patch.label for patch in patches], self.batch_size, self.batches),
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        return self._in_order("val")

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        return self._in_order("test")

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        return self._in_order("test")

    def analysis_dataloader(self) -> DataLoader[Any]:
        """The training patches in fixed order and not mirrored: what pruning statistics are taken on."""
        return self._in_order("train")

    def patches(self, split: Split) -> Sequence[Patch]:
        """All patches of a split, positives and negatives in the order of the images."""
        if split not in self._patches:
            images = self.source.images(split)
            found = [patch for index in range(len(images)) for patch in self._of_image(split, index, images[index])]
            if len({patch.label for patch in found}) < 2:
                raise ValueError(f"The {len(images)} images of `{split}` give {len(found)} patches, all of them of one kind.")
            self._patches[split] = found
        return self._patches[split]

    @cached_property
    def _patches(self) -> dict[Split, Sequence[Patch]]:
        return {}

    @cached_property
    def _proposed(self) -> Mapping[str, Detections]:
        return {} if self.proposals is None else read_results(self.proposals)

    def _of_image(self, split: Split, index: int, image: PedestrianImage) -> list[Patch]:
        persons, regions = self._split(image.annotations)
        if self.proposals is None:
            boxes = self._drawn(np.random.default_rng([self.seed, SPLITS.index(split), index]), persons, image)
        else:
            boxes = self._proposed[image.name].boxes if image.name in self._proposed else np.empty((0, 4))
        positive: Flags = np.any(_shared(boxes, persons, of_union=True) > 0.5, axis=1)
        ignored: Flags = np.any(_shared(boxes, regions, of_union=False) > 0.5, axis=1)
        kept = positive | ~ignored
        labels = [*(1 for _ in persons), *positive[kept].astype(int).tolist()]
        rows = np.concatenate([persons, boxes[kept]]).tolist()
        return [Patch(index, (x, y, w, h), label) for (x, y, w, h), label in zip(rows, labels, strict=True)]

    def _split(self, annotations: Annotations) -> tuple[Floats, Floats]:
        """Boxes of pedestrians, and ignore regions."""
        boxes, visible = annotations.boxes, annotations.visible
        share = np.where(visible.any(axis=1), visible[:, 2] * visible[:, 3] / np.maximum(boxes[:, 2] * boxes[:, 3], 1e-9), 1.0)
        persons = (annotations.labels == PERSON) & ~annotations.ignore
        counts: Flags = np.asarray(persons & (boxes[:, 3] >= self.min_height) & (share >= self.min_visible))
        return boxes[counts], boxes[~counts]

    def _drawn(self, generator: np.random.Generator, persons: Floats, image: PedestrianImage) -> Floats:
        high, wide = image.size
        low = max(self.min_height, 0.1 * high)
        heights = np.exp(generator.uniform(np.log(low), np.log(max(0.8 * high, low)), self.boxes_per_image))
        widths = heights * ASPECT_RATIO
        corners = generator.random((self.boxes_per_image, 2)) * np.maximum(np.column_stack([wide - widths, high - heights]), 0)
        anywhere = np.column_stack([corners, widths, heights])
        near = np.repeat(persons, -(-self.boxes_per_image // 4), axis=0)
        moves = generator.normal(0, _JITTER, near.shape) * near[:, 3:] * (ASPECT_RATIO, 1, ASPECT_RATIO, 1)
        near = near + moves
        return np.concatenate([near[(near[:, 2:] > 1).all(axis=1)], anywhere])

    def _in_order(self, split: Split) -> DataLoader[Any]:
        return DataLoader(
            WarpedPatches(self.source.images(split), self.patches(split), self.side),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )


class WarpedPatches(Dataset[tuple[Tensor, int]]):
    """Patches, cut out and warped when they are asked for.

    Args:
        images: The images.
        patches: Where in them.
        side: Height and width to warp to.
        mirror: Whether to mirror half of them, drawn from torch's RNG.

    Returns:
        An item is ``(patch (3, side, side) float32 in [0, 1], label)``.
    """

    def __init__(self, images: Sequence[PedestrianImage], patches: Sequence[Patch], side: int, mirror: bool = False) -> None:
        self.images, self.patches, self.side, self.mirror = images, patches, side, mirror

    def __len__(self) -> int:
        return len(self.patches)

    @override
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        patch = self.patches[index]
        warped = warp(self.images[patch.image].read(), patch.box, self.side)
        if self.mirror and torch.rand(()) < 0.5:
            warped = warped.flip(2)
        return warped, patch.label


class OneToThree(Sampler[int]):
    """Samples in an order whose every batch has three negatives to a positive.

    Each kind is shuffled and gone through again and again, from torch's RNG. A batch begins with its positives, so that processes
    that take turns within it have them all alike.

    Args:
        labels: Of all samples.
        batch_size: A multiple of 4.
        batches: How many batches; ``None`` takes as many as show every positive.
    """

    def __init__(self, labels: Sequence[int], batch_size: int, batches: int | None = None) -> None:
        self.positives = [index for index, label in enumerate(labels) if label == 1]
        self.negatives = [index for index, label in enumerate(labels) if label == 0]
        self.share = batch_size // (1 + _NEGATIVES)
        self.batches = -(-len(self.positives) // self.share) if batches is None else batches

    def __len__(self) -> int:
        return self.batches * self.share * (1 + _NEGATIVES)

    @override
    def __iter__(self) -> Iterator[int]:
        positives, negatives = _again_and_again(self.positives), _again_and_again(self.negatives)
        for _ in range(self.batches):
            yield from islice(positives, self.share)
            yield from islice(negatives, self.share * _NEGATIVES)


def _again_and_again(indices: Sequence[int]) -> Iterator[int]:
    while True:
        yield from (indices[at] for at in torch.randperm(len(indices)).tolist())


def _shared(boxes: Floats, others: Floats, *, of_union: bool) -> Floats:
    """``(n, m)``: intersection of each box with each other one, over their union or over the box's own area."""
    near = np.maximum(boxes[:, None, :2], others[None, :, :2])
    far = np.minimum(boxes[:, None, :2] + boxes[:, None, 2:], others[None, :, :2] + others[None, :, 2:])
    shared = np.maximum(far - near, 0).prod(axis=2)
    area = boxes[:, None, 2:].prod(axis=2)
    ratio: Floats = shared / (area + others[None, :, 2:].prod(axis=2) - shared if of_union else area)
    return ratio
