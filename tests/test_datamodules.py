"""Data modules: embedded digits fully, a fake CIFAR-100 in the original layout, real sets where they are to be had."""

from collections import Counter

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from pytorch_lightning import Callback, Trainer
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from lit_compress.datamodules import CIFAR10DataModule, CIFAR100DataModule, DigitsDataModule, ImageNetDataModule, MNISTDataModule
from lit_compress.datamodules.images_in_memory import ImagesInMemory, pad_crop_flip
from lit_compress.models import LeNet300100
from lit_compress.modules import LitClassifier
from tests.images import write_cifar, write_folders


def gathered(loader):
    """All images and labels of one pass."""
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def fingerprints(images):
    return [image.numpy().tobytes() for image in images]


# --- digits


def test_the_three_splits_of_the_digits_share_out_all_of_them():
    digits = DigitsDataModule()
    splits = [digits.analysis_dataloader(), digits.val_dataloader(), digits.test_dataloader()]
    assert [len(split.dataset) for split in splits] == [1258, 180, 359]
    expected = torch.from_numpy(load_digits().images / 16).float().unsqueeze(1)
    shared_out = torch.cat([gathered(split)[0] for split in splits])
    assert shared_out.dtype == torch.float32
    assert Counter(fingerprints(shared_out)) == Counter(fingerprints(expected))


def test_digits_keep_their_labels():
    reference = load_digits()
    truth = dict(zip(fingerprints(torch.from_numpy(reference.images / 16).float()), reference.target, strict=True))
    images, labels = gathered(DigitsDataModule().test_dataloader())
    assert [truth[key] for key in fingerprints(images)] == labels.tolist()


def test_every_split_of_the_digits_has_its_share_of_each():
    digits = DigitsDataModule(val_fraction=0.2)
    whole = np.bincount(load_digits().target)
    for loader in (digits.analysis_dataloader(), digits.val_dataloader(), digits.test_dataloader()):
        _, labels = gathered(loader)
        share = len(labels) / 1797
        assert np.abs(labels.bincount().numpy() - share * whole).max() <= 1.5  # whole images, twice rounded


def test_splits_follow_the_seed_alone():
    torch.manual_seed(1)
    first, _ = gathered(DigitsDataModule(seed=5).analysis_dataloader())
    torch.manual_seed(2)
    again, _ = gathered(DigitsDataModule(seed=5).analysis_dataloader())
    other, _ = gathered(DigitsDataModule(seed=6).analysis_dataloader())
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_training_order_follows_the_global_rng_alone():
    digits = DigitsDataModule(seed=5)
    torch.manual_seed(1)
    first, _ = gathered(digits.train_dataloader())
    state = torch.get_rng_state()
    second, _ = gathered(digits.train_dataloader())
    torch.manual_seed(1)
    assert torch.equal(gathered(DigitsDataModule(seed=5).train_dataloader())[0], first)
    torch.set_rng_state(state)
    assert torch.equal(gathered(digits.train_dataloader())[0], second)
    assert not torch.equal(first, second)
    assert Counter(fingerprints(first)) == Counter(fingerprints(second))


def test_analysis_sees_every_training_sample_in_one_order():
    digits = DigitsDataModule(batch_size=500, drop_last=True)
    torch.manual_seed(1)
    first, labels = gathered(digits.analysis_dataloader())
    trained, _ = gathered(digits.train_dataloader())
    again, again_labels = gathered(digits.analysis_dataloader())
    assert torch.equal(first, again)
    assert torch.equal(labels, again_labels)
    assert len(first) == 1258
    assert len(trained) == 1000
    assert set(fingerprints(trained)) <= set(fingerprints(first))


def test_workers_give_what_the_main_process_gives():
    alone, labels = gathered(DigitsDataModule(train_size=70, batch_size=32).analysis_dataloader())
    helped, helped_labels = gathered(DigitsDataModule(train_size=70, batch_size=32, num_workers=1).analysis_dataloader())
    assert torch.equal(alone, helped)
    assert torch.equal(labels, helped_labels)


