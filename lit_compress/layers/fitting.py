"""Bring a compressed matrix near to a dense one by gradient steps, where no closed form is known."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from lit_compress.layers.structured import StructuredLinear

_STEPS = 200


def fit_by_gradient(layer: StructuredLinear, target: Tensor) -> None:
    """Set a layer's parameters in place, from what they are, by L-BFGS on the squared distance, in float64.

    The result is a local optimum. Its first parameter is scaled for the best multiple, so that the distance is never more than
    that of a matrix of zeros; the matrix must be proportional to that parameter.

    Args:
        layer: The layer.
        target: Matrix, of as many elements as ``layer.to_dense()``.
    """
    twin = copy.deepcopy(layer).double()
    twin.bias = None
    parameters = list(twin.parameters())
    wanted = target.detach().double().flatten()
    optimizer = torch.optim.LBFGS(parameters, max_iter=_STEPS, history_size=20, line_search_fn="strong_wolfe")

    def distance() -> Tensor:
        optimizer.zero_grad()
        loss = (twin.to_dense().flatten() - wanted).square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(distance)
    with torch.no_grad():
        near = twin.to_dense().flatten()
        parameters[0].mul_(near @ wanted / (near @ near))
        for own, fitted in zip((p for p in layer.parameters() if p is not layer.bias), parameters, strict=True):
            own.copy_(fitted)
