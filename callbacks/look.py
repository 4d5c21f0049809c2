"""An analysis of the network in the middle of a run, which changes nothing."""

from __future__ import annotations

from pytorch_lightning import LightningModule, Trainer

from lit_compress import rng
from lit_compress.analysis import Analysis, analyze
from lit_compress.callbacks.loaders import Choice, analysis_batches
from lit_compress.callbacks.ranks import buffers_of_first
from lit_compress.callbacks.steps import silent_step, validating
from lit_compress.rankings import Method
from lit_compress.ranks import as_one
from lit_compress.spectra import PFA
from lit_compress.statistics.gather import Progress, first_samples


def look(
    trainer: Trainer,
    pl_module: LightningModule,
    choice: Choice = None,
    max_samples: int | None = None,
    method: Method | None = None,
    progress: Progress | None = None,
) -> Analysis:
    """What a method finds out about the network as it is now; all ranks look together.

    Args:
        trainer: The running Trainer.
        pl_module: Its module.
        choice: The data, as the argument ``loader`` of :class:`~lit_compress.callbacks.PruningCallback`.
        max_samples: Use this many samples, drawn at random with a fixed seed. None for all.
        method: What the statistics are for, by default PFA.
        progress: Wraps the loader in a progress bar.

    Raises:
        MisconfigurationException: If there are no data for the analysis.
    """
    with as_one(), rng.isolated(), validating(trainer), buffers_of_first(trainer, pl_module):
        loader = analysis_batches(trainer, pl_module, choice, max_samples)
        return analyze(
            pl_module,
            loader,
            method=method or PFA(),
            example_inputs=first_samples(loader.example()),
            forward_fn=silent_step,
            max_samples=max_samples,
            progress=progress,
        )