def test_chosen_classes_are_numbered_in_the_order_given():
    digits = DigitsDataModule(classes=[8, 3])
    assert (digits.num_classes, digits.class_names) == (2, ("8", "3"))
    everything = DigitsDataModule()
    for loader, whole in [
        (digits.analysis_dataloader(), everything.analysis_dataloader()),
        (digits.val_dataloader(), everything.val_dataloader()),
        (digits.test_dataloader(), everything.test_dataloader()),
    ]:
        images, labels = gathered(loader)
        all_images, all_labels = gathered(whole)
        chosen = (all_labels == 8) | (all_labels == 3)
        assert torch.equal(images, all_images[chosen])
        assert torch.equal(labels, (all_labels[chosen] == 3).long())


def test_train_size_takes_the_first_of_the_analysis_order():
    whole, _ = gathered(DigitsDataModule().analysis_dataloader())
    few, _ = gathered(DigitsDataModule(train_size=100).analysis_dataloader())
    assert torch.equal(few, whole[:100])
    assert len(gathered(DigitsDataModule(train_size=100).train_dataloader())[0]) == 100
    assert len(gathered(DigitsDataModule(train_size=100).val_dataloader())[0]) == 180


def test_prediction_sees_the_test_images():
    digits = DigitsDataModule()
    assert torch.equal(gathered(digits.predict_dataloader())[0], gathered(digits.test_dataloader())[0])


def test_validation_can_be_left_out():
    digits = DigitsDataModule(val_fraction=0)
    assert digits.val_dataloader() == []
    assert len(gathered(digits.analysis_dataloader())[0]) == 1797 - 359


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"classes": [3, 10]}, r"`classes` holds 10; DigitsDataModule has classes 0 to 9"),
        ({"classes": [-1]}, r"`classes` holds -1"),
        ({"classes": [3, 3]}, r"none twice but got \[3, 3\]"),
        ({"classes": []}, r"at least one class and none twice but got \[\]"),
        ({"classes": "R1"}, r"`classes` must be a list of classes but got 'R1'"),
        ({"batch_size": 0}, r"`batch_size` must be at least 1 but got 0"),
        ({"num_workers": -1}, r"`num_workers` must be at least 0 but got -1"),
        ({"train_size": 0}, r"`train_size` must be at least 1 but got 0"),
        ({"seed": -1}, r"`seed` must be at least 0 but got -1"),
        ({"val_fraction": 0.001}, r"at least 10 of the 1797 .* but 0.001 and 0.2 give 2 for validation"),
        ({"test_fraction": 0.0}, r"at least 10 of the 1797 .* 0 for the test"),
        ({"val_fraction": 0.8}, r"at least 10 of the 1797 .* and 0 for training"),
        ({"val_fraction": -0.1}, r"give -180 for validation"),
    ],
)
def test_digits_say_what_is_wrong(arguments, text):
    with pytest.raises(ValueError, match=text):
        DigitsDataModule(**arguments)


def test_too_few_samples_are_an_error_once_the_data_are_read():
    with pytest.raises(ValueError, match=r"`train_size` asks for 1259 samples but DigitsDataModule has 1258 for training"):
        DigitsDataModule(train_size=1259).setup("fit")
    with pytest.raises(ValueError, match=r"a batch of 64 is never full: there are 50 .* or set `drop_last=False`"):
        DigitsDataModule(train_size=50, drop_last=True).train_dataloader()


# --- images in memory


def test_a_batch_fetched_at_once_is_its_samples_one_by_one():
    digits = DigitsDataModule(train_size=10)
    dataset = digits.analysis_dataloader().dataset
    images, labels = next(iter(DataLoader(dataset, batch_size=10)))
    assert torch.equal(images, torch.stack([dataset[index][0] for index in range(10)]))
    assert labels.tolist() == [dataset[index][1] for index in range(10)]


def test_one_label_an_image_is_demanded():
    with pytest.raises(ValueError, match=r"got 2 images and 3 labels"):
        ImagesInMemory(torch.zeros(2, 1, 1, 1, dtype=torch.uint8), torch.zeros(3).long(), white=1, mean=(0,), std=(1,))


