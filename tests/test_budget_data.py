"""Rotated digits and buoys: against pixels moved by hand, a made-up file whose answer is known, and the real ones."""

from datetime import date, timedelta

import numpy as np
import pytest
import torch
from pytorch_lightning import Trainer
from scipy import ndimage
from torch import nn

from lit_compress.budget import BudgetSplit
from lit_compress.datamodules import DigitsDataModule, MNISTDataModule, RotatedMNISTDataModule, TAODataModule
from lit_compress.datamodules.rotated_mnist import rotate
from lit_compress.datamodules.tao import _longest_run, read_buoys, synthetic_buoys
from lit_compress.modules import LitFeatureGatherer


def rotated(**arguments):
    return RotatedMNISTDataModule(**{"source": DigitsDataModule(), **arguments})


# --- rotated digits


@pytest.mark.parametrize("degrees", [0, 30, 135, 271])
def test_images_turn_as_scipy_turns_them(degrees):
    image = ndimage.gaussian_filter(np.random.default_rng(0).random((28, 28)), 2)
    expected = ndimage.rotate(image, degrees, reshape=False, order=1)
    ours = rotate(torch.from_numpy(image).reshape(1, 1, 28, 28), torch.tensor([np.deg2rad(degrees)]))[0, 0].numpy()
    # scipy blacks out a border pixel that lies half outside, we blend it.
    y, x = np.mgrid[:28, :28] - 13.5
    inside = np.hypot(x, y) < 13
    np.testing.assert_allclose(ours[inside], expected[inside], atol=1e-6)


def test_every_image_of_a_set_is_turned_by_its_angle():
    data = rotated(bins=4, sparsity=0.0, batch_size=40, observations=3)
    sources = [image.numpy() for image, _ in data.source.analysis_dataloader().dataset]
    known = {np.rot90(image[0], turns).round(4).tobytes(): turns for image in sources for turns in range(4)}
    images, bins = next(iter(data.train_dataloader()))
    assert images.shape == (40, 10, 3, 1, 8, 8)
    assert set(bins.tolist()) == {0, 1, 2, 3}
    for sample, turns in zip(images, bins.tolist(), strict=True):
        for image in sample.flatten(0, 1)[:, 0].numpy():
            assert known[image.round(4).tobytes()] == turns


def test_images_of_a_context_are_of_its_class():
    data = rotated(sparsity=0.0, bins=2, batch_size=200)
    images, bins = next(iter(data.train_dataloader()))
    upright = images[bins == 0]
    for context in range(10):
        mine = {image.numpy().tobytes() for image, label in data.source.analysis_dataloader().dataset if label == context}
        assert {image.numpy().tobytes() for image in upright[:, context].flatten(0, 1)} <= mine


def test_images_are_black_as_often_as_said():
    sparsity = torch.linspace(0, 0.9, 10)
    data = rotated(sparsity=sparsity.tolist(), observations=10, batch_size=300)
    images, _ = next(iter(data.train_dataloader()))
    black = (images.flatten(3) == 0).all(3).float().mean((0, 2))
    torch.testing.assert_close(black, sparsity, atol=0.03, rtol=0)  # 3000 images each: .009, three of these


def test_evaluation_repeats_itself_and_training_does_not():
    data = rotated(batch_size=16, test_size=40, val_size=20)
    first, again = ([batch[0] for batch in data.test_dataloader()] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert [len(batch) for batch in first] == [16, 16, 8]
    assert first[0].shape[2] == 16
    assert not torch.equal(next(iter(data.val_dataloader()))[0], first[0][:, :, :4])
    one, two = (next(iter(data.train_dataloader()))[0] for _ in range(2))
    assert not torch.equal(one, two)
    torch.manual_seed(3)
    one = next(iter(data.train_dataloader()))[0]
    torch.manual_seed(3)
    assert torch.equal(next(iter(data.train_dataloader()))[0], one)
    assert not torch.equal(next(iter(rotated(batch_size=16, seed=1).test_dataloader()))[0], first[0])


def test_images_are_shrunk_before_they_turn():
    images, _ = next(iter(rotated(side=4).train_dataloader()))
    assert images.shape[-2:] == (4, 4)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"sparsity": 1.0}, r"one number in \[0, 1\) or 10 of them but got 1.0"),
        ({"sparsity": [0.5, 0.5]}, r"or 10 of them but got \[0.5, 0.5\]"),
        ({"observations": 0}, "`observations` must be at least 1 but got 0"),
        ({"bins": 1}, "`bins` must be at least 2 but got 1"),
    ],
)
def test_rotated_digits_say_what_is_wrong(arguments, text):
    with pytest.raises(ValueError, match=text):
        rotated(**arguments)


def test_validation_may_be_left_out():
    assert rotated(val_size=0).val_dataloader() == []
    with pytest.raises(ValueError, match="holds out nothing to validate on"):
        rotated(source=DigitsDataModule(val_fraction=0)).val_dataloader()


def test_real_mnist_is_turned(data_dir):
    data = RotatedMNISTDataModule(source=MNISTDataModule(data_dir("MNIST")), side=14, batch_size=2)
    images, bins = next(iter(data.test_dataloader()))
    assert images.shape == (2, 10, 16, 1, 14, 14)
    assert 0 <= int(bins.min()) <= int(bins.max()) < 256


# --- buoys


