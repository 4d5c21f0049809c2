"""A labelled set of small images kept in memory as bytes and turned into floats a batch at a time."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset


class ImagesInMemory(Dataset[tuple[Tensor, int]]):
    """Images and labels by index; a DataLoader fetches whole batches, which is many times quicker than one image after another.

    Args:
        images: ``(N, C, H, W)`` uint8.
        labels: ``(N,)`` int64.
        white: Value in ``images`` that stands for 1.
        mean: Of each channel, on the scale where white is 1.
        std: Of each channel, on the same scale.
        augment: What changes a batch of bytes before it is scaled, e.g. :func:`pad_crop_flip`.

    Returns:
        An item is ``(image (C, H, W) float32, label)``; the image is ``(bytes / white - mean) / std``.

    Raises:
        ValueError: If there is not one label an image.

    Example:
        >>> black_and_white = torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1)
        >>> images = ImagesInMemory(black_and_white, torch.tensor([7, 8]), white=255, mean=(0.5,), std=(0.5,))
        >>> images[1]
        (tensor([[[1.]]]), 8)
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        white: float,
        mean: Sequence[float],
        std: Sequence[float],
        augment: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if len(images) != len(labels):
            raise ValueError(f"Expected one label an image but got {len(images)} images and {len(labels)} labels.")
        self.images = images
        self.labels = labels
        self.white = white
        self.mean = torch.tensor(mean).reshape(-1, 1, 1)
        self.std = torch.tensor(std).reshape(-1, 1, 1)
        self.augment = augment

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]]:
        images = self.images[indices]
        if self.augment is not None:
            images = self.augment(images)
        images = (images.float() / self.white - self.mean) / self.std
        return list(zip(images, self.labels[indices].tolist(), strict=True))


def pad_crop_flip(images: Tensor, padding: int = 4) -> Tensor:
    """Pad each image with zeros, crop its own size at a random place, and mirror every second one, drawn from torch's RNG.

    Args:
        images: ``(N, C, H, W)``, any dtype.
        padding: Pixels of zeros on each side; the crop moves by at most as many.

    Returns:
        A new tensor like ``images``.

    Source: the CIFAR augmentation of He et al., *Deep Residual Learning for Image Recognition*, 2015, section 4.2.

    Example:
        >>> pad_crop_flip(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape
        torch.Size([2, 3, 32, 32])
    """
    count, channels, height, width = images.shape
    padded = F.pad(images, [padding] * 4)
    rows = torch.randint(2 * padding + 1, (count, 1)) + torch.arange(height)  # (N, H): rows of the padded image
    columns = torch.randint(2 * padding + 1, (count, 1)) + torch.arange(width)  # (N, W)
    columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
    image, channel = torch.arange(count).reshape(-1, 1, 1, 1), torch.arange(channels).reshape(1, -1, 1, 1)
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]
