"""What metrics share whose states are sums: those of batches and of ranks add up."""

from __future__ import annotations

from typing import Any

import torch
from torchmetrics import Metric
from typing_extensions import override


class SumMetric(Metric):
    """A metric all of whose states are added with ``dist_reduce_fx="sum"``, so that two of them merge by addition."""

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    @override
    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add what another metric has seen, which stays as it is.

        Args:
            incoming_state: Metric of this class and of the same size, or its ``metric_state``.

        Raises:
            ValueError: If it is something else, or of another size.
        """
        name, state = type(self).__name__, incoming_state
        if isinstance(incoming_state, Metric):
            state = incoming_state.metric_state if type(incoming_state) is type(self) else {}
        if not isinstance(state, dict) or not self._defaults.keys() <= state.keys():
            raise ValueError(f"Expected a {name} or its `metric_state` but got {type(incoming_state).__name__}.")
        mine = {key: torch.as_tensor(getattr(self, key)) for key in self._defaults}
        theirs = {key: torch.as_tensor(state[key]).to(value) for key, value in mine.items()}
        for key, value in mine.items():
            if theirs[key].shape != value.shape:
                raise ValueError(
                    f"Expected a {name} whose `{key}` has shape {tuple(value.shape)} but got {tuple(theirs[key].shape)}."
                )
        for key, value in mine.items():
            setattr(self, key, value + theirs[key])
        self._update_count += 1
        self._computed = None
