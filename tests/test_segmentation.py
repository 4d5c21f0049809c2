"""Segmentation: folders of CamVid and Cityscapes, the augmentation of a frame with its labels, IoU counted by hand, ERFNet."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import jaccard_score
from torch import nn
from torch.nn import functional as F
from torchvision.datasets import Cityscapes

from lit_compress import analyze, count_mult_adds, cut
from lit_compress.cli import main
from lit_compress.datamodules import SegmentationDataModule
from lit_compress.datamodules.segmentation import SegmentedFrames
from lit_compress.models import ERFNet
from lit_compress.modules import LitSegmenter
from tests.modules import new_trainer
from tests.test_docs import ROOT

REFERENCE = json.loads((ROOT / "tests" / "reference" / "erfnet_counts.json").read_text())


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)


def scene(seed, size=(16, 24), numbers=12):
    """A frame whose red channel is ten times the number of its pixels' class."""
    labels = np.random.default_rng(seed).integers(0, numbers, (size[0] // 4, size[1] // 4)).repeat(4, 0).repeat(4, 1)
    return np.stack([10 * labels % 256, labels * 0, labels * 0 + 255], -1), labels


@pytest.fixture
def camvid(tmp_path):
    for split, count in [("train", 5), ("val", 3), ("test", 2)]:
        for number in range(count):
            image, labels = scene(number)
            write(tmp_path / "camvid" / split / f"{number}.png", image)
            write(tmp_path / "camvid" / f"{split}annot" / f"{number}.png", labels)
    return tmp_path


@pytest.fixture
def cityscapes(tmp_path):
    for split, city, count in [("train", "aachen", 2), ("train", "bremen", 1), ("val", "munster", 2)]:
        for number in range(count):
            image, labels = scene(number, numbers=34)
            stem = f"{city}_000000_{number:06}"
            write(tmp_path / "cityscapes" / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png", image)
            write(tmp_path / "cityscapes" / "gtFine" / split / city / f"{stem}_gtFine_labelIds.png", labels)
            write(tmp_path / "cityscapes" / "gtFine" / split / city / f"{stem}_gtFine_color.png", image)
    return tmp_path


# ---------------------------------------------------------------- data


def test_camvid_gives_frames_and_labels_that_belong_together(camvid):
    data = SegmentationDataModule("camvid", data_dir=camvid, batch_size=2)
    for stage in ("fit", "validate", "test", "predict"):
        data.setup(stage)
    assert [len(loader().dataset) for loader in (data.train_dataloader, data.val_dataloader, data.test_dataloader)] == [5, 3, 2]
    images, labels = next(iter(data.val_dataloader()))
    assert images.shape == (2, 3, 16, 24)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    numbers = (images[:, 0] * 25.5).round().long()
    assert torch.equal(labels, torch.where(numbers == 11, -100, numbers))  # 11 is unlabelled
    assert (labels == -100).any()
    assert data.num_classes == len(data.class_names) == 11
    assert len(SegmentationDataModule("camvid", data_dir=camvid, train_size=2).train_dataloader().dataset) == 2


def test_cityscapes_numbers_become_the_labels_that_are_trained_on(cityscapes):
    data = SegmentationDataModule("cityscapes", data_dir=cityscapes, batch_size=1)
    data.setup("fit")
    assert len(data.train_dataloader().dataset) == 3
    official = {one.id: (-100 if one.train_id in (-1, 255) else one.train_id) for one in Cityscapes.classes}
    for number, (_, labels) in enumerate(data.test_dataloader()):
        expected = np.vectorize(official.get)(scene(number, numbers=34)[1])
        assert np.array_equal(labels[0].numpy(), expected)
    assert data.num_classes == 19
    assert data.class_names[:2] == ("road", "sidewalk")
    assert data.class_names[-1] == "bicycle"


def test_augmentation_moves_a_frame_and_its_labels_alike(camvid):
    dataset = SegmentationDataModule("camvid", data_dir=camvid).train_dataloader().dataset
    plain_labels = SegmentedFrames(dataset.frames, {number: number for number in range(11)}, None, False)[0][1]
    shifts = set()
    for _ in range(200):
        image, labels = dataset[0]
        inside = image[2] == 1  # blue is full in every frame and empty beyond its border
        numbers = (image[0] * 25.5).round().long()
        assert torch.equal(labels[inside], torch.where(numbers == 11, -100, numbers)[inside])
        assert (labels[~inside] == -100).all()
        padded = F.pad(plain_labels, (2, 2, 2, 2), value=-100)
        found = [
            (down, right, mirrored)
            for mirrored in (False, True)
            for down in range(5)
            for right in range(5)
            if torch.equal(labels.flip(1) if mirrored else labels, padded[down : down + 16, right : right + 24])
        ]
        assert len(found) == 1
        shifts.add(found[0])
    assert len(shifts) > 40  # of 25 shifts, each mirrored or not; 200 draws of 50 leave out 1 on average


def test_frames_are_resized_and_labels_stay_labels(camvid):
    data = SegmentationDataModule("camvid", data_dir=camvid, size=(8, 12), batch_size=3)
    images, labels = next(iter(data.val_dataloader()))
    assert images.shape == (3, 3, 8, 12)
    whole = torch.stack([torch.from_numpy(scene(number)[1]) for number in range(3)])
    halved = whole[:, ::2, ::2]  # squares of four pixels become squares of two
    assert torch.equal(labels, torch.where(halved == 11, -100, halved))


def test_the_real_frames_are_read(data_dir):
    data = SegmentationDataModule("camvid", data_dir=data_dir("camvid"), size=(90, 120), batch_size=4)
    images, labels = next(iter(data.val_dataloader()))
    assert 0.2 < images.mean() < 0.7
    assert set(labels.unique().tolist()) <= {-100, *range(11)}
    road, sky = labels == 3, labels == 0
    rows = torch.arange(90)[None, :, None].expand_as(labels).float()
    assert rows[road].mean() > rows[sky].mean() + 20  # the road is below


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"layout": "kitti"}, ValueError, "'camvid', 'cityscapes' but got 'kitti'"),
        ({"size": (0, 4)}, ValueError, "`size` must be at least 1 but got 0"),
        ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1 but got 0"),
        ({"train_size": 9}, ValueError, "`train_size` asks for 9 frames but there are 5"),
        ({"data_dir": "nowhere"}, FileNotFoundError, r"no frames train/\*\.png in .*nowhere"),
    ],
    ids=str,
)
def test_data_say_what_is_wrong(arguments, error, text, camvid):
    with pytest.raises(error, match=text):
        SegmentationDataModule(**{"data_dir": camvid, **arguments}).setup("fit")


