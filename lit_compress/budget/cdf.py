"""Numbers of any distribution made normal, and back, by their empirical distribution."""

import torch
from torch import Tensor, nn

# Probability beyond the outermost knots; from there on the map goes on straight.
_TAIL = 1e-3


class CDFTransform(nn.Module):
    """Map each column to a standard normal variable, piecewise linearly between its quantiles and theirs.

    Beyond the outermost quantiles (.1 % and 99.9 %) the last piece goes on. Knots that fall together, where many samples are
    equal, are set apart by a hair, so that the map can be inverted there, too.

    Args:
        samples: ``(N, C)`` float, what the quantiles are taken of.
        knots: Number of quantiles, at least 2.

    Raises:
        ValueError: If there are fewer than 2 knots or samples.

    Source: *Resource-Efficient Feature Gathering at Test Time*, section 3.3.3. The number and place of the knots are ours.

    Example:
        >>> samples = -torch.rand(1000, 1, generator=torch.Generator().manual_seed(0)).log()
        >>> transform = CDFTransform(samples)
        >>> normal = transform(samples)
        >>> round(abs(float(normal.mean())), 1), round(float(normal.std()), 1)
        (0.0, 1.0)
    """

    raw: Tensor
    normal: Tensor

    def __init__(self, samples: Tensor, knots: int = 65) -> None:
        super().__init__()
        if knots < 2 or len(samples) < 2:
            raise ValueError(f"Expected at least 2 knots and 2 samples but got {knots} and {len(samples)}.")
        # Even in the normal variable, so that tails and middle are drawn equally well.
        reach = torch.special.ndtri(torch.tensor(1 - _TAIL, dtype=torch.float64))
        normal = torch.linspace(-float(reach), float(reach), knots, dtype=torch.float64)
        raw = torch.quantile(samples.double(), torch.special.ndtr(normal), dim=0).T  # (C, K)
        # Apart by at least what single precision tells apart.
        gap = 1e-5 * torch.maximum(raw[:, -1:] - raw[:, :1], raw.abs().amax(dim=1, keepdim=True)).clamp_min(0.1)
        shift = gap * torch.arange(knots)
        raw = (raw - shift).cummax(dim=1).values + shift
        self.register_buffer("raw", raw.to(samples.dtype).contiguous())
        self.register_buffer("normal", normal.to(samples.dtype).expand_as(raw).contiguous())

    def forward(self, values: Tensor) -> Tensor:
        """Normal variables ``(N, C)`` of values ``(N, C)``."""
        return interpolated(values, self.raw, self.normal)

    def inverse(self, normal: Tensor) -> Tensor:
        """Values ``(N, C)`` of normal variables ``(N, C)``."""
        return interpolated(normal, self.normal, self.raw)


def interpolated(values: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Values of piecewise linear functions, one for each column; beyond the outermost knots the last piece goes on.

    Args:
        values: ``(N, C)``, where.
        start: ``(C, K)``, places of the knots, ascending without repeats.
        end: ``(C, K)``, values there.

    Returns:
        ``(N, C)``; differentiable in ``values``.
    """
    columns = values.T.contiguous()
    piece = torch.searchsorted(start, columns.detach()).clamp(1, start.shape[1] - 1)
    left, right = start.gather(1, piece - 1), start.gather(1, piece)
    low, high = end.gather(1, piece - 1), end.gather(1, piece)
    return (low + (columns - left) * (high - low) / (right - left)).T
