"""Callbacks that make a network smaller while it trains, and watch it."""

from lit_compress.callbacks.apply_recipe import ApplyRecipe
from lit_compress.callbacks.budget_curve import BudgetCurve
from lit_compress.callbacks.budget_monitor import BudgetMonitor
from lit_compress.callbacks.crs import CRSWeightDecay
from lit_compress.callbacks.drop_path import DropPathSchedule
from lit_compress.callbacks.monitor import CompressionMonitor
from lit_compress.callbacks.pfa import PFAPruning
from lit_compress.callbacks.pib import PIBPruning
from lit_compress.callbacks.pruning import PruningCallback
from lit_compress.callbacks.random_recipe import RandomPruning
from lit_compress.callbacks.roi_autoencoder import RoIAutoencoder
from lit_compress.callbacks.scores import MagnitudePruning, SlimmingPruning
from lit_compress.callbacks.start import StartFrom
from lit_compress.callbacks.vib import VIBPruning

__all__ = [
    "ApplyRecipe",
    "BudgetCurve",
    "BudgetMonitor",
    "CRSWeightDecay",
    "CompressionMonitor",
    "DropPathSchedule",
    "MagnitudePruning",
    "PFAPruning",
    "PIBPruning",
    "PruningCallback",
    "RandomPruning",
    "RoIAutoencoder",
    "SlimmingPruning",
    "StartFrom",
    "VIBPruning",
]
