"""``lit-compress analyze``: what a cut would do."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from lit_compress.analysis import analyze
from lit_compress.callbacks import PFAPruning, PruningCallback
from lit_compress.callbacks.steps import silent_step, step_stopwatch
from lit_compress.checkpoint import load_pruned
from lit_compress.commands.lightning import analysis_loader, configured
from lit_compress.pictures import plot_widths


def main(args: Sequence[str]) -> None:
    """Print what a cut would do to each layer, and write recipe, table and pictures."""
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
    target.add_argument("--keep_latency", type=float, help="share of a step's time to keep, at the config's batch size")
    options, overrides = parser.parse_known_args(args)

    cli = configured(options.config, overrides)
    model = cli.model if options.ckpt is None else load_pruned(cli.model, options.ckpt)
    targets = ("energy", "keep_params", "keep_mult_adds", "keep_latency")
    given = {name: value for name in targets if (value := getattr(options, name)) is not None}
    callbacks = [callback for callback in cli.trainer.callbacks if isinstance(callback, PruningCallback)]
    pruning = callbacks[0] if callbacks else PFAPruning()
    if given:  # another target; which layers, and how, is still for the config to say
        how = ["include", "exclude", "min_width", "round_to", "skips", "max_samples"]
        how += ["select"] if isinstance(pruning, PFAPruning) else []
        pruning = PFAPruning(**given, **{name: getattr(pruning, name) for name in how})
    loader = analysis_loader(cli.datamodule)
    analysis = analyze(
        model,
        loader,
        method=pruning.method,
        forward_fn=silent_step,
        max_samples=pruning.max_samples,
        skips=pruning.skips,
        progress=lambda batches, total: tqdm(batches, total=total, desc="Analysis", leave=False),
        stopwatch=step_stopwatch(cli.trainer, model, next(iter(loader))),
    )
    recipe = pruning.choose(analysis)
    table = analysis.preview(recipe)
    print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    recipe.save(options.out / "recipe.json")
    (options.out / "layers.txt").write_text(f"{table}\n", encoding="utf-8")
    widths = {name: len(layer.classes) for name, layer in analysis.graph.layers.items()}
    figures = {**analysis.figures(recipe), "widths": plot_widths(widths, recipe.widths)}
    for name, figure in figures.items():
        figure.savefig(options.out / f"{name}.png", dpi=120)
    print(f"Written to {options.out}: {', '.join(['recipe.json', 'layers.txt', *(f'{name}.png' for name in figures)])}")
