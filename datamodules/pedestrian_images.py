"""Images with pedestrians, and what data modules of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lit_compress.pedestrians.annotations import Annotations, Detections
from lit_compress.pedestrians.protocol import Floats

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
Target = dict[str, Any]
Batch = tuple[list[Tensor], list[Target]]
Batches = DataLoader[Any]
_NONE = np.empty((0, 4))


class PedestrianImage(NamedTuple):
    """An image that is read when it is asked for."""

    name: str
    """Its name, by which detections in files call it."""
    size: tuple[int, int]
    """Its height and width in pixels."""
    read: Callable[[], Tensor]
    """Gives it, ``(3, H, W)`` uint8; can be pickled."""
    annotations: Annotations
    """Who is in it."""


class PedestrianDataModule(LightningDataModule, ABC):
    """A set of images with pedestrians, as detectors take it; a subclass says which images.

    Batch: ``(images, targets)``, a list of N images ``(3, H, W)`` float32 in [0, 1], of any size, and a list of N targets as
    torchvision's detectors and :class:`~lit_compress.metrics.LogAverageMissRate` take them:

    - ``boxes`` ``(m, 4)`` float32: left, top, right, bottom in pixels; the image begins at 0.
    - ``labels`` ``(m,)`` int64: 1 for a person; 2 for people, 3 for a person in doubt and 4 for other ignore regions.
    - ``visible`` ``(m, 4)`` float32: the visible parts, all zeros where a box is not occluded.
    - ``ignore`` ``(m,)`` bool: ignore regions whatever their labels.
    - ``image_id``: the image's number in its split.

    Args:
        batch_size: Images in a batch.
        num_workers: Processes that load data; 0 loads in the main process.
        augment: Whether training images are mirrored at random.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(self, batch_size: int = 1, num_workers: int = 0, augment: bool = True) -> None:
        super().__init__()
        for name, number, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
            if number < least:
                raise ValueError(f"Argument `{name}` must be at least {least} but got {number}.")
        self.batch_size, self.num_workers, self.augment = batch_size, num_workers, augment

    @abstractmethod
    def find_images(self, split: Split) -> Sequence[PedestrianImage]:
        """The images of a split, in fixed order."""

    def images(self, split: Split) -> Sequence[PedestrianImage]:
        """The images of a split, looked up once."""
        if split not in self._found:
            self._found[split] = self.find_images(split)
        return self._found[split]

    @override
    def setup(self, stage: str) -> None:
        # Looked up now, so that what is missing or damaged shows before training begins.
        splits: dict[str, tuple[Split, ...]] = {"fit": ("train", "val"), "validate": ("val",)}
        for split in splits.get(stage, ("test",)):
            self.images(split)

    @override
    def train_dataloader(self) -> Batches:
        return self._loader("train", augment=self.augment, shuffle=True)

    @override
    def val_dataloader(self) -> Batches:
        return self._loader("val")

    @override
    def test_dataloader(self) -> Batches:
        return self._loader("test")

    @override
    def predict_dataloader(self) -> Batches:
        return self._loader("test")

    def analysis_dataloader(self) -> Batches:
        """The training images in fixed order and not mirrored: what pruning statistics are taken on."""
        return self._loader("train")

    @property
    def proposed(self) -> Mapping[str, Detections] | None:
        """Boxes of a detector by the name of the image, which go into the targets; None if there are none."""
        return None

    @cached_property
    def _found(self) -> dict[Split, Sequence[PedestrianImage]]:
        return {}

    def _loader(self, split: Split, augment: bool = False, shuffle: bool = False) -> Batches:
        return DataLoader(
            PedestrianImages(self.images(split), mirror=augment, proposals=self.proposed),
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            collate_fn=together,
            pin_memory=torch.cuda.is_available(),
        )


class PedestrianImages(Dataset[tuple[Tensor, Target]]):
    """Images and targets, as :class:`PedestrianDataModule` describes them.

    Args:
        images: The images.
        mirror: Whether to mirror half of them, drawn from torch's RNG.
        proposals: Boxes by the name of the image, for ``proposals`` ``(n, 4)`` in the targets; an image without any has none.
    """

    def __init__(
        self, images: Sequence[PedestrianImage], mirror: bool = False, proposals: Mapping[str, Detections] | None = None
    ) -> None:
        self.images = images
        self.mirror = mirror
        self.proposals = proposals

    def __len__(self) -> int:
        return len(self.images)

    @override
    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        one = self.images[index]
        image, annotations = one.read(), one.annotations
        proposals = None if self.proposals is None else self.proposals[one.name].boxes if one.name in self.proposals else _NONE
        if self.mirror and torch.rand(()) < 0.5:
            width = image.shape[2]
            image, annotations = image.flip(2), mirrored(annotations, width)
            proposals = None if proposals is None else _turned(proposals, width)
        target = target_of(annotations, index)
        if proposals is not None:
            target["proposals"] = _corners(proposals)
        return image.float() / 255, target


def target_of(annotations: Annotations, image_id: int) -> Target:
    """A target, as :class:`PedestrianDataModule` describes it.

    Example:
        >>> target_of(Annotations.of([[10, 20, 41, 100]]), image_id=3)["boxes"]
        tensor([[ 10.,  20.,  51., 120.]])
    """
    return {
        "boxes": _corners(annotations.boxes),
        "labels": torch.from_numpy(annotations.labels),
        "visible": _corners(annotations.visible),
        "ignore": torch.from_numpy(annotations.ignore),
        "image_id": image_id,
    }


def mirrored(annotations: Annotations, width: int) -> Annotations:
    """Annotations of the mirrored image.

    Args:
        annotations: Of the image.
        width: Its width in pixels.
    """
    visible = annotations.visible.copy()
    occluded = visible.any(axis=1)
    visible[occluded] = _turned(visible[occluded], width)
    boxes = _turned(annotations.boxes, width)
    return Annotations(boxes=boxes, labels=annotations.labels, visible=visible, ignore=annotations.ignore)


def together(samples: Sequence[tuple[Tensor, Target]]) -> Batch:
    """A batch of images that may differ in size."""
    return [image for image, _ in samples], [target for _, target in samples]


def image_file(name: str, path: Path, annotations: Annotations) -> PedestrianImage:
    """An image in a file that Pillow reads; only its head is read now.

    Raises:
        ValueError: If it is no image; the error names the file.
    """
    try:
        with Image.open(path) as opened:
            size = (opened.height, opened.width)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}.") from None
    return PedestrianImage(name, size, partial(read_image, path), annotations)


def read_image(path: Path) -> Tensor:
    """An image ``(3, H, W)`` uint8.

    Raises:
        ValueError: If it cannot be decoded; the error names the file.
    """
    try:
        with Image.open(path) as opened:
            return torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}.") from None


def _turned(boxes: Floats, width: int) -> Floats:
    """Boxes ``(x, y, width, height)`` in the mirrored image."""
    turned: Floats = boxes.copy()
    turned[:, 0] = width - boxes[:, 0] - boxes[:, 2]
    return turned


def _corners(boxes: Floats) -> Tensor:
    return torch.from_numpy(np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)).float()
