"""Caltech's evaluation: against the authors' toolbox, its published scores, and the same written as plain loops."""

import json
import math
import pickle
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import loadmat
from torch import nn
from torchmetrics import Metric

from lit_compress.metrics import LogAverageMissRate
from lit_compress.pedestrians import SUBSETS, Scenes, Subset, evaluate, plot_miss_rates, protocol
from lit_compress.pedestrians.protocol import REFERENCE_FPPI, ignored, match

REFERENCE = json.loads((Path(__file__).parent / "reference" / "caltech_eval.json").read_text(encoding="utf-8"))
FROM_ONE = np.array([1.0, 1.0, 0.0, 0.0])  # the toolbox counts pixels from 1
SETTINGS = {"All": "all", "Ar_typical": "aspect_typical", "Expand_100": "expand_100"}


def rows(image, columns):
    return np.asarray(image, dtype=np.float64).reshape(-1, columns)


def flat(lists):
    return [entry for one in lists for entry in one]


def inputs(truths, detections):
    """The metric's inputs, of rows [x y w h ignore] and [x y w h score] an image."""
    truths, detections = ([torch.from_numpy(rows(image, 5)) for image in images] for images in (truths, detections))
    return (
        [{"boxes": image[:, :4], "scores": image[:, 4]} for image in detections],
        [{"boxes": image[:, :4], "ignore": image[:, 4] != 0, "image_id": index} for index, image in enumerate(truths)],
    )


def miss_rate(truths, detections, subset=None, **options):
    metric = LogAverageMissRate(subset, box_format="xywh", **options)
    metric.update(*inputs(truths, detections))
    return float(metric.compute())


def caltech(subset):
    """The reference's raw annotations and detections as scenes."""
    raw, detections = REFERENCE["full_protocol_input"]["raw"], REFERENCE["full_protocol_input"]["det"]
    truth, found = (np.concatenate([rows(i, columns) for i in images]) for images, columns in ((raw, 9), (detections, 5)))
    return Scenes(
        truths=truth[:, 1:5] - FROM_ONE,
        truth_counts=np.array([len(image) for image in raw]),
        detections=found[:, :4] - FROM_ONE,
        scores=found[:, 4],
        detection_counts=np.array([len(image) for image in detections]),
        labels=truth[:, 0].astype(int) + 1,
        visible=truth[:, 5:] - FROM_ONE * truth[:, 5:].any(axis=1, keepdims=True),
    )


def drawn(seed, images=12, coarse=False):
    """Random rows of both kinds; coarse ones lie on a grid, so that overlaps and scores tie."""
    generator = np.random.default_rng(seed)
    truths, detections = [], []
    for _ in range(images):
        boxes = np.concatenate([generator.uniform(0, 60, (6, 2)), generator.uniform(10, 50, (6, 2))], axis=1)
        found = boxes[generator.integers(0, 6, 9)] + generator.normal(0, 4, (9, 4))
        found[:, 2:] = np.maximum(found[:, 2:], 5)
        if coarse:
            boxes, found = (np.maximum(np.round(array / 10), 1) * 10 for array in (boxes, found))
        known = generator.integers(0, 7)
        truths.append(np.column_stack([boxes[:known], generator.random(known) < 0.4]))
        scores = generator.integers(0, 4, 9) if coarse else generator.random(9)
        detections.append(np.column_stack([found, scores])[: generator.integers(0, 10)])
    return truths, detections


def by_loops(truths, detections, least=0.5):
    """The evaluation as the toolbox writes it: a loop over detections in a loop over images."""
    flags, scores, persons = [], [], 0
    for truth, detection in zip(truths, detections, strict=True):
        truth = truth[np.argsort(truth[:, 4], kind="stable")]
        detection = detection[np.argsort(-detection[:, 4], kind="stable")]
        persons += int((truth[:, 4] == 0).sum())
        taken = [False] * len(truth)
        for x, y, w, h, score in detection:
            best, chosen = least, None
            for index, (tx, ty, tw, th, ignore) in enumerate(truth):
                if taken[index] and not ignore:
                    continue
                if chosen is not None and not truth[chosen, 4] and ignore:
                    break
                shared = max(min(x + w, tx + tw) - max(x, tx), 0) * max(min(y + h, ty + th) - max(y, ty), 0)
                overlap = shared / (w * h if ignore else w * h + tw * th - shared)
                if overlap >= best and overlap > 0:
                    best, chosen = overlap, index
            if chosen is not None:
                taken[chosen] = True
            if chosen is None or not truth[chosen, 4]:
                flags.append(chosen is not None)
                scores.append(score)
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    rates = []
    for reference in REFERENCE_FPPI:
        found = wrong = 0
        rate = 1.0
        for index in order:
            found, wrong = found + flags[index], wrong + (not flags[index])
            if wrong / len(truths) <= reference:
                rate = 1 - found / persons
        rates.append(rate)
    return 0.0 if min(rates) == 0 else math.exp(sum(math.log(rate) for rate in rates) / 9)


