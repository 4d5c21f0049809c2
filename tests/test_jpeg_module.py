"""Tables learnt in a Trainer from a folder: the data, the sizes of real files, checkpoints, and what is refused."""

import numpy as np
import pytest
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from PIL import Image
from pytorch_lightning import Trainer
from torch.utils.data import DataLoader

from lit_compress.budget.jpeg import encode_jpeg
from lit_compress.budget.planes import image_planes
from lit_compress.cli import main
from lit_compress.datamodules import ImagePatchDataModule
from lit_compress.modules import LitQuantizationTables


@pytest.fixture
def folder(tmp_path):
    """Eight photographs of smooth waves and noise, two of them in a folder below."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[:64, :96]
    (tmp_path / "photographs" / "more").mkdir(parents=True)
    for index in range(8):
        planes = [128 + 80 * np.sin(x / (5 + index) + c) * np.cos(y / 9) + generator.normal(0, 6, x.shape) for c in range(3)]
        name = "more/" * (index < 2) + f"{index}.png"
        Image.fromarray(np.stack(planes, axis=2).clip(0, 255).astype(np.uint8)).save(tmp_path / "photographs" / name)
    (tmp_path / "photographs" / "notes.txt").write_text("no image")
    return tmp_path / "photographs"


def trainer(tmp_path, epochs=3, **settings):
    return Trainer(
        default_root_dir=tmp_path, max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, **settings,
    )  # fmt: skip


def size_of(data, part, tables, subsampling="4:2:0"):
    pictures = data.pictures(part)
    return 8 * sum(len(encode_jpeg(each, tables, subsampling)) for each in pictures) / (64 * 96 * len(pictures))


# --- the data


def test_every_image_is_in_one_part(folder):
    data = ImagePatchDataModule(folder, val_fraction=0.25, test_fraction=0.25)
    parts = [[picture.tobytes() for picture in data.pictures(part)] for part in ("train", "val", "test")]
    assert [len(part) for part in parts] == [4, 2, 2]
    assert len({picture for part in parts for picture in part}) == 8
    again = ImagePatchDataModule(folder, val_fraction=0.25, test_fraction=0.25)
    assert [picture.tobytes() for picture in again.pictures("test")] == parts[2]


@pytest.mark.parametrize(
    ("colour", "subsampling", "shapes"),
    [
        (False, "4:2:0", [(1, 8, 8)]),
        (True, "4:4:4", [(1, 8, 8), (2, 8, 8)]),
        (True, "4:2:2", [(1, 16, 16), (2, 16, 8)]),
        (True, "4:2:0", [(1, 16, 16), (2, 8, 8)]),
    ],
)
def test_patches_hold_whole_blocks_and_cover_the_images(folder, colour, subsampling, shapes):
    data = ImagePatchDataModule(folder, colour=colour, subsampling=subsampling, batch_size=10_000)
    ((*planes,),) = data.train_dataloader()
    side = shapes[0][1]
    assert [tuple(plane.shape[1:]) for plane in planes] == shapes
    assert len(planes[0]) == 8 * (64 // side) * (96 // side)
    means = torch.stack([image_planes(picture, subsampling)[0].float().mean() for picture in data.pictures("train")])
    torch.testing.assert_close(planes[0].float().mean(), means.mean())


def test_data_say_what_is_wrong(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty holds no image; choose a folder that does by `data_dir`"):
        ImagePatchDataModule(tmp_path / "empty").setup("fit")
    with pytest.raises(ValueError, match=r"must leave images to train on, but are 0\.5 and 0\.5"):
        ImagePatchDataModule(folder, val_fraction=0.5, test_fraction=0.5)
    with pytest.raises(ValueError, match="`batch_size` must be at least 1 but got 0"):
        ImagePatchDataModule(folder, batch_size=0)
    with pytest.raises(ValueError, match="multiple of 16 with 4:2:0 here but got 8"):
        ImagePatchDataModule(folder, side=8).train_dataloader()
    Image.new("L", (64, 64)).save(folder / "grey.png")
    with pytest.raises(ValueError, match=r"grey.png is grey, but images in colour are wanted; .* set `colour` to False"):
        ImagePatchDataModule(folder).train_dataloader()
    assert len(ImagePatchDataModule(folder, colour=False).pictures("train")) == 9
    (folder / "broken.png").write_text("no image")
    with pytest.raises(ValueError, match=r"broken\.png is not an image"):
        ImagePatchDataModule(folder, colour=False).train_dataloader()


# --- the training


@pytest.mark.parametrize("name", ["jpeg_photographs", "jpeg_similarity"])
def test_the_configs_train_on_a_folder(root, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for index in range(4):
        blurred = np.cumsum(np.cumsum(generator.normal(size=(192, 192, 3)), axis=0), axis=1)
        Image.fromarray((128 + 40 * blurred / blurred.std()).clip(0, 255).astype(np.uint8)).save(f"images/{index}.png")
    arguments = ["--config", str(root / "configs" / f"{name}.yaml"), "--data.data_dir", "images", "--trainer.max_epochs", "1"]
    main(["fit", *arguments])
    (checkpoint,) = (tmp_path / "lit_compress_runs").rglob("*.ckpt")
    assert len(set(LitQuantizationTables.load_from_checkpoint(checkpoint, weights_only=True).tables().luma)) > 4


@pytest.mark.parametrize("arguments", [{}, {"loss": "mlp"}, {"noise": "normal", "loss": "mlp"}], ids=str)
def test_files_have_the_size_after_every_epoch_and_the_loss_falls(folder, tmp_path, arguments):
    data = ImagePatchDataModule(folder, batch_size=32, val_fraction=0.25)
    module = LitQuantizationTables(bits=2.0, **arguments)
    fit = trainer(tmp_path, enable_checkpointing=False)
    fit.fit(module, data)
    bits = float(fit.callback_metrics["train/bits"])
    assert bits == pytest.approx(2.0, rel=0.03)
    assert bits == pytest.approx(size_of(data, "train", module.tables()))
    assert torch.isfinite(fit.callback_metrics["val/loss"])
    assert len(set(module.tables().luma)) > 4


def test_the_test_measures_real_files(folder, tmp_path):
    data = ImagePatchDataModule(folder, test_fraction=0.25)
    module = LitQuantizationTables(bits=2.0)
    fit = trainer(tmp_path, epochs=1, enable_checkpointing=False)
    fit.fit(module, data)
    (results,) = fit.test(module, data, verbose=False)
    assert results["test/bits"] == pytest.approx(size_of(data, "test", module.tables()))
    decibels = []
    for number, picture in enumerate(data.pictures("test")):
        file = tmp_path / f"{number}.jpg"
        file.write_bytes(encode_jpeg(picture, module.tables()))
        with Image.open(file) as decoded:
            error = np.square(np.asarray(decoded, dtype=float) - np.asarray(picture, dtype=float)).mean()
        decibels.append(10 * np.log10(255**2 / error))
    assert results["test/psnr"] == pytest.approx(np.mean(decibels), rel=1e-5)


def test_a_checkpoint_holds_the_tables_and_a_resumed_training_goes_on(folder, tmp_path):
    data = ImagePatchDataModule(folder, batch_size=32)
    module = LitQuantizationTables(bits=2.0, loss="mlp")
    fit = trainer(tmp_path, epochs=2)
    fit.fit(module, data)
    checkpoint = fit.checkpoint_callback.best_model_path
    loaded = LitQuantizationTables.load_from_checkpoint(checkpoint, weights_only=True)
    assert loaded.tables() == module.tables()

    resumed = LitQuantizationTables(bits=2.0, loss="mlp")
    fit = trainer(tmp_path, epochs=2, enable_checkpointing=False)
    fit.fit(resumed, data, ckpt_path=checkpoint)  # nothing is left to do, and nothing is measured anew
    assert resumed.tables() == module.tables()


def test_grey_images_have_no_chroma(folder, tmp_path):
    data = ImagePatchDataModule(folder, colour=False)
    module = LitQuantizationTables(bits=2.0, colour=False)
    trainer(tmp_path, epochs=1, enable_checkpointing=False).fit(module, data)
    assert module.tables().chroma == module.tables().luma
    with pytest.raises(ValueError, match="The images are in colour, but the tables are made for images that are grey"):
        trainer(tmp_path, epochs=1).fit(LitQuantizationTables(bits=2.0, colour=False), ImagePatchDataModule(folder))


def test_a_training_that_cannot_be_is_refused_at_the_start(folder, tmp_path):
    data = ImagePatchDataModule(folder)
    with pytest.raises(ValueError, match=r"reach from .* to .* bits per pixel here, but 50 were asked for"):
        trainer(tmp_path).fit(LitQuantizationTables(bits=50), data)
    with pytest.raises(MisconfigurationException, match="`subsampling` is 4:4:4 and the data's 4:2:0"):
        trainer(tmp_path).fit(LitQuantizationTables(bits=2, subsampling="4:4:4"), data)
    with pytest.raises(MisconfigurationException, match=r"needs a datamodule with `pictures\(part\)`"):
        trainer(tmp_path).fit(LitQuantizationTables(bits=2), DataLoader(data.patches("train")))
