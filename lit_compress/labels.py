"""Label tensors: which source channel each element of a tensor came from.

A label tensor has the shape of the tensor it describes and holds one integer an element: an *atom* (one output channel of one
layer), or :data:`FIXED` for what no layer made and no cut may remove. Labels that do not change along a dimension have stride 0
there, so that the labels of a large feature map are as small as its number of channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

FIXED = -1


def spread(vector: Tensor, shape: Sequence[int], dim: int) -> Tensor:
    """Labels of ``shape`` that follow ``vector`` along ``dim`` and are constant elsewhere."""
    view = [1] * len(shape)
    view[dim] = -1
    return vector.view(view).expand(tuple(shape))


def collapsed(labels: Tensor) -> Tensor:
    """The same labels with extent 1 wherever they are constant; broadcasting undoes it."""
    for dim, (size, stride) in enumerate(zip(labels.shape, labels.stride(), strict=True)):
        if stride == 0 and size > 1:
            labels = labels.narrow(dim, 0, 1)
    for dim, size in enumerate(labels.shape):
        # Materialised by a reshape or an index: constant all the same.
        if size > 1 and bool((labels == labels.narrow(dim, 0, 1)).all()):
            labels = labels.narrow(dim, 0, 1)
    return labels


def varies(labels: Tensor, dim: int) -> bool:
    """Whether the labels change along ``dim``, so that the dimension carries channels."""
    return collapsed(labels).shape[dim] > 1


def vector_along(labels: Tensor, dim: int) -> Tensor | None:
    """The label of each index of ``dim`` if it is the same everywhere else, otherwise None."""
    small = collapsed(labels)
    dim = dim % labels.ndim
    if any(size > 1 for other, size in enumerate(small.shape) if other != dim):
        return None
    return small.flatten().expand(labels.shape[dim])


def aligned(labels: Tensor, ndim: int) -> Tensor:
    """Labels with leading dimensions added, as broadcasting aligns shapes."""
    return labels.reshape((1,) * (ndim - labels.ndim) + tuple(labels.shape)) if labels.ndim < ndim else labels


def splits(before: Sequence[int], after: Sequence[int], carrying: Sequence[bool]) -> list[list[int]]:
    """Dimensions of a reshaped tensor into which a dimension that carries channels was split, a list for each such place.

    ``(C, H, W) -> (C * H * W,)`` splits nothing. ``(C,) -> (groups, C / groups)`` does: with fewer channels the same reshape
    sorts them into other groups, unless each group loses as many.

    Args:
        before: Shape before.
        after: Shape after.
        carrying: For each dimension before, whether it carries channels.

    Example:
        >>> splits([1, 8, 2, 2], [1, 32], [False, True, False, False])
        []
        >>> splits([1, 8, 2, 2], [1, 2, 4, 2, 2], [False, True, False, False])
        [[1, 2]]
    """
    found = []
    i = j = 0
    while i < len(before) or j < len(after):
        # The smallest runs of dimensions on both sides that hold the same number of elements.
        first_i, first_j = i, j
        left = right = 1
        while i == first_i or j == first_j or left != right:
            if (left <= right and i < len(before)) or j >= len(after):
                if i >= len(before):
                    break
                left *= before[i]
                i += 1
            else:
                right *= after[j]
                j += 1
        wide = [k for k in range(first_j, j) if after[k] > 1]
        if len(wide) > 1 and any(carrying[first_i:i]):
            found.append(wide)
    return found


def to_numpy(labels: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Labels as a numpy array, without repeats that come from constant dimensions."""
    return collapsed(labels).cpu().numpy().astype(np.int64)


def fixed(shape: Sequence[int]) -> Tensor:
    """Labels of something that no layer made."""
    return torch.full((1,) * len(shape), FIXED, dtype=torch.int64).expand(tuple(shape))
