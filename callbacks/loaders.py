"""The data that an analysis sees inside a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from lit_compress.callbacks.steps import is_dev_run, transfer
from lit_compress.ranks import rank, share, world_size
from lit_compress.statistics.gather import batch_size, in_order

_RANDOM = ("Random", "Augment", "AugMix", "Jitter")  # in the names of torchvision's transforms
Choice = Literal["train", "val"] | DataLoader[Any] | Iterable[Any] | None


def analysis_batches(trainer: Trainer, pl_module: LightningModule, choice: Choice, max_samples: int | None) -> AnalysisBatches:
    """Batches for an analysis, on the module's device: in a fixed order, each sample once where the loader allows it.

    Several ranks share them out.

    Args:
        trainer: The running Trainer. In a ``fast_dev_run``, only as many batches as its widest layer needs to have a spectrum.
        pl_module: Its module.
        choice: As the argument ``loader`` of :class:`~lit_compress.callbacks.PruningCallback`.
        max_samples: Use this many samples, drawn at random with a fixed seed. None for all.

    Raises:
        MisconfigurationException: If the Trainer has no such data, or several loaders of it.
    """
    loader = _offered(trainer, pl_module) if choice is None else choice
    if loader is None or isinstance(loader, str):
        loader = _trainers_own(trainer, loader or "train")
    if (augmentation := _augmentation(loader)) is not None:
        rank_zero_warn(
            f"The analysis reads data that are augmented at random ({augmentation}). Give the module or datamodule a method "
            "`analysis_dataloader()` that returns them as they are, or pass `loader`."
        )
    whole = in_order(loader, max_samples=max_samples)
    mine = in_order(loader, max_samples=max_samples, rank=rank(), world_size=world_size())
    if world_size() > 1 and mine is loader:
        rank_zero_warn(
            "The analysis cannot share out its data among the processes: the loader has a sampler of its own, or is no plain "
            "DataLoader. Each process reads what the loader gives it, so that samples may be counted several times."
        )
    return AnalysisBatches(mine, whole, trainer, pl_module)


def refuse_several(trainer: Trainer, pl_module: LightningModule, choice: Choice) -> None:
    """Refuse a Trainer that has no loader of its own for an analysis, or several, before it trains.

    Raises:
        MisconfigurationException: If the analysis is to read the Trainer's data and that is so.
    """
    if isinstance(choice, str) or (choice is None and not _offers(trainer, pl_module)):
        _trainers_own(trainer, choice or "train")


class AnalysisBatches:
    """This rank's batches of a loader, moved to the module's device by its own transfer hooks.

    Args:
        loader: What this rank reads, possibly nothing.
        whole: What all read together.
        trainer: The running Trainer.
        pl_module: Its module.
    """

    def __init__(self, loader: Any, whole: Any, trainer: Trainer, pl_module: LightningModule) -> None:
        self._loader, self._whole, self._trainer, self._pl_module = loader, whole, trainer, pl_module

    def example(self) -> Any:
        """The first batch of the whole, the same on every rank where the loader allows it.

        Raises:
            MisconfigurationException: If no rank has one.
        """
        batch = next(iter(self._whole), None)
        found = share(batch is not None)
        if any(found) and not all(found):  # a stream that gives this rank nothing
            source = found.index(True)
            given = share(batch if rank() == source else None)[source]
            batch = given if batch is None else batch
        if batch is None:
            raise MisconfigurationException("The analysis needs data, but its loader gave no batch.")
        return transfer(self._trainer, self._pl_module, batch)

    def __iter__(self) -> Iterator[Any]:
        seen, enough = 0, max(len(parameter) for parameter in self._pl_module.parameters() if parameter.ndim)
        for batch in self._loader:
            yield transfer(self._trainer, self._pl_module, batch)
            seen += batch_size(batch)
            if is_dev_run(self._trainer) and seen >= enough:
                return

    def __len__(self) -> int:
        return len(self._loader)


def _offered(trainer: Trainer, pl_module: LightningModule) -> Any:
    """What the module or the datamodule offers for an analysis, or None."""
    return next((offer() for offer in _offers(trainer, pl_module)), None)


def _offers(trainer: Trainer, pl_module: LightningModule) -> list[Callable[[], Any]]:
    sources = (pl_module, getattr(trainer, "datamodule", None))
    return [offer for source in sources if callable(offer := getattr(source, "analysis_dataloader", None))]


def _trainers_own(trainer: Trainer, split: str) -> Any:
    if split == "val":
        loop = trainer.fit_loop.epoch_loop.val_loop
        loop.setup_data()
        combined = loop._combined_loader
    else:
        combined = trainer.fit_loop._combined_loader
    loaders = [] if combined is None else combined.flattened
    if len(loaders) != 1:
        raise MisconfigurationException(
            f"The analysis needs one {split} loader but the Trainer has {len(loaders)}. Pass `loader=`, or give the module or "
            "datamodule a method `analysis_dataloader()`."
        )
    return loaders[0]


def _augmentation(loader: Any) -> str | None:
    """A random transform of the loader's data set, if there seems to be one."""
    datasets = [getattr(loader, "dataset", None)]
    for dataset in datasets:
        for name in ("transform", "transforms"):
            written = repr(getattr(dataset, name, None))
            if any(word in written for word in _RANDOM):
                return " ".join(written.split())[:100]
        # Subsets and concatenations hold what they are made from.
        inner = [getattr(dataset, "dataset", None), *getattr(dataset, "datasets", ())]
        datasets += [one for one in inner if one is not None]
    return None
