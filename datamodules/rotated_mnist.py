"""Sets of digits, all turned by one angle: what to look at to tell which."""

from collections.abc import Sequence
from math import pi
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lit_compress.datamodules.image_classification import ImageClassificationDataModule
from lit_compress.datamodules.images_in_memory import ImagesInMemory
from lit_compress.datamodules.mnist import MNISTDataModule

Sets = DataLoader[tuple[Tensor, Tensor]]


class RotatedMNISTDataModule(LightningDataModule):
    r"""Rotational MNIST: a context a digit, and one angle for all images of a set.

    Batch: ``(images (N, C, I, 1, H, W) float32, bins (N,) int64)``: of each of C classes I images, all turned anticlockwise by
    the angle :math:`2 \pi b / K` of bin b, of K. An image is black with a probability that hangs on its class, which makes some
    classes dearer to learn from than others.

    Training sets are drawn anew all the time, from torch's global RNG; those of validation and test follow ``seed``, so that two
    models, or one at two budgets, see the same.

    Args:
        source: Where the images come from: a data module of classified images. ``None`` takes MNIST; ``DigitsDataModule()`` needs
            no file.
        observations: I, images of each class in a set, in training and validation.
        test_observations: I in the test: the most that a budget can buy of one class.
        sparsity: Probability in [0, 1) of an image to be black, one number or one a class.
        bins: K.
        side: Height and width that images are shrunk to before they are turned; ``None`` leaves them.
        train_size: Sets in an epoch.
        val_size: Sets to validate on; 0 leaves validation out.
        test_size: Sets to test on.
        batch_size: Sets in a batch.
        seed: Of the sets of validation and test.

    Raises:
        ValueError: If a number is out of range, or there is not one sparsity a class.

    Source: *Resource-Efficient Feature Gathering at Test Time*, section 3.3.1.

    Example:
        >>> from lit_compress.datamodules import DigitsDataModule
        >>> data = RotatedMNISTDataModule(source=DigitsDataModule(), batch_size=5)
        >>> images, bins = next(iter(data.train_dataloader()))
        >>> images.shape, data.context_names[:3]
        (torch.Size([5, 10, 4, 1, 8, 8]), ('0', '1', '2'))
    """

    def __init__(
        self,
        source: ImageClassificationDataModule | None = None,
        observations: int = 4,
        test_observations: int = 16,
        sparsity: float | Sequence[float] = 0.25,
        bins: int = 256,
        side: int | None = None,
        train_size: int = 6_400,
        val_size: int = 512,
        test_size: int = 1_024,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, number, least in [
            ("observations", observations, 1),
            ("test_observations", test_observations, 1),
            ("bins", bins, 2),
            ("side", side, 1),
            ("train_size", train_size, 1),
            ("val_size", val_size, 0),
            ("test_size", test_size, 1),
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
        ]:
            if number is not None and number < least:
                raise ValueError(f"Argument `{name}` must be at least {least} but got {number}.")
        self.source = MNISTDataModule() if source is None else source
        contexts = self.source.num_classes
        chances = [float(sparsity)] * contexts if isinstance(sparsity, (int, float)) else [float(chance) for chance in sparsity]
        if len(chances) != contexts or not all(0 <= chance < 1 for chance in chances):
            raise ValueError(f"Argument `sparsity` must be one number in [0, 1) or {contexts} of them but got {sparsity}.")
        self.observations = observations
        self.test_observations = test_observations
        self.sparsity = tuple(chances)
        self.bins = bins
        self.side = side
        self.train_size = train_size
        self.val_size = val_size
        self.test_size = test_size
        self.batch_size = batch_size
        self.seed = seed

    @property
    def context_names(self) -> tuple[str, ...]:
        """Name of each context: of the class."""
        return self.source.class_names

    @override
    def prepare_data(self) -> None:
        self.source.prepare_data()

    @override
    def setup(self, stage: str) -> None:
        self.source.setup(stage)

    @override
    def train_dataloader(self) -> Sets:
        return self._loader(self.source.analysis_dataloader(), self.train_size, self.observations, seed=None)

    @override
    def val_dataloader(self) -> Sets | list[Any]:
        if self.val_size == 0:
            return []
        images = self.source.val_dataloader()
        if isinstance(images, list):
            raise ValueError("The source holds out nothing to validate on; give it a validation split, or set `val_size=0`.")
        return self._loader(images, self.val_size, self.observations, self.seed)

    @override
    def test_dataloader(self) -> Sets:
        return self._loader(self.source.test_dataloader(), self.test_size, self.test_observations, self.seed)

    @override
    def predict_dataloader(self) -> Sets:
        return self.test_dataloader()

    def _loader(self, images: Any, size: int, observations: int, seed: int | None) -> Sets:
        samples: ImagesInMemory = images.dataset
        pixels = samples.images.float() / samples.white
        if self.side is not None:
            pixels = F.interpolate(pixels, size=(self.side, self.side), mode="area")
        sets = RotatedSets(pixels, samples.labels, observations, torch.tensor(self.sparsity), self.bins, size, seed)
        return DataLoader(sets, batch_size=self.batch_size)


class RotatedSets(Dataset[tuple[Tensor, Tensor]]):
    """Sets of images, drawn as they are asked for.

    Args:
        images: ``(M, 1, H, W)`` float.
        labels: ``(M,)``, every class from 0 on at least once.
        observations: Images of each class in a set.
        sparsity: Probability ``(C,)`` of an image to be black.
        bins: Number of angles.
        size: Sets.
        seed: Gives every set its own fixed draw; ``None`` draws from torch's global RNG.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, observations: int, sparsity: Tensor, bins: int, size: int, seed: int | None
    ) -> None:
        self.by_class = [images[labels == label] for label in range(len(sparsity))]
        self.observations = observations
        self.sparsity = sparsity
        self.bins = bins
        self.size = size
        self.seed = seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        drawn = [self._draw(index) for index in indices]
        images, bins = torch.stack([images for images, _ in drawn]), torch.stack([number for _, number in drawn])
        outer = images.shape[:3]
        angles = (bins * (2 * pi / self.bins)).repeat_interleave(outer[1] * outer[2])
        turned = rotate(images.flatten(0, 2), angles).unflatten(0, outer)
        return list(zip(turned, bins, strict=True))

    def _draw(self, index: int) -> tuple[Tensor, Tensor]:
        """Images ``(C, I, 1, H, W)`` and a bin."""
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        number = torch.randint(self.bins, (), generator=generator)
        chosen = [images[torch.randint(len(images), (self.observations,), generator=generator)] for images in self.by_class]
        seen = torch.rand(len(chosen), self.observations, generator=generator) >= self.sparsity[:, None]
        return torch.stack(chosen) * seen[:, :, None, None, None], number


def rotate(images: Tensor, angles: Tensor) -> Tensor:
    """Turn each image anticlockwise about its middle; bilinear, black from outside.

    Args:
        images: ``(N, C, H, H)`` float, square.
        angles: ``(N,)`` in radians.

    Example:
        >>> rotate(torch.tensor([[[[0.0, 1.0], [0.0, 0.0]]]]), torch.tensor([pi / 2])).round().int().tolist()
        [[[[1, 0], [0, 0]]]]
    """
    cos, sin, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
    # Where each output pixel comes from, with y pointing down: the inverse turn.
    origin = torch.stack([torch.stack([cos, -sin, zero], dim=1), torch.stack([sin, cos, zero], dim=1)], dim=1)
    grid = F.affine_grid(origin, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
