"""A benchmark's command line, and its section of docs/benchmarks.md."""

from __future__ import annotations

import argparse
import inspect
import os
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lit_compress.environment import processor

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"


@dataclass(frozen=True)
class Section:
    """What a benchmark found.

    Args:
        question: Heading.
        target: What is wanted.
        tables: Caption to Markdown table.
        verdicts: Whether the target was met, in sentences with the figures.
        settings: What the figures hang on, such as the batch size.
    """

    question: str
    target: str
    tables: Mapping[str, str]
    verdicts: Sequence[str]
    settings: Mapping[str, object]

    def beside(self, other: Section, where: str) -> Section:
        """This section, and the tables and verdicts of the same benchmark on another device."""
        tables = {**self.tables, **{f"{where}: {caption}": table for caption, table in other.tables.items()}}
        return replace(self, tables=tables, verdicts=[*self.verdicts, *(f"{where}: {verdict}" for verdict in other.verdicts)])

    def markdown(self, command: str, machine: str) -> str:
        """The section, heading first."""
        parts = [f"## {self.question}", f"Target: {self.target}"]
        for caption, table in self.tables.items():
            parts += [f"**{caption}**", table]
        settings = "; ".join([f"`{command}`", *(f"{name} {value}" for name, value in self.settings.items()), machine])
        return "\n\n".join([*parts, "\n".join(f"- {verdict}." for verdict in self.verdicts), f"*{settings}.*"])


def devices() -> dict[str, torch.device]:
    """The devices besides the CPU that are here, by the name of the machine's make."""
    return {torch.cuda.get_device_name(): torch.device("cuda")} if torch.cuda.is_available() else {}


def main(name: str, measure: Callable[..., Section], argv: Sequence[str] | None = None, page: Path = PAGE) -> None:
    """Run a benchmark from the command line and print its section.

    Args:
        name: The benchmark's module.
        measure: Gives the section; told whether to be quick, and the number of rounds if one was given. What takes a ``device``
            as well is measured once more on each of :func:`devices`.
        argv: Arguments; those of the process if None.
        page: Where ``--write`` puts it, if no other page is named.

    Raises:
        ValueError: If ``--write`` names a page that does not exist.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=__doc__)
    parser.add_argument("--rounds", type=int, help="times each thing is measured")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only shows that it runs")
    parser.add_argument("--write", type=Path, nargs="?", const=page, metavar="PAGE", help=f"put the section into {page.name}")
    given = parser.parse_args(argv)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    section: Section = measure(given.quick, given.rounds)
    for where, device in devices().items() if "device" in inspect.signature(measure).parameters else ():
        section = section.beside(measure(given.quick, given.rounds, device=device), where)
    options = " --quick" * given.quick + (f" --rounds {given.rounds}" if given.rounds else "")
    text = section.markdown(f"python -m benchmarks.{name}{options}", machine(load))
    print(text)
    if given.write is not None:
        write(given.write, name, text)


def write(page: Path, name: str, text: str) -> None:
    """Put a section in place of the one of the same name, or at the end; what is written around it by hand stays.

    Raises:
        ValueError: If the page does not exist.
    """
    if not page.exists():
        raise ValueError(f"There is no page {page}; make it first, its introduction is written by hand.")
    begin, end = f"<!-- {name}: written by the benchmark -->", f"<!-- {name}: end -->"
    block = f"{begin}\n{text}\n{end}"
    old = page.read_text(encoding="utf-8")
    new, found = re.subn(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: block, old, flags=re.DOTALL)
    page.write_text(new if found else f"{old.rstrip()}\n\n{block}\n", encoding="utf-8")


def machine(load: float) -> str:
    """What ran: versions, processor, commit, and how busy the machine was before.

    Args:
        load: Load average of the last minute, before the benchmark began.
    """
    return f"torch {torch.__version__}; {processor()}, {os.cpu_count()} cores; load average before {load:.1f}; commit {commit()}"


def commit() -> str:
    """The short hash of what is checked out, with a word on changes to the package."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--", "lit_compress", "callbacks")
        return git("rev-parse", "--short", "HEAD") + (" with changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
