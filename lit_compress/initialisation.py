"""New random weights for a network as it stands, at the widths that a cut has left it."""

from torch import nn
from torch.nn.utils.parametrize import is_parametrized


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
