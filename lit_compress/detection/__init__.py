"""Parts of pedestrian detectors."""

from lit_compress.detection.acf import ACFChannels

__all__ = ["ACFChannels"]
