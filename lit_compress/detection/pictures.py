"""Reconstructions beside what they reconstruct."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lit_compress.detection.roi_autoencoder import END_TO_END, Reconstruction


def plot_reconstructions(
    made: Mapping[str, Reconstruction],
    masks: Mapping[str, Tensor] | None = None,
    images: Sequence[Tensor] | None = None,
    rows: int = 3,
) -> Figure:
    """Average responses of layers, and what the decoders make of them, inside of the mask.

    Args:
        made: Name of a term to its reconstruction, as :class:`~lit_compress.detection.Autoencoders` gives them.
        masks: Name of a term to its mask ``(N, 1, H, W)``; what lies outside is pale. None for the whole map.
        images: The N images ``(C, H, W)`` in [0, 1], for a first column.
        rows: Images to draw, at most.

    Returns:
        A row an image: for each layer, the mean over the channels of its map, followed by that of each reconstruction of it on
        the same scale of grey.

    Source: *Region of Interest Autoencoders* (T1), figure 3.3.2.
    """
    columns: list[tuple[str, str, Tensor]] = []  # title, term, maps
    for layer in dict.fromkeys(one.layer for one in made.values()):
        terms = [name for name, one in made.items() if one.layer == layer]
        columns.append((layer, terms[0], made[terms[0]].target))
        columns += [("end to end" if name == END_TO_END else f"from {name}", name, made[name].made) for name in terms]
    count = min(rows, len(columns[0][2]))
    first = 0 if images is None else 1
    figure = Figure(figsize=(2.2 * (len(columns) + first), 1.9 * count + 0.4), layout="constrained")
    grid = figure.subplots(count, len(columns) + first, squeeze=False)
    for row in range(count):
        if images is not None:
            _show(
                grid[row][0], images[row].detach().float().clamp(0, 1).movedim(0, -1).cpu().numpy(), "image" if row == 0 else ""
            )
        for place, (title, term, maps) in enumerate(columns, start=first):
            target = made[term].target[row].detach().float().mean(0)
            grey = maps[row].detach().float().mean(0).cpu().numpy()
            low, high = float(target.min()), float(target.max())
            alpha = None if masks is None else np.where(masks[term][row, 0].cpu().numpy(), 1.0, 0.15)
            _show(
                grid[row][place], grey, title if row == 0 else "", cmap="gray", vmin=low, vmax=max(high, low + 1e-6), alpha=alpha
            )
    return figure


def _show(axes: Axes, pixels: Any, title: str, **how: Any) -> None:
    axes.imshow(pixels, **how)
    axes.set_title(title[-28:], fontsize="x-small")
    axes.axis("off")
