"""Callbacks that make a network smaller while it trains."""

from lit_compress.callbacks.pfa import PFAPruning
from lit_compress.callbacks.pib import PIBPruning
from lit_compress.callbacks.pruning import PruningCallback
from lit_compress.callbacks.scores import MagnitudePruning, SlimmingPruning
from lit_compress.callbacks.vib import VIBPruning

__all__ = ["MagnitudePruning", "PFAPruning", "PIBPruning", "PruningCallback", "SlimmingPruning", "VIBPruning"]
