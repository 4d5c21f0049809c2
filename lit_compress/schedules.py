"""Learning-rate schedules of the documents that torch has no class for."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["WarmupStepLR"]


class WarmupStepLR(LambdaLR):
    """The rate rises linearly to the optimizer's own, then falls by a factor every few steps.

    Args:
        optimizer: Its groups' rates are the highest ones, reached after the warm-up.
        warmup: Steps of the schedule, epochs as a rule, that the rise takes; 0 begins at the top.
        start: Share of the highest rate to begin with, in (0, 1].
        step_size: Steps between two falls, counted from the end of the warm-up.
        gamma: Factor of each fall.

    Raises:
        ValueError: If a number is out of range.

    Source: the ImageNet trainings of *Filter Distillation for Network Compression* (PFA), appendix C.3.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.6)
        >>> schedule = WarmupStepLR(optimizer, warmup=2, start=0.5, step_size=1, gamma=0.5)
        >>> rates = []
        >>> for epoch in range(5):
        ...     rates += schedule.get_last_lr()
        ...     optimizer.step()
        ...     schedule.step()
        >>> [round(rate, 1) for rate in rates]
        [0.8, 1.2, 1.6, 0.8, 0.4]
    """

    def __init__(self, optimizer: Optimizer, warmup: int, start: float, step_size: int, gamma: float) -> None:
        if warmup < 0 or step_size < 1:
            raise ValueError(f"Argument `warmup` must be at least 0 and `step_size` at least 1 but got {warmup} and {step_size}.")
        if not 0 < start <= 1:
            raise ValueError(f"Argument `start` must lie in (0, 1] but got {start}.")
        if gamma <= 0:
            raise ValueError(f"Argument `gamma` must be positive but got {gamma}.")

        def factor(step: int) -> float:
            if step < warmup:
                return start + (1 - start) * step / warmup
            return float(gamma ** ((step - warmup) // step_size))

        super().__init__(optimizer, factor)
