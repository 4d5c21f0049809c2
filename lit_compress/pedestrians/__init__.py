"""Pedestrian detection: the Caltech protocol, and the formats that its annotations, videos and results come in.

Inside of the package, boxes are float64 ``(x, y, width, height)`` in pixels, and the image begins at 0. Caltech's files count
pixels from 1: readers and writers convert, nothing else needs to know.
"""

from lit_compress.pedestrians.pictures import plot_miss_rates
from lit_compress.pedestrians.protocol import MissRateCurve, Scenes, evaluate
from lit_compress.pedestrians.subsets import SUBSETS, Subset

__all__ = ["SUBSETS", "MissRateCurve", "Scenes", "Subset", "evaluate", "plot_miss_rates"]
