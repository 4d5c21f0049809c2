"""The mean input of a layer, over a stream of batches and over ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lit_compress.statistics.covariance import with_float64
from lit_compress.statistics.sums import SumMetric


class StreamingMean(SumMetric):
    """Mean of each channel over samples and positions, in float64.

    Args:
        channels: Number of channels C.
        kwargs: Passed to :class:`~torchmetrics.Metric`.

    Shape:
        - ``update``: values ``(N, C)`` or ``(N, C, *spatial)``, any float dtype.
        - ``compute``: ``(C,)`` float64.

    Raises:
        ValueError: If values of another number of channels come, or ``compute`` has seen none.

    Example:
        >>> mean = StreamingMean(channels=2)
        >>> mean.update(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))
        >>> mean.compute()
        tensor([1., 1.], dtype=torch.float64)
    """

    count: Tensor
    total: Tensor

    def __init__(self, channels: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.channels = channels
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(channels, dtype=torch.float64), dist_reduce_fx="sum")

    @override
    def update(self, values: Tensor) -> None:
        """Add a batch."""
        if values.ndim < 2 or values.shape[1] != self.channels:
            raise ValueError(f"Expected values of {self.channels} channels but got shape {tuple(values.shape)}.")
        # Means over positions first, in single precision: they are many, and a float64 copy of them would be large.
        precision = torch.promote_types(values.dtype, torch.float32)
        means = values.detach().flatten(2).mean(2, dtype=precision) if values.ndim > 2 else values.detach()
        means = means.to(with_float64(means.device))
        self.total = self.total + means.sum(0, dtype=torch.float64).to(self.total.device)
        self.count = self.count + len(values)

    @override
    def compute(self) -> Tensor:
        """Mean of everything seen since the last reset, on all ranks."""
        if self.count < 1:
            raise ValueError("A mean needs at least 1 sample but has none.")
        return self.total / self.count
