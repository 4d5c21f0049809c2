"""What compressed linear layers have in common: two ways to the same output, and which of them is taken when."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode
from typing_extensions import Self, override

Path = Literal["auto", "dense", "factorized"]

_PATHS = ("auto", "dense", "factorized")
_WITH_AUTOCAST = frozenset(kind for kind in ("cpu", "cuda", "mps", "xpu", "hpu") if torch.amp.is_autocast_available(kind))


class StructuredLinear(nn.Module, ABC):
    """A linear layer whose matrix is computed from fewer numbers.

    There are two paths to an output. The *dense* path computes the matrix and multiplies by it; the graph keeps the parameters,
    the input, and what the matrix itself needs, but no activation per factor. The *factorized* path applies one factor after
    the other. With ``path="auto"``, training takes the dense path, unless the factors are few and cheaper (rank-factorised and
    shuffle layers); without gradients, the path that costs less is taken. The dense matrix is then kept from call to call:
    it is computed anew when a parameter has changed, and after every ``train()`` or ``eval()``.

    At initialisation, the output has the variance of the dense layer's: entries of the matrix have mean square
    ``1 / (3 · in_features)``, as :class:`torch.nn.Linear` draws them. The bias is drawn as that class does.

    Args:
        in_features: Numbers that come in.
        out_features: Numbers that go out.
        bias: Whether to add a bias, which stays dense.
        path: ``"dense"`` or ``"factorized"`` to take that path always.

    Raises:
        ValueError: If a width is below 1, the path is unknown, or the layer has no factorized path and it is asked for.
    """

    kind: ClassVar[str]
    """Name of the transform in :func:`lit_compress.substitute_linear`."""
    few_factors: ClassVar[bool] = False
    """Whether the factorized path keeps so little for the backward pass that training may take it."""
    slowness: ClassVar[float] = 1.0
    """How many mult-adds of a dense product take as long as one of the factorized path."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, path: Path = "auto") -> None:
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise ValueError(f"Both widths must be at least 1 but got {in_features} in and {out_features} out.")
        if path not in _PATHS:
            raise ValueError(f"Argument `path` must be one of {_PATHS} but got {path!r}.")
        self.in_features = in_features
        self.out_features = out_features
        self.path = path
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        if self.bias is not None:
            nn.init.uniform_(self.bias, -1 / math.sqrt(in_features), 1 / math.sqrt(in_features))
        self._kept: tuple[Any, Tensor] | None = None

    @classmethod
    @abstractmethod
    def knobs(cls, setting: float, in_features: int, out_features: int) -> dict[str, Any]:
        """The constructor's arguments at a relative setting, the one number that all layers of a network share."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """The matrix ``(out_features, in_features)``, differentiable in the parameters."""

    @abstractmethod
    def apply_factors(self, x: Tensor) -> Tensor:
        """The factors applied to ``(*, in_features)`` one after the other, without bias."""

    @property
    @abstractmethod
    def factor_mult_adds(self) -> int | None:
        """Mult-adds of the factorized path on one input, None if there is no such path."""

    @abstractmethod
    def fit(self, matrix: Tensor) -> None:
        """Set the parameters in place so that :meth:`matrix` comes near to one ``(out_features, in_features)``."""

    @classmethod
    def like(cls, dense: nn.Module, **knobs: Any) -> Self:
        """A new layer of the widths, bias, device and dtype of a dense one, with parameters of its own.

        Args:
            dense: ``nn.Linear``; for a pointwise twin, ``nn.Conv2d`` with one pixel, no padding and one group.
            knobs: What the constructor takes besides.

        Raises:
            ValueError: If the dense layer is of another kind.
        """
        shape = cls._shape_of(dense)
        weight = dense.weight
        assert isinstance(weight, Tensor)
        return cls(**shape, bias=dense.bias is not None, **knobs).to(weight.device, weight.dtype)

    @classmethod
    def from_dense(cls, dense: nn.Module, **knobs: Any) -> Self:
        """A layer that comes as near to a trained dense one as its form allows; see :meth:`fit` for how near that is.

        Args:
            dense: As for :meth:`like`.
            knobs: What the constructor takes besides.
        """
        layer = cls.like(dense, **knobs)
        assert isinstance(dense.weight, Tensor)
        with torch.no_grad():
            layer.fit(dense.weight.detach().flatten(1))
            if layer.bias is not None:
                layer.bias.copy_(dense.bias)  # type: ignore[arg-type]
        return layer

    @classmethod
    def _shape_of(cls, dense: nn.Module) -> dict[str, Any]:
        if not isinstance(dense, nn.Linear):
            raise ValueError(f"{cls.__name__} stands for an nn.Linear but got {dense}.")
        return {"in_features": dense.in_features, "out_features": dense.out_features}

    def to_dense(self) -> Tensor:
        """The weight that a dense layer would have, ``(out_features, in_features)``, differentiable in the parameters."""
        return self.matrix()

    @property
    def printed_mult_adds(self) -> int:
        """Mult-adds on one input as the document counts them: hashed and tensor layers as dense ones."""
        return self.in_features * self.out_features

    @property
    def weight(self) -> Tensor:
        """:meth:`to_dense`, for code that reads the weight of a dense layer."""
        return self.to_dense()

    def count_mult_adds(self, x: Tensor, out: Tensor, *, printed: bool = False) -> int:
        """Mult-adds of one forward; a bias is not counted.

        Args:
            x: What came in.
            out: What went out.
            printed: Count as the document does, instead of on the path that evaluation takes.
        """
        each = self.in_features * self.out_features
        if printed:
            each = self.printed_mult_adds
        elif self._takes_factors():
            each = self.factor_mult_adds or 0
        return each * (out.numel() // self.out_features)

    @property
    def matrix_parameters(self) -> int:
        """Parameters that stand for the matrix: all but the bias."""
        return sum(p.numel() for name, p in self.named_parameters() if name != "bias")

    @property
    def dense_elements(self) -> int:
        """Elements of the weight that a dense layer would have."""
        return self.in_features * self.out_features

    @property
    def compression(self) -> float:
        """Parameters over elements of the matrix that they stand for."""
        return self.matrix_parameters / (self.in_features * self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """``(*, in_features)`` to ``(*, out_features)``."""
        if self._takes_factors(x):
            out = self.apply_factors(x)
            return out if self.bias is None else out + self.bias.to(out.dtype)
        return F.linear(x, self._weight(), self.bias)

    @override
    def train(self, mode: bool = True) -> Self:
        self._kept = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None}

    @override
    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, compression={self.compression:.3g}"

    def _takes_factors(self, x: Tensor | None = None) -> bool:
        """Whether to apply factor by factor; to some input, None for an evaluation on any."""
        if self.path != "auto" or self.factor_mult_adds is None:
            return self.path == "factorized"
        if x is not None and torch.is_grad_enabled() and not self.few_factors:
            return self._fewer_rows(x)
        return self.slowness * self.factor_mult_adds < self.in_features * self.out_features

    def _fewer_rows(self, x: Tensor) -> bool:
        """Whether it costs less to train with these inputs than with the matrix, where many factors leave the choice."""
        return False

    def _weight(self) -> Tensor:
        """The matrix; without gradients, the one computed before if no parameter has changed since."""
        device = next(self.parameters()).device.type
        with torch.autocast(device, enabled=False) if device in _WITH_AUTOCAST else nullcontext():
            # What runs the code on something else than numbers (a trace, an export, fake tensors) must see the computation.
            if torch.is_grad_enabled() or torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
                return self.matrix()
            state = [(id(p), p.data_ptr(), None if p.is_inference() else p._version, p.dtype) for p in self.parameters()]
            if self._kept is None or self._kept[0] != state:
                self._kept = (state, self.matrix())
            return self._kept[1]

    def _refuse_missing_path(self) -> None:
        if self.path == "factorized" and self.factor_mult_adds is None:
            raise ValueError(f"{type(self).__name__} of these widths has no factorized path; leave `path` at 'auto'.")


def draw(shape: Sequence[int], mean_square: float) -> Tensor:
    """Uniform numbers around 0, scaled so that their mean square is exactly as given.

    Example:
        >>> draw((3, 4), mean_square=0.25).square().mean()
        tensor(0.2500)
    """
    numbers = torch.empty(*shape).uniform_(-1, 1)
    return numbers * (mean_square / numbers.square().mean()).sqrt()


def is_pointwise(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether a module is a convolution of one pixel that multiplies the channels by one matrix.

    Example:
        >>> is_pointwise(nn.Conv2d(4, 8, kernel_size=1, stride=2)), is_pointwise(nn.Conv2d(4, 8, kernel_size=3))
        (True, False)
    """
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.groups == 1
        and module.padding in ((0, 0), "valid", "same")
    )


