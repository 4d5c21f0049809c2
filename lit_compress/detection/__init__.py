"""Parts of pedestrian detectors."""

from lit_compress.detection.acf import ACFChannels
from lit_compress.detection.anchors import decode_boxes, encode_boxes, pedestrian_anchors
from lit_compress.detection.assignment import Assignment, assign_anchors, sample_anchors
from lit_compress.detection.masks import box_masks
from lit_compress.detection.mirror import MirroredDecoder, unpool
from lit_compress.detection.roi_autoencoder import Autoencoders
from lit_compress.detection.suppression import best_detections, suppress

__all__ = [
    "ACFChannels",
    "Assignment",
    "Autoencoders",
    "MirroredDecoder",
    "assign_anchors",
    "best_detections",
    "box_masks",
    "decode_boxes",
    "encode_boxes",
    "pedestrian_anchors",
    "sample_anchors",
    "suppress",
    "unpool",
]
