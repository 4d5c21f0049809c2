"""What each logger of a Trainer can take: all take numbers, some pictures, tables and files; everything else is on disk."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from pytorch_lightning import Trainer
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger

from lit_compress.callbacks.steps import is_dev_run
from lit_compress.recipe import Recipe


class Outlets:
    """All loggers of a Trainer, and a folder on disk: whatever is told goes to each that can take it.

    ======================  =======  ========  ======  ========
    ..                      numbers  pictures  tables  recipe
    ======================  =======  ========  ======  ========
    Weights & Biases        yes      yes       yes     artifact
    TensorBoard             yes      yes       text    text
    any other logger        yes      no        no      no
    on disk                 no       PNG       CSV     JSON
    ======================  =======  ========  ======  ========

    All ranks must make one, since the Trainer makes them agree on the folder.

    Args:
        trainer: The running Trainer; what is logged is logged at its ``global_step``.

    Attributes:
        open: Whether there is anybody to tell: only on rank 0, and not in a ``fast_dev_run``. Otherwise, nothing may be told.
        folder: ``lit_compress/`` in the logger's folder, or in the Trainer's root folder.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.open = trainer.is_global_zero and not is_dev_run(trainer)
        if not is_dev_run(trainer):
            self.folder = Path(trainer.log_dir or trainer.default_root_dir) / "lit_compress"
        if self.open:
            self.folder.mkdir(parents=True, exist_ok=True)

    def values(self, values: Mapping[str, float]) -> None:
        """Log numbers."""
        for logger in self._loggers:
            logger.log_metrics(dict(values), step=self._step)

    def figure(self, name: str, figure: Figure, file: str) -> None:
        """Log a picture, and write it to ``<file>.png``."""
        figure.savefig(self.folder / f"{file}.png", dpi=120)
        for logger in self._loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image(key=name, images=[figure], step=self._step)
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure(name, figure, global_step=self._step, close=False)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], file: str | None = None) -> None:
        """Log a table of numbers and strings, and write it to ``<file>.csv`` if a name is given."""
        if file is not None:
            with open(self.folder / f"{file}.csv", "w", encoding="utf-8", newline="") as stream:
                csv.writer(stream).writerows([columns, *rows])
        for logger in self._loggers:
            if isinstance(logger, WandbLogger):
                logger.log_table(name, columns=list(columns), data=[list(row) for row in rows], step=self._step)
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text(name, _markdown(columns, rows), global_step=self._step)

    def recipe(self, recipe: Recipe, metadata: Mapping[str, Any]) -> None:
        """Log a recipe as an artifact of type ``"recipe"`` (one of the run, with a version a cut), and write ``recipe.json``.

        Args:
            recipe: All cuts so far.
            metadata: What the artifact says besides.
        """
        file = self.folder / "recipe.json"
        recipe.save(file)
        for logger in self._loggers:
            if isinstance(logger, WandbLogger):
                import wandb

                run = logger.experiment
                artifact = wandb.Artifact(f"recipe-{run.id}", type="recipe", description=recipe.method, metadata=dict(metadata))
                artifact.add_file(str(file))
                run.log_artifact(artifact)
            elif isinstance(logger, TensorBoardLogger):
                # An indented block is code in Markdown.
                lines = file.read_text(encoding="utf-8").splitlines()
                text = "\n".join(f"    {line}" for line in lines)
                logger.experiment.add_text("compress/recipe", text, global_step=self._step)

    @property
    def _loggers(self) -> list[Logger]:
        return self._trainer.loggers

    @property
    def _step(self) -> int:
        return self._trainer.global_step


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
