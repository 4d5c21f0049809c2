"""How far a reconstruction is from what it reconstructs, where somebody is."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def roi_reconstruction(reconstruction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Smooth ℓ1 distance of two feature maps, summed over the positions inside of a mask.

    .. math:: \sum_i M_i \, h(r_i - t_i), \qquad h(x) = x^2 / 2 \text{ if } |x| < 1, \text{ else } |x| - 1/2

    The document prints a norm of whole vectors that jumps at 1. This is the element-wise one that detectors' boxes are fitted by,
    and a sum and not a mean, since the weights of the document, around 1e-7, suit a sum.

    Args:
        reconstruction: ``(N, C, H, W)``.
        target: Of the same shape.
        mask: ``(N, 1, H, W)`` bool, as :func:`~lit_compress.detection.box_masks` makes it, or any that is broadcast to the shape
            of the maps. None counts every position, as the Stacked What-Where Autoencoder does.

    Returns:
        Scalar float32 or wider: 0 for an empty mask, whatever lies outside of it.

    Raises:
        ValueError: If the maps differ in shape, or the mask does not fit them or is not boolean.

    Source: *Region of Interest Autoencoders* (T1), equations 3.3.4 and 3.3.5.

    Example:
        >>> import torch
        >>> maps = torch.tensor([[[[0.5, 3.0, 9.0]]]])
        >>> roi_reconstruction(maps, torch.zeros(1, 1, 1, 3), torch.tensor([[[[True, True, False]]]]))  # 0.125 + 2.5
        tensor(2.6250)
    """
    if reconstruction.shape != target.shape:
        raise ValueError(f"Expected maps of one shape but got {tuple(reconstruction.shape)} and {tuple(target.shape)}.")
    if reconstruction.dtype.itemsize < 4:  # a sum over a map leaves the range of half precision
        reconstruction, target = reconstruction.float(), target.float()
    difference = reconstruction - target
    if mask is not None:
        fits = mask.ndim == difference.ndim and all(m in (1, s) for m, s in zip(mask.shape, difference.shape, strict=True))
        if mask.dtype != torch.bool or not fits:
            raise ValueError(
                f"Expected a boolean mask that fits maps of shape {tuple(difference.shape)} but got {mask.dtype} of shape "
                f"{tuple(mask.shape)}."
            )
        difference = difference.masked_fill(~mask, 0.0)  # and not times 0: what is infinite outside would stay
    return F.smooth_l1_loss(difference, difference.new_zeros(()).expand_as(difference), reduction="sum")
