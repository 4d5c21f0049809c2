"""Noise processes: how uncertain a feature is after so much has been spent on it, and what spending it really does."""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

Process = Literal["sampling", "rate", "quantization"]

# Numbers spread evenly over a range have a standard deviation of the range over √12; so has the error of rounding to a grid.
_TWELVE = 12


class NoiseProcess(ABC):
    """From resources to noise; subclass it for a way of gathering of your own.

    The same class says what noise training adds (:meth:`sigma`), what it is measured against (:meth:`spread`), and what is done
    when the budget is really spent (:meth:`gather`). The first is a model of the last.

    Example:
        >>> class Exposure(NoiseProcess):  # a sensor whose noise falls with the square root of the time it looks
        ...     def sigma(self, resources, variance):
        ...         return (variance / resources).sqrt()
        ...     def spread(self, statistics):
        ...         return torch.ones_like(statistics[0, :, 0])
        ...     def gather(self, statistics, amount, variance, centre):
        ...         return statistics[:, 0] + self.sigma(torch.tensor(amount), variance) * torch.randn_like(statistics[:, 0])
        >>> Exposure().sigma(torch.tensor([1.0, 4.0]), torch.tensor(1.0))
        tensor([1.0000, 0.5000])
    """

    counts_observations: ClassVar[bool] = False
    """Whether a unit of resources buys one observation, so that nothing beyond the observations bought may be looked at."""

    @abstractmethod
    def sigma(self, resources: Tensor, variance: Tensor) -> Tensor:
        """Standard deviation of a feature's error; differentiable.

        Args:
            resources: What is spent on a context, in units of the process (observations, hertz, bits), positive.
            variance: Squared scale of the noise, broadcastable to ``resources``; see the process.
        """

    @abstractmethod
    def spread(self, statistics: Tensor) -> Tensor:
        """The ``variance`` of :meth:`sigma`, measured on a batch; differentiable, so that a learnt statistic cannot outgrow it.

        Args:
            statistics: ``(N, C, I, F)``: examples, contexts, observations, features.

        Returns:
            ``(C, F)``.
        """

    @abstractmethod
    def gather(self, statistics: Tensor, amount: int, variance: Tensor, centre: Tensor) -> Tensor:
        """One context's features after spending, for real.

        Args:
            statistics: ``(N, I, F)``, of the observations of this context.
            amount: Whole units spent on it, at least 1.
            variance: ``(F,)``, as :meth:`spread` measured it in training.
            centre: ``(F,)``, the mean of the features in training.

        Returns:
            ``(N, F)``.
        """


class SamplingNoise(NoiseProcess):
    r"""The mean of r observations: standard error :math:`\sqrt{v / r}`, with v the variance of one observation.

    Source: *Resource-Efficient Feature Gathering at Test Time*, equations 3.4 and 3.11.

    Example:
        >>> SamplingNoise().sigma(torch.tensor([1.0, 4.0]), torch.tensor(4.0))
        tensor([2., 1.])
    """

    counts_observations = True

    @override
    def sigma(self, resources: Tensor, variance: Tensor) -> Tensor:
        return (variance / resources).sqrt()

    @override
    def spread(self, statistics: Tensor) -> Tensor:
        """Variance of single observations within a context, mean over examples."""
        if statistics.shape[2] < 2:
            raise ValueError(
                "The variance of an observation cannot be measured on one observation a context; give at least 2, or the "
                "variance as a number."
            )
        return statistics.var(dim=2).mean(dim=0)

    @override
    def gather(self, statistics: Tensor, amount: int, variance: Tensor, centre: Tensor) -> Tensor:
        """Mean of the first ``amount`` observations."""
        if statistics.shape[1] < amount:
            raise ValueError(
                f"The budget buys {amount} observations of a context but the data hold {statistics.shape[1]}; offer more, "
                "lower the total, or set a `maximum`."
            )
        return statistics[:, :amount].mean(dim=1)


class RateNoise(NoiseProcess):
    r"""The time of an event, read from a clock of rate r: error :math:`\sqrt v / r`.

    Gathering rounds to ticks :math:`\sqrt{12 v} / r` apart, whose error has just that standard deviation.

    Source: *Resource-Efficient Feature Gathering at Test Time*, equation 3.5; Richman and Mannor, 2016.

    Example:
        >>> RateNoise().sigma(torch.tensor([1.0, 4.0]), torch.tensor(1.0))
        tensor([1.0000, 0.2500])
    """

    @override
    def sigma(self, resources: Tensor, variance: Tensor) -> Tensor:
        return variance.sqrt() / resources

    @override
    def spread(self, statistics: Tensor) -> Tensor:
        """Variance of the features over examples."""
        return statistics.mean(dim=2).var(dim=0)

    @override
    def gather(self, statistics: Tensor, amount: int, variance: Tensor, centre: Tensor) -> Tensor:
        """Nearest tick of a clock that ticks at the centre."""
        period = (_TWELVE * variance).sqrt() / amount
        return centre + ((statistics.mean(dim=1) - centre) / period).round() * period


class QuantizationNoise(NoiseProcess):
    r"""A number kept in b bits: error :math:`\sqrt v \, 2^{-b}`, with v the range squared over 12.

    Gathering takes the middle of the nearest of :math:`2^b` equal parts of the range :math:`\sqrt{12 v}` around the centre, and
    of the outermost part beyond it. For numbers spread evenly over the range, the error has just that standard deviation at
    every b; v is their variance.

    Source: *Resource-Efficient Feature Gathering at Test Time*, equations 3.6 and 3.12.

    Example:
        >>> QuantizationNoise().sigma(torch.tensor([0.0, 3.0]), torch.tensor(1.0))
        tensor([1.0000, 0.1250])
    """

    @override
    def sigma(self, resources: Tensor, variance: Tensor) -> Tensor:
        return variance.sqrt() * torch.exp2(-resources)

    @override
    def spread(self, statistics: Tensor) -> Tensor:
        """Of the range around the mean that holds every example."""
        features = statistics.mean(dim=2)
        reach = (features - features.mean(dim=0)).abs().amax(dim=0)
        return (2 * reach).square() / _TWELVE

    @override
    def gather(self, statistics: Tensor, amount: int, variance: Tensor, centre: Tensor) -> Tensor:
        """Middle of the nearest of ``2**amount`` parts of the range."""
        parts = float(2**amount)
        width = (_TWELVE * variance).sqrt() / parts
        part = ((statistics.mean(dim=1) - centre) / width + parts / 2).floor().clamp(0, parts - 1)
        return centre + (part + 0.5 - parts / 2) * width


_PROCESSES: dict[str, type[NoiseProcess]] = {
    "sampling": SamplingNoise,
    "rate": RateNoise,
    "quantization": QuantizationNoise,
}


def noise_process(process: Process | NoiseProcess) -> NoiseProcess:
    """A process by its name, or the one given.

    Args:
        process: ``"sampling"``, ``"rate"``, ``"quantization"``, or one of your own.

    Raises:
        ValueError: If the name is unknown.
    """
    if isinstance(process, NoiseProcess):
        return process
    if process not in _PROCESSES:
        raise ValueError(f"Argument `process` must be one of {list(_PROCESSES)} or a NoiseProcess but got {process!r}.")
    return _PROCESSES[process]()
