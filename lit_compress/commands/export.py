"""``lit-compress export``: write the network of a checkpoint for deployment."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from lit_compress.checkpoint import load_pruned
from lit_compress.commands.lightning import analysis_loader, configured, example_batch
from lit_compress.export import Runner, export
from lit_compress.graph import evaluating
from lit_compress.quantization import quantize_onnx
from lit_compress.report import count_parameters, measure_latency

_CALIBRATION = 256  # samples, at least, that the ranges of activations are measured on


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
    parser.add_argument(
        "--int8", action="store_true", help="also write the ONNX file quantised, beside it, and tell what that adds to the cut"
    )
    options, overrides = parser.parse_known_args(args)
    if options.int8 and options.format != "onnx":
        raise ValueError(f"`--int8` quantises ONNX files, but `--format` is {options.format}.")
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
    if options.int8:
        _quantise(model, cli.datamodule, options.out, run, samples)


def _quantise(model: LightningModule, data: Any, path: Path, run: Runner, samples: Tensor) -> None:
    """Write the quantised file, and compare both files on the validation data."""
    quantised = path.with_suffix(f".int8{path.suffix}")
    files = {path: run, quantised: quantize_onnx(path, quantised, _some_inputs(data))}
    metrics = {file: _validated(model, data, one) for file, one in files.items()}
    table = Table(title="Validation data, by ONNX Runtime")
    table.add_column("")
    for column in ("KiB", "median (quartiles)", *metrics[path]):
        table.add_column(escape(column), justify="right")
    for file, one in files.items():
        numbers = [f"{value:.4f}" for value in metrics[file].values()]
        latency = measure_latency(lambda one=one: one(samples))  # type: ignore[misc]
        table.add_row(escape(file.name), f"{file.stat().st_size / 1024:,.1f}", str(latency), *numbers)
    changes = [f"{metrics[quantised][name] - value:+.4f}" for name, value in metrics[path].items()]
    table.add_row("int8 adds", f"{(quantised.stat().st_size - path.stat().st_size) / 1024:+,.1f}", "", *changes)
    Console().print(table)
    print(f"Written to {quantised}")


def _some_inputs(data: Any) -> Iterator[Tensor]:
    seen = 0
    for batch in analysis_loader(data):
        if seen >= _CALIBRATION:
            return
        inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
        seen += len(inputs)
        yield inputs


def _validated(model: LightningModule, data: Any, run: Runner) -> dict[str, float]:
    """What a module logs in validation when a file takes the place of its ``forward``.

    Raises:
        ValueError: If its ``validation_step`` does not run so, or never calls the module.
    """
    calls = 0

    def forward(*inputs: Tensor) -> Any:
        nonlocal calls
        calls += 1
        outputs = run(*inputs)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(accelerator="cpu", devices=1, **quiet)  # type: ignore[arg-type]
    vars(model)["forward"] = forward
    try:
        (metrics,) = trainer.validate(model, datamodule=data, verbose=False)
    except Exception as error:  # whatever a user's step may raise
        raise ValueError(
            f"Validation of {type(model).__name__} fails with the file in place of its `forward`: {error}"
        ) from error
    finally:
        del vars(model)["forward"]
    if not calls:
        raise ValueError(
            f"The `validation_step` of {type(model).__name__} never calls the module itself, so that no file can take its place: "
            "let it use `self(inputs)`."
        )
    return {name: float(value) for name, value in metrics.items()}