@pytest.mark.parametrize("case", REFERENCE["matching_level"])
def test_matching_is_the_toolbox_s(case):
    given, expected = REFERENCE["matching_level"][case]["input"], REFERENCE["matching_level"][case]["result"]
    metric = LogAverageMissRate(None, box_format="xywh")
    metric.update(*inputs(given["gt"], given["dt"]))
    assert float(metric.compute()) == pytest.approx(expected["lamr_matlab"], abs=1e-9)
    np.testing.assert_allclose(1 - metric.curve.at_reference, expected["tpr_at_ref_matlab"], atol=1e-9)
    assert metric.curve.persons == expected["n_valid_gt"]
    assert metric.curve.images == given["n_images"]
    matches = match(metric._scenes(), metric.subset)
    assert matches.detections.tolist() == flat(expected["dt_match_codes_sorted"])
    if "gt_match_codes_sorted" in expected:  # persons first in each image
        assert sorted(matches.truths) == sorted(flat(expected["gt_match_codes_sorted"]))


@pytest.mark.parametrize("case", SETTINGS)
def test_the_whole_chain_is_the_toolbox_s(case):
    expected, scenes, subset = REFERENCE["full_protocol"][case], caltech(case), SETTINGS[case]
    assert ignored(scenes, subset).astype(int).tolist() == flat(expected["gt_ignore_flags"])
    assert match(scenes, subset).detections.tolist() == flat(expected["dt_match_codes_sorted"])
    curve = evaluate(scenes, subset)
    assert curve.log_average == pytest.approx(expected["lamr"], abs=1e-9)
    assert curve.persons == expected["n_valid_gt"]
    np.testing.assert_allclose(1 - curve.at_reference, expected["tpr_at_ref"], atol=1e-9)


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("box_format", ["xyxy", "xywh"])
def test_labels_and_visible_boxes_reach_the_metric(case, box_format):
    scenes, metric = caltech(case), LogAverageMissRate(SETTINGS[case], box_format=box_format)

    def boxes(array):
        array = torch.from_numpy(array)
        return array if box_format == "xywh" else torch.cat([array[:, :2], array[:, :2] + array[:, 2:]], dim=1)

    truths, detections = scenes.truth_counts.tolist(), scenes.detection_counts.tolist()
    preds = zip(boxes(scenes.detections).split(detections), torch.from_numpy(scenes.scores).split(detections), strict=True)
    targets = zip(
        boxes(scenes.truths).split(truths),
        torch.from_numpy(scenes.labels).split(truths),
        boxes(scenes.visible).split(truths),
        strict=True,
    )
    metric.update(
        [dict(zip(("boxes", "scores"), image, strict=True)) for image in preds],
        [dict(zip(("boxes", "labels", "visible"), image, strict=True)) for image in targets],
    )
    assert float(metric.compute()) == pytest.approx(REFERENCE["full_protocol"][case]["lamr"], abs=1e-9)


