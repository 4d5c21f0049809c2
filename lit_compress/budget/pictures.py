"""Pictures of budgets: the split over time, error against what is spent, and images before and after."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from lit_compress.budget.jpeg import decoded_jpeg, psnr


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


def plot_jpegs(image: Image.Image, contents: Mapping[str, bytes], side: int = 256) -> Figure:
    """The middle of an image, as it is and as JPEG files show it, with their sizes and PSNR.

    Args:
        image: Grey or in colour, 8 bits a channel.
        contents: Name of a file to what is in it.
        side: Of the part shown, in pixels.
    """
    width, height = image.size
    left, top = max(width - side, 0) // 2, max(height - side, 0) // 2
    figure = Figure(figsize=(3.2 * (1 + len(contents)), 4), layout="constrained")
    panels: list[Axes] = list(figure.subplots(1, 1 + len(contents), squeeze=False).flat)
    decoded = [image, *(decoded_jpeg(content) for content in contents.values())]
    titles = ["original"]
    for (name, content), each in zip(contents.items(), decoded[1:], strict=True):
        titles.append(f"{name}\n{8 * len(content) / (width * height):.3f} bits per pixel, {psnr(image, each):.2f} dB")
    for axes, each, title in zip(panels, decoded, titles, strict=True):
        axes.imshow(np.asarray(each.crop((left, top, left + side, top + side))), cmap="gray", vmin=0, vmax=255)
        axes.set_title(title, fontsize="small")
        axes.axis("off")
    return figure
