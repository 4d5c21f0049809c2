"""What an answer costs: a total budget split over contexts, learnt together with the model that reads them."""

from lit_compress.budget.jpeg import JPEGTables, save_jpeg, standard_tables
from lit_compress.budget.linear import linear_resources
from lit_compress.budget.matching import matching_total
from lit_compress.budget.noise import NoiseProcess, QuantizationNoise, RateNoise, SamplingNoise
from lit_compress.budget.search import Trial, bayesian_search, norm_shares, random_search
from lit_compress.budget.split import BudgetSplit, largest_remainder
from lit_compress.budget.tables import jpeg_tables

__all__ = [
    "BudgetSplit",
    "JPEGTables",
    "NoiseProcess",
    "QuantizationNoise",
    "RateNoise",
    "SamplingNoise",
    "Trial",
    "bayesian_search",
    "jpeg_tables",
    "largest_remainder",
    "linear_resources",
    "matching_total",
    "norm_shares",
    "random_search",
    "save_jpeg",
    "standard_tables",
]
