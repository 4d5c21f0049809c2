"""Error against budget, really gathered, and how much more a uniform split must spend for the same."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback
from typing_extensions import override

from lit_compress.budget import matching_total
from lit_compress.budget.pictures import plot_error_curves
from lit_compress.callbacks.loggers import Outlets
from lit_compress.modules.feature_gatherer import LitFeatureGatherer


class BudgetCurve(Callback):
    """After a test: the error at several totals, each really gathered, beside that of a uniform split.

    For a :class:`~lit_compress.modules.LitFeatureGatherer` that is trained for a range of totals. Logs the table and the picture
    ``budget/curve`` and, given a twin trained on a uniform split, ``budget/uniform_total`` (the total at which the twin errs no
    more than this model does at ``test_total``, by bisection; infinite if no total in the range does) and
    ``budget/uniform_extra`` (that over ``test_total``, minus 1).

    Args:
        totals: Totals of the curve, within the range trained for.
        uniform: Checkpoint of the same module trained with ``learn=False``.

    Raises:
        MisconfigurationException: If the module is another one, is for one total, the totals leave its range, several
            processes test, or there are several test sets.

    Example::

        trainer = Trainer(callbacks=[BudgetCurve([5, 10, 20, 40], uniform="uniform.ckpt")])
        trainer.test(gatherer, datamodule)
    """

    def __init__(self, totals: Sequence[float], uniform: str | Path | None = None) -> None:
        if not totals:
            raise MisconfigurationException("Argument `totals` must hold at least one total.")
        self.totals = tuple(sorted(totals))
        self.uniform = uniform

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, LitFeatureGatherer) or pl_module.totals is None:
            raise MisconfigurationException(
                "BudgetCurve needs a LitFeatureGatherer with `totals`, a model for a range of them; one for a single total has "
                "no curve."
            )
        low, high = pl_module.totals
        if self.totals[0] < low or self.totals[-1] > high:
            raise MisconfigurationException(f"The model was trained for totals from {low} to {high} but got {self.totals}.")
        if trainer.world_size > 1:
            raise MisconfigurationException("BudgetCurve tests in one process; set `devices=1`.")

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        outlets = Outlets(trainer)
        if not outlets.open or not isinstance(pl_module, LitFeatureGatherer) or pl_module.totals is None:
            return
        loaders = trainer.test_dataloaders
        loaders = loaders if isinstance(loaders, (list, tuple)) else [loaders]
        if len(loaders) != 1:
            raise MisconfigurationException(f"BudgetCurve takes one test set but got {len(loaders)}.")
        batches = pl_module.summarise(loaders[0])
        curves = {"learnt": {total: pl_module.error_at(batches, total) for total in self.totals}}
        if self.uniform is not None:
            twin = copy.deepcopy(pl_module)
            twin.load_state_dict(torch.load(self.uniform, map_location=pl_module.device, weights_only=True)["state_dict"])
            others = twin.summarise(loaders[0])
            curves["uniform"] = {total: twin.error_at(others, total) for total in self.totals}
            if pl_module.test_total is not None:
                reached = pl_module.error_at(batches)
                matched = matching_total(lambda total: twin.error_at(others, total), reached, *pl_module.totals)
                outlets.values({"budget/uniform_total": matched, "budget/uniform_extra": matched / pl_module.test_total - 1})
        outlets.figure("budget/curve", plot_error_curves(curves), "budget_curve")
        rows = [[total, *(curve[total] for curve in curves.values())] for total in self.totals]
        outlets.table("budget/curve_table", ["total", *curves], rows, "budget_curve")