def write_buoys(file, buoys):
    """A file in UCI's layout. A buoy is a position and the days, from 1 January 1990, on which it has a record."""
    lines = []
    for number, ((north, east), days) in enumerate(buoys):
        for day in days:
            when = date(1990, 1, 1) + timedelta(int(day))
            drift = 0.1 * (day % 3 - 1)
            cells = [
                number,
                when.year - 1900,
                when.month,
                when.day,
                when.strftime("%y%m%d"),
                f"{north + drift:.2f}",
                f"{east:.2f}",
            ]
            lines.append(" ".join(map(str, [*cells, number, day, "." if day % 2 else 80, 27.5, 28])))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n")


def test_buoys_are_clustered_and_the_longest_common_run_is_found(tmp_path):
    file = tmp_path / "tao" / "tao-all2.dat"
    write_buoys(
        file,
        [
            ((0, -110), range(0, 1600)),  # the one with most days
            ((5, 165), [*range(0, 700), *range(710, 1500)]),  # run of 790 with the first
            ((2, 180), range(0, 650)),  # shorter
            ((-5, -155.5), range(600, 1400)),  # 690 with both, and 800 with the first alone: chosen second
            ((8, -95), range(0, 40)),  # too few days to be a buoy
        ],
    )
    records = read_buoys(file, count=3)
    np.testing.assert_allclose(records.positions, [(0, 250), (-5, 204.5), (5, 165)], atol=0.01)
    assert records.values.shape == (690, 3, 5)
    # Columns as written: number of the buoy, day, humidity on even days, temperatures.
    np.testing.assert_array_equal(records.values[:, :, 0], np.tile([0, 3, 1], (690, 1)))
    np.testing.assert_array_equal(records.values[:, 2, 1], np.arange(710, 1400))
    np.testing.assert_array_equal(np.isnan(records.values[:, 0, 2]), np.arange(710, 1400) % 2 == 1)


def test_the_longest_run_is_found():
    assert _longest_run(np.array([True, False, True, True, False, True])) == (2, 4)
    assert _longest_run(np.zeros(3, dtype=bool)) == (0, 0)
    assert _longest_run(np.ones(3, dtype=bool)) == (0, 3)


def test_days_are_standardised_by_training_and_split_in_time():
    data = TAODataModule(target=4, synthetic=True, readings=500)
    raw = synthetic_buoys(0).values
    days = len(raw)
    parts = [data._days(part).tensors for part in ("train", "val", "test")]
    assert [len(targets) for _, targets, _ in parts] == [0.7 * days, 0.1 * days, 0.2 * days]
    train = raw[: int(0.8 * days) - int(0.1 * days)]
    standard = (raw - np.nanmean(train, 0)) / np.nanstd(train, 0)
    np.testing.assert_allclose(torch.cat([targets for _, targets, _ in parts]), standard[:, 4], rtol=1e-5, atol=1e-5)
    others = np.delete(standard, 4, axis=1)
    readings, _, missing = parts[0]
    np.testing.assert_allclose(readings[:, :, 0], np.nan_to_num(others[: len(train)]), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(missing, np.isnan(others[: len(train)]).reshape(len(train), -1))
    readings, _, _ = parts[2]
    noise = readings - torch.from_numpy(np.nan_to_num(others[-len(readings) :])).float().unsqueeze(2)
    assert noise.mean(2).abs().max() < 0.25  # 1 / √500 = .045, over 7,200 means
    assert noise.var() == pytest.approx(1, abs=0.01)


def test_near_buoys_are_alike():
    values = np.nan_to_num(synthetic_buoys(0).values)[:, :, 0]
    agreement = np.corrcoef(values.T)
    assert agreement[3, 4] > agreement[3, 0] + 0.2


def test_names_are_places():
    data = TAODataModule(target=1, synthetic=True)
    assert data.context_names == ("0N110W", "2S110W", "8N165E", "5N165E", "2N165E", "2S165E", "9N140W", "5S140W", "0N125W")
    assert data.target_name == "5S110W"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"target": 10}, "one of the ten buoys, 0 to 9, but got 10"),
        ({"readings": 0}, "at least 1 but got 0 and 64"),
        ({"val_fraction": 0.8}, "must leave days to train on.*0.8 and 0.2"),
    ],
)
def test_buoys_say_what_is_wrong(arguments, text):
    with pytest.raises(ValueError, match=text):
        TAODataModule(synthetic=True, **arguments)


def test_a_missing_file_names_the_ways_out(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tao-all2.dat is missing.*`data_dir`.*LIT_COMPRESS_DATA.*`synthetic=True`"):
        TAODataModule(data_dir=tmp_path).setup("fit")


def test_ten_real_buoys_have_three_years_in_common(data_dir):
    data = TAODataModule(data_dir=data_dir("tao"))
    assert data._records.values.shape == (1120, 10, 5)
    assert np.isnan(data._records.values).mean() == pytest.approx(0.128, abs=0.001)
    assert len(set(data.context_names)) == 9


def test_a_buoy_is_told_from_the_others_within_a_budget():
    data = TAODataModule(target=3, synthetic=True)
    module = LitFeatureGatherer(
        BudgetSplit(data.context_names, total=18.0), nn.Linear(90, 5), features=5, loss="squared_error", variance=1.0,
        optimizer=lambda groups: torch.optim.Adam(groups, lr=0.01), budget_speed=3.0,
    )  # fmt: skip
    trainer = Trainer(max_epochs=30, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(module, data)
    (results,) = trainer.test(module, data, verbose=False)
    _, targets, _ = data._days("test").tensors
    assert results["test/loss"] < 0.85 * targets.square().nanmean()  # of predicting the mean
    shares = dict(zip(data.context_names, module.budget.shares().tolist(), strict=True))
    nearest = max(shares, key=shares.get)
    assert nearest in ("5N165E", "2N165E"), shares
