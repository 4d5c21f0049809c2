"""The 8×8 digits that come with scikit-learn: real data that needs no file and no network."""

from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from typing_extensions import override

from lit_compress.datamodules.image_classification import ImageClassificationDataModule, Samples, split_by_class

_COUNT = 1797


class DigitsDataModule(ImageClassificationDataModule):
    """1797 handwritten digits of 8×8 grey pixels in [0, 1], embedded in scikit-learn.

    Batch: ``(images (N, 1, 8, 8) float32 in [0, 1], labels (N,) int64)``. Nothing is standardised or augmented. The set has no
    test part of its own: test, validation and training splits are all drawn by ``seed``, each class giving its share.

    Args:
        batch_size: Samples in a batch.
        val_fraction: Share of the 1797 for validation, in [0, 1); 0 leaves validation out. By default 180 images.
        test_fraction: Share of the 1797 for the test, in (0, 1). By default 359 images, which leaves 1258 for training.
        seed: Of the splits. The order of training batches follows torch's global RNG.
        num_workers: Processes that load data; 0 loads in the main process.
        classes: Which digits, e.g. ``[3, 8]``; ``None`` takes all. Labels are renumbered from 0 in the order given.
        train_size: Train on the first so many samples of the shuffled training split only.
        drop_last: Whether training leaves out the last batch when it is not full.

    Raises:
        ValueError: If a number is out of range or a digit is unknown or named twice.

    Source: the test part of *Optical Recognition of Handwritten Digits*, UCI, 1998, as scikit-learn embeds it.

    Example:
        >>> digits = DigitsDataModule(classes=[3, 8])
        >>> images, labels = next(iter(digits.analysis_dataloader()))
        >>> images.shape, digits.num_classes
        (torch.Size([64, 1, 8, 8]), 2)
    """

    all_classes = tuple("0123456789")
    image_shape = (1, 8, 8)
    white = 16.0

    def __init__(
        self,
        batch_size: int = 64,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        seed: int = 0,
        num_workers: int = 0,
        classes: Sequence[int] | None = None,
        train_size: int | None = None,
        drop_last: bool = False,
    ) -> None:
        val_size, test_size = round(val_fraction * _COUNT), round(test_fraction * _COUNT)
        digits = len(self.all_classes)
        if not (val_size == 0 or val_size >= digits) or test_size < digits or _COUNT - val_size - test_size < digits:
            raise ValueError(
                f"Arguments `val_fraction` and `test_fraction` must leave each split at least {digits} of the {_COUNT} images, "
                f"one a digit (validation may have none), but {val_fraction} and {test_fraction} give {val_size} for validation, "
                f"{test_size} for the test and {_COUNT - val_size - test_size} for training."
            )
        super().__init__(
            batch_size=batch_size,
            num_workers=num_workers,
            val_size=val_size,
            train_size=train_size,
            classes=classes,
            seed=seed,
            drop_last=drop_last,
        )
        self.test_size = test_size

    @override
    def _read(self, train: bool) -> Samples:
        digits = load_digits()
        images = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1)  # whole numbers from 0 to 16
        labels = torch.from_numpy(digits.target).long()
        rest, test = split_by_class(labels, self.test_size, self.seed)
        part = rest if train else test
        return images[part], labels[part]
