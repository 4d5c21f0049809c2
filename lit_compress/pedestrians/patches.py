"""Parts of images, warped to one size: what a network is shown that says pedestrian or not, and what it makes of a box."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from lit_compress.graph import evaluating
from lit_compress.pedestrians.annotations import Detections


def warp(image: Tensor, box: tuple[float, float, float, float], side: int) -> Tensor:
    """A part of an image, stretched to a square.

    Args:
        image: ``(3, H, W)`` uint8.
        box: Left, top, width and height in pixels, rounded to whole ones; beyond the image its edge is repeated.
        side: Of the square.

    Returns:
        ``(3, side, side)`` float32 in [0, 1], bilinear and antialiased.

    Example:
        >>> warp(torch.zeros(3, 20, 30, dtype=torch.uint8), (25.0, -5.0, 10.0, 20.0), side=8).shape
        torch.Size([3, 8, 8])
    """
    left, top = round(box[0]), round(box[1])
    rows = torch.arange(top, max(round(box[1] + box[3]), top + 1)).clamp(0, image.shape[1] - 1)
    columns = torch.arange(left, max(round(box[0] + box[2]), left + 1)).clamp(0, image.shape[2] - 1)
    part = image[:, rows][:, :, columns].float() / 255
    warped: Tensor = F.resize(part, [side, side], antialias=True)
    return warped.clamp(0, 1)


@torch.no_grad()
def rescore(network: nn.Module, image: Tensor, proposals: Detections, side: int = 224, batch_size: int = 64) -> Detections:
    """The boxes of another detector, with the scores that a network of patches gives them.

    Args:
        network: From patches ``(N, 3, side, side)`` in [0, 1] to logits ``(N, 2)``, of no pedestrian and of one. It runs in
            evaluation mode, and is left as it was.
        image: ``(3, H, W)`` uint8.
        proposals: Boxes; their own scores are passed over.
        side: Height and width that patches are warped to.
        batch_size: Patches in a batch.

    Returns:
        The same boxes; a score is the log odds of a pedestrian.

    Raises:
        ValueError: If the network does not give two logits a patch.

    Source: *In Teacher We Trust*, section 5.

    Example:
        >>> from lit_compress.detection import pedestrian_resnet
        >>> image = torch.zeros(3, 120, 160, dtype=torch.uint8)
        >>> rescore(pedestrian_resnet("small"), image, Detections.of([[10, 10, 41, 100, 0.5]]), side=64).scores.shape
        (1,)
    """
    device = next((parameter.device for parameter in network.parameters()), image.device)
    scores = []
    with evaluating(network):
        for start in range(0, len(proposals.boxes), batch_size):
            rows = proposals.boxes[start : start + batch_size].tolist()
            logits = network(torch.stack([warp(image, (x, y, w, h), side) for x, y, w, h in rows]).to(device))
            if logits.shape != (len(rows), 2):
                raise ValueError(f"Expected logits {(len(rows), 2)} of {len(rows)} patches but got {tuple(logits.shape)}.")
            scores.append((logits[:, 1] - logits[:, 0]).double().cpu())
    return Detections(proposals.boxes, torch.cat([*scores, torch.empty(0, dtype=torch.float64)]).numpy())