def test_a_frame_without_labels_is_told(camvid):
    (camvid / "camvid" / "valannot" / "1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 frames have no labels; the first is .*valannot.1\.png"):
        SegmentationDataModule("camvid", data_dir=camvid).setup("fit")


# ---------------------------------------------------------------- the module


def test_iou_is_that_of_all_pixels_of_the_split_together(camvid, tmp_path):
    torch.manual_seed(4)
    module = LitSegmenter(nn.Conv2d(3, 11, 3, padding=1), num_classes=11, class_names=[f"c{number}" for number in range(11)])
    data = SegmentationDataModule("camvid", data_dir=camvid, batch_size=2)
    trainer = new_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, datamodule=data)
    (results,) = trainer.test(module, data.val_dataloader(), verbose=False)
    images, labels = (torch.cat(column) for column in zip(*data.val_dataloader(), strict=True))
    with torch.no_grad():
        logits = module(images)
    mask = labels != -100
    found, wanted = logits.argmax(1)[mask].numpy(), labels[mask].numpy()
    occurring = sorted(set(found) | set(wanted))
    scores = jaccard_score(wanted, found, labels=occurring, average=None)
    assert results["test/iou"] == pytest.approx(scores.mean(), rel=1e-5)
    assert {name: value for name, value in results.items() if "iou/" in name} == pytest.approx(
        {f"test/iou/c{label}": score for label, score in zip(occurring, scores, strict=True)}, rel=1e-5
    )
    # Batches of 2 and 1 frames, weighed by their number; the loss of a batch is over its labelled pixels.
    parts = [F.cross_entropy(logits[part], labels[part]).item() for part in (slice(0, 2), slice(2, 3))]
    assert results["test/loss"] == pytest.approx((2 * parts[0] + parts[1]) / 3, rel=1e-5)


