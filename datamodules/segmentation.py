"""Street scenes in which every pixel has a class, read from the folders of CamVid and Cityscapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.datasets import Cityscapes
from torchvision.transforms import v2
from typing_extensions import override

from lit_compress.datamodules.torchvision_images import data_folder

UNLABELLED = -100  # what torch's cross-entropy leaves out


class Layout(NamedTuple):
    """Where a set keeps its frames, and what the numbers in its label images mean.

    Args:
        folder: Below ``data_dir``.
        images: Pattern of the frames of a split, with ``{split}`` in it.
        labels: What turns the path of a frame into that of its labels, part by part: old to new.
        splits: Stage to the name of its split.
        classes: Name of each class, by label.
        numbers: Numbers in the label images to labels; all others are unlabelled.
    """

    folder: str
    images: str
    labels: Mapping[str, str]
    splits: Mapping[str, str]
    classes: tuple[str, ...]
    numbers: Mapping[int, int]


_CAMVID_CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip
_CITYSCAPES_CLASSES = [one for one in Cityscapes.classes if not one.ignore_in_eval]  # in the order of their labels

LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "camvid": Layout(
            folder="camvid",
            images="{split}/*.png",
            labels={"train": "trainannot", "val": "valannot", "test": "testannot"},
            splits={"train": "train", "val": "val", "test": "test"},
            classes=_CAMVID_CLASSES,
            numbers={label: label for label in range(len(_CAMVID_CLASSES))},
        ),
        "cityscapes": Layout(
            folder="cityscapes",
            images="leftImg8bit/{split}/*/*_leftImg8bit.png",
            labels={"leftImg8bit": "gtFine", "_leftImg8bit.png": "_gtFine_labelIds.png"},
            splits={"train": "train", "val": "val", "test": "val"},  # its test labels are not published
            classes=tuple(one.name for one in _CITYSCAPES_CLASSES),
            numbers={one.id: one.train_id for one in _CITYSCAPES_CLASSES},
        ),
    }
)


class SegmentationDataModule(LightningDataModule):
    """Frames of CamVid (11 classes) or Cityscapes (19), with the class of every pixel.

    Batch: ``(images (N, 3, H, W) float32 in [0, 1], labels (N, H, W) int64)``; unlabelled pixels are -100.

    Folders: ``camvid/train``, ``camvid/trainannot``, ``val``, ``valannot``, ``test``, ``testannot``, as SegNet's authors publish
    the set; ``cityscapes/leftImg8bit/<split>/<city>`` and ``cityscapes/gtFine/<split>/<city>`` with ``labelIds`` images, as
    Cityscapes does. Since the labels of its test split are not published, Cityscapes is tested on its validation split.

    Args:
        layout: ``"camvid"`` or ``"cityscapes"``.
        data_dir: Folder that holds the set's own folder. ``None`` takes ``$LIT_COMPRESS_DATA``, or ``./data`` without it.
        size: Height and width in pixels that frames and labels are resized to; ``None`` leaves them as they are. ERFNet is
            trained at (512, 1024).
        batch_size: Frames in a batch.
        num_workers: Processes that load data; 0 loads in the main process.
        augment: Whether training frames are mirrored at random and moved by up to two pixels each way, as ERFNet's are.
        train_size: Train on the first so many frames only, by name.

    Raises:
        FileNotFoundError: If frames or their labels are missing.
        ValueError: If a number is out of range, the layout is unknown, or there are fewer frames than ``train_size``.

    Source: Brostow et al., *Semantic Object Classes in Video*, 2009, in the version of Badrinarayanan et al., *SegNet*, 2017;
    Cordts et al., *The Cityscapes Dataset*, 2016; augmentation of Romera et al., *ERFNet*, 2017.

    Example:
        >>> SegmentationDataModule("camvid").class_names[:3]
        ('sky', 'building', 'pole')
    """

    def __init__(
        self,
        layout: Literal["camvid", "cityscapes"] = "camvid",
        data_dir: str | Path | None = None,
        size: tuple[int, int] | None = None,
        batch_size: int = 6,
        num_workers: int = 0,
        augment: bool = True,
        train_size: int | None = None,
    ) -> None:
        super().__init__()
        if layout not in LAYOUTS:
            raise ValueError(f"Argument `layout` must be one of {', '.join(map(repr, LAYOUTS))} but got {layout!r}.")
        sides: Sequence[tuple[str, int | None, int]] = [("size", side, 1) for side in size or ()]
        for name, number, least in [
            *sides,
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("train_size", train_size, 1),
        ]:
            if number is not None and number < least:
                raise ValueError(f"Argument `{name}` must be at least {least} but got {number}.")
        self.layout = LAYOUTS[layout]
        self.root = data_folder(data_dir) / self.layout.folder
        self.size, self.batch_size, self.num_workers = size, batch_size, num_workers
        self.augment, self.train_size = augment, train_size

    @property
    def num_classes(self) -> int:
        """Number of classes, which labels count up to."""
        return len(self.layout.classes)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of the class of each label."""
        return self.layout.classes

    @override
    def setup(self, stage: str) -> None:
        # Looked up now, so that what is missing shows before training begins.
        for split in ("train", "val") if stage == "fit" else ("val" if stage == "validate" else "test",):
            self._frames(split)

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader("train", augment=self.augment, shuffle=True)

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader("val")

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader("test")

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        return self._loader("test")

    def analysis_dataloader(self) -> DataLoader[Any]:
        """The training frames in fixed order and without augmentation: what pruning statistics are taken on."""
        return self._loader("train")

    def _loader(self, split: str, augment: bool = False, shuffle: bool = False) -> DataLoader[Any]:
        return DataLoader(
            SegmentedFrames(self._frames(split), self.layout.numbers, self.size, augment),
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    def _frames(self, split: str) -> list[tuple[Path, Path]]:
        """Frames of a split and their label images, by name."""
        pattern = self.layout.images.format(split=self.layout.splits[split])
        frames = [(path, self._labels_of(path)) for path in sorted(self.root.glob(pattern))]
        if not frames:
            raise FileNotFoundError(
                f"There are no frames {pattern} in {self.root.resolve()}. Put them there; the folder that holds "
                f"`{self.layout.folder}` is chosen by `data_dir` or the environment variable LIT_COMPRESS_DATA."
            )
        if missing := [labels for _, labels in frames if not labels.exists()]:
            raise FileNotFoundError(f"{len(missing)} of {len(frames)} frames have no labels; the first is {missing[0]}.")
        if split == "train" and self.train_size is not None:
            if self.train_size > len(frames):
                raise ValueError(f"Argument `train_size` asks for {self.train_size} frames but there are {len(frames)}.")
            frames = frames[: self.train_size]
        return frames

    def _labels_of(self, frame: Path) -> Path:
        folders, name = frame.relative_to(self.root).parts[:-1], frame.name
        for old, new in self.layout.labels.items():
            folders = tuple(new if part == old else part for part in folders)
            name = name.removesuffix(old) + new if name.endswith(old) else name
        return self.root.joinpath(*folders, name)


class SegmentedFrames(Dataset[tuple[Tensor, Tensor]]):
    """Frames and the classes of their pixels, read when they are asked for.

    Args:
        frames: Path of each image and of its label image, whose pixels are numbers below 256.
        numbers: Those numbers to labels; all others are unlabelled.
        size: Height and width to resize to, or None.
        augment: Whether to mirror and move them at random, drawn from torch's RNG.

    Returns:
        An item is ``(image (3, H, W) float32 in [0, 1], labels (H, W) int64)``, with -100 where there is no label.
    """

    def __init__(
        self, frames: Sequence[tuple[Path, Path]], numbers: Mapping[int, int], size: tuple[int, int] | None, augment: bool
    ) -> None:
        self.frames = frames
        self.labels = torch.full((256,), UNLABELLED)
        for number, label in numbers.items():
            self.labels[number] = label
        self.unlabelled = next(number for number in range(255, -1, -1) if number not in numbers)
        self.resize = None if size is None else v2.Resize(list(size), antialias=True)
        self.augment = augment

    def __len__(self) -> int:
        return len(self.frames)

    @override
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image_file, label_file = self.frames[index]
        with Image.open(image_file) as opened:
            image = tv_tensors.Image(torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1))
        with Image.open(label_file) as opened:
            numbers = tv_tensors.Mask(torch.from_numpy(np.array(opened)))
        if self.resize is not None:
            image, numbers = self.resize(image, numbers)
        if self.augment:
            image, numbers = self._moved(image, numbers)
        return image.as_subclass(Tensor).float() / 255, self.labels[numbers.as_subclass(Tensor).long()]

    def _moved(self, image: tv_tensors.Image, numbers: tv_tensors.Mask) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        fill = {tv_tensors.Image: 0, tv_tensors.Mask: self.unlabelled}
        shifts = v2.RandomCrop(image.shape[-2:], padding=2, fill=fill)
        moved: tuple[tv_tensors.Image, tv_tensors.Mask] = v2.RandomHorizontalFlip()(*shifts(image, numbers))
        return moved
