"""How long it takes to score a pedestrian detector on Caltech's test set."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.page import Section, main
from benchmarks.timing import Candidate, figure, interleaved, threads
from lit_compress.metrics import LogAverageMissRate

Images = list[dict[str, Tensor]]
AT_ONCE = "all images in one update"


def measure(quick: bool, rounds: int | None) -> Section:
    """As many images, persons and detections as the test set and ACF's detections have, drawn at random."""
    images, detections = (40, 360) if quick else (4_000, 36_000)
    preds, targets = drawn(images, detections)

    def score(size: int) -> Candidate[Any]:
        def run(metric: LogAverageMissRate) -> None:
            for start in range(0, images, size):
                metric.update(preds[start : start + size], targets[start : start + size])
            metric.compute()

        return Candidate(AT_ONCE if size == images else f"updates of {size}", run, LogAverageMissRate)

    with threads(1):
        compared = interleaved(score(images), [score(32), score(1)], rounds=rounds or (2 if quick else 20))
    seconds = compared.baseline.cpu.median
    return Section(
        question="How long does it take to score a pedestrian detector?",
        target="at most 0.15 s of CPU for 4,000 images with 36,000 detections.",
        tables={f"{images:,} images, {detections:,} detections, reasonable": compared.table()},
        verdicts=[f"{AT_ONCE}: {figure(seconds)} s of CPU, {'met' if seconds <= 0.15 else 'NOT met'}"],
        settings={"threads": 1},
    )


def drawn(images: int, detections: int) -> tuple[Images, Images]:
    """Predictions and targets: half of the images empty, the others with 2.5 boxes on average, and most detections wrong."""
    generator = np.random.default_rng(0)
    persons = generator.poisson(2.5, images) * (generator.random(images) < 0.5)
    heights = generator.uniform(20, 150, persons.sum())
    boxes = np.stack(
        [generator.uniform(0, 560, len(heights)), generator.uniform(0, 320, len(heights)), 0.41 * heights, heights], 1
    )
    truths = np.split(boxes, np.cumsum(persons)[:-1])
    found = np.split(generator.random(detections), np.sort(generator.integers(0, detections, images - 1)))
    preds, targets = [], []
    for truth, scores in zip(truths, found, strict=True):
        tall = generator.uniform(40, 200, len(scores))
        wrong = np.stack([generator.uniform(0, 500, len(tall)), generator.uniform(0, 280, len(tall)), 0.41 * tall, tall], 1)
        near = truth[: len(wrong)] + generator.normal(0, 3, (len(truth[: len(wrong)]), 4))
        wrong[: len(near)] = near
        preds.append({"boxes": _corners(wrong), "scores": torch.from_numpy(scores)})
        labels = torch.from_numpy(np.where(generator.random(len(truth)) < 0.8, 1, 2))
        targets.append({"boxes": _corners(truth), "labels": labels, "visible": torch.zeros(len(truth), 4)})
    return preds, targets


def _corners(boxes: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)).float()


if __name__ == "__main__":
    main("miss_rate", measure)