def test_augmentation_is_a_crop_of_the_padded_image_mirrored_or_not():
    image = torch.randint(1, 256, (3, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    padded = v2.functional.pad(image, [4, 4, 4, 4])
    possible = {}
    for top in range(9):
        for left in range(9):
            crop = v2.functional.crop(padded, top, left, 6, 5)
            possible[crop.numpy().tobytes()] = (top, left, False)
            possible[v2.functional.horizontal_flip(crop).numpy().tobytes()] = (top, left, True)
    torch.manual_seed(4)
    augmented = pad_crop_flip(image.expand(4000, 3, 6, 5))
    assert augmented.dtype == torch.uint8
    seen = Counter(possible[key] for key in fingerprints(augmented))  # a KeyError would be an image that no crop gives
    mirrored = sum(count for (_, _, flipped), count in seen.items() if flipped)
    # 4000 draws: 81 · 2 outcomes of 24.7 each; mirrored 2000 ± 32
    assert len(seen) == 162
    assert 1840 < mirrored < 2160
    assert max(seen.values()) < 60


def test_augmentation_follows_the_global_rng():
    images = torch.rand(20, 3, 8, 8)
    torch.manual_seed(1)
    first, second = pad_crop_flip(images), pad_crop_flip(images)
    torch.manual_seed(1)
    assert torch.equal(pad_crop_flip(images), first)
    assert not torch.equal(first, second)


# --- files


@pytest.mark.parametrize(
    ("datamodule", "folder"),
    [(MNISTDataModule, "MNIST/raw"), (CIFAR10DataModule, "cifar-10-batches-py"), (CIFAR100DataModule, "cifar-100-python")],
)
def test_missing_data_name_the_folder_and_both_ways_out(datamodule, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(datamodule.dataset_class, "download", lambda self: pytest.fail("went to the network unasked"))
    data = datamodule(data_dir=tmp_path)
    data.prepare_data()
    with pytest.raises(FileNotFoundError) as missing:
        data.setup("fit")
    assert str(tmp_path / folder) in str(missing.value)
    assert all(way in str(missing.value) for way in ("`download=True`", "put its files there", "LIT_COMPRESS_DATA", "`data_dir`"))
    with pytest.raises(FileNotFoundError, match=r"download=True"):
        data.setup("test")


@pytest.mark.parametrize("stage", ["prepare_data", "setup"])
def test_data_are_downloaded_when_asked(stage, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", lambda self: asked.append(self.root))
    data = CIFAR10DataModule(data_dir=tmp_path, download=True)
    with pytest.raises(RuntimeError, match="not found or corrupted"):  # the stand-in fetches nothing
        data.prepare_data() if stage == "prepare_data" else data.setup("fit")
    assert [str(root) for root in asked] == [str(tmp_path)]


def test_data_lie_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_COMPRESS_DATA", str(tmp_path))
    assert MNISTDataModule().data_dir == tmp_path
    assert MNISTDataModule(data_dir="elsewhere").data_dir.name == "elsewhere"
    monkeypatch.delenv("LIT_COMPRESS_DATA")
    assert str(MNISTDataModule().data_dir) == "data"


# As printed in the paper's appendix A.
PAPER = {
    "R1": "aquarium_fish, butterfly, cloud, elephant, mountain, palm_tree, poppy, snail, squirrel, wardrobe",
    "R2": "baby, camel, cockroach, flatfish, mouse, pear, porcupine, snake, sunflower, whale",
    "S1": "bowl, snail",
    "S2": "aquarium_fish, boy",
    "S3": "bee, raccoon",
    "S4": "train, tulip",
}


@pytest.fixture
def fake_cifar100(tmp_path, monkeypatch):
    """The folder above a CIFAR-100 of six training and two test images a class, and its raw content."""
    raw = write_cifar(tmp_path, torchvision.datasets.CIFAR100, train=6, test=2)
    for name, value in raw["files"].items():
        monkeypatch.setattr(torchvision.datasets.CIFAR100, name, value)
    return tmp_path, raw


def test_cifar100_has_a_hundred_classes_in_alphabetical_order():
    names = CIFAR100DataModule.all_classes
    assert len(set(names)) == 100
    assert list(names) == sorted(names)
    assert (names[0], names[1], names[50], names[99]) == ("apple", "aquarium_fish", "mouse", "worm")


@pytest.mark.parametrize("subset", PAPER)
def test_cifar100_subsets_are_those_of_the_paper(subset, fake_cifar100):
    folder, raw = fake_cifar100
    data = CIFAR100DataModule(folder, classes=subset, val_size=100)
    names = PAPER[subset].split(", ")
    assert data.class_names == tuple(names)
    assert data.num_classes == len(names)
    # Ask the raw file which class each test image is of, and the paper which number that class has.
    tested = [CIFAR100DataModule.all_classes[fine] for fine in raw["test"]["fine_labels"]]
    expected = [names.index(name) for name in tested if name in names]
    images, labels = gathered(data.test_dataloader())
    assert labels.tolist() == expected
    assert len(images) == 2 * len(names)
    assert len(gathered(data.analysis_dataloader())[0]) == 5 * len(names)
    assert sorted(gathered(data.val_dataloader())[1].tolist()) == list(range(len(names)))


def test_a_subset_never_trains_on_what_the_whole_set_validated_on(fake_cifar100):
    folder, _ = fake_cifar100
    whole = CIFAR100DataModule(folder, val_size=200, seed=3)
    subset = CIFAR100DataModule(folder, val_size=200, seed=3, classes="R1")
    validated = set(fingerprints(gathered(whole.val_dataloader())[0]))
    assert len(validated) == 200
    assert not validated & set(fingerprints(gathered(subset.analysis_dataloader())[0]))
    assert set(fingerprints(gathered(subset.val_dataloader())[0])) <= validated


def test_cifar_pixels_are_standardised_and_stay_in_place(fake_cifar100):
    folder, raw = fake_cifar100
    images, labels = gathered(CIFAR100DataModule(folder, val_size=0).test_dataloader())
    assert labels.tolist() == raw["test"]["fine_labels"]
    # The file holds 1024 red, then 1024 green, then 1024 blue pixels, row by row.
    for channel, row, column, mean, std in [(0, 0, 31, 0.5071, 0.2009), (1, 7, 3, 0.4866, 0.1984), (2, 31, 0, 0.4409, 0.2023)]:
        pixel = raw["test"]["data"][:, 1024 * channel + 32 * row + column]
        np.testing.assert_allclose(images[:, channel, row, column].numpy(), (pixel / 255 - mean) / std, rtol=1e-5, atol=1e-6)


def test_augmentation_touches_training_alone(fake_cifar100):
    folder, _ = fake_cifar100
    plain, augmented = (CIFAR100DataModule(folder, val_size=100, augment=on) for on in (False, True))
    whole = set(fingerprints(gathered(plain.analysis_dataloader())[0]))
    assert set(fingerprints(gathered(plain.train_dataloader())[0])) == whole
    assert len(set(fingerprints(gathered(augmented.train_dataloader())[0])) - whole) > 450  # of 500; 1 in 162 stays in place
    assert set(fingerprints(gathered(augmented.analysis_dataloader())[0])) == whole
    for loader in ("val_dataloader", "test_dataloader"):
        assert torch.equal(gathered(getattr(plain, loader)())[0], gathered(getattr(augmented, loader)())[0])


def test_a_damaged_file_is_not_read(fake_cifar100):
    folder, _ = fake_cifar100
    file = folder / "cifar-100-python" / "train"
    file.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(FileNotFoundError, match=r"CIFAR100 is not, or not whole, in .*cifar-100-python"):
        CIFAR100DataModule(folder).setup("fit")


def test_a_validation_split_must_fit(fake_cifar100):
    folder, _ = fake_cifar100
    with pytest.raises(ValueError, match=r"none of the 600 samples, or from 100 \(one a class\) to 500, but was asked for 5000"):
        CIFAR100DataModule(folder).setup("fit")


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: CIFAR100DataModule(classes="R3"), r"one of \['R1', 'R2', 'S1', 'S2', 'S3', 'S4'\], or a list .* got 'R3'"),
        (lambda: CIFAR100DataModule(classes=["snail", "boat"]), r"holds 'boat'; CIFAR100DataModule has classes 0 to 99"),
        (lambda: CIFAR10DataModule(classes=["cat", 3]), r"none twice but got \['cat', 3\]"),
        (lambda: CIFAR10DataModule(classes="cat"), r"`classes` must be a list of classes but got 'cat'"),
        (lambda: MNISTDataModule(val_size=-1), r"`val_size` must be at least 0 but got -1"),
    ],
)
def test_files_say_what_is_wrong(build, text):
    with pytest.raises(ValueError, match=text):
        build()


def test_real_mnist_is_what_torchvision_reads(data_dir):
    place = data_dir("MNIST")
    data = MNISTDataModule(place)
    transform = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    reference = torchvision.datasets.MNIST(place, train=False, transform=transform)
    images, labels = gathered(data.test_dataloader())
    assert images.shape == (10_000, *MNISTDataModule.image_shape)
    assert torch.equal(labels, reference.targets)
    for index in (0, 1, 9_999):
        torch.testing.assert_close(images[index], reference[index][0].as_subclass(torch.Tensor))
    train, train_labels = gathered(data.analysis_dataloader())
    assert (len(train), len(data.val_dataloader().dataset)) == (55_000, 5_000)
    counts = torchvision.datasets.MNIST(place).targets.bincount()
    torch.testing.assert_close(train_labels.bincount(), counts * 11 // 12, rtol=0, atol=1)


def test_real_cifar10_is_what_torchvision_reads(data_dir):
    place = data_dir("cifar-10-batches-py")
    data = CIFAR10DataModule(place)
    standardise = v2.Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    transform = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), standardise])
    reference = torchvision.datasets.CIFAR10(place, train=False, transform=transform)
    images, labels = gathered(data.test_dataloader())
    assert list(data.class_names) == reference.classes
    assert images.shape == (10_000, *CIFAR10DataModule.image_shape)
    assert labels.tolist() == reference.targets
    for index in (0, 1, 9_999):
        torch.testing.assert_close(images[index], reference[index][0].as_subclass(torch.Tensor))
    assert data.train_dataloader().dataset.labels.bincount().tolist() == [4_500] * 10
    assert data.val_dataloader().dataset.labels.bincount().tolist() == [500] * 10


