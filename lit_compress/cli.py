"""The command line: Lightning's own verbs, and those that only a compression library has."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_HELP = """\
usage: lit-compress VERB [options]

Make networks smaller inside PyTorch Lightning.

  fit, validate, test, predict   run a config: lit-compress fit --config configs/pfa_digits.yaml
  analyze                        say what a cut would do, and change nothing:
                                 lit-compress analyze --config configs/pfa_digits.yaml --ckpt last.ckpt --out analysis

Each verb has its own --help. Any value of a config can be overridden: --trainer.max_epochs 5, --data.batch_size 32.
"""
_LIGHTNING_VERBS = ("fit", "validate", "test", "predict")


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: Arguments without the program's name; ``sys.argv`` if None.

    Raises:
        SystemExit: With status 0 after ``--help``, 2 if the arguments are wrong, and 1 with one line on the standard error if
            the run fails over something that the user can change. Set ``LIT_COMPRESS_TRACEBACK=1`` to see where.
    """
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        print(_HELP, end="")
        raise SystemExit(0 if args else 2)
    if args[0] == "--version":
        from lit_compress import __version__

        print(__version__)
        return
    if args[0] not in (*_LIGHTNING_VERBS, "analyze"):
        print(
            f"lit-compress: unknown verb {args[0]!r}; it is one of {', '.join((*_LIGHTNING_VERBS, 'analyze'))}", file=sys.stderr
        )
        raise SystemExit(2)
    # Only now: importing torch takes seconds, and --help should not.
    from lightning_fabric.utilities.exceptions import MisconfigurationException

    try:
        if args[0] == "analyze":
            _analyze(args[1:])
        else:
            _lightning_cli(args)
    except (ValueError, MisconfigurationException, FileNotFoundError) as error:
        if os.environ.get("LIT_COMPRESS_TRACEBACK"):
            raise
        print(f"lit-compress: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(1) from error


def _lightning_cli(args: Sequence[str], *, run: bool = True) -> Any:
    from pytorch_lightning import LightningDataModule, LightningModule
    from pytorch_lightning.cli import LightningCLI

    with warnings.catch_warnings():
        # The verb was taken off the shell's arguments, so that others are given; Lightning takes that for a mistake.
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
        return LightningCLI(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
            run=run,
            args=list(args),
        )


def _analyze(args: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="lit-compress analyze",
        description="Print what a cut would do to each layer; write recipe.json, layers.txt and pictures. Nothing is changed.",
        epilog="Options of the config can be overridden as for fit: --data.batch_size 32.",
    )
    parser.add_argument("--config", required=True, help="YAML file with trainer, model and data, as for fit")
    parser.add_argument("--ckpt", help="checkpoint to analyse; the untrained network without it")
    parser.add_argument("--out", type=Path, default=Path("analysis"), help="folder for what is written (default: analysis)")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--energy", type=float, help="share of response energy to keep")
    target.add_argument("--keep_params", type=float, help="share of the parameters to keep")
    target.add_argument("--keep_mult_adds", type=float, help="share of the mult-adds to keep")
    options, overrides = parser.parse_known_args(args)

    from tqdm.auto import tqdm

    from lit_compress.analysis import analyze
    from lit_compress.callbacks import PFAPruning, PruningCallback
    from lit_compress.callbacks.steps import silent_step
    from lit_compress.checkpoint import load_pruned
    from lit_compress.pictures import plot_spectra, plot_widths

    cli = _lightning_cli(["--config", options.config, *overrides], run=False)
    model = cli.model if options.ckpt is None else load_pruned(cli.model, options.ckpt)
    model.trainer = cli.trainer
    data = cli.datamodule
    data.prepare_data()
    data.setup("fit")
    loader = (data.analysis_dataloader if hasattr(data, "analysis_dataloader") else data.train_dataloader)()
    given = {name: value for name in ("energy", "keep_params", "keep_mult_adds") if (value := getattr(options, name)) is not None}
    configured = [callback for callback in cli.trainer.callbacks if isinstance(callback, PruningCallback)]
    pruning = configured[0] if configured else PFAPruning()
    if given:  # another target; which layers, and how, is still for the config to say
        how = ("include", "exclude", "min_width", "round_to", "skips", "max_samples")
        pruning = PFAPruning(**given, **{name: getattr(pruning, name) for name in how})
    analysis = analyze(
        model,
        loader,
        forward_fn=silent_step,
        max_samples=pruning.max_samples,
        skips=pruning.skips,
        progress=lambda batches, total: tqdm(batches, total=total, desc="Analysis", leave=False),
    )
    recipe = pruning.choose(analysis)
    table = analysis.preview(recipe)
    print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    recipe.save(options.out / "recipe.json")
    (options.out / "layers.txt").write_text(f"{table}\n", encoding="utf-8")
    widths = {name: len(layer.classes) for name, layer in analysis.graph.layers.items()}
    kept = {name: recipe.widths.get(name, widths[name]) for name in analysis.spectra}
    plot_spectra({name: found.spectrum for name, found in analysis.spectra.items()}, kept).savefig(
        options.out / "spectra.png", dpi=120
    )
    plot_widths(widths, recipe.widths).savefig(options.out / "widths.png", dpi=120)
    print(f"Written to {options.out}: recipe.json, layers.txt, spectra.png, widths.png")
