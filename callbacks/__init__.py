"""Callbacks that make a network smaller while it trains, and watch it."""

from lit_compress.callbacks.apply_recipe import ApplyRecipe
from lit_compress.callbacks.budget_curve import BudgetCurve
from lit_compress.callbacks.budget_monitor import BudgetMonitor
from lit_compress.callbacks.monitor import CompressionMonitor
from lit_compress.callbacks.pfa import PFAPruning
from lit_compress.callbacks.pruning import PruningCallback

__all__ = ["ApplyRecipe", "BudgetCurve", "BudgetMonitor", "CompressionMonitor", "PFAPruning", "PruningCallback"]
