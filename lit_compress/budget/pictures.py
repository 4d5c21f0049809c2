"""Pictures of budgets: the split over time, and error against what is spent."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def plot_split(names: Sequence[str], epochs: Sequence[float], shares: Sequence[Sequence[float]]) -> Figure:
    """How a budget was shared out over a training, stacked.

    Args:
        names: Contexts.
        epochs: When the shares were noted.
        shares: For each of them, a share a context.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes: Axes = figure.add_subplot()
    colours = colormaps["viridis"](np.linspace(0, 0.95, len(names)))
    axes.stackplot(epochs, np.asarray(shares).T, labels=list(names), colors=colours)
    axes.set(xlabel="epochs", ylabel="share of the budget", ylim=(0, 1))
    axes.margins(x=0)
    if len(names) <= 16:
        axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)
    return figure


def plot_error_curves(curves: Mapping[str, Mapping[float, float]], unit: str = "error") -> Figure:
    """Error against total budget, one line a split.

    Args:
        curves: Name of a split to total to error.
        unit: What the error is.
    """
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes: Axes = figure.add_subplot()
    for name, curve in curves.items():
        axes.plot(list(curve), list(curve.values()), marker="o", markersize=4, label=name)
    axes.set(xlabel="total budget", ylabel=unit, xscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure
