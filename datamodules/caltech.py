"""The Caltech Pedestrian Benchmark: driving through Los Angeles for ten hours."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType

from torch import Tensor
from typing_extensions import override

from lit_compress.datamodules.pedestrian_images import PedestrianDataModule, PedestrianImage, Split, image_file
from lit_compress.datamodules.torchvision_images import data_folder
from lit_compress.pedestrians.annotations import Damaged, Frame, refuse_or_skip
from lit_compress.pedestrians.formats import Truths, at_interval, read_truths
from lit_compress.pedestrians.video import SeqVideo

SETS: Mapping[Split, tuple[str, ...]] = MappingProxyType(
    {
        "train": tuple(f"set{number:02d}" for number in range(5)),
        "val": ("set05",),
        "test": tuple(f"set{number:02d}" for number in range(6, 11)),
    }
)
"""Split to the sets of videos that it takes."""

_LAYOUT = (
    "Put annotations there as annotations/setNN/VNNN.vbb or annotations.json, and videos as setNN/VNNN.seq or frames as "
    "images/setNN_VNNN_INNNNN.jpg; the folder that holds `caltech` is chosen by `data_dir` or the environment variable "
    "LIT_COMPRESS_DATA."
)


class CaltechPedestrianDataModule(PedestrianDataModule):
    """Frames of the Caltech Pedestrian Benchmark, from its own videos or from frames extracted before.

    Batch: as :class:`~lit_compress.datamodules.PedestrianDataModule`. Sets 00 to 04 are for training, 05 for validation, 06 to 10
    for the test.

    In the folder ``caltech``: annotations as ``annotations/set00/V000.vbb`` or as ``annotations.json``; frames as videos
    ``set00/V000.seq``, or as ``images/set00_V000_I00029.jpg`` or ``.png``, counted from 0. Videos are read frame by frame.

    Args:
        data_dir: Folder that holds the set's own folder. ``None`` takes ``$LIT_COMPRESS_DATA``, or ``./data`` without it.
        train_every: Train on every so manieth frame; 3 is "Caltech10x".
        test_every: Validate and test on every so manieth frame.
        batch_size: Frames in a batch.
        num_workers: Processes that load data; 0 loads in the main process.
        augment: Whether training frames are mirrored at random.
        damaged: ``"raise"``, or ``"skip"`` to go on, with warnings, without files and frames that cannot be read.

    Raises:
        FileNotFoundError: If there are no annotations, or no frames of a split.
        ValueError: If a number is out of range or a file is damaged; the error names it.

    Source: Dollár et al., *Pedestrian Detection: An Evaluation of the State of the Art*, 2012; splits of *In Teacher We Trust*,
    section 5.1.

    Example:
        >>> CaltechPedestrianDataModule(train_every=30).train_every
        30
    """

    def __init__(
        self,
        data_dir: str | Path | None = None,
        train_every: int = 3,
        test_every: int = 30,
        batch_size: int = 1,
        num_workers: int = 0,
        augment: bool = True,
        damaged: Damaged = "raise",
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, augment=augment)
        for name, number in (("train_every", train_every), ("test_every", test_every)):
            if number < 1:
                raise ValueError(f"Argument `{name}` must be at least 1 but got {number}.")
        self.root = data_folder(data_dir) / "caltech"
        self.train_every, self.test_every, self.damaged = train_every, test_every, damaged

    @override
    def find_images(self, split: Split) -> Sequence[PedestrianImage]:
        every = self.train_every if split == "train" else self.test_every
        wanted = at_interval(self._truths(split), every).annotations
        images, missing = [], []
        videos: dict[Path, SeqVideo | None] = {}
        for name, who in wanted.items():
            frame = Frame.of(name)
            if frame is None or frame.set not in SETS[split]:
                continue
            if name in self._extracted:
                images.append(image_file(name, self._extracted[name], who))
                continue
            path = self.root / frame.set / f"{frame.video}.seq"
            if path not in videos:
                videos[path] = self._video(path)
            video = videos[path]
            if video is not None and frame.number in video.frames:
                size = (video.height, video.width)
                images.append(PedestrianImage(name, size, partial(frame_of, video, frame.number), who))
            elif video is not None:
                missing.append(name)
        if missing:
            warnings.warn(f"{len(missing)} annotated frames are not in the videos; the first is {missing[0]}.", stacklevel=2)
        if not images:
            raise FileNotFoundError(
                f"There are no annotated frames of {', '.join(SETS[split])} in {self.root.resolve()}. {_LAYOUT}"
            )
        return images

    def _truths(self, split: Split) -> Truths:
        packed = self.root / "annotations.json"
        try:
            return read_truths(packed if packed.exists() else self.root, self.damaged, sets=SETS[split])
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error} {_LAYOUT}") from None

    @cached_property
    def _extracted(self) -> dict[str, Path]:
        files = [*self.root.glob("images/*.jpg"), *self.root.glob("images/*.png")]
        return {frame.name: file for file in files if (frame := Frame.of(file.stem)) is not None}

    def _video(self, path: Path) -> SeqVideo | None:
        try:
            return SeqVideo(path, self.damaged)
        except FileNotFoundError:
            refuse_or_skip(f"There is no {path}, whose frames are annotated.", self.damaged)
        except ValueError as error:
            refuse_or_skip(str(error), self.damaged)
        return None


def frame_of(video: SeqVideo, number: int) -> Tensor:
    """A frame of a video, ``(3, H, W)`` uint8."""
    return video[number]
