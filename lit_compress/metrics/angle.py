"""How far off an angle is, the short way round."""

from math import pi
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override


class MeanAngleError(Metric):
    r"""Mean of :math:`|\Delta|` in radians, in [0, π], with the difference Δ of two angles taken the short way round the circle.

    Angles come in radians, or as bins of equal width: bin b of K covers the angles around :math:`2 \pi b / K`.

    Args:
        bins: K; ``None`` if angles come in radians.
        kwargs: Passed to :class:`~torchmetrics.Metric`.

    Shape:
        - ``update``, with bins: logits ``(N, K)`` or bins ``(N,)`` int64, and bins ``(N,)`` int64; without: ``(N,)`` and
          ``(N,)`` floats.
        - ``compute``: scalar.

    Raises:
        ValueError: If ``bins`` is below 1, shapes do not fit, or ``compute`` has seen nothing.

    Source: *Resource-Efficient Feature Gathering at Test Time*, section 3.3.1; that the error is circular is ours.

    Example:
        >>> error = MeanAngleError(bins=4)
        >>> error.update(torch.tensor([[0.1, 0.2, 0.3, 0.9]]), torch.tensor([0]))  # three quarters are one quarter
        >>> error.compute()
        tensor(1.5708)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    count: Tensor
    total: Tensor

    def __init__(self, bins: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if bins is not None and bins < 1:
            raise ValueError(f"Argument `bins` must be at least 1 but got {bins}.")
        self.bins = bins
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")

    @override
    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch."""
        if self.bins is not None and preds.ndim == 2 and preds.shape[1] == self.bins:
            preds = preds.argmax(dim=1)
        if preds.shape != target.shape or preds.ndim != 1:
            raise ValueError(
                f"Expected angles (N,) and (N,){'' if self.bins is None else f', or logits (N, {self.bins})'}, but got "
                f"{tuple(preds.shape)} and {tuple(target.shape)}."
            )
        circle = 2 * pi if self.bins is None else self.bins
        off = torch.remainder(preds - target, circle)
        self.total = self.total + torch.minimum(off, circle - off).sum() * (2 * pi / circle)
        self.count = self.count + len(target)

    @override
    def compute(self) -> Tensor:
        """Mean over everything seen since the last reset, on all ranks."""
        if self.count < 1:
            raise ValueError("A mean needs at least 1 angle but has none.")
        return self.total / self.count
