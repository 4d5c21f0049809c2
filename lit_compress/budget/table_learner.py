"""Quantisation steps as the split of a budget of bits, learnt by what they do to patches of images."""

from collections.abc import Callable
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from lit_compress.budget.cdf import CDFTransform
from lit_compress.budget.curves import QuantizationCurves
from lit_compress.budget.dct import block_dct, inverse_block_dct, joined_blocks, plane_blocks
from lit_compress.budget.jpeg import JPEGTables, Subsampling, quantized, steps_for_bits, whole_table
from lit_compress.budget.planes import Planes, chroma_factors, pixels_of
from lit_compress.budget.split import BudgetSplit
from lit_compress.models.normed_mlp import NormedMLP

TableNoise = Literal["measured", "normal"]
PerceptualLoss = Callable[[Tensor, Tensor], Tensor]
"""From decoded and original pixels, ``(N, 1 or 3, S, S)`` in [0, 1], to a scalar that falls as they come to look alike."""
TableLoss = Literal["squared_error", "mlp", "ms_ssim"] | PerceptualLoss

_COEFFICIENTS = 64
# Squared error of red, green and blue that an error of both chroma planes makes, over that of an error of luma alone:
# ((1.402² + .714²) + (.344² + 1.772²)) / 3, by the matrix of JFIF.
_CHROMA_ERROR = 1.91
_LEAST_BITS = 1e-3  # that a coefficient starts with: at 0 its logit would be -inf
_MS_SSIM_SIDE = 161  # five scales, windows of 11 pixels: (11 - 1) * 2^4 + 1


class TableLearner(nn.Module):
    r"""A budget of bits per pixel, split over the coefficients of luma and chroma blocks, and the loss that moves the split.

    With noise as measured, a coefficient's bits are the entropy of its rounded values, and its step is the one at which it has
    them. The noise is what rounding to that step really leaves, so the decoder sees what a real one would; its gradient follows
    the measured root mean squared error D as a function of the step:

    .. math:: \tilde x = x + (q \lfloor x / q \rceil - x) \, D(q) / \overline{D(q)}

    where the bar stops the gradient. With normal noise, as the source has it, a coefficient with B bits has the step 2^(8 - B),
    noise of deviation 2^-B is added after it is mapped to a normal variable, and the network decodes instead of correcting.

    Args:
        colour: Whether images have chroma.
        subsampling: Of chroma.
        loss: ``"squared_error"`` of pixels by JPEG's own decoder, ``"mlp"`` by a network of one hidden layer that corrects what
            that decoder sees, ``"ms_ssim"`` for one minus the multi-scale structural similarity, or a function of your own. A
            module is kept frozen and in evaluation mode.
        noise: ``"measured"`` or ``"normal"``.

    Raises:
        ValueError: If an argument is unknown.

    Source: *Resource-Efficient Feature Gathering at Test Time*, section 3.3.3. Chroma, the measured bits and noise, and MS-SSIM
    are ours; the source's loss is ``"mlp"``, or a perceptual network's, PieAPP.
    """

    total: Tensor

    def __init__(
        self,
        colour: bool = True,
        subsampling: Subsampling = "4:2:0",
        loss: TableLoss = "squared_error",
        noise: TableNoise = "measured",
    ) -> None:
        super().__init__()
        if noise not in ("measured", "normal"):
            raise ValueError(f"Argument `noise` must be 'measured' or 'normal' but got {noise!r}.")
        if not callable(loss) and loss not in ("squared_error", "mlp", "ms_ssim"):
            raise ValueError(f"Argument `loss` must be 'squared_error', 'mlp', 'ms_ssim' or a function but got {loss!r}.")
        down, across = chroma_factors(subsampling)
        self.perceptual = _perceptual(loss)
        self.measures = noise == "measured"
        self.colour = colour
        self.kinds = nn.ModuleList(_Kind(noise, decodes=loss == "mlp") for _ in range(1 + colour))
        self.weights = (1.0, _CHROMA_ERROR)[: 1 + colour]
        samples = (1.0, 2 / (down * across))[: 1 + colour]  # of each kind for a pixel
        price = np.repeat(samples, _COEFFICIENTS) / _COEFFICIENTS  # bits per pixel that one bit a block costs
        self.budget = BudgetSplit(len(price), process="quantization", price=price.tolist())
        self.register_buffer("total", torch.ones(()))

    def measure(self, planes: Planes) -> None:
        """Take the statistics of coefficients from patches, as :class:`~lit_compress.budget.planes.ImagePatches` stacks them."""
        self._check(planes)
        for kind, plane in zip(self._kinds, planes, strict=True):
            kind.measure(_coefficients(plane))

    @torch.no_grad()
    def start_from(self, step: float) -> None:
        """Set the split to that of one step for all coefficients; with normal noise the split starts uniform.

        Args:
            step: At least 1.
        """
        if self.measures:
            steps = torch.full((_COEFFICIENTS,), step, device=self.total.device)
            bits = torch.cat([kind.curves.bits(steps) for kind in self._kinds]).clamp_min(_LEAST_BITS)
            self.budget.logits.copy_((bits * self.budget.price).log())

    @torch.no_grad()
    def tables(self, total: float | None = None) -> JPEGTables:
        """Whole tables.

        Args:
            total: Of the budget, in bits per pixel; by default the present one.
        """
        luma, *chroma = (whole_table(kind.steps(bits)) for kind, bits in self._split(total))
        return JPEGTables(luma, chroma[0] if chroma else luma)

    def parameter_groups(self, lr: float, budget_speed: float = 25.0) -> list[dict[str, Any]]:
        """What an optimizer trains: the split, quicker, and the decoders, if there are any.

        Args:
            lr: Of the decoders.
            budget_speed: Learning rate of the split, relative to that.
        """
        groups: list[dict[str, Any]] = [{"params": list(self.budget.parameters()), "lr": lr * budget_speed}]
        decoders = [parameter for kind in self.kinds for parameter in kind.parameters()]
        return [*groups, {"params": decoders, "lr": lr}] if decoders else groups

    @override
    def forward(self, planes: Planes) -> Tensor:
        """Loss of patches: squared units of the scale of 0 to 255, or what the perceptual loss gives.

        Args:
            planes: ``luma (N, 1, S, S)`` and, in colour, ``chroma (N, 2, s, s')``.
        """
        self._check(planes)
        clean = [_coefficients(plane) for plane in planes]
        decoded = [kind(each, bits) for each, (kind, bits) in zip(clean, self._split(), strict=True)]
        if self.perceptual is None:
            # Orthonormal transforms keep squared errors, so coefficients are as good as pixels.
            errors = [(each - before).square().mean() for each, before in zip(decoded, clean, strict=True)]
            return torch.stack([weight * error for weight, error in zip(self.weights, errors, strict=True)]).sum()
        blocks = [inverse_block_dct(each.unflatten(1, (8, 8))) + 128 for each in decoded]
        seen = tuple(joined_blocks(each, plane.shape) for each, plane in zip(blocks, planes, strict=True))
        return self.perceptual(pixels_of(seen), pixels_of(tuple(plane.float() for plane in planes)))

    @override
    def train(self, mode: bool = True) -> "TableLearner":
        super().train(mode)
        if isinstance(self.perceptual, nn.Module):
            self.perceptual.eval()
        return self

    @property
    def _kinds(self) -> list["_Kind"]:
        return cast("list[_Kind]", list(self.kinds))

    def _split(self, total: float | None = None) -> list[tuple["_Kind", Tensor]]:
        bits = self.budget.resources(self.total if total is None else total).split(_COEFFICIENTS)
        return list(zip(self._kinds, bits, strict=True))

    def _check(self, planes: Planes) -> None:
        if len(planes) != 1 + self.colour:
            seen, wanted = ("in colour" if colour else "grey" for colour in (len(planes) == 2, self.colour))
            raise ValueError(f"The images are {seen}, but the tables are made for images that are {wanted}.")


