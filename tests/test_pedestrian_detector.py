"""Detectors of pedestrians: their losses against plain loops, their lives in a Trainer, and what they see of drawn streets."""

import csv
from copy import deepcopy
from math import exp, inf, log

import pytest
import torch
import torchvision
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Trainer
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torchvision.models.vgg import make_layers
from torchvision.ops import box_iou, roi_align

from lit_compress import load_pruned, ranks
from lit_compress.callbacks import PFAPruning, RoIAutoencoder
from lit_compress.cli import main
from lit_compress.datamodules import ProposedPedestrianDataModule, SyntheticPedestrianDataModule
from lit_compress.detection import (
    DetectionLimits,
    FastRCNN,
    RegionProposalNetwork,
    assign_anchors,
    best_detections,
    detection_losses,
    pedestrian_anchors,
    sample_anchors,
)
from lit_compress.detection.backbones import load_backbone, measured
from lit_compress.detection.objective import persons_to_learn
from lit_compress.losses import AttentionTransfer, Hint, ScoreDivergence
from lit_compress.metrics import LogAverageMissRate
from lit_compress.models import AlexNetEncoder, VGGEncoder
from lit_compress.modules import LitPedestrianDetector
from lit_compress.pedestrians import Detections, Subset, write_results
from lit_compress.taps import Taps
from lit_compress.teacher import Teacher
from tests.caltech_files import picture, write_seq, write_vbb

MEAN, STD = (torch.tensor(row).view(3, 1, 1) for row in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))  # ImageNet's
SMALL = Subset(heights=(16.0, inf), bounds=None)
LIMITS = DetectionLimits(min_width=4, min_height=12, before=300)


def streets(**options):
    size = {"size": (64, 96), "heights": (16, 44), "train_size": 8, "val_size": 4, "test_size": 4, "batch_size": 2}
    return SyntheticPedestrianDataModule(**{**size, **options})


def rpn(**options):
    small = {"scales": (0.8, 1.2, 1.7), "image_size": None, "min_height": 16.0, "hidden": 16, "limits": LIMITS}
    return RegionProposalNetwork(VGGEncoder(width=0.125, macro_layers=4), **{**small, **options})


def fast_rcnn(**options):
    small = {"image_size": (128, 192), "min_height": 16.0, "hidden": 16, "pooled": 3, "dropout": 0.0, "limits": LIMITS}
    return FastRCNN(AlexNetEncoder(width=0.125), **{**small, **options})


def trainer(folder, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "num_sanity_val_steps": 0}
    return Trainer(default_root_dir=folder, **{"logger": CSVLogger(folder, "", ""), "max_epochs": 1, **quiet, **options})


def under_features(layers):
    """The state dict of a classification network with these layers."""
    return {f"features.{name}": value for name, value in layers.state_dict().items()}


@pytest.fixture
def proposed(tmp_path):
    """Streets with boxes around each person, and others."""
    source, generator = streets(), torch.Generator().manual_seed(0)
    boxes = {}
    for split in ("train", "val", "test"):
        for image in source.images(split):
            anywhere = torch.rand(6, 2, generator=generator) * torch.tensor([80.0, 40.0])
            rows = torch.cat([anywhere, torch.tensor([[10.0, 24.0]]).expand(6, 2)], dim=1).tolist()
            boxes[image.name] = Detections.of([[*row, 0.5] for row in [*rows, *(image.annotations.boxes + 1).tolist()]])
    write_results(tmp_path / "boxes.json", boxes)
    return ProposedPedestrianDataModule(source, tmp_path / "boxes.json", batch_size=2)


# ---------------------------------------------------------------- losses


def smooth(x):
    return x * x / 2 if abs(x) < 1 else abs(x) - 0.5


def test_the_loss_is_the_written_out_sum():
    generator = torch.Generator().manual_seed(0)
    logits, relative, wanted = (2 * torch.randn(*shape, generator=generator) for shape in [(9,), (9, 4), (9, 4)])
    labels, weights = torch.tensor([1, 0, 0, 1, 0, 1, 0, 0, 0]), torch.rand(9, generator=generator)
    classification, boxes = detection_losses(logits, relative, labels, wanted, weights)
    entropies = [log(1 + exp(-z if y else z)) for z, y in zip(logits.tolist(), labels.tolist(), strict=True)]
    total = sum(weights.tolist())
    assert classification.item() == pytest.approx(sum(w * e for w, e in zip(weights.tolist(), entropies, strict=True)) / total)
    distances = [sum(map(smooth, (relative[i] - wanted[i]).tolist())) for i in (0, 3, 5)]
    assert boxes.item() == pytest.approx(sum(weights[i].item() * d for i, d in zip((0, 3, 5), distances, strict=True)) / total)


