"""Weight decay of compressed layers scaled by their compression, in any Trainer."""

from __future__ import annotations

from typing import Any

from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from pytorch_lightning.utilities import rank_zero_warn
from typing_extensions import override

from lit_compress.layers.structured import StructuredLinear
from lit_compress.weight_decay import Mode, crs_ratios, scale_decay, split_groups


class CRSWeightDecay(Callback):
    r"""Multiply the weight decay of every compressed layer by its compression ratio, :math:`d_c = d \, M / N`.

    Compressed layers are found by type. When ``fit`` begins, their parameters, without biases, get groups of their own in the
    optimizers that hold them, after the user's groups and with the same options; schedulers follow. The factor is worked out anew
    at every epoch, after a pruning callback may have changed the widths, from the weight decay that the user's group then has. As
    ratios go to 1, the decay goes to the plain one.

    Logs ``compress/weight_decay/<layer>`` when it changes, in the unit of the optimizer's ``weight_decay``.

    Args:
        mode: ``"matrix"``: every layer by its own ratio, parameters over elements of the matrix. ``"network"``: all by the ratio
            of the whole network to the same network with dense layers, as in the released runs.

    Raises:
        MisconfigurationException: If the mode is unknown; from the start of ``fit``, if there is no compressed layer, none is in
            an optimizer, an optimizer has no ``weight_decay``, or the strategy shards the parameters.

    Source: *Efficient machine learning under a budget* (T2), section 5.2.5. Published: it helps all kinds but ``"hashed"``.

    Example::

        trainer = Trainer(callbacks=[CRSWeightDecay()])
    """

    def __init__(self, mode: Mode = "matrix") -> None:
        if mode not in ("matrix", "network"):
            raise MisconfigurationException(f"Argument `mode` must be 'matrix' or 'network' but got {mode!r}.")
        self.mode: Mode = mode
        self._decays: dict[str, float] = {}

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Split the groups, before a checkpoint's optimizer states are loaded into them."""
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise MisconfigurationException(
                f"CRSWeightDecay counts whole parameters, on one device or under DDP, but the Trainer uses "
                f"{type(trainer.strategy).__name__}."
            )
        layers = {name: module for name, module in pl_module.named_modules() if isinstance(module, StructuredLinear)}
        if not layers:
            raise MisconfigurationException(
                f"{type(pl_module).__name__} has no compressed layer; replace some with `lit_compress.substitute_linear`."
            )
        self._decays = {}
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        held = {parameter for group in groups for parameter in group["params"]}
        if not held.intersection(parameter for layer in layers.values() for parameter in layer.parameters()):
            raise MisconfigurationException("No optimizer holds a parameter of a compressed layer.")
        for optimizer in trainer.optimizers:
            if any("weight_decay" not in group for group in optimizer.param_groups):
                raise MisconfigurationException(f"{type(optimizer).__name__} has no option `weight_decay` that could be scaled.")
            schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
            split_groups(optimizer, layers, [s for s in schedulers if getattr(s, "optimizer", None) is optimizer])
        if not any(group["weight_decay"] for group in groups):
            rank_zero_warn("CRSWeightDecay scales the weight decay, but it is 0 in all groups of all optimizers.")

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0 or not self._decays:  # after every `on_train_epoch_start`, whose order is the user's
            self._scale(trainer, pl_module)

    def _scale(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ratios = crs_ratios(pl_module, self.mode)
        decays = {name: decay for optimizer in trainer.optimizers for name, decay in scale_decay(optimizer, ratios).items()}
        if trainer.logger is not None and decays != self._decays:
            values = {f"compress/weight_decay/{name}": decay for name, decay in decays.items()}
            trainer.logger.log_metrics(values, step=trainer.global_step)
        self._decays = decays
