"""One line that makes a LightningModule load pruned checkpoints by itself."""

from __future__ import annotations

from typing import Any

from lit_compress.callbacks.companions import rebuild_module
from lit_compress.checkpoint import write_plan


class PrunableMixin:
    """Put it before ``LightningModule`` among the bases: pruned checkpoints then load with ``load_from_checkpoint``.

    The module is built as always, cut to the checkpoint's sizes, and the weights loaded. Saving notes what was cut, also by
    :func:`~lit_compress.cut` outside of any callback. An ``on_load_checkpoint`` or ``on_save_checkpoint`` of your own must call
    ``super()``.

    Example:
        >>> from pytorch_lightning import LightningModule
        >>> class MyModule(PrunableMixin, LightningModule):
        ...     pass
    """

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Cut the module to the sizes of the checkpoint before its weights load."""
        rebuild_module(self, checkpoint)  # type: ignore[arg-type]  # a mixin into modules
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note in the checkpoint what was cut."""
        write_plan(self, checkpoint)  # type: ignore[arg-type]
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]
