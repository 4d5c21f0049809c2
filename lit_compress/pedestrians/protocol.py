"""Caltech's evaluation: who counts, which detection finds whom, and the miss rate at a number of false positives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lit_compress.pedestrians.subsets import Subset, subset_of

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
Flags = NDArray[np.bool_]

PERSON = 1
"""Label of a single pedestrian, whom an evaluation may count; whatever has another label is an ignore region."""

# By Python: powers of older numpys miss 0.1 by a bit, and 6 false positives in 60 images are just 0.1.
REFERENCE_FPPI: Floats = np.array([10.0 ** (quarter / 4) for quarter in range(-8, 1)])
"""False positives per image at which miss rates are averaged: nine, evenly spaced between 0.01 and 1 on a log scale."""

_PAIRS = 2**20  # compared at a time: 8 MB an array, however crowded the images


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """Annotations and detections of many images, one image after the other.

    Args:
        truths: Annotated boxes ``(M, 4)``: left, top, width, height in pixels.
        truth_counts: How many of them each of K images has, ``(K,)``.
        detections: Detected boxes ``(N, 4)``.
        scores: Their scores ``(N,)``; only their order matters.
        detection_counts: How many of them each image has, ``(K,)``.
        labels: ``(M,)``; who is not labelled :data:`PERSON` is an ignore region. None if all are persons.
        visible: Visible parts ``(M, 4)``; all zeros where a box is not occluded. None if none is.
        ignore: Who is an ignore region whatever the rest says, ``(M,)``. None if nobody is.

    Raises:
        ValueError: If shapes do not fit, or a number is not finite.
    """

    truths: Floats
    truth_counts: Counts
    detections: Floats
    scores: Floats
    detection_counts: Counts
    labels: Counts | None = None
    visible: Floats | None = None
    ignore: Flags | None = None

    def __post_init__(self) -> None:
        truths, detections = int(self.truth_counts.sum()), int(self.detection_counts.sum())
        if len(self.truth_counts) != len(self.detection_counts):
            raise ValueError(f"{len(self.truth_counts)} images have annotations but {len(self.detection_counts)} detections.")
        for name, array, shape in (
            ("truths", self.truths, (truths, 4)),
            ("detections", self.detections, (detections, 4)),
            ("scores", self.scores, (detections,)),
            ("labels", self.labels, (truths,)),
            ("visible", self.visible, (truths, 4)),
            ("ignore", self.ignore, (truths,)),
        ):
            if array is not None and array.shape != shape:
                raise ValueError(f"Expected `{name}` of shape {shape} but got {array.shape}.")
            if array is not None and not np.isfinite(array).all():
                raise ValueError(f"`{name}` must be finite but holds NaN or infinity.")

    @property
    def images(self) -> int:
        """Number of images, those without any box too."""
        return len(self.truth_counts)


@dataclass(frozen=True)
class Matches:
    """Who was found by what.

    Args:
        detections: For each detection that takes part, image by image and there from the highest score to the lowest: 1 if it
            found somebody, 0 if it is a false positive, -1 if it met an ignore region and is left out.
        scores: Scores of these detections.
        detection_counts: How many of them each image has.
        truths: For each annotated box, as in the scenes: 1 if found, 0 if missed, -1 if it is an ignore region.
    """

    detections: NDArray[np.int8]
    scores: Floats
    detection_counts: Counts
    truths: NDArray[np.int8]


@dataclass(frozen=True)
class MissRateCurve:
    """Miss rate against false positives per image, as the score that a detection must have falls.

    Args:
        fppi: False positives per image ``(P,)``, ascending: one point a detection, ignored ones left out.
        miss_rate: Share of the persons who are missed ``(P,)``, in [0, 1], descending.
        at_reference: Miss rate ``(9,)`` at the last point with no more false positives than :data:`REFERENCE_FPPI`; 1 where there
            is none.
        log_average: Geometric mean of ``at_reference``, in [0, 1]; NaN if nobody counts.
        persons: How many annotated persons count.
        images: How many images there are.
    """

    fppi: Floats
    miss_rate: Floats
    at_reference: Floats
    log_average: float
    persons: int
    images: int


def evaluate(scenes: Scenes, subset: str | Subset = "reasonable", *, floor: float = 0.0) -> MissRateCurve:
    r"""The curve of a detector, and its log-average miss rate.

    .. math:: \exp\Big(\frac{1}{9} \sum_{i=1}^{9} \log \max(m_i, \text{floor})\Big)

    with :math:`m_i` the miss rate at the i-th point of :data:`REFERENCE_FPPI`. Detections of one score count in the order of the
    images, as in the original.

    Args:
        scenes: Annotations and detections.
        subset: Who counts: a name of :data:`~lit_compress.pedestrians.SUBSETS`, or one of your own.
        floor: Least miss rate that enters the mean. With the original's 0, one miss rate of 0 makes the mean 0.

    Raises:
        ValueError: If the subset is unknown, the floor is not in [0, 1), or there is no image.

    Source: Dollár et al., 2012, section 3, and its ``dbEval`` and ``bbGt``.

    Example:
        >>> one = np.ones(1, dtype=np.int64)
        >>> person = np.array([[100.0, 100.0, 41.0, 100.0]])
        >>> scenes = Scenes(truths=person, truth_counts=one, detections=person + 5, scores=np.ones(1), detection_counts=one)
        >>> evaluate(scenes).log_average, evaluate(scenes, "far").persons
        (0.0, 0)
    """
    if not 0 <= floor < 1:
        raise ValueError(f"Argument `floor` must lie in [0, 1) but got {floor}.")
    if not scenes.images:
        raise ValueError("A miss rate needs at least 1 image but has none.")
    matches = match(scenes, subset)
    counts = matches.detections >= 0
    order = np.argsort(-matches.scores[counts], kind="stable")
    found = matches.detections[counts][order] == 1
    persons = int((matches.truths >= 0).sum())
    fppi = np.cumsum(~found) / scenes.images
    with np.errstate(invalid="ignore"):  # 0 / 0: nobody counts
        recall = np.cumsum(found) / np.float64(persons)
        none = np.float64(0) / np.float64(persons)
    # The last point that has no more false positives; before the first point, nobody is found.
    at_reference = 1 - np.concatenate([[none], recall])[np.searchsorted(fppi, REFERENCE_FPPI, side="right")]
    with np.errstate(divide="ignore"):  # log 0 is -inf, and its exponential 0
        log_average = float(np.exp(np.mean(np.log(np.maximum(at_reference, floor)))))
    return MissRateCurve(fppi, 1 - recall, at_reference, log_average, persons, scenes.images)


def ignored(scenes: Scenes, subset: str | Subset) -> Flags:
    """Which annotated boxes are ignore regions, ``(M,)``: all that are not persons as the subset wants them.

    Args:
        scenes: Annotations.
        subset: Who counts.
    """
    subset = subset_of(subset)
    left, top, width, height = scenes.truths.T
    counts: Flags = (height >= subset.heights[0]) & (height < subset.heights[1])
    if scenes.labels is not None:
        counts &= scenes.labels == PERSON
    if scenes.ignore is not None:
        counts &= ~scenes.ignore
    share = np.full(len(counts), np.inf)
    if scenes.visible is not None:
        occluded = scenes.visible.any(axis=1)
        area = (width * height)[occluded]
        with np.errstate(divide="ignore", invalid="ignore"):  # a box without area is too low to count
            share[occluded] = scenes.visible[occluded, 2] * scenes.visible[occluded, 3] / area
    counts &= (share >= subset.visible[0]) & (share <= subset.visible[1])
    if subset.bounds is not None:
        counts &= (left >= subset.bounds[0]) & (left + width <= subset.bounds[2])
        counts &= (top >= subset.bounds[1]) & (top + height <= subset.bounds[3])
    if subset.aspect is not None:
        with np.errstate(divide="ignore", invalid="ignore"):
            off = np.abs(width / height - (subset.aspect_ratio or 0.0))
        counts &= (off < 0.1) if subset.aspect == "typical" else (off > 0.1)
    return ~counts


def match(scenes: Scenes, subset: str | Subset = "reasonable") -> Matches:
    """Give each detection at most one person: in the order of scores, it takes the one of those left that it overlaps most.

    Args:
        scenes: Annotations and detections.
        subset: Who counts.

    Source: ``bbGt('evalRes')`` of the original. Of two persons overlapped alike the later one is taken, and an overlap of just
    ``subset.overlap`` matches, as there.
    """
    subset = subset_of(subset)
    ignore = ignored(scenes, subset)
    truths, detections = scenes.truths, scenes.detections
    if subset.aspect_ratio is not None:
        truths = np.where(ignore[:, None], truths, _resized(truths, subset.aspect_ratio))
        detections = _resized(detections, subset.aspect_ratio)
    image = np.repeat(np.arange(scenes.images), scenes.detection_counts)
    low, high = subset.detection_heights
    takes_part = np.flatnonzero((detections[:, 3] >= low) & (detections[:, 3] < high))
    takes_part = takes_part[np.lexsort((-scenes.scores[takes_part], image[takes_part]))]
    image, detections = image[takes_part], detections[takes_part]

    which, truth, overlap = _overlapping(detections, image, truths, scenes.truth_counts, ignore, subset.overlap)
    persons = ~ignore[truth]
    finders, found = _greedy(which[persons], truth[persons], overlap[persons])
    codes = np.zeros(len(takes_part), dtype=np.int8)
    codes[which[~persons]] = -1
    codes[finders] = 1  # a person goes before an ignore region
    taken = np.zeros(len(truths), dtype=np.bool_)
    taken[found] = True
    codes_of_truths = np.where(ignore, -1, taken).astype(np.int8)
    return Matches(codes, scenes.scores[takes_part], np.bincount(image, minlength=scenes.images), codes_of_truths)


def _resized(boxes: Floats, aspect_ratio: float) -> Floats:
    """Boxes of that width over height, about the same centre and as high."""
    wider = boxes[:, 3] * aspect_ratio - boxes[:, 2]
    resized: Floats = boxes.copy()
    resized[:, 0] -= wider / 2
    resized[:, 2] += wider
    return resized


def _overlapping(
    detections: Floats, image: Counts, truths: Floats, truth_counts: Counts, ignore: Flags, least: float
) -> tuple[Counts, Counts, Floats]:
    """Pairs of a detection and a box of its image that overlap enough, in the order of both, and their overlaps."""
    starts, partners = (np.cumsum(truth_counts) - truth_counts)[image], truth_counts[image]
    pairs = np.cumsum(partners)
    kept: list[tuple[Counts, Counts, Floats]] = []
    for block in np.split(np.arange(len(image)), np.flatnonzero(np.diff(pairs // _PAIRS)) + 1):
        counts = partners[block]
        which = np.repeat(block, counts)
        nth = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
        truth = starts[which] + nth
        overlap = _overlap(detections[which], truths[truth], ignore[truth])
        enough = overlap >= least
        kept.append((which[enough], truth[enough], overlap[enough]))
    found = zip(*kept, strict=True)
    return np.concatenate(next(found)), np.concatenate(next(found)), np.concatenate(next(found))


def _overlap(detections: Floats, truths: Floats, ignore: Flags) -> Floats:
    """Intersection over union of pairs of boxes; over the detection's area for an ignore region."""
    near = np.maximum(detections[:, :2], truths[:, :2])
    far = np.minimum(detections[:, :2] + detections[:, 2:], truths[:, :2] + truths[:, 2:])
    width, height = np.maximum(far - near, 0).T
    shared = width * height
    area = detections[:, 2] * detections[:, 3]
    union = np.where(ignore, area, area + truths[:, 2] * truths[:, 3] - shared)
    overlap: Floats = np.divide(shared, union, out=np.zeros_like(shared), where=shared > 0)
    return overlap


def _greedy(which: Counts, truth: Counts, overlap: Floats) -> tuple[list[int], list[int]]:
    """Detections that find somebody, and whom; only pairs that overlap enough are left, few beside all detections."""
    found: dict[int, int] = {}
    taken: set[int] = set()
    current, best, person = -1, 0.0, -1
    for detection, other, amount in zip([*which.tolist(), -1], [*truth.tolist(), -1], [*overlap.tolist(), 0.0], strict=True):
        if detection != current:
            if person >= 0:
                found[current] = person
                taken.add(person)
            current, best, person = detection, 0.0, -1
        if amount >= best and other not in taken:
            best, person = amount, other
    return list(found), list(found.values())
