"""Annotations and detections from whatever files hold them: folders, JSON, Matlab."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.io import loadmat

from lit_compress.pedestrians.annotations import (
    LABELS,
    Annotations,
    Damaged,
    Detections,
    Frame,
    numbers,
    read_json,
    refuse_or_skip,
)
from lit_compress.pedestrians.results import read_results
from lit_compress.pedestrians.vbb import read_vbb

_PERSONS = {"person", "pedestrian", "pedestrain"}  # the last is written so in a widespread file of Caltech's annotations
_IGNORED = {*LABELS, "rider", "sitting person", "person (other)", "person group"} - _PERSONS  # Caltech's and CityPersons'


@dataclass(frozen=True)
class Truths:
    """Annotations of images.

    Args:
        annotations: Name of each image to who is in it.
        files: Names to the images' files, as annotations in JSON give them; empty where they give none.
        ids: Numbers of images, by which detections in JSON name them, to names.
        marked: Whether they are made for one subset, and say themselves who is ignored.
    """

    annotations: Mapping[str, Annotations]
    files: Mapping[str, str]
    ids: Mapping[int, str]
    marked: bool = False


def read_truths(
    path: str | Path,
    damaged: Damaged = "raise",
    *,
    from_one: bool = False,
    frames: Sequence[str] | None = None,
    sets: Sequence[str] | None = None,
) -> Truths:
    """Annotations of a folder or a file.

    Args:
        path: A folder of ``setNN/VNNN.vbb`` (or their text form); a ``.json``, as COCO's, CityPersons' or that of Caltech's
            extracted frames (``{"set00": {"V000": {"frames": …}}}``); or a ``.mat`` of cells ``gt``, rows ``[x y w h ignore]``.
        damaged: ``"raise"``, or ``"skip"`` to leave out, with a warning, files of a folder that cannot be read.
        from_one: Whether a JSON as COCO's counts pixels from 1; some that hold Caltech's annotations do. The other formats always
            do, and are converted.
        frames: Names of the images that the cells of a ``.mat`` belong to; without them, they go with another ``.mat`` only.
        sets: Which of Caltech's sets of videos, e.g. ``["set05"]``; all if None. Other images all stay.

    Raises:
        ValueError: If a file is damaged, or none of these; the error names it.
        FileNotFoundError: If there is none.
    """
    path = Path(path)
    if path.is_dir():
        return _videos(path, damaged, sets)
    if path.suffix == ".mat":
        truths = _marked(path, frames)
    else:
        content = read_json(path)
        if isinstance(content, dict) and "annotations" in content and "images" in content:
            truths = _coco(content, path, from_one)
        elif isinstance(content, dict) and content and all(Frame.of(f"{name}_V000_0") for name in content):
            truths = _extracted(content, path)
        else:
            raise ValueError(f"{path} holds neither `images` and `annotations`, as COCO's, nor sets of videos, as Caltech's.")
    if sets is None:
        return truths
    of_sets = {name: (frame := Frame.of(name)) is None or frame.set in sets for name in truths.annotations}
    return replace(truths, annotations={name: one for name, one in truths.annotations.items() if of_sets[name]})


def read_detections(
    path: str | Path, truths: Truths, damaged: Damaged = "raise", *, from_one: bool = False
) -> dict[str, Detections]:
    """Detections of a folder or a file.

    Args:
        path: A folder or a ``.json`` by name as :func:`~lit_compress.pedestrians.results.read_results` reads them; a ``.json``
            list of ``{"image_id", "bbox", "score"}``, as COCO's; or a ``.mat`` with cells ``dt`` of rows ``[x y w h score]``.
        truths: Annotations of the same images.
        damaged: As in :func:`read_truths`.
        from_one: Whether a JSON as COCO's counts pixels from 1.

    Raises:
        ValueError: If a file is damaged, or names an image that has no annotations.
        FileNotFoundError: If there is none.
    """
    path = Path(path)
    if path.is_dir():
        return read_results(path, damaged)
    if path.suffix == ".mat":
        cells = _cells(path, "dt")
        if cells.keys() != truths.annotations.keys():
            raise ValueError(
                f"{path} has {len(cells)} cells without names, which go with a .mat of as many cells of annotations, "
                f"not with {len(truths.annotations)} images by name."
            )
        return {name: Detections(rows[:, :4] - (1, 1, 0, 0), rows[:, 4]) for name, rows in cells.items()}
    content = read_json(path)
    if isinstance(content, dict):
        named = read_results(path)
        if unknown := sorted(named.keys() - truths.annotations.keys()):
            raise ValueError(f"{path}: {len(unknown)} images have no annotations; the first is {unknown[0]!r}.")
        return named
    if not isinstance(content, list):
        raise ValueError(f"{path} is no list of detections, as COCO's are.")
    rows: dict[str, list[Any]] = {name: [] for name in truths.ids.values()}
    for number, one in enumerate(content):
        where = f"{path}, detection {number}"
        if not isinstance(one, dict) or not {"image_id", "bbox", "score"} <= one.keys():
            raise ValueError(f"{where}: expected image_id, bbox and score but got {str(one)[:80]}.")
        if one["image_id"] not in truths.ids:
            raise ValueError(f"{where}: image {one['image_id']} has no annotations.")
        (row,) = numbers([*one["bbox"], one["score"]], 5, where)
        rows[truths.ids[one["image_id"]]].append(row - from_one * np.array([1, 1, 0, 0, 0]))
    return {name: Detections.of(found) for name, found in rows.items()}


def _videos(folder: Path, damaged: Damaged, sets: Sequence[str] | None) -> Truths:
    patterns = (f"{below}set[0-9][0-9]/V[0-9][0-9][0-9]{suffix}" for below in ("", "annotations/") for suffix in (".vbb", ".txt"))
    files = next((found for pattern in patterns if (found := sorted(folder.glob(pattern)))), [])
    if not files:
        raise FileNotFoundError(f"There are no annotations setNN/VNNN.vbb in {folder}, nor in its folder `annotations`.")
    annotations: dict[str, Annotations] = {}
    for file in files:
        if sets is not None and file.parent.name not in sets:
            continue
        try:
            frames = read_vbb(file)
        except ValueError as error:
            refuse_or_skip(str(error), damaged)
            continue
        annotations |= {Frame(file.parent.name, file.stem, index).name: one for index, one in enumerate(frames)}
    return Truths(annotations, {}, {})


def _marked(path: Path, frames: Sequence[str] | None) -> Truths:
    cells = _cells(path, "gt")
    if frames is not None and len(frames) != len(cells):
        raise ValueError(f"{path} has {len(cells)} cells but there are {len(frames)} names.")
    named = zip(frames or cells, cells.values(), strict=True)
    annotations = {name: Annotations.of(rows[:, :4], ignore=rows[:, 4] != 0).from_zero() for name, rows in named}
    return Truths(annotations, {}, {}, marked=True)


def _extracted(content: Mapping[str, Any], path: Path) -> Truths:
    annotations: dict[str, Annotations] = {}
    for set_name, videos in content.items():
        for video, about in videos.items():
            where = f"{path}, {set_name}/{video}"
            if not isinstance(about, dict) or "frames" not in about or "nFrame" not in about:
                raise ValueError(f"{where}: expected `nFrame` and `frames`.")
            for index in range(int(about["nFrame"])):
                found = [one for one in about["frames"].get(str(index), []) if one["lbl"] in LABELS]
                boxes = numbers([one["pos"] for one in found], 4, f"{where}, frame {index}")
                parts = [one["posv"] if np.size(one.get("posv", 0)) == 4 else [0, 0, 0, 0] for one in found]
                annotations[Frame(set_name, video, index).name] = Annotations.of(
                    boxes, [LABELS[one["lbl"]] for one in found], numbers(parts, 4, f"{where}, frame {index}")
                ).from_zero()
    return Truths(annotations, {}, {})


def _coco(content: Mapping[str, Any], path: Path, from_one: bool) -> Truths:
    try:
        files = {image["id"]: image["file_name"] for image in content["images"]}
        names = {one["id"]: str(one["name"]).lower() for one in content.get("categories", [])}
        persons = {number for number, name in names.items() if name in _PERSONS}
        ignored = {number for number, name in names.items() if name in _IGNORED}
        if not persons:
            raise ValueError(f"{path} has no category of persons but {', '.join(names.values()) or 'none at all'}.")
        found: dict[int, list[Mapping[str, Any]]] = {number: [] for number in files}
        for one in content["annotations"]:
            if one["category_id"] in persons | ignored:
                found[one["image_id"]].append(one)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__} {error}.") from None
    ids = {number: Path(file).stem for number, file in files.items()}
    if len(set(ids.values())) < len(ids):
        raise ValueError(f"{path} names two images alike, without folder and suffix.")
    annotations = {}
    for number, rows in found.items():
        where = f"{path}, image {number}"
        boxes = numbers([one.get("bbox") for one in rows], 4, where)
        mine = Annotations.of(
            boxes,
            labels=[LABELS["person" if one["category_id"] in persons else "ignore"] for one in rows],
            visible=numbers([_visible(one, box) for one, box in zip(rows, boxes, strict=True)], 4, where),
            ignore=[bool(one.get("iscrowd")) or bool(one.get("ignore")) for one in rows],
        )
        annotations[ids[number]] = mine.from_zero() if from_one else mine
    return Truths(annotations, {ids[number]: file for number, file in files.items()}, ids)


def _visible(one: Mapping[str, Any], box: Any) -> Any:
    """The visible part; of a box of which only the visible share is known, one of that share."""
    if "vis_bbox" in one:
        return one["vis_bbox"]
    return box * (1, 1, one["vis_ratio"], 1) if "vis_ratio" in one else (0, 0, 0, 0)


def _cells(path: Path, variable: str) -> dict[str, Any]:
    """Rows of each cell, under its number."""
    if not path.exists():
        raise FileNotFoundError(f"There is no {path}.")
    try:
        cells = loadmat(path)[variable].ravel()
        rows = [numbers(cell, 5, f"{path}, cell {index + 1}") for index, cell in enumerate(cells)]
    except KeyError:
        raise ValueError(f"{path} has no variable `{variable}`.") from None
    except ValueError:
        raise
    except Exception as error:  # whatever a damaged Matlab file makes scipy raise
        raise ValueError(f"{path} is no Matlab file, or is damaged ({type(error).__name__}: {error}).") from None
    return {str(index + 1): found for index, found in enumerate(rows)}


def at_interval(truths: Truths, every: int) -> Truths:
    """Only the frames that Caltech's protocol takes: each ``every``-th of a video, the first of them number ``every - 1`` from 0.

    Args:
        truths: Annotations of whole videos; images that are no frames of videos all stay.
        every: 30 for testing, 3 for training on ten times as much; 1 takes all.

    Raises:
        ValueError: If ``every`` is below 1.
    """
    if every < 1:
        raise ValueError(f"Argument `every` must be at least 1 but got {every}.")
    frames = {name: Frame.of(name) for name in truths.annotations}
    kept = {name for name, frame in frames.items() if frame is None or frame.number % every == every - 1}
    return replace(truths, annotations={name: one for name, one in truths.annotations.items() if name in kept})
