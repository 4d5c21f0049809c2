"""The total at which one split does as well as another."""

from collections.abc import Callable
from math import inf, sqrt


def matching_total(error_at: Callable[[float], float], target: float, low: float, high: float, tolerance: float = 0.01) -> float:
    """The least total at which an error that falls with the total reaches ``target``, by bisection.

    Args:
        error_at: From a total to the error there, e.g. of one model conditioned on the total, with a uniform split.
        target: Error to reach.
        low: Where the search begins, positive.
        high: Where it ends, above ``low``.
        tolerance: Relative accuracy of the total.

    Returns:
        A total in [low, high]; ``low`` if that is enough already, and infinity if ``high`` is not enough.

    Raises:
        ValueError: If the limits do not ascend from above 0.

    Example:
        >>> round(matching_total(lambda total: 1 / total, target=0.1, low=1, high=1000), 1)
        10.0
    """
    if not 0 < low < high:
        raise ValueError(f"Expected 0 < low < high but got {low} and {high}.")
    if error_at(low) <= target:
        return low
    if error_at(high) > target:
        return inf
    while high / low > 1 + tolerance:
        middle = sqrt(low * high)
        low, high = (low, middle) if error_at(middle) <= target else (middle, high)
    return high
