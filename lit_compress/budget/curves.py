"""What a quantisation step costs in bits and leaves as error, measured on the coefficients themselves."""

from math import log

import torch
from torch import Tensor, nn

from lit_compress.budget.cdf import interpolated

_OCTAVES = 11  # from a step of 1, the finest of a table, to 2048, above any coefficient
_STEPS_AN_OCTAVE = 4
# Bits by which neighbouring knots differ at least, so that the step can be told from the bits.
_GAP = 1e-5


class QuantizationCurves(nn.Module):
    r"""Entropy and error of each coefficient as functions of its step, piecewise linear in the logarithm of the step.

    A coefficient X divided by q and rounded has :math:`H(\lfloor X / q \rceil)` bits. They fall to 0 where the step exceeds
    what the coefficient takes, and the error then stays at the coefficient's own size: both hang on its distribution, which is
    counted here at steps a quarter of an octave apart.

    Args:
        coefficients: ``(N, C)`` float, N at least 1.

    Example:
        >>> coefficients = torch.arange(-128.0, 128.0).repeat(4).unsqueeze(1)  # evenly spread over 8 bits
        >>> curves = QuantizationCurves(coefficients)
        >>> curves.steps(torch.tensor([8.0])), curves.steps(torch.tensor([5.0])).round()  # then the step is 2^(8 - B)
        (tensor([1.]), tensor([8.]))
        >>> round(float(curves.error(torch.tensor([8.0]))), 1)  # near 8 / √12
        2.3
    """

    _bits: Tensor
    _errors: Tensor
    _octaves: Tensor

    def __init__(self, coefficients: Tensor) -> None:
        super().__init__()
        octaves = torch.arange(_OCTAVES * _STEPS_AN_OCTAVE, -1, -1) / _STEPS_AN_OCTAVE  # bits ascend from coarse to fine
        steps = torch.exp2(octaves).tolist()
        found = [_entropy_and_error(coefficients, step) for step in steps]
        bits, errors = (torch.stack(each, dim=1) for each in zip(*found, strict=True))
        shift = _GAP * torch.arange(len(steps))
        self.register_buffer("_bits", ((bits - shift).cummax(dim=1).values + shift).contiguous())
        self.register_buffer("_errors", errors.flip(1).contiguous())
        self.register_buffer("_octaves", octaves.expand_as(bits).contiguous())

    def steps(self, bits: Tensor) -> Tensor:
        """Steps ``(C,)``, in [1, 2048], at which the coefficients have so many bits each; differentiable.

        Args:
            bits: ``(C,)``.
        """
        return torch.exp2(interpolated(bits[None], self._bits, self._octaves)[0].clamp(0, _OCTAVES))

    def bits(self, steps: Tensor) -> Tensor:
        """Entropy ``(C,)``, in bits, of the coefficients at steps ``(C,)`` from 1 on; differentiable."""
        return self._at(steps, self._bits.flip(1))

    def error(self, steps: Tensor) -> Tensor:
        """Root of the mean squared error ``(C,)`` that rounding to steps ``(C,)`` leaves; differentiable."""
        return self._at(steps, self._errors)

    def _at(self, steps: Tensor, values: Tensor) -> Tensor:
        return interpolated(steps.log2()[None], self._octaves.flip(1), values)[0]


def _entropy_and_error(coefficients: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """Bits ``(C,)`` of the rounded columns of ``(N, C)``, and the root mean square ``(C,)`` of what rounding leaves."""
    whole = (coefficients / step).round()
    error = (whole * step - coefficients).square().mean(dim=0).sqrt()
    count, columns = whole.shape
    offsets = (whole - whole.amin(dim=0)).long()
    bins = int(offsets.max()) + 1
    cells = offsets + bins * torch.arange(columns, device=whole.device)
    share = torch.bincount(cells.flatten(), minlength=bins * columns).reshape(columns, bins) / count
    return torch.special.entr(share).sum(dim=1) / log(2), error
