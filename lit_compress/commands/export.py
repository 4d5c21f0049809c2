"""``lit-compress export``: write the network of a checkpoint for deployment."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lit_compress.checkpoint import load_pruned
from lit_compress.commands.lightning import configured, example_batch
from lit_compress.export import export
from lit_compress.graph import evaluating
from lit_compress.report import count_parameters, measure_latency


def main(args: Sequence[str]) -> None:
    """Write a checkpoint's network, check it, and time it beside the network before any cut."""
    parser = argparse.ArgumentParser(
        prog="lit-compress export",
        description="Write the network of a checkpoint, as its `forward` runs it, for any batch size, and time it.",
        epilog="Options of the config can be overridden as for fit: --data.batch_size 32.",
    )
    parser.add_argument("--config", required=True, help="YAML file with trainer, model and data that the checkpoint is of")
    parser.add_argument("--ckpt", required=True, help="checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--format", choices=("onnx", "torch-export"), default="onnx")
    parser.add_argument("--verify", action="store_true", help="compare what was written with the network, to 1e-4")
    parser.add_argument("--batch_size", type=int, default=1, help="batch size of the latencies (default: 1)")
    options, overrides = parser.parse_known_args(args)
    if options.batch_size < 1:
        raise ValueError(f"Argument `--batch_size` must be at least 1 but got {options.batch_size}.")
    cli = configured(options.config, overrides)
    batch = example_batch(cli.datamodule)
    example = batch[0] if isinstance(batch, (tuple, list)) else batch
    if not isinstance(example, Tensor):
        raise ValueError(
            f"The batches of {type(cli.datamodule).__name__} begin with no tensor: use "
            "`lit_compress.export.export(model, inputs, path)`."
        )
    uncut = copy.deepcopy(cli.model)
    model = load_pruned(cli.model, options.ckpt)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    run = export(model, example, options.out, form=options.format, verify=options.verify)
    samples = example[:1].expand(options.batch_size, *example.shape[1:]).contiguous()
    table = Table(title=f"One forward of {options.batch_size} sample(s) on the CPU, {torch.get_num_threads()} thread(s)")
    for column in ("", "parameters", "median (quartiles)"):
        table.add_column(column, justify="left" if column == "" else "right")
    for name, network in (("before any cut", uncut), ("the checkpoint's", model)):
        with evaluating(network):
            table.add_row(name, f"{count_parameters(network):,}", str(measure_latency(lambda n=network: n(samples))))  # type: ignore[misc]
    table.add_row(f"{options.out.name}", f"{count_parameters(model):,}", str(measure_latency(lambda: run(samples))))
    Console().print(table)
    print(f"{'Compared with the network and w' if options.verify else 'W'}ritten to {options.out}")