class CountSamples(Callback):
    """How many samples went through each kind of step."""

    def __init__(self):
        self.seen = Counter()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen["train"] += len(batch[1])

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.seen["val"] += len(batch[1])

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.seen["test"] += len(batch[1])


@pytest.mark.parametrize(
    ("val_fraction", "expected"), [(0.1, {"train": 1258, "val": 180, "test": 359}), (0.0, {"train": 1438, "test": 359})]
)
def test_a_trainer_asks_for_every_loader_itself(val_fraction, expected):
    count = CountSamples()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=1, accelerator="cpu", num_sanity_val_steps=0, callbacks=[count], **quiet)
    classifier = LitClassifier(LeNet300100(in_features=64), num_classes=10)
    trainer.fit(classifier, datamodule=DigitsDataModule(val_fraction=val_fraction))
    trainer.test(classifier, datamodule=DigitsDataModule(val_fraction=val_fraction), verbose=False)
    assert count.seen == expected


# --- photographs in folders


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder of JPEG files in ImageNet's layout: three classes of 4, 3 and 5 images."""
    folder = tmp_path_factory.mktemp("imagenet")
    write_folders(folder, {"n01": 4, "n02": 3, "n03": 5})
    return folder


def test_photographs_are_scaled_cut_from_the_centre_and_standardised(photographs):
    data = ImageNetDataModule(photographs, batch_size=5, image_size=32)
    images, labels = gathered(data.val_dataloader())
    assert images.shape == (12, 3, 32, 32)
    assert labels.tolist() == [0] * 4 + [1] * 3 + [2] * 5
    assert (data.num_classes, data.class_names) == (3, ("n01", "n02", "n03"))
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    for index, name in enumerate(f"{name}/{number}" for name, count in (("n01", 4), ("n02", 3)) for number in range(count)):
        with Image.open(photographs / "val" / f"{name}.JPEG") as photograph:
            shorter = min(photograph.size)
            # 32 / 0.875 = 36.6
            scaled = photograph.resize([round(side * 37 / shorter) for side in photograph.size], Image.Resampling.BILINEAR)
        left, top = (round((side - 32) / 2) for side in scaled.size)
        pixels = np.asarray(scaled.crop((left, top, left + 32, top + 32)))
        # One grey level is 1 / 255 / 0.225 = 0.017.
        np.testing.assert_allclose(images[index].permute(1, 2, 0).numpy(), (pixels / 255 - mean) / std, atol=0.02)


