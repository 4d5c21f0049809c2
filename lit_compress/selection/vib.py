r"""Variational Information Bottleneck: from the noise that a layer's units can stand to which of them carry information.

Each unit is multiplied by :math:`\mu + \varepsilon \sigma`. A unit whose relative noise :math:`\alpha = \sigma^2 / \mu^2` is
large tells little of what it was, and is pruned.

Source: Dai et al., *Compressing Neural Networks Using the Variational Information Bottleneck* (VIBNet), 2018, and the authors'
code, from which the constants are.
"""

from __future__ import annotations

import torch
from torch import Tensor

_EPSILON = 1e-8


def kl(mu: Tensor, log_var: Tensor) -> Tensor:
    r"""Penalty of each unit, in nats: :math:`\frac{1}{2} \log(1 + \mu^2 / \sigma^2)`.

    The divergence of a unit from a marginal of the best variance, without the part that depends on the data. 1e-8 is added to
    :math:`\sigma^2`.

    Args:
        mu: :math:`\mu` ``(C,)``.
        log_var: :math:`\log \sigma^2` ``(C,)``.

    Returns:
        ``(C,)``, not negative; 0 for a unit that is switched off.

    Raises:
        ValueError: If the two differ in shape.

    Source: VIBNet, the practical objective; the 1e-8 is the code's.

    Example:
        >>> kl(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.0]))
        tensor([0.0000, 0.3466])
    """
    _refuse_shapes(mu, log_var)
    return 0.5 * torch.log1p(mu.square() / (log_var.exp() + _EPSILON))


def log_alpha(mu: Tensor, log_var: Tensor) -> Tensor:
    r"""Relative noise of each unit, :math:`\log \alpha = \log \sigma^2 - \log(\mu^2 + 10^{-8})`, ``(C,)``.

    Raises:
        ValueError: If the two differ in shape.

    Example:
        >>> log_alpha(torch.tensor([1.0]), torch.tensor([-9.0]))
        tensor([-9.])
    """
    _refuse_shapes(mu, log_var)
    return log_var - torch.log(mu.square() + _EPSILON)


def keep_units(mu: Tensor, log_var: Tensor, threshold: float = 0.0) -> Tensor:
    r"""Units that carry information: those with :math:`\log \alpha` below a threshold.

    Args:
        mu: :math:`\mu` ``(C,)``.
        log_var: :math:`\log \sigma^2` ``(C,)``.
        threshold: Higher keeps more. At 0, a unit goes whose noise is as large as itself.

    Returns:
        Their indices, ascending, int64; possibly none.

    Raises:
        ValueError: If the two differ in shape.

    Example:
        >>> keep_units(torch.tensor([1.0, 0.1]), torch.tensor([-2.0, -2.0]))
        tensor([0])
    """
    return (log_alpha(mu, log_var) < threshold).nonzero().flatten()


def _refuse_shapes(mu: Tensor, log_var: Tensor) -> None:
    if mu.shape != log_var.shape:
        raise ValueError(f"Expected `mu` and `log_var` of one shape but got {tuple(mu.shape)} and {tuple(log_var.shape)}.")
