"""The mean input of a layer, over a stream of batches and over ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override


class StreamingMean(Metric):
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

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

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
        self.total = self.total + means.sum(0, dtype=torch.float64).to(self.total.device)
        self.count = self.count + len(values)

    @override
    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add what another metric has seen, which stays as it is.

        Args:
            incoming_state: Metric of as many channels, or its ``metric_state``.

        Raises:
            ValueError: If it is something else, or has another number of channels.
        """
        state = incoming_state.metric_state if isinstance(incoming_state, StreamingMean) else incoming_state
        if not isinstance(state, dict) or not self._defaults.keys() <= state.keys():
            raise ValueError(f"Expected a StreamingMean or its `metric_state` but got {type(incoming_state).__name__}.")
        count, total = (torch.as_tensor(state[name]).to(self.total) for name in ("count", "total"))
        if total.shape != self.total.shape:
            raise ValueError(f"Expected a mean of {self.channels} channels but got one of {total.shape[-1]}.")
        self.count, self.total = self.count + count, self.total + total
        self._update_count += 1
        self._computed = None

    @override
    def compute(self) -> Tensor:
        """Mean of everything seen since the last reset, on all ranks."""
        if self.count < 1:
            raise ValueError("A mean needs at least 1 sample but has none.")
        return self.total / self.count
