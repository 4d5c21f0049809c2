"""Pictures of an analysis and of a cut, as matplotlib figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from torch import Tensor

from lit_compress.history import SizeHistory, share

# Colour-blind safe (Okabe and Ito).
_BEFORE, _AFTER, _OTHER = "#999999", "#0072B2", "#D55E00"
_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def plot_spectra(spectra: Mapping[str, Tensor], kept: Mapping[str, int] | None = None) -> Figure:
    """Share of energy that the first directions of each layer hold, and where each layer is cut.

    Args:
        spectra: Layer name to shares of energy, descending, ``(C,)``.
        kept: Layer name to channels kept; marked by a dot.

    Returns:
        One curve a layer, from dark (first) to light (last), over the share of its directions.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes: Axes = figure.add_subplot()
    for index, (name, spectrum) in enumerate(spectra.items()):
        energy = np.concatenate([[0.0], spectrum.cumsum(0).numpy()])
        share = np.linspace(0, 1, len(energy))
        colour = _shade(index, len(spectra))
        axes.plot(share, energy, color=colour, linewidth=1, label=name if len(spectra) <= 16 else None)
        if kept is not None and name in kept:
            place = min(kept[name], len(spectrum))
            axes.plot(share[place], energy[place], "o", color=colour, markersize=4)
    axes.set(xlabel="share of the layer's directions", ylabel="share of response energy", xlim=(0, 1), ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    if 0 < len(spectra) <= 16:
        axes.legend(fontsize="x-small", loc="lower right")
    return figure


def plot_scores(scores: Mapping[str, Tensor], kept: Mapping[str, int] | None = None) -> Figure:
    """Scores of each layer's channels, from the highest to the lowest, and where each layer is cut.

    Args:
        scores: Layer name to scores ``(C,)``.
        kept: Layer name to channels kept; marked by a dot at the last of them.

    Returns:
        One curve a layer, from dark (first) to light (last), over the share of its channels.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes: Axes = figure.add_subplot()
    for index, (name, values) in enumerate(scores.items()):
        descending = values.sort(descending=True).values.numpy()
        share = np.arange(1, len(descending) + 1) / max(len(descending), 1)
        colour = _shade(index, len(scores))
        axes.plot(share, descending, color=colour, linewidth=1, label=name if len(scores) <= 16 else None)
        if kept is not None and 0 < kept.get(name, 0) <= len(descending):
            place = kept[name] - 1
            axes.plot(share[place], descending[place], "o", color=colour, markersize=4)
    axes.set(xlabel="share of the layer's channels", ylabel="score", xlim=(0, 1))
    axes.grid(alpha=0.3)
    if 0 < len(scores) <= 16:
        axes.legend(fontsize="x-small", loc="upper right")
    return figure


def plot_widths(before: Mapping[str, int], after: Mapping[str, int]) -> Figure:
    """Channels of each layer before and after.

    Args:
        before: Layer name to channels, in the order of the forward.
        after: The same after the cut; layers without an entry kept all.
    """
    names = list(before)
    figure = Figure(figsize=(max(6.0, 0.28 * len(names) + 1.5), 4.5), layout="constrained")
    axes: Axes = figure.add_subplot()
    place = np.arange(len(names))
    axes.bar(place, [before[name] for name in names], color=_BEFORE, width=0.8, label="before")
    axes.bar(place, [after.get(name, before[name]) for name in names], color=_AFTER, width=0.8, label="after")
    axes.set_xticks(place, names, rotation=90, fontsize="x-small")
    axes.set_ylabel("output channels")
    axes.legend(fontsize="small")
    axes.grid(axis="y", alpha=0.3)
    return figure


def plot_information(information: Sequence[tuple[int, Mapping[str, float]]], cuts: Sequence[int] = ()) -> Figure:
    """What the units of each layer carry over a run: it falls with each cut and climbs again while training recovers.

    Args:
        information: Epochs trained so far, and layer name to bits; right after a cut, the same epochs come again.
        cuts: Epochs before which there was a cut; a dotted line marks each.

    Returns:
        One curve a layer, from dark (first) to light (last).

    Source: PIBprune, figures 4.8.1b and 4.8.2b.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes: Axes = figure.add_subplot()
    layers = list(dict.fromkeys(layer for _, bits in information for layer in bits))
    for index, layer in enumerate(layers):
        points = [(epochs, bits[layer]) for epochs, bits in information if layer in bits]
        axes.plot(*zip(*points, strict=True), color=_shade(index, len(layers)), linewidth=1.2, label=layer)
    for epoch in cuts:
        axes.axvline(epoch, color="black", linestyle=":", linewidth=1)
    axes.set(xlabel="epochs", ylabel="information of the layer's units, bits")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if layers:
        axes.legend(fontsize="x-small")
    return figure


def plot_information_plane(paths: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    """The information plane: over a run, what each layer keeps of the layer before, and what it tells of the label.

    Args:
        paths: Layer name to both, in bits, from the start of the run to its end.

    Returns:
        One path a layer, from light (first epoch) to full colour (last), its end marked by a dot.

    Source: PIBprune, section 4.4, after Tishby and Zaslavsky, 2015.
    """
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes: Axes = figure.add_subplot()
    for (layer, path), colour in zip(paths.items(), cycle(_PALETTE)):
        kept, told = np.array(path, dtype=float).reshape(-1, 2).T
        axes.plot(kept, told, color=colour, linewidth=0.8, alpha=0.5)
        axes.scatter(kept, told, s=10, color=[to_rgba(colour, float(alpha)) for alpha in np.linspace(0.2, 1, len(kept))])
        axes.plot(kept[-1:], told[-1:], "o", color=colour, label=layer)
    axes.set(xlabel="of the layer before, $I(Z_l; Z_{l-1})$, bits", ylabel="of the label, $\\sum_i I(Z_{l,i}; Y)$, bits")
    axes.grid(alpha=0.3)
    if paths:
        axes.legend(fontsize="x-small")
    return figure


def plot_ratios(
    paths: Mapping[str, Sequence[tuple[float, float, float]]], points: Mapping[str, tuple[float, float, float]]
) -> Figure:
    """Error against what is left of a network's units and of its weights, as PIBprune compares itself with others.

    Args:
        paths: Name of a run to R_n, R_w and error at its moments, all in percent.
        points: Name of a published network to the same.

    Returns:
        On the left over R_n, on the right over R_w: a line a run, and a labelled cross a published network.

    Source: PIBprune, figures 4.8.1c and d, 4.8.2c and d.
    """
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for index, (axes, name) in enumerate(zip(figure.subplots(1, 2), ("R_n", "R_w"), strict=True)):
        for (run, path), colour in zip(paths.items(), cycle(_PALETTE)):
            values = np.array(path, dtype=float).reshape(-1, 3)
            axes.plot(values[:, index], values[:, 2], "o-", color=colour, markersize=4, linewidth=1, label=run)
        for label, point in points.items():
            axes.plot(point[index], point[2], "x", color="black")
            axes.annotate(
                label, (point[index], point[2]), xytext=(2, 3), textcoords="offset points", fontsize="x-small", rotation=45
            )
        axes.set(xlabel=f"${name}$, %", ylabel="error, %", xscale="log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.grid(alpha=0.3)
        if paths:
            axes.legend(fontsize="x-small")
    return figure


def plot_history(history: SizeHistory, epochs: int) -> Figure:
    """How the size of a network, and the width of each layer, went over a run; a dashed line marks each cut.

    Args:
        history: The run's sizes.
        epochs: Epochs of the run so far.

    Returns:
        Above, the shares of parameters and mult-adds that are left; below, a row a layer in the order of the forward, from dark
        (all channels) to light (none), with its channels at the start and at the end.
    """
    start, end = history.moments[0].sizes, history.moments[-1].sizes
    last = max(epochs, history.moments[-1].epoch + 1)
    edges = [*(moment.epoch for moment in history.moments), last]
    layers = list(dict.fromkeys(layer for moment in history.moments for layer in moment.sizes.widths))
    figure = Figure(figsize=(8, 3.2 + 0.18 * len(layers)), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, 0.8 + 0.18 * len(layers)])

    for name, colour, style, sizes, whole in (
        ("parameters", _AFTER, "-", [moment.sizes.parameters for moment in history.moments], start.parameters),
        ("mult-adds", _OTHER, "--", [moment.sizes.mult_adds for moment in history.moments], start.mult_adds),
    ):
        shares = [share(size, whole) for size in sizes]
        above.step(edges, [*shares, shares[-1]], style, where="post", color=colour, label=f"{name}: {whole:,} to {sizes[-1]:,}")
    above.set(ylabel="share left", ylim=(0, 1.05))
    above.grid(alpha=0.3)
    above.legend(fontsize="x-small", loc="lower left")

    # A layer that was put in later has no width before, and one that was taken out none after.
    widest = {layer: max(moment.sizes.widths.get(layer, 0) for moment in history.moments) for layer in layers}
    kept = [[share(moment.sizes.widths.get(layer, 0), widest[layer]) for moment in history.moments] for layer in layers]
    colours = below.pcolormesh(edges, np.arange(len(layers) + 1), np.array(kept), cmap="Blues", vmin=0, vmax=1)
    names = [f"{layer}  {start.widths.get(layer, 0)} to {end.widths.get(layer, 0)}" for layer in layers]
    below.set_yticks(np.arange(len(layers)) + 0.5, names, fontsize="x-small")
    below.invert_yaxis()
    below.set(xlabel="epoch", xlim=(edges[0], last))
    figure.colorbar(colours, ax=below, label="share of channels", fraction=0.05)

    for moment in history.cuts:
        for axes in (above, below):
            axes.axvline(moment.epoch, color="black", linestyle=":", linewidth=1)
        above.text(moment.epoch, 1.06, moment.cut, fontsize="x-small", rotation=20)
    return figure


def _shade(index: int, count: int) -> tuple[float, float, float]:
    share = index / max(count - 1, 1)
    return (0.0 + 0.35 * share, 0.25 + 0.45 * share, 0.45 + 0.45 * share)
