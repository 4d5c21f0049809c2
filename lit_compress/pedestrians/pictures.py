"""Miss rate against false positives per image, as the field draws it, and what a detector sees in images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any, cast

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullFormatter, PercentFormatter
from torch import Tensor

from lit_compress.pedestrians.protocol import PERSON, REFERENCE_FPPI, MissRateCurve


def plot_miss_rates(curves: Mapping[str, MissRateCurve], axes: Axes | None = None) -> Figure:
    """Miss rate against false positives per image, both on a log scale, best detector first in the legend.

    Args:
        curves: Name of a detector to its curve.
        axes: Where to draw; None makes a figure.

    Returns:
        The figure: a line a detector, dots where the log-average miss rate is taken.
    """
    if axes is None:
        axes = Figure(figsize=(6.5, 5), layout="constrained").add_subplot()
    for name, curve in sorted(curves.items(), key=lambda one: one[1].log_average):
        # A curve starts where nothing is detected. Zeros have no place on a log scale and are clipped at the edges.
        fppi, miss_rate = [1e-9, *curve.fppi], [1.0, *curve.miss_rate]
        (line,) = axes.plot(fppi, miss_rate, linewidth=1.5, drawstyle="steps-post", label=f"{curve.log_average:.1%} {name}")
        axes.plot(REFERENCE_FPPI, curve.at_reference, "o", color=line.get_color(), markersize=3.5)
    lowest = min((rate for curve in curves.values() for rate in curve.miss_rate if rate > 0), default=0.05)
    axes.set(xscale="log", yscale="log", xlim=(2e-4, 50), ylim=(min(0.05, lowest), 1.02))
    ticks = [
        tick
        for tick in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.64, 0.8, 1.0)
        if tick >= axes.get_ylim()[0]
    ]
    axes.set_yticks(ticks)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="false positives per image", ylabel="miss rate")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="lower left", title="log-average miss rate", title_fontsize="small")
    return cast(Figure, axes.figure)


def plot_detections(
    images: Sequence[Tensor], detections: Sequence[Mapping[str, Tensor]], targets: Sequence[Mapping[str, Any]], least: float = 0.3
) -> Figure:
    """Draw images with what was detected in them (red, with its score) and what is there (green; grey for ignore regions).

    Args:
        images: ``(3, H, W)`` in [0, 1].
        detections: ``boxes`` ``(n, 4)`` and ``scores`` ``(n,)`` of each.
        targets: ``boxes`` ``(m, 4)`` of each, and ``labels`` and ``ignore`` if there are any.
        least: Detections of a lower score are left out.
    """
    columns = min(len(images), 4)
    rows = ceil(len(images) / columns)
    figure = Figure(figsize=(4 * columns, 3.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in panels:
        panel.axis("off")
    for panel, image, found, target in zip(panels, images, detections, targets, strict=False):  # the last row may not be full
        panel.imshow(image.detach().float().cpu().clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
        count = len(target["boxes"])
        labels, ignore = target.get("labels", [PERSON] * count), target.get("ignore", [False] * count)
        for box, label, ignored in zip(target["boxes"].tolist(), labels, ignore, strict=True):
            _frame(panel, box, "#999999" if ignored or label != PERSON else "#00C853")
        for box, score in zip(found["boxes"].tolist(), found["scores"].tolist(), strict=True):
            if score >= least:
                _frame(panel, box, "#E53935")
                panel.text(box[0], box[1] - 1, f"{score:.2f}", color="#E53935", fontsize="x-small", clip_on=True)
    return figure


def _frame(panel: Axes, box: Sequence[float], colour: str) -> None:
    left, top, right, bottom = box
    panel.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=1.5))
