"""Figures of merit as torchmetrics."""

from lit_compress.metrics.angle import MeanAngleError

__all__ = ["MeanAngleError"]
