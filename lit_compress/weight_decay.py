"""Weight decay scaled by compression ratio: which ratio each compressed layer has, and how an optimizer takes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from lit_compress.layers.separable import SeparableConv2d
from lit_compress.layers.structured import StructuredLinear
from lit_compress.report import count_parameters

Mode = Literal["matrix", "network"]

_LAYER = "crs_layer"  # options of the groups split off: the layer, and the index of the group that it came from
_SOURCE = "crs_source"
# What torch's schedulers keep for every group.
_PER_GROUP = ("base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums")


def crs_ratios(network: nn.Module, mode: Mode = "matrix") -> dict[str, float]:
    r"""Factor on the weight decay of each compressed layer, :math:`d_c = d \, M / N`.

    Args:
        network: Network with compressed layers.
        mode: ``"matrix"``: M and N are the layer's own, its parameters without the bias and the elements of its matrix (of a
            convolution, the pointwise one). ``"network"``: M are the parameters of the network, N those of the same network with
            dense layers and ordinary convolutions, as in the released runs.

    Returns:
        Names of the compressed layers, with their factors.

    Source: *Efficient machine learning under a budget* (T2), section 5.2.5, equation 5.18.

    Example:
        >>> from lit_compress.layers import RankFactorizedLinear
        >>> crs_ratios(nn.Sequential(RankFactorizedLinear(64, 64, rank=8), nn.Linear(64, 10)))
        {'0': 0.25}
    """
    layers = {name: module for name, module in network.named_modules() if isinstance(module, StructuredLinear)}
    if mode == "matrix":
        return {name: layer.compression for name, layer in layers.items()}
    dense = present = count_parameters(network, trainable=False)
    inside: set[nn.Module] = set()
    for module in network.modules():
        if module in inside:
            continue
        if isinstance(module, SeparableConv2d) and isinstance(module.pointwise, StructuredLinear):
            inside.add(module.pointwise)
            taps = module.depthwise.weight[0].numel()
            matrix = module.pointwise.in_features * module.pointwise.out_features
            dense += matrix * taps - module.depthwise.weight.numel() - module.pointwise.matrix_parameters
        elif isinstance(module, StructuredLinear):
            dense += module.dense_elements - module.matrix_parameters
    return dict.fromkeys(layers, present / dense)


def split_groups(optimizer: Optimizer, layers: Mapping[str, StructuredLinear], schedulers: Iterable[Any] = ()) -> None:
    """Give the parameters of each layer, without its bias, a group of their own, in place.

    The groups are added after those there are, with the same options; what was split before stays so. A ``name`` among the
    options is followed by the layer's. Schedulers get for each new group what they hold for the one that it came from.

    Args:
        optimizer: Any optimizer.
        layers: Names and layers.
        schedulers: Those that drive the optimizer, of torch's own classes or their like.
    """
    owner = {parameter: name for name, layer in layers.items() for parameter in layer.parameters() if parameter is not layer.bias}
    for source, group in enumerate(list(optimizer.param_groups)):
        if _LAYER in group:
            continue
        split: dict[str, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            if parameter in owner:
                split.setdefault(owner[parameter], []).append(parameter)
        group["params"] = [parameter for parameter in group["params"] if parameter not in owner]
        for name, parameters in split.items():
            new = {**group, "params": parameters, _LAYER: name, _SOURCE: source}
            if "name" in group:
                new["name"] = f"{group['name']}/{name}"
            optimizer.param_groups.append(new)
            for scheduler in schedulers:
                _extend(scheduler, source)


def scale_decay(optimizer: Optimizer, ratios: Mapping[str, float]) -> dict[str, float]:
    """Set the weight decay of the groups split off to that of the groups they came from, times a factor.

    Args:
        optimizer: After :func:`split_groups`.
        ratios: Factor of each layer.

    Returns:
        Names of the layers, with their weight decay.
    """
    decays = {}
    for group in optimizer.param_groups:
        if _LAYER in group:
            group["weight_decay"] = optimizer.param_groups[group[_SOURCE]]["weight_decay"] * ratios[group[_LAYER]]
            decays[group[_LAYER]] = group["weight_decay"]
    return decays


def _extend(scheduler: Any, source: int) -> None:
    for name in _PER_GROUP:
        values = vars(scheduler).get(name)
        if isinstance(values, list):
            values.append(values[source])
    for inner in vars(scheduler).get("_schedulers", ()):
        _extend(inner, source)
