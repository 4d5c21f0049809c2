"""Pictures of an analysis and of a cut, as matplotlib figures."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

# Colour-blind safe (Okabe and Ito).
_BEFORE, _AFTER = "#999999", "#0072B2"


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


def _shade(index: int, count: int) -> tuple[float, float, float]:
    share = index / max(count - 1, 1)
    return (0.0 + 0.35 * share, 0.25 + 0.45 * share, 0.45 + 0.45 * share)
