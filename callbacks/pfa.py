"""Principal Filter Analysis inside a running Trainer."""

from __future__ import annotations

from typing import Any

from lightning_fabric.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lit_compress.analysis import Analysis
from lit_compress.callbacks.pruning import PruningCallback
from lit_compress.callbacks.targets import for_this_cut, one_target
from lit_compress.recipe import Recipe
from lit_compress.spectra import PFA, Select


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
        select: Which of a layer's channels go first. ``"correlation"``: those that correlate the most with others, as in the
            paper. ``"reconstruction"``: those whose loss costs the outputs of the layers behind them the least, once the other
            channels have taken over what they can. With ``compensate="linear"`` they do: together, a cut costs far less.
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
        select: Select = "correlation",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        try:
            self.select: Select = PFA(select).select
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        sizes = {"keep_params": keep_params, "keep_mult_adds": keep_mult_adds, "keep_latency": keep_latency}
        self.target = one_target("energy", {"energy": energy, **sizes}, needed=False)

    @property
    @override
    def method(self) -> PFA:
        return PFA(self.select)

    @override
    def choose(self, analysis: Analysis) -> Recipe:
        return self.limited_recipe(analysis, for_this_cut(self.target, self.schedule, own="energy"))
