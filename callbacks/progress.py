"""A progress bar for the analysis pass, in the style of the Trainer's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import RichProgressBar, TQDMProgressBar
from tqdm.auto import tqdm

from lit_compress.statistics.gather import Progress


def progress_of(trainer: Trainer, description: str = "Analysis") -> Progress | None:
    """What shows the progress of a pass where the Trainer shows its own; None where it shows none."""
    bar = trainer.progress_bar_callback
    if not isinstance(bar, (RichProgressBar, TQDMProgressBar)) or bar.is_disabled:
        return None
    if isinstance(bar, RichProgressBar):

        def rich(batches: Iterable[Any], total: int | None) -> Iterator[Any]:
            if bar.progress is None:
                yield from batches
                return
            task = bar._add_task(float("inf") if total is None else total, description)
            try:
                for batch in batches:
                    yield batch
                    bar.progress.update(task, advance=1)
                    bar.refresh()
            finally:
                bar.progress.update(task, visible=False)

        return rich
    return lambda batches, total: tqdm(batches, desc=description, total=total, leave=False, dynamic_ncols=True)
