r"""Principal Filter Analysis: from the covariance of a layer's responses to how many filters it needs, and which.

The eigenvalues of the covariance say how many directions the responses really use, and so how many filters suffice
(:func:`energy_width` for a share of the energy, :func:`kl_width` without any parameter). The correlations say which filters
the others can best do without (:func:`select_filters`). Everything here is invariant to the scale of the responses.

Source: *Filter Distillation for Network Compression* (PFA), section 3.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Shares of energy are sums of up to a few thousand float64 eigenvalues, each off by some 1e-16 of their sum, and differently so
# for another split into batches. A share that misses its mark by no more than this meets it.
_ROUNDING = 1e-12


def spectrum(cov: Tensor) -> Tensor:
    r"""Share of the responses' energy in each principal direction, in descending order.

    Eigenvalues of the covariance, tiny negative ones clipped to 0, divided by their sum:
    :math:`\lambda_1 \ge \dots \ge \lambda_C \ge 0`, :math:`\sum_i \lambda_i = 1`.

    Args:
        cov: Covariance ``(C, C)`` of a layer's responses, in any unit, of any float dtype.

    Returns:
        ``(C,)`` float64 on the covariance's device (on the CPU if that has no float64).

    Raises:
        ValueError: If the covariance is not a square, symmetric, finite matrix of at least one channel, or if it is zero, that
            is, if the layer's responses are all constant: such a layer has no spectrum and is best kept whole.

    Source: PFA, section 3.1.

    Example:
        >>> spectrum(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
        tensor([0.7500, 0.2500], dtype=torch.float64)
    """
    eigenvalues: Tensor = torch.linalg.eigvalsh(_standardised(cov)).flip(0).clamp(min=0)
    return eigenvalues / eigenvalues.sum()


def energy_width(spectrum: Tensor, energy: float) -> int:
    r"""Filters that a share of the energy needs (PFA-En): the smallest k with :math:`\lambda_1 + \dots + \lambda_k \ge \tau`.

    Args:
        spectrum: ``(C,)``, as :func:`spectrum` gives it.
        energy: :math:`\tau` in (0, 1]. A sum that misses it by 1e-12 meets it, so that rounding decides nothing; 1.0 on a layer
            of lower rank than C therefore stops at the rank.

    Returns:
        k in [1, C].

    Raises:
        ValueError: If ``energy`` lies outside (0, 1], or ``spectrum`` is none.

    Source: PFA, section 3.2.

    Example:
        >>> energy_width(torch.tensor([0.6, 0.3, 0.1]), energy=0.9)
        2
    """
    if not 0 < energy <= 1:
        raise ValueError(f"Argument `energy` must lie in (0, 1] but got {energy}.")
    shares = _checked(spectrum)
    short = int((shares.cumsum(0) < energy - _ROUNDING).sum())
    return min(short + 1, len(shares))


def kl_width(spectrum: Tensor) -> int:
    r"""Filters that the shape of the spectrum asks for (PFA-KL), without any parameter.

    .. math:: k = \Big\lceil C \Big(1 - \frac{D_{KL}(\lambda \,\|\, u)}{\log C}\Big) \Big\rceil, \quad
        D_{KL}(\lambda \,\|\, u) = \sum_i \lambda_i \log(C \lambda_i)

    where u is the uniform spectrum: uncorrelated filters of equal variance are all kept, and of filters that all say the same
    one is.

    Args:
        spectrum: ``(C,)``, as :func:`spectrum` gives it.

    Returns:
        k in [1, C]. Before rounding up, 1e-12 of C is taken off, so that the rounding error of an integer adds no filter.

    Raises:
        ValueError: If ``spectrum`` is none.

    Source: PFA, section 3.2.

    Example:
        >>> kl_width(torch.tensor([0.5, 0.5, 0.0, 0.0]))  # KL = log 2, half of log 4
        2
    """
    shares = _checked(spectrum)
    channels = len(shares)
    if channels == 1:
        return 1
    divergence = float(torch.xlogy(shares, channels * shares).sum())
    ratio = 1 - divergence / math.log(channels)
    return min(max(math.ceil(channels * (ratio - _ROUNDING)), 1), channels)


def pooled_energy(spectra: Sequence[Tensor], size: float) -> float:
    r"""Share of energy whose widths add up to about a share of all filters: the "size" mode of the authors' code.

    Each filter of each layer stands for the energy in the directions before its own,
    :math:`\lambda_1 + \dots + \lambda_{k-1}`; the result is the percentile of these over all layers. It counts filters, not
    parameters or operations, and is met only roughly; a search over :func:`energy_width` meets a real size.

    Args:
        spectra: One ``(C,)`` for each layer, as :func:`spectrum` gives them.
        size: Share of the filters to keep, in (0, 1].

    Returns:
        ``energy`` for :func:`energy_width`, in [1e-8, 1 - 1e-8].

    Raises:
        ValueError: If there are no spectra, one of them is none, or ``size`` lies outside (0, 1].

    Source: the "Size" strategy of DNIKit's PFA; it is not in the paper.

    Example:
        >>> flat, steep = torch.tensor([0.25, 0.25, 0.25, 0.25]), torch.tensor([0.9, 0.1, 0.0, 0.0])
        >>> energy = pooled_energy([flat, steep], size=0.5)
        >>> energy_width(flat, energy), energy_width(steep, energy)
        (3, 1)
    """
    if not 0 < size <= 1:
        raise ValueError(f"Argument `size` must lie in (0, 1] but got {size}.")
    if not spectra:
        raise ValueError("Argument `spectra` is empty: give the spectrum of at least one layer.")
    shares = [_checked(spectrum) for spectrum in spectra]
    before = torch.cat([(share.cumsum(0) - share).cpu() for share in shares])
    return min(max(float(np.quantile(before.numpy(), size)), 1e-8), 1 - 1e-8)


def inactive_filters(cov: Tensor) -> Tensor:
    """Filters whose response hardly varies: a variance below 1e-8 of the layer's largest.

    Args:
        cov: Covariance ``(C, C)`` of a layer's responses.

    Returns:
        Their indices, ascending, int64. Never all of them.

    Raises:
        ValueError: As :func:`spectrum`.

    Example:
        >>> inactive_filters(torch.diag(torch.tensor([1.0, 0.0, 2.0])))
        tensor([1])
    """
    return torch.from_numpy(_inactive(_standardised(cov).cpu().numpy())).to(cov.device)


def removal_order(cov: Tensor) -> Tensor:
    """All filters in the order in which the selection removes them; the last one is never removed.

    Inactive filters (:func:`inactive_filters`) come first, in ascending order. Of the others, repeatedly the one that the
    remaining ones can best stand in for: with the largest sum of absolute Pearson correlations to the other remaining ones.
    Sums that are close (as ``numpy.isclose`` has it: within 1e-8 + 1e-5 of the largest) are a tie, which the largest single
    absolute correlation to a remaining filter decides, and else the lowest index.

    Only active filters are correlated, so no denominator is near 0 and none needs an absolute floor, which would turn
    correlations into covariances in a layer whose responses are all small.

    Removing one takes time O(C), 4096 filters about a second.

    Args:
        cov: Covariance ``(C, C)`` of a layer's responses.

    Returns:
        ``(C,)`` int64, a permutation of the filters, on the covariance's device.

    Raises:
        ValueError: As :func:`spectrum`.

    Source: PFA, section 3.3; the inactive filters are from the authors' code.

    Example:
        >>> removal_order(torch.tensor([[1.0, 0.1, 0.8], [0.1, 1.0, 0.2], [0.8, 0.2, 1.0]]))  # sums 0.9, 0.3 and 1.0
        tensor([2, 0, 1])
    """
    return torch.from_numpy(_order(cov)[0]).to(cov.device)


def select_filters(cov: Tensor, keep: int) -> Tensor:
    """Filters to keep: what is left after the first C - ``keep`` of :func:`removal_order`.

    Inactive filters are always removed, so that fewer than ``keep`` may be left, but never none. A smaller ``keep`` leaves a
    subset of what a larger one leaves.

    Args:
        cov: Covariance ``(C, C)`` of a layer's responses; for layers tied to each other, that of what they share.
        keep: Filters to keep, in [1, C], as from :func:`energy_width` or :func:`kl_width`.

    Returns:
        Their indices, ascending, int64, on the covariance's device.

    Raises:
        ValueError: If ``keep`` lies outside [1, C], and as :func:`spectrum`.

    Source: PFA, section 3.3.

    Example:
        >>> select_filters(torch.tensor([[1.0, 0.1, 0.8], [0.1, 1.0, 0.2], [0.8, 0.2, 1.0]]), keep=2)
        tensor([0, 1])
    """
    order, inactive = _order(cov)
    if not 1 <= keep <= len(order):
        raise ValueError(f"Argument `keep` must lie in [1, {len(order)}], the layer's filters, but got {keep}.")
    return torch.from_numpy(np.sort(order[max(len(order) - keep, inactive) :])).to(cov.device)


def _standardised(cov: Tensor) -> Tensor:
    """A copy of the covariance in float64, symmetric, with a largest variance of 1."""
    if cov.ndim != 2 or cov.shape[0] != cov.shape[1] or len(cov) == 0:
        raise ValueError(f"Expected a square covariance of at least one channel but got shape {tuple(cov.shape)}.")
    if not cov.is_floating_point() or not all(extreme.isfinite() for extreme in cov.aminmax()):
        raise ValueError("The covariance must be finite and of a floating point dtype: are the responses so?")
    # MPS has no float64.
    covariance = (cov.detach().cpu() if cov.device.type == "mps" else cov.detach()).double()
    largest = covariance.diagonal().max()
    if largest <= 0:
        raise ValueError("The layer's responses are all constant, so its covariance has no spectrum: keep the layer whole.")
    # Divided first: the variances of a very small or large unit would not survive being added, multiplied or squared.
    covariance = covariance / largest
    # At 4096 filters a matrix is 134 MB and a transposed read three times as slow as a copy, so: one copy, and in place.
    skew = covariance.T.clone(memory_format=torch.contiguous_format).sub_(covariance)
    # 1e-2: what bfloat16 leaves of equal numbers.
    if max(skew.aminmax()) > 1e-2 or not all(abs(extreme) <= 1 + 1e-2 for extreme in covariance.aminmax()):
        raise ValueError(
            "Not a covariance, as it is not symmetric or exceeds the largest variance off the diagonal: "
            "give the (C, C) covariance, not the responses."
        )
    return covariance.add_(skew, alpha=0.5)


def _checked(spectrum: Tensor) -> Tensor:
    """The spectrum in float64, if it is one."""
    if spectrum.ndim != 1 or len(spectrum) == 0:
        raise ValueError(f"Expected a spectrum of shape (C,) but got {tuple(spectrum.shape)}.")
    shares = (spectrum.detach().cpu() if spectrum.device.type == "mps" else spectrum.detach()).double()
    # 1e-5: the sum may have been made in float32.
    if not (shares >= 0).all() or (shares.diff() > 0).any() or not abs(float(shares.sum()) - 1) < 1e-5:
        raise ValueError("A spectrum descends, is not negative and sums to 1: make it with `pfa.spectrum(cov)`.")
    return shares


def _order(cov: Tensor) -> tuple[NDArray[np.int64], int]:
    """All filters in the order of removal, and how many of the first are inactive."""
    covariance: NDArray[np.float64] = _standardised(cov).cpu().numpy()
    inactive = _inactive(covariance)
    active = np.setdiff1d(np.arange(len(covariance)), inactive)
    if len(inactive):
        covariance = covariance[np.ix_(active, active)]
    _correlate(covariance)
    return np.concatenate([inactive, active[_redundant_first(covariance)]]), len(inactive)


def _inactive(standardised: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.flatnonzero(standardised.diagonal() < 1e-8)


def _correlate(covariance: NDArray[np.float64]) -> None:
    """Make it, in place, the absolute Pearson correlations, with zeros on the diagonal, for no filter counts itself."""
    deviations = np.sqrt(covariance.diagonal())
    covariance /= deviations
    covariance /= deviations[:, None]
    np.abs(covariance, out=covariance)
    np.fill_diagonal(covariance, 0)


def _redundant_first(correlations: NDArray[np.float64]) -> NDArray[np.int64]:
    """Order in which filters go, from the absolute correlations of all of them."""
    filters = len(correlations)
    sums = correlations.sum(1)
    remaining = np.ones(filters, dtype=bool)
    # The last of equally close partners, for the first of equals is removed first: this one stays right for longest.
    partner = filters - 1 - correlations[:, ::-1].argmax(1)
    closest = correlations[np.arange(filters), partner]
    order = np.empty(filters, dtype=np.int64)
    for step in range(filters):
        largest = sums.max()
        tied = np.flatnonzero(sums >= largest - (1e-8 + 1e-5 * abs(largest)))
        order[step] = removed = int(tied[0]) if len(tied) == 1 else _closest(tied, correlations, remaining, closest, partner)
        remaining[removed] = False
        sums -= correlations[removed]
        sums[removed] = -np.inf
    return order


def _closest(
    tied: NDArray[np.int64],
    correlations: NDArray[np.float64],
    remaining: NDArray[np.bool_],
    closest: NDArray[np.float64],
    partner: NDArray[np.int64],
) -> int:
    """First of the tied filters with the largest single correlation to a remaining filter.

    ``closest``, each filter's largest correlation, and ``partner``, to whom, are brought up to date only where it matters. A
    value whose partner is gone is still a bound from above, as removals only lower it, and a filter whose bound is below the
    largest value can wait: even if all filters are tied in each step, a filter is then seldom looked at twice.
    """
    while True:
        # Two filters that are each other's closest share one correlation: no more than rounding may tell them apart.
        leading = tied[closest[tied] >= closest[tied].max() - _ROUNDING]
        stale = leading[~remaining[partner[leading]]][:64]  # rows that fit the cache; the next round takes more if it must
        if len(stale) == 0:
            return int(leading[0])
        rows = np.where(remaining, correlations[stale], -1)
        partner[stale] = len(remaining) - 1 - rows[:, ::-1].argmax(1)
        closest[stale] = correlations[stale, partner[stale]]