@pytest.mark.parametrize(("detector", "published"), [("ACF-Caltech", 0.442191), ("ACF+SDt", 0.373410)])
def test_published_detectors_score_what_is_published(detector, published, data_dir):
    """On the original annotations of the 4,024 test frames; the figures are those of the authors' dbEval, to six digits."""
    folder = data_dir("caltech") / "caltech"
    truths = loadmat(folder / "gt-Reasonable-original.mat")["gt"].ravel()
    detections = loadmat(folder / f"dt-{detector}.mat")["dt"].ravel()
    assert miss_rate(truths, detections, SUBSETS["reasonable"].as_marked()) == pytest.approx(published, abs=5e-7)
    assert (folder / "UsaTestRocReasonable.txt").read_text().find(f"{detector} {published:.6f}") >= 0


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), coarse=st.booleans())
def test_it_is_what_plain_loops_find(seed, coarse):
    truths, detections = drawn(seed, coarse=coarse)
    if any((truth[:, 4] == 0).any() for truth in truths):
        assert miss_rate(truths, detections) == pytest.approx(by_loops(truths, detections), abs=1e-12)


def test_crowded_images_are_compared_in_pieces(monkeypatch):
    truths, detections = drawn(3, images=30, coarse=True)
    whole = miss_rate(truths, detections)
    monkeypatch.setattr(protocol, "_PAIRS", 7)
    assert miss_rate(truths, detections) == whole


@settings(max_examples=20)
@given(order=st.permutations(range(12)), size=st.integers(1, 12))
def test_order_and_batches_of_images_are_of_no_account(order, size):
    truths, detections = drawn(5, coarse=True)  # with scores that tie
    expected = miss_rate(truths, detections)
    preds, targets = inputs(truths, detections)
    metric = LogAverageMissRate(None, box_format="xywh")
    order = [*order, *order[:3]]  # as a distributed sampler repeats some
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        metric.update([preds[index] for index in batch], [targets[index] for index in batch])
    assert float(metric.compute()) == expected
    assert metric.curve.images == 12


def of_rank(rank_images, truths, detections, named):
    """What every rank computes that has seen some of the images, and what it still holds."""
    metric = LogAverageMissRate(None, box_format="xywh")
    preds, targets = inputs(truths, detections)
    if not named:
        targets = [{name: value for name, value in target.items() if name != "image_id"} for target in targets]
    mine = rank_images[torch.distributed.get_rank()]
    for index in mine:
        metric.update([preds[index]], [targets[index]])
    if not mine:
        metric.update([], [])
    value = float(metric.compute())
    return value, metric.curve.images, sum(map(len, metric.images))


@pytest.mark.parametrize("shares", [(range(0, 12, 2), range(1, 12, 2)), (range(12), range(0)), (range(7), range(5, 12))], ids=str)
@pytest.mark.parametrize("named", [True, False])
def test_two_ranks_are_one(shares, named, processes):
    truths, detections = drawn(8, coarse=named)  # without ids, scores must not tie
    shares = [list(share) for share in shares]
    if not named and set(shares[0]) & set(shares[1]):
        pytest.skip("repeated images are known by their ids")
    for rank, (value, images, held) in enumerate(processes(2)(of_rank, shares, truths, detections, named)):
        assert value == miss_rate(truths, detections)
        assert images == 12
        assert held == len(shares[rank]), "the gathered states are let go again"


def test_without_detections_all_are_missed():
    truths, _ = drawn(1)
    assert miss_rate(truths, [[]] * len(truths)) == 1.0


def test_without_persons_there_is_no_miss_rate():
    truths, detections = drawn(1)
    with pytest.warns(UserWarning, match="No annotated person counts"):
        assert math.isnan(miss_rate([truth[truth[:, 4] == 1] for truth in truths], detections))
    with pytest.warns(UserWarning, match="No annotated person counts"):
        assert math.isnan(miss_rate([[], []], [[], []]))
    with pytest.raises(ValueError, match="at least 1 image but has none"):
        LogAverageMissRate().compute()


def test_a_floor_keeps_one_perfect_point_from_deciding():
    truth = [[[10, 10, 41, 100, 0]]]
    assert miss_rate(truth, [[[10, 10, 41, 100, 0.5]]]) == 0.0
    assert miss_rate(truth, [[[10, 10, 41, 100, 0.5]]], floor=1e-4) == pytest.approx(1e-4)