def test_a_class_that_nowhere_occurs_counts_for_nothing(tmp_path):
    module = LitSegmenter(nn.Identity(), num_classes=4, ignore_index=9)
    logits = torch.full((1, 4, 1, 4), -5.0)
    for pixel, label in enumerate([0, 0, 1, 1]):
        logits[0, label, 0, pixel] = 5.0
    module.val_iou.update(logits, torch.tensor([[[0, 1, 1, 9]]]))
    logged = {}
    module.log = lambda name, value, **options: logged.update({name: value.item()})
    module.log_dict = lambda values: logged.update({name: value.item() for name, value in values.items()})
    module._log_iou(module.val_iou, "val")
    assert logged == {"val/iou": 0.5, "val/iou/0": 0.5, "val/iou/1": 0.5}


def test_class_weights_weigh_the_loss():
    weights = [1.0, 0.5, 2.0]
    module = LitSegmenter(nn.Identity(), num_classes=3, class_weights=weights)
    module.log = lambda *args, **options: None
    logits, labels = torch.randn(2, 3, 4, 5), torch.randint(3, (2, 4, 5))
    each = F.cross_entropy(logits, labels, reduction="none")
    factor = torch.tensor(weights)[labels]
    torch.testing.assert_close(module.training_step((logits, labels), 0), (each * factor).sum() / factor.sum())
    assert "class_weights" not in module.state_dict()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"num_classes": 1}, "`num_classes` must be at least 2 but got 1"),
        ({"num_classes": 3, "class_weights": [1.0]}, "`class_weights` must have one entry for each of 3 classes but has 1"),
        ({"num_classes": 3, "class_names": ["a"]}, "`class_names` must have one entry for each of 3 classes but has 1"),
    ],
    ids=str,
)
def test_the_module_says_what_is_wrong(arguments, text):
    with pytest.raises(ValueError, match=text):
        LitSegmenter(nn.Identity(), **arguments)


def test_logits_of_another_size_are_refused():
    module = LitSegmenter(nn.Conv2d(3, 4, 2, stride=2), num_classes=4)
    with pytest.raises(ValueError, match=r"shape \(2, 4, 8, 8\), .* but the network gave \(2, 4, 4, 4\)"):
        module.validation_step((torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 8).long()), 0)


# ---------------------------------------------------------------- ERFNet


def test_erfnet_has_the_published_size():
    network = ERFNet(num_classes=REFERENCE["num_classes"])
    assert round(sum(parameter.numel() for parameter in network.parameters()) / 1e6, 2) == REFERENCE["parameters_millions"]
    # The document counts a transposed convolution at the size of its output, four times the input that PyTorch counts at.
    images = torch.zeros(1, 3, REFERENCE["side"], REFERENCE["side"])
    counts = [count_mult_adds(network, images)]
    for layer in network.modules():
        if isinstance(layer, nn.ConvTranspose2d):
            layer.register_forward_hook(
                lambda layer, inputs, output: counts.append(3 * layer.weight.numel() * inputs[0].shape[2] * inputs[0].shape[3])
            )
    network(images)
    assert sum(counts) == REFERENCE["mult_adds"]


def test_erfnets_layers_are_those_of_the_papers_table():
    """Resolution and channels behind each of the 23 layers, and the dilations of the second pair."""
    network = ERFNet(num_classes=7)
    shapes = {}
    for name, layer in network.named_children():
        layer.register_forward_hook(lambda layer, inputs, output, name=name: shapes.update({name: tuple(output.shape[1:])}))
    network(torch.zeros(1, 3, 64, 128))
    expected = [(16, 32, 64)] + [(64, 16, 32)] * 6 + [(128, 8, 16)] * 9 + [(64, 16, 32)] * 3 + [(16, 32, 64)] * 3 + [(7, 64, 128)]
    assert shapes == {f"layer{number}": shape for number, shape in enumerate(expected, start=1)}
    dilations = [network.get_submodule(f"layer{number}").branch.conv2_rows.dilation[0] for number in range(9, 17)]
    assert dilations == [2, 4, 8, 16, 2, 4, 8, 16]