def by_hand(image, target, logits, relative, starts, scale, mean, std, weights, size):
    """The loss of one image by loops over boxes; `scale` as a number."""
    boxes, ignore = target["boxes"].clone(), target["ignore"] | (target["labels"] != 1)
    for index, (left, top, right, bottom) in enumerate(boxes.tolist()):
        seen = target["visible"][index]
        area = (right - left) * (bottom - top)
        hidden = seen.any() and (seen[2] - seen[0]) * (seen[3] - seen[1]) < area
        if bottom - top < 16 or hidden:
            ignore[index] = True
        if not ignore[index]:
            middle, half = (left + right) / 2, 0.41 * (bottom - top) / 2
            boxes[index] = torch.tensor([middle - half, top, middle + half, bottom])
    labels, persons = assign_anchors(starts, boxes * scale, ignore, size)
    classification = distance = total = 0.0
    for index, weight in enumerate(weights.tolist()):
        if weight:
            assert labels[index] >= 0
            z = logits[index].item()
            classification += weight * log(1 + exp(-z if labels[index] else z))
            total += weight
            if labels[index]:
                a, b = starts[index].tolist(), (boxes[persons[index]] * scale).tolist()
                w, h = a[2] - a[0], a[3] - a[1]
                numbers = [
                    ((b[0] + b[2]) / 2 - (a[0] + a[2]) / 2) / w,
                    ((b[1] + b[3]) / 2 - (a[1] + a[3]) / 2) / h,
                    log((b[2] - b[0]) / w),
                    log((b[3] - b[1]) / h),
                ]
                standard = [(one - m) / s for one, m, s in zip(numbers, mean, std, strict=True)]
                distance += weight * sum(smooth(o - t) for o, t in zip(relative[index].tolist(), standard, strict=True))
    return classification / total, distance / total


def test_the_rpn_s_loss_is_that_of_plain_loops():
    net = rpn().eval()
    mean, std = [0.1, -0.05, 0.02, 0.2], [0.2, 0.1, 0.3, 0.25]
    net.target_mean.copy_(torch.tensor(mean))
    net.target_std.copy_(torch.tensor(std))
    images, targets = next(iter(streets(batch_size=4).val_dataloader()))
    torch.manual_seed(3)
    found = net.losses(images, targets)
    with torch.no_grad():
        maps = net.backbone((torch.stack(images) - MEAN) / STD)
        hidden = net.conv(maps).relu()
        scores, offsets = net.score(hidden), net.box(hidden)
    starts = pedestrian_anchors(maps.shape[2:], stride=8, scales=(0.8, 1.2, 1.7))
    torch.manual_seed(3)
    parts = []
    for image, target, score, offset in zip(images, targets, scores, offsets, strict=True):
        # Anchors go row by row, and in a cell from the smallest on.
        logits = torch.stack([score[k, y, x] for y in range(8) for x in range(12) for k in range(3)])
        relative = torch.stack([offset[4 * k : 4 * k + 4, y, x] for y in range(8) for x in range(12) for k in range(3)])
        boxes, ignore = persons_to_learn(target, 16.0, 1.0)
        weights = sample_anchors(assign_anchors(starts, boxes, ignore, (64, 96)).labels)  # the same draw
        parts.append(by_hand(image, target, logits, relative, starts, 1.0, mean, std, weights, (64, 96)))
    assert found["classification"].item() == pytest.approx(sum(c for c, _ in parts) / 4, rel=1e-5)
    assert found["boxes"].item() == pytest.approx(5 * sum(d for _, d in parts) / 4, rel=1e-5)
    assert found["boxes"] > 0


def test_fast_rcnn_s_loss_is_that_of_plain_loops(proposed):
    net = fast_rcnn(pool="align").eval()
    images, targets = next(iter(proposed.val_dataloader()))
    torch.manual_seed(3)
    found = net.losses(images, targets)
    torch.manual_seed(3)
    parts = []
    for image, target in zip(images, targets, strict=True):
        persons, ignore = persons_to_learn(target, 16.0, 1.0)
        starts = 2 * torch.cat([target["proposals"], persons[~ignore]])  # (64, 96) becomes (128, 192)
        starts = torch.stack([starts[:, 0].clamp(0, 192), starts[:, 1].clamp(0, 128), starts[:, 2].clamp(0, 192),
                              starts[:, 3].clamp(0, 128)], dim=1)  # fmt: skip
        labels = assign_anchors(starts, 2 * persons, ignore, (128, 192)).labels
        weights = sample_anchors(labels, positives=16, negatives=48, balanced=False)
        assert set(weights.tolist()) <= {0.0, 1.0}
        with torch.no_grad():
            resized = nn.functional.interpolate((image - MEAN)[None] / STD, (128, 192), mode="bilinear")
            maps = net.backbone(resized)
            regions = roi_align(maps, [starts], (3, 3), 1 / 16, sampling_ratio=2, aligned=True).flatten(1)
            hidden = net.fc7(net.fc6(regions).relu()).relu()
            logits, relative = net.score(hidden)[:, 0], net.box(hidden)
        parts.append(by_hand(image, target, logits, relative, starts, 2.0, [0] * 4, [1] * 4, weights, (128, 192)))
    assert found["classification"].item() == pytest.approx(sum(c for c, _ in parts) / 2, rel=1e-5)
    assert found["boxes"].item() == pytest.approx(sum(d for _, d in parts) / 2, rel=1e-5)
    assert found["boxes"] > 0


