r"""Parametric Information Bottleneck pruning: from the activations of sigmoid units to which of them carry information.

The activation :math:`q \in [0, 1]` of a sigmoid unit is read as the parameter of a Bernoulli variable :math:`Z_i`. What its
layer lets through of the one before is :math:`I(Z_i; Z_{l-1}) = H(Z_i) - H(Z_i | Z_{l-1})`. A unit that carries less than half
of what it could is pruned, as long as the layer keeps room for all the information that it has. All entropies are in bits; a
convolution's unit is a channel, whose figures are sums over the positions of its feature map.

Source: *Region of Interest Autoencoders* (thesis), chapter 4, PIBprune.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Marginal = Literal["jensen", "exact"]
Variant = Literal["A", "B", "C"]

# Of activations: outside of it a unit is nearly sure, and the Bernoulli reading of it is fair.
MIDDLE = (0.1, 0.9)
# A sum of entropies that exceeds an integer by no more than the rounding of float64 needs no further unit.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Entropies:
    r"""Entropies of a layer's units, in bits; those of a channel are sums over its positions.

    Args:
        noise: :math:`H(Z_i | Z_{l-1})` ``(C,)``, in [0, positions]: what is left open once the layer before is known.
        marginal: :math:`H(Z_i)` ``(C,)``, in [noise, positions].
        positions: Positions of the feature map, 1 for a fully connected layer; the most bits that a unit can have.
    """

    noise: Tensor
    marginal: Tensor
    positions: int = 1

    @property
    def information(self) -> Tensor:
        r""":math:`I(Z_i; Z_{l-1})` ``(C,)``, never negative: the rounding of a difference of equals is cut off."""
        return (self.marginal - self.noise).clamp(min=0)


def entropies(q: Tensor, marginal: Marginal = "jensen") -> Entropies:
    r"""Entropies of sigmoid units over a batch of samples.

    With :math:`h(q) = -q \log_2 q - (1 - q) \log_2 (1 - q)` and :math:`\bar p` the mean of q over the samples k,

    .. math:: H(Z_i | Z_{l-1}) = \frac{1}{n} \sum_k h(q_{k,i}), \qquad H(Z_i) = h(\bar p_i) \quad \text{("exact")}, \qquad
        H(Z_i) = \min\Big(1, -\frac{\bar p_i}{n} \sum_k \log_2 q_{k,i} - \frac{1 - \bar p_i}{n} \sum_k \log_2 (1 - q_{k,i})\Big)
        \quad \text{("jensen")}

    where "jensen" is a bound from above. Units at exactly 0 or 1 have :math:`h(q) = 0`; their logarithms are those of the
    smallest number that the dtype of ``q`` tells from 0, or from 1.

    Args:
        q: Activations ``(N, C)`` or ``(N, C, *spatial)`` in [0, 1].
        marginal: Which estimate of :math:`H(Z_i)`.

    Returns:
        float64, on the device of ``q`` (on the CPU if that has no float64).

    Raises:
        ValueError: If ``q`` is no batch of activations in [0, 1], or the marginal is unknown.

    Source: PIBprune, equations 4.4.11 to 4.4.15; (4.4.15) as printed lacks the weights :math:`\bar p`, and would always be 1 bit.

    Example:
        >>> found = entropies(torch.tensor([[0.0, 0.5], [1.0, 0.5]]), marginal="exact")
        >>> found.noise.tolist(), found.information.tolist()
        ([0.0, 1.0], [1.0, 0.0])
    """
    sums = activation_sums(q)
    if len(q) == 0:
        raise ValueError("Entropies need at least 1 sample but have none.")
    return from_sums(sums, len(q), marginal)


def relevance(q: Tensor, labels: Tensor) -> Tensor:
    r"""What each unit tells of the label, :math:`I(Z_i; Y) = h(\bar p_i) - \sum_y p(y) \, h(\bar p_{i,y})`, in bits.

    :math:`\bar p_{i,y}` is the mean activation over the samples of label y: exact, for a bit that is drawn with probability q.
    Units tell the same in part, so that their sum may exceed the entropy of the label.

    Args:
        q: Activations ``(N, C)`` or ``(N, C, *spatial)`` in [0, 1].
        labels: ``(N,)``, of any values.

    Returns:
        ``(C,)`` float64; of a convolution's channel the sum over its positions.

    Raises:
        ValueError: If ``q`` is no batch of activations in [0, 1], or there is not one label a sample.

    Source: the second axis of the information plane, PIBprune, section 4.4.

    Example:
        >>> relevance(torch.tensor([[0.0, 0.5], [1.0, 0.5]]), torch.tensor([3, 8]))
        tensor([1., 0.], dtype=torch.float64)
    """
    if len(q) == 0 or labels.shape != q.shape[:1]:
        raise ValueError(f"Expected one label a sample but got {tuple(labels.shape)} for activations {tuple(q.shape)}.")
    bits = _bits(activation_sums(q)[0] / len(q))
    for label in labels.unique():
        of_label = q[labels == label]
        bits = bits - len(of_label) / len(q) * _bits(activation_sums(of_label)[0] / len(of_label))
    return bits.clamp(min=0).reshape(len(bits), -1).sum(1)


def keep_units(found: Tensor | Entropies, variant: Variant = "A", *, marginal: Marginal = "jensen") -> Tensor:
    """Units that stay: all that carry at least half of what they can, and more if the layer's information needs the room.

    Units go in ascending order of :func:`scores`, as long as theirs is below half of the positions and more than
    :func:`least_width` are left.

    Args:
        found: Activations as for :func:`entropies`, or the entropies themselves.
        variant: Which score and which least width; see there.
        marginal: As for :func:`entropies`, if activations are given.

    Returns:
        Their indices, ascending, int64; at least one.

    Raises:
        ValueError: As :func:`entropies`, or if the variant is unknown.

    Source: PIBprune, section 4.5.

    Example:
        >>> keep_units(torch.tensor([[0.0, 0.5, 1.0], [1.0, 0.5, 0.0]]))
        tensor([0, 2])
    """
    measured = entropies(found, marginal) if isinstance(found, Tensor) else found
    order, width = removal_order(measured, variant), width_of(measured, variant)
    return order[len(order) - width :].sort().values


def scores(found: Entropies, variant: Variant = "A") -> Tensor:
    r"""What each unit is worth, in bits a position, ``(C,)`` in [0, 1].

    Variant A: the bound :math:`1 - H(Z_i | Z_{l-1})` on its information; B and C: its information.

    Raises:
        ValueError: If the variant is unknown.
    """
    if variant not in ("A", "B", "C"):
        raise ValueError(f"Argument `variant` must be 'A', 'B' or 'C' but got {variant!r}.")
    bits = found.positions - found.noise if variant == "A" else found.information
    return bits / found.positions


def least_width(found: Entropies, variant: Variant = "A") -> int:
    r"""Units that at least stay: as many as the layer's information fills.

    The sum over units of :math:`1 - H(Z_i | Z_{l-1})` (variants A and B) or of the information (C), in bits a position, rounded
    up; never below 1.

    Raises:
        ValueError: If the variant is unknown.
    """
    bits = scores(found, "C" if variant == "C" else "A").sum()
    scores(found, variant)  # refuses an unknown one
    return min(max(math.ceil(float(bits) - _ROUNDING), 1), len(found.noise))


def removal_order(found: Entropies, variant: Variant = "A") -> Tensor:
    """All units in ascending order of their score, of equals the first one first: ``(C,)`` int64."""
    return scores(found, variant).argsort(stable=True)


def width_of(found: Entropies, variant: Variant = "A") -> int:
    """How many units stay; see :func:`keep_units`."""
    return max(int((scores(found, variant) >= 0.5).sum()), least_width(found, variant))


def activation_sums(q: Tensor) -> Tensor:
    r"""What entropies need to know of a batch; batches add up.

    Args:
        q: Activations ``(N, C)`` or ``(N, C, *spatial)`` in [0, 1].

    Returns:
        Sums over the samples of :math:`q`, :math:`\log_2 q`, :math:`\log_2 (1 - q)`, :math:`h(q)`, and of those in the middle
        (between 0.1 and 0.9): ``(5, C, *spatial)`` float64.

    Raises:
        ValueError: If ``q`` has fewer than two dimensions, is not of a floating point dtype, or leaves [0, 1].
    """
    if q.ndim < 2 or not q.is_floating_point():
        raise ValueError(f"Expected activations (N, C, *spatial) of a floating point dtype but got {tuple(q.shape)} {q.dtype}.")
    if q.numel() and not bool(((q >= 0) & (q <= 1)).all()):
        raise ValueError(
            f"Activations are read as probabilities and must lie in [0, 1] but range from {float(q.min()):g} to "
            f"{float(q.max()):g}: are they those of a sigmoid?"
        )
    limits = torch.finfo(q.dtype)
    ones = (q.detach().cpu() if q.device.type == "mps" else q.detach()).double()
    # A sigmoid that has run into 0 or 1 is somewhere below the last number that its dtype can tell from it.
    log_ones, log_zeros = ones.clamp(min=limits.tiny).log2(), (1 - ones).clamp(min=limits.eps / 4).log2()
    noise = -(ones * log_ones + (1 - ones) * log_zeros)
    middle = (ones > MIDDLE[0]) & (ones < MIDDLE[1])
    return torch.stack([part.sum(0, dtype=torch.float64) for part in (ones, log_ones, log_zeros, noise, middle)])


def from_sums(sums: Tensor, count: int, marginal: Marginal = "jensen") -> Entropies:
    """Entropies from :func:`activation_sums` over ``count`` samples.

    Raises:
        ValueError: If the marginal is unknown.
    """
    ones, log_ones, log_zeros, noise, _ = sums / count
    if marginal == "jensen":
        # Never below the exact one, which rounding might have it where all samples agree.
        bits = torch.maximum(-ones * log_ones - (1 - ones) * log_zeros, _bits(ones)).clamp(max=1)
    elif marginal == "exact":
        bits = _bits(ones)
    else:
        raise ValueError(f"Argument `marginal` must be 'jensen' or 'exact' but got {marginal!r}.")
    noise, bits = (part.reshape(len(part), -1).sum(1) for part in (noise, bits))
    return Entropies(noise, bits, positions=math.prod(sums.shape[2:]))


def _bits(p: Tensor) -> Tensor:
    """Entropy of a Bernoulli variable in bits."""
    return -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)) / math.log(2)
