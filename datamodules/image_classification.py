"""What image classification data modules have in common: splits, chosen classes, and loaders."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from pytorch_lightning import LightningDataModule
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lit_compress.datamodules.images_in_memory import ImagesInMemory

Samples = tuple[Tensor, Tensor]
"""Images ``(N, C, H, W)`` uint8 and labels ``(N,)`` int64."""

Batches = DataLoader[tuple[Tensor, int]]


class ImageClassificationDataModule(LightningDataModule, ABC):
    """Loaders over a set of small labelled images that fits into memory.

    A subclass names its classes, its image shape and its scale, and reads its samples.

    Batch: ``(images (N, C, H, W) float32, labels (N,) int64)``.

    Three things are kept apart. The *splits* follow ``seed`` alone. The *order* of training batches and the augmentation follow
    torch's global RNG, so that a resumed run which restores it goes on as if it had not stopped. And the *analysis* loader
    has neither: it gives the same training samples in the same order every time.

    The validation split is drawn from all classes, each giving its share, *before* classes are chosen: what a network was
    validated on while it trained on everything is not in the training split of a subset either.

    Args:
        batch_size: Samples in a batch.
        num_workers: Processes that load data; 0 loads in the main process.
        val_size: Training samples, counted over all classes, that are held out for validation; 0 holds out none, and then
            there is no validation.
        train_size: Train on the first so many samples of the shuffled training split only, for small runs.
        classes: Which classes, by index or by name, or a subset by its name; ``None`` takes all. Labels are renumbered from 0
            in the order given.
        seed: Of the splits.
        drop_last: Whether training leaves out the last batch when it is not full. Analysis and evaluation never do.

    Raises:
        ValueError: If a number is out of range, a class is unknown or named twice, or, once the data are read, a split asks for
            more samples than there are.
    """

    all_classes: ClassVar[tuple[str, ...]]
    """Name of every class, in the order of the original labels."""
    subsets: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType({})
    """Sets of classes that have a name of their own."""
    image_shape: ClassVar[tuple[int, int, int]]
    """(C, H, W) of one image."""
    white: ClassVar[float] = 255.0
    mean: ClassVar[tuple[float, ...]] = (0.0,)
    std: ClassVar[tuple[float, ...]] = (1.0,)

    def __init__(
        self,
        batch_size: int = 128,
        num_workers: int = 0,
        val_size: int = 5_000,
        train_size: int | None = None,
        classes: Sequence[int | str] | str | None = None,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__()
        for name, number, least in [
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("val_size", val_size, 0),
            ("train_size", train_size, 1),
            ("seed", seed, 0),
        ]:
            if number is not None and number < least:
                raise ValueError(f"Argument `{name}` must be at least {least} but got {number}.")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.val_size = val_size
        self.train_size = train_size
        self.seed = seed
        self.drop_last = drop_last
        self._chosen = self._choose(classes)

    @abstractmethod
    def _read(self, train: bool) -> Samples:
        """Samples of all classes, under their original labels, from the training or the test part of the set."""

    def _augment(self) -> Callable[[Tensor], Tensor] | None:
        """What changes a training batch of bytes."""
        return None

    @property
    def num_classes(self) -> int:
        """Number of classes chosen, which labels count up to."""
        return len(self._chosen)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of the class of each label."""
        return tuple(self.all_classes[index] for index in self._chosen)

    @override
    def setup(self, stage: str) -> None:
        # Read now, so that what is wrong with the data shows before training begins.
        _ = self._train_and_val if stage in ("fit", "validate") else self._test

    @override
    def train_dataloader(self) -> Batches:
        train, _ = self._train_and_val
        if self.drop_last and len(train[0]) < self.batch_size:
            raise ValueError(
                f"With `drop_last` a batch of {self.batch_size} is never full: there are {len(train[0])} training samples. "
                "Lower `batch_size` or set `drop_last=False`."
            )
        return self._loader(train, self._augment(), shuffle=True, drop_last=self.drop_last)

    @override
    def val_dataloader(self) -> Batches | list[Any]:
        _, val = self._train_and_val
        return self._loader(val) if len(val[0]) else []

    @override
    def test_dataloader(self) -> Batches:
        return self._loader(self._test)

    @override
    def predict_dataloader(self) -> Batches:
        return self._loader(self._test)

    def analysis_dataloader(self) -> Batches:
        """The training samples, all of them, in fixed order and without augmentation: what pruning statistics are taken on."""
        train, _ = self._train_and_val
        return self._loader(train)

    @cached_property
    def _train_and_val(self) -> tuple[Samples, Samples]:
        images, labels = self._read(train=True)
        train, val = split_by_class(labels, self.val_size, self.seed)
        train_images, train_labels = self._of_chosen_classes(images[train], labels[train])
        if self.train_size is not None and self.train_size > len(train_labels):
            raise ValueError(
                f"Argument `train_size` asks for {self.train_size} samples but {type(self).__name__} has {len(train_labels)} "
                "for training, after the validation split and the choice of classes."
            )
        first = slice(self.train_size)
        return (train_images[first], train_labels[first]), self._of_chosen_classes(images[val], labels[val])

    @cached_property
    def _test(self) -> Samples:
        return self._of_chosen_classes(*self._read(train=False))

    def _of_chosen_classes(self, images: Tensor, labels: Tensor) -> Samples:
        renumbered = torch.full((len(self.all_classes),), -1)
        renumbered[list(self._chosen)] = torch.arange(self.num_classes)
        labels = renumbered[labels]
        return images[labels >= 0], labels[labels >= 0]

    def _loader(
        self,
        samples: Samples,
        augment: Callable[[Tensor], Tensor] | None = None,
        shuffle: bool = False,
        drop_last: bool = False,
    ) -> Batches:
        # No persistent workers: theirs is an RNG of their own that a resumed run could not restore.
        return DataLoader(
            ImagesInMemory(*samples, white=self.white, mean=self.mean, std=self.std, augment=augment),
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            drop_last=drop_last,
            pin_memory=torch.cuda.is_available(),
        )

    def _choose(self, classes: Sequence[int | str] | str | None) -> tuple[int, ...]:
        if classes is None:
            return tuple(range(len(self.all_classes)))
        if isinstance(classes, str):
            if classes not in self.subsets:
                known = f"one of {list(self.subsets)}, or " if self.subsets else ""
                raise ValueError(f"Argument `classes` must be {known}a list of classes but got {classes!r}.")
            classes = self.subsets[classes]
        chosen = tuple(self._index(wanted) for wanted in classes)
        if not chosen or len(set(chosen)) < len(chosen):
            raise ValueError(f"Argument `classes` must name at least one class and none twice but got {list(classes)}.")
        return chosen

    def _index(self, wanted: int | str) -> int:
        if wanted in self.all_classes:
            return self.all_classes.index(str(wanted))
        if isinstance(wanted, int) and 0 <= wanted < len(self.all_classes):
            return wanted
        raise ValueError(
            f"Argument `classes` holds {wanted!r}; {type(self).__name__} has classes 0 to {len(self.all_classes) - 1}, "
            f"by name {', '.join(self.all_classes)}."
        )


def split_by_class(labels: Tensor, held_out: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the samples kept and of those held out, every class giving its share of both, each in seeded random order.

    Args:
        labels: ``(N,)`` int64.
        held_out: How many samples are held out; 0, or at least one a class on either side.
        seed: Of the shuffle.

    Raises:
        ValueError: If a class would have no sample on one side.

    Example:
        >>> kept, held_out = split_by_class(torch.tensor([0, 0, 0, 1, 1, 1]), held_out=2, seed=0)
        >>> len(kept), len(held_out)
        (4, 2)
    """
    samples, classes = len(labels), int(labels.bincount().count_nonzero())
    if held_out == 0:
        return torch.randperm(samples, generator=torch.Generator().manual_seed(seed)), torch.empty(0, dtype=torch.int64)
    if not classes <= held_out <= samples - classes:
        raise ValueError(
            f"A split must hold out none of the {samples} samples, or from {classes} (one a class) to {samples - classes}, "
            f"but was asked for {held_out}."
        )
    kept, out = train_test_split(torch.arange(samples).numpy(), test_size=held_out, stratify=labels.numpy(), random_state=seed)
    return torch.from_numpy(kept), torch.from_numpy(out)