def test_images_without_anybody_have_a_loss():
    images, _ = next(iter(streets().val_dataloader()))
    empty = {"boxes": torch.empty(0, 4), "labels": torch.empty(0, dtype=torch.int64)}
    parts = rpn().losses(images, [empty, empty])
    assert parts["boxes"] == 0
    assert parts["classification"] > 0
    sum(parts.values()).backward()


def test_images_without_proposals_have_no_detections_and_no_loss():
    nothing = torch.empty(0, 4)
    net, images = fast_rcnn(), [torch.rand(3, 64, 96)] * 2
    assert [len(found["boxes"]) for found in net.eval()(images, [nothing, torch.tensor([[10.0, 10.0, 30.0, 58.0]])])] == [0, 1]
    parts = net.train().losses(images, [{"boxes": nothing, "proposals": nothing}] * 2)
    assert parts["classification"] == parts["boxes"] == 0
    sum(parts.values()).backward()


def test_who_is_small_or_hidden_is_an_ignore_region_of_the_size_it_has():
    target = {
        "boxes": torch.tensor([[0.0, 0, 61, 100], [0, 0, 61, 40], [0, 0, 61, 100], [0, 0, 61, 100], [0, 0, 61, 100]]),
        "visible": torch.tensor([[0.0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 61, 80], [0, 0, 0, 0], [0, 0, 61, 100]]),
        "labels": torch.tensor([1, 1, 1, 2, 1]),
    }
    boxes, ignore = persons_to_learn(target, 50.0, 1.0)
    assert ignore.tolist() == [False, True, True, True, False]
    assert boxes[0].tolist() == [10.0, 0.0, 51.0, 100.0]
    assert torch.equal(boxes[ignore], target["boxes"][ignore])
    assert persons_to_learn(target, 50.0, 0.8)[1].tolist() == [False, True, False, True, False]


# ---------------------------------------------------------------- images in, detections out


def test_an_image_is_seen_alike_alone_and_beside_a_larger_one():
    """Padding: as many cells of stride 8 belong to the small image, which are those that it has alone."""
    net = rpn(hidden=8).eval()
    net.backbone = nn.Conv2d(3, net.channels, 8, stride=8)  # without a border, so that the padding is not seen
    net.conv = nn.Conv2d(net.channels, 8, 1)
    nn.init.normal_(net.score.weight)
    small, large = torch.rand(3, 64, 96), torch.rand(3, 80, 120)
    (alone,), beside = net([small]), net([small, large])
    for name, value in alone.items():
        torch.testing.assert_close(beside[0][name], value)
    assert len(beside) == 2
    targets = [{"boxes": torch.tensor([[20.0, 10.0, 34.0, 44.0]])}, {"boxes": torch.tensor([[90.0, 30.0, 106.0, 70.0]])}]
    starts, wanted = net._wanted(net._enter([small, large]), (10, 15), targets)
    middle = (starts[0][:, :2] + starts[0][:, 2:]) / 2
    assert (wanted[0].labels[(middle[:, 0] > 96) | (middle[:, 1] > 64)] == -1).all()
    assert (wanted[1].labels >= 0).all() or (wanted[1].labels == -1).sum() < 10


def test_boxes_come_back_in_the_pixels_of_the_image():
    """A network that says only "here, and as the anchor is" at one cell of an image enlarged by 1.5."""
    net = rpn(image_size=(96, 200), scales=(1.0,)).eval()
    for layer in (net.score, net.box):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    net.target_std.fill_(0.5)
    net.read = lambda maps, starts, chosen: (torch.arange(len(starts[0])).float().eq(5 * 18 + 7) * 9.0 - 4, torch.zeros(216, 4))
    (found,) = net([torch.rand(3, 64, 96)])
    # Cell (5, 7) of stride 8: its middle is at 60 across and 44 down, and 1.5 pixels are one of the image.
    expected = torch.tensor([60 - 5, 44 - 12, 60 + 5, 44 + 12]) / 1.5
    torch.testing.assert_close(found["boxes"][0], expected)
    assert found["scores"][0].item() == pytest.approx(1 / (1 + exp(-5)))
    assert len(found["boxes"]) <= 40


