"""Detections in the text files that Caltech's evaluation reads or in one JSON by name, and writing them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lit_compress.pedestrians.annotations import FROM_ONE, Damaged, Detections, Frame, numbers, read_json, refuse_or_skip
from lit_compress.pedestrians.protocol import Floats


def read_results(path: str | Path, damaged: Damaged = "raise") -> dict[str, Detections]:
    """Detections of a folder of ``setNN/VNNN.txt`` with rows ``frame,x,y,w,h,score``, or ``setNN/VNNN/I00029.txt`` without frame.

    For images that are no frames of Caltech's, a ``.json`` of ``{name: [[x, y, width, height, score], …]}``, which counts pixels
    from 0.

    Args:
        path: The folder, or the ``.json``.
        damaged: ``"raise"``, or ``"skip"`` to leave out, with a warning, the files that cannot be read.

    Returns:
        Name of each frame that has a row, as in :class:`~lit_compress.pedestrians.annotations.Frame`, to its detections; of a
        ``.json``, of each image that it names.

    Raises:
        ValueError: If a file is damaged; the error names it, and the line or the image.
        FileNotFoundError: If there are no such files.
    """
    folder = Path(path)
    if folder.suffix == ".json":
        return _by_name(folder)
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


def write_results(path: str | Path, detections: Mapping[str, Detections]) -> None:
    """Write detections as ``setNN/VNNN.txt``, which Caltech's evaluation reads; a video without any gets an empty file.

    Args:
        path: The folder; it is made if need be, and files of the same videos are replaced. Or a ``.json``, for images of any
            name.
        detections: Names of Caltech's frames, or of images, to their detections.

    Raises:
        ValueError: If a name is not that of a frame.
    """
    folder = Path(path)
    if folder.suffix == ".json":
        rows_of = {name: np.column_stack([found.boxes, found.scores]).tolist() for name, found in detections.items()}
        folder.write_text(json.dumps(rows_of), encoding="utf-8")
        return
    videos: dict[Path, list[str]] = {}
    for name in sorted(detections):
        frame = Frame.of(name)
        if frame is None:
            raise ValueError(f"Expected names of Caltech's frames, as set06_V000_I00029, but got {name!r}.")
        rows = videos.setdefault(folder / frame.set / f"{frame.video}.txt", [])
        for box, score in zip(detections[name].boxes + FROM_ONE, detections[name].scores, strict=True):
            rows.append(",".join([str(frame.number + 1), *(repr(float(number)) for number in (*box, score))]))
    for file, rows in videos.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{row}\n" for row in rows), encoding="ascii")


def _by_name(file: Path) -> dict[str, Detections]:
    content = read_json(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no detections by the name of their image: {{name: [[x, y, width, height, score], …]}}.")
    return {name: Detections.of(numbers(rows, 5, f"{file}, image {name!r}")) for name, rows in content.items()}


def _rows(file: Path, columns: int) -> Floats:
    lines = file.read_text(encoding="utf-8", errors="replace").replace(",", " ").splitlines()
    cells = [(number, line.split()) for number, line in enumerate(lines, start=1) if line.strip()]
    for number, row in cells:
        if len(row) != columns:
            raise ValueError(f"{file}, line {number}: expected {columns} numbers but got {lines[number - 1]!r}.")
        numbers(row, columns, f"{file}, line {number}")
    return numbers([row for _, row in cells], columns, str(file))
