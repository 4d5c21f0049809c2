"""Pruning by the Parametric Information Bottleneck inside a running Trainer."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, Literal

import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from typing_extensions import override

from lit_compress.analysis import Analysis, wanted
from lit_compress.callbacks.loggers import Outlets
from lit_compress.callbacks.look import look
from lit_compress.callbacks.pruning import PruningCallback
from lit_compress.callbacks.steps import is_dev_run
from lit_compress.information import ONE_CHANNEL, PIB, GroupEntropies, information_of, why_no_bits
from lit_compress.pictures import plot_information
from lit_compress.rankings import Method, sort_out
from lit_compress.recipe import Recipe
from lit_compress.selection import pib

_UNSURE = 0.5  # above this share of values in the middle, they are far from the black and white that the method is for


class PIBPruning(PruningCallback):
    """Prune sigmoid networks by the information that their units carry, again and again until nothing can be pruned.

    Whenever training has converged, all layers are pruned at once: units go that carry less than half a bit, as long as each
    layer keeps room for the information that it has. There is no rate to choose. Once nothing is left to prune, training ends
    with that epoch.

    Units are read as bits, which makes sense for sigmoids that are mostly sure, on inputs that are mostly black or white. A layer
    that no sigmoid follows is refused, and values in the middle are told in a warning.

    What the units of each layer carry is logged as ``compress/information/<layer>`` (bits, of a convolution the sum over its
    feature maps) before each epoch, right after each cut, and when training ends: it falls with a cut, and climbs again while
    training recovers. The picture ``compress/information_over_time`` shows it in the end.

    Args:
        variant: What a unit is worth and how much room stays. ``"A"``: the bound 1 - H(Z|Z') on its information. ``"B"``: its
            information, with the room of A. ``"C"``: its information, for both.
        marginal: The estimate of H(Z): ``"jensen"``, a bound, or ``"exact"``, which prunes deeper than most tasks stand.
        stop: End training once nothing can be pruned.
        information_every_n_epochs: How often the information is measured, which takes a pass over the data of the analysis. None
            for at the cuts alone.
        loader: Data for the analysis, by default those of validation.
        max_samples: Use this many of them. None for all.
        kwargs: Where, as for :class:`PruningCallback`, and when: by default whenever ``monitor`` has not improved for
            ``patience`` epochs, without a limit.

    Attributes:
        information: What was logged of it: epochs trained so far, and layer name to bits.

    Raises:
        MisconfigurationException: If the variant or the marginal is unknown, or a number is out of range. From the start of
            training: if no sigmoid follows a layer that is not left out with ``exclude``.

    Source: PIBprune, chapter 4 of *Region of Interest Autoencoders* (thesis).

    Example::

        trainer = Trainer(max_epochs=100, callbacks=[PIBPruning(monitor="val/accuracy", mode="max", patience=3)])
    """

    def __init__(
        self,
        *,
        variant: pib.Variant = "A",
        marginal: pib.Marginal = "jensen",
        stop: bool = True,
        information_every_n_epochs: int | None = 1,
        loader: Literal["train", "val"] | DataLoader[Any] | Iterable[Any] | None = "val",
        max_samples: int | None = 100,
        **kwargs: Any,
    ) -> None:
        if all(kwargs.get(trigger) is None for trigger in ("at_epoch", "every_n_epochs", "when")):
            kwargs["when"] = "converged"
        if kwargs.get("when") is not None and kwargs.get("max_cuts") is None:
            kwargs["max_cuts"] = sys.maxsize
        super().__init__(loader=loader, max_samples=max_samples, **kwargs)
        try:
            PIB(variant, marginal)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        if information_every_n_epochs is not None and information_every_n_epochs < 1:
            raise MisconfigurationException(
                f"Argument `information_every_n_epochs` must be at least 1 or None but got {information_every_n_epochs}."
            )
        self.variant, self.marginal, self.stop = variant, marginal, stop
        self.information_every_n_epochs = information_every_n_epochs
        self.information: list[tuple[int, dict[str, float]]] = []
        self._outlets: Outlets | None = None  # where there is anybody to tell

    @property
    @override
    def method(self) -> Method:
        return PIB(self.variant, self.marginal)

    @override
    def choose(self, analysis: Analysis) -> Recipe:
        for name, found in analysis.rankings.items():
            if isinstance(found, GroupEntropies) and found.middle > _UNSURE:
                rank_zero_warn(
                    f"{found.middle:.0%} of the activations of {name!r} lie between {pib.MIDDLE[0]} and {pib.MIDDLE[1]}. Read as "
                    "bits, such units are mostly noise, and what PIB says of them means little."
                )
        return self.limited_recipe(analysis, {})

    # ---------------------------------------------------------------- hooks, in the order in which they fire

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.global_step == 0:  # what is resumed brings its own later
            self.information = []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._outlets = Outlets(trainer)
        if not self.schedule.remaining:
            return
        with self.traced(trainer, pl_module) as (graph, example):
            refused = {
                group.name: why
                for group in sort_out(graph)[0]
                if wanted(group, self.include, self.exclude) and (why := why_no_bits(graph, group)) not in ("", ONE_CHANNEL)
            }
            if refused:
                listed = "; ".join(f"{name!r}: {why}" for name, why in refused.items())
                raise MisconfigurationException(
                    f"PIBPruning reads sigmoid units as bits, but there are layers without. {listed}. Use sigmoids, or leave "
                    "these layers out with `exclude`."
                )
            share = _middle_of_inputs(example)
        if share > _UNSURE:
            rank_zero_warn(
                f"{share:.0%} of the input's values lie in the middle of their range. PIB is for inputs that are mostly black or "
                "white; on others its estimates mean little."
            )

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Before, not after an epoch: a file that is written at the end of one knows all that came before it.
        if self.information_every_n_epochs is not None and trainer.current_epoch % self.information_every_n_epochs == 0:
            self._measure(trainer, pl_module)
        super().on_train_epoch_start(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self.information_every_n_epochs is not None:
            self._measure(trainer, pl_module)
        if self.information and self._outlets is not None and self._outlets.open:
            figure = plot_information(self.information, self.schedule.cuts)
            self._outlets.figure("compress/information_over_time", figure, "information_over_time")

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "information": [(epochs, dict(bits)) for epochs, bits in self.information]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.information = [(epochs, dict(bits)) for epochs, bits in state_dict["information"]]

    # ---------------------------------------------------------------- what is measured

    @override
    def cut_now(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().cut_now(trainer, pl_module)
        if self.information_every_n_epochs is not None:
            self._measure(trainer, pl_module)

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out what each layer's units carry, and log it."""
        if is_dev_run(trainer):
            return
        bits = information_of(look(trainer, pl_module, self.loader, self.max_samples, self.method).rankings)
        self.information.append((trainer.current_epoch, bits))
        if self._outlets is not None and self._outlets.open:
            self._outlets.values({f"compress/information/{name}": value for name, value in bits.items()})

    @override
    def nothing_left(self, trainer: Trainer) -> None:
        self.schedule.close()
        trainer.should_stop = trainer.should_stop or self.stop
        rank_zero_info(f"PIBPruning found nothing left to prune before epoch {trainer.current_epoch}.")


def _middle_of_inputs(example: Any) -> float:
    """Share of the first floating point tensor's values in the middle of their range; 0 if there is none."""
    leaves = (leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel())
    values = next(leaves, torch.zeros(1)).detach().double()
    low, high = values.aminmax()
    scaled = (values - low) / (high - low).clamp(min=torch.finfo(values.dtype).tiny)
    return float(((scaled > pib.MIDDLE[0]) & (scaled < pib.MIDDLE[1])).double().mean())
