"""A data module whose training samples bring along what the teacher gives for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pytorch_lightning import LightningDataModule
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader
from typing_extensions import override

from lit_compress.callbacks.progress import progress_of
from lit_compress.modules import LitDistiller
from lit_compress.ranks import as_one, rank, share
from lit_compress.teacher_cache import SamplesWithReadings, SeededSamples, TeacherCache


class TeacherCacheDataModule(LightningDataModule):
    """Wrap a data module so that the teacher of a :class:`~lit_compress.modules.LitDistiller` runs once, not in every epoch.

    When ``fit`` begins, the teacher runs over the training data, and what the distiller's losses read of it (outputs, layers,
    mean and covariance under dropout) is kept in ``cache_dir``. Training batches are then ``(inputs, labels, readings)``. Another
    run with the same teacher, losses and data finds the cache and does not run the teacher at all. A run that is interrupted
    while it fills the cache goes on where it stopped. Under DDP, the processes share the work and the files.

    The student sees *the same* augmented inputs as the teacher did: each sample has a fixed number of ``variants``, whose
    augmentation follows from ``seed``, and one of them is drawn each time. With one variant the augmentation is, in effect, done
    once and for all. The teacher is read in full precision, whatever that of the Trainer.

    The cache holds every number that is read: a reading of 64 floats takes 13 MB for CIFAR-10's 50,000 images and one variant,
    its covariance 820 MB, a feature map of 32×16×16 floats 1.6 GB.

    Args:
        data: The data module. Its training loader must have a data set with a length, of samples ``(inputs, label)``.
        cache_dir: Folder of the cache, which all processes can reach.
        variants: Augmentations of each sample. More are more of the augmentation that a run without cache has, and take as many
            times the disk.
        seed: Of the augmentation.

    Raises:
        ValueError: If a number is out of range. Once training begins: if the module is no distiller, the loader cannot be
            wrapped, or the cache is stale, which says whether teacher, readings or data have changed.

    Example:
        >>> from lit_compress.datamodules import DigitsDataModule
        >>> data = TeacherCacheDataModule(DigitsDataModule(), cache_dir="cache")
        >>> len(data.val_dataloader().dataset)
        180
    """

    def __init__(self, data: LightningDataModule, cache_dir: str | Path, variants: int = 1, seed: int = 0) -> None:
        super().__init__()
        for name, number, least in [("variants", variants, 1), ("seed", seed, 0)]:
            if number < least:
                raise ValueError(f"Argument `{name}` must be at least {least} but got {number}.")
        self.data, self.cache_dir, self.variants, self.seed = data, Path(cache_dir), variants, seed
        self._cache: TeacherCache | None = None

    @override
    def prepare_data(self) -> None:
        self.data.prepare_data()

    @override
    def setup(self, stage: str) -> None:
        """Set up the data; for ``"fit"``, also find or fill the cache."""
        self.data.trainer = self.trainer
        self.data.setup(stage)
        if stage != "fit":
            return
        if self.trainer is None or not isinstance(self.trainer.lightning_module, LitDistiller):
            raise ValueError("A teacher cache belongs to a Trainer that fits a `LitDistiller`, whose teacher it caches.")
        teacher = self.trainer.lightning_module.teacher
        samples = SeededSamples(self._train_loader().dataset, self.variants, self.seed)
        with as_one():
            if rank() == 0:  # makes the files
                TeacherCache(self.cache_dir, teacher, samples)
            share(None)
            self._cache = TeacherCache(self.cache_dir, teacher, samples)
        self._cache.fill(teacher, self.trainer.strategy.root_device, progress_of(self.trainer, "Teacher cache"))

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        loader = self._train_loader()
        if self._cache is None:
            raise ValueError("The teacher cache is filled in `setup('fit')`, which a Trainer calls.")
        return DataLoader(
            SamplesWithReadings(self._cache),
            batch_size=loader.batch_size,
            sampler=loader.sampler,
            num_workers=loader.num_workers,
            drop_last=loader.drop_last,
            pin_memory=loader.pin_memory,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            persistent_workers=loader.persistent_workers,
        )

    @override
    def val_dataloader(self) -> Any:
        return self.data.val_dataloader() if is_overridden("val_dataloader", self.data) else []

    @override
    def test_dataloader(self) -> Any:
        return self.data.test_dataloader()

    @override
    def predict_dataloader(self) -> Any:
        return self.data.predict_dataloader()

    @override
    def teardown(self, stage: str) -> None:
        self.data.teardown(stage)

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.data.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.data.load_state_dict(state_dict)

    def analysis_dataloader(self) -> Any:
        """What the wrapped module analyses, or its training data."""
        return getattr(self.data, "analysis_dataloader", self.data.train_dataloader)()

    def _train_loader(self) -> DataLoader[Any]:
        loader = self.data.train_dataloader()
        if not isinstance(loader, DataLoader) or loader.batch_size is None:
            raise ValueError(
                f"The training data must be one DataLoader of samples in batches to be cached, but `train_dataloader` gives "
                f"a {type(loader).__name__}{' without a batch size' if isinstance(loader, DataLoader) else ''}."
            )
        return loader
