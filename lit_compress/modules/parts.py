"""A training loss of several parts, logged part by part."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pytorch_lightning import LightningModule
from torch import Tensor


def logged_sum(module: LightningModule, parts: Mapping[str, Tensor], batch_size: int) -> Tensor:
    """The sum of a loss's parts, logged as ``train/loss``, and each part as ``train/<name>``: means over an epoch and over ranks.

    Args:
        module: In its ``training_step``.
        parts: Name to a scalar.
        batch_size: Samples that the parts are means over.
    """
    loss = torch.stack(list(parts.values())).sum()
    for name, value in [("loss", loss), *parts.items()]:
        module.log(
            f"train/{name}",
            value.detach(),
            on_step=False,
            on_epoch=True,
            prog_bar=name == "loss",
            batch_size=batch_size,
            sync_dist=True,
        )
    return loss
