"""Random weights for a network as it stands: drawn by a rule that is named, or anew by its own, at the widths of now."""

from collections.abc import Callable, Mapping
from typing import Literal

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

Weights = Literal["xavier", "orthonormal"]

_RULES: Mapping[str, Callable[..., Tensor]] = {"xavier": nn.init.xavier_uniform_, "orthonormal": nn.init.orthogonal_}


def initialize(model: nn.Module, weights: Weights = "orthonormal", *, gain: float = 1.0, output: nn.Module | None = None) -> None:
    """Draw the weights of all convolutions and linear layers by one rule, in place; their biases become 0.

    Args:
        model: Changed in place. The numbers come from torch's global generator.
        weights: ``"xavier"``: uniform, and so wide that signals and gradients keep their variance. ``"orthonormal"``: the filters
            of a layer are orthogonal and of length ``gain``; where they are more than each has inputs, its columns are.
        gain: Factor on all weights; 4 is what a sigmoid's slope of 1/4 asks for.
        output: A layer that no activation follows, whose gain is 1.

    Raises:
        ValueError: If the rule is unknown.

    Source: Glorot and Bengio, 2010; Saxe et al., *Exact solutions to the nonlinear dynamics of learning*, 2014.

    Example:
        >>> import torch
        >>> layer = nn.Linear(4, 2)
        >>> initialize(layer)
        >>> torch.allclose(layer.weight @ layer.weight.T, torch.eye(2), atol=1e-5)
        True
    """
    if weights not in _RULES:
        raise ValueError(f"Argument `weights` must be one of {sorted(_RULES)} but got {weights!r}.")
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            _RULES[weights](module.weight, gain=1.0 if module is output else gain)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def reinitialize(model: nn.Module) -> None:
    """Draw all weights of a network anew, in place, at the widths that its layers have now; norms forget what they have seen.

    A module with a method ``reset_parameters`` draws for itself and for all that it holds: torch's own layers have one, and so
    do the networks in :mod:`lit_compress.models`, which begin as their constructors have it. Of any other module, the parts are
    asked. The numbers come from torch's global generator.

    Args:
        model: Changed in place.

    Raises:
        ValueError: If a module holds parameters and does not say how they begin; then nothing has changed.

    Source: the random initialisation that PFA, section 3.2.1, compares filter selection with.

    Example:
        >>> import torch
        >>> layer = nn.Linear(4, 2)
        >>> before = layer.weight.clone()
        >>> reinitialize(layer)
        >>> torch.equal(layer.weight, before)
        False
    """
    drawing = _drawing(model, "")
    for module in drawing:
        module.reset_parameters()  # type: ignore[operator]  # that it is callable was asked


def _drawing(module: nn.Module, name: str) -> list[nn.Module]:
    """The modules that draw their own weights and cover all of them."""
    parametrized = next((part for part in module.modules() if is_parametrized(part)), None)
    if parametrized is None and callable(getattr(module, "reset_parameters", None)):
        return [module]
    if is_parametrized(module) or module._parameters:
        raise ValueError(
            f"Module {name or 'at the top'!r} ({type(module).__name__}) holds parameters and does not say how they begin. Give "
            "it a method `reset_parameters()`; a parametrized module first needs its parametrization removed."
        )
    return [part for child, held in module.named_children() for part in _drawing(held, f"{name}.{child}".lstrip("."))]
