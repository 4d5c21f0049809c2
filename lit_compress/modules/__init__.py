"""LightningModules."""

from lit_compress.modules.classifier import LitClassifier

__all__ = ["LitClassifier"]
