"""Callbacks that make a network smaller while it trains."""

from lit_compress.callbacks.crs import CRSWeightDecay
from lit_compress.callbacks.pfa import PFAPruning
from lit_compress.callbacks.pruning import PruningCallback

__all__ = ["CRSWeightDecay", "PFAPruning", "PruningCallback"]