class Pointwise(StructuredLinear):
    """Makes a :class:`StructuredLinear` a convolution of one pixel: ``(N, in, H, W)`` to ``(N, out, H / stride, W / stride)``.

    Args:
        in_channels: Channels that come in.
        out_channels: Channels that go out.
        stride: Step in pixels, as ``nn.Conv2d`` takes it.
        knobs: What the linear layer takes.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int | tuple[int, int] = 1, **knobs: Any) -> None:
        super().__init__(in_channels, out_channels, **knobs)
        self.stride = (stride, stride) if isinstance(stride, int) else tuple(stride)

    @classmethod
    @override
    def _shape_of(cls, dense: nn.Module) -> dict[str, Any]:
        if not is_pointwise(dense):
            raise ValueError(f"{cls.__name__} stands for an nn.Conv2d of one pixel, one group and no padding but got {dense}.")
        return {"in_channels": dense.in_channels, "out_channels": dense.out_channels, "stride": dense.stride}

    @property
    def in_channels(self) -> int:
        """Channels that come in."""
        return self.in_features

    @property
    def out_channels(self) -> int:
        """Channels that go out."""
        return self.out_features

    @override
    def to_dense(self) -> Tensor:
        """The weight that ``nn.Conv2d`` would have, ``(out_channels, in_channels, 1, 1)``, differentiable in the parameters."""
        return self.matrix()[:, :, None, None]

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Maps to maps."""
        if self._takes_factors(x):
            out = self.apply_factors_to_maps(x[..., :: self.stride[0], :: self.stride[1]])
            return out if self.bias is None else out + self.bias[:, None, None].to(out.dtype)
        return F.conv2d(x, self._weight()[:, :, None, None], self.bias, self.stride)

    def apply_factors_to_maps(self, x: Tensor) -> Tensor:
        """The factors applied to the channels of ``(N, in_channels, H, W)``, without bias."""
        return self.apply_factors(x.movedim(-3, -1)).movedim(-1, -3)

    @override
    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, stride={self.stride}"
