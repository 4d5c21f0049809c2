"""The persons of COCO, and sets annotated in the same JSON, as CityPersons."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from typing_extensions import override

from lit_compress.datamodules.pedestrian_images import PedestrianDataModule, PedestrianImage, Split, image_file
from lit_compress.datamodules.torchvision_images import data_folder
from lit_compress.pedestrians.formats import read_truths


class CocoPedestrianDataModule(PedestrianDataModule):
    """Persons in photographs, from annotations in COCO's form: COCO itself, CityPersons, or Caltech converted.

    Batch: as :class:`~lit_compress.datamodules.PedestrianDataModule`. Categories called person or pedestrian count; crowds, and
    what is marked ``ignore``, are ignore regions, as are CityPersons' riders, sitting persons, groups and others.

    Args:
        data_dir: Folder that holds the set's own folder. ``None`` takes ``$LIT_COMPRESS_DATA``, or ``./data`` without it.
        folder: The set's own folder.
        train_images: Folder of the training images, below ``folder``; for CityPersons ``leftImg8bit/train``.
        train_annotations: Their annotations, below ``folder``.
        val_images: Folder of the images to validate and test on.
        val_annotations: Their annotations. ``None`` holds out ``val_size`` of the training images instead.
        val_size: Training images held out if there are no ``val_annotations``.
        with_persons: Whether to leave out training images without a person who counts.
        from_one: Whether boxes count pixels from 1.
        batch_size: Images in a batch.
        num_workers: Processes that load data; 0 loads in the main process.
        augment: Whether training images are mirrored at random.
        seed: Of the images held out.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a number is out of range or a file is damaged; the error names it.

    Source: Lin et al., *Microsoft COCO*, 2014; Zhang et al., *CityPersons*, 2017.

    Example:
        >>> CocoPedestrianDataModule(folder="coco128", train_images="val2017", val_annotations=None, val_size=20).val_size
        20
    """

    def __init__(
        self,
        data_dir: str | Path | None = None,
        folder: str = "coco",
        train_images: str = "train2017",
        train_annotations: str = "annotations/instances_train2017.json",
        val_images: str = "val2017",
        val_annotations: str | None = "annotations/instances_val2017.json",
        val_size: int = 0,
        with_persons: bool = True,
        from_one: bool = False,
        batch_size: int = 1,
        num_workers: int = 0,
        augment: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, augment=augment)
        if (val_size > 0) != (val_annotations is None):
            raise ValueError(
                f"Argument `val_size` must be at least 1 without `val_annotations`, and 0 with them, but got {val_size}."
            )
        self.root = data_folder(data_dir) / folder
        self.train_images, self.train_annotations = train_images, train_annotations
        self.val_images, self.val_annotations = val_images, val_annotations
        self.val_size, self.with_persons, self.from_one, self.seed = val_size, with_persons, from_one, seed

    @override
    def find_images(self, split: Split) -> Sequence[PedestrianImage]:
        if split != "train" and self.val_annotations is not None:
            return self._read(self.val_images, self.val_annotations)
        images = self._read(self.train_images, self.train_annotations)
        if self.val_annotations is None:
            if self.val_size >= len(images):
                raise ValueError(f"Argument `val_size` must leave some of the {len(images)} images but got {self.val_size}.")
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.seed)).tolist()
            held_out = sorted(order[: self.val_size] if split != "train" else order[self.val_size :])
            images = [images[index] for index in held_out]
        if split == "train" and self.with_persons:
            images = [one for one in images if ((one.annotations.labels == 1) & ~one.annotations.ignore).any()]
        return images

    def _read(self, folder: str, annotations: str) -> list[PedestrianImage]:
        truths = read_truths(self.root / annotations, from_one=self.from_one)
        paths = {name: self.root / folder / file for name, file in truths.files.items()}
        if missing := [path for path in paths.values() if not path.exists()]:
            raise FileNotFoundError(
                f"{len(missing)} of {len(paths)} images of {annotations} are missing; the first is {missing[0].resolve()}. The "
                f"folder that holds `{self.root.name}` is chosen by `data_dir` or the environment variable LIT_COMPRESS_DATA."
            )
        return [image_file(name, path, truths.annotations[name]) for name, path in paths.items()]
