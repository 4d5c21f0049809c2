"""ImageNet, or any set of photographs with a folder for each class."""

import copy
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from typing_extensions import override

from lit_compress.datamodules.image_classification import Batches


class ImageNetDataModule(LightningDataModule):
    """Photographs read from ``train/<class>/*`` and ``val/<class>/*``, as ImageNet's 1,281,167 and 50,000 lie once unpacked.

    Batch: ``(images (N, 3, image_size, image_size) float32, labels (N,) int64)``, each colour channel minus its mean over its
    standard deviation (of pixels in [0, 1]): (.485, .456, .406) and (.229, .224, .225). Labels number the classes in
    alphabetical order, or in the order of ``classes``.

    Training images are a random part of the photograph, 8 to 100 % of its area, scaled to ``image_size`` and mirrored at random.
    All others are scaled so that the shorter side is ``image_size / 0.875`` (256 for 224), and their centre is taken. ImageNet's
    test labels are not public, so the test is on ``val``.

    Args:
        data_dir: Folder that holds ``train`` and ``val``. ``None`` takes ``imagenet`` in ``$LIT_COMPRESS_DATA``, or in ``./data``
            without it.
        batch_size: Samples in a batch, of each process.
        num_workers: Processes that load data; 0 loads in the main process. Reading a photograph takes milliseconds: a GPU needs
            many.
        image_size: Height and width of an image in pixels.
        augment: Whether training images are cropped and mirrored at random; otherwise they are as in ``val``.
        classes: Names of the class folders to use, e.g. ``["n01440764", "n01443537"]``; ``None`` takes all.
        drop_last: Whether training leaves out the last batch when it is not full. Analysis and evaluation never do.

    Raises:
        ValueError: If a number is out of range or a class is named twice. From ``setup``, if ``train`` and ``val`` hold different
            classes.
        FileNotFoundError: From ``setup``, if a folder is missing or has no image.

    Source: Russakovsky et al., *ImageNet Large Scale Visual Recognition Challenge*, 2015; augmentation of Szegedy et al., *Going
    Deeper with Convolutions*, 2014, section 6, without its changes of colour, as ResNets are trained in torchvision.

    Example:
        >>> ImageNetDataModule(classes=["n01440764", "n01443537"]).num_classes
        2
    """

    def __init__(
        self,
        data_dir: str | Path | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        image_size: int = 224,
        augment: bool = True,
        classes: Sequence[str] | None = None,
        drop_last: bool = False,
    ) -> None:
        super().__init__()
        for name, number, least in [
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("image_size", image_size, 1),
        ]:
            if number < least:
                raise ValueError(f"Argument `{name}` must be at least {least} but got {number}.")
        if classes is not None and (isinstance(classes, str) or not classes or len(set(classes)) < len(classes)):
            raise ValueError(f"Argument `classes` must list at least one folder and none twice but got {classes!r}.")
        self.data_dir = Path(data_dir or Path(os.environ.get("LIT_COMPRESS_DATA", "data")) / "imagenet")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.image_size = image_size
        self.augment = augment
        self.classes = None if classes is None else tuple(classes)
        self.drop_last = drop_last

    @property
    def class_names(self) -> tuple[str, ...]:
        """Folder of the class of each label; where ``classes`` is not given, as found in ``train``."""
        return self.classes or tuple(self._train.classes)

    @property
    def num_classes(self) -> int:
        """Number of classes, which labels count up to."""
        return len(self.class_names)

    @override
    def setup(self, stage: str) -> None:
        # Listed now, so that what is wrong with the data shows before training begins.
        val = self._val
        if stage == "fit" and self._train.classes != val.classes:
            different = sorted(set(self._train.classes) ^ set(val.classes))
            raise ValueError(
                f"The folders `train` and `val` in {self.data_dir.resolve()} must hold the same classes, but only one of them "
                f"has {', '.join(different[:5])}. Labels would not mean the same; name the common ones by `classes`."
            )

    @override
    def train_dataloader(self) -> Batches:
        transform = self._random_part() if self.augment else self._centre()
        return self._loader(self._train, transform, shuffle=True, drop_last=self.drop_last)

    @override
    def val_dataloader(self) -> Batches:
        return self._loader(self._val, self._centre())

    @override
    def test_dataloader(self) -> Batches:
        return self.val_dataloader()

    @override
    def predict_dataloader(self) -> Batches:
        return self.val_dataloader()

    def analysis_dataloader(self) -> Batches:
        """The training images, all of them, in fixed order and as in ``val``: what pruning statistics are taken on."""
        return self._loader(self._train, self._centre())

    @cached_property
    def _train(self) -> ImageFolder:
        return self._listed("train")

    @cached_property
    def _val(self) -> ImageFolder:
        return self._listed("val")

    def _listed(self, part: str) -> ImageFolder:
        folder = self.data_dir / part
        if not folder.is_dir():
            raise FileNotFoundError(
                f"There is no folder {folder.resolve()}. Photographs are read from `train/<class>/` and `val/<class>/` in the "
                "folder chosen by `data_dir`, or in `imagenet` in the one that the environment variable LIT_COMPRESS_DATA names. "
                "ImageNet itself is not downloaded: its terms must be accepted on image-net.org."
            )
        return _ChosenFolders(folder, self.classes)

    def _random_part(self) -> v2.Compose:
        return v2.Compose([v2.RandomResizedCrop(self.image_size), v2.RandomHorizontalFlip(), *_to_numbers()])

    def _centre(self) -> v2.Compose:
        return v2.Compose([v2.Resize(round(self.image_size / 0.875)), v2.CenterCrop(self.image_size), *_to_numbers()])

    def _loader(self, images: ImageFolder, transform: v2.Compose, shuffle: bool = False, drop_last: bool = False) -> Batches:
        dataset = copy.copy(images)  # listing 1.3 million files takes seconds, so it is done once
        dataset.transform = transform
        # No persistent workers: theirs is an RNG of their own that a resumed run could not restore.
        return torch.utils.data.DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            drop_last=drop_last,
            pin_memory=torch.cuda.is_available(),
        )


class _ChosenFolders(ImageFolder):  # type: ignore[misc]  # torchvision has no types
    """An ImageFolder of some of its classes, numbered in the order given."""

    def __init__(self, root: Path, chosen: tuple[str, ...] | None) -> None:
        self.chosen = chosen
        super().__init__(root)

    @override
    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        found, numbers = super().find_classes(directory)
        if self.chosen is None:
            return found, numbers
        if missing := [name for name in self.chosen if name not in numbers]:
            raise FileNotFoundError(f"{directory} has no folder for {', '.join(missing)}, which `classes` names.")
        return list(self.chosen), {name: number for number, name in enumerate(self.chosen)}


def _to_numbers() -> list[Any]:
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std), v2.ToPureTensor()]
