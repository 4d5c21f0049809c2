"""The entropies of a layer's sigmoid units, over a stream of batches and over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lit_compress.selection import pib
from lit_compress.statistics.sums import SumMetric


class StreamingEntropies(SumMetric):
    """Entropies of units whose activation is read as a probability, over a stream of batches.

    The states are float64 sums over samples, at every position of a feature map, so that batches and ranks add up: memory is that
    of a few samples whatever their number.

    Args:
        shape: Of one sample's activations: ``(C,)``, or ``(C, *spatial)`` for a convolution.
        kwargs: Passed to :class:`~torchmetrics.Metric`.

    Shape:
        - ``update``: activations ``(N, C)`` or ``(N, C, *spatial)`` in [0, 1], any float dtype.
        - ``compute``: ``(3, C)`` float64, bits: the noise, and the marginal by Jensen's bound and exactly.

    Raises:
        ValueError: If activations of another shape come or leave [0, 1] (the states are then as they were), or ``compute`` has
            seen none.

    Source: PIBprune, section 4.4.

    Example:
        >>> metric = StreamingEntropies(shape=(2,))
        >>> metric.update(torch.tensor([[0.0, 0.5]]))
        >>> metric.update(torch.tensor([[1.0, 0.5]]))
        >>> metric.entropies("exact").information
        tensor([1., 0.], dtype=torch.float64)
    """

    count: Tensor
    sums: Tensor

    def __init__(self, shape: Sequence[int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.shape = tuple(shape)
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("sums", torch.zeros(5, *self.shape, dtype=torch.float64), dist_reduce_fx="sum")

    @override
    def update(self, q: Tensor) -> None:
        """Add a batch."""
        if q.ndim < 2 or tuple(q.shape[1:]) != self.shape:
            raise ValueError(
                f"Expected activations of shape (N, {', '.join(map(str, self.shape))}) but got {tuple(q.shape)}; a feature map "
                "must have one size."
            )
        self.sums = self.sums + pib.activation_sums(q).to(self.sums.device)
        self.count = self.count + len(q)

    @override
    def compute(self) -> Tensor:
        """Noise, and both marginals, of everything seen since the last reset, on all ranks."""
        jensen, exact = self.entropies("jensen"), self.entropies("exact")
        return torch.stack([jensen.noise, jensen.marginal, exact.marginal])

    def entropies(self, marginal: pib.Marginal = "jensen") -> pib.Entropies:
        """The same as :func:`pib.entropies <lit_compress.selection.pib.entropies>` of all samples, of this rank's states.

        Raises:
            ValueError: If no sample was seen, or the marginal is unknown.
        """
        if self.count < 1:
            raise ValueError("Entropies need at least 1 sample but have none.")
        return pib.from_sums(self.sums, int(self.count), marginal)

    @property
    def middle(self) -> float:
        """Share of the activations seen that lie between 0.1 and 0.9, where a unit is unsure."""
        return float(self.sums[4].sum() / (self.count * self.sums[4].numel()))
