"""What detectors of pedestrians have in common: how images come in, what the loss looks at, and what is left of their boxes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import clip_boxes_to_image
from typing_extensions import override

from lit_compress import ranks
from lit_compress.detection.anchors import decode_boxes, encode_boxes
from lit_compress.detection.assignment import NEITHER, POSITIVE, assign_anchors, sample_anchors
from lit_compress.detection.backbones import imagenet_colours, measured
from lit_compress.detection.objective import Target, detection_losses, persons_to_learn
from lit_compress.detection.suppression import best_detections
from lit_compress.graph import evaluating
from lit_compress.pedestrians.protocol import PERSON


@dataclass(frozen=True, kw_only=True)
class DetectionLimits:
    """Which of a network's many boxes are detections; see :func:`~lit_compress.detection.best_detections`.

    Args:
        min_width: Least width in pixels of the image as it was given.
        min_height: Least height in pixels.
        before: How many of the highest score are compared.
        overlap: Intersection over union above which the lower of two goes.
        after: How many are left at most.
    """

    min_width: float = 16.0
    min_height: float = 50.0
    before: int = 10_000
    overlap: float = 0.5
    after: int = 40


class Entered(NamedTuple):
    """A batch of images as the backbone takes them."""

    images: Tensor
    """``(N, 3, H, W)``: resized, standardised, and padded with zeros to the right and below."""
    sizes: list[tuple[int, int]]
    """Height and width of each without the padding."""
    scales: list[Tensor]
    """``(4,)``: what boxes of the image as it was given are multiplied by."""


class Wanted(NamedTuple):
    """What the loss wants of the boxes of one image, before any of them is looked at."""

    labels: Tensor
    """``(A,)``: 1 for a person, 0 for none, -1 for what is left out."""
    boxes: Tensor
    """``(A, 4)``: the person's box relative to that of the detector, 0 where there is none."""


