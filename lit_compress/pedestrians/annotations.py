"""Boxes of one image as files give them, and the frames of Caltech's videos by name."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from lit_compress.pedestrians.protocol import PERSON, Counts, Flags, Floats, Scenes

Damaged = Literal["raise", "skip"]

LABELS: Mapping[str, int] = {"person": PERSON, "people": 2, "person?": 3, "ignore": 4}
"""What Caltech's annotations call a box, by number; boxes of other names take no part."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Annotations:
    """Who is in an image. Boxes are left, top, width and height in pixels; the image begins at 0.

    Args:
        boxes: ``(n, 4)``.
        labels: ``(n,)``, numbers of :data:`LABELS`.
        visible: ``(n, 4)``, the visible parts; all zeros where a box is not occluded.
        ignore: ``(n,)``, ignore regions whatever their labels.

    Raises:
        ValueError: If there are not as many of one as of the other.
    """

    boxes: Floats
    labels: Counts
    visible: Floats
    ignore: Flags

    def __post_init__(self) -> None:
        if not len(self.boxes) == len(self.labels) == len(self.visible) == len(self.ignore):
            raise ValueError(
                f"Expected as many labels, visible parts and marks as the {len(self.boxes)} boxes but got {len(self.labels)}, "
                f"{len(self.visible)} and {len(self.ignore)}."
            )

    @classmethod
    def of(
        cls, boxes: ArrayLike, labels: ArrayLike | None = None, visible: ArrayLike | None = None, ignore: ArrayLike | None = None
    ) -> Annotations:
        """Annotations of boxes that are all persons, not occluded and not ignored where nothing else is said.

        Example:
            >>> Annotations.of([[10, 20, 41, 100]]).labels
            array([1])
        """
        rows = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
        return cls(
            boxes=rows,
            labels=np.full(len(rows), PERSON) if labels is None else np.asarray(labels, dtype=np.int64).reshape(-1),
            visible=np.zeros_like(rows) if visible is None else np.asarray(visible, dtype=np.float64).reshape(-1, 4),
            ignore=np.zeros(len(rows), dtype=np.bool_) if ignore is None else np.asarray(ignore, dtype=np.bool_).reshape(-1),
        )

    def from_zero(self) -> Annotations:
        """The same, if these count pixels from 1."""
        moved = np.where(self.visible.any(axis=1, keepdims=True), self.visible - FROM_ONE, self.visible)
        return replace(self, boxes=self.boxes - FROM_ONE, visible=moved)


class Detections(NamedTuple):
    """What was detected in an image."""

    boxes: Floats
    """``(n, 4)``: left, top, width and height in pixels; the image begins at 0."""
    scores: Floats
    """``(n,)``"""

    @classmethod
    def of(cls, rows: ArrayLike) -> Detections:
        """Detections of rows of left, top, width, height and score."""
        array = np.asarray(rows, dtype=np.float64).reshape(-1, 5)
        return cls(array[:, :4], array[:, 4])


FROM_ONE = np.array([1.0, 1.0, 0.0, 0.0])
"""What a box ``(x, y, width, height)`` has more where pixels count from 1."""


def scenes_of(truths: Sequence[Annotations], detections: Sequence[Detections]) -> Scenes:
    """What an evaluation takes, from the annotations and the detections of each image.

    Raises:
        ValueError: If there are not as many of one as of the other.

    Example:
        >>> scenes_of([Annotations.of([[10, 20, 41, 100]])], [Detections.of([])]).images
        1
    """
    nobody, nothing = Annotations.of([]), Detections.of([])
    return Scenes(
        truths=np.concatenate([nobody.boxes, *(one.boxes for one in truths)]),
        labels=np.concatenate([nobody.labels, *(one.labels for one in truths)]),
        visible=np.concatenate([nobody.visible, *(one.visible for one in truths)]),
        ignore=np.concatenate([nobody.ignore, *(one.ignore for one in truths)]),
        truth_counts=np.array([len(one.boxes) for one in truths], dtype=np.int64),
        detections=np.concatenate([nothing.boxes, *(one.boxes for one in detections)]),
        scores=np.concatenate([nothing.scores, *(one.scores for one in detections)]),
        detection_counts=np.array([len(one.boxes) for one in detections], dtype=np.int64),
    )


class Frame(NamedTuple):
    """A frame of Caltech's videos."""

    set: str
    """Its set, ``"set00"`` to ``"set10"``."""
    video: str
    """Its video, ``"V000"`` and so on."""
    number: int
    """Its place in the video, from 0."""

    @property
    def name(self) -> str:
        """What an extracted image of it is called, without suffix.

        Example:
            >>> Frame("set06", "V000", 29).name
            'set06_V000_I00029'
        """
        return f"{self.set}_{self.video}_I{self.number:05d}"

    @classmethod
    def of(cls, name: str) -> Frame | None:
        """The frame of an image's name, with or without the ``I``; None if it is not one of Caltech's.

        Example:
            >>> Frame.of("set06_V000_29")
            Frame(set='set06', video='V000', number=29)
        """
        found = re.fullmatch(r"(set\d\d)_(V\d{3})_I?(\d+)", name)
        return None if found is None else cls(found[1], found[2], int(found[3]))


def refuse_or_skip(message: str, damaged: Damaged) -> None:
    """A file, or a part of one, cannot be read: an error, or a warning for those who want the rest.

    Raises:
        ValueError: If ``damaged`` is ``"raise"``, or neither that nor ``"skip"``.
    """
    if damaged == "skip":
        warnings.warn(f"{message} It is left out.", stacklevel=3)
    elif damaged == "raise":
        raise ValueError(f'{message} Pass `damaged="skip"` to go on without it.')
    else:
        raise ValueError(f'Argument `damaged` must be "raise" or "skip" but got {damaged!r}.')


def numbers(values: Any, columns: int, where: str) -> Floats:
    """Rows of so many numbers.

    Raises:
        ValueError: If they are not that; ``where`` says in what file.
    """
    try:
        rows = np.asarray(values, dtype=np.float64).reshape(-1, columns)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: expected rows of {columns} numbers but got {str(values)[:80]}.") from None
    if not np.isfinite(rows).all():
        raise ValueError(f"{where}: expected finite numbers but got {str(values)[:80]}.")
    return rows


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: If it is none; the error names the file.
        FileNotFoundError: If there is none.
    """
    if not path.exists():
        raise FileNotFoundError(f"There is no {path}.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f"{path} is no JSON, or is damaged ({error}).") from None