def test_augmentation_crops_mirrors_and_touches_training_alone(photographs):
    data = ImageNetDataModule(photographs, batch_size=12, image_size=32)
    plain = ImageNetDataModule(photographs, batch_size=12, image_size=32, augment=False)
    analysed, labels = gathered(data.analysis_dataloader())
    assert torch.equal(analysed, gathered(data.analysis_dataloader())[0])
    assert labels.tolist() == sorted(labels.tolist())
    assert Counter(fingerprints(gathered(plain.train_dataloader())[0])) == Counter(fingerprints(analysed))
    torch.manual_seed(1)
    first, shuffled = gathered(data.train_dataloader())
    assert sorted(shuffled.tolist()) == labels.tolist() != shuffled.tolist()
    assert not set(fingerprints(first)) & set(fingerprints(analysed))
    torch.manual_seed(1)
    assert torch.equal(gathered(data.train_dataloader())[0], first)
    for loader in ("val_dataloader", "test_dataloader", "predict_dataloader"):
        assert torch.equal(gathered(getattr(data, loader)())[0], gathered(plain.val_dataloader())[0])


def test_chosen_folders_are_numbered_in_the_order_given(photographs):
    data = ImageNetDataModule(photographs, batch_size=4, classes=["n03", "n01"], drop_last=True)
    data.setup("fit")
    assert (data.num_classes, data.class_names) == (2, ("n03", "n01"))
    assert gathered(data.val_dataloader())[1].tolist() == [1] * 4 + [0] * 5  # files in alphabetical order
    assert len(gathered(data.analysis_dataloader())[1]) == 9
    assert len(gathered(data.train_dataloader())[1]) == 8