class PedestrianDetector(nn.Module, ABC):
    """A detector whose boxes start from given ones, each with a logit of holding a pedestrian; a subclass says from which.

    Boxes relative to those that they start from are learnt standardised, by the buffers ``target_mean`` and ``target_std``.

    Args:
        backbone: Network from images ``(N, 3, H, W)`` to one feature map. Its channels and its stride are measured.
        image_size: Short side that images are resized to, and what the long side may be at most, in pixels. ``None`` leaves them.
        box_weight: Factor on the loss of boxes.
        positives: Boxes with a person, per image, that the loss looks at, at most.
        negatives: Boxes without one, likewise.
        balanced: Whether few positives weigh as much as ``positives``.
        min_height: Persons less tall, in pixels, are not learnt and no negatives either.
        min_visible: And so are those of whom a smaller share is visible.
        limits: Which boxes are detections.

    Raises:
        ValueError: If a number is out of range, or the backbone gives no feature map.
    """

    target_mean: Tensor
    target_std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        *,
        image_size: tuple[int, int] | None,
        box_weight: float,
        positives: int,
        negatives: int,
        balanced: bool,
        min_height: float,
        min_visible: float,
        limits: DetectionLimits | None,
    ) -> None:
        super().__init__()
        if image_size is not None and not 0 < image_size[0] <= image_size[1]:
            raise ValueError(f"Argument `image_size` must be a short side and a longest long side but got {image_size}.")
        for name, number in (("box_weight", box_weight), ("min_height", min_height)):
            if number < 0:
                raise ValueError(f"Argument `{name}` must be 0 or more but got {number}.")
        if min(positives, negatives) < 1:
            raise ValueError(f"Arguments `positives` and `negatives` must be at least 1 but got {positives} and {negatives}.")
        if not 0 <= min_visible <= 1:
            raise ValueError(f"Argument `min_visible` must lie in [0, 1] but got {min_visible}.")
        self.backbone = backbone
        self.channels, self.stride = measured(backbone)
        self.image_size, self.box_weight = image_size, box_weight
        self.positives, self.negatives, self.balanced = positives, negatives, balanced
        self.min_height, self.min_visible = min_height, min_visible
        self.limits = DetectionLimits() if limits is None else limits
        self.frozen: tuple[str, ...] = ()
        self.register_buffer("target_mean", torch.zeros(4))
        self.register_buffer("target_std", torch.ones(4))
        self.colours = imagenet_colours()

    @abstractmethod
    def starts(
        self, shape: tuple[int, int], sizes: Sequence[tuple[int, int]], given: Sequence[Tensor] | None, like: Tensor
    ) -> list[Tensor]:
        """Boxes ``(A, 4)`` of each image that the detector's own start from, in pixels of the images as they entered.

        Args:
            shape: Height and width of the feature map.
            sizes: Of the images as they entered.
            given: Boxes given for each image, if there are any.
            like: A tensor of the dtype and on the device of the result.
        """

    @abstractmethod
    def read(self, maps: Tensor, starts: Sequence[Tensor], chosen: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits ``(K,)`` and relative, standardised boxes ``(K, 4)`` of the boxes chosen, one image after the other.

        Args:
            maps: ``(N, channels, H, W)``.
            starts: What :meth:`starts` gave.
            chosen: Indices of those that are asked for, in each image.
        """

    def learn_from(self, given: Sequence[Tensor] | None, persons: Sequence[Tensor]) -> Sequence[Tensor] | None:
        """Boxes given for training, by those given for the images and by the persons in them."""
        return given

    @override
    def forward(
        self,
        images: Sequence[Tensor],
        proposals: Sequence[Tensor] | None = None,
        targets: Sequence[Target] | None = None,
    ) -> list[dict[str, Tensor]] | dict[str, Tensor]:
        """Detections in each image; with targets, the parts of the loss.

        Args:
            images: ``(3, H, W)`` in [0, 1], of any size.
            proposals: Boxes ``(n, 4)`` of each image for detectors that start from given ones, as left, top, right, bottom.
            targets: What :meth:`losses` takes; its proposals are in them.

        Returns:
            For each image ``boxes`` ``(n, 4)`` in its own pixels, ``scores`` ``(n,)`` in [0, 1], highest first, and ``labels``.
            With targets, what :meth:`losses` gives.
        """
        if targets is not None:
            return self.losses(images, targets)
        entered = self._enter(images)
        maps: Tensor = self.backbone(entered.images)
        starts = self._starts(entered, maps.shape[2:], proposals)
        everything = [torch.arange(len(start), device=start.device) for start in starts]
        logits, relative = self.read(maps, starts, everything)
        counts = [len(start) for start in starts]
        found = []
        for image, scale, start, logit, offset in zip(
            images, entered.scales, starts, logits.split(counts), relative.split(counts), strict=True
        ):
            boxes = decode_boxes(offset.to(start.dtype) * self.target_std + self.target_mean, start) / scale
            boxes = clip_boxes_to_image(boxes, (image.shape[1], image.shape[2]))
            scores = logit.to(start.dtype).sigmoid()
            kept = best_detections(boxes, scores, **asdict(self.limits))
            labels = torch.full((len(kept),), PERSON, device=boxes.device)
            found.append({"boxes": boxes[kept], "scores": scores[kept], "labels": labels})
        return found

    def losses(self, images: Sequence[Tensor], targets: Sequence[Target]) -> dict[str, Tensor]:
        """The parts of the loss, means over the images of a batch; their sum is what is minimised.

        The boxes looked at are drawn from torch's global RNG. Of each image, with weights w that add up to W: cross-entropy
        Σ w · CE / W, and of the positives among them, smooth L1 of their four numbers, Σ w · smooth L1 / W.

        Args:
            images: As for :meth:`forward`.
            targets: For each image ``boxes`` ``(m, 4)``, and any of ``labels``, ``visible``, ``ignore`` as
                :class:`~lit_compress.metrics.LogAverageMissRate` takes them; ``proposals`` where the detector needs them.

        Returns:
            ``classification`` (nats) and ``boxes``, by ``box_weight``.
        """
        entered = self._enter(images)
        maps: Tensor = self.backbone(entered.images)
        starts, wanted = self._wanted(entered, maps.shape[2:], targets)
        weights = [
            sample_anchors(one.labels, positives=self.positives, negatives=self.negatives, balanced=self.balanced)
            for one in wanted
        ]
        chosen = [weight.nonzero().flatten() for weight in weights]
        logits, relative = self.read(maps, starts, chosen)
        counts = [len(rows) for rows in chosen]
        parts = []
        for one, weight, rows, logit, offset in zip(
            wanted, weights, chosen, logits.split(counts), relative.split(counts), strict=True
        ):
            labels, weight = one.labels[rows], weight[rows]
            target = (one.boxes[rows] - self.target_mean) / self.target_std
            parts.append(torch.stack(detection_losses(logit.to(target.dtype), offset.to(target.dtype), labels, target, weight)))
        classification, boxes = torch.stack(parts).mean(dim=0)
        return {"classification": classification, "boxes": self.box_weight * boxes}

    @torch.no_grad()
    def measure_targets(self, batches: Iterable[tuple[Sequence[Tensor], Sequence[Target]]]) -> None:
        """Set ``target_mean`` and ``target_std`` to those of all positives in some batches, of all ranks together.

        Raises:
            ValueError: If there are fewer than two positives, or they do not vary.
        """
        sums = torch.zeros(9, dtype=torch.float64)
        shapes: dict[tuple[int, ...], tuple[int, int]] = {}  # of feature maps, by the size of the images
        with ranks.as_one():
            for images, targets in batches:
                entered = self._enter(images)
                size = tuple(entered.images.shape[2:])
                if size not in shapes:
                    with evaluating(self.backbone):
                        shapes[size] = self.backbone(entered.images[:1]).shape[2:]
                for one in self._wanted(entered, shapes[size], targets)[1]:
                    found = one.boxes[one.labels == POSITIVE].double().cpu()
                    sums += torch.cat([torch.tensor([len(found)]), found.sum(0), found.square().sum(0)])
            sums = torch.stack(ranks.share(sums)).sum(0)
        count = sums[0]
        mean = sums[1:5] / count
        std = (sums[5:] / count - mean**2).clamp(min=0).sqrt()
        if count < 2 or (std < 1e-6).any():
            raise ValueError(
                f"The training images gave {int(count)} boxes with a pedestrian, with deviations {std.tolist()}, so that they "
                "cannot be standardised. Do their persons reach `min_height` and `min_visible`, and the sizes of anchors?"
            )
        self.target_mean.copy_(mean)
        self.target_std.copy_(std)

    def freeze(self, layers: Sequence[str]) -> None:
        """Keep layers of the backbone as they are: their parameters take no gradient, and they stay in evaluation mode.

        Raises:
            ValueError: If the backbone has no such layer.
        """
        known = dict(self.backbone.named_modules())
        if missing := [layer for layer in layers if layer not in known or not layer]:
            raise ValueError(f"The backbone has no layers {missing} to freeze; it has {[name for name in known if name][:8]} ….")
        for layer in layers:
            known[layer].requires_grad_(False)
        self.frozen = tuple(layers)
        self.train(self.training)

    @override
    def train(self, mode: bool = True) -> PedestrianDetector:
        super().train(mode)
        for layer in self.frozen:
            self.backbone.get_submodule(layer).eval()
        return self

    def _enter(self, images: Sequence[Tensor]) -> Entered:
        resized, sizes, scales = [], [], []
        for image in images:
            height, width = image.shape[1:]
            size = self._size(height, width)
            image = self.colours(image)
            if size != (height, width):
                image = F.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]
            resized.append(image)
            sizes.append(size)
            scales.append(self._scale(image, height, width))
        most = [max(sides) for sides in zip(*sizes, strict=True)]
        padded = [F.pad(image, (0, most[1] - image.shape[2], 0, most[0] - image.shape[1])) for image in resized]
        return Entered(torch.stack(padded), sizes, scales)

    def boxes_on_input(self, images: Sequence[Tensor], boxes: Sequence[Tensor]) -> list[Tensor]:
        """Boxes of images where the backbone sees them, which takes images resized.

        Args:
            images: ``(3, H, W)`` each.
            boxes: ``(m, 4)`` of each: left, top, right, bottom, in pixels of the image.

        Returns:
            ``(m, 4)`` of each, in pixels of what the backbone gets.
        """
        return [
            of_image * self._scale(image, *image.shape[1:]).to(of_image) for image, of_image in zip(images, boxes, strict=True)
        ]

    def _scale(self, image: Tensor, height: int, width: int) -> Tensor:
        """Of boxes, when an image of this size is resized."""
        size = self._size(height, width)
        # Pixels need at least single precision, whatever the network computes in.
        precise = torch.promote_types(image.dtype, torch.float32)
        return image.new_tensor([size[1] / width, size[0] / height] * 2, dtype=precise)

    def _size(self, height: int, width: int) -> tuple[int, int]:
        if self.image_size is None:
            return height, width
        scale = min(self.image_size[0] / min(height, width), self.image_size[1] / max(height, width))
        return round(height * scale), round(width * scale)

    def _starts(self, entered: Entered, shape: Any, given: Sequence[Tensor] | None) -> list[Tensor]:
        scaled = None if given is None else [boxes * scale for boxes, scale in zip(given, entered.scales, strict=True)]
        return self.starts((int(shape[0]), int(shape[1])), entered.sizes, scaled, entered.scales[0])

    def _wanted(self, entered: Entered, shape: Any, targets: Sequence[Target]) -> tuple[list[Tensor], list[Wanted]]:
        """Boxes that the detector's own start from, and what is wanted of them."""
        known = [persons_to_learn(target, self.min_height, self.min_visible) for target in targets]
        given = [target["proposals"] for target in targets] if "proposals" in targets[0] else None
        starts = self._starts(entered, shape, self.learn_from(given, [boxes[~ignore] for boxes, ignore in known]))
        wanted = []
        for start, size, scale, (boxes, ignore) in zip(starts, entered.sizes, entered.scales, known, strict=True):
            boxes = boxes * scale
            labels, persons = assign_anchors(start, boxes, ignore, size)
            middle = (start[:, :2] + start[:, 2:]) / 2
            labels[(middle[:, 0] > size[1]) | (middle[:, 1] > size[0])] = NEITHER  # in the padding
            relative = torch.zeros_like(start)
            found = labels == POSITIVE
            relative[found] = encode_boxes(boxes[persons[found]], start[found])
            wanted.append(Wanted(labels, relative))
        return starts, wanted


def begin_small(layer: nn.Conv2d | nn.Linear, std: float) -> None:
    """Draw a layer's weights from N(0, std²), in place; its biases become 0, so that it says next to nothing at first."""
    nn.init.normal_(layer.weight, std=std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
