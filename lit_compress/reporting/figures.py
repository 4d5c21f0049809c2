"""What a page draws: the pictures that callbacks made, and the curves that were logged, with the cuts marked."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from html import escape
from math import isfinite
from typing import Any

from lit_compress.reporting.charts import line_chart
from lit_compress.reporting.folder import Run
from lit_compress.reporting.logs import Curve

_EXPLAINED = {  # no shades by name: dark pages show them inverted
    "Spectra": "The share of response energy that the first directions of each layer hold, a curve a layer. A dot marks how many "
    "channels stay: where curves rise steeply and stay flat, there was much to cut.",
    "Scores": "The scores of each layer's channels, from the highest to the lowest, a curve a layer. A dot marks the last "
    "channel that stays.",
    "Sizes over the run": "Above, the shares of parameters and mult-adds that are left; below, a row a layer, coloured by the "
    "share of its channels. Dotted lines mark the cuts.",
    "Information over time": "The bits that the units of each layer carry, a curve a layer. Dotted lines mark the cuts.",
}
_STAGE = re.compile(r"^(train|training|val|valid|validation|test)[/_]|_(step|epoch)$")
_BITS = "compress/information/"
_AT_ONCE = 6  # charts that are shown before the rest is folded away


def pictures(run: Run) -> str:
    """What the method looked at: the information that was logged, and the pictures of each cut; empty if there is neither."""
    figures = []
    bits = {name.removeprefix(_BITS): curve for name, curve in _drawable(run).items() if name.startswith(_BITS)}
    if bits:
        figures.append(_charts(run, {"Information of each layer's units, bits": bits}, from_zero=True))
    for title, file in run.pictures.items():
        kind = title.partition(",")[0]
        if kind == "Information over time" and bits:
            continue
        explained = _EXPLAINED.get(kind, "")
        data = base64.b64encode(file.read_bytes()).decode()
        figures.append(
            f'<figure><figcaption>{escape(title)}</figcaption><p class="quiet">{escape(explained)}</p>'
            f'<div class="picture" tabindex="0" role="region" aria-label="{escape(title)}, picture">'
            f'<img src="data:image/png;base64,{data}" alt="{escape(explained or title)}"></div></figure>'
        )
    if len(figures) <= 3:
        return "".join(figures)
    rest = "".join(figures[2:])
    return f"{''.join(figures[:2])}<details><summary>{len(figures) - 2} more pictures</summary>{rest}</details>"


def training(run: Run) -> str:
    """A chart for each metric, of training and validation together; if there is none, why."""
    panels: dict[str, dict[str, Curve]] = {}
    for name, curve in _drawable(run).items():
        if name not in ("epoch", "step", "hp_metric") and not name.startswith("compress/"):
            panels.setdefault(_STAGE.sub("", name) or name, {})[name] = curve
    if (drop := _drawable(run).get("compress/drop")) is not None:
        panels["points below the value before the first cut"] = {"compress/drop": drop}
    if not panels:
        reason = f"{run.logged.source} holds none" if run.logged.curves else run.logged.source
        return f"<p>There are no training curves: {escape(reason)}.</p>"
    marked = " Dotted lines mark the cuts." if run.removing else ""
    titles = list(panels)
    rest = {title: panels[title] for title in titles[_AT_ONCE:]}
    more = f"<details><summary>{len(rest)} more charts</summary>{_charts(run, rest)}</details>" if rest else ""
    return (
        f'<p class="quiet">What was logged, read from {escape(run.logged.source)}; beside each name its first and its last '
        f"value.{marked}</p>{_charts(run, {title: panels[title] for title in titles[:_AT_ONCE]})}{more}"
    )


def sizes_over_time(run: Run) -> str:
    """What each cut has left of parameters and mult-adds."""
    first, cuts = run.summary["before"], run.removing
    end = max(_span(run)[1], cuts[-1]["step"])
    curves: dict[str, Curve] = {}
    for name, key in (("parameters", "parameters"), ("mult-adds", "mult_adds")):
        left = [(float(cut["step"]), 100 * cut["after"][key] / max(first[key], 1)) for cut in cuts]
        curves[name] = [(0.0, 100.0), *left, (end, left[-1][1])]
    return _charts(run, {"What is left, %": curves}, stepped=True, from_zero=True)


def _charts(run: Run, panels: Mapping[str, Mapping[str, Curve]], **options: Any) -> str:
    steps = [float(cut["step"]) for cut in run.removing]
    charts = [line_chart(title, curves, span=_span(run), cuts=steps, **options) for title, curves in panels.items()]
    return f'<div class="charts">{"".join(charts)}</div>'


def _drawable(run: Run) -> dict[str, Curve]:
    return {name: curve for name, curve in run.logged.curves.items() if any(isfinite(value) for _, value in curve)}


def _span(run: Run) -> tuple[float, float]:
    """The steps of the run, the same for all charts: from 0, but for a run that was resumed late."""
    steps: Sequence[float] = [step for curve in run.logged.curves.values() for step, _ in curve]
    steps = steps or [float(cut["step"]) for cut in run.cuts] or [0.0]
    return (0.0 if min(steps) <= max(steps) / 4 else min(steps)), max(steps)
