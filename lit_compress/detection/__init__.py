"""Parts of pedestrian detectors."""

from lit_compress.detection.acf import ACFChannels
from lit_compress.detection.anchors import decode_boxes, encode_boxes, pedestrian_anchors
from lit_compress.detection.assignment import Assignment, assign_anchors, sample_anchors
from lit_compress.detection.detector import DetectionLimits, PedestrianDetector
from lit_compress.detection.fast_rcnn import FastRCNN
from lit_compress.detection.masks import box_masks
from lit_compress.detection.mirror import MirroredDecoder, unpool
from lit_compress.detection.objective import detection_losses
from lit_compress.detection.roi_autoencoder import Autoencoders
from lit_compress.detection.rpn import RegionProposalNetwork
from lit_compress.detection.students import pedestrian_resnet
from lit_compress.detection.suppression import best_detections, suppress

__all__ = [
    "ACFChannels",
    "Assignment",
    "Autoencoders",
    "DetectionLimits",
    "FastRCNN",
    "MirroredDecoder",
    "PedestrianDetector",
    "RegionProposalNetwork",
    "assign_anchors",
    "best_detections",
    "box_masks",
    "decode_boxes",
    "detection_losses",
    "encode_boxes",
    "pedestrian_anchors",
    "pedestrian_resnet",
    "sample_anchors",
    "suppress",
    "unpool",
]
