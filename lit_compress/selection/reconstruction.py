r"""Which channels the layers behind them can best do without, once the others have taken over what they can.

A layer with weights :math:`W` gives :math:`W x`. If of its channels only :math:`x_k` are left, the least-squares prediction of
the others is :math:`\hat{x}_r - \bar{x}_r = A (x_k - \bar{x}_k)` with :math:`A = \Sigma_{rk} \Sigma_{kk}^{-1}`. As it is linear,
weights :math:`W_k + W_r A` in place of :math:`W_k` make it. What the layer then gives is off by
:math:`\operatorname{tr}\big(W_r (\Sigma_{rr} - A \Sigma_{kr}) W_r^\top\big)`, and removing one more channel j adds

.. math:: \frac{\lVert (W_k + W_r A)_{\cdot j} \rVert^2}{(\Sigma_{kk}^{-1})_{jj}}:

its weights, as they are by then, times the variance that the other channels do not explain.

Source: the rule is that of Hassibi and Stork, *Second Order Derivatives for Network Pruning: Optimal Brain Surgeon*, 1993, for
channels in place of single weights and the squared error of a layer. To reconstruct what the next layer gives is the criterion of
He, Zhang and Sun, *Channel Pruning for Accelerating Very Deep Neural Networks*, 2017.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import blas, cho_factor, cho_solve

Matrix = NDArray[np.float64]


class Reading(NamedTuple):
    """What a layer makes of the channels that it reads.

    Args:
        covariance: Of its K input channels, ``(K, K)``.
        gram: Products of their weights, summed over outputs and places in the kernel, ``(K, K)``.
        channels: Which of the channels to choose from each of them is, ``(K,)``; -1 for one that stays. Tied ones share a number.
        samples: How many the covariance is from.
    """

    covariance: Matrix
    gram: Matrix
    channels: NDArray[np.int64]
    samples: int


def takeover(covariance: Matrix, kept: NDArray[np.int64], removed: NDArray[np.int64], samples: int) -> Matrix:
    r"""Coefficients :math:`A` ``(R, K)`` by which the channels kept predict those removed, each less its mean.

    Args:
        covariance: Of all channels.
        kept: Indices of the K channels kept.
        removed: Indices of the R channels removed.
        samples: How many the covariance is from. As many as there are channels tell little: a ridge, of each channel's variance a
            tenth of the number of channels over that of samples, keeps A from fitting chance.

    Example:
        >>> covariance = np.array([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0], [2.0, 0.0, 4.0]])  # the last is twice the first
        >>> takeover(covariance, np.array([0, 1]), np.array([2]), samples=10**9).round(3)
        array([[2., 0.]])
    """
    chosen = _ridged(covariance, samples)[np.ix_(kept, kept)]
    coefficients: Matrix = cho_solve(cho_factor(chosen), covariance[np.ix_(kept, removed)]).T
    return coefficients


def removal_order(readings: Sequence[Reading], channels: int) -> NDArray[np.int64]:
    """All channels in the order in which they go: each time the one whose loss costs the readers' outputs the least.

    The readers' costs are added up as shares of the variance that each of them gives. Of equal channels the first goes first.
    Takes time O(K³) for each reader of K channels: 512 channels well under a second, 2048 some ten seconds.

    Args:
        readings: Of every layer that reads some of the channels.
        channels: How many there are to choose from, C.

    Returns:
        ``(C,)``, a permutation.

    Example:
        >>> covariance = np.array([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0], [2.0, 0.0, 4.0]])  # the last is twice the first
        >>> removal_order([Reading(covariance, np.eye(3), np.arange(3), samples=1000)], channels=3)
        array([0, 1, 2])
    """
    parts = [_Remaining(reading) for reading in readings if reading.covariance.diagonal().sum() > 0]
    order = np.empty(channels, dtype=np.int64)
    gone = np.zeros(channels, dtype=bool)
    for step in range(channels):
        costs = np.zeros(channels)
        for part in parts:
            part.add_costs(costs)
        costs[gone] = np.inf
        order[step] = removed = int(costs.argmin())
        gone[removed] = True
        for part in parts:
            part.remove(removed)
    return order


class _Remaining:
    """The channels of one reader that are left: the inverse of their covariance, and the products of their weights by now."""

    def __init__(self, reading: Reading) -> None:
        whole = float((reading.covariance * reading.gram).sum())
        scale = 1 / whole if whole > 0 else 0.0
        ridged = _ridged(reading.covariance, reading.samples)
        self._channels = reading.channels
        self._precision = np.asfortranarray(cho_solve(cho_factor(ridged), np.eye(len(ridged))))
        self._gram = np.asfortranarray(scale * reading.gram)
        self._here = np.ones(len(ridged), dtype=bool)
        numbers, counts = np.unique(reading.channels[reading.channels >= 0], return_counts=True)
        self._tied = numbers[counts > 1]

    def add_costs(self, costs: Matrix) -> None:
        """Add what it costs to lose each channel that is left."""
        mine = np.flatnonzero(self._here & (self._channels >= 0))
        alone = ~np.isin(self._channels[mine], self._tied)
        single = mine[alone]
        costs[self._channels[single]] += self._gram.diagonal()[single] / self._precision.diagonal()[single]
        for channel in np.unique(self._channels[mine[~alone]]):
            rows = np.flatnonzero(self._here & (self._channels == channel))
            together = np.ix_(rows, rows)
            costs[channel] += np.linalg.solve(self._precision[together], self._gram[together]).trace()

    def remove(self, channel: int) -> None:
        """Take a channel out; the others take over."""
        for row in np.flatnonzero(self._here & (self._channels == channel)).tolist():
            share = self._precision[:, row] / self._precision[row, row]  # of its weights that the others take over, negated
            given = self._gram[:, row] - 0.5 * self._gram[row, row] * share
            # In place, for they are large: P - p p' / P_jj, and the products of the weights w_i - w_j p_i / P_jj.
            self._precision = blas.dger(-self._precision[row, row], share, share, a=self._precision, overwrite_a=1)
            self._gram = blas.dger(-1.0, share, given, a=self._gram, overwrite_a=1)
            self._gram = blas.dger(-1.0, given, share, a=self._gram, overwrite_a=1)
            self._here[row] = False
        if 2 * self._here.sum() < len(self._here):  # what is gone costs no more time
            left = np.flatnonzero(self._here)
            self._precision = np.asfortranarray(self._precision[np.ix_(left, left)])
            self._gram = np.asfortranarray(self._gram[np.ix_(left, left)])
            self._channels, self._here = self._channels[left], np.ones(len(left), dtype=bool)


def _ridged(covariance: Matrix, samples: int) -> Matrix:
    """A covariance that has an inverse, however few samples it is from; 1e-6 is far above what float64 loses in one."""
    variances = covariance.diagonal()
    least = 1e-12 * variances.max() or 1.0  # a channel that never changes
    ridged: Matrix = covariance + np.diag(max(0.1 * len(covariance) / samples, 1e-6) * np.maximum(variances, least))
    return ridged
