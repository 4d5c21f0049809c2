"""The network that a detector looks through, whatever it is: its channels, its stride, and its weights from a file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import Normalize

from lit_compress.checkpoint import load_pruned, read
from lit_compress.graph import evaluating
from lit_compress.models.encoders import Encoder


def measured(backbone: nn.Module) -> tuple[int, int]:
    """Channels of a backbone's feature map, and pixels of the image between two of its cells.

    Raises:
        ValueError: If it gives no feature map ``(N, C, H, W)``, or its strides differ.

    Example:
        >>> measured(nn.Conv2d(3, 5, kernel_size=3, stride=4))
        (5, 4)
    """
    like = next(backbone.parameters(), torch.zeros(()))
    shapes = []
    with torch.no_grad(), evaluating(backbone):
        for side in (256, 512):
            maps = backbone(torch.zeros(1, 3, side, side, dtype=like.dtype, device=like.device))
            if not isinstance(maps, Tensor) or maps.ndim != 4:
                raise ValueError(
                    f"Argument `backbone` must give one feature map (N, C, H, W), but {type(backbone).__name__} gave "
                    f"{tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__}. Of a torchvision network, take "
                    "the layers before its pool, e.g. `mobilenet_v3_small().features[:9]`."
                )
            shapes.append(maps.shape)
    more = [int(after - before) for before, after in zip(shapes[0][2:], shapes[1][2:], strict=True)]
    if more[0] != more[1] or more[0] < 1 or 256 % more[0]:
        raise ValueError(
            f"Argument `backbone` must have one stride, but 256 pixels more gave {more[0]} and {more[1]} cells more."
        )
    return int(shapes[0][1]), 256 // more[0]


def load_backbone(backbone: nn.Module, weights: str | Path) -> None:
    """Load the weights of a backbone from a file, in place.

    Args:
        backbone: The network.
        weights: State dict of it, or of torchvision's classification network for an encoder of this package, or checkpoint of a
            module that holds it.

    Raises:
        ValueError: If the weights do not fit, or the file holds more than tensors and builtin types.
    """
    content = read(weights)
    if isinstance(backbone, Encoder) and any(name.startswith("features.") for name in content):
        backbone.load_classifier(content)
    else:
        load_pruned(backbone, weights)


def imagenet_colours() -> Normalize:
    """Standardises images in [0, 1] by the mean and deviation of ImageNet's, as torchvision's weights expect them."""
    return Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
