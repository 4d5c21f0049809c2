"""Pedestrian detection: the Caltech protocol, and the formats that its annotations, videos and results come in.

Inside of the package, boxes in files' terms are float64 ``(x, y, width, height)`` in pixels, and the image begins at 0. Caltech's
files count pixels from 1: readers and writers convert, nothing else needs to know.
"""

from lit_compress.pedestrians.annotations import Annotations, Detections, Frame, scenes_of
from lit_compress.pedestrians.formats import Truths, read_detections, read_truths
from lit_compress.pedestrians.patches import rescore, warp
from lit_compress.pedestrians.pictures import plot_detections, plot_miss_rates
from lit_compress.pedestrians.protocol import MissRateCurve, Scenes, evaluate
from lit_compress.pedestrians.results import read_results, write_results
from lit_compress.pedestrians.subsets import SUBSETS, Subset
from lit_compress.pedestrians.vbb import read_vbb
from lit_compress.pedestrians.video import SeqVideo

__all__ = [
    "SUBSETS",
    "Annotations",
    "Detections",
    "Frame",
    "MissRateCurve",
    "Scenes",
    "SeqVideo",
    "Subset",
    "Truths",
    "evaluate",
    "plot_detections",
    "plot_miss_rates",
    "read_detections",
    "read_results",
    "read_truths",
    "read_vbb",
    "rescore",
    "scenes_of",
    "warp",
    "write_results",
]