def test_a_subset_counts_whom_it_names():
    """Each pedestrian counts in just the subsets named; heights, then visible share, margin, and shape."""
    known = {
        (100, 100, 20, 50): {"reasonable", "all", "medium", "occlusion_none", "aspect_all", "aspect_typical"},
        (100, 100, 20, 49.9): {"all", "medium"},
        (100, 100, 20, 80): {"reasonable", "all", "near", "occlusion_none", "aspect_all", "aspect_atypical"},
        (100, 100, 60, 100): {"reasonable", "all", "near", "large", "occlusion_none", "aspect_all", "aspect_atypical"},
        (100, 100, 10, 20): {"all", "far"},
        (100, 100, 10, 19): set(),
        (3.9, 100, 20, 50): set(),
        (4, 424, 20, 50): {"reasonable", "all", "medium", "occlusion_none", "aspect_all", "aspect_typical"},
        (614.5, 100, 20, 50): set(),
    }
    visible = {0.7: {"reasonable", "all", "occlusion_partial"}, 0.3: {"all", "occlusion_heavy"}, 0.1: set()}
    cases = [(box, (0, 0, 0, 0), names) for box, names in known.items()]
    cases += [((100, 100, 20, 60), (100, 100, 20, 60 * share), names) for share, names in visible.items()]
    subsets = {name for name in SUBSETS if not name.startswith(("overlap", "expand"))}
    for box, part, names in cases:
        scenes = Scenes(
            truths=np.array([box], dtype=float),
            truth_counts=np.array([1]),
            visible=np.array([part], dtype=float),
            detections=np.empty((0, 4)),
            scores=np.empty(0),
            detection_counts=np.array([0]),
        )
        assert {name for name in subsets if not ignored(scenes, name).any()} == names, (box, part)
        others = replace(scenes, labels=np.array([2])), replace(scenes, ignore=np.array([True]))
        assert all(ignored(other, name).all() for other in others for name in subsets)


def test_overlaps_of_named_subsets_differ():
    truth, near = [100, 100, 41, 100], [100, 140, 41, 100]  # 60 of 140 shared: 0.43
    at = {}
    for name in ("overlap_25", "overlap_50", "overlap_75"):
        at[name] = miss_rate([[[*truth, 0]]], [[[*near, 1]]], name)
    assert at == {"overlap_25": 0.0, "overlap_50": 1.0, "overlap_75": 1.0}


def test_half_precision_modules_and_pickles_change_nothing():
    truths, detections = drawn(2)
    module = nn.Module()
    module.metric = LogAverageMissRate(None, box_format="xywh")
    module.metric.update(*inputs(truths, detections))
    expected = float(module.metric.compute())
    assert float(module.to(torch.bfloat16).metric.compute()) == expected
    assert float(pickle.loads(pickle.dumps(module.metric)).compute()) == expected


def test_forward_gives_the_batch_and_keeps_all():
    truths, detections = drawn(4)
    metric = LogAverageMissRate(None, box_format="xywh")
    preds, targets = inputs(truths, detections)
    assert float(metric(preds[:6], targets[:6])) == miss_rate(truths[:6], detections[:6])
    metric.update(preds[6:], targets[6:])
    assert float(metric.compute()) == miss_rate(truths, detections)
    metric.reset()
    metric.update(preds[6:], targets[6:])
    assert float(metric.compute()) == miss_rate(truths[6:], detections[6:])
    assert metric.curve.images == 6


@pytest.mark.skipif(not hasattr(Metric, "merge_state"), reason="torchmetrics before 1.5")
def test_two_metrics_merge():
    truths, detections = drawn(4)
    preds, targets = inputs(truths, detections)
    one, other = (LogAverageMissRate(None, box_format="xywh") for _ in range(2))
    one.update(preds[:6], targets[:6])
    other.update(preds[6:], targets[6:])
    one.merge_state(other)
    assert float(one.compute()) == miss_rate(truths, detections)


def test_curves_of_several_detectors_are_drawn():
    truths, detections = drawn(6, images=60)
    good, bad = (LogAverageMissRate(None, box_format="xywh") for _ in range(2))
    good.update(*inputs(truths, detections))
    bad.update(*inputs(truths, [[]] * len(truths)))
    figure, axes = good.plot({"ours": good.curve, "blind": bad.curve})
    assert axes.get_xscale() == axes.get_yscale() == "log"
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == [f"{float(good.compute()):.1%} ours", "100.0% blind"], "the best first"
    line = axes.get_lines()[0]
    np.testing.assert_array_equal(line.get_xdata()[1:], good.curve.fppi)
    np.testing.assert_array_equal(line.get_ydata()[1:], good.curve.miss_rate)
    figure.canvas.draw()
    mine = plt.figure().add_subplot()
    assert good.plot(ax=mine) == (mine.figure, mine)
    assert plot_miss_rates({"blind": bad.curve}).axes


