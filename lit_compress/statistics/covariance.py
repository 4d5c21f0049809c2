"""The covariance of a layer's channel responses, over a stream of batches and over ranks."""

import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

_ROWS = 2**16  # samples that are added at once: their float64 copies need room


class StreamingCovariance(Metric):
    r"""Covariance of a layer's channel responses over a stream of batches.

    .. math:: \Sigma = \frac{1}{n - 1} \sum_i (x_i - \bar{x})(x_i - \bar{x})^\top

    A sample's response :math:`x_i \in \mathbb{R}^C` is the spatial max of each channel. Memory is :math:`O(C^2)` whatever the
    number of batches.

    The states are float64 *centred* moments: ``count`` :math:`n` ``()``, ``mean`` :math:`\bar{x}` ``(C,)`` and ``scatter``
    :math:`S = \sum_i (x_i - \bar{x})(x_i - \bar{x})^\top` ``(C, C)``. Two parts, be they batches or ranks, merge by

    .. math::
        S = S_a + S_b + \frac{n_a n_b}{n_a + n_b} \delta \delta^\top, \quad
        \bar{x} = \bar{x}_a + \frac{n_b}{n_a + n_b} \delta, \quad \delta = \bar{x}_b - \bar{x}_a

    so that a mean far above the spread costs no digits, which sums of squares would lose, and a channel that never changes
    has a variance of exactly 0. ``compute`` syncs the ranks of a running process group and gives on each what one rank would
    have given; the states themselves stay this rank's own. They stay float64 when a module that holds the metric is cast, and
    on the CPU where a device has no float64 (MPS); responses may come from any device.

    Args:
        channels: Number of channels C.
        kwargs: Passed to :class:`~torchmetrics.Metric`.

    Shape:
        - ``update``: responses ``(N, C)`` or ``(N, C, *spatial)`` with any number of spatial dimensions, any float dtype. A batch
          of no samples changes nothing.
        - ``compute``: ``(C, C)`` float64, in squared units of the responses.

    Raises:
        ValueError: If ``channels`` is below 1; from ``update`` if the responses have another number of channels, are not
            floating point, have an empty spatial dimension, or if a response is NaN or infinite (the states are then as they
            were); from ``compute`` if fewer than two samples were seen.

    Source: *Filter Distillation for Network Compression* (PFA), section 3.1; the merging is Chan, Golub and LeVeque, *Updating
    Formulae and a Pairwise Algorithm for Computing Sample Variances*, 1979.

    Example:
        >>> covariance = StreamingCovariance(channels=2)
        >>> covariance.update(torch.tensor([[0.0, 0.0], [2.0, 4.0]]))
        >>> covariance.compute()
        tensor([[2., 4.],
                [4., 8.]], dtype=torch.float64)
        >>> int(covariance.count)
        2
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = True  # `forward` would otherwise add the states up

    count: Tensor
    mean: Tensor
    scatter: Tensor

    def __init__(self, channels: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if channels < 1:
            raise ValueError(f"Argument `channels` must be at least 1 but got {channels}.")
        self.channels = channels
        device = with_float64(torch.get_default_device())
        # No reduction: a sync stacks the ranks' states, and `compute` merges the stack.
        self.add_state("count", torch.zeros((), dtype=torch.float64, device=device), dist_reduce_fx=None)
        self.add_state("mean", torch.zeros(channels, dtype=torch.float64, device=device), dist_reduce_fx=None)
        self.add_state("scatter", torch.zeros(channels, channels, dtype=torch.float64, device=device), dist_reduce_fx=None)

    @override
    def update(self, responses: Tensor) -> None:
        """Add a batch."""
        if responses.ndim < 2 or responses.shape[1] != self.channels:
            raise ValueError(f"Expected responses of {self.channels} channels but got shape {tuple(responses.shape)}.")
        if not responses.is_floating_point():
            raise ValueError(f"Expected responses of a floating point dtype but got {responses.dtype}.")
        samples = spatial_max(responses).to(self.scatter.device)
        if len(samples) == 0:
            return
        if len(samples) > _ROWS:
            _refuse_infinite(samples.mean(0, dtype=torch.float64))
            for part in samples.split(_ROWS):
                self.update(part)
            return
        # Seen from its first sample, a channel that never changes is exactly 0; its plain mean would be off by a rounding.
        first = samples[0].double()
        samples = samples - first  # float64 from here on
        offset = samples.mean(0)
        _refuse_infinite(offset)
        # Python numbers where there is one, and few operations: each costs 10 to 40 us between a network's layers.
        count, added = float(self.count), len(samples)
        share = added / (count + added)
        shift = first + offset - self.mean
        # The formula's last term rides along as one more row: one pass over the (C, C) scatter rather than three.
        rows = torch.cat([samples - offset, shift.unsqueeze(0) * math.sqrt(count * share)])
        # Not in place: a state that was reset under `inference_mode` could not be written to outside of it.
        self.scatter = torch.addmm(self.scatter, rows.T, rows)
        self.mean = self.mean.add(shift, alpha=share)
        self.count = self.count + added

    @override
    def compute(self) -> Tensor:
        """Covariance of everything seen since the last reset, on all ranks."""
        count, _, scatter = self._merged()
        if count < 2:
            raise ValueError(f"Covariance needs at least 2 samples but has {int(count)}.")
        return scatter / (count - 1)

    @override
    def merge_state(self, incoming_state: "dict[str, Any] | Metric") -> None:
        """Add what another metric has seen, which stays as it is.

        Args:
            incoming_state: Metric of as many channels, or its ``metric_state``.

        Raises:
            ValueError: If it is something else, or has another number of channels.
        """
        state = incoming_state.metric_state if isinstance(incoming_state, StreamingCovariance) else incoming_state
        if not isinstance(state, dict) or not self._defaults.keys() <= state.keys():
            raise ValueError(f"Expected a StreamingCovariance or its `metric_state` but got {type(incoming_state).__name__}.")
        count, mean, scatter = (torch.as_tensor(state[name]).to(self.scatter) for name in ("count", "mean", "scatter"))
        if mean.shape != self.mean.shape:
            raise ValueError(f"Expected a covariance of {self.channels} channels but got one of {mean.shape[-1]}.")
        self.count, self.mean, self.scatter = _merge((self.count, self.mean, self.scatter), (count, mean, scatter))
        self._update_count += 1
        self._computed = None

    def _merged(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.scatter.ndim == 2:
            return self.count, self.mean, self.scatter
        ranks = zip(self.count, self.mean, self.scatter, strict=True)
        merged = next(ranks)
        for rank in ranks:
            merged = _merge(merged, rank)
        return merged

    @override
    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        wrapped = super()._wrap_compute(compute)

        @wraps(compute)
        def shaped() -> Tensor:
            # torchmetrics makes a scalar of a result of one element, and a layer may have one channel.
            covariance: Tensor = wrapped()
            return covariance.reshape(self.channels, self.channels)

        return shaped

    @override
    def _apply(self, fn: Callable[..., Any], exclude_state: Sequence[str] = "") -> "StreamingCovariance":
        # `.to(torch.bfloat16)` of a module that holds the metric would round the states, and `.to("mps")` fail on them and on
        # what was computed from them.
        self._computed = self._forward_cache = None
        super()._apply(fn, exclude_state=tuple(self._defaults))
        device = with_float64(self.device)
        for name in self._defaults:  # a reset puts the defaults where the states are
            setattr(self, name, getattr(self, name).to(device))
        return self


def _refuse_infinite(means: Tensor) -> None:
    if not math.isfinite(float(means.sum())):
        channels = (~means.isfinite()).nonzero().flatten().tolist()
        raise ValueError(
            f"Responses must be finite but channels {channels} hold NaN or infinity: "
            "the network has diverged, or was given such an input."
        )


def _merge(one: tuple[Tensor, Tensor, Tensor], other: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and scatter of two parts together; either may be empty."""
    count = one[0] + other[0]
    share = other[0] / count.clamp(min=1)
    shift = other[1] - one[1]
    return count, one[1] + shift * share, one[2] + other[2] + torch.outer(shift, shift) * (one[0] * share)


