"""What a cut did: measured, logged, written to disk, and told at the end of the run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

from pytorch_lightning import Trainer
from pytorch_lightning.__version__ import version as lightning_version
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from lit_compress.analysis import Analysis
from lit_compress.callbacks.loggers import Outlets
from lit_compress.environment import environment
from lit_compress.pictures import plot_widths
from lit_compress.recipe import Recipe, single_methods
from lit_compress.report import Latency


@dataclass(frozen=True)
class Measurement:
    """A network at one moment of a run.

    Args:
        parameters: Trainable parameters.
        mult_adds: Mult-adds of convolutions and linear layers, one sample.
        memory: Bytes of weights and buffers.
        latency: A validation step on one batch of the analysis data.
        metrics: What the module logs on its validation data.
    """

    parameters: int
    mult_adds: int
    memory: int
    latency: Latency
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class CutReport:
    """One cut of a run.

    Args:
        epoch: The epoch before which it was made.
        step: Optimizer steps until then.
        recipe: All cuts so far, relative to the network as it was built.
        before: Right before this cut.
        after: Right after it, with no training between.
        ratios: ``R_n`` and ``R_w`` after it, as :meth:`Analysis.ratios <lit_compress.Analysis.ratios>` gives them.
        time_share: Time of a step right after it as a share of that right before, both measured in turns, the median over these.
        batch_size: Batch size of the latencies.
    """

    epoch: int
    step: int
    recipe: Recipe
    before: Measurement
    after: Measurement
    ratios: Mapping[str, float]
    time_share: float
    batch_size: int

    def publish(self, trainer: Trainer, analysis: Analysis, recipe: Recipe, index: int) -> None:
        """Log the cut with every logger of the Trainer, and write recipe, table and pictures to disk.

        Logged: ``compress/parameters``, ``compress/mult_adds`` (one sample), ``compress/latency_ms``, ``compress/R_n`` and
        ``compress/R_w`` (what is left of the layers' outputs and weights), ``compress/width/<layer>`` (output channels),
        ``compress/before_cut/<metric>`` and ``compress/after_cut/<metric>``, and what the method has to say in numbers; where the
        logger takes them, the picture ``compress/widths`` and the method's own (of PFA, ``compress/spectra``), and the table
        ``compress/layers``.

        Args:
            trainer: The running Trainer.
            analysis: What the recipe was chosen from.
            recipe: This cut, relative to the network before it, with every layer that lost channels.
            index: Number of the cut, in the names of the files.
        """
        outlets = Outlets(trainer)
        if not outlets.open:
            return
        before = {name: len(layer.classes) for name, layer in analysis.graph.layers.items()}
        widths = before | recipe.widths
        values: dict[str, float] = {
            "compress/parameters": self.after.parameters,
            "compress/mult_adds": self.after.mult_adds,
            "compress/latency_ms": self.after.latency.median,
        }
        values |= {f"compress/{name}": value for name, value in self.ratios.items()}
        values |= {f"compress/width/{name}": width for name, width in widths.items()}
        values |= {f"compress/before_cut/{name}": value for name, value in self.before.metrics.items()}
        values |= {f"compress/after_cut/{name}": value for name, value in self.after.metrics.items()}
        values |= {f"compress/{name}": value for name, value in analysis.method.values(analysis.rankings).items()}
        figures = {**analysis.figures(recipe), "widths": plot_widths(before, recipe.widths)}
        table = analysis.preview(recipe)
        outlets.values(values)
        for name, figure in figures.items():
            outlets.figure(f"compress/{name}", figure, f"cut_{index}_{name}")
        outlets.table("compress/layers", *table.cells(), f"cut_{index}_layers")
        outlets.write(f"cut_{index}_layers.txt", lambda path: path.write_text(str(table), encoding="utf-8"))
        outlets.write("recipe.json", self.recipe.save)

    def finish(self, trainer: Trainer, reports: Sequence[CutReport], final: Mapping[str, float]) -> None:
        """Log and print what the run gained: before the first of these cuts, after this last one, and after fine-tuning."""
        outlets = Outlets(trainer)
        if not outlets.open:
            return
        outlets.values({f"compress/fine_tuned/{name}": value for name, value in final.items()})
        console = Console()
        console.print(self._table(reports, final))
        console.print(f"Recipe, tables and pictures: {escape(str(outlets.folder))}", soft_wrap=True)

    def _table(self, reports: Sequence[CutReport], final: Mapping[str, float]) -> Table:
        first = reports[0].before
        table = Table(title=escape(f"{self.recipe.method}, before epoch {self.epoch}"))
        for column in ("", "before", "after the cut", "fine-tuned", "kept"):
            table.add_column(column, justify="left" if column == "" else "right")
        for name, value in first.metrics.items():
            after, tuned = self.after.metrics.get(name), final.get(name)
            table.add_row(escape(name), *("" if number is None else f"{number:.4f}" for number in (value, after, tuned)), "")
        for name, old, new in (
            ("parameters", first.parameters, self.after.parameters),
            ("mult-adds", first.mult_adds, self.after.mult_adds),
        ):
            table.add_row(name, f"{old:,}", f"{new:,}", f"{new:,}", f"{new / max(old, 1):.1%}")
        for name, what in (("R_n", "layer outputs"), ("R_w", "weights")):
            table.add_row(f"{what} ({name})", "", "", "", f"{self.ratios[name]:.1%}")
        time_share = prod(report.time_share for report in reports)
        table.add_row(f"step, batch {self.batch_size}", str(first.latency), str(self.after.latency), "", f"{time_share:.1%}")
        return table

    def to_dict(self) -> dict[str, Any]:
        """Builtin types only, for a checkpoint."""
        fields = {
            "epoch": self.epoch,
            "step": self.step,
            "batch_size": self.batch_size,
            "time_share": self.time_share,
            "recipe": self.recipe.to_dict(),
            "ratios": dict(self.ratios),
        }
        return fields | {"before": asdict(self.before), "after": asdict(self.after)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CutReport:
        """Inverse of :meth:`to_dict`."""

        def moment(name: str) -> Measurement:
            return Measurement(**{**data[name], "latency": Latency(**data[name]["latency"])})

        return cls(
            epoch=data["epoch"],
            step=data["step"],
            recipe=Recipe.from_dict(data["recipe"]),
            before=moment("before"),
            after=moment("after"),
            ratios=dict(data["ratios"]),
            time_share=data["time_share"],
            batch_size=data["batch_size"],
        )


def write_summary(trainer: Trainer, reports: Sequence[CutReport], fine_tuned: Mapping[str, float] | None = None) -> None:
    """Write ``summary.json``: what all cuts of a run together did, cut by cut, and where the run took place.

    ``lit-compress report`` makes a page of it. It is written at each cut, so that an interrupted run has it as well.

    Args:
        trainer: The running Trainer.
        reports: The cuts that the network has, in their order.
        fine_tuned: What the module logs on its validation data at the end of the run; None before it.
    """
    outlets = Outlets(trainer)
    if not outlets.open:
        return
    summary: dict[str, Any] = {"network": _name(trainer.lightning_module)}
    if reports:
        last = reports[-1]
        summary |= {
            "method": last.recipe.method, "before": asdict(reports[0].before), "after_cut": asdict(last.after),
            "batch_size": last.batch_size, "ratios": dict(last.ratios),
        }  # fmt: skip
    if fine_tuned is not None:
        summary["fine_tuned"] = dict(fine_tuned)
    summary["cuts"] = [
        {**report.to_dict(), "recipe": single_methods(report.recipe.method)[-1], "widths": report.recipe.widths}
        for report in reports
    ]
    summary["environment"] = {
        **environment(trainer.strategy.root_device),
        "pytorch-lightning": lightning_version,
        "precision": str(trainer.precision),
        "strategy": f"{type(trainer.strategy).__name__}, {trainer.world_size} process(es)",
    }
    outlets.write("summary.json", lambda path: path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8"))


def _name(module: nn.Module) -> str:
    """A module's class, and those of the parts that hold its weights."""
    parts = [
        f"{name}: {type(part).__name__}" for name, part in module.named_children() if next(part.parameters(), None) is not None
    ]
    return type(module).__name__ + (f" ({', '.join(parts)})" if parts else "")
