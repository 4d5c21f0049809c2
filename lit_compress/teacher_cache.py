"""What a teacher gives for a whole data set, kept on disk, and the samples it was given for."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from typing_extensions import override

from lit_compress import ranks, rng
from lit_compress.statistics.gather import Progress
from lit_compress.teacher import Teacher

FORMAT = 1
_PROBES = 64  # samples that stand for a data set in its fingerprint


class SeededSamples(Dataset[Any]):
    """A data set in which a sample's augmentation follows from its index and the number of a variant alone.

    Python's, numpy's and torch's generators are seeded for each sample by ``seed``, index and variant, and are afterwards as they
    were. What draws from a generator of its own is not under this control; a cache notices, and refuses.

    Args:
        dataset: Samples by index, each ``(inputs, label)``, perhaps augmented at random.
        variants: Augmentations of each sample. Which one is seen is drawn from torch's generator, each time anew.
        seed: Of all augmentations.

    Raises:
        ValueError: If the data set has no length, or a number is out of range.

    Example:
        >>> class Noise(Dataset):
        ...     def __len__(self):
        ...         return 3
        ...     def __getitem__(self, index):
        ...         return torch.rand(()), index
        >>> samples = SeededSamples(Noise(), variants=2)
        >>> samples.at([(1, 0)]) == samples.at([(1, 0)]) != samples.at([(1, 1)])
        True
    """

    def __init__(self, dataset: Dataset[Any], variants: int = 1, seed: int = 0) -> None:
        if not hasattr(dataset, "__len__"):
            raise ValueError(f"{type(dataset).__name__} has no length, and only samples that are counted can be told apart.")
        for name, number, least in [("variants", variants, 1), ("seed", seed, 0)]:
            if number < least:
                raise ValueError(f"Argument `{name}` must be at least {least} but got {number}.")
        self.dataset: Any = dataset
        self.variants, self.seed = variants, seed

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def rows(self) -> int:
        """Samples times variants."""
        return len(self) * self.variants

    def row(self, index: int, variant: int) -> int:
        """Where a variant of a sample stands in a cache."""
        return variant * len(self) + index

    def draw(self, indices: Sequence[int]) -> list[tuple[int, int]]:
        """A variant for each index."""
        if self.variants == 1:
            return [(index, 0) for index in indices]
        return list(zip(indices, torch.randint(self.variants, (len(indices),)).tolist(), strict=True))

    def at(self, places: Iterable[tuple[int, int]]) -> list[Any]:
        """The samples at pairs of index and variant."""
        samples = []
        with rng.isolated():
            for index, variant in places:
                # Neighbouring seeds give unrelated streams in none of the three generators unless they are mixed.
                seed = zlib.crc32(f"{self.seed} {index} {variant}".encode())
                random.seed(seed)
                np.random.seed(seed)
                torch.default_generator.manual_seed(seed)
                samples.append(self.dataset[index])
        return samples

    @override
    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        return self.at(self.draw(indices))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the number of samples, variants and seed, and of up to 64 samples' inputs as they are, augmented."""
        digest = hashlib.sha256(f"{len(self)} {self.variants} {self.seed}".encode())
        rows = np.unique(np.linspace(0, self.rows - 1, min(_PROBES, self.rows)).astype(int)).tolist()
        for inputs, *_ in self.at((row % len(self), row // len(self)) for row in rows):
            if not isinstance(inputs, Tensor):
                raise ValueError(f"Expected samples (inputs, label) with a tensor of inputs but got a {type(inputs).__name__}.")
            digest.update(f"{inputs.dtype} {tuple(inputs.shape)} {_checksum(inputs)}".encode())
        return digest.hexdigest()


class TeacherCache:
    """Readings of a teacher for every row of :class:`SeededSamples`, in memory-mapped files.

    The folder holds ``cache.json`` (what was cached, and fingerprints of teacher and data), one ``.npy`` file a reading, a
    checksum of each row's inputs, and which blocks of rows are there. Blocks are written whole: a run that is interrupted goes on
    where it stopped, several processes of one machine write to the same files, and whoever comes later only reads.

    A cache is stale if the teacher's weights or architecture, what is read of it, or the data have changed: it is then refused,
    by name, and never used. Since the fingerprint of the data holds some of the samples alone, every batch that is read is
    checked against the checksums of its inputs; they also reveal an augmentation that is not reproducible.

    Args:
        folder: Where the files lie. Made if it is not there.
        teacher: What is read.
        samples: What it is read for.
        block: Rows that are computed and written together.

    Raises:
        ValueError: If the cache in the folder is stale, was written by a later version of this package, or the disk is too full
            for a new one.
    """

    def __init__(self, folder: str | Path, teacher: Teacher, samples: SeededSamples, block: int = 256) -> None:
        if block < 1:
            raise ValueError(f"Argument `block` must be at least 1 but got {block}.")
        self.folder, self.samples = Path(folder), samples
        about = {
            "format": FORMAT,
            "teacher": teacher.fingerprint,
            "readings": [*teacher.readings, f"{teacher.passes} passes" if teacher.sampled else ""],
            "data": samples.fingerprint,
        }
        if not (self.folder / "cache.json").exists():
            self._create(teacher, about, block)
        self._about: dict[str, Any] = json.loads((self.folder / "cache.json").read_text(encoding="utf-8"))
        for entry, value in about.items():
            if self._about.get(entry) != value:
                raise ValueError(
                    f"The teacher cache in {self.folder} is stale: its {entry} was {self._about.get(entry)} and is now {value}. "
                    "Remove the folder, or name another one."
                )

    # ---------------------------------------------------------------- filling

    def fill(self, teacher: Teacher, device: torch.device, progress: Progress | None = None) -> None:
        """Compute what is missing. Every rank of a process group calls it and does its share.

        Dropout passes are seeded by block, so that the number of ranks and interruptions make no difference.

        Args:
            teacher: The one that the cache is of.
            device: To compute on. The teacher is on the CPU afterwards.
            progress: Shows how far this rank is.

        Raises:
            ValueError: If blocks are missing in the end, since the ranks do not share the folder.
        """
        with ranks.as_one():
            mine = ranks.share(self.missing())[0][ranks.rank() :: ranks.world_size()]
            for block in mine if progress is None else progress(mine, len(mine)):
                self._fill_block(block, teacher, device)
            teacher.network.cpu()
            ranks.share(None)  # all have written
            if missing := self.missing():
                raise ValueError(
                    f"{len(missing)} blocks of the teacher cache in {self.folder} are missing after all ranks have written "
                    "theirs. The folder must be one that they share, with memory maps."
                )

    def missing(self) -> list[int]:
        """Blocks that are not there yet."""
        return [int(block) for block in np.flatnonzero(~self._done)]

    def _fill_block(self, block: int, teacher: Teacher, device: torch.device) -> None:
        size, length = self._about["block"], len(self.samples)
        rows = range(block * size, min((block + 1) * size, self.samples.rows))
        inputs = [sample[0] for sample in self.samples.at((row % length, row // length) for row in rows)]
        with rng.isolated():
            torch.manual_seed(block)
            readings = teacher.read(default_collate(inputs).to(device))
        place = slice(rows.start, rows.stop)
        for name, array in self._arrays.items():
            array[place] = _as_array(readings[name])
            array.flush()
        self._checksums[place] = [_checksum(one) for one in inputs]
        self._checksums.flush()
        self._done[block] = True  # after what it says is there
        self._done.flush()

    # ---------------------------------------------------------------- reading

    def read(self, places: Sequence[tuple[int, int]], inputs: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """What the teacher gave, for each sample.

        Args:
            places: Pairs of index and variant.
            inputs: Of these samples, as they are now.

        Raises:
            ValueError: If the inputs are not those that the teacher saw.
        """
        rows = [self.samples.row(index, variant) for index, variant in places]
        for row, (index, variant), known, one in zip(rows, places, self._checksums[rows], inputs, strict=True):
            if not self._done[row // self._about["block"]]:
                raise ValueError(f"The teacher cache in {self.folder} is not filled as far as sample {index}, variant {variant}.")
            if _checksum(one) != known:
                raise ValueError(
                    f"Sample {index}, variant {variant}, is not what the teacher saw when the cache in {self.folder} was filled. "
                    "Either the data have changed, and the folder should be removed; or an augmentation draws from a generator "
                    "of its own, and cannot be cached."
                )
        columns = {name: torch.from_numpy(array[rows]) for name, array in self._arrays.items()}
        return [{name: column[position] for name, column in columns.items()} for position in range(len(rows))]

    # ---------------------------------------------------------------- files

    @cached_property
    def _arrays(self) -> dict[str, np.memmap[Any, Any]]:
        return {name: self._map(file) for name, file in self._about["files"].items()}

    @cached_property
    def _checksums(self) -> np.memmap[Any, Any]:
        return self._map("inputs.npy")

    @cached_property
    def _done(self) -> np.memmap[Any, Any]:
        return self._map("done.npy")

    def _map(self, file: str) -> np.memmap[Any, Any]:
        mapped: np.memmap[Any, Any] = np.lib.format.open_memmap(self.folder / file, mode="r+")
        return mapped

    def _create(self, teacher: Teacher, about: Mapping[str, Any], block: int) -> None:
        """Make the files under another name and rename the folder, so that there is never half a cache under its own."""
        rows = self.samples.rows
        with rng.isolated():
            example = teacher.read(default_collate([sample[0] for sample in self.samples.at([(0, 0)])]))
        arrays = {name: _as_array(value) for name, value in example.items()}
        needed = rows * sum(array.nbytes for array in arrays.values())
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(self.folder.parent).free) < needed:
            raise ValueError(
                f"The teacher cache would take {needed / 1e9:.2f} GB, for {rows} samples, but {self.folder.parent} has "
                f"{free / 1e9:.2f} GB left. Read fewer or later layers, or lower `variants`."
            )
        begun = self.folder.with_name(f"{self.folder.name}.{os.getpid()}.part")
        shutil.rmtree(begun, ignore_errors=True)
        begun.mkdir()
        files = {name: f"reading_{number}.npy" for number, name in enumerate(arrays)}
        for name, array in arrays.items():
            np.lib.format.open_memmap(begun / files[name], "w+", array.dtype, (rows, *array.shape[1:]))
        np.lib.format.open_memmap(begun / "inputs.npy", "w+", np.uint32, (rows,))
        np.lib.format.open_memmap(begun / "done.npy", "w+", np.bool_, (-(-rows // block),))
        (begun / "cache.json").write_text(json.dumps({**about, "block": block, "files": files}, indent=2), encoding="utf-8")
        try:
            begun.rename(self.folder)
        except OSError:  # another process was first, or the folder holds something else
            shutil.rmtree(begun)
            if not (self.folder / "cache.json").exists():
                raise ValueError(f"{self.folder} holds files, but no teacher cache. Name another folder.") from None

    def __getstate__(self) -> dict[str, Any]:
        # Another process, such as one that loads data, maps the files itself; pickled maps would be copies of them.
        return {name: value for name, value in vars(self).items() if name not in ("_arrays", "_checksums", "_done")}


class SamplesWithReadings(Dataset[Any]):
    """Seeded samples, each with what the teacher gives for it: ``(inputs, label, {reading: value})``.

    Args:
        cache: Filled.
    """

    def __init__(self, cache: TeacherCache) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return len(self.cache.samples)

    @override
    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        places = self.cache.samples.draw(indices)
        samples = self.cache.samples.at(places)
        readings = self.cache.read(places, [sample[0] for sample in samples])
        return [(*sample[:2], values) for sample, values in zip(samples, readings, strict=True)]


def _checksum(inputs: Tensor) -> int:
    return zlib.crc32(inputs.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _as_array(value: Tensor) -> Any:
    return (value.float() if value.dtype == torch.bfloat16 else value).detach().cpu().numpy()