def test_cheap_blocks_in_erfnet_keep_its_dilations():
    """The second grouped convolution of a block is dilated, as the second pair is; a bottleneck has one."""
    for block, expected in {"G(N)": [[1, 1], [1, 2], [1, 16]], "BG(2,M)": [[1], [2], [16]]}.items():
        network = ERFNet(num_classes=5, width=0.25, block=block).eval()
        layers = [network.get_submodule(f"layer{number}") for number in (3, 9, 12)]
        grouped = [[m.dilation[0] for m in layer.modules() if isinstance(m, nn.Conv2d) and m.groups > 1] for layer in layers]
        assert grouped == expected
        assert {m.eps for m in network.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-3}
        assert network(torch.zeros(1, 3, 30, 40)).shape == (1, 5, 30, 40)
    block = ERFNet(width=0.25, block="G(N)").eval().layer9
    maps = torch.randn(1, 32, 12, 12)
    by_hand = maps
    for place, dilation in (("1", 1), ("2", 2)):
        convolution, norm = block.branch.get_submodule(f"conv{place}"), block.branch.get_submodule(f"norm{place}")
        by_hand = F.conv2d(by_hand, convolution.grouped.weight, padding=dilation, dilation=dilation, groups=32)
        by_hand = norm(F.conv2d(F.relu(convolution.norm(by_hand)), convolution.pointwise.weight))
        by_hand = F.relu(by_hand if place == "1" else by_hand + maps)
    torch.testing.assert_close(block(maps), by_hand)
    with pytest.raises(ValueError, match="A block is written as"):
        ERFNet(block="Q")


def test_erfnet_takes_any_size_and_width():
    thin = ERFNet(num_classes=5, width=0.25).eval()
    images = torch.randn(2, 3, 29, 43)
    outputs = thin(images)
    assert outputs.shape == (2, 5, 29, 43)
    torch.testing.assert_close(outputs, thin(F.pad(images, (0, 5, 0, 3)))[:, :, :29, :43])
    with pytest.raises(ValueError, match=r"more channels than the 3 of an image but 0\.1 gives 2 of 16"):
        ERFNet(width=0.1)


def test_erfnet_is_pruned():
    """A cut proves itself on the inputs, or raises."""
    torch.manual_seed(0)
    network = ERFNet(num_classes=5, width=0.25)
    batches = [torch.randn(8, 3, 16, 24) for _ in range(3)]
    whole = sum(parameter.numel() for parameter in network.parameters())
    recipe = analyze(network, batches).recipe(keep_params=0.6)
    assert "layer4.branch.conv1_columns" in recipe.keep  # inside a block
    assert any(layer.endswith("branch.conv2_columns") for layer in recipe.keep)  # added to the stream
    cut(network, recipe, batches[0])
    assert sum(parameter.numel() for parameter in network.parameters()) <= 0.6 * whole
    assert network(batches[0]).shape == (8, 5, 16, 24)


# ---------------------------------------------------------------- from the command line


def test_the_camvid_configs_train_a_teacher_and_a_thinner_student(camvid, monkeypatch):
    monkeypatch.chdir(camvid)
    monkeypatch.setenv("LIT_COMPRESS_DATA", str(camvid))
    short = ["--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
    main(["fit", "--config", str(ROOT / "configs" / "erfnet_camvid.yaml"), *short])
    main(["fit", "--config", str(ROOT / "configs" / "distill_erfnet_camvid.yaml"), *short])
    (figures,) = (camvid / "lit_compress_runs" / "distill_erfnet_camvid").rglob("metrics.csv")
    columns = set(figures.read_text().splitlines()[0].split(","))
    assert {f"train/attention_transfer/layer{number}" for number in (7, 12, 16, 19, 22)} | {"val/iou"} <= columns
