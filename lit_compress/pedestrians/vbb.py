"""Caltech's annotations: ``.vbb`` files, which are Matlab's, and their text form."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy.io import loadmat

from lit_compress.pedestrians.annotations import LABELS, Annotations, numbers

_OBJECT = re.compile(r"^lbl='(.*)' (?:id=\d+ )?str=(\d+) end=(\d+) hide=(\d+)$", flags=re.MULTILINE)


def read_vbb(path: str | Path) -> list[Annotations]:
    """Who is in each frame of a video.

    Args:
        path: A ``.vbb`` file, or its text form, ``.txt``.

    Returns:
        For each frame the boxes named in :data:`~lit_compress.pedestrians.annotations.LABELS`; others are left out.

    Raises:
        ValueError: If the file is damaged or something else; the error names it.
        FileNotFoundError: If there is none.

    Source: ``vbb`` of Caltech's evaluation code, versions 1.0 to 1.4.
    """
    path = Path(path)
    if path.suffix == ".txt":
        frames, objects = _text(path)
    else:
        frames, objects = _matlab(path)
    rows: list[list[tuple[int, Any, Any]]] = [[] for _ in range(frames)]
    for frame, name, box, visible in objects:
        if not 0 <= frame < frames:
            raise ValueError(f"{path}: an object has a box in frame {frame + 1} of {frames}.")
        if name in LABELS:
            rows[frame].append((LABELS[name], box, visible))
    return [
        Annotations.of(
            boxes=[box for _, box, _ in found],
            labels=[label for label, _, _ in found],
            visible=[visible for _, _, visible in found],
        ).from_zero()
        for found in rows
    ]


def _matlab(path: Path) -> tuple[int, Iterator[tuple[int, str, Any, Any]]]:
    if not path.exists():
        raise FileNotFoundError(f"There is no {path}.")
    try:
        content = loadmat(path, appendmat=False)["A"][0, 0]
        frames, lists = int(content["nFrame"].item()), content["objLists"].ravel()
        names = [str(name.item()) if name.size else "" for name in content["objLbl"].ravel()]
    except Exception as error:  # whatever a damaged Matlab file makes scipy raise
        raise ValueError(f"{path} is no .vbb file, or is damaged ({type(error).__name__}: {error}).") from None
    if len(lists) != frames:
        raise ValueError(f"{path} is damaged: it has {frames} frames but boxes of {len(lists)}.")

    def objects() -> Iterator[tuple[int, str, Any, Any]]:
        for frame, found in enumerate(lists):
            for one in found.ravel() if found.dtype.names else ():
                where = f"{path}, frame {frame + 1}"
                if not 1 <= int(one["id"].item()) <= len(names):
                    raise ValueError(f"{where}: object {one['id'].item()} has no label.")
                (box,) = numbers(one["pos"], 4, where)
                # Before version 1.2 there were no visible boxes; some files write one 0 in place of four.
                part = one["posv"] if "posv" in found.dtype.names and one["posv"].size == 4 else np.zeros(4)
                yield frame, names[int(one["id"].item()) - 1], box, numbers(part, 4, where)[0]

    return frames, objects()


def _text(path: Path) -> tuple[int, Iterator[tuple[int, str, Any, Any]]]:
    content = path.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n")
    head = re.match(r"% vbb version=[\d.]+\s+nFrame=(\d+) n=(\d+)", content)
    if head is None:
        raise ValueError(f"{path} is no text form of a .vbb file: it does not begin with `% vbb version=`.")
    starts = list(_OBJECT.finditer(content))
    if len(starts) != int(head[2]):
        raise ValueError(f"{path} is damaged: it has {len(starts)} of {head[2]} objects.")

    def objects() -> Iterator[tuple[int, str, Any, Any]]:
        for found, after in zip(starts, [*(one.start() for one in starts[1:]), len(content)], strict=True):
            name, first, last = found[1], int(found[2]), int(found[3])
            boxes, parts = (_array(content[found.end() : after], field, f"{path}, object {name!r}") for field in ("pos", "posv"))
            if not len(boxes) == len(parts) == last - first + 1:
                raise ValueError(
                    f"{path}: {name!r} is in frames {first} to {last} but has {len(boxes)} boxes and {len(parts)} parts."
                )
            for frame, (box, part) in enumerate(zip(boxes, parts, strict=True), start=first - 1):
                yield frame, name, box, part

    return int(head[1]), objects()


def _array(content: str, field: str, where: str) -> Any:
    found = re.search(rf"^{field}\s*=\[(.*)\]$", content, flags=re.MULTILINE)
    if found is None:
        raise ValueError(f"{where}: there is no whole `{field}=[…]`.")
    return numbers(found[1].replace(";", " ").split(), 4, where)
