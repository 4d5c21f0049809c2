"""Linear layers whose matrix draws its entries from a few shared numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lit_compress.layers.structured import Path, Pointwise, StructuredLinear, draw


class HashedLinear(StructuredLinear):
    r"""HashedNet layer: :math:`W_{ij} = w_{h(i, j)}`, every entry one of ``weights`` shared numbers.

    Which one is drawn uniformly at random, once, from a seed that the state dict holds (buffer ``seed``). About
    :math:`e^{-1/c}` of the numbers are never drawn, where :math:`c` is their share of the entries.

    Args:
        in_features: Numbers that come in.
        out_features: Numbers that go out.
        weights: Shared numbers, the layer's parameters.
        bias: Whether to add a bias.
        seed: Of the draw; None takes one from torch's global generator.
        legacy: As the released code has it: the last number is never drawn, and there is a bias whatever ``bias`` says.
        path: See :class:`~lit_compress.layers.structured.StructuredLinear`. There is no factorized path.

    Shape:
        - input: ``(*, in_features)``.
        - output: ``(*, out_features)``.

    Raises:
        ValueError: If ``weights`` is below 1, or below 2 with ``legacy``.

    Source: Chen et al., *Compressing Neural Networks with the Hashing Trick*, 2015; *Efficient machine learning under a budget*
    (T2), section 5.2.3, equation 5.5.

    Example:
        >>> layer = HashedLinear(64, 32, weights=100, seed=0)
        >>> layer.matrix_parameters, len(layer.to_dense().unique()) <= 100
        (100, True)
    """

    kind = "hashed"

    index: Tensor
    seed: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        weights: int,
        bias: bool = True,
        seed: int | None = None,
        legacy: bool = False,
        path: Path = "auto",
    ) -> None:
        super().__init__(in_features, out_features, bias or legacy, path)
        if weights < 1 + legacy:
            raise ValueError(f"Argument `weights` must be at least {1 + legacy} but got {weights}.")
        self._refuse_missing_path()
        self.legacy = legacy
        self.shared = nn.Parameter(draw((weights,), 1 / (3 * in_features)))
        if seed is None:
            seed = int(torch.randint(2**31, (), device="cpu"))
        self.register_buffer("seed", torch.tensor(seed))
        self.register_buffer("index", self._draw(seed), persistent=False)

    @classmethod
    @override
    def knobs(cls, setting: float, in_features: int, out_features: int) -> dict[str, Any]:
        """Shared numbers: ``setting`` of the entries, rounded down, at least 1."""
        return {"weights": max(1, int(setting * in_features * out_features))}

    @override
    def matrix(self) -> Tensor:
        return self.shared.index_select(0, self.index.flatten()).view(self.index.shape)

    @override
    def apply_factors(self, x: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no factorized path.")

    @property
    @override
    def factor_mult_adds(self) -> None:
        return None

    @override
    def fit(self, matrix: Tensor) -> None:
        """Nearest matrix with these entries tied: each number is the mean of its entries, 0 if there are none."""
        places = self.index.flatten()
        totals = torch.zeros_like(self.shared).index_add_(0, places, matrix.flatten())
        with torch.no_grad():
            self.shared.copy_(totals / torch.bincount(places, minlength=len(totals)).clamp(min=1))

    def _draw(self, seed: int) -> Tensor:
        """Which number each entry takes."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.out_features, self.in_features)
        if self.shared.is_meta:
            return torch.empty(shape, dtype=torch.int32, device="meta")
        index = torch.randint(len(self.shared) - self.legacy, shape, generator=generator, dtype=torch.int32, device="cpu")
        return index.to(self.shared.device)

    @override
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "seed" in state_dict:
            self.index = self._draw(int(state_dict[prefix + "seed"]))


class HashedConv1x1(Pointwise, HashedLinear):
    """Pointwise convolution whose matrix draws its entries from a few shared numbers.

    Args:
        in_channels: Channels that come in.
        out_channels: Channels that go out.
        weights: Shared numbers.
        stride: Step in pixels.
        bias, seed, legacy, path: As in :class:`HashedLinear`.

    Example:
        >>> HashedConv1x1(16, 32, weights=50, stride=2)(torch.zeros(1, 16, 8, 8)).shape
        torch.Size([1, 32, 4, 4])
    """
