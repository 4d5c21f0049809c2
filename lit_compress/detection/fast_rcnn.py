"""Fast R-CNN for pedestrians: boxes of another detector, each pooled from the feature map, scored and moved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image, roi_align, roi_pool
from typing_extensions import override

from lit_compress.detection.detector import DetectionLimits, PedestrianDetector, begin_small
from lit_compress.models.encoders import AlexNetEncoder


class FastRCNN(PedestrianDetector):
    """A logit and a better box for each box that somebody proposes.

    What the feature map holds in a box is pooled to ``pooled`` × ``pooled``; two fully connected layers ``fc6`` and ``fc7`` with
    ReLU and dropout follow, then ``score`` and ``box``. In training the persons themselves are among the boxes proposed. A box is
    learnt as a person if it overlaps one by half, and as none if it overlaps nobody and no ignore region by half.

    Args:
        backbone: Network from images to a feature map; ``None`` takes :class:`~lit_compress.models.AlexNetEncoder`.
        hidden: Width of the two fully connected layers.
        pool: ``"max"``, as the original, or ``"align"``: means of bilinear samples, which do not round.
        pooled: Cells each way that a box is pooled to.
        dropout: Probability that a number is zeroed after each fully connected layer.
        image_size: Short side that images are resized to, and what the long side may be at most, in pixels. ``None`` leaves them.
        box_weight: Factor on the loss of boxes, λ_bbox.
        positives: Boxes with a person, per image, that the loss looks at, at most.
        negatives: Boxes without one, at most.
        min_height: Persons less tall, in pixels, are not learnt, and neither are negatives there.
        min_visible: And so are those of whom a smaller share is visible.
        limits: Which boxes are detections.

    Raises:
        ValueError: If a number is out of range, the backbone gives no feature map, or there are no proposals.

    Source: Girshick, *Fast R-CNN*, 2015; T1, section 3.4. Its numbers of positives and negatives are those of Fast R-CNN, a
    quarter of 64 an image.

    Example:
        >>> network = FastRCNN(AlexNetEncoder(width=0.125), hidden=32, image_size=None).eval()
        >>> proposals = torch.tensor([[10.0, 10.0, 51.0, 110.0]])
        >>> (found,) = network([torch.rand(3, 120, 160)], proposals=[proposals])
        >>> found["scores"].shape
        torch.Size([1])
    """

    def __init__(
        self,
        backbone: nn.Module | None = None,
        hidden: int = 4096,
        pool: Literal["max", "align"] = "max",
        pooled: int = 6,
        dropout: float = 0.5,
        image_size: tuple[int, int] | None = (1000, 1500),
        box_weight: float = 1.0,
        positives: int = 16,
        negatives: int = 48,
        min_height: float = 50.0,
        min_visible: float = 1.0,
        limits: DetectionLimits | None = None,
    ) -> None:
        super().__init__(
            AlexNetEncoder() if backbone is None else backbone,
            image_size=image_size,
            box_weight=box_weight,
            positives=positives,
            negatives=negatives,
            balanced=False,
            min_height=min_height,
            min_visible=min_visible,
            limits=limits,
        )
        if pool not in ("max", "align"):
            raise ValueError(f'Argument `pool` must be "max" or "align" but got {pool!r}.')
        if pooled < 1:
            raise ValueError(f"Argument `pooled` must be at least 1 but got {pooled}.")
        self.pool, self.pooled = pool, pooled
        self.fc6 = nn.Linear(self.channels * pooled**2, hidden)
        self.relu6 = nn.ReLU()
        self.dropout6 = nn.Dropout(dropout)
        self.fc7 = nn.Linear(hidden, hidden)
        self.relu7 = nn.ReLU()
        self.dropout7 = nn.Dropout(dropout)
        self.score = nn.Linear(hidden, 1)
        self.box = nn.Linear(hidden, 4)
        begin_small(self.score, std=0.01)
        begin_small(self.box, std=0.001)

    @override
    def starts(
        self, shape: tuple[int, int], sizes: Sequence[tuple[int, int]], given: Sequence[Tensor] | None, like: Tensor
    ) -> list[Tensor]:
        if given is None:
            raise ValueError(
                "Fast R-CNN scores boxes of another detector: give `proposals`, or targets with them, as "
                "ProposedPedestrianDataModule does."
            )
        return [clip_boxes_to_image(boxes, size) for boxes, size in zip(given, sizes, strict=True)]

    @override
    def learn_from(self, given: Sequence[Tensor] | None, persons: Sequence[Tensor]) -> Sequence[Tensor] | None:
        return None if given is None else [torch.cat(pair) for pair in zip(given, persons, strict=True)]

    @override
    def read(self, maps: Tensor, starts: Sequence[Tensor], chosen: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        boxes = [start[rows] for start, rows in zip(starts, chosen, strict=True)]
        side, precise = (self.pooled, self.pooled), maps.to(starts[0].dtype)
        if self.pool == "max":
            regions = roi_pool(precise, boxes, side, 1 / self.stride)
        else:
            regions = roi_align(precise, boxes, side, 1 / self.stride, sampling_ratio=2, aligned=True)
        hidden = self.dropout6(self.relu6(self.fc6(regions.to(maps.dtype).flatten(1))))
        hidden = self.dropout7(self.relu7(self.fc7(hidden)))
        return self.score(hidden)[:, 0], self.box(hidden)
