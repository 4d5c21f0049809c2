"""Detections in the text files that Caltech's evaluation reads, and writing them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lit_compress.pedestrians.annotations import FROM_ONE, Damaged, Detections, Frame, numbers, refuse_or_skip
from lit_compress.pedestrians.protocol import Floats


def read_results(folder: str | Path, damaged: Damaged = "raise") -> dict[str, Detections]:
    """Detections of a folder of ``setNN/VNNN.txt`` with rows ``frame,x,y,w,h,score``, or ``setNN/VNNN/I00029.txt`` without frame.

    Args:
        folder: The folder.
        damaged: ``"raise"``, or ``"skip"`` to leave out, with a warning, the files that cannot be read.

    Returns:
        Name of each frame that has a row, as in :class:`~lit_compress.pedestrians.annotations.Frame`, to its detections.

    Raises:
        ValueError: If a file is damaged; the error names it and the line.
        FileNotFoundError: If there are no such files.
    """
    folder = Path(folder)
    files = sorted([*folder.glob("set[0-9][0-9]/V[0-9][0-9][0-9].txt"), *folder.glob("set[0-9][0-9]/V[0-9][0-9][0-9]/I*.txt")])
    if not files:
        raise FileNotFoundError(f"There are no files setNN/VNNN.txt or setNN/VNNN/INNNNN.txt in {folder}.")
    found: dict[str, Detections] = {}
    for file in files:
        by_frame = file.parent.parent == folder
        try:
            rows = _rows(file, 6 if by_frame else 5)
            if by_frame and ((rows[:, 0] % 1 != 0) | (rows[:, 0] < 1)).any():
                raise ValueError(f"{file}: frames are whole numbers from 1 on.")
        except ValueError as error:
            refuse_or_skip(f"{error}", damaged)
            continue
        if not by_frame:
            frame = Frame.of(f"{file.parent.parent.name}_{file.parent.name}_{file.stem}")
            if frame is not None:
                found[frame.name] = Detections(rows[:, :4] - FROM_ONE, rows[:, 4])
            continue
        for number in np.unique(rows[:, 0]):
            mine = rows[rows[:, 0] == number]
            name = Frame(file.parent.name, file.stem, int(number) - 1).name
            found[name] = Detections(mine[:, 1:5] - FROM_ONE, mine[:, 5])
    return found


def write_results(folder: str | Path, detections: Mapping[str, Detections]) -> None:
    """Write detections as ``setNN/VNNN.txt``, which Caltech's evaluation reads; a video without any gets an empty file.

    Args:
        folder: Where; it is made if need be, and files of the same videos are replaced.
        detections: Names of Caltech's frames to their detections.

    Raises:
        ValueError: If a name is not that of a frame.
    """
    videos: dict[Path, list[str]] = {}
    for name in sorted(detections):
        frame = Frame.of(name)
        if frame is None:
            raise ValueError(f"Expected names of Caltech's frames, as set06_V000_I00029, but got {name!r}.")
        rows = videos.setdefault(Path(folder) / frame.set / f"{frame.video}.txt", [])
        for box, score in zip(detections[name].boxes + FROM_ONE, detections[name].scores, strict=True):
            rows.append(",".join([str(frame.number + 1), *(repr(float(number)) for number in (*box, score))]))
    for file, rows in videos.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{row}\n" for row in rows), encoding="ascii")


def _rows(file: Path, columns: int) -> Floats:
    lines = file.read_text(encoding="utf-8", errors="replace").replace(",", " ").splitlines()
    cells = [(number, line.split()) for number, line in enumerate(lines, start=1) if line.strip()]
    for number, row in cells:
        if len(row) != columns:
            raise ValueError(f"{file}, line {number}: expected {columns} numbers but got {lines[number - 1]!r}.")
        numbers(row, columns, f"{file}, line {number}")
    return numbers([row for _, row in cells], columns, str(file))
