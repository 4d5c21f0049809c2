"""Networks that say of a patch whether it shows a pedestrian: a large teacher, and students of it."""

from __future__ import annotations

from typing import Literal

from torch import nn

from lit_compress.detection.acf import ACFChannels
from lit_compress.detection.backbones import imagenet_colours
from lit_compress.models.hint import with_hint
from lit_compress.models.preact_resnet import PreActResNet


def pedestrian_resnet(
    size: Literal["200", "18", "thin", "small"] = "18",
    inputs: Literal["rgb", "acf"] = "rgb",
    dropout: float = 0.0,
    side: int = 224,
) -> PreActResNet:
    """The teacher and the students of *In Teacher We Trust*: pedestrian or not, behind a hint layer ``fc.hint`` of 64.

    Their parameters, with those of batch norms, from RGB:

    ============  ==========================================  ===========
    ``"200"``     ResNet-200, the teacher                     62,748,546
    ``"18"``      ResNet-18                                   11,207,810
    ``"thin"``    half as many channels                       2,814,626
    ``"small"``   32 channels in every layer                  158,626
    ============  ==========================================  ===========

    The document's 157 K of the last are the 157,474 without batch norms.

    Args:
        size: Which of them.
        inputs: ``"rgb"`` standardises images in [0, 1] by ImageNet's mean and deviation; ``"acf"`` computes the ten channels of
            :class:`~lit_compress.detection.ACFChannels`, resized to the image's side. So all take the same batch.
        dropout: Probability of the dropout layer in front of the hint layer; the teacher has 0.5.
        side: Height and width of a patch in pixels.

    Raises:
        ValueError: If there is no such size or input.

    Source: *In Teacher We Trust: Learning Compressed Models for Pedestrian Detection*, section 5.3, tables 1 and 2. Table 1
    prints 3×3 throughout the bottlenecks, which would make 284 M; the 63 M of table 2 are those of 1×1, 3×3, 1×1.

    Example:
        >>> import torch
        >>> student = pedestrian_resnet("small", inputs="acf", side=64)
        >>> student(torch.rand(2, 3, 64, 64)).shape, student.fc.hint
        (torch.Size([2, 2]), Linear(in_features=32, out_features=64, bias=True))
    """
    full = (64, 128, 256, 512)
    sizes = {"200": (200, full), "18": (18, full), "thin": (18, (32, 64, 128, 256)), "small": (18, (32, 32, 32, 32))}
    if size not in sizes:
        raise ValueError(f"Argument `size` must be one of {list(sizes)} but got {size!r}.")
    if inputs not in ("rgb", "acf"):
        raise ValueError(f'Argument `inputs` must be "rgb" or "acf" but got {inputs!r}.')
    depth, widths = sizes[size]
    first: nn.Module = imagenet_colours()
    if inputs == "acf":
        first = ACFChannels(size=(side, side))
    network = PreActResNet(depth, num_classes=2, in_channels=3 if inputs == "rgb" else 10, widths=widths, inputs=first)
    with_hint(network, "fc", width=64, dropout=dropout)
    return network
