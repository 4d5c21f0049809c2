"""LightningModules, and what makes a user's own load pruned checkpoints."""

from lit_compress.modules.classifier import LitClassifier
from lit_compress.modules.distiller import LitDistiller
from lit_compress.modules.feature_gatherer import LitFeatureGatherer
from lit_compress.modules.pedestrian_detector import LitPedestrianDetector
from lit_compress.modules.prunable import PrunableMixin
from lit_compress.modules.quantization_tables import LitQuantizationTables
from lit_compress.modules.segmenter import LitSegmenter

__all__ = [
    "LitClassifier",
    "LitDistiller",
    "LitFeatureGatherer",
    "LitPedestrianDetector",
    "LitQuantizationTables",
    "LitSegmenter",
    "PrunableMixin",
]