def spatial_max(responses: Tensor) -> Tensor:
    """Largest value of each channel over the spatial dimensions.

    :class:`StreamingCovariance` does this itself. A pass over a network is quicker if its hooks do no more than this and the
    metrics are updated together after the forward: small operations between the layers run from a cold cache, at five times
    the cost.

    Args:
        responses: ``(N, C)`` or ``(N, C, *spatial)``.

    Returns:
        ``(N, C)`` of the same dtype and device; NaN where a channel holds NaN.

    Raises:
        ValueError: If the responses have fewer than two dimensions, or an empty spatial one.

    Example:
        >>> spatial_max(torch.tensor([[[1.0, 3.0], [2.0, 0.0]]]))
        tensor([[3., 2.]])
    """
    if responses.ndim < 2 or 0 in responses.shape[2:]:
        raise ValueError(f"Expected responses (N, C) or (N, C, *spatial), none empty, but got shape {tuple(responses.shape)}.")
    if responses.ndim == 2:
        return responses
    # On the CPU, `amax` takes 6.4 ms for (128, 16, 32, 32) floats in channels_last order and the pooling kernel 0.8 ms; in the
    # usual order 0.4 and 2.1 ms.
    interleaved = responses.ndim == 4 and responses.is_contiguous(memory_format=torch.channels_last)
    if responses.device.type == "cpu" and interleaved and not responses.is_contiguous():
        return F.max_pool2d(responses, responses.shape[2:]).flatten(1)
    return responses.amax(tuple(range(2, responses.ndim)))


def with_float64(device: torch.device) -> torch.device:
    """The device, or the CPU where the device has no float64."""
    return torch.device("cpu") if device.type == "mps" else device
