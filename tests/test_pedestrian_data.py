"""Data modules of pedestrians: real sets, files written by hand, and drawn streets."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning import LightningModule, Trainer
from torchvision.ops import box_iou

from lit_compress.cli import main
from lit_compress.datamodules import (
    CaltechPedestrianDataModule,
    CocoPedestrianDataModule,
    PedestrianPatchDataModule,
    PennFudanDataModule,
    SyntheticPedestrianDataModule,
)
from lit_compress.datamodules import street_scenes as streets
from lit_compress.datamodules.pedestrian_images import SPLITS, PedestrianImages, mirrored
from lit_compress.datamodules.pedestrian_patches import OneToThree
from lit_compress.datamodules.penn_fudan import read_penn_fudan
from lit_compress.metrics import LogAverageMissRate
from lit_compress.pedestrians import SUBSETS, Annotations, Detections, warp, write_results
from tests.caltech_files import picture, write_seq, write_vbb

PERSON = ("person", 1, [[11, 6, 10, 30]] * 60, [[0] * 4] * 30 + [[11, 6, 10, 15]] * 30)


# Caltech


def caltech(folder, extracted=False):
    """A video of 60 frames in a set of each split."""
    root = folder / "caltech"
    for number in (0, 5, 10):
        video = f"set{number:02d}/V003"
        write_vbb(root / "annotations" / f"{video}.vbb", 60, [PERSON])
        if extracted:
            (root / "images").mkdir(exist_ok=True)
            for index in range(60):
                Image.fromarray(picture(index)).save(root / "images" / f"{video.replace('/', '_')}_I{index:05d}.png")
        else:
            write_seq(root / f"{video}.seq", [picture(index) for index in range(60)], form=1)
    return folder


@pytest.mark.parametrize("extracted", [False, True])
def test_caltech_takes_every_nth_frame_of_its_sets(extracted, tmp_path):
    data = CaltechPedestrianDataModule(caltech(tmp_path, extracted), batch_size=2, augment=False)
    data.setup("fit")
    names = {split: [one.name for one in data.images(split)] for split in SPLITS}
    assert names["train"] == [f"set00_V003_I{index:05d}" for index in range(2, 60, 3)]
    assert names["val"] == ["set05_V003_I00029", "set05_V003_I00059"]
    assert names["test"] == ["set10_V003_I00029", "set10_V003_I00059"]
    images, targets = next(iter(data.val_dataloader()))
    for image, index in zip(images, (29, 59), strict=True):
        assert image.dtype == torch.float32
        torch.testing.assert_close(image * 255, torch.from_numpy(picture(index)).permute(2, 0, 1).float())
    assert targets[0]["boxes"].tolist() == [[10, 5, 20, 35]], "pixels count from 0"
    assert targets[0]["visible"].tolist() == [[0, 0, 0, 0]]
    assert targets[1]["visible"].tolist() == [[10, 5, 20, 20]]
    assert [target["image_id"] for target in targets] == [0, 1]
    assert len(data.analysis_dataloader()) == 10


def test_processes_that_read_one_video_do_not_get_in_each_other_s_way(tmp_path):
    data = CaltechPedestrianDataModule(caltech(tmp_path), train_every=1, num_workers=2, augment=False)
    assert torch.equal(data.images("train")[0].read(), torch.from_numpy(picture(0)).permute(2, 0, 1)), "opened here, then there"
    for index, ((image,), _) in enumerate(data.analysis_dataloader()):
        assert torch.equal((255 * image).round().byte(), torch.from_numpy(picture(index)).permute(2, 0, 1))


def test_caltech_says_what_is_missing_or_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no .*caltech\. Put annotations there as"):
        CaltechPedestrianDataModule(tmp_path).setup("fit")
    root = caltech(tmp_path) / "caltech"
    whole = (root / "set05" / "V003.seq").read_bytes()
    (root / "set05" / "V003.seq").write_bytes(whole[: len(whole) * 3 // 4])
    with pytest.raises(ValueError, match=r"set05/V003\.seq is damaged"):
        CaltechPedestrianDataModule(tmp_path).setup("validate")
    with pytest.warns(UserWarning, match="is damaged|1 annotated frames are not in the videos; the first is set05_V003_I00059"):
        found = CaltechPedestrianDataModule(tmp_path, damaged="skip").images("val")
    assert [one.name for one in found] == ["set05_V003_I00029"]
    (root / "set10" / "V003.seq").unlink()
    with pytest.raises(ValueError, match=r"no .*set10/V003\.seq"):
        CaltechPedestrianDataModule(tmp_path).setup("test")
    with pytest.warns(UserWarning, match="set10"), pytest.raises(FileNotFoundError, match="no annotated frames of set06"):
        CaltechPedestrianDataModule(tmp_path, damaged="skip").setup("test")
    with pytest.raises(ValueError, match="`train_every` must be at least 1"):
        CaltechPedestrianDataModule(train_every=0)


# COCO and CityPersons


def test_coco_s_persons_are_those_of_its_annotations(data_dir):
    folder = data_dir("coco128")
    data = CocoPedestrianDataModule(
        folder, folder="coco128", train_images="val2017", train_annotations="annotations/instances_val2017.json",
        val_annotations=None, val_size=28, with_persons=False, augment=False, batch_size=4,
    )  # fmt: skip
    content = json.loads((folder / "coco128" / "annotations" / "instances_val2017.json").read_text())
    persons = [one for one in content["annotations"] if one["category_id"] == 1]
    found = {one.name: one.annotations for split in ("train", "val") for one in data.images(split)}
    assert (len(data.images("train")), len(data.images("val")), len(found)) == (100, 28, 128)
    assert sum(len(one.boxes) for one in found.values()) == len(persons) == 259
    assert sum(int(one.ignore.sum()) for one in found.values()) == 5
    one = persons[0]
    assert one["bbox"] in found[f"{one['image_id']:012d}"].boxes.tolist()
    images, targets = next(iter(data.train_dataloader()))
    for image, target in zip(images, targets, strict=True):
        assert image.shape[0] == 3
        assert (target["boxes"][:, 2:] <= torch.tensor(image.shape[:0:-1]) + 0.5).all()
    only = CocoPedestrianDataModule(
        folder, "coco128", "val2017", "annotations/instances_val2017.json", val_annotations=None, val_size=28
    )
    assert 0 < len(only.images("train")) < 100
    assert [one.name for one in only.images("val")] == [one.name for one in data.images("val")]


def test_city_persons_json_is_read_from_its_folders(tmp_path):
    root = tmp_path / "citypersons"
    for split in ("train", "val"):
        (root / "images" / split / "aachen").mkdir(parents=True)
        Image.fromarray(picture(1)).save(root / "images" / split / "aachen" / "a1.png")
        content = {
            "images": [{"id": 1, "file_name": "aachen/a1.png"}],
            "categories": [{"id": 0, "name": "ignore"}, {"id": 1, "name": "pedestrian"}],
            "annotations": [
                {"image_id": 1, "category_id": 1, "bbox": [5, 6, 10, 30], "vis_bbox": [5, 6, 10, 15]},
                {"image_id": 1, "category_id": 0, "bbox": [30, 6, 10, 30]},
            ],
        }
        (root / f"{split}.json").write_text(json.dumps(content))
    data = CocoPedestrianDataModule(tmp_path, "citypersons", "images/train", "train.json", "images/val", "val.json")
    ((image,), (target,)) = next(iter(data.test_dataloader()))
    assert image.shape == (3, 48, 64)
    assert target["labels"].tolist() == [1, 4]
    assert target["visible"].tolist() == [[5, 6, 15, 21], [0, 0, 0, 0]]
    (root / "images" / "val" / "aachen" / "a1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 1 images of val\.json are missing"):
        CocoPedestrianDataModule(tmp_path, "citypersons", "images/train", "train.json", "images/val", "val.json").setup("fit")
    with pytest.raises(ValueError, match="`val_size` must be at least 1 without"):
        CocoPedestrianDataModule(val_annotations=None)


# Penn-Fudan


def test_penn_fudan_s_boxes_are_those_of_its_masks(data_dir):
    folder = data_dir("PennFudanPed") / "PennFudanPed"
    mask = np.array(Image.open(folder / "PedMasks" / "FudanPed00054_mask.png"))
    found = read_penn_fudan(folder / "Annotation" / "FudanPed00054.txt")
    for number, box in enumerate(found.boxes, start=1):
        rows, columns = np.nonzero(mask == number)
        assert box.tolist() == [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
    assert len(found.boxes) == mask.max() == 3


def test_penn_fudan_is_split_by_seed(tmp_path):
    root = tmp_path / "PennFudanPed"
    for folder in ("PNGImages", "Annotation"):
        (root / folder).mkdir(parents=True)
    text = (
        'Objects with ground truth : 1 { "x" }\nBounding box for object 1 "x" (Xmin, Ymin) - (Xmax, Ymax) : (3, 4) - (12, 33)\n'
    )
    for index in range(9):
        Image.fromarray(picture(index)).save(root / "PNGImages" / f"P{index}.png")
        (root / "Annotation" / f"P{index}.txt").write_text(text)
    data = PennFudanDataModule(tmp_path, val_size=2, test_size=3)
    names = {split: [one.name for one in data.images(split)] for split in SPLITS}
    assert [len(names[split]) for split in SPLITS] == [4, 2, 3]
    assert sorted(sum(names.values(), [])) == [f"P{index}" for index in range(9)]  # noqa: RUF017
    assert data.images("train")[0].annotations.boxes.tolist() == [[2, 3, 10, 30]]
    (root / "Annotation" / "P3.txt").write_text(text.replace("truth : 1", "truth : 2"))
    with pytest.raises(ValueError, match=r"P3\.txt is damaged: it has 1 boxes of 2"):
        [PennFudanDataModule(tmp_path, val_size=2, test_size=3).setup(stage) for stage in ("fit", "test")]
    with pytest.raises(FileNotFoundError, match=r"9 images .* 20 \+ 50"):
        PennFudanDataModule(tmp_path).setup("fit")


# Drawn streets


def test_the_config_of_patches_trains(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--trainer.max_epochs", "1", "--data.batches", "2", "--trainer.enable_progress_bar", "false"]
    streets = "--data.source.init_args"
    few = [f"{streets}.train_size", "6", f"{streets}.val_size", "4"]
    main(["fit", "--config", str(root / "configs" / "pedestrian_patches_synthetic.yaml"), *small, *few])
    logged = next((tmp_path / "lit_compress_runs").rglob("metrics.csv")).read_text()
    assert "val/accuracy" in logged


def drawn(**options):
    return SyntheticPedestrianDataModule(**{"size": (96, 128), "heights": (16, 60), "train_size": 12, "val_size": 12, **options})


def test_streets_hang_on_seed_split_and_number_only():
    one, same, other = drawn(), drawn(num_workers=1, train_size=30), drawn(seed=1)
    third = one.images("train")[3].read()
    assert torch.equal(third, same.images("train")[3].read())
    assert not torch.equal(third, other.images("train")[3].read())
    assert not torch.equal(third, one.images("val")[3].read())
    batch, again = (next(iter(data.val_dataloader())) for data in (one, same))
    assert torch.equal(batch[0][0], again[0][0])
    assert torch.equal(batch[1][0]["boxes"], again[1][0]["boxes"])


def test_streets_hold_people_of_every_kind():
    found = [one.annotations for one in drawn(train_size=80).images("train")]
    assert all((one.boxes[:, :2] >= 0).all() for one in found)
    assert all((one.boxes[:, :2] + one.boxes[:, 2:] <= (128, 96)).all() for one in found)
    persons = sum(int(((one.labels == 1) & ~one.ignore).sum()) for one in found)
    occluded = sum(int((one.visible.any(axis=1) & (one.labels == 1)).sum()) for one in found)
    groups = sum(int((one.labels == 2).sum()) for one in found)
    assert persons > 60
    assert 0.1 * persons < occluded < 0.8 * persons
    assert groups > 10
    # Less a pixel of rounding each way, and a head or a foot of which the step takes a few per cent.
    heights = np.concatenate([one.boxes[one.labels == 1, 3] for one in found])
    assert heights.min() > 16 * 0.85 - 1
    assert heights.max() < 60 * 1.05 + 1
    shapes = np.concatenate([one.boxes[one.labels == 1, 2] / one.boxes[one.labels == 1, 3] for one in found])
    assert 0.25 < np.median(shapes) < 0.55, "near the 0.41 that the evaluation takes for granted"


@pytest.mark.parametrize(("size", "heights"), [((32, 32), (8, 22)), ((32, 200), (8, 8)), ((200, 40), (140, 140))])
def test_streets_of_any_size_hold_boxes_in_them(size, heights):
    scene = streets.StreetScene(size=size, heights=heights, crowds=1.0, occlusion=1.0)
    for seed in range(40):
        image, annotations = scene.draw(np.random.default_rng(seed))
        assert image.shape == (*size, 3)
        for boxes in (annotations.boxes, annotations.visible[annotations.visible.any(axis=1)]):
            assert (boxes[:, :2] >= 0).all()
            assert (boxes[:, :2] + boxes[:, 2:] <= size[::-1]).all()
            assert (boxes[:, 2:] >= 1).all()
        inside = (annotations.visible[:, :2] >= annotations.boxes[:, :2]).all(axis=1)
        assert inside[annotations.visible.any(axis=1)].all()


def test_a_box_holds_the_pixels_that_a_figure_changes():
    generator = np.random.default_rng(0)
    for _ in range(20):
        before = np.zeros((96, 128, 3))
        scene = before.copy()
        thing = streets.Thing(90.0, generator.uniform(10, 80), streets.figure(generator, generator.uniform(20, 80)), 1)
        outline = streets._paint(scene, thing)
        annotations = streets._annotations({1: outline}, {1: "person"}, outline.astype(int))
        rows, columns = np.nonzero((scene != before).any(axis=2))
        x, y, w, h = annotations.boxes[0]
        # A pixel that is covered by less than half is changed but does not count.
        for ours, theirs in ((x, columns.min()), (y, rows.min()), (x + w, columns.max() + 1), (y + h, rows.max() + 1)):
            assert abs(ours - theirs) <= 1
        assert not annotations.visible.any()


@pytest.mark.parametrize(("foot", "hidden"), [(70.0, False), (81.0, True)])
def test_who_stands_behind_is_partly_visible(foot, hidden, monkeypatch):
    wall = streets.Stamp(np.ones((30, 128, 3)), np.ones((30, 128)))
    figure = streets.figure(np.random.default_rng(1), 60)
    things = [streets.Thing(foot, 0.0, wall, 0), streets.Thing(80.0, 40.0, figure, 1)]
    monkeypatch.setattr(streets.StreetScene, "_things", lambda self, generator, horizon: (things, {1: "person"}))
    _, annotations = streets.StreetScene(size=(96, 128), heights=(16, 60)).draw(np.random.default_rng(0))
    (box,), (part,) = annotations.boxes, annotations.visible
    if hidden:
        assert part[1] == box[1]
        assert part[1] + part[3] == 51, "the wall begins at row 81 - 30"
    else:
        assert not part.any()


def test_detections_that_are_right_miss_nobody_who_counts():
    data, metric = drawn(), LogAverageMissRate(replace(SUBSETS["reasonable"], heights=(20.0, math.inf), bounds=None))
    for _, targets in data.val_dataloader():
        preds = [{"boxes": target["boxes"], "scores": torch.ones(len(target["boxes"]))} for target in targets]
        metric.update(preds, targets)
    assert float(metric.compute()) == 0.0
    assert metric.curve.persons > 5
    assert metric.curve.images == 12


class Detector(LightningModule):
    """Finds all that is there, or nothing."""

    def __init__(self, blind):
        super().__init__()
        self.blind = blind
        self.miss_rate = LogAverageMissRate(replace(SUBSETS["all"], bounds=None))

    def validation_step(self, batch, batch_idx):
        _, targets = batch
        boxes = [target["boxes"][:0] if self.blind else target["boxes"] for target in targets]
        self.miss_rate.update([{"boxes": found, "scores": torch.ones(len(found))} for found in boxes], targets)
        self.log("val/miss_rate", self.miss_rate, batch_size=len(targets))


@pytest.mark.parametrize("blind", [True, False])
def test_a_trainer_logs_the_miss_rate_of_a_detector(blind, tmp_path):
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    (logged,) = trainer.validate(Detector(blind), datamodule=drawn(batch_size=5), verbose=False)
    assert logged["val/miss_rate"] == float(blind)


def test_settings_of_streets_out_of_range_are_refused():
    for options, message in (
        ({"train_size": 0}, "`train_size` must be at least 1"),
        ({"size": (20, 128)}, "`size` must be at least 32"),
        ({"heights": (16, 90)}, r"0\.7 of the image's 96"),
        ({"crowds": 1.5}, r"`crowds` must lie in \[0, 1\]"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            drawn(**options)


def test_mirrored_images_take_their_boxes_along():
    one = Annotations.of([[10, 5, 20, 60], [0, 0, 4, 8]], visible=[[12, 5, 6, 60], [0] * 4])
    turned = mirrored(one, width=64)
    assert turned.boxes.tolist() == [[34, 5, 20, 60], [60, 0, 4, 8]]
    assert turned.visible.tolist() == [[46, 5, 6, 60], [0, 0, 0, 0]]
    assert mirrored(turned, 64).boxes.tolist() == one.boxes.tolist()
    images = drawn().images("train")
    plain, moved = PedestrianImages(images), PedestrianImages(images, mirror=True)
    torch.manual_seed(0)
    seen = set()
    for index in range(8):
        (image, target), (other, same) = plain[index], moved[index]
        flipped = not torch.equal(image, other)
        seen.add(flipped)
        expected = image.flip(2) if flipped else image
        assert torch.equal(other, expected)
        if flipped:
            assert torch.equal(same["boxes"][:, 0], 128 - target["boxes"][:, 2])
    assert seen == {False, True}


# Patches


def patches(**options):
    return PedestrianPatchDataModule(drawn(), **{"side": 32, "batch_size": 8, **options})


def test_batches_hold_three_negatives_to_a_positive():
    data = patches(batches=7)
    batches = list(data.train_dataloader())
    assert len(batches) == 7
    for images, labels in batches:
        assert images.shape == (8, 3, 32, 32)
        assert (images.min() >= 0) & (images.max() <= 1)
        assert labels.sum() == 2
    positives = sum(patch.label for patch in data.patches("train"))
    assert len(patches().train_dataloader()) == -(-positives // 2)


def test_every_positive_is_seen_once_before_any_is_seen_twice():
    sampler = OneToThree([1] * 6 + [0] * 30, batch_size=8)
    seen = list(sampler)
    assert sorted(index for index in seen if index < 6) == list(range(6))
    negatives = [index for index in seen if index >= 6]
    assert len(negatives) == len(set(negatives)) == 18
    assert len(sampler) == len(seen) == 24
    for rank in (0, 1):  # two processes take turns
        assert sum(index < 6 for index in seen[rank::2][:8]) == 2


def test_positives_overlap_a_pedestrian_by_more_than_half_and_negatives_do_not():
    data = patches(min_height=20, min_visible=0.65)
    found = data.patches("train")
    labels = {0: 0, 1: 0}
    for patch in found:
        annotations = data.source.images("train")[patch.image].annotations
        boxes, visible = (torch.from_numpy(array) for array in (annotations.boxes, annotations.visible))
        share = torch.where(visible.any(1), visible[:, 2:].prod(1) / boxes[:, 2:].prod(1), torch.tensor(1.0, dtype=torch.float64))
        counts = torch.from_numpy((annotations.labels == 1) & ~annotations.ignore) & (boxes[:, 3] >= 20) & (share >= 0.65)
        corners = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
        x, y, w, h = patch.box
        mine = torch.tensor([[x, y, x + w, y + h]], dtype=torch.float64)
        overlaps = box_iou(mine, corners[counts])
        assert bool((overlaps > 0.5).any()) == bool(patch.label)
        labels[patch.label] += 1
    assert labels[1] > 20
    assert labels[0] > 3 * 12
    assert found == patches(min_height=20).patches("train"), "the same boxes for the same seed"
    assert found != patches(min_height=20, seed=1).patches("train")


def test_patches_in_ignore_regions_are_no_negatives(monkeypatch):
    region = Annotations.of([[0, 0, 128, 96], [40, 20, 20, 50]], labels=[2, 1])
    source = drawn(train_size=1)
    image = source.images("train")[0]._replace(annotations=region)
    monkeypatch.setattr(source, "images", lambda split: [image])
    with pytest.raises(ValueError, match="all of them of one kind"):
        PedestrianPatchDataModule(source).patches("train")


def test_patches_are_a_detector_s_boxes_if_there_are_any(tmp_path):
    folder = caltech(tmp_path / "data")
    names = [f"set{number}_V003_I000{index}" for number in ("00", "05", "10") for index in (29, 59)]
    write_results(tmp_path / "dt", {name: Detections.of([[11, 6, 10, 28, 0.9], [40, 6, 10, 30, 0.5]]) for name in names})
    source = CaltechPedestrianDataModule(folder, train_every=30)
    data = PedestrianPatchDataModule(source, proposals=tmp_path / "dt", min_visible=0.4)
    found = [(patch.image, patch.label, *np.round(patch.box).tolist()) for patch in data.patches("val")]
    one = [(1, 10, 5, 10, 30), (1, 11, 6, 10, 28), (0, 40, 6, 10, 30)]
    assert found == [(image, *rest) for image in (0, 1) for rest in one]
    images, labels = next(iter(data.test_dataloader()))
    assert images.shape == (6, 3, 224, 224)
    assert labels.tolist() == [1, 1, 0] * 2


def test_patches_come_from_photographs_too(data_dir):
    source = CocoPedestrianDataModule(
        data_dir("coco128"), "coco128", "val2017", "annotations/instances_val2017.json", val_annotations=None, val_size=28
    )
    data = PedestrianPatchDataModule(source, min_height=40, side=64, batches=2)
    assert sum(patch.label for patch in data.patches("train")) > 100
    for images, labels in data.train_dataloader():
        assert images.shape == (16, 3, 64, 64)
        assert labels.sum() == 4


def test_warping_is_cutting_and_resizing():
    image = torch.from_numpy(picture(3)).permute(2, 0, 1)
    whole = Image.fromarray(picture(3))
    for box in ((10.0, 5.0, 20.0, 30.0), (0.0, 0.0, 64.0, 48.0)):
        x, y, w, h = (int(number) for number in box)
        expected = np.asarray(whole.crop((x, y, x + w, y + h)).resize((16, 16), Image.Resampling.BILINEAR), dtype=np.float32)
        # Pillow rounds to whole numbers, after each of two passes.
        assert np.abs(255 * warp(image, box, 16).permute(1, 2, 0).numpy() - expected).max() <= 1.01
    beyond = warp(image, (-10.0, -10.0, 10.0, 10.0), 8) * 255
    torch.testing.assert_close(beyond, image[:, :1, :1].float().expand(3, 8, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 6}, "multiple of 4"),
        ({"side": 0}, "`side` must be at least 1"),
        ({"min_visible": 2}, r"`min_visible` must lie in \[0, 1\]"),
        ({"batches": 0}, "`batches` must be at least 1"),
    ],
)
def test_settings_of_patches_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=re.compile(message)):
        patches(**options)
