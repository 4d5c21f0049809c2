"""CIFAR-10 and CIFAR-100, with the augmentation and the class subsets of the documents."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100
from typing_extensions import override

from lit_compress.datamodules.images_in_memory import pad_crop_flip
from lit_compress.datamodules.torchvision_images import TorchvisionDataModule


class CIFAR10DataModule(TorchvisionDataModule):
    """50,000 photographs of 32×32 pixels in ten classes to train on and 10,000 to test.

    Batch: ``(images (N, 3, 32, 32) float32, labels (N,) int64)``, each colour channel minus its mean over its standard deviation
    (of pixels in [0, 1]): (.4914, .4822, .4465) and (.2023, .1994, .2010).

    Args:
        data_dir: Folder that holds ``cifar-10-batches-py``. ``None`` takes ``$LIT_COMPRESS_DATA``, or ``./data`` without it.
        download: Whether to fetch the files when they are not there.
        batch_size: Samples in a batch.
        num_workers: Processes that load data; 0 loads in the main process.
        augment: Whether training images are padded by 4 black pixels, cropped at random and mirrored at random, as the
            documents do for all networks but SimpleCNN.
        val_size: Training samples, counted over all classes, held out for validation; 0 leaves validation out.
        train_size: Train on the first so many samples of the shuffled training split only.
        classes: Which classes, by index or name, e.g. ``["cat", "dog"]``; ``None`` takes all. Labels are renumbered from 0 in the
            order given.
        seed: Of the validation split. The order of training batches and the augmentation follow torch's global RNG.
        drop_last: Whether training leaves out the last batch when it is not full.

    Raises:
        FileNotFoundError: If the files are missing or damaged and ``download`` is off.
        ValueError: If a number is out of range, or a class is unknown or named twice.

    Source: Krizhevsky, *Learning Multiple Layers of Features from Tiny Images*, 2009; mean and deviation as in the released
    code of *Moonshine: Distilling with Cheap Convolutions*.

    Example:
        >>> CIFAR10DataModule(classes=["dog", "cat"]).class_names
        ('dog', 'cat')
    """

    dataset_class = CIFAR10
    folder = "cifar-10-batches-py"
    all_classes: ClassVar[tuple[str, ...]] = (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    )
    image_shape = (3, 32, 32)
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2023, 0.1994, 0.2010)

    def __init__(
        self,
        data_dir: str | Path | None = None,
        download: bool = False,
        batch_size: int = 128,
        num_workers: int = 0,
        augment: bool = True,
        val_size: int = 5_000,
        train_size: int | None = None,
        classes: Sequence[int | str] | str | None = None,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__(
            data_dir=data_dir,
            download=download,
            batch_size=batch_size,
            num_workers=num_workers,
            val_size=val_size,
            train_size=train_size,
            classes=classes,
            seed=seed,
            drop_last=drop_last,
        )
        self.augment = augment

    @override
    def _augment(self) -> Callable[[Tensor], Tensor] | None:
        return pad_crop_flip if self.augment else None


class CIFAR100DataModule(CIFAR10DataModule):
    """50,000 photographs of 32×32 pixels in a hundred classes to train on and 10,000 to test.

    Batch: ``(images (N, 3, 32, 32) float32, labels (N,) int64)``, each colour channel minus its mean over its standard deviation
    (of pixels in [0, 1]): (.5071, .4866, .4409) and (.2009, .1984, .2023).

    ``classes`` also takes the name of a subset of PFA's domain adaptation experiments: ``"R1"`` and ``"R2"`` have ten classes,
    ``"S1"`` to ``"S4"`` two. Labels follow the order in which the paper lists them. Images validated on with all classes are
    never trained on with a subset, provided ``val_size`` and ``seed`` are the same.

    Args:
        data_dir: Folder that holds ``cifar-100-python``. ``None`` takes ``$LIT_COMPRESS_DATA``, or ``./data`` without it.
        download: Whether to fetch the files when they are not there.
        batch_size: Samples in a batch.
        num_workers: Processes that load data; 0 loads in the main process.
        augment: Whether training images are padded by 4 black pixels, cropped at random and mirrored at random.
        val_size: Training samples, counted over all classes, held out for validation; 0 leaves validation out. Of the default
            5000, a subset of ten classes has 500.
        train_size: Train on the first so many samples of the shuffled training split only.
        classes: A subset's name, or classes by index or name; ``None`` takes all. Labels are renumbered from 0 in the order
            given.
        seed: Of the validation split. The order of training batches and the augmentation follow torch's global RNG.
        drop_last: Whether training leaves out the last batch when it is not full.

    Raises:
        FileNotFoundError: If the files are missing or damaged and ``download`` is off.
        ValueError: If a number is out of range, or a class or subset is unknown or a class is named twice.

    Source: Krizhevsky, 2009; subsets from *Filter Distillation for Network Compression* (PFA), appendix A; mean and deviation as
    in the released code of *Moonshine: Distilling with Cheap Convolutions*.

    Example:
        >>> CIFAR100DataModule(classes="S2").class_names
        ('aquarium_fish', 'boy')
    """

    dataset_class = CIFAR100
    folder = "cifar-100-python"
    # fmt: off
    all_classes = (
        "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle",
        "bowl", "boy", "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle",
        "chair", "chimpanzee", "clock", "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur",
        "dolphin", "elephant", "flatfish", "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard",
        "lamp", "lawn_mower", "leopard", "lion", "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain",
        "mouse", "mushroom", "oak_tree", "orange", "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree",
        "plain", "plate", "poppy", "porcupine", "possum", "rabbit", "raccoon", "ray", "road", "rocket",
        "rose", "sea", "seal", "shark", "shrew", "skunk", "skyscraper", "snail", "snake", "spider",
        "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank", "telephone", "television", "tiger", "tractor",
        "train", "trout", "tulip", "turtle", "wardrobe", "whale", "willow_tree", "wolf", "woman", "worm",
    )
    subsets = MappingProxyType({
        "R1": (
            "aquarium_fish", "butterfly", "cloud", "elephant", "mountain", "palm_tree", "poppy", "snail", "squirrel", "wardrobe",
        ),
        "R2": ("baby", "camel", "cockroach", "flatfish", "mouse", "pear", "porcupine", "snake", "sunflower", "whale"),
        "S1": ("bowl", "snail"),
        "S2": ("aquarium_fish", "boy"),
        "S3": ("bee", "raccoon"),
        "S4": ("train", "tulip"),
    })
    # fmt: on
    mean = (0.5071, 0.4866, 0.4409)
    std = (0.2009, 0.1984, 0.2023)
