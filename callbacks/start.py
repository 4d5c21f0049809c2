"""Begin a training with the weights of another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from lit_compress.checkpoint import load_pruned, read, rebuild
from lit_compress.naming import matches


class StartFrom(Callback):
    """Begin ``fit`` with the weights of a checkpoint: of the domain on which a network was trained before, say.

    Unlike ``fit(ckpt_path=...)`` it takes the weights alone; training begins at epoch 0, with new optimizers. A run that is
    resumed goes on with its own weights. If the checkpoint's network was cut, the module is cut alike.

    Args:
        checkpoint: File written by a Trainer.
        new_layers: Patterns over module names, as ``["net.fc2"]``: layers that keep the weights they were built with, such as the
            last one where the classes are others.

    Raises:
        MisconfigurationException: At the start of ``fit``, if a pattern matches no layer with weights, or the weights do not
            fit.
        FileNotFoundError: At the start of ``fit``, if there is no such file.

    Example::

        trainer = Trainer(callbacks=[StartFrom("all_classes.ckpt", new_layers=["net.fc2"]), PFAPruning(at_epoch=0)])
    """

    def __init__(self, checkpoint: str | Path, new_layers: Sequence[str] = ()) -> None:
        if isinstance(new_layers, str):
            raise MisconfigurationException("Argument `new_layers` is a list of patterns, not one string.")
        self.checkpoint, self.new_layers = Path(checkpoint), tuple(new_layers)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or trainer.global_step > 0:
            return
        content = read(self.checkpoint)
        for pattern in self.new_layers:
            if not any(matches(name.rpartition(".")[0], pattern) for name in pl_module.state_dict()):
                raise MisconfigurationException(
                    f"Pattern {pattern!r} of `new_layers` matches no layer of {type(pl_module).__name__} that has weights."
                )
        try:
            rebuild(pl_module, content)
            theirs = {name: value for name, value in content["state_dict"].items() if not self._is_new(name)}
            own = {name: value for name, value in pl_module.state_dict().items() if self._is_new(name)}
            load_pruned(pl_module, {**content, "state_dict": theirs | own})
        except ValueError as error:
            raise MisconfigurationException(
                f"{type(pl_module).__name__} cannot start from {self.checkpoint}: {error} Layers that are to keep the weights "
                "they were built with are named by `new_layers`."
            ) from error

    def _is_new(self, tensor: str) -> bool:
        layer = tensor.rpartition(".")[0]
        return any(matches(layer, pattern) for pattern in self.new_layers)