def test_pixels_are_single_precision_at_least():
    net = rpn().eval().to(torch.bfloat16)
    (found,) = net([torch.rand(3, 64, 96).bfloat16()])
    assert found["boxes"].dtype == torch.float32


@pytest.mark.parametrize(
    ("build", "channels", "stride"),
    [
        (lambda: VGGEncoder(width=0.125), 64, 16),
        (lambda: VGGEncoder(width=0.125, macro_layers=4), 64, 8),
        (lambda: AlexNetEncoder(width=0.25), 64, 16),
        (lambda: torchvision.models.mobilenet_v3_small(weights=None).features[:9], 48, 16),
        (lambda: nn.Sequential(*list(torchvision.models.resnet18(weights=None).children())[:-3]), 256, 16),
    ],
)
def test_any_backbone_is_measured(build, channels, stride):
    backbone = build().train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    assert measured(backbone) == (channels, stride)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert all(module.training for module in backbone.modules())


def test_the_encoders_are_the_published_networks():
    """Their convolutions; the batch norms are T1's."""
    for encoder, published in ((VGGEncoder, torchvision.models.vgg16), (AlexNetEncoder, torchvision.models.alexnet)):
        with torch.device("meta"):
            theirs = published(weights=None).features
            ours = [module for module in encoder().modules() if isinstance(module, nn.Conv2d)]
        for one, other in zip(ours, (module for module in theirs if isinstance(module, nn.Conv2d)), strict=True):
            assert (one.weight.shape, one.stride, one.padding) == (other.weight.shape, other.stride, other.padding)
    assert [name for name, _ in VGGEncoder(width=0.1).named_children()][-2:] == ["pool4", "macro5"]


def test_a_frozen_vgg_is_the_classifier_it_came_from(tmp_path):
    theirs = make_layers([8, 8, "M", 16, 16, "M", 32, 32, 32, "M", 64, 64, 64, "M", 64, 64, 64, "M"]).eval()  # VGG-16, thin
    torch.save(under_features(theirs), tmp_path / "vgg16.pth")
    net = RegionProposalNetwork(VGGEncoder(width=0.125), hidden=16)
    detector = LitPedestrianDetector(net, weights=tmp_path / "vgg16.pth").train()
    image = torch.rand(2, 3, 64, 64)
    with Taps(net.backbone, ["pool2"]).reading() as found:
        net.backbone(image)
    # Batch norms that have seen nothing change nothing but for their ε of 1e-5, and frozen ones never see anything.
    torch.testing.assert_close(found["pool2"], theirs[:10](image), rtol=1e-4, atol=1e-6)
    assert net.frozen == ("macro1", "macro2")
    fixed = {name for name, parameter in net.backbone.named_parameters() if not parameter.requires_grad}
    assert {name.split(".")[0] for name in fixed} == {"macro1", "macro2"}
    assert not net.backbone.macro2.bn2.training
    assert net.backbone.macro3.bn3.training
    assert detector.net.backbone.macro5.conv5_3.weight.equal(theirs[28].weight)


def test_without_weights_nothing_is_frozen_and_that_is_said(caplog):
    with caplog.at_level("INFO", logger="pytorch_lightning"):  # which says it, at whatever level another test left it
        detector = LitPedestrianDetector(rpn())
    assert "none of its layers is frozen" in caplog.text
    assert all(parameter.requires_grad for parameter in detector.parameters())
    chosen = LitPedestrianDetector(rpn(), frozen=["macro1"])
    assert not chosen.net.backbone.macro1.conv1_1.weight.requires_grad


def test_weights_of_a_trained_detector_s_backbone_are_taken(tmp_path):
    trained = LitPedestrianDetector(rpn())
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "trained.ckpt")
    torch.save(trained.net.backbone.state_dict(), tmp_path / "backbone.pth")
    for file in ("trained.ckpt", "backbone.pth"):
        fresh = VGGEncoder(width=0.125, macro_layers=4)
        load_backbone(fresh, tmp_path / file)
        assert fresh.macro4.conv4_2.weight.equal(trained.net.backbone.macro4.conv4_2.weight)
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match="do not fit"):
        load_backbone(VGGEncoder(width=0.125), tmp_path / "other.pth")
    normed = {
        f"features.{name}": value for name, value in torchvision.models.vgg11_bn(weights=None).features.state_dict().items()
    }
    torch.save(normed, tmp_path / "normed.pth")
    with pytest.raises(ValueError, match=r"16 layers under `features.` and the encoder has 13"):
        load_backbone(VGGEncoder(), tmp_path / "normed.pth")
    with pytest.raises(ValueError, match=r"Weight of `features.0` is \(64, 3, 11, 11\) but that of `macro1.conv1` \(8"):
        AlexNetEncoder(width=0.125).load_classifier(torchvision.models.alexnet(weights=None).state_dict())