@pytest.mark.parametrize(
    ("preds", "targets", "message"),
    [
        ([], [{}], "a prediction for each target but got 0 for 1"),
        ([{"boxes": torch.rand(2, 4)}], [{"boxes": torch.rand(1, 4)}], "Expected 'scores' in every image"),
        ([{"scores": torch.rand(2)}], [{"boxes": torch.rand(1, 4)}], 'a mapping with "boxes"'),
        ([{"boxes": torch.rand(2, 4), "scores": torch.rand(3)}], [{"boxes": torch.rand(1, 4)}], "as many 'scores' as boxes"),
        ([{"boxes": torch.rand(2, 5), "scores": torch.rand(2)}], [{"boxes": torch.rand(1, 4)}], r"shape \('n', 4\) but got"),
        ([{"boxes": torch.full((1, 4), math.nan), "scores": torch.rand(1)}], [{"boxes": torch.rand(1, 4)}], "must be finite"),
        (
            [{"boxes": torch.rand(1, 4), "scores": torch.rand(1)}] * 2,
            [{"boxes": torch.rand(1, 4)}, {"boxes": torch.rand(1, 4), "labels": torch.tensor([2])}],
            "Expected 'labels' in every image",
        ),
        (
            [{"boxes": torch.rand(1, 4), "scores": torch.rand(1)}] * 2,
            [{"boxes": torch.rand(1, 4), "image_id": 1}, {"boxes": torch.rand(1, 4)}],
            "Either all targets have an `image_id` or none, but 1 of 2",
        ),
    ],
)
def test_says_what_is_wrong(preds, targets, message):
    with pytest.raises(ValueError, match=message):
        LogAverageMissRate().update(preds, targets)


def test_a_batch_that_is_refused_leaves_nothing_behind():
    preds, targets = inputs(*drawn(2))
    metric = LogAverageMissRate(None, box_format="xywh")
    metric.update(preds, targets)
    expected = float(metric.compute())
    broken = {**targets[0], "boxes": torch.full((1, 4), math.nan), "ignore": torch.tensor([False])}
    with pytest.raises(ValueError, match="must be finite"):
        metric.update(preds[:1], [broken])
    assert float(metric.compute()) == expected


def test_two_images_of_one_id_are_refused():
    preds, targets = inputs(*drawn(2))
    metric = LogAverageMissRate()
    metric.update(preds, [{**target, "image_id": 7} for target in targets])
    with pytest.raises(ValueError, match="Two different images have the `image_id` 7"):
        metric.compute()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subset": "resonable"}, "one of reasonable, all, large"),
        ({"box_format": "cxcywh"}, '"xyxy" or "xywh"'),
        ({"floor": 1.0}, r"\[0, 1\)"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LogAverageMissRate(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heights": (50, 20)}, "`heights` must be a range"),
        ({"visible": (-1, 0.5)}, "`visible` must be a range"),
        ({"bounds": (0, 0, 0, 480)}, "left, top, right and bottom"),
        ({"aspect": "wide"}, '"typical", "atypical" or None'),
        ({"aspect": "typical", "aspect_ratio": None}, "needs an `aspect_ratio`"),
        ({"aspect_ratio": 0}, "must be positive"),
        ({"overlap": 0}, r"\(0, 1\]"),
        ({"expand": 0.9}, "at least 1"),
    ],
)
def test_subsets_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Subset(**options)


def test_scenes_whose_arrays_do_not_fit_are_refused():
    scenes = caltech("All")
    for changed, message in (
        ({"scores": scenes.scores[1:]}, "Expected `scores` of shape"),
        ({"truth_counts": scenes.truth_counts[1:]}, "79 images have annotations but 80"),
        ({"labels": scenes.labels[1:]}, "Expected `labels`"),
        ({"scores": scenes.scores * math.nan}, "`scores` must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(scenes, **changed)
