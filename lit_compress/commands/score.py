"""``lit-compress score``: miss rates of pedestrian detectors, from the files that hold their detections."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lit_compress.pedestrians.annotations import Damaged, Detections, Frame, scenes_of
from lit_compress.pedestrians.formats import Truths, at_interval, read_detections, read_truths
from lit_compress.pedestrians.pictures import plot_miss_rates
from lit_compress.pedestrians.protocol import MissRateCurve, evaluate
from lit_compress.pedestrians.subsets import SUBSETS, Subset


def main(args: Sequence[str]) -> None:
    """Print a table of log-average miss rates, a row a subset and a column a detector, and draw the curves of one subset."""
    parser = argparse.ArgumentParser(
        prog="lit-compress score",
        description="Score pedestrian detections by Caltech's protocol: log-average miss rates in percent.",
    )
    parser.add_argument("--gt", type=Path, required=True, help="annotations: folder of .vbb files, .json, or .mat of cells `gt`")
    parser.add_argument(
        "--dt",
        action="append",
        required=True,
        metavar="[NAME=]PATH",
        help="detections: folder of text files, .json, or .mat; repeat it",
    )
    parser.add_argument(
        "--subset", action="append", choices=list(SUBSETS), help="who counts; repeat it (default: the common ones)"
    )
    parser.add_argument("--every", type=int, default=30, help="frames of videos that are scored (default: each 30th)")
    parser.add_argument("--frames", type=Path, help="COCO's .json whose images are those of the cells of a .mat, in their order")
    parser.add_argument("--picture", type=Path, help="file for the curves of the first subset, e.g. curves.png")
    parser.add_argument("--as-marked", action="store_true", help="who is ignored is what the annotations mark; implied by a .mat")
    parser.add_argument(
        "--json-from-1", action="store_true", help="boxes in .json count pixels from 1, as Caltech's own files do"
    )
    parser.add_argument("--skip-damaged", action="store_true", help="warn of files that cannot be read, and go on without them")
    options = parser.parse_args(args)
    damaged: Damaged = "skip" if options.skip_damaged else "raise"
    paths = _paths(options.dt)
    frames = None if options.frames is None else list(read_truths(options.frames).annotations)
    # Annotations come for all of Caltech's sets, results for those of the test: a folder of results says which.
    sets = sorted({folder.name for path in paths.values() for folder in path.glob("set[0-9][0-9]")}) or None
    truths = read_truths(options.gt, damaged, from_one=options.json_from_1, frames=frames, sets=sets)
    truths = at_interval(truths, options.every)
    marked = options.as_marked or truths.marked
    common = [name for name in SUBSETS if not name.startswith(("overlap", "expand"))]
    names = options.subset or (["reasonable"] if marked else common)
    subsets = {name: _fitting(SUBSETS[name], truths, marked) for name in names}
    curves = {
        name: _curves(truths, read_detections(path, truths, damaged, from_one=options.json_from_1), subsets)
        for name, path in paths.items()
    }
    print(f"Log-average miss rate in percent, {len(truths.annotations):,} images{f' of {sets[0]} to {sets[-1]}' if sets else ''}")
    _print(curves, names)
    if options.picture is not None:
        figure = plot_miss_rates({name: found[names[0]] for name, found in curves.items()})
        figure.axes[0].set_title(names[0])
        figure.savefig(options.picture, dpi=150)
        print(f"{options.picture}: the curves of {names[0]}")


def _paths(given: Sequence[str]) -> dict[str, Path]:
    """Name of each detector to where its detections are."""
    paths: dict[str, Path] = {}
    for one in given:
        # A path may hold a "=" itself.
        name, _, path = ("", "", one) if Path(one).exists() or "=" not in one else one.partition("=")
        name = name or (Path(path).stem if Path(path).is_file() else Path(path).name)
        if name in paths:
            raise ValueError(f"Two detectors are called {name}; name them apart, as `--dt ours={path}`.")
        paths[name] = Path(path)
    return paths


def _fitting(subset: Subset, truths: Truths, marked: bool) -> Subset:
    """The subset for these images: only Caltech's have the size that its margin is made for."""
    if marked:
        return subset.as_marked()
    return subset if all(Frame.of(name) for name in truths.annotations) else replace(subset, bounds=None)


def _curves(truths: Truths, detections: Mapping[str, Detections], subsets: Mapping[str, Subset]) -> dict[str, MissRateCurve]:
    if detections and not any(name in truths.annotations for name in detections):
        raise ValueError(
            f"None of the {len(detections)} images with detections is one of the {len(truths.annotations)} annotated, "
            f"as {next(iter(truths.annotations), 'none')}."
        )
    nothing = Detections.of([])
    scenes = scenes_of(list(truths.annotations.values()), [detections.get(name, nothing) for name in truths.annotations])
    return {name: evaluate(scenes, subset) for name, subset in subsets.items()}


def _print(curves: Mapping[str, Mapping[str, MissRateCurve]], names: Sequence[str]) -> None:
    table = Table()
    table.add_column("subset")
    table.add_column("persons", justify="right")
    for name in curves:
        table.add_column(name, justify="right")
    for subset in names:
        found = [curve[subset] for curve in curves.values()]
        # NaN: nobody counts.
        rates = [f"{100 * curve.log_average:.4f}" if curve.persons else "-" for curve in found]
        table.add_row(subset, f"{found[0].persons:,}", *rates)
    Console().print(table)
