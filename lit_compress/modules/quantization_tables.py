"""The LightningModule that learns JPEG quantisation tables from a folder of images."""

from collections.abc import Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from PIL import Image
from pytorch_lightning import LightningModule
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor
from typing_extensions import override

from lit_compress.budget.jpeg import JPEGTables, Subsampling, decoded_jpeg, encode_jpeg, psnr
from lit_compress.budget.planes import ImagePatches, Planes
from lit_compress.budget.sizes import FileSizes
from lit_compress.budget.table_learner import TableLearner, TableLoss, TableNoise


@runtime_checkable
class _Pictures(Protocol):
    """What the module needs of a datamodule, e.g. of ``ImagePatchDataModule``."""

    subsampling: Subsampling

    def pictures(self, part: str) -> list[Image.Image]: ...
    def patches(self, part: str) -> ImagePatches: ...


class LitQuantizationTables(LightningModule):
    """Learn the quantisation tables of JPEG from patches, for a size of the files.

    After every epoch the total of the budget is searched so that the training images' real files have the size; the tables of
    that moment are in the checkpoint. A short training does: 400 batches of 128 patches of 16 pixels.

    Batch: as of :class:`~lit_compress.datamodules.ImagePatchDataModule`, which the Trainer needs to be given.
    Logs, each epoch: ``train/loss``, ``val/loss``, ``test/loss`` (squared units of the scale of 0 to 255, or the perceptual
    loss), ``train/bits`` (bits per pixel of the training images' real files), and ``val/bits``, ``val/psnr``, ``test/bits``,
    ``test/psnr`` (bits per pixel and mean decibels of the real files).

    Args:
        bits: Size of the files in bits per pixel, over all training images together.
        colour: Whether the images have chroma.
        subsampling: Of chroma, as of the data.
        loss: ``"squared_error"``, ``"mlp"``, ``"ms_ssim"``, or a function from decoded and original pixels to a scalar; see
            :class:`~lit_compress.budget.table_learner.TableLearner`.
        noise: ``"measured"``, or ``"normal"`` as the source has it.
        optimizer: From parameters to an optimizer. By default Adam.
        lr: Learning rate of the decoder, which ``"mlp"`` has.
        budget_speed: Learning rate of the split, relative to that.

    Raises:
        ValueError: If an argument is unknown, or no table reaches the size; then the range is named.
        MisconfigurationException: If the Trainer has no datamodule with images, or its subsampling is another.

    Source: *Resource-Efficient Feature Gathering at Test Time*, section 3.3.3.

    Example:
        >>> module = LitQuantizationTables(bits=1.0, loss="ms_ssim")
        >>> len(module.tables().luma)
        64
    """

    def __init__(
        self,
        bits: float,
        colour: bool = True,
        subsampling: Subsampling = "4:2:0",
        loss: TableLoss = "squared_error",
        noise: TableNoise = "measured",
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr: float = 2e-3,
        budget_speed: float = 25.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["optimizer", *([] if isinstance(loss, str) else ["loss"])])
        self.bits = bits
        self.subsampling: Subsampling = subsampling
        self.learner = TableLearner(colour, subsampling, loss, noise)
        self.optimizer = optimizer
        self.lr = lr
        self.budget_speed = budget_speed
        self._measured = False

    def tables(self) -> JPEGTables:
        """The tables as they are learnt so far."""
        return self.learner.tables()

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.learner.parameter_groups(self.lr, self.budget_speed))

    @override
    def on_fit_start(self) -> None:
        data = self._data()
        self._sizes = FileSizes(data.pictures("train"), self.subsampling)
        if not self._measured:
            step = self._sizes.flat_step(self.bits)
            self.learner.measure(data.patches("train").planes)
            self.learner.to(self.device).start_from(step)
            self._meet()
            self._measured = True

    @override
    def training_step(self, batch: Planes, batch_idx: int) -> Tensor:
        return self._loss(batch, "train")

    @override
    def on_train_epoch_end(self) -> None:
        self._meet()
        self.log("train/bits", self._sizes.of(self.tables()))

    @override
    def validation_step(self, batch: Planes, batch_idx: int) -> None:
        self._loss(batch, "val")

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_files("val")

    @override
    def test_step(self, batch: Planes, batch_idx: int) -> None:
        self._loss(batch, "test")

    @override
    def on_test_epoch_end(self) -> None:
        self._log_files("test")

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["quantization_tables"] = {"measured": self._measured}

    @override
    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        self._measured = checkpoint["quantization_tables"]["measured"]

    def _loss(self, batch: Planes, part: str) -> Tensor:
        loss: Tensor = self.learner(tuple(batch))
        self.log(f"{part}/loss", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(batch[0]))
        return loss

    def _meet(self) -> None:
        self.learner.total.fill_(self._sizes.meet(self.bits, self.learner.tables))

    def _log_files(self, part: Literal["val", "test"]) -> None:
        pictures, tables = self._data().pictures(part), self.tables()
        self.log(f"{part}/bits", FileSizes(pictures, self.subsampling).of(tables))
        decibels = [psnr(picture, decoded_jpeg(encode_jpeg(picture, tables, self.subsampling))) for picture in pictures]
        self.log(f"{part}/psnr", float(np.mean(decibels)))

    def _data(self) -> _Pictures:
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, _Pictures):
            raise MisconfigurationException(
                "LitQuantizationTables measures real files, so the Trainer needs a datamodule with `pictures(part)` and "
                f"`patches(part)`, such as ImagePatchDataModule, but has {type(data).__name__}."
            )
        if data.subsampling != self.subsampling:
            raise MisconfigurationException(
                f"The module's `subsampling` is {self.subsampling} and the data's {data.subsampling}; set both alike."
            )
        return data
