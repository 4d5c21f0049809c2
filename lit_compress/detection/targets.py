"""The boxes of a batch, wherever they are in it, in pixels of what a detector's backbone is given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

Size: TypeAlias = tuple[int, int]


@dataclass(frozen=True)
class Annotated:
    """The images of a batch and their boxes.

    Args:
        images: N images ``(C, H, W)``.
        boxes: Of each, ``(m, 4)``: left, top, right, bottom in its pixels; ignore regions included.
    """

    images: Sequence[Tensor]
    boxes: Sequence[Tensor]

    @property
    def sizes(self) -> list[Size]:
        """Height and width of each image."""
        return [(image.shape[-2], image.shape[-1]) for image in self.images]


@dataclass(frozen=True)
class Resizing:
    """What a detector does to its images before its backbone gets them: sizes before and after, without any padding."""

    before: Sequence[Size]
    after: Sequence[Size]


def annotated(batch: Any) -> Annotated:
    """Find images and boxes in a batch as torchvision's detectors take it, ``(images, targets)``, or in a dict of the two.

    Args:
        batch: Images are a tensor ``(N, C, H, W)`` or a list of ``(C, H, W)``; targets a list of dicts with ``boxes``.

    Raises:
        ValueError: If there are none, or not as many targets as images.

    Example:
        >>> import torch
        >>> found = annotated(([torch.zeros(3, 8, 9)], [{"boxes": torch.zeros(0, 4), "labels": []}]))
        >>> found.sizes, len(found.boxes[0])
        ([(8, 9)], 0)
    """
    parts = list(batch.values()) if isinstance(batch, Mapping) else list(batch) if isinstance(batch, (tuple, list)) else []
    images = next((part for part in parts if _are_images(part)), None)
    targets = next((part for part in parts if _are_targets(part)), None)
    if images is None or targets is None or len(images) != len(targets):
        raise ValueError(
            "Expected a batch of images and targets: images a tensor (N, C, H, W) or a list of (C, H, W), and targets as many "
            'dicts with "boxes". Say by `boxes` where they are in yours.'
        )
    return Annotated(list(images), [target["boxes"] for target in targets])


def boxes_on_input(found: Annotated, resizings: Sequence[Resizing], input_size: Size | None) -> list[Tensor]:
    """The boxes in pixels of the tensor that enters the backbone.

    Args:
        found: Boxes in pixels of their images.
        resizings: What torchvision's detectors did to the images in this step.
        input_size: Height and width of that tensor, if known.

    Raises:
        ValueError: If nothing tells how the images became what enters the backbone.
    """
    if len(resizings) == 1 and list(resizings[0].before) == found.sizes:
        scales = [(a[0] / b[0], a[1] / b[1]) for a, b in zip(resizings[0].after, resizings[0].before, strict=True)]
    elif not resizings and input_size == tuple(max(size[dim] for size in found.sizes) for dim in (0, 1)):
        scales = [(1.0, 1.0)] * len(found.boxes)  # as they are, or padded to the right and below to one size
    else:
        raise ValueError(
            f"The batch has images of {found.sizes[:3]} pixels and the backbone gets {input_size or 'an unknown size'}; nothing "
            "tells whether they were resized or padded. Give the boxes in pixels of what the backbone gets, by `boxes`."
        )
    return [one * one.new_tensor([across, down] * 2) for one, (down, across) in zip(found.boxes, scales, strict=True)]


@contextmanager
def resizing(network: nn.Module) -> Iterator[list[Resizing]]:
    """Fill the yielded list with what the transforms of torchvision's detectors do to images inside of the context."""
    seen: list[Resizing] = []
    with ExitStack() as stack:
        for module in network.modules():
            if isinstance(module, GeneralizedRCNNTransform):
                stack.callback(module.register_forward_hook(partial(_note, seen)).remove)
        yield seen


def _note(seen: list[Resizing], module: nn.Module, inputs: Any, output: Any) -> None:
    before = [(image.shape[-2], image.shape[-1]) for image in inputs[0]]
    seen.append(Resizing(before, [(height, width) for height, width in output[0].image_sizes]))


def _are_images(part: Any) -> bool:
    if isinstance(part, Tensor):
        return part.ndim == 4
    return isinstance(part, (tuple, list)) and bool(part) and all(isinstance(one, Tensor) and one.ndim == 3 for one in part)


def _are_targets(part: Any) -> bool:
    return isinstance(part, (tuple, list)) and bool(part) and all(isinstance(one, Mapping) and "boxes" in one for one in part)
