"""A narrow layer in front of a classifier, for a student to match."""

from __future__ import annotations

from torch import nn


def with_hint(network: nn.Module, classifier: str = "fc", width: int = 64, dropout: float = 0.0) -> nn.Module:
    """Put a fully connected hint layer and its ReLU in front of a network's classifier, in place.

    The fully connected layer ``classifier`` becomes an ``nn.Sequential`` whose layers are ``dropout``, ``hint``, ``relu`` and
    ``fc``. So ``"<classifier>.hint"`` is what a student matches and ``"<classifier>.fc"`` what it may copy.

    Args:
        network: The network.
        classifier: Name of its last, fully connected layer.
        width: Of the hint layer.
        dropout: Probability of a dropout layer in front of it. A teacher needs one to say how sure it is.

    Returns:
        The same network.

    Raises:
        ValueError: If there is no such layer or it is not fully connected.

    Source: *In Teacher We Trust: Learning Compressed Models for Pedestrian Detection*, table 1.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> student = with_hint(resnet18(num_classes=2))
        >>> student.fc.hint
        Linear(in_features=512, out_features=64, bias=True)
    """
    layer = dict(network.named_modules()).get(classifier)
    if not isinstance(layer, nn.Linear) or not classifier:
        raise ValueError(
            f"Argument `classifier` must name a fully connected layer of {type(network).__name__} but {classifier!r} is "
            f"{'none of its layers' if layer is None else f'a {type(layer).__name__}'}."
        )
    head = nn.Sequential()
    head.add_module("dropout", nn.Dropout(dropout))
    head.add_module("hint", nn.Linear(layer.in_features, width))
    head.add_module("relu", nn.ReLU())
    head.add_module("fc", nn.Linear(width, layer.out_features))
    network.set_submodule(classifier, head)
    return network
