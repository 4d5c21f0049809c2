"""Callbacks that make a network smaller while it trains."""

from lit_compress.callbacks.pfa import PFAPruning
from lit_compress.callbacks.pruning import PruningCallback
from lit_compress.callbacks.random_recipe import RandomPruning
from lit_compress.callbacks.start import StartFrom

__all__ = ["PFAPruning", "PruningCallback", "RandomPruning", "StartFrom"]
