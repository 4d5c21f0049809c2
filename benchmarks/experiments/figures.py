"""What the pictures of several experiments have in common."""

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator


def plain_log_scales(axes: Axes) -> None:
    """Number both logarithmic axes at 1, 2 and 5 times each power of ten, as one writes numbers."""
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
