"""``lit-compress shrink``: cut a checkpoint on disk."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from pytorch_lightning.core.optimizer import _init_optimizers_and_lr_schedulers

from lit_compress.callbacks.steps import silent_step
from lit_compress.checkpoint import read, shrink_checkpoint
from lit_compress.commands.lightning import configured, example_batch
from lit_compress.recipe import Recipe
from lit_compress.report import count_parameters


def main(args: Sequence[str]) -> None:
    """Cut the network of a checkpoint, and all that goes with it, into another file."""
    parser = argparse.ArgumentParser(
        prog="lit-compress shrink",
        description="Cut the network of a checkpoint by a recipe: weights, optimizer state and weight averages. "
        "Training goes on from the new file; the old one stays.",
        epilog="Options of the config can be overridden as for fit: --data.batch_size 32.",
    )
    parser.add_argument("--config", required=True, help="YAML file with trainer, model and data that the checkpoint is of")
    parser.add_argument("--ckpt", required=True, help="checkpoint to cut")
    parser.add_argument("--recipe", required=True, help="JSON file, from a pruned run or from lit-compress analyze")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint to write")
    options, overrides = parser.parse_known_args(args)
    if options.out.exists():
        raise ValueError(f"{options.out} exists; give another file for `--out`.")
    recipe, content = Recipe.load(options.recipe), read(options.ckpt)
    cli = configured(options.config, overrides)
    optimizers, _ = _init_optimizers_and_lr_schedulers(cli.model) if content.get("optimizer_states") else ([], [])
    smaller = shrink_checkpoint(
        cli.model, content, recipe, example_batch(cli.datamodule), optimizers=optimizers, forward_fn=silent_step
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(smaller, options.out)
    before = sum(tensor.numel() for tensor in content["state_dict"].values())
    after = sum(tensor.numel() for tensor in smaller["state_dict"].values())
    print(f"{count_parameters(cli.model):,} trainable parameters are left; {after / before:.1%} of all numbers in the weights.")
    print(f"Written to {options.out}")
