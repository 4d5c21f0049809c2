"""The page of a run: one HTML file that needs neither a server nor the network."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from html import escape
from math import prod
from pathlib import Path
from string import Template

from lit_compress.recipe import single_methods
from lit_compress.reporting.figures import pictures, sizes_over_time, training
from lit_compress.reporting.folder import LayerWidth, Run
from lit_compress.reporting.markup import block, code, count, metric, share, size, table, time

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
    "pfa": "Principal Filter Analysis looks at how many independent directions the responses of each layer have, and removes "
    "channels that say what others say.",
    "pib": "The Parametric Information Bottleneck removes sigmoid units that carry less than half a bit.",
    "vib": "The Variational Information Bottleneck trains a gate of noise for each channel, and removes those that noise drowns.",
    "magnitude": "Filters with the smallest weights were removed.",
    "slimming": "Channels whose batch norms scale them the least were removed.",
    "random": "Channels were removed at random.",
}
_SIZES = (("parameters", "parameters", count), ("mult-adds", "mult_adds", count), ("memory", "memory", size))


def page(run: Run) -> str:
    """The HTML of a run's page.

    Args:
        run: What its folder holds.
    """
    sections = {
        "Before and after": _before_and_after(run),
        "Cut by cut": _cut_by_cut(run),
        "Layers": _layers(run.layers),
        "What the method saw": pictures(run),
        "Training": training(run),
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
    cuts = run.removing
    epochs = [str(cut["epoch"]) for cut in cuts]
    if not run.cuts and run.recipe is not None:
        how = f"The network was cut to the recipe {code(run.recipe.method)}."
    elif not run.summary and "compress/R_n" in run.logged.curves:
        how = "The log tells of cuts, but what was measured at them is in the folder of the first of the run's loggers."
    elif not run.cuts:
        how = "Nothing was cut in this run."
    elif not cuts:
        how = f"{code(run.summary['method'])} found nothing to remove: the network is whole."
    elif len(cuts) == 1:
        how = f"Cut once, before epoch {epochs[0]}, by {code(run.summary['method'])}."
    else:
        listed = f"{', '.join(epochs[:-1])} and {epochs[-1]}"
        how = f"Cut {len(cuts)} times, before epochs {listed}, by {code(run.summary['method'])}."
    network = f" What was trained: {code(run.summary['network'])}." if run.summary else ""
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
            tiles.append((f"{name}, {when}", metric(last), f"{metric(before['metrics'][name])} before"))
    for name, key, form in _SIZES:
        tiles.append((f"{name} kept", share(before[key], after[key]), f"{form(before[key])} to {form(after[key])}"))
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
        row = ["numbers in the weights", f"{before:,}", f"{after:,}", share(before, after)]
        caption = (
            f"Read from {code(run.checkpoints[0].name)}: the network was cut without a pruning callback, which measures more."
        )
        return table(caption, ["", "before", "after", "kept"], [row])
    if not run.cuts:
        return ""
    summary = run.summary
    before, after, tuned = summary["before"], summary["after_cut"], summary.get("fine_tuned")
    ends = [] if tuned is None else ["fine-tuned"]
    rows = []
    for name, value in before["metrics"].items():
        cut, last = after["metrics"].get(name), (tuned or {}).get(name)
        change = "" if last is None else f"{last - value:+.4f}"
        rows.append([escape(name), metric(value), metric(cut), *([metric(last)] if ends else []), change])
    for name, key, form in _SIZES:
        old, new = before[key], after[key]
        rows.append([name, form(old), form(new), *([form(new)] if ends else []), f"{share(old, new)} kept"])
    blank = [""] if ends else []
    step = f"step, batch of {summary['batch_size']}"
    rows.append([step, time(before["latency"]), time(after["latency"]), *blank, f"{_speed(run)} of the time"])
    for key, what in (("R_n", "outputs of the layers (R_n)"), ("R_w", "weights of the layers (R_w)")):
        rows.append([what, "", "", *blank, f"{100 * summary['ratios'][key]:.1f} % kept"])
    several = ", and of all cuts together" if len(run.cuts) > 1 else ""
    caption = (
        "Before the first cut, and right after the last one without any training. Mult-adds are of one sample, memory is that of "
        "weights and buffers. A step is one of validation: its median time and, below, the quartiles, on "
        f"{escape(summary['environment']['device'])}. The networks of a cut were timed in turns, and the change is the median "
        f"over these{several}."
    )
    return table(caption, ["", "before", "after the cut", *ends, "change"], rows)


def _cut_by_cut(run: Run) -> str:
    if len(run.cuts) < 2:
        return ""
    metrics = _first_metrics(run.cuts[0]["before"]["metrics"])
    columns = ["cut", "before epoch", "parameters", "mult-adds", "time of a step", *map(escape, metrics), "by"]
    rows = []
    for cut in run.cuts:
        before, after = cut["before"], cut["after"]
        number = str(run.removing.index(cut) + 1) if cut in run.removing else "nothing to remove"
        sizes = [count(after[key]) for key in ("parameters", "mult_adds")]
        values = [f"{metric(before['metrics'].get(name))} → {metric(after['metrics'].get(name))}" for name in metrics]
        rows.append([number, str(cut["epoch"]), *sizes, time(after["latency"]), *values, code(cut["recipe"])])
    caption = "What each cut left, and what the metrics were right before and right after it."
    return table(caption, columns, rows, text=len(columns) - 1) + (sizes_over_time(run) if run.removing else "")


def _layers(layers: Sequence[LayerWidth]) -> str:
    if not layers:
        return ""
    with_weights = any(layer.weights for layer in layers)
    rows = []
    for layer in layers:
        weights = "" if layer.weights is None else f"{layer.weights[0]:,} → {layer.weights[1]:,}"
        kept = ""
        if layer.before is not None:
            left = 100 * layer.after / max(layer.before, 1)
            bar = f'<span class="bar" aria-hidden="true"><i style="width:{left:.1f}%"></i></span>'
            kept = f'{bar}<span class="share">{left:.0f} %</span>'
        before = "" if layer.before is None else str(layer.before)
        rows.append([code(layer.name), before, str(layer.after), kept, *([weights] if with_weights else []), escape(layer.note)])
    caption = "Output channels of each layer, in the order of the forward: as it was built, and what is left."
    columns = ["layer", "built with", "left", "kept", *(["weights"] if with_weights else []), "note"]
    return table(caption, columns, rows, text=len(columns) - 1)


def _recipe(run: Run) -> str:
    if run.recipe is None:
        return ""
    return (
        f"<p>{code(run.recipe.method)}: {len(run.recipe.keep)} layers lost channels. The recipe says which channels of each "
        "layer stay, relative to the network as it is built.</p>"
        f"<details><summary>The whole recipe, as JSON</summary>{block(run.recipe.to_json())}</details>"
    )


def _environment(run: Run) -> str:
    parts = []
    if environment := run.summary.get("environment"):
        rows = [[escape(name), code(value)] for name, value in environment.items() if name != "command"]
        parts.append(table("Where the figures were measured.", ["what", "value"], rows, text=1))
    else:
        parts.append("<p>Nothing says where this run took place: a pruning callback writes that down.</p>")
    if run.checkpoints:
        rows = [[code(file.relative_to(run.folder).as_posix()), size(file.stat().st_size)] for file in run.checkpoints]
        parts.append(
            table("Checkpoints, the last one first. They hold what the optimizer needs as well.", ["file", "size"], rows)
        )
    if run.settings is not None:
        content = run.settings.read_text(encoding="utf-8")
        name = escape(run.settings.name)
        parts.append(f"<details><summary>All settings: <code>{name}</code></summary>{block(content)}</details>")
    return "".join(parts)


def _repeat(run: Run) -> str:
    parts = []
    config = run.settings if run.settings is not None and run.settings.name == "config.yaml" else None
    if config is not None:
        again = shlex.join(["lit-compress", "fit", "--config", str(config)])
        parts.append(f"<p>The same run again, by the settings that it wrote down:</p>{block(again)}")
    if command := run.summary.get("environment", {}).get("command"):
        parts.append(f"<p>What it was started with:</p>{block(command)}")
    if run.checkpoints and run.recipe is not None:
        module = run.summary.get("network", "YourModule").partition(" ")[0]
        loading = (
            "from lit_compress import load_pruned\n\n"
            "# the module's class, or an instance as its constructor builds it\n"
            f"model = load_pruned({module}, {str(run.checkpoints[0])!r})"
        )
        parts.append(f"<p>The small network in Python:</p>{block(loading)}")
        if config is not None:
            export = ["lit-compress", "export", "--config", str(config), "--ckpt", str(run.checkpoints[0])]
            deploy = shlex.join([*export, "--out", "model.onnx", "--verify"])
        else:
            deploy = 'from lit_compress.export import export\n\nexport(model, inputs, "model.onnx")  # with a batch of its inputs'
        parts.append(f"<p>To deploy it:</p>{block(deploy)}")
    return "".join(parts)


def _speed(run: Run) -> str:
    """What is left of a step's time: at each cut the two networks took turns, so that no load of the machine is in the share."""
    return f"{100 * prod(cut['time_share'] for cut in run.cuts):.1f} %"


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")
