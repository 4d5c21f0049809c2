"""Anchors, targets and what is left of detections: against the authors' code, torchvision, and plain loops."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.models.detection._utils import BoxCoder

from lit_compress.detection import (
    assign_anchors,
    best_detections,
    decode_boxes,
    encode_boxes,
    pedestrian_anchors,
    sample_anchors,
    suppress,
)

REFERENCE = np.load(Path(__file__).parent / "reference" / "rpn_caltech.npz")


def from_one(name):
    """Boxes of the reference, whose corners are pixels counted from 1, as edges counted from 0."""
    return torch.from_numpy(REFERENCE[name].astype(np.float64)) - torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)


def test_the_anchors_of_a_cell_are_the_authors():
    anchors = pedestrian_anchors((1, 1), dtype=torch.float64)
    np.testing.assert_allclose(anchors, from_one("rpn_anchors_x1y1x2y2_1based"), atol=1e-9)


def test_anchors_lie_about_every_cell_row_by_row():
    anchors = pedestrian_anchors((3, 5), stride=8, scales=(1.0, 2.0)).view(3, 5, 2, 4)
    for row in range(3):
        for column in range(5):
            for scale in (1, 2):
                x, y = 8 * column + 4, 8 * row + 4
                expected = [x - 5 * scale, y - 12 * scale, x + 5 * scale, y + 12 * scale]
                assert anchors[row, column, scale - 1].tolist() == expected


def test_boxes_relative_to_anchors_are_the_authors():
    boxes, anchors = from_one("bbox_gt"), from_one("bbox_ex")
    relative = encode_boxes(boxes, anchors)
    np.testing.assert_allclose(relative, REFERENCE["bbox_transform"], atol=1e-9)
    np.testing.assert_allclose(decode_boxes(relative, anchors), boxes, atol=1e-9)
    # Stored in single precision: 2^-24 of 600 pixels.
    np.testing.assert_allclose(decode_boxes(relative, anchors), from_one("bbox_transform_inv"), atol=6e-5)


def test_boxes_relative_to_anchors_are_torchvision_s():
    coder = BoxCoder(weights=(1.0, 1.0, 1.0, 1.0))
    boxes, anchors = from_one("bbox_gt"), from_one("bbox_ex")
    torch.testing.assert_close(encode_boxes(boxes, anchors), coder.encode_single(boxes, anchors))
    relative = encode_boxes(boxes, anchors)
    torch.testing.assert_close(decode_boxes(relative, anchors), coder.decode_single(relative, anchors))


@pytest.mark.parametrize(
    ("over", "overlap", "name"), [("union", 0.5, "nms_maxg_union_050"), ("smaller", 0.65, "nms_maxg_min_065")]
)
def test_suppression_is_the_toolbox_s(over, overlap, name):
    rows = torch.from_numpy(REFERENCE["nms_in_xywhs"])
    boxes = torch.cat([rows[:, :2], rows[:, :2] + rows[:, 2:4]], dim=1)
    kept = suppress(boxes, rows[:, 4], overlap, over)
    np.testing.assert_allclose(rows[kept], REFERENCE[name], atol=1e-9)


def drawn(seed, count=200):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 120
    return torch.cat([corners, corners + 4 + torch.rand(count, 2, generator=generator, dtype=torch.float64) * 40], dim=1)


def overlap_of(one, other):
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0) * max(height, 0)
    return shared / ((one[2] - one[0]) * (one[3] - one[1]) + (other[2] - other[0]) * (other[3] - other[1]) - shared)


@pytest.mark.parametrize("seed", range(4))
def test_anchors_are_assigned_as_plain_loops_assign_them(seed):
    anchors, boxes = drawn(seed, 300) - 20, drawn(seed + 100, 6)
    anchors[:10] = boxes[0] + torch.rand(10, 4, dtype=torch.float64)
    anchors[10:20] = boxes[1] + torch.rand(10, 4, dtype=torch.float64)  # an ignore region
    ignore = torch.tensor([False, True, False, False, True, False])
    found = assign_anchors(anchors, boxes, ignore, (130, 140))
    rows = [[overlap_of(anchor, box) for box in boxes.tolist()] for anchor in anchors.tolist()]
    within = [a[0] >= 0 and a[1] >= 0 and a[2] <= 140 and a[3] <= 130 for a in anchors.tolist()]
    best = [max(row[box] for row, inside in zip(rows, within, strict=True) if inside) for box in range(6)]
    for index, row in enumerate(rows):
        persons = {box: row[box] for box in (0, 2, 3, 5)}
        most = max(persons, key=persons.get)
        is_best = any(row[box] == pytest.approx(best[box], abs=1e-12) and best[box] > 0 for box in persons)
        if within[index] and (persons[most] >= 0.5 or is_best):
            assert (found.labels[index], found.persons[index]) == (1, most)
        else:
            assert found.labels[index] == (0 if max(row) < 0.5 else -1)
    assert (found.labels == 1).sum() >= 4
    assert (found.labels == -1).any()


def test_images_without_persons_have_negatives_only():
    anchors = drawn(0, 20)
    nobody = assign_anchors(anchors, torch.empty(0, 4, dtype=torch.float64), torch.empty(0, dtype=torch.bool), (200, 200))
    assert (nobody.labels == 0).all()
    region = assign_anchors(anchors, anchors[:1], torch.tensor([True]), (200, 200))
    assert region.labels[0] == -1
    assert not (region.labels == 1).any()


@pytest.mark.parametrize(("available", "weight"), [(50, 1.0), (20, 1.0), (5, 4.0), (0, 0.0)])
def test_few_positives_weigh_as_much_as_many(available, weight):
    labels = torch.tensor([1] * available + [0] * 300 + [-1] * 40)[torch.randperm(available + 340)]
    weights = sample_anchors(labels)
    assert (weights[labels == 0] > 0).sum() == 100
    assert weights[labels == 0].sum() == 100
    assert not weights[labels == -1].any()
    chosen = weights[labels == 1]
    assert (chosen > 0).sum() == min(available, 20)
    assert chosen.sum() == (20 if available else 0)
    assert set(chosen.unique().tolist()) <= {0.0, weight}
    again = [sample_anchors(labels, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*again)


def test_detections_are_limited_as_in_the_test_of_the_authors():
    boxes = torch.cat([drawn(5, 400) * 3, torch.tensor([[0.0, 0, 15.9, 60], [0, 0, 16, 49.9], [300, 300, 316, 350]]).double()])
    scores = torch.rand(403, dtype=torch.float64)
    kept = best_detections(boxes, scores)
    assert len(kept) <= 40
    assert (scores[kept].diff() <= 0).all()
    size = boxes[kept, 2:] - boxes[kept, :2]
    assert (size[:, 0] >= 16).all()
    assert (size[:, 1] >= 50).all()
    large = [i for i in range(403) if boxes[i, 2] - boxes[i, 0] >= 16 and boxes[i, 3] - boxes[i, 1] >= 50]
    expected = []
    for index in sorted(large, key=lambda i: -scores[i]):
        if all(overlap_of(boxes[index].tolist(), boxes[other].tolist()) <= 0.5 for other in expected):
            expected.append(index)
    assert kept.tolist() == expected[:40]
    assert best_detections(boxes, scores, after=3).tolist() == expected[:3]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pedestrian_anchors((0, 4)), "sizes above 0"),
        (lambda: pedestrian_anchors((4, 4), scales=()), "at least one scale"),
        (lambda: assign_anchors(torch.rand(3, 4), torch.rand(2, 4), torch.tensor([True]), (9, 9)), r"ignore \(m,\) but got"),
        (lambda: assign_anchors(torch.rand(3, 4), torch.rand(1, 4), torch.tensor([True]), (9, 9), overlap=0), r"\(0, 1\]"),
        (lambda: sample_anchors(torch.tensor([1]), positives=-1), "at least 0 but got -1"),
        (lambda: suppress(torch.rand(2, 4), torch.rand(3), 0.5), r"scores \(N,\) but got"),
        (lambda: suppress(torch.rand(2, 4), torch.rand(2), 1.5), r"\[0, 1\] but got 1.5"),
        (lambda: suppress(torch.rand(2, 4), torch.rand(2), 0.5, "min"), '"union" or "smaller"'),
    ],
)
def test_says_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
