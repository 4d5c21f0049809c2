"""Line charts as inline SVG: they follow the page's colours, light or dark, and need nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import groupby
from math import ceil, floor, isfinite, log10

from lit_compress.reporting.logs import Curve

_WIDTH, _HEIGHT = 420, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 22, 40
_POINTS = 400  # about as many as there are pixels; of a longer curve, every n-th value is drawn, and the last
_STYLES = 6  # colours and dashes in page.css


def line_chart(
    title: str,
    curves: Mapping[str, Curve],
    *,
    span: tuple[float, float],
    cuts: Sequence[float] = (),
    stepped: bool = False,
    from_zero: bool = False,
) -> str:
    """A figure with a chart and a legend, which tells the first and the last value of each curve.

    Args:
        title: What the vertical axis shows.
        curves: Name to pairs of optimizer step and value; what is not finite leaves a gap.
        span: The steps of the horizontal axis.
        cuts: Steps to mark, numbered from 1; those outside of the span are not shown.
        stepped: A value holds until the next one.
        from_zero: Begin the vertical axis at 0.

    Returns:
        HTML.

    Raises:
        ValueError: If no value is finite.
    """
    values = [y for curve in curves.values() for _, y in curve if isfinite(y)]
    if not values:
        raise ValueError(f"There is no finite value to draw of {title}.")
    start, end = span if span[1] > span[0] else (span[0] - 1, span[0] + 1)
    y_ticks = _ticks(min([*values, 0.0] if from_zero else values), max(values))

    def across(x: float) -> float:
        return _LEFT + (x - start) / (end - start) * (_WIDTH - _LEFT - _RIGHT)

    def up(y: float) -> float:
        return _HEIGHT - _BOTTOM - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for tick in y_ticks:
        y = up(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    for tick in (tick for tick in _ticks(start, end, least=1) if start <= tick <= end):
        parts.append(f'<text x="{across(tick):.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{_number(tick)}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">optimizer steps</text>')
    labelled = -100.0
    for number, cut in enumerate(cuts, 1):
        if not start <= cut <= end:
            continue
        x = across(cut)
        parts.append(f'<line class="cut" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>')
        label = f"cut {number}" if len(cuts) < 4 else f"{number}"
        if x - labelled > 10 * len(label):
            parts.append(f'<text class="cut-label" x="{x:.1f}" y="{_TOP - 6}" text-anchor="middle">{label}</text>')
            labelled = x
    for index, curve in enumerate(curves.values()):
        parts.append(f'<path class="line s{index % _STYLES}" d="{_path(curve, across, up, stepped)}"/>')
    legend = "".join(
        f'<li><svg class="swatch" viewBox="0 0 26 8" aria-hidden="true"><path class="line s{index % _STYLES}" d="M1 4H25"/></svg>'
        f"{escape(name)} <span>{_words(curve)}</span></li>"
        for index, (name, curve) in enumerate(curves.items())
    )
    label = f"{title} over optimizer steps{f', with {len(cuts)} cut(s) marked' if cuts else ''}"
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
        f'<ul class="legend">{legend}</ul></figure>'
    )


def _path(curve: Curve, across: Callable[[float], float], up: Callable[[float], float], stepped: bool) -> str:
    """The commands that draw a curve: a piece for each stretch of finite values."""
    every = ceil(len(curve) / _POINTS)
    thinned = [point for index, point in enumerate(curve) if index % every == 0 or index == len(curve) - 1]
    pieces = []
    for drawn, points in groupby(thinned, key=lambda point: isfinite(point[1])):
        if drawn:
            places = [(f"{across(x):.1f}", f"{up(y):.1f}") for x, y in points]
            joint = [f"H{x}V{y}" if stepped else f"L{x} {y}" for x, y in places[1:]]
            # A single value shows as a dot: the ends of a line are round.
            pieces.append(f"M{places[0][0]} {places[0][1]}{''.join(joint) or 'h0'}")
    return "".join(pieces)


def _ticks(low: float, high: float, least: float = 0.0) -> list[float]:
    """Round numbers, up to seven of them, no closer than ``least``, from at or below a range to at or above it."""
    if high <= low:
        low, high = low - abs(low) / 2 - 1e-12, low + abs(low) / 2 + 1e-12
    magnitude = 10.0 ** floor(log10((high - low) / 4))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if (high - low) / (factor * magnitude) <= 5)
    step = max(step, least)
    return [round(count * step, 12) for count in range(floor(low / step + 1e-9), ceil(high / step - 1e-9) + 1)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 and value == int(value) else f"{value:.4g}"


def _words(curve: Curve) -> str:
    finite = [y for _, y in curve if isfinite(y)]
    return f"{_number(finite[0])} to {_number(finite[-1])}" if finite else "never finite"