def test_workers_read_the_photographs_that_the_main_process_reads(photographs):
    alone = gathered(ImageNetDataModule(photographs, image_size=32).analysis_dataloader())
    helped = gathered(ImageNetDataModule(photographs, image_size=32, num_workers=1).analysis_dataloader())
    assert all(map(torch.equal, alone, helped))


def test_photographs_lie_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_COMPRESS_DATA", str(tmp_path))
    assert ImageNetDataModule().data_dir == tmp_path / "imagenet"
    monkeypatch.delenv("LIT_COMPRESS_DATA")
    assert str(ImageNetDataModule().data_dir) == "data/imagenet"


@pytest.mark.parametrize(
    ("make", "arguments", "error", "said"),
    [
        ([("train", "n01")], {}, FileNotFoundError, r"no folder .*val\. Photographs are read from `train/<class>/`"),
        ([("val", "n01")], {}, FileNotFoundError, r"no folder .*train\..*`data_dir`.*LIT_COMPRESS_DATA.*not downloaded"),
        ([("train", "n01"), ("train", "n02"), ("val", "n01")], {}, ValueError, r"only one of them has n02.*by `classes`"),
        (
            [("train", "n01"), ("val", "n01")],
            {"classes": ["n07"]},
            FileNotFoundError,
            r"val has no folder for n07, which `classes`",
        ),
    ],
    ids=["no val", "no train", "other classes", "unknown class"],
)
def test_folders_say_what_is_wrong(make, arguments, error, said, tmp_path):
    for part, name in make:
        write_folders(tmp_path, {name: 1}, parts=(part,))
    with pytest.raises(error, match=f"(?s){said}"):
        ImageNetDataModule(tmp_path, **arguments).setup("fit")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"batch_size": 0}, "`batch_size` must be at least 1 but got 0"),
        ({"num_workers": -1}, "`num_workers` must be at least 0 but got -1"),
        ({"image_size": 0}, "`image_size` must be at least 1 but got 0"),
        ({"classes": []}, r"`classes` must list at least one folder and none twice but got \[\]"),
        ({"classes": ["n01", "n01"]}, "none twice"),
        ({"classes": "n01"}, "must list at least one folder and none twice but got 'n01'"),
    ],
)
def test_photographs_are_not_asked_for_in_vain(arguments, said):
    with pytest.raises(ValueError, match=said):
        ImageNetDataModule(**arguments)