class _Kind(nn.Module):
    """Blocks of luma, or of chroma: what their coefficients are like, what is left of them, and how they are decoded."""

    scale: Tensor

    def __init__(self, noise: TableNoise, decodes: bool) -> None:
        super().__init__()
        blank = torch.zeros(2, _COEFFICIENTS)
        self.noise = noise
        self.register_buffer("scale", torch.ones(_COEFFICIENTS))
        self._describe(blank)
        self.decoder = NormedMLP(_COEFFICIENTS, (128,), _COEFFICIENTS) if decodes else None
        if self.decoder is not None and noise == "measured":  # a correction, which begins at none: JPEG's own decoder
            last = cast(nn.Linear, self.decoder.layers[-1])
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def measure(self, coefficients: Tensor) -> None:
        self.scale.copy_(coefficients.std(dim=0) + 1e-3)
        self._describe(coefficients)

    def steps(self, bits: Tensor) -> Tensor:
        return self.curves.steps(bits) if self.noise == "measured" else steps_for_bits(bits)

    @override
    def forward(self, clean: Tensor, bits: Tensor) -> Tensor:
        """Coefficients ``(M, 64)`` as they are decoded when each has so many bits, ``(64,)``."""
        noisy = self._noisy(clean, bits)
        if self.decoder is None:
            return noisy
        decoded: Tensor = self.scale * self.decoder(noisy / self.scale)
        return noisy + decoded if self.noise == "measured" else decoded

    def _describe(self, coefficients: Tensor) -> None:
        if self.noise == "measured":
            self.curves = QuantizationCurves(coefficients)
        else:
            self.normal = CDFTransform(coefficients)

    def _noisy(self, clean: Tensor, bits: Tensor) -> Tensor:
        if self.noise == "normal":
            return self.normal.inverse(self.normal(clean) + torch.exp2(-bits) * torch.randn_like(clean))
        steps = self.steps(bits)
        error = self.curves.error(steps)
        left = quantized(clean, steps.detach()) - clean
        return clean + left * error / error.detach().clamp_min(torch.finfo(error.dtype).tiny)


def _perceptual(loss: TableLoss) -> PerceptualLoss | None:
    if isinstance(loss, nn.Module):
        return loss.requires_grad_(False).eval()
    if callable(loss):
        return loss
    return _dissimilarity if loss == "ms_ssim" else None


def _dissimilarity(decoded: Tensor, original: Tensor) -> Tensor:
    # Imported here: it brings a quarter of a gigabyte, which the other losses need not pay for.
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    if min(original.shape[-2:]) < _MS_SSIM_SIDE:
        raise ValueError(f"MS-SSIM needs {_MS_SSIM_SIDE} pixels a side but the patches have {tuple(original.shape[-2:])}.")
    return 1 - multiscale_structural_similarity_index_measure(decoded, original, data_range=1.0)


def _coefficients(plane: Tensor) -> Tensor:
    """``(M, 64)`` of planes ``(N, P, H, W)`` on the scale of 0 to 255."""
    return block_dct(plane_blocks(plane.float()) - 128).flatten(1)
