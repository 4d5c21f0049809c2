"""Lightning's command line, as all verbs use it: a config becomes a trainer, a module and its data."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from typing import Any

from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from typing_extensions import override

from lit_compress.statistics.gather import first_samples


def lightning_cli(args: Sequence[str], *, run: bool = True) -> Any:
    """Lightning's command line.

    Args:
        args: Arguments, with the verb first if ``run``.
        run: Whether to run the verb, or only to build trainer, module and datamodule.

    Returns:
        The :class:`~pytorch_lightning.cli.LightningCLI`.
    """
    with warnings.catch_warnings():
        # The verb was taken off the shell's arguments, so that others are given; Lightning takes that for a mistake.
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
        return (LightningCLI if run else _Builder)(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
            run=run,
            args=list(args),
        )


class _Builder(LightningCLI):
    """Builds trainer, module and datamodule, and takes the config that a run wrote down, with what that says of its verb."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        built = {"self", "model", "train_dataloaders", "val_dataloaders", "datamodule"}
        for name in inspect.signature(Trainer.fit).parameters.keys() - built:
            parser.add_argument(f"--{name}", type=Any, default=None, help="of `fit`; it is of no use here")


def configured(config: str, overrides: Sequence[str]) -> Any:
    """Trainer, module and datamodule of a config, ready to give batches.

    Returns:
        The command line that built them: ``trainer``, ``model``, ``datamodule``.
    """
    cli = lightning_cli(["--config", config, *overrides], run=False)
    cli.model.trainer = cli.trainer
    cli.datamodule.prepare_data()
    cli.datamodule.setup("fit")
    return cli


def analysis_loader(data: Any) -> Any:
    """What a datamodule offers for an analysis: its ``analysis_dataloader``, or else its training data."""
    return (data.analysis_dataloader if hasattr(data, "analysis_dataloader") else data.train_dataloader)()


def example_batch(data: Any) -> Any:
    """A batch of one or two samples.

    Raises:
        ValueError: If the datamodule gives no batch.
    """
    batch = next(iter(analysis_loader(data)), None)
    if batch is None:
        raise ValueError(f"{type(data).__name__} gives no batch.")
    return first_samples(batch)
