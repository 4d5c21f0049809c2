"""The best split for a linear model, in closed form."""

import torch
from torch import Tensor

from lit_compress.budget.noise import NoiseProcess, Process, QuantizationNoise, RateNoise, SamplingNoise, noise_process


def linear_resources(
    weights: Tensor,
    total: float,
    process: Process | NoiseProcess = "sampling",
    variance: float | Tensor = 1.0,
    price: float | Tensor = 1.0,
) -> Tensor:
    r"""Units for each context that minimise the squared error of a linear model with fixed weights.

    The error that the noise adds is :math:`\sum_c w_c^2 \sigma_c(r_c)^2`. Under :math:`\sum_c p_c r_c = B` it is least at

    - sampling: :math:`r_c \propto |w_c| \sqrt{v_c / p_c}`,
    - rate: :math:`r_c \propto (w_c^2 v_c / p_c)^{1/3}`,
    - quantisation: :math:`r_c = \max(0, \tfrac12 \log_2 (w_c^2 v_c / p_c) - \lambda)`, with λ such that the total is spent.

    Args:
        weights: ``(C,)``, or ``(C, *)`` for several features or outputs a context, whose squares then add up; no context may have
            only zeros.
        total: B, in money.
        process: One of the three; a process of your own has no closed form here.
        variance: v, one number or ``(C,)``.
        price: p, one number or ``(C,)``.

    Returns:
        ``(C,)``.

    Raises:
        ValueError: If the process is another one, or a number is not positive.

    Source: Lagrange's condition for each process; that such a form exists is Richman and Mannor's, 2016.

    Example:
        >>> linear_resources(torch.tensor([3.0, -1.0]), total=8)
        tensor([6., 2.])
        >>> linear_resources(torch.tensor([4.0, 1.0]), total=8, process="quantization")
        tensor([5., 3.])
    """
    power = weights.flatten(1).square().sum(1) if weights.ndim > 1 else weights.square()
    power = power * variance
    price = torch.as_tensor(price, dtype=power.dtype, device=power.device).expand_as(power)
    if not (power > 0).all() or not (price > 0).all() or total <= 0:
        raise ValueError("Every context's weight, variance and price must be positive, and the total; leave idle contexts out.")
    process = noise_process(process)
    if isinstance(process, SamplingNoise):
        units = (power / price).sqrt()
    elif isinstance(process, RateNoise):
        units = (power / price) ** (1 / 3)
    elif isinstance(process, QuantizationNoise):
        return _water_filled((power / price).log2() / 2, price, total)
    else:
        raise ValueError(f"There is no closed form for {type(process).__name__}; learn the split by BudgetSplit.")
    return total * units / (price * units).sum()


def _water_filled(levels: Tensor, price: Tensor, total: float) -> Tensor:
    """``max(0, levels - λ)``, costing ``total``: the contexts of the highest levels, as many as stay above λ."""
    order = levels.argsort(descending=True)
    cost = price[order].cumsum(0)
    floors = ((price * levels)[order].cumsum(0) - total) / cost  # λ if the first so many contexts are served
    served = int((levels[order] > floors).sum())
    return (levels - floors[served - 1]).clamp_min(0)