# ---------------------------------------------------------------- in a Trainer


def test_boxes_are_standardised_by_the_training_images(tmp_path):
    data = streets(batch_size=3, augment=False)
    detector = LitPedestrianDetector(rpn(), subset=SMALL, pictures=0)
    trainer(tmp_path, max_epochs=1, limit_train_batches=1, logger=False, enable_checkpointing=False).fit(detector, data)
    starts = pedestrian_anchors((8, 12), stride=8, scales=(0.8, 1.2, 1.7)).double()
    rows = []
    for _, targets in data.analysis_dataloader():
        for target in targets:
            boxes, ignore = persons_to_learn(target, 16.0, 1.0)
            labels, persons = assign_anchors(starts, boxes.double(), ignore, (64, 96))
            for a, b in zip(starts[labels == 1], boxes.double()[persons[labels == 1]], strict=True):
                w, h = a[2] - a[0], a[3] - a[1]
                move = [(b[0] + b[2] - a[0] - a[2]) / 2 / w, (b[1] + b[3] - a[1] - a[3]) / 2 / h]
                rows.append(torch.stack([*move, ((b[2] - b[0]) / w).log(), ((b[3] - b[1]) / h).log()]))
    rows = torch.stack(rows)
    torch.testing.assert_close(detector.net.target_mean.double(), rows.mean(0), rtol=1e-4, atol=1e-5)  # float32 boxes
    torch.testing.assert_close(detector.net.target_std.double(), rows.std(0, correction=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["rpn", "fast_rcnn"])
def test_a_detector_trains_is_scored_and_drawn(kind, tmp_path, proposed, request):
    data = streets() if kind == "rpn" else proposed
    detector = LitPedestrianDetector({"rpn": rpn, "fast_rcnn": fast_rcnn}[kind](), subset=SMALL, pictures=3)
    run = trainer(tmp_path, max_epochs=2)
    run.fit(detector, data)
    assert {"train/loss", "train/classification", "train/boxes", "val/miss_rate"} <= run.callback_metrics.keys()
    logged = run.callback_metrics
    torch.testing.assert_close(logged["train/loss"], logged["train/classification"] + logged["train/boxes"])
    for name in ("val_detections", "val_curve"):
        assert (tmp_path / "compress" / f"{name}.png").stat().st_size > 1000
    by_hand = LogAverageMissRate(SMALL)
    for images, targets in data.val_dataloader():
        given = [target["proposals"] for target in targets] if kind == "fast_rcnn" else None
        by_hand.update(detector.eval()(images, given), targets)
    assert logged["val/miss_rate"].item() == pytest.approx(by_hand.compute().item(), rel=1e-6)
    run.test(detector, data, verbose=False)
    assert "test/miss_rate" in run.callback_metrics
    found = run.predict(detector, data)
    assert [len(batch) for batch in found] == [2, 2]


def test_proposals_are_mirrored_with_their_image(proposed):
    proposed.augment = True
    torch.manual_seed(0)
    turned = 0
    plain = {target["image_id"]: target for _, batch in proposed.analysis_dataloader() for target in batch}
    for _, batch in proposed.train_dataloader():
        for target in batch:
            boxes, before = target["proposals"], plain[target["image_id"]]["proposals"]
            if not torch.equal(boxes, before):
                turned += 1
                torch.testing.assert_close(
                    boxes, torch.stack([96 - before[:, 2], before[:, 1], 96 - before[:, 0], before[:, 3]], 1)
                )
    assert 0 < turned < 8


def test_a_run_goes_on_with_the_deviations_that_it_has_measured(tmp_path):
    first = trainer(tmp_path / "first", logger=False)
    first.fit(LitPedestrianDetector(rpn(), subset=SMALL, pictures=0), streets())
    checkpoint = first.checkpoint_callback.best_model_path
    seen = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert seen["measured"]
    loaded = LitPedestrianDetector.load_from_checkpoint(checkpoint, net=rpn(), subset=SMALL)
    assert loaded.pictures == 0
    assert all(torch.equal(value, seen[name]) for name, value in loaded.state_dict().items())
    resumed = LitPedestrianDetector(rpn(), subset=SMALL, pictures=0)
    more = trainer(tmp_path / "more", max_epochs=2, logger=False)
    more.fit(resumed, streets(seed=1), ckpt_path=checkpoint)  # other streets, with other deviations
    assert more.global_step == 8
    assert torch.equal(resumed.net.target_std, seen["net.target_std"])
    assert not torch.equal(resumed.net.score.weight, seen["net.score.weight"])


@pytest.mark.parametrize("image_size", [None, (128, 256)])
def test_boxes_are_reconstructed_where_the_backbone_sees_them(image_size, tmp_path):
    """Of images of two sizes, drawn as the boxes themselves: what the backbone gets is bright just there."""
    net = rpn(image_size=image_size)
    net.colours = torch.nn.Identity()
    boxes = [torch.tensor([[8.0, 16.0, 24.0, 48.0]]), torch.tensor([[40.0, 8.0, 60.0, 28.0]])]
    images = [torch.zeros(3, 64, 96), torch.zeros(3, 32, 64)]
    for image, ((left, top, right, bottom),) in zip(images, boxes, strict=True):
        image[:, int(top) : int(bottom), int(left) : int(right)] = 1
    detector = LitPedestrianDetector(net, pictures=0)
    moved = detector.roi_boxes((images, [{"boxes": of_image} for of_image in boxes]))
    entered = net._enter(images).images
    for image, ((left, top, right, bottom),) in zip(entered, moved, strict=True):
        within = torch.zeros_like(image)
        within[:, int(top) : int(bottom), int(left) : int(right)] = 1
        assert within.any()
        for side in (1, 2):  # resized, edges are blurred but stay where they are, and corners are rounded off
            assert (image.amax(side) > 0.5).equal(within.amax(side) > 0.5)


def test_a_detector_is_trained_with_an_autoencoder_that_leaves_nothing_behind(tmp_path):
    layers = ["net.backbone.macro2", "net.backbone.macro3", "net.backbone.macro4"]
    detector = LitPedestrianDetector(rpn(image_size=(80, 160)), subset=SMALL, pictures=0)
    keys = list(detector.state_dict())
    run = trainer(tmp_path, callbacks=[RoIAutoencoder(layers, balance=0.1)])
    run.fit(detector, streets())
    assert {f"train/roiae/{name}" for name in (*layers[1:], "end_to_end")} <= run.callback_metrics.keys()
    assert all(run.callback_metrics[f"train/roiae/{name}"] > 0 for name in (*layers[1:], "end_to_end"))
    assert list(detector.state_dict()) == keys
    assert list(tmp_path.rglob("roiae_reconstructions_*.png"))


def test_a_detector_is_pruned_in_a_run(tmp_path):
    detector = LitPedestrianDetector(rpn(), subset=SMALL, pictures=0)
    before = sum(parameter.numel() for parameter in detector.net.parameters())
    run = trainer(tmp_path, max_epochs=2, callbacks=[PFAPruning(keep_params=0.6, at_epoch=1)])
    run.fit(detector, streets(train_size=80))
    after = sum(parameter.numel() for parameter in detector.net.parameters())
    assert after <= 0.6 * before
    assert detector.net.score.weight.shape[0] == 3  # a channel an anchor, as it was
    assert detector.net.box.weight.shape[0] == 12
    assert detector.net.backbone.macro1.conv1_1.weight.shape[0] < 8 or detector.net.conv.weight.shape[0] < 16
    again = load_pruned(LitPedestrianDetector(rpn(), subset=SMALL), run.checkpoint_callback.best_model_path).eval()
    images, _ = next(iter(streets().test_dataloader()))
    for one, other in zip(detector.eval()(images), again(images), strict=True):
        torch.testing.assert_close(one, other)


def test_a_pruned_detector_learns_from_the_unpruned_one_scores_and_reloads(tmp_path):
    terms = [ScoreDivergence("score", weight=4.0), Hint("box"), AttentionTransfer(["backbone.macro4"])]
    detector = LitPedestrianDetector(rpn(), subset=SMALL, pictures=0)
    before = sum(parameter.numel() for parameter in detector.net.parameters())
    pruning = PFAPruning(keep_params=0.6, at_epoch=1, distill_from_unpruned=terms)
    run = trainer(tmp_path, max_epochs=2, callbacks=[pruning])
    data = streets(train_size=80)
    run.fit(detector, data)
    assert sum(parameter.numel() for parameter in detector.net.parameters()) <= 0.6 * before
    learnt = {name for name in run.callback_metrics if name.startswith("train/unpruned/")}
    assert learnt == {f"train/unpruned/{name}" for name in ("score_divergence", "hint", "attention_transfer/backbone.macro4")}
    assert all(run.callback_metrics[name] > 0 for name in learnt)
    (scored,) = run.test(detector, data, verbose=False)
    path = run.checkpoint_callback.best_model_path
    again = LitPedestrianDetector.load_from_checkpoint(path, net=rpn(), subset=SMALL).eval()
    assert trainer(tmp_path / "again").test(again, data, verbose=False) == [scored]
    images, _ = next(iter(data.test_dataloader()))
    for one, other in zip(detector.eval()(images), again(images), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("at_epoch", "text"), [(1, "'net' gives, but that is a dict and no tensor"), (0, "gives a dict")])
def test_a_detectors_output_cannot_be_softened_which_is_said_with_the_way_out(at_epoch, text, tmp_path):
    """At once; where the cut comes before any step, in the first one."""
    detector = LitPedestrianDetector(rpn(), subset=SMALL, pictures=0)
    pruning = PFAPruning(keep_params=0.6, at_epoch=at_epoch, distill_from_unpruned=True)
    run = trainer(tmp_path, max_epochs=2, callbacks=[pruning])
    with pytest.raises(MisconfigurationException, match=rf"`distill_from_unpruned`.* {text}.*[Nn]ame.* layer"):
        run.fit(detector, streets(train_size=80))
    assert run.global_step == 0


def test_a_teacher_looks_at_the_boxes_that_its_student_draws(proposed):
    net = fast_rcnn(positives=1, negatives=2).eval()
    teacher = Teacher(deepcopy(net), ["score", "box"])
    images, targets = next(iter(proposed.val_dataloader()))
    drawn = []
    for _ in range(8):
        theirs = teacher.read(images, targets=targets)
        with Taps(net, ["score", "box"]).reading() as ours:
            net(images, targets=targets)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        drawn.append(ours["score"].tolist())
    assert any(one != drawn[0] for one in drawn), "nothing was drawn"


def test_a_fast_rcnn_is_pruned_in_a_run(tmp_path, proposed):
    detector = LitPedestrianDetector(fast_rcnn(), subset=SMALL, pictures=0)
    before = sum(parameter.numel() for parameter in detector.net.parameters())
    trainer(tmp_path, max_epochs=2, callbacks=[PFAPruning(keep_params=0.8, at_epoch=1)]).fit(detector, proposed)
    assert sum(parameter.numel() for parameter in detector.net.parameters()) <= 0.8 * before
    assert detector.net.box.weight.shape[0] == 4


def train_on_ranks(folder):
    size = ranks.world_size()
    several = {"strategy": "ddp", "devices": size} if size > 1 else {}
    torch.manual_seed(0)
    detector = LitPedestrianDetector(rpn(), subset=SMALL, pictures=2)
    run = trainer(folder, logger=CSVLogger(folder, "", ""), **several)
    run.fit(detector, streets(val_size=5))  # an odd one: the sampler repeats an image
    return {name: value.detach() for name, value in detector.net.state_dict().items()}, run.callback_metrics[
        "val/miss_rate"
    ].item()


def test_two_processes_are_one_detector(processes, tmp_path):
    alone, _ = train_on_ranks(tmp_path / "one")
    (first, rate), (second, other) = processes(2)(train_on_ranks, tmp_path / "two")
    assert rate == other
    for name, value in first.items():
        assert "running" in name or torch.equal(value, second[name]), name
    # Each box once, of images that no rank has twice.
    torch.testing.assert_close(first["target_mean"], alone["target_mean"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(first["target_std"], alone["target_std"], rtol=1e-5, atol=1e-6)
    assert (tmp_path / "two" / "compress" / "val_detections.png").exists()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rpn(image_size=(96, 64)), r"`image_size` must be a short side and a longest long side but got \(96, 64\)"),
        (lambda: rpn(positives=0), "must be at least 1 but got 0 and 100"),
        (lambda: rpn(min_visible=2.0), r"`min_visible` must lie in \[0, 1\] but got 2"),
        (lambda: rpn(box_weight=-1.0), "`box_weight` must be 0 or more but got -1"),
        (lambda: rpn(scales=()), "at least one scale"),
        (lambda: fast_rcnn(pool="mean"), '"max" or "align"'),
        (lambda: fast_rcnn().eval()([torch.rand(3, 64, 96)]), "give `proposals`"),
        (lambda: RegionProposalNetwork(nn.Sequential(nn.Flatten(), nn.LazyLinear(3))), "must give one feature map"),
        (lambda: RegionProposalNetwork(nn.Conv2d(3, 4, 3, stride=(1, 2), padding=1)), "must have one stride"),
        (lambda: rpn().freeze(["macro9"]), r"no layers \['macro9'\] to freeze"),
        (lambda: LitPedestrianDetector(rpn(), measured_on=0), "`measured_on` must be at least 1"),
        (lambda: LitPedestrianDetector(rpn(), subset="tall"), "one of reasonable"),
        (lambda: VGGEncoder(macro_layers=6), "1 to 5 but got 6"),
        (lambda: VGGEncoder(width=0.001), "a filter of its 64"),
        (lambda: AlexNetEncoder(width=0.001), "a filter of its 64"),
        (lambda: rpn().measure_targets([]), "gave 0 boxes with a pedestrian"),
    ],
)
def test_says_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------- from the command line


