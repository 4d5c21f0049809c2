"""The split of a budget, as it is learnt."""

from __future__ import annotations

from typing import Any

from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from lit_compress.budget import BudgetSplit
from lit_compress.budget.pictures import plot_split
from lit_compress.callbacks.loggers import Outlets


class BudgetMonitor(Callback):
    """Log how a budget is split, every epoch, and draw it over time at the end.

    Logs ``budget/share/<context>`` (share of the money, in [0, 1]) after each training epoch; when training ends, the picture
    ``budget/split`` and the table ``budget/shares``, a row an epoch. The history is in the callback's state, so that a resumed
    run shows all of it.

    Raises:
        MisconfigurationException: If the module has no attribute ``budget`` that is a :class:`BudgetSplit`.

    Example::

        trainer = Trainer(callbacks=[BudgetMonitor()])
    """

    def __init__(self) -> None:
        self._epochs: list[int] = []
        self._shares: list[list[float]] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        _budget(pl_module)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._outlets = Outlets(trainer)
        if not self._epochs:
            self._note(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._outlets.open:
            return
        names = _budget(pl_module).names
        self._outlets.figure("budget/split", plot_split(names, self._epochs, self._shares), "budget_split")
        rows = [[epoch, *shares] for epoch, shares in zip(self._epochs, self._shares, strict=True)]
        self._outlets.table("budget/shares", ["epoch", *names], rows, "budget_shares")

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"epochs": list(self._epochs), "shares": [list(shares) for shares in self._shares]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._epochs, self._shares = list(state_dict["epochs"]), [list(shares) for shares in state_dict["shares"]]

    def _note(self, trainer: Trainer, pl_module: LightningModule) -> None:
        budget = _budget(pl_module)
        shares = budget.shares(getattr(pl_module, "test_total", None)).detach().tolist()
        # Epochs that are over: 0 before the first.
        self._epochs.append(trainer.current_epoch + 1 if self._epochs else 0)
        self._shares.append(shares)
        if self._outlets.open:
            self._outlets.values({f"budget/share/{name}": share for name, share in zip(budget.names, shares, strict=True)})


def _budget(module: LightningModule) -> BudgetSplit:
    budget = getattr(module, "budget", None)
    if not isinstance(budget, BudgetSplit):
        raise MisconfigurationException(
            f"{type(module).__name__} has no BudgetSplit as its attribute `budget`, which BudgetMonitor watches."
        )
    return budget
