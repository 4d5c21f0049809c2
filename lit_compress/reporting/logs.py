"""The numbers that a run's logger has written, over optimizer steps, whichever logger it was."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from lit_compress.reporting.wandb_file import logged, records

Curve: TypeAlias = list[tuple[float, float]]


@dataclass(frozen=True)
class Logged:
    """What was logged.

    Args:
        curves: Name to pairs of step and value, in the order of logging.
        source: What it was read from; of nothing, why.
    """

    curves: Mapping[str, Curve] = field(default_factory=dict)
    source: str = "no logger wrote a file that can be read here: a CSVLogger, TensorBoardLogger or WandbLogger does"


def read_logged(folder: Path) -> Logged:
    """Read the numbers in a run's folder: those of a CSV file, of TensorBoard or of Weights & Biases, the first that is there.

    Args:
        folder: The run's folder.

    Raises:
        ValueError: If a file is not what its name says.
    """
    if (file := folder / "metrics.csv").exists():
        with open(file, encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
        try:
            return Logged(_curves(rows, "step"), file.name)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file} is not a file that a CSVLogger wrote: {error}.") from error
    if next(folder.glob("events.out.tfevents.*"), None) is not None:
        return _tensorboard(folder)
    if (log := newest_wandb_file(folder)) is not None:
        try:
            rows = [logged(record) for record in records(log.read_bytes()) if record.WhichOneof("record_type") == "history"]
        except ValueError as error:
            raise ValueError(f"{log}: {error}") from error
        return Logged(_curves(rows, "trainer/global_step"), log.name)
    return Logged()


def newest_wandb_file(folder: Path) -> Path | None:
    """The file of the last run of Weights & Biases in a folder, offline or not; None if there is none."""
    return max(folder.glob("wandb/*run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime, default=None)


def _tensorboard(folder: Path) -> Logged:
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        return Logged({}, "TensorBoard's files are there, but `tensorboard` is not installed to read them")
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    curves = {name: [(float(one.step), float(one.value)) for one in events.Scalars(name)] for name in events.Tags()["scalars"]}
    return Logged(curves, "TensorBoard's event files")


def _curves(rows: Iterable[Mapping[str, Any]], step: str) -> dict[str, Curve]:
    """Curves out of rows that hold a step and some values; what is no number, such as a picture, is left out."""
    curves: dict[str, Curve] = {}
    for row in rows:
        if row.get(step) in (None, ""):
            continue
        for name, value in row.items():
            if name != step and not name.startswith("_") and value not in (None, "") and not isinstance(value, dict):
                curves.setdefault(name, []).append((float(row[step]), float(value)))
    return curves