QUIET = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]


@pytest.mark.parametrize(
    ("name", "also"),
    [("pedestrians_synthetic", []), ("roiae_synthetic", ["--trainer.callbacks.init_args.draw_every_n_epochs=1"])],
)
def test_the_configs_train_on_streets_with_pictures(name, also, root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = root / "configs" / f"{name}.yaml"
    few = ["--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1", "--data.train_size=16", "--data.val_size=4", *also]
    main(["fit", "--config", str(config), *few, *QUIET])
    (run,) = (tmp_path / "lit_compress_runs" / name).iterdir()
    logged = (run / "metrics.csv").read_text()
    assert "val/miss_rate" in logged
    assert (run / "compress" / "val_detections.png").stat().st_size > 1000
    assert ("train/roiae/end_to_end" in logged) is bool(also)
    assert len(list(run.glob("compress/roiae_reconstructions_*.png"))) == len(also)
    (checkpoint,) = (run / "checkpoints").iterdir()
    main(["test", "--config", str(config), *few, "--data.test_size", "4", *QUIET, "--ckpt_path", str(checkpoint)])
    assert "test/miss_rate" in capsys.readouterr().out


@pytest.mark.long
def test_the_config_beats_a_blind_detector_by_far(root, tmp_path, monkeypatch):
    """Blind: the same boxes in each image, each scored by how often a person is there in training."""
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", str(root / "configs" / "pedestrians_synthetic.yaml"), *QUIET])
    (logged,) = (tmp_path / "lit_compress_runs").rglob("metrics.csv")
    with logged.open() as stream:
        seen = min(float(row["val/miss_rate"]) for row in csv.DictReader(stream) if row["val/miss_rate"])
    data = streets(size=(96, 128), heights=(16, 64), train_size=400, val_size=150)
    boxes = pedestrian_anchors((24, 32), stride=4, scales=tuple(0.8 * 1.15**step for step in range(10)))
    often = torch.zeros(len(boxes))
    for _, targets in data.analysis_dataloader():
        for target in targets:
            persons, ignore = persons_to_learn(target, 20.0, 0.65)
            if not ignore.all():
                often += (box_iou(boxes, persons[~ignore]) >= 0.5).any(dim=1)
    kept = best_detections(boxes, often, min_width=0, min_height=0)
    blind = LogAverageMissRate(Subset(heights=(20.0, inf), bounds=None))
    for images, targets in data.val_dataloader():
        blind.update([{"boxes": boxes[kept], "scores": often[kept]} for _ in images], targets)
    assert blind.compute() > 0.9
    assert seen < 0.45


@pytest.fixture
def caltech(tmp_path):
    """A few frames of each split in Caltech's own formats, and boxes of a detector for them."""
    for name in ("set00", "set05", "set06"):
        frames = 30
        write_seq(tmp_path / "caltech" / name / "V000.seq", [picture(index, 96, 64) for index in range(frames)])
        person = ("person", 1, [[30 + index, 6, 22, 52] for index in range(frames)], [[0, 0, 0, 0]] * frames)
        write_vbb(tmp_path / "caltech" / "annotations" / name / "V000.vbb", frames, [person])
        boxes = {f"{name}_V000_I{index:05d}": Detections.of([[31 + index, 7, 22, 50, 1.0]]) for index in range(frames)}
        write_results(tmp_path / "acf", boxes)
    return tmp_path


@pytest.mark.parametrize("name", ["rpn", "fast_rcnn"])
def test_the_caltech_configs_start(name, root, caltech, monkeypatch):
    monkeypatch.chdir(caltech)
    net = "--model.net.init_args"
    thin = ["--trainer.fast_dev_run", "true", f"{net}.backbone.init_args.width", "0.125", f"{net}.hidden", "8"]
    thin += [f"{net}.image_size", "[128,192]", "--data.num_workers", "0"]
    folder = "--data.data_dir" if name == "rpn" else "--data.source.init_args.data_dir"
    main(["fit", "--config", str(root / "configs" / f"pedestrians_caltech_{name}.yaml"), *thin, folder, str(caltech), *QUIET])
