"""Patches of the images in a folder, as the planes that JPEG transforms."""

from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lit_compress.budget.jpeg import Subsampling, read_image
from lit_compress.budget.planes import ImagePatches, unit_side
from lit_compress.datamodules.torchvision_images import data_folder

Patches = DataLoader[tuple[Tensor, ...]]
_PARTS = ("train", "val", "test")


class ImagePatchDataModule(LightningDataModule):
    """Patches of the images in a folder and below, in places where an encoder's 8 × 8 blocks begin.

    Batch: ``(luma (N, 1, S, S),)`` of grey images, ``(luma (N, 1, S, S), chroma (N, 2, s, s'))`` in colour; uint8, with chroma
    made smaller as the subsampling says. Of large sets at most 2 million pixels are taken, drawn at random.

    The images are shared out by a draw: training, validation, test. Every file that Pillow's name list knows is taken.

    Args:
        data_dir: Folder with images. ``None`` takes ``$LIT_COMPRESS_DATA``, or ``./data`` without it.
        colour: Whether chroma is wanted; otherwise images are turned to grey.
        subsampling: Of chroma.
        side: S in pixels; ``None`` takes the least that holds whole blocks: 8, or 16 where chroma is halved. A perceptual loss
            wants more, e.g. 192.
        val_fraction: Share of the images to validate on.
        test_fraction: Share of the images to test on.
        batch_size: Patches in a batch.
        seed: Of the draws.

    Raises:
        FileNotFoundError: If there is no image.
        ValueError: If a number is out of range, no image is left to train on, a file is not an image that JPEG can hold, or an
            image is grey where colour is wanted, or smaller than a patch.

    Source: *Resource-Efficient Feature Gathering at Test Time*, section 3.3.3 (8 × 8 patches of single images).

    Example:
        >>> from pathlib import Path
        >>> Path("photographs").mkdir()
        >>> Image.new("RGB", (64, 48)).save("photographs/black.png")
        >>> (luma, chroma), *_ = ImagePatchDataModule("photographs", batch_size=4).train_dataloader()
        >>> luma.shape, chroma.shape
        (torch.Size([4, 1, 16, 16]), torch.Size([4, 2, 8, 8]))
    """

    def __init__(
        self,
        data_dir: str | Path | None = None,
        colour: bool = True,
        subsampling: Subsampling = "4:2:0",
        side: int | None = None,
        val_fraction: float = 0.0,
        test_fraction: float = 0.0,
        batch_size: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
            raise ValueError(
                "Arguments `val_fraction` and `test_fraction` must leave images to train on, but are "
                f"{val_fraction} and {test_fraction}."
            )
        if batch_size < 1:
            raise ValueError(f"Argument `batch_size` must be at least 1 but got {batch_size}.")
        self.data_dir = data_folder(data_dir)
        self.colour = colour
        self.subsampling: Subsampling = subsampling
        self.side = unit_side(colour, subsampling) if side is None else side
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.batch_size = batch_size
        self.seed = seed

    def pictures(self, part: str) -> list[Image.Image]:
        """The images themselves.

        Args:
            part: ``"train"``, ``"val"`` or ``"test"``.
        """
        return [self._read(file) for file in self._parts[part]]

    def patches(self, part: str) -> ImagePatches:
        """Patches of the images.

        Args:
            part: As in :meth:`pictures`.
        """
        return ImagePatches(self.pictures(part), self.side, self.subsampling, self.seed)

    @override
    def setup(self, stage: str) -> None:
        _ = self._parts  # listed now, so that an empty folder shows before training begins

    @override
    def train_dataloader(self) -> Patches:
        return DataLoader(self.patches("train"), batch_size=self.batch_size, shuffle=True)

    @override
    def val_dataloader(self) -> Patches | list[Patches]:
        return self._loader("val")

    @override
    def test_dataloader(self) -> Patches | list[Patches]:
        return self._loader("test")

    @cached_property
    def _parts(self) -> dict[str, list[Path]]:
        known = Image.registered_extensions()
        files = sorted(file for file in self.data_dir.rglob("*") if file.suffix.lower() in known and file.is_file())
        if not files:
            raise FileNotFoundError(f"{self.data_dir.resolve()} holds no image; choose a folder that does by `data_dir`.")
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(self.seed)).tolist()
        shuffled = [files[index] for index in order]
        test = round(self.test_fraction * len(files))
        val = round(self.val_fraction * len(files))
        if test + val >= len(files):
            raise ValueError(f"Of {len(files)} images, {val} to validate on and {test} to test on leave none to train on.")
        last = len(files) - test
        return dict(zip(_PARTS, (shuffled[: last - val], shuffled[last - val : last], shuffled[last:]), strict=True))

    def _read(self, file: Path) -> Image.Image:
        picture = read_image(file)
        if not self.colour:
            return picture.convert("L")
        if picture.mode == "L":
            raise ValueError(f"{file} is grey, but images in colour are wanted; leave it out, or set `colour` to False.")
        return picture

    def _loader(self, part: str) -> Patches | list[Patches]:
        return DataLoader(self.patches(part), batch_size=self.batch_size) if self._parts[part] else []
