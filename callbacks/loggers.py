"""What each logger of a Trainer can take: all take numbers, some pictures, tables and files; everything else is on disk."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from pytorch_lightning import Trainer
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_warn

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

    All ranks must make one, since the Trainer makes them agree on the folder. Where a logger or the disk fails, a warning says so
    and training goes on: a run is worth more than what it tells.

    Args:
        trainer: The running Trainer; what is logged is logged at its ``global_step``.

    Attributes:
        open: Whether there is anybody to tell: only on rank 0, and not in a ``fast_dev_run``. Otherwise, nothing may be told.
        folder: ``compress/`` in the logger's folder, or in the Trainer's root folder.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.open = trainer.is_global_zero and not is_dev_run(trainer)
        if not is_dev_run(trainer):
            self.folder = Path(trainer.log_dir or trainer.default_root_dir) / "compress"
        if self.open:
            with _or_warn(f"the folder {self.folder}"):
                self.folder.mkdir(parents=True, exist_ok=True)

    def values(self, values: Mapping[str, float]) -> None:
        """Log numbers."""
        for logger in self._trainer.loggers:
            with _or_warn(type(logger).__name__):
                logger.log_metrics(dict(values), step=self.step)

    def write(self, file: str, save: Callable[[Path], object]) -> None:
        """Write a file in the folder, by a function that takes its path."""
        with _or_warn(file):
            save(self.folder / file)

    def figure(self, name: str, figure: Figure, file: str) -> None:
        """Log a picture, and write it to ``<file>.png``."""
        self.write(f"{file}.png", lambda path: figure.savefig(path, dpi=120))
        for logger in self._trainer.loggers:
            with _or_warn(type(logger).__name__):
                if isinstance(logger, WandbLogger):
                    logger.log_image(key=name, images=[figure], step=self.step)
                elif isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_figure(name, figure, global_step=self.step, close=False)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], file: str | None = None) -> None:
        """Log a table of numbers and strings, and write it to ``<file>.csv`` if a name is given."""
        if file is not None:
            self.write(f"{file}.csv", lambda path: _write_csv(path, [columns, *rows]))
        for logger in self._trainer.loggers:
            with _or_warn(type(logger).__name__):
                if isinstance(logger, WandbLogger):
                    logger.log_table(name, columns=list(columns), data=[list(row) for row in rows], step=self.step)
                elif isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_text(name, _markdown(columns, rows), global_step=self.step)

    def recipe(self, recipe: Recipe, metadata: Mapping[str, Any]) -> None:
        """Log a recipe as an artifact of type ``"recipe"`` (one of the run, with a version a cut), and write ``recipe.json``.

        Args:
            recipe: All cuts so far.
            metadata: What the artifact says besides.
        """
        file = self.folder / "recipe.json"
        self.write(file.name, recipe.save)
        for logger in self._trainer.loggers:
            with _or_warn(type(logger).__name__):
                self._log_recipe(logger, recipe, file, metadata)

    def alert(self, title: str, text: str) -> None:
        """Warn, and let Weights & Biases send its message to whoever has asked for alerts there."""
        rank_zero_warn(text)
        for logger in self._trainer.loggers:
            if isinstance(logger, WandbLogger):
                with _or_warn(type(logger).__name__):
                    logger.experiment.alert(title=title, text=text)

    def _log_recipe(self, logger: Logger, recipe: Recipe, file: Path, metadata: Mapping[str, Any]) -> None:
        if isinstance(logger, WandbLogger):
            import wandb

            run = logger.experiment
            artifact = wandb.Artifact(f"recipe-{run.id}", type="recipe", description=recipe.method, metadata=dict(metadata))
            artifact.add_file(str(file))
            run.log_artifact(artifact)
        elif isinstance(logger, TensorBoardLogger):
            # An indented block is code in Markdown.
            text = "\n".join(f"    {line}" for line in file.read_text(encoding="utf-8").splitlines())
            logger.experiment.add_text("compress/recipe", text, global_step=self.step)

    @property
    def step(self) -> int:
        """Optimizer steps so far."""
        return self._trainer.global_step


@contextmanager
def _or_warn(where: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever a logger may raise
        rank_zero_warn(f"What a cut did cannot be told to {where}, and training goes on: {type(error).__name__}: {error}")


def _write_csv(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows(rows)


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
