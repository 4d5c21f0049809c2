"""Random pruning: what any method must beat."""

from __future__ import annotations

from typing import Any

from lightning_fabric.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lit_compress.analysis import Analysis
from lit_compress.callbacks.pruning import PruningCallback
from lit_compress.recipe import Recipe


class RandomPruning(PruningCallback):
    """Prune at random to a given size: random widths, and random channels of that number. To compare a method with chance.

    Args:
        keep_params: Share of the original network's trainable parameters to keep, in (0, 1). The result is at or below it,
            counted on the network as cut.
        seed: Of the draw; another seed is another network of the same size.
        kwargs: When, where and on what, as for :class:`PruningCallback`. With several cuts, the size is approached in equal
            ratios.

    Raises:
        MisconfigurationException: If a value is out of range.

    Source: the random recipes of *Filter Distillation for Network Compression* (PFA), section 4.1.

    Example::

        trainer = Trainer(max_epochs=20, callbacks=[RandomPruning(keep_params=0.4, seed=1, at_epoch=10)])
    """

    def __init__(self, *, keep_params: float, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 < keep_params < 1:
            raise MisconfigurationException(f"Argument `keep_params` must lie in (0, 1) but got {keep_params}.")
        if seed < 0:
            raise MisconfigurationException(f"Argument `seed` must be at least 0 but got {seed}.")
        self.keep_params, self.seed = keep_params, seed

    @override
    def choose(self, analysis: Analysis) -> Recipe:
        return analysis.random_recipe(
            keep_params=self.keep_params**self.schedule.progress,
            seed=self.seed + len(self.schedule.cuts),
            min_width=self.min_width,
            round_to=self.round_to,
            include=self.include,
            exclude=self.exclude,
        )
