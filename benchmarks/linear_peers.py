"""Other people's compressed linear layers, and ACDC of plain cosine transforms, those of ``torch_dct``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module, metadata
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_compress.layers import ACDCLinear, TensorTrainLinear, TuckerLinear

PACKAGES = {"tltorch": "tensorly-torch", "tntorch": "tntorch", "torch_dct": "torch-dct"}


def package(name: str) -> Any:
    """A peer's module, or None if it is not installed: ``pip install lit-compress[peers]``."""
    try:
        return import_module(name)
    except ModuleNotFoundError:
        return None


def versions() -> dict[str, str]:
    """The peers' versions, or that they are not installed."""
    return {title: metadata.version(title) if package(name) else "not installed" for name, title in PACKAGES.items()}


def linear_peers(width: int, share: float, train: TensorTrainLinear, tucker: TuckerLinear, acdc: ACDCLinear) -> dict[str, Any]:
    """Peers of layers of one width: a module each, or None where the package is missing.

    Args:
        width: Numbers in and out, a power of two of at least 16.
        share: Of the dense parameters, for what takes a share.
        train: Ours, of whose dimensions and ranks tntorch's is.
        tucker: Likewise.
        acdc: Ours, of whose factors theirs has as many.
    """
    three = _thirds(width)
    peers: dict[str, Callable[[Any], nn.Module]] = {
        "tensorly-torch, block tensor train, factorized": lambda library: library.FactorizedLinear(
            three, three, factorization="blocktt", rank=share, implementation="factorized"
        ),
        "tensorly-torch, block tensor train, reconstructed": lambda library: library.FactorizedLinear(
            three, three, factorization="blocktt", rank=share, implementation="reconstructed"
        ),
        "tensorly-torch, Tucker, reconstructed": lambda library: library.FactorizedLinear(
            three, three, factorization="tucker", rank=share, implementation="reconstructed"
        ),
    }
    found = {name: _made("tltorch", make) for name, make in peers.items()}
    return found | _tntorch(train, tucker, pointwise=False) | _acdc(acdc, pointwise=False)


def pointwise_peers(
    channels: int, share: float, train: TensorTrainLinear, tucker: TuckerLinear, acdc: ACDCLinear
) -> dict[str, Any]:
    """The same as convolutions; tensorly-torch decomposes the kernel, of one pixel, as a tensor of its own dimensions."""

    def convolution(factorization: str) -> Callable[[Any], nn.Module]:
        return lambda library: library.FactorizedConv(
            channels, channels, 1, order=2, factorization=factorization, rank=share, implementation="factorized", has_bias=True
        )

    theirs = {f"tensorly-torch, {title}": _made("tltorch", convolution(name)) for name, title in _CONVOLUTIONS.items()}
    return theirs | _tntorch(train, tucker, pointwise=True) | _acdc(acdc, pointwise=True)


_CONVOLUTIONS = {"tucker": "Tucker", "tt": "tensor train"}


def _thirds(width: int) -> tuple[int, ...]:
    bits = width.bit_length() - 1
    first, last = (bits + 1) // 3, (bits + 1) // 3
    return (2**first, 2 ** (bits - first - last), 2**last)


def _made(name: str, make: Callable[[Any], nn.Module]) -> nn.Module | None:
    library = package(name)
    return None if library is None else make(library)


def _tntorch(train: TensorTrainLinear, tucker: TuckerLinear, *, pointwise: bool) -> dict[str, nn.Module | None]:
    forms = {
        "tntorch, tensor train": (train.dims, {"ranks_tt": list(train.ranks)}),
        "tntorch, Tucker": (tucker.dims, {"ranks_tt": list(tucker.ranks[1:]), "ranks_tucker": list(tucker.ranks)}),
    }
    widths = (train.out_features, train.in_features)
    return {
        name: _made("tntorch", lambda library, dims=dims, ranks=ranks: _Reconstructed(library, dims, ranks, widths, pointwise))
        for name, (dims, ranks) in forms.items()
    }


def _acdc(acdc: ACDCLinear, *, pointwise: bool) -> dict[str, nn.Module | None]:
    return {"torch-dct, ACDC": _made("torch_dct", lambda library: _Stack(library, acdc.width, acdc.layers, pointwise))}


class _Reconstructed(nn.Module):
    """A tensor of tntorch, which has no layers, reconstructed in every step and applied as a matrix."""

    def __init__(
        self, library: Any, dims: Sequence[int], ranks: dict[str, list[int]], widths: tuple[int, int], pointwise: bool
    ) -> None:
        super().__init__()
        tensor = library.randn(list(dims), **ranks)
        self.make = library.Tensor
        self.cores = nn.ParameterList(tensor.cores)
        self.factors = nn.ParameterList(factor for factor in tensor.Us if factor is not None)
        self.widths, self.pointwise = widths, pointwise
        self.bias = nn.Parameter(torch.zeros(widths[0]))

    def forward(self, x: Tensor) -> Tensor:
        tensor = self.make(list(self.cores), Us=list(self.factors) or None)
        matrix = tensor.torch().reshape(self.widths)
        return F.conv2d(x, matrix[:, :, None, None], self.bias) if self.pointwise else F.linear(x, matrix, self.bias)


class _Stack(nn.Module):
    """Factors of ACDC applied one after the other, each transform by ``torch_dct``."""

    def __init__(self, library: Any, width: int, layers: int, pointwise: bool) -> None:
        super().__init__()
        self.library, self.pointwise = library, pointwise
        self.a, self.d = (nn.Parameter(1 + 0.1 * torch.randn(layers, width)) for _ in range(2))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("riffle", torch.cat((torch.arange(0, width, 2), torch.arange(1, width, 2))))

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(1, -1) if self.pointwise else x
        for a, d in zip(self.a, self.d, strict=True):
            x = self.library.idct(self.library.dct(x * a, norm="ortho") * d, norm="ortho")[..., self.riffle]
        x = x + self.bias
        return x.movedim(-1, 1) if self.pointwise else x
