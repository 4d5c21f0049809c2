"""What the folder of a run holds: the summary that pruning callbacks wrote, recipe, tables, pictures, logs and checkpoints."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from lit_compress.checkpoint import read, read_plan
from lit_compress.recipe import Recipe
from lit_compress.reporting.logs import Logged, newest_wandb_file, read_logged


@dataclass(frozen=True)
class LayerWidth:
    """One layer over a whole run.

    Args:
        name: As in ``model.named_modules()``.
        before: Output channels of the network as it was built; None where a recipe by hand does not say.
        after: Output channels that are left.
        weights: Elements of its weight before the first cut and after the last; None where no table was written.
        note: Why it was left whole, or what it follows.
    """

    name: str
    before: int | None
    after: int
    weights: tuple[int, int] | None = None
    note: str = ""


@dataclass(frozen=True)
class Run:
    """A run, as its folder tells of it.

    Args:
        folder: Where it is.
        summary: What pruning callbacks measured: the content of ``compress/summary.json``; empty if there is none.
        recipe: The channels that are left; None if nothing was cut.
        layers: The same layer by layer, in the order of the forward.
        pictures: Title to a picture's file.
        logged: What its logger wrote.
        settings: The configuration that the run wrote down, a YAML file; None if it wrote none.
        checkpoints: Its checkpoints, the last one first.
        stored: Numbers in the weights of the last checkpoint, before all cuts and after, where no summary says more.
    """

    folder: Path
    summary: Mapping[str, Any]
    recipe: Recipe | None
    layers: Sequence[LayerWidth]
    pictures: Mapping[str, Path]
    logged: Logged
    settings: Path | None
    checkpoints: Sequence[Path]
    stored: tuple[int, int] | None

    @property
    def name(self) -> str:
        """The last two parts of the folder's name: loggers call it ``<experiment>/version_<n>``."""
        return "/".join(self.folder.resolve().parts[-2:]).lstrip("/")

    @property
    def cuts(self) -> Sequence[Mapping[str, Any]]:
        """What was measured at each cut."""
        cuts: Sequence[Mapping[str, Any]] = self.summary.get("cuts", [])
        return cuts

    @property
    def removing(self) -> Sequence[Mapping[str, Any]]:
        """Those cuts that have removed something: a method may also find that nothing is left to remove."""
        return [cut for cut in self.cuts if cut["after"]["parameters"] < cut["before"]["parameters"]]

    @classmethod
    def load(cls, folder: Path) -> Run:
        """Read a run's folder.

        Raises:
            ValueError: If it is not one, with the next that is; or if one of its files is damaged.
        """
        _refuse_other(folder)
        own = folder / "compress"
        summary = _summary(own / "summary.json")
        cuts = len(summary.get("cuts", []))
        recipe = Recipe.load(own / "recipe.json") if (own / "recipe.json").exists() else None
        checkpoints = sorted(_checkpoints(folder), key=lambda path: path.stat().st_mtime, reverse=True)
        stored = None
        if not summary and checkpoints:  # cut before it began, or by hand: only the checkpoint knows
            content = read(checkpoints[0])
            if (plan := read_plan(content)) is not None:
                recipe = plan.recipe
                shapes = {name: tuple(tensor.shape) for name, tensor in content["state_dict"].items()}
                before = sum(prod(plan.shapes.get(name, shape)) for name, shape in shapes.items())
                stored = before, sum(map(prod, shapes.values()))
        tables = [_table(own / f"cut_{index}_layers.csv") for index in range(cuts)]
        settings = (folder / name for name in ("config.yaml", "hparams.yaml"))
        return cls(
            folder=folder,
            summary=summary,
            recipe=recipe,
            layers=[] if recipe is None else _layers(recipe, tables),
            pictures=_pictures(own, cuts),
            logged=read_logged(folder),
            settings=next((file for file in settings if file.exists() and file.stat().st_size), None),
            checkpoints=checkpoints,
            stored=stored,
        )


_SIGNS = (
    "compress/summary.json", "compress/recipe.json", "compress/sizes.csv", "metrics.csv", "events.out.tfevents.*",
    "wandb/*run-*/run-*.wandb", "checkpoints/*.ckpt",
)  # fmt: skip


def _is_run(folder: Path) -> bool:
    return any(next(folder.glob(sign), None) is not None for sign in _SIGNS)


def _refuse_other(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"{folder} is {'a file' if folder.exists() else 'not there'}; give the folder of a run.")
    if _is_run(folder):
        return
    near = [one for depth in ("*", "*/*") for one in folder.glob(depth) if one.is_dir() and _is_run(one)]
    near = near or [one for one in list(folder.resolve().parents)[:2] if _is_run(one)]
    newest = max(near, key=lambda path: path.stat().st_mtime, default=None)
    raise ValueError(
        f"{folder} is not the folder of a run: it holds no logs, no checkpoints and no `compress` folder. "
        + (f"Did you mean {newest}?" if newest else "Give the one that the logger wrote to, or the Trainer's default_root_dir.")
    )


def _summary(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        summary: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}.") from error
    if not isinstance(summary, dict) or not {"cuts", "environment", "network"} <= summary.keys():
        raise ValueError(f"{file} was not written by this version of lit-compress: it does not tell its cuts one by one.")
    return summary


def _checkpoints(folder: Path) -> list[Path]:
    """The run's checkpoints; those beside a run of Weights & Biases are in a folder with its id."""
    log = newest_wandb_file(folder)
    beside = [] if log is None else list(folder.glob(f"*/{log.stem.removeprefix('run-')}/checkpoints/*.ckpt"))
    return [*folder.glob("checkpoints/*.ckpt"), *beside]


def _table(file: Path) -> dict[str, dict[str, str]]:
    """Layer name to its row in the table of one cut; empty if the cut was made by a run that this one has gone on from."""
    if not file.exists():
        return {}
    with open(file, encoding="utf-8", newline="") as stream:
        return {row["layer"]: row for row in csv.DictReader(stream)}


def _layers(recipe: Recipe, tables: Sequence[Mapping[str, Mapping[str, str]]]) -> list[LayerWidth]:
    layers = []
    forward = tables[-1] if tables else {}  # in this order; a recipe of several cuts has another one
    for name in dict.fromkeys([*(name for name in forward if name in recipe.original), *(recipe.original or recipe.keep)]):
        rows = [table[name] for table in tables if name in table]
        before = recipe.original.get(name)
        after = len(recipe.keep[name]) if name in recipe.keep else recipe.original[name]
        weights = (int(rows[0]["weights"]), int(rows[-1]["weights kept"])) if rows and len(rows) == len(tables) else None
        layers.append(LayerWidth(name, before, after, weights, rows[-1]["note"] if rows else ""))
    return layers


def _pictures(folder: Path, cuts: int) -> dict[str, Path]:
    """Title to file: what a cut's method saw, and what a monitor drew. The widths are in the page's own table."""
    files: dict[str, Path] = {}
    for index in range(cuts):
        for file in sorted(folder.glob(f"cut_{index}_*.png")):
            if (kind := file.stem.removeprefix(f"cut_{index}_")) != "widths":
                files[f"{kind.replace('_', ' ').capitalize()}{f', cut {index + 1}' if cuts > 1 else ''}"] = file
    if (history := folder / "history.png").exists():
        files["Sizes over the run"] = history
    return files
