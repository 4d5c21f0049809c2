"""The page of a run: one HTML file that needs neither a server nor the network."""

from __future__ import annotations

import base64
import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from math import isfinite, prod
from pathlib import Path
from string import Template
from typing import Any

from lit_compress.recipe import single_methods
from lit_compress.report import Latency
from lit_compress.reporting.charts import line_chart
from lit_compress.reporting.folder import LayerWidth, Run
from lit_compress.reporting.logs import Curve

# Nothing is loaded from anywhere, and nothing runs: the policy makes browsers see to it.
_PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>$title</title>
<style>
$style</style>
</head>
<body>
<header>
<h1>$name</h1>
$lead
<nav aria-label="Contents"><ul>$contents</ul></nav>
</header>
<main>
$sections
</main>
<footer><p>Written by <code>lit-compress report</code>. The page holds everything that it shows.</p></footer>
</body>
</html>
""")
_METHODS = {
    "pfa": "Principal Filter Analysis keeps as many channels of each layer as their responses have independent directions, "
    "and of those that say the same, one.",
    "pib": "The Parametric Information Bottleneck removes sigmoid units that carry less than half a bit.",
    "vib": "The Variational Information Bottleneck trains a gate of noise for each channel, and removes those that noise drowns.",
    "magnitude": "Filters with the smallest weights were removed.",
    "slimming": "Channels whose batch norms scale them the least were removed.",
    "random": "Channels were removed at random.",
}
_PICTURES = {  # no shades by name: dark pages show them inverted
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


def page(run: Run) -> str:
    """The HTML of a run's page.

    Args:
        run: What its folder holds.
    """
    sections = {
        "Before and after": _before_and_after(run),
        "Cut by cut": _cut_by_cut(run),
        "Layers": _layers(run.layers),
        "What the method saw": _pictures(run),
        "Training": _training(run),
        "Recipe": _recipe(run),
        "Environment": _environment(run),
        "Repeat it": _repeat(run),
    }
    shown = {title: html for title, html in sections.items() if html}
    return _PAGE.substitute(
        title=escape(f"{run.name}: what was compressed"),
        style=Path(__file__).with_name("page.css").read_text(encoding="utf-8"),
        name=escape(run.name),
        lead=_lead(run),
        contents="".join(f'<li><a href="#{_anchor(title)}">{title}</a></li>' for title in shown),
        sections="\n".join(
            f'<section aria-labelledby="{_anchor(title)}"><h2 id="{_anchor(title)}">{title}</h2>\n{html}</section>'
            for title, html in shown.items()
        ),
    )


# ---------------------------------------------------------------- what comes first


def _lead(run: Run) -> str:
    cuts = run.cuts
    if not cuts and run.recipe is not None:
        how = f"The network was cut by {_code(run.recipe.method)}."
    elif not cuts:
        how = "Nothing was cut in this run."
    elif len(cuts) == 1:
        how = f"Cut once, before epoch {cuts[0]['epoch']}, by {_code(cuts[0]['recipe'])}."
    else:
        epochs = _listed([str(cut["epoch"]) for cut in cuts])
        how = f"Cut {len(cuts)} times, before epochs {epochs}, by {_code(run.summary['method'])}."
    network = f" What was trained: {_code(run.summary['network'])}." if run.summary else ""
    explained = [_METHODS[name] for name in _method_names(run) if name in _METHODS]
    parts = [f'<p class="lead">{how}{network}</p>', *(f'<p class="quiet">{escape(one)}</p>' for one in explained)]
    if run.summary and "fine_tuned" not in run.summary:
        parts.append(
            '<p class="warning">This run has not come to its end: it goes on, or was interrupted. There are no fine-tuned '
            "figures.</p>"
        )
    return "\n".join([*parts, _tiles(run)])


def _method_names(run: Run) -> list[str]:
    methods = single_methods(run.recipe.method) if run.recipe is not None else []
    # "0.5 of pfa(energy=0.9)": a milder cut than what was chosen.
    return list(dict.fromkeys(method.rpartition(" of ")[2].partition("(")[0] for method in methods))


def _tiles(run: Run) -> str:
    if not run.cuts:
        return ""
    before, after, tuned = run.summary["before"], run.summary["after_cut"], run.summary.get("fine_tuned", {})
    tiles = []
    for name in _first_metrics(before["metrics"]):
        last = tuned.get(name, after["metrics"].get(name))
        when = "fine-tuned" if name in tuned else "after the cut"
        if last is not None:
            tiles.append((f"{name}, {when}", _metric(last), f"{_metric(before['metrics'][name])} before"))
    for name, key, form in _SIZES:
        tiles.append((f"{name} kept", _share(before[key], after[key]), f"{form(before[key])} to {form(after[key])}"))
    tiles.append(("time of a step", _speed(run), f"batch of {run.summary['batch_size']}, in turns"))
    cells = "".join(
        f'<div><dt>{escape(name)}</dt><dd class="large">{value}</dd><dd class="quiet">{below}</dd></div>'
        for name, value, below in tiles
    )
    return f'<dl class="tiles">{cells}</dl>'


def _first_metrics(metrics: Mapping[str, float]) -> list[str]:
    """The one or two that a reader wants to know first: no losses, if there is anything else."""
    return ([name for name in metrics if "loss" not in name] or list(metrics))[:2]


# ---------------------------------------------------------------- sections


def _before_and_after(run: Run) -> str:
    if run.stored is not None:
        before, after = run.stored
        row = ["numbers in the weights", f"{before:,}", f"{after:,}", _share(before, after)]
        caption = (
            f"Read from {_code(run.checkpoints[0].name)}: the network was cut without a pruning callback, which measures more."
        )
        return _table(caption, ["", "before", "after", "kept"], [row])
    if not run.cuts:
        return ""
    summary = run.summary
    before, after, tuned = summary["before"], summary["after_cut"], summary.get("fine_tuned")
    ends = [] if tuned is None else ["fine-tuned"]
    rows = []
    for name, value in before["metrics"].items():
        cut, last = after["metrics"].get(name), (tuned or {}).get(name)
        change = "" if last is None else f"{last - value:+.4f}"
        rows.append([escape(name), _metric(value), _metric(cut), *([_metric(last)] if ends else []), change])
    for name, key, form in _SIZES:
        old, new = before[key], after[key]
        rows.append([name, form(old), form(new), *([form(new)] if ends else []), f"{_share(old, new)} kept"])
    blank = [""] if ends else []
    step = f"step, batch of {summary['batch_size']}"
    rows.append([step, _time(before), _time(after), *blank, f"{_speed(run)} of the time"])
    for key, what in (("R_n", "outputs of the layers (R_n)"), ("R_w", "weights of the layers (R_w)")):
        rows.append([what, "", "", *blank, f"{100 * summary['ratios'][key]:.1f} % kept"])
    turns = (
        "at each cut in turns with the network before it, and the change is that of all these pairs together"
        if len(run.cuts) > 1
        else "in turns"
    )
    caption = (
        "Before the first cut, and right after the last one without any training. Mult-adds are of one sample, memory is that of "
        "weights and buffers. A step is one of validation: its median time and, below, the quartiles, measured "
        f"{turns}, on {escape(summary['environment']['device'])}."
    )
    return _table(caption, ["", "before", "after the cut", *ends, "change"], rows)


def _cut_by_cut(run: Run) -> str:
    if len(run.cuts) < 2:
        return ""
    metrics = _first_metrics(run.cuts[0]["before"]["metrics"])
    columns = ["cut", "before epoch", "parameters", "mult-adds", "time of a step", *map(escape, metrics), "by"]
    rows = []
    for number, cut in enumerate(run.cuts, 1):
        before, after = cut["before"], cut["after"]
        sizes = [f"{after[key]:,}" for key in ("parameters", "mult_adds")]
        values = [f"{_metric(before['metrics'].get(name))} → {_metric(after['metrics'].get(name))}" for name in metrics]
        rows.append([str(number), str(cut["epoch"]), *sizes, _time(after), *values, _code(cut["recipe"])])
    caption = "What each cut left, and what the metrics were right before and right after it."
    chart = ""
    if ends := [points[-1][0] for points in run.logged.curves.values()]:
        chart = _left_over_time(run, max(ends))
    return _table(caption, columns, rows, text=len(columns) - 1) + chart


def _left_over_time(run: Run, end: float) -> str:
    first = run.summary["before"]
    steps = [cut["step"] for cut in run.cuts]
    curves: dict[str, Curve] = {}
    for name, key, _ in _SIZES[:2]:
        left = [100 * cut["after"][key] / max(first[key], 1) for cut in run.cuts]
        curves[name] = [(0.0, 100.0), *zip(steps, left, strict=True), (max(end, steps[-1]), left[-1])]
    return f'<div class="charts">{line_chart("What is left, %", curves, cuts=steps, stepped=True, from_zero=True)}</div>'


def _layers(layers: Sequence[LayerWidth]) -> str:
    if not layers:
        return ""
    with_weights = any(layer.weights for layer in layers)
    rows = []
    for layer in layers:
        weights = "" if layer.weights is None else f"{layer.weights[0]:,} → {layer.weights[1]:,}"
        kept = ""
        if layer.before is not None:
            share = 100 * layer.after / max(layer.before, 1)
            kept = f'<span class="bar" aria-hidden="true"><i style="width:{share:.1f}%"></i></span>{share:.0f} %'
        before = "" if layer.before is None else str(layer.before)
        rows.append([_code(layer.name), before, str(layer.after), kept, *([weights] if with_weights else []), escape(layer.note)])
    caption = "Output channels of each layer, in the order of the forward: as it was built, and what is left."
    columns = [
        "layer",
        "built with",
        "left",
        "kept",
        *(["weights"] if with_weights else []),
        "note",
    ]
    return _table(caption, columns, rows, text=len(columns) - 1)


def _pictures(run: Run) -> str:
    figures = []
    for title, file in run.pictures.items():
        kind = title.partition(",")[0]
        if kind == "Information over time" and any(name.startswith(_BITS) for name in run.logged.curves):
            continue  # drawn below, from the numbers
        explained = _PICTURES.get(kind, "")
        data = base64.b64encode(file.read_bytes()).decode()
        figures.append(
            f'<figure><figcaption>{escape(title)}</figcaption><p class="quiet">{escape(explained)}</p>'
            f'<div class="picture" tabindex="0" role="region" aria-label="{escape(title)}, picture">'
            f'<img src="data:image/png;base64,{data}" alt="{escape(explained or title)}"></div></figure>'
        )
    bits = {
        name.removeprefix(_BITS): curve
        for name, curve in run.logged.curves.items()
        if name.startswith(_BITS) and _drawable(curve)
    }
    if bits:
        title = "Information of each layer's units, bits"
        figures.append(f'<div class="charts">{line_chart(title, bits, cuts=_steps(run), from_zero=True)}</div>')
    if len(figures) <= 3:
        return "".join(figures)
    rest = "".join(figures[2:])
    return f"{''.join(figures[:2])}<details><summary>{len(figures) - 2} more pictures</summary>{rest}</details>"


def _training(run: Run) -> str:
    panels: dict[str, dict[str, Curve]] = {}
    for name, curve in run.logged.curves.items():
        if name not in ("epoch", "step", "hp_metric") and not name.startswith("compress/") and _drawable(curve):
            panels.setdefault(_STAGE.sub("", name), {})[name] = curve
    if (drop := run.logged.curves.get("compress/drop")) and _drawable(drop):
        panels["points below the value before the first cut"] = {"compress/drop": drop}
    if not panels:
        reason = run.logged.source if not run.logged.curves else f"{run.logged.source} holds no curves but those of cuts"
        return f"<p>There are no training curves: {escape(reason)}.</p>"
    charts = [line_chart(title, curves, cuts=_steps(run)) for title, curves in panels.items()]
    rest = (
        f'<details><summary>{len(charts) - 6} more charts</summary><div class="charts">{"".join(charts[6:])}</div></details>'
        if len(charts) > 6
        else ""
    )
    marked = " Dotted lines mark the cuts." if run.cuts else ""
    return (
        f'<p class="quiet">What was logged, read from {escape(run.logged.source)}; beside each name its first and its last '
        f'value.{marked}</p><div class="charts">{"".join(charts[:6])}</div>{rest}'
    )


def _recipe(run: Run) -> str:
    if run.recipe is None:
        return ""
    content = escape(json.dumps(run.recipe.to_dict(), indent=1))
    lines = re.sub(r"\n\s+(-?\d+,?|\])", r" \1", content)  # a layer a line
    return (
        f"<p>{_code(run.recipe.method)}: {len(run.recipe.keep)} layers lost channels. The recipe says which channels of each "
        "layer stay, relative to the network as it is built.</p>"
        f"<details><summary>The whole recipe, as JSON</summary>{_block(lines)}</details>"
    )


def _environment(run: Run) -> str:
    parts = []
    if environment := run.summary.get("environment"):
        rows = [[escape(name), _code(value)] for name, value in environment.items() if name != "command"]
        parts.append(_table("Where the figures were measured.", ["what", "value"], rows, text=1))
    else:
        parts.append("<p>Nothing says where this run took place: a pruning callback writes that down.</p>")
    if run.checkpoints:
        rows = [[_code(file.relative_to(run.folder).as_posix()), _bytes(file.stat().st_size)] for file in run.checkpoints]
        parts.append(
            _table("Checkpoints, the last one first. They hold what the optimizer needs as well.", ["file", "size"], rows)
        )
    if run.settings is not None:
        content = escape(run.settings.read_text(encoding="utf-8"))
        name = escape(run.settings.name)
        parts.append(f"<details><summary>All settings: <code>{name}</code></summary>{_block(content)}</details>")
    return "".join(parts)


def _repeat(run: Run) -> str:
    parts = []
    config = run.settings if run.settings is not None and run.settings.name == "config.yaml" else None
    if config is not None:
        again = shlex.join(["lit-compress", "fit", "--config", str(config)])
        parts.append(f"<p>The same run again, by the settings that it wrote down:</p>{_block(escape(again))}")
    if command := run.summary.get("environment", {}).get("command"):
        parts.append(f"<p>What it was started with:</p>{_block(escape(command))}")
    if run.checkpoints and run.recipe is not None:
        code = (
            "from lit_compress import load_pruned\n\n"
            "# the module's class, or an instance as its constructor builds it\n"
            f"model = load_pruned(YourModule, {str(run.checkpoints[0])!r})"
        )
        parts.append(f"<p>The small network in Python:</p>{_block(escape(code))}")
        if config is not None:
            export = ["lit-compress", "export", "--config", str(config), "--ckpt", str(run.checkpoints[0])]
            deploy = shlex.join([*export, "--out", "model.onnx", "--verify"])
            parts.append(f"<p>To deploy it:</p>{_block(escape(deploy))}")
    return "".join(parts)


# ---------------------------------------------------------------- pieces of HTML


def _table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]], text: int | None = None) -> str:
    """A table of HTML cells that scrolls on its own where it is too wide; column ``text`` holds words."""

    def cell(index: int, html: str) -> str:
        if index == 0:
            return f'<th scope="row">{html}</th>'
        return f'<td class="text">{html}</td>' if index == text else f"<td>{html}</td>"

    head = "".join(
        f'<th scope="col"{" class=text" if index == text else ""}>{name}</th>' if name else "<td></td>"
        for index, name in enumerate(columns)
    )
    body = "\n".join(f"<tr>{''.join(cell(index, html) for index, html in enumerate(row))}</tr>" for row in rows)
    label = escape(re.sub(r"<[^>]*>", "", caption).partition(".")[0])
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table><caption><span>{caption}</span></caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _block(escaped: str) -> str:
    return f"<pre><code>{escaped}</code></pre>"


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _listed(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}"


def _metric(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _count(value: int) -> str:
    return f"{value:,}"


def _bytes(value: int) -> str:
    return f"{value / 2**20:,.2f} MiB" if value >= 2**20 else f"{value / 2**10:,.1f} KiB"


_SIZES = (("parameters", "parameters", _count), ("mult-adds", "mult_adds", _count), ("memory", "memory", _bytes))


def _share(before: float, after: float) -> str:
    return f"{100 * after / before:.1f} %" if before else ""


def _time(moment: Mapping[str, Any]) -> str:
    latency = Latency(**moment["latency"])
    return f'{latency.median:.2f} ms<span class="spread">{latency.lower:.2f} to {latency.upper:.2f}</span>'


def _speed(run: Run) -> str:
    """What is left of a step's time: each cut's pair was timed in turns, so that no load of the machine is in the share."""
    return f"{100 * prod(cut['after']['latency']['median'] / cut['before']['latency']['median'] for cut in run.cuts):.1f} %"


def _steps(run: Run) -> list[float]:
    return [cut["step"] for cut in run.cuts]


def _drawable(curve: Curve) -> bool:
    return any(isfinite(y) for _, y in curve)
