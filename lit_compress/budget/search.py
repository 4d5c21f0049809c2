"""Splits that are not learnt by gradients: a heuristic, and searches that train a model for every trial."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax
from torch import Tensor

Objective = Callable[[tuple[float, ...]], float]
"""From shares, summing to 1, to the error of a model trained at that split."""


@dataclass(frozen=True)
class Trial:
    """One split that was tried.

    Args:
        shares: Of the budget, one a context, summing to 1.
        error: Of the model trained at that split.
    """

    shares: tuple[float, ...]
    error: float


def norm_shares(weights: Tensor, contexts: int) -> Tensor:
    """Shares proportional to the ℓ2 norm of the weights that combine each context's features.

    Args:
        weights: Of the first layer of a predictor trained on a uniform split, ``(H, C·F)`` or more columns, with the features of
            one context side by side; columns beyond those are of flags or totals.
        contexts: C.

    Returns:
        ``(C,)``.

    Raises:
        ValueError: If there are fewer columns than contexts, or all weights are 0.

    Source: *Resource-Efficient Feature Gathering at Test Time*, section 3.3.1, after recursive feature elimination.

    Example:
        >>> import torch
        >>> norm_shares(torch.tensor([[3.0, 0.0, 1.0, 0.0], [0.0, 4.0, 0.0, 0.0]]), contexts=2)
        tensor([0.8333, 0.1667])
    """
    features = weights.shape[1] // contexts
    if not features:
        raise ValueError(f"Expected at least {contexts} columns of weights but got shape {tuple(weights.shape)}.")
    columns = weights.detach()[:, : features * contexts].unflatten(1, (contexts, features))
    norms: Tensor = columns.square().sum(dim=(0, 2)).sqrt()
    if not norms.sum() > 0:
        raise ValueError("All weights are 0; train the predictor first.")
    return norms / norms.sum()


def random_search(objective: Objective, contexts: int, trials: int, seed: int = 0) -> list[Trial]:
    """Splits drawn evenly from the simplex.

    Args:
        objective: Trains and measures; called once a trial.
        contexts: Their number.
        trials: How many to try.
        seed: Of the draws.

    Returns:
        Every trial, in order.

    Raises:
        ValueError: If there is nothing to try or to split.

    Example:
        >>> tried = random_search(lambda shares: abs(shares[0] - 0.5), contexts=2, trials=50)
        >>> round(min(tried, key=lambda trial: trial.error).shares[0], 1)
        0.5
    """
    _check(contexts, trials)
    generator = np.random.default_rng(seed)
    return [_tried(objective, generator.dirichlet(np.ones(contexts))) for _ in range(trials)]


def bayesian_search(objective: Objective, contexts: int, trials: int, seed: int = 0) -> list[Trial]:
    """Splits proposed by a Gaussian process that has seen the trials before; needs the extra ``bo`` (Optuna).

    The process sees the logits of a softmax, each in [-3, 3]: no context gets more than 400 times another. The first ten
    proposals (or half of the trials, if they are fewer than twenty) are random.

    Args:
        objective: Trains and measures; called once a trial.
        contexts: Their number.
        trials: How many to try.
        seed: Of the proposals.

    Returns:
        Every trial, in order.

    Raises:
        ImportError: If Optuna is not installed.
        ValueError: If there is nothing to try or to split.
    """
    _check(contexts, trials)
    return list(_proposed(objective, contexts, trials, seed))


def _proposed(objective: Objective, contexts: int, trials: int, seed: int) -> Iterator[Trial]:
    try:
        import optuna
    except ImportError as error:
        raise ImportError('Bayesian optimisation needs Optuna: pip install "lit-compress[bo]"') from error

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.GPSampler(seed=seed, n_startup_trials=min(10, (trials + 1) // 2))
    study = optuna.create_study(sampler=sampler)
    for _ in range(trials):
        asked = study.ask()
        logits = [asked.suggest_float(f"context{index}", -3.0, 3.0) for index in range(contexts)]
        tried = _tried(objective, softmax(logits))
        study.tell(asked, tried.error)
        yield tried


def _tried(objective: Objective, shares: NDArray[np.float64]) -> Trial:
    split = tuple(shares.tolist())
    return Trial(split, float(objective(split)))


def _check(contexts: int, trials: int) -> None:
    if contexts < 2 or trials < 1:
        raise ValueError(f"A search needs at least 2 contexts and 1 trial but got {contexts} and {trials}.")
