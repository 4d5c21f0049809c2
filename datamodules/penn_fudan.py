"""Penn-Fudan: 170 photographs of people walking across two campuses."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from typing_extensions import override

from lit_compress.datamodules.pedestrian_images import PedestrianDataModule, PedestrianImage, Split, image_file
from lit_compress.datamodules.torchvision_images import data_folder
from lit_compress.pedestrians.annotations import FROM_ONE, Annotations, numbers

_BOX = re.compile(r"\(Xmin, Ymin\) - \(Xmax, Ymax\) : \((\d+), (\d+)\) - \((\d+), (\d+)\)")


class PennFudanDataModule(PedestrianDataModule):
    """The Penn-Fudan set: 170 images with 345 pedestrians, all of them upright.

    Batch: as :class:`~lit_compress.datamodules.PedestrianDataModule`. In the folder ``PennFudanPed``: ``PNGImages`` and
    ``Annotation``.

    Args:
        data_dir: Folder that holds ``PennFudanPed``. ``None`` takes ``$LIT_COMPRESS_DATA``, or ``./data`` without it.
        val_size: Images to validate on.
        test_size: Images to test on.
        batch_size: Images in a batch.
        num_workers: Processes that load data; 0 loads in the main process.
        augment: Whether training images are mirrored at random.
        seed: Of the split.

    Raises:
        FileNotFoundError: If the images or their annotations are missing.
        ValueError: If a number is out of range or an annotation is damaged; the error names it.

    Source: Wang et al., *Object Detection Combining Recognition and Segmentation*, 2007.

    Example:
        >>> PennFudanDataModule(val_size=10).val_size
        10
    """

    def __init__(
        self,
        data_dir: str | Path | None = None,
        val_size: int = 20,
        test_size: int = 50,
        batch_size: int = 1,
        num_workers: int = 0,
        augment: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, augment=augment)
        for name, number in (("val_size", val_size), ("test_size", test_size)):
            if number < 0:
                raise ValueError(f"Argument `{name}` must be at least 0 but got {number}.")
        self.root = data_folder(data_dir) / "PennFudanPed"
        self.val_size, self.test_size, self.seed = val_size, test_size, seed

    @override
    def find_images(self, split: Split) -> Sequence[PedestrianImage]:
        files = sorted(self.root.glob("PNGImages/*.png"))
        if len(files) <= self.val_size + self.test_size:
            raise FileNotFoundError(
                f"There are {len(files)} images in {(self.root / 'PNGImages').resolve()}, not more than the {self.val_size} + "
                f"{self.test_size} to validate and test on. Put the set there; the folder that holds `PennFudanPed` is chosen by "
                "`data_dir` or the environment variable LIT_COMPRESS_DATA."
            )
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(self.seed)).tolist()
        last, middle = len(files) - self.test_size, len(files) - self.test_size - self.val_size
        chosen = {"train": order[:middle], "val": order[middle:last], "test": order[last:]}[split]
        return [
            image_file(files[index].stem, files[index], read_penn_fudan(self.root / "Annotation" / f"{files[index].stem}.txt"))
            for index in sorted(chosen)
        ]


def read_penn_fudan(path: Path) -> Annotations:
    """Who is in an image, from its annotation.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged; the error names it.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    claimed = re.search(r"Objects with ground truth : (\d+)", text)
    corners = numbers([found.groups() for found in _BOX.finditer(text)], 4, str(path))
    if claimed is None or int(claimed[1]) != len(corners):
        raise ValueError(f"{path} is damaged: it has {len(corners)} boxes of {claimed and claimed[1]}.")
    # Corners are pixels of the box, counted from 1.
    corners[:, 2:] -= corners[:, :2] - 1
    return Annotations.of(corners - FROM_ONE)
