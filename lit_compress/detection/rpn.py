"""The region proposal network for pedestrians: a detector by itself, since it proposes one kind of thing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from lit_compress.detection.anchors import SCALES, pedestrian_anchors
from lit_compress.detection.detector import DetectionLimits, PedestrianDetector, begin_small
from lit_compress.models.encoders import VGGEncoder


class RegionProposalNetwork(PedestrianDetector):
    """At every cell of a feature map, a logit and a box for each of nine anchors of the shape of a pedestrian.

    A 3×3 convolution ``conv`` with ReLU follows the backbone, then two of 1×1: ``score``, with a channel an anchor, and ``box``
    with four. An anchor is learnt as a person if it lies in the image and overlaps one by half, or best of all, and as none if it
    overlaps nobody and no ignore region by half. Persons are learnt in the aspect ratio 0.41.

    Args:
        backbone: Network from images to a feature map; ``None`` takes :class:`~lit_compress.models.VGGEncoder`.
        hidden: Filters of the 3×3 convolution.
        scales: One anchor a scale, of ``anchor_size`` times it.
        anchor_size: Width and height of the anchor of scale 1 in pixels of the resized image.
        image_size: Short side that images are resized to, and what the long side may be at most, in pixels. ``None`` leaves them.
        box_weight: Factor on the loss of boxes, λ_bbox.
        positives: Anchors with a person, per image, that the loss looks at, at most; few weigh as much as so many.
        negatives: Anchors without one, at most.
        min_height: Persons less tall, in pixels, are not learnt, and neither are negatives there.
        min_visible: And so are those of whom a smaller share is visible.
        limits: Which boxes are detections.

    Raises:
        ValueError: If a number is out of range, or the backbone gives no feature map.

    Source: Zhang et al., *Is Faster R-CNN Doing Well for Pedestrian Detection?*, 2016, section 3.1, and its ``RPN_BF``; T1,
    sections 3.3 and 3.4.

    Example:
        >>> network = RegionProposalNetwork(VGGEncoder(width=0.125), hidden=64).eval()
        >>> (found,) = network([torch.rand(3, 480, 640)])
        >>> network.stride, found["boxes"].shape[1]
        (16, 4)
    """

    def __init__(
        self,
        backbone: nn.Module | None = None,
        hidden: int = 512,
        scales: tuple[float, ...] = SCALES,
        anchor_size: tuple[float, float] = (10.0, 24.0),
        image_size: tuple[int, int] | None = (720, 960),
        box_weight: float = 5.0,
        positives: int = 20,
        negatives: int = 100,
        min_height: float = 50.0,
        min_visible: float = 1.0,
        limits: DetectionLimits | None = None,
    ) -> None:
        super().__init__(
            VGGEncoder() if backbone is None else backbone,
            image_size=image_size,
            box_weight=box_weight,
            positives=positives,
            negatives=negatives,
            balanced=True,
            min_height=min_height,
            min_visible=min_visible,
            limits=limits,
        )
        self.scales, self.anchor_size = tuple(scales), anchor_size
        pedestrian_anchors((1, 1), width=anchor_size[0], height=anchor_size[1], scales=self.scales)  # refuses what is no size
        self.conv = nn.Conv2d(self.channels, hidden, kernel_size=3, padding=1)
        self.relu = nn.ReLU()
        self.score = nn.Conv2d(hidden, len(self.scales), kernel_size=1)
        self.box = nn.Conv2d(hidden, 4 * len(self.scales), kernel_size=1)
        for layer in (self.conv, self.score, self.box):
            begin_small(layer, std=0.01)

    @override
    def starts(
        self, shape: tuple[int, int], sizes: Sequence[tuple[int, int]], given: Sequence[Tensor] | None, like: Tensor
    ) -> list[Tensor]:
        width, height = self.anchor_size
        anchors = pedestrian_anchors(
            shape, stride=self.stride, width=width, height=height, scales=self.scales, dtype=like.dtype, device=like.device
        )
        return [anchors for _ in sizes]

    @override
    def read(self, maps: Tensor, starts: Sequence[Tensor], chosen: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        hidden = self.relu(self.conv(maps))
        logits = self.score(hidden).permute(0, 2, 3, 1).flatten(1)
        boxes = self.box(hidden).permute(0, 2, 3, 1).reshape(len(maps), -1, 4)
        return (
            torch.cat([image[rows] for image, rows in zip(logits, chosen, strict=True)]),
            torch.cat([image[rows] for image, rows in zip(boxes, chosen, strict=True)]),
        )
