"""Sets that torchvision reads from files: where they lie, and what to say when they do not."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from typing_extensions import override

from lit_compress.datamodules.image_classification import ImageClassificationDataModule, Samples


def data_folder(data_dir: str | Path | None) -> Path:
    """The folder of all data sets: the one given, else ``$LIT_COMPRESS_DATA``, else ``./data``."""
    return Path(data_dir or os.environ.get("LIT_COMPRESS_DATA", "data"))


class TorchvisionDataModule(ImageClassificationDataModule):
    """An image classification set whose files lie in a folder, in the layout of torchvision.

    Args:
        data_dir: Folder that holds the set's own folder. ``None`` takes ``$LIT_COMPRESS_DATA``, or ``./data`` without it.
        download: Whether to fetch the files when they are not there.
        batch_size: Samples in a batch.
        num_workers: Processes that load data; 0 loads in the main process.
        val_size: Training samples, counted over all classes, held out for validation; 0 leaves validation out.
        train_size: Train on the first so many samples of the shuffled training split only.
        classes: Which classes, by index or by name; ``None`` takes all. Labels are renumbered from 0 in the order given.
        seed: Of the splits.
        drop_last: Whether training leaves out the last batch when it is not full.

    Raises:
        FileNotFoundError: If the files are missing or damaged and ``download`` is off.
        ValueError: If a number is out of range, or a class is unknown or named twice.
    """

    dataset_class: ClassVar[type[Any]]
    """The set in :mod:`torchvision.datasets`."""
    folder: ClassVar[str]
    """Where below ``data_dir`` its files lie."""

    def __init__(
        self,
        data_dir: str | Path | None = None,
        download: bool = False,
        batch_size: int = 128,
        num_workers: int = 0,
        val_size: int = 5_000,
        train_size: int | None = None,
        classes: Sequence[int | str] | str | None = None,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            num_workers=num_workers,
            val_size=val_size,
            train_size=train_size,
            classes=classes,
            seed=seed,
            drop_last=drop_last,
        )
        self.data_dir = data_folder(data_dir)
        self.download = download

    @override
    def prepare_data(self) -> None:
        if self.download:
            self._dataset(train=True)

    @override
    def _read(self, train: bool) -> Samples:
        dataset = self._dataset(train)
        images = torch.as_tensor(dataset.data)
        # MNIST holds (N, H, W), CIFAR (N, H, W, C)
        images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
        return images, torch.as_tensor(dataset.targets)

    def _dataset(self, train: bool) -> Any:
        try:
            return self.dataset_class(self.data_dir, train=train, download=self.download)
        except RuntimeError as error:
            if self.download:
                raise
            raise FileNotFoundError(
                f"{self.dataset_class.__name__} is not, or not whole, in {(self.data_dir / self.folder).resolve()}. Either pass "
                f"`download=True` to fetch it, or put its files there; the folder that holds `{self.folder}` is chosen by "
                "`data_dir` or the environment variable LIT_COMPRESS_DATA."
            ) from error
