"""Decoders follow when channels are cut out of the network that they mirror."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.optim import Optimizer

from lit_compress.detection.roi_autoencoder import Autoencoders
from lit_compress.plan import Plan
from lit_compress.recipe import Recipe
from lit_compress.slicing import cut_tensors, fill_tensors


def follow_cut(autoencoders: Autoencoders, before: Plan | None, after: Plan | None, optimizer: Optimizer) -> None:
    """Cut, in place, what of the decoders belongs to channels that are gone, and the optimizer's state with it.

    Each weight of a decoder has the shape of the encoder's weight that it mirrors, so that the same channels stay.

    Args:
        autoencoders: The decoders.
        before: All that was cut out of the network when they fitted it; None if nothing was.
        after: All that is cut out of it now.
        optimizer: That of the decoders.

    Raises:
        ValueError: If channels have come back, a layer in groups was cut, or no parameter says which channels a layer has.
            Nothing is changed then.
    """
    for step in autoencoders.steps:
        if step.kind == "convolution" and step.weight is None:
            raise ValueError(
                f"The weight of {step.path!r} is computed from others, so that its decoder cannot follow a cut. Prune in a run "
                "of its own: nothing of the decoders is left in the detector."
            )
    keep: dict[str, dict[int, tuple[int, ...]]] = {}
    parameters = dict(autoencoders.named_parameters())
    for name, axes in autoencoders.axes.items():
        for dim, axis in axes.items():
            left = None if axis is None else _left(*axis, before, after)
            if left is not None and len(left) < parameters[name].shape[dim]:
                keep.setdefault(name, {})[dim] = left
    groups = _groups(autoencoders, keep)
    plan = Plan(recipe=Recipe(keep={}), keep=keep, shapes={name: tuple(parameters[name].shape) for name in keep})
    follow = plan.bound_to(autoencoders).prepare(optimizer)
    cut_tensors(autoencoders, plan.keep, plan.take)
    for layer in groups:
        layer.groups = layer.in_channels = layer.out_channels = layer.weight.shape[0]
    follow()


def fill(autoencoders: Autoencoders, values: Mapping[str, Tensor]) -> None:
    """Give the decoders the values of a state dict, and with them the sizes that the network had when it was written.

    Args:
        autoencoders: The decoders of the same network, cut or not.
        values: All of their parameters, by name.
    """
    fill_tensors(autoencoders, values, {})
    for layer in autoencoders.modules():
        if isinstance(layer, nn.ConvTranspose2d) and layer.groups > 1 and layer.weight.shape[1] == 1:
            layer.groups = layer.in_channels = layer.out_channels = layer.weight.shape[0]


def _left(weight: str, dim: int, before: Plan | None, after: Plan | None) -> tuple[int, ...] | None:
    """Of the indices that a dimension of a weight had, those that it has; None if they are all."""
    now = None if after is None else after.keep.get(weight, {}).get(dim)
    then = None if before is None else before.keep.get(weight, {}).get(dim)
    if now == then:
        return None
    if now is None or (then is not None and not set(now) <= set(then)):
        raise ValueError(f"Channels of {weight!r} have come back, and decoders cannot follow. Make them anew, in another run.")
    return now if then is None else tuple(then.index(index) for index in now)


def _groups(autoencoders: Autoencoders, keep: dict[str, dict[int, tuple[int, ...]]]) -> list[nn.ConvTranspose2d]:
    """The depthwise ones among the layers that are cut."""
    found = []
    for name in keep:
        layer = autoencoders.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, nn.ConvTranspose2d) and layer.groups > 1 and name.endswith(".weight"):
            if not layer.groups == layer.in_channels == layer.out_channels:
                raise ValueError(
                    f"A convolution of {layer.groups} groups was cut, which decoders cannot follow. Leave its layer out with "
                    "`exclude` of the pruning callback."
                )
            found.append(layer)
    return found
