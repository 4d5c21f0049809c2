"""Weights for losses beside another one, from how hard each pulls at the layers that they share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Balance:
    """How long gradients are on the layers that several losses share.

    Args:
        own: ℓ2 norm of the gradient of the loss that the others stand beside.
        terms: Name of a term to the norm of its gradient, without any weight.
    """

    own: float
    terms: Mapping[str, float]

    def weights(self, share: float = 0.1) -> dict[str, float]:
        """Weights that make each term's gradient ``share`` times as long as that of the loss.

        A term without a gradient gets the weight 0: there is nothing to weigh it by.

        Raises:
            ValueError: If the share is not positive.

        Example:
            >>> Balance(own=2.0, terms={"end_to_end": 64.0, "conv4": 0.0}).weights(share=0.25)
            {'end_to_end': 0.0078125, 'conv4': 0.0}
        """
        if share <= 0:
            raise ValueError(f"Argument `share` must be positive but got {share}.")
        return {name: share * self.own / norm if norm > 0 else 0.0 for name, norm in self.terms.items()}

    def shares(self, weights: Mapping[str, float]) -> dict[str, float]:
        """How long each term's gradient is beside that of the loss, with weights; infinite beside none.

        Example:
            >>> Balance(own=2.0, terms={"end_to_end": 64.0}).shares({"end_to_end": 0.0078125})
            {'end_to_end': 0.25}
        """
        weighted = {name: weights[name] * norm for name, norm in self.terms.items()}
        return {name: norm / self.own if self.own > 0 else float("inf") if norm else 0.0 for name, norm in weighted.items()}


def balance(loss: Tensor, terms: Mapping[str, Tensor], parameters: Iterable[Tensor]) -> Balance:
    """Measure how hard a loss and terms beside it pull at the parameters that they share.

    Nothing is accumulated anywhere, and all graphs stay: the step can go on. It costs a backward pass for each.

    Args:
        loss: Scalar, with its graph.
        terms: Scalars by name, with theirs; one without a graph has no gradient.
        parameters: Of the shared layers; those that are frozen are left out.

    Raises:
        ValueError: If the loss has no graph, or no parameter is trained.

    Example:
        >>> weight = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> found = balance(weight.square().sum(), {"first": 1000 * weight[0]}, [weight])
        >>> found  # of the gradients (6, 8) and (1000, 0)
        Balance(own=10.0, terms={'first': 1000.0})
        >>> found.weights(share=0.5)
        {'first': 0.005}
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        raise ValueError("The losses share no layer that is trained, so that there is nothing to weigh them by.")
    if not loss.requires_grad:
        raise ValueError("The loss depends on no parameter that is trained.")
    return Balance(_pull(loss, trained), {name: _pull(term, trained) for name, term in terms.items()})


def mean_balance(found: Sequence[Balance]) -> Balance:
    """The mean over several batches, of each term over those in which it has a gradient.

    Example:
        >>> mean_balance([Balance(1.0, {"a": 4.0}), Balance(3.0, {"a": 0.0})])
        Balance(own=2.0, terms={'a': 4.0})
    """

    def mean(values: list[float]) -> float:
        return sum(values) / max(len(values), 1)

    names = dict.fromkeys(name for one in found for name in one.terms)
    terms = {name: mean([one.terms[name] for one in found if one.terms.get(name, 0.0) > 0]) for name in names}
    return Balance(mean([one.own for one in found]), terms)


def _pull(loss: Tensor, parameters: Sequence[Tensor]) -> float:
    if not loss.requires_grad:
        return 0.0
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    norms = [gradient.float().norm() for gradient in gradients if gradient is not None]
    return float(torch.stack(norms).norm()) if norms else 0.0
