"""Image sets that tests write to disk: in the layout of the real ones, small, of random pixels."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
from PIL import Image


def write_cifar(folder: Path, dataset, train: int, test: int) -> dict[str, dict]:
    """A CIFAR of random pixels, with so many training and test images a class, and its raw content.

    The layout is the original one: pickles of ``data`` (N, 3072) and the labels. torchvision compares MD5 sums with those of
    the real files.

    Args:
        folder: Where the set's own folder is made.
        dataset: The class in torchvision.
        train: Training images a class.
        test: Test images a class.

    Returns:
        What is written as ``"train"`` and ``"test"``, and, as ``"files"``, the class attributes that tell torchvision the names
        and the sums of these files.
    """
    classes, key = (100, "fine_labels") if dataset.base_folder == "cifar-100-python" else (10, "labels")
    place = folder / dataset.base_folder
    place.mkdir()
    generator = np.random.default_rng(0)

    def write(name, content):
        (place / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((place / name).read_bytes()).hexdigest()

    raw, files = {}, {}
    for part, count in (("train", train), ("test", test)):
        labels = generator.permutation(np.repeat(np.arange(classes), count)).tolist()
        raw[part] = {"data": generator.integers(0, 256, (classes * count, 3 * 32 * 32), dtype=np.uint8), key: labels}
        files[f"{part}_list"] = [[part, write(part, raw[part])]]
    names = [f"class {number}" for number in range(classes)]
    files["meta"] = {**dataset.meta, "md5": write(dataset.meta["filename"], {dataset.meta["key"]: names})}
    return {**raw, "files": files}


def write_folders(folder: Path, classes: dict[str, int], parts: tuple[str, ...] = ("train", "val")) -> None:
    """JPEG photographs of noise on a ground of a class's own grey, 80×64 or 64×80, ``classes`` of each in ``<part>/<class>``."""
    generator = np.random.default_rng(0)
    for part in parts:
        for place, (name, count) in enumerate(classes.items()):
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                size = (64, 80, 3) if index % 2 else (80, 64, 3)
                pixels = 40 * (place + 1) + generator.integers(-20, 20, size)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / part / name / f"{index}.JPEG", quality=95)
