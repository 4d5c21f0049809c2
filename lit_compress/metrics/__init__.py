"""Figures that say how good, or how small, a network is."""

from lit_compress.metrics.angle import MeanAngleError
from lit_compress.metrics.compression import CompressionRatios
from lit_compress.metrics.miss_rate import LogAverageMissRate

__all__ = ["CompressionRatios", "LogAverageMissRate", "MeanAngleError"]
