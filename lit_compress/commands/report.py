"""``lit-compress report``: a page about a run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lit_compress.reporting.folder import Run
from lit_compress.reporting.page import page


def main(args: Sequence[str]) -> None:
    """Write one HTML file that tells what a run compressed, and how."""
    parser = argparse.ArgumentParser(
        prog="lit-compress report",
        description="Write one HTML file about a run: what was compressed and how, before and after, layer by layer, training "
        "curves, recipe, environment and the command to repeat it. It needs no server and no network.",
    )
    parser.add_argument(
        "--run", type=Path, required=True, help="folder of the run: the logger's, or the Trainer's default_root_dir"
    )
    parser.add_argument("--out", type=Path, help="file to write (default: report.html in the run's folder)")
    options = parser.parse_args(args)
    out = options.out or options.run / "report.html"
    content = page(Run.load(options.run))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(content, encoding="utf-8")
    print(f"Written to {out}")
