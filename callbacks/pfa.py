"""Principal Filter Analysis inside a running Trainer."""

from __future__ import annotations

from typing import Any

from lightning_fabric.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lit_compress.analysis import Analysis
from lit_compress.callbacks.pruning import PruningCallback
from lit_compress.recipe import Recipe


class PFAPruning(PruningCallback):
    """Prune by Principal Filter Analysis: keep as many channels as a layer's responses have independent directions.

    Without a target it is PFA-KL, which has no parameter at all. Otherwise give exactly one of the targets.

    Args:
        energy: Share of each layer's response energy to keep, in (0, 1]. Lower cuts more.
        keep_params: Share of the original network's trainable parameters to keep, in (0, 1). The result is at or below it,
            counted on the network as cut.
        keep_mult_adds: The same for mult-adds.
        keep_latency: The same for the time of a validation step on a batch as the analysis reads it, measured on networks of the
            sizes in question and on the original, in turns: see :meth:`Analysis.recipe`. Under DDP, on rank 0.
        kwargs: When, where and on what, as for :class:`PruningCallback`. With several cuts, a target for the whole is approached
            in equal ratios: 0.25 in two cuts is 0.5 and then 0.25 of the original.

    Raises:
        MisconfigurationException: If more than one target is given or a value is out of range.

    Source: *Filter Distillation for Network Compression* (PFA), section 3.

    Example::

        trainer = Trainer(max_epochs=20, callbacks=[PFAPruning(keep_params=0.4, at_epoch=10)])
    """

    def __init__(
        self,
        *,
        energy: float | None = None,
        keep_params: float | None = None,
        keep_mult_adds: float | None = None,
        keep_latency: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        given = {
            "energy": energy, "keep_params": keep_params, "keep_mult_adds": keep_mult_adds, "keep_latency": keep_latency
        }  # fmt: skip
        self.target = {name: value for name, value in given.items() if value is not None}
        if len(self.target) > 1:
            raise MisconfigurationException(f"Give at most one of {sorted(given)} but got {sorted(self.target)}.")
        if energy is not None and not 0 < energy <= 1:
            raise MisconfigurationException(f"Argument `energy` must lie in (0, 1] but got {energy}.")
        for name, value in self.target.items():
            if name != "energy" and not 0 < value < 1:
                raise MisconfigurationException(f"Argument `{name}` must lie in (0, 1) but got {value}.")

    @override
    def choose(self, analysis: Analysis) -> Recipe:
        share_of_cuts = self.schedule.progress
        target = {name: value if name == "energy" else value**share_of_cuts for name, value in self.target.items()}
        return analysis.recipe(
            **target,
            min_width=self.min_width,
            round_to=self.round_to,
            include=self.include,
            exclude=self.exclude,
        )
