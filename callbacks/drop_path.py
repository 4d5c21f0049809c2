"""Drop-path that grows over the training."""

from __future__ import annotations

from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from lit_compress.models.darts import DropPath


class DropPathSchedule(Callback):
    """Raise the probability of every :class:`~lit_compress.models.DropPath` linearly over the epochs, from 0.

    Epoch ``e`` of ``E`` has ``final · e / E``, which a resumed run has as well. Logs ``train/drop_path`` (a probability).

    Args:
        final: Where it goes; the last epoch is one step below.

    Raises:
        MisconfigurationException: If the probability does not lie in [0, 1); from the start of ``fit``, if there is no
            :class:`~lit_compress.models.DropPath` in the module, or no number of epochs in the Trainer.

    Source: Liu et al., *DARTS: Differentiable Architecture Search*, 2018, section 3.3, and its released code.

    Example::

        trainer = Trainer(max_epochs=600, callbacks=[DropPathSchedule(final=0.2)])
    """

    def __init__(self, final: float = 0.2) -> None:
        if not 0 <= final < 1:
            raise MisconfigurationException(f"Argument `final` must lie in [0, 1) but got {final}.")
        self.final = final

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not any(isinstance(module, DropPath) for module in pl_module.modules()):
            raise MisconfigurationException(f"{type(pl_module).__name__} has no DropPath, whose probability could be raised.")
        if trainer.max_epochs is None or trainer.max_epochs < 1:
            raise MisconfigurationException("DropPathSchedule goes by the number of epochs: give the Trainer `max_epochs`.")

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert trainer.max_epochs is not None
        probability = self.final * trainer.current_epoch / trainer.max_epochs
        for module in pl_module.modules():
            if isinstance(module, DropPath):
                module.probability = probability
        pl_module.log("train/drop_path", probability, sync_dist=False)
