"""Pieces of HTML: tables, code, and numbers with their units."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]], text: int | None = None) -> str:
    """A table that scrolls on its own where it is too wide.

    Args:
        caption: HTML.
        columns: Names of the columns, HTML.
        rows: Cells, HTML; the first of a row is its heading.
        text: Column that holds words, not numbers.
    """

    def cell(index: int, html: str) -> str:
        if index == 0:
            return f'<th scope="row">{html}</th>'
        return f'<td class="text">{html}</td>' if index == text else f"<td>{html}</td>"

    head = "".join(
        f'<th scope="col"{" class=text" if index == text else ""}>{name}</th>' if name else "<td></td>"
        for index, name in enumerate(columns)
    )
    body = "\n".join(f"<tr>{''.join(cell(index, html) for index, html in enumerate(row))}</tr>" for row in rows)
    label = re.sub(r"<[^>]*>", "", caption).partition(".")[0]
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table><caption><span>{caption}</span></caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def block(text: str) -> str:
    """Lines of code."""
    return f"<pre><code>{escape(text)}</code></pre>"


def code(text: str) -> str:
    """Code or a name within a line."""
    return f"<code>{escape(text)}</code>"


def metric(value: float | None) -> str:
    """A value that a module logs; nothing for none."""
    return "" if value is None else f"{value:.4f}"


def count(value: int) -> str:
    """A number of things."""
    return f"{value:,}"


def size(value: int) -> str:
    """A number of bytes."""
    return f"{value / 2**20:,.2f} MiB" if value >= 2**20 else f"{value / 2**10:,.1f} KiB"


def share(before: float, after: float) -> str:
    """What is left, in percent; of nothing, nothing."""
    return f"{100 * after / before:.1f} %" if before else ""


def time(latency: Mapping[str, float]) -> str:
    """The fields of a :class:`~lit_compress.report.Latency`: the median and, on a line of its own, the quartiles."""
    median, lower, upper = (f"{latency[name]:.{2 if latency['median'] >= 1 else 4}f}" for name in ("median", "lower", "upper"))
    return f'{median} ms<span class="spread">{lower} to {upper}</span>'
