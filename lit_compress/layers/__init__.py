"""Layers that a method puts into a network."""

from lit_compress.layers.vib_gate import VIBGate

__all__ = ["VIBGate"]
