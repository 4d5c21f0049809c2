"""Start a run with a network that is cut already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.model_helpers import is_overridden
from typing_extensions import override

from lit_compress.callbacks.resume import keep_plan_in_checkpoints
from lit_compress.callbacks.steps import silent_step, validating
from lit_compress.naming import relocation
from lit_compress.plan import plan_of
from lit_compress.ranks import as_one
from lit_compress.recipe import Recipe
from lit_compress.rng import isolated
from lit_compress.slicing import all_tensors
from lit_compress.statistics.gather import first_samples
from lit_compress.surgery import call, cut


class ApplyRecipe(Callback):
    """Cut the network by a recipe before training begins, and before a strategy shards it.

    The way to prune under strategies that cannot be cut in flight: find the recipe on one device (a pruning callback writes
    ``recipe.json``, and so does ``lit-compress analyze``), then train the small network under FSDP. The weights are those that
    the network has: load them in its constructor to fine-tune, or train from scratch.

    The network is cut in ``configure_model``: before the module's own if its layers are there by then, after it if it builds them
    there. What ``configure_model`` has sharded or left on the meta device cannot be cut.

    Args:
        recipe: The recipe, or its JSON file.
        example_inputs: Inputs for ``module(*example_inputs)``, one or two samples on the CPU, to find out what is tied. None: a
            batch of the data for this stage runs through ``validation_step``; or, if there are none, ``example_input_array`` of
            the module through its ``forward``.
        verify: Check that the cut is exact, and put everything back if not.

    Raises:
        MisconfigurationException: From the start of a run: if the recipe does not fit the network, there are no inputs to trace
            it with, or it was cut to another recipe.

    Example:
        >>> from lit_compress import Recipe
        >>> ApplyRecipe(Recipe(keep={"net.fc1": tuple(range(20))})).recipe.widths
        {'net.fc1': 20}
    """

    def __init__(self, recipe: Recipe | str | Path, *, example_inputs: Any = None, verify: bool = True) -> None:
        self.recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
        if not self.recipe.keep:
            raise MisconfigurationException("The recipe keeps everything: there is nothing to apply.")
        self.example_inputs, self.verify = example_inputs, verify

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        keep_plan_in_checkpoints(pl_module)
        if (present := plan_of(pl_module)) is not None:  # a second run of the same module
            if not _includes(present.recipe, self.recipe):
                raise MisconfigurationException(
                    f"The network was cut already, by {present.recipe.method}, to other channels than the recipe "
                    "keeps. Build it anew."
                )
            return
        # Lightning has no hook between the module's own `configure_model` and the strategy's sharding, nor one right before it.
        own = pl_module.configure_model if is_overridden("configure_model", pl_module) else None
        shadowed = vars(pl_module).get("configure_model")

        def configure_model() -> None:
            vars(pl_module).pop("configure_model")
            if shadowed is not None:
                vars(pl_module)["configure_model"] = shadowed
            if own is None or self._fits(pl_module):
                self._apply(trainer, pl_module, stage)
            if own is not None:
                own()
                if plan_of(pl_module) is None:
                    self._apply(trainer, pl_module, stage)

        vars(pl_module)["configure_model"] = configure_model

    def _fits(self, pl_module: LightningModule) -> bool:
        names = [*dict(pl_module.named_modules()), *all_tensors(pl_module)]
        return relocation([*self.recipe.keep, *self.recipe.padded], names) is not None

    def _apply(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Lightning makes the root device the default one while it builds a model; the network still lies where it was built.
        with as_one(), isolated(), torch.device(pl_module.device), validating(trainer):
            try:
                if self.example_inputs is not None:
                    cut(pl_module, self.recipe, self.example_inputs, verify=self.verify)
                elif (batch := _batch(trainer, pl_module, stage)) is not None:
                    cut(pl_module, self.recipe, first_samples(batch), forward_fn=silent_step, verify=self.verify)
                elif (array := pl_module.example_input_array) is not None:
                    forward: Any = (lambda module, inputs: module(**inputs)) if isinstance(array, dict) else call
                    cut(pl_module, self.recipe, array, forward_fn=forward, verify=self.verify)
                else:
                    raise ValueError(
                        "There are neither data nor an `example_input_array` to trace it with: give `example_inputs`."
                    )
            except ValueError as error:
                raise MisconfigurationException(f"The recipe cannot be applied to {type(pl_module).__name__}: {error}") from error


def _includes(done: Recipe, wanted: Recipe) -> bool:
    """Whether a cut removed at least what a recipe removes."""
    change = relocation(wanted.keep, done.keep) if done.keep else None
    if change is None:
        return False
    wanted = wanted.renamed(add=change.add, drop=change.drop)
    return all(set(done.keep[layer]).issubset(channels) for layer, channels in wanted.keep.items())


def _batch(trainer: Trainer, pl_module: LightningModule, stage: str) -> Any:
    """The first batch of the data of a stage, where the module is; None if there are none yet."""
    loops = (("fit", trainer.fit_loop), ("validate", trainer.validate_loop), ("test", trainer.test_loop))
    source = next((loop for name, loop in loops if stage == name), trainer.predict_loop)._data_source
    loader = source.dataloader() if source.is_defined() else None
    if isinstance(loader, (list, tuple)):
        loader = loader[0] if loader else None
    batch = None if loader is None else next(iter(loader), None)
    return None if batch is None else pl_module._apply_batch_transfer_handler(batch, device=pl_module.device)
