"""Pedestrians that need no file: drawn streets, the same for the same seed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from lit_compress.datamodules.pedestrian_images import SPLITS, PedestrianDataModule, PedestrianImage, Split
from lit_compress.datamodules.street_scenes import StreetScene


class SyntheticPedestrianDataModule(PedestrianDataModule):
    """Drawn streets with walking figures: houses, trees, poles and cars, some in front of people, and groups as ignore regions.

    Batch: as :class:`~lit_compress.datamodules.PedestrianDataModule`. An image hangs on the seed, its split and its number only;
    it is drawn once, and kept.

    Args:
        size: Height and width of the images in pixels.
        heights: Least and greatest height of a person in pixels.
        train_size: Images to train on.
        val_size: Images to validate on.
        test_size: Images to test on.
        crowds: Probability of a group in an image.
        occlusion: Probability, for each person, of a thing that stands in front.
        batch_size: Images in a batch.
        num_workers: Processes that draw; 0 draws in the main process.
        augment: Whether training images are mirrored at random.
        seed: Of all that is drawn.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> data = SyntheticPedestrianDataModule(size=(96, 128), heights=(20, 60), batch_size=2)
        >>> images, targets = next(iter(data.val_dataloader()))
        >>> images[0].shape, sorted(targets[0])
        (torch.Size([3, 96, 128]), ['boxes', 'ignore', 'image_id', 'labels', 'visible'])
    """

    def __init__(
        self,
        size: tuple[int, int] = (192, 256),
        heights: tuple[float, float] = (24.0, 120.0),
        train_size: int = 1_000,
        val_size: int = 200,
        test_size: int = 500,
        crowds: float = 0.3,
        occlusion: float = 0.35,
        batch_size: int = 1,
        num_workers: int = 0,
        augment: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, augment=augment)
        for name, number in (("train_size", train_size), ("val_size", val_size), ("test_size", test_size)):
            if number < 1:
                raise ValueError(f"Argument `{name}` must be at least 1 but got {number}.")
        self.sizes: dict[Split, int] = {"train": train_size, "val": val_size, "test": test_size}
        self.scene = StreetScene(size=(size[0], size[1]), heights=(heights[0], heights[1]), crowds=crowds, occlusion=occlusion)
        self.seed = seed

    @override
    def find_images(self, split: Split) -> Sequence[PedestrianImage]:
        return _Drawn(self.scene, self.seed, split, self.sizes[split])


class _Drawn(Sequence[PedestrianImage]):
    """Images that are drawn when they are first asked for, and kept."""

    def __init__(self, scene: StreetScene, seed: int, split: Split, size: int) -> None:
        self.scene, self.seed, self.split, self.size = scene, seed, split, size
        self._drawn: dict[int, PedestrianImage] = {}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> PedestrianImage:  # type: ignore[override]  # no slices are taken
        if not 0 <= index < self.size:
            raise IndexError(f"There are {self.size} images but number {index} was asked for.")
        if index not in self._drawn:
            pixels, annotations = self.scene.draw(np.random.default_rng([self.seed, SPLITS.index(self.split), index]))
            image = torch.from_numpy(pixels).permute(2, 0, 1)
            name = f"{self.split}_{index:06d}"
            self._drawn[index] = PedestrianImage(name, self.scene.size, partial(_itself, image), annotations)
        return self._drawn[index]


def _itself(image: Tensor) -> Tensor:
    return image
