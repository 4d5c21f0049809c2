"""The share of pedestrians that a detector misses, by Caltech's protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import rank_zero_warn
from typing_extensions import override

from lit_compress.pedestrians.pictures import plot_miss_rates
from lit_compress.pedestrians.protocol import PERSON, MissRateCurve, Scenes, evaluate
from lit_compress.pedestrians.subsets import Subset, subset_of
from lit_compress.statistics.covariance import with_float64

_AS_GIVEN = Subset(heights=(0.0, np.inf), visible=(0.0, np.inf), bounds=None, aspect_ratio=None)
_UNNAMED = -(2**53)  # no id is that


class LogAverageMissRate(Metric):
    r"""Log-average miss rate of a pedestrian detector, in [0, 1]: the geometric mean over nine points of its curve.

    Caltech's evaluation to the letter: pedestrians that the subset does not ask for are ignore regions; those who count and all
    detections are resized to one aspect ratio; detections far from the subset's heights are left out; the others take, in the
    order of their scores, the person left that they overlap most, or else an ignore region, which costs and earns nothing. The
    miss rate is read at 0.01 to 1 false positives per image.

    Args:
        subset: Who counts, by a name of :data:`~lit_compress.pedestrians.SUBSETS` or a
            :class:`~lit_compress.pedestrians.Subset` of your own. The named ones are made for Caltech's 640×480 images: for other
            images take ``replace(SUBSETS["reasonable"], bounds=None)``. ``None`` compares boxes as they are, all heights, and
            overlaps from 0.5 on.
        box_format: ``"xyxy"`` or ``"xywh"``, of all boxes.
        floor: Least miss rate that enters the mean; with the original's 0, one miss rate of 0 makes the whole 0.
        kwargs: Passed to :class:`~torchmetrics.Metric`.

    Shape:
        - ``update``: for each image a prediction ``{"boxes": (n, 4), "scores": (n,)}`` and a target with ``"boxes"`` ``(m, 4)``
          and any of: ``"labels"`` ``(m,)``, 1 for a person, whatever else is ignored; ``"visible"`` ``(m, 4)``, visible parts,
          all zeros where a box is not occluded; ``"ignore"`` ``(m,)`` bool; ``"image_id"``, a whole number. The images of a batch
          agree in what they have. Boxes are in pixels, and the image begins at 0.
        - ``compute``: scalar, float64.

    With an ``image_id``, images are put in its order and repeated ones (a distributed sampler repeats some) count once, so that
    neither batches nor ranks can be told from the result; without it, detections of the same score count in the order in which
    images come. Heights of float32 boxes are rounded: who is just as high as a subset asks for may be lost; float64 keeps them.

    Raises:
        ValueError: If the subset or the format is unknown, what is given does not fit, or ``compute`` has seen no image.
            If nobody counts, the result is NaN, with a warning.

    Source: Dollár et al., *Pedestrian Detection: An Evaluation of the State of the Art*, 2012; ``dbEval`` and ``bbGt``.

    Example:
        >>> metric = LogAverageMissRate(subset=None)
        >>> person = torch.tensor([[10.0, 10.0, 51.0, 110.0]])
        >>> two = torch.cat([person, person + 200])
        >>> metric.update([{"boxes": person + 3, "scores": torch.tensor([0.9])}], [{"boxes": two}])
        >>> metric.compute()  # one of two is missed
        tensor(0.5000, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    detections: list[Tensor]
    truths: list[Tensor]
    images: list[Tensor]

    def __init__(
        self,
        subset: str | Subset | None = "reasonable",
        *,
        box_format: Literal["xyxy", "xywh"] = "xyxy",
        floor: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if box_format not in ("xyxy", "xywh"):
            raise ValueError(f'Argument `box_format` must be "xyxy" or "xywh" but got {box_format!r}.')
        if not 0 <= floor < 1:
            raise ValueError(f"Argument `floor` must lie in [0, 1) but got {floor}.")
        self.subset = _AS_GIVEN if subset is None else subset_of(subset)
        self.box_format, self.floor = box_format, floor
        self._curve: MissRateCurve | None = None
        for state in ("detections", "truths", "images"):
            self.add_state(state, [], dist_reduce_fx="cat")
        self.reset()

    @override
    def update(self, preds: Sequence[Mapping[str, Tensor]], targets: Sequence[Mapping[str, Any]]) -> None:
        """Add a batch of images.

        Args:
            preds: What was detected in each.
            targets: What is there; other entries than those named above are passed over.
        """
        if len(preds) != len(targets):
            raise ValueError(f"Expected a prediction for each target but got {len(preds)} for {len(targets)}.")
        if not len(targets):
            return
        detected = _counts(preds)
        detections = [self._boxes(preds, "boxes", detected), _joined(preds, "scores", detected, ())[:, None]]
        annotated = _counts(targets)
        said = {name for target in targets for name in ("visible", "labels", "ignore") if name in target}
        # Where nothing is said: not occluded, a person, not ignored.
        truths = [self._boxes(targets, "boxes", annotated)]
        ones = truths[0].new_ones(len(truths[0]), 1)
        truths.append(self._boxes(targets, "visible", annotated) if "visible" in said else 0 * ones.expand(-1, 4))
        for name, default in (("labels", PERSON), ("ignore", 0)):
            given = _joined(targets, name, annotated, ())[:, None] if name in said else default * ones
            truths.append(given.to(ones.device))
        if identified := sum("image_id" in target for target in targets):
            if identified < len(targets):
                raise ValueError(f"Either all targets have an `image_id` or none, but {identified} of {len(targets)} have one.")
            ids = [int(target["image_id"]) for target in targets]
        else:
            ids = [_UNNAMED] * len(targets)
        added = (
            torch.cat(detections, dim=1),
            torch.cat(truths, dim=1),
            torch.tensor([detected, annotated, ids], dtype=torch.float64).T,
        )
        if not all(rows.isfinite().all() for rows in added):
            raise ValueError("Boxes and scores must be finite but hold NaN or infinity: has the network diverged?")
        for state, rows in zip((self.detections, self.truths, self.images), added, strict=True):
            state.append(rows.detach().to(with_float64(self.device), torch.float64))

    @override
    def compute(self) -> Tensor:
        """The log-average miss rate of everything seen since the last reset, on all ranks."""
        self._curve = evaluate(self._scenes(), self.subset, floor=self.floor)
        if not self._curve.persons:
            rank_zero_warn("No annotated person counts, so there is no miss rate: the result is NaN.")
        return torch.tensor(self._curve.log_average, dtype=torch.float64, device=with_float64(self.device))

    @property
    def curve(self) -> MissRateCurve:
        """The curve behind :meth:`compute`, which is run if need be."""
        self.compute()
        assert self._curve is not None
        return self._curve

    @override
    def plot(self, val: Mapping[str, MissRateCurve] | None = None, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw miss rate against false positives per image, both on a log scale.

        Args:
            val: Name of each detector to its :attr:`curve`; None draws this metric's own.
            ax: Where to draw; None makes a figure.
        """
        figure = plot_miss_rates({"detector": self.curve} if val is None else val, ax)
        return figure, figure.axes[0] if ax is None else ax

    @override
    def reset(self) -> None:
        super().reset()
        self._curve = None
        # So that a rank that has seen nothing takes part in the gathering of every state.
        for state, columns in ((self.detections, 5), (self.truths, 10), (self.images, 3)):
            state.append(torch.empty(0, columns, dtype=torch.float64, device=with_float64(self.device)))

    @override
    def _apply(self, fn: Callable[..., Any], exclude_state: Sequence[str] = "") -> LogAverageMissRate:
        # `.to(torch.bfloat16)` of a module that holds the metric would round the states, and `.to("mps")` fail on them.
        self._computed = self._forward_cache = None
        super()._apply(fn, exclude_state=tuple(self._defaults))
        for name in self._defaults:
            state = getattr(self, name)  # a tensor if synced
            setattr(
                self, name, [rows.to(with_float64(self.device)) for rows in ([state] if isinstance(state, Tensor) else state)]
            )
        return self

    def _boxes(self, images: Sequence[Mapping[str, Tensor]], name: str, counts: Sequence[int]) -> Tensor:
        boxes = _joined(images, name, counts, (4,))
        if self.box_format == "xywh":
            return boxes
        return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)

    def _scenes(self) -> Scenes:
        """All that was seen, without repeated images."""
        detections, truths, images = (
            torch.cat(state if isinstance(state, list) else [state]).cpu().numpy()
            for state in (self.detections, self.truths, self.images)
        )
        detected, annotated, ids = images.T.astype(np.int64)
        named = ids != _UNNAMED
        if named.any() and not named.all():
            raise ValueError(f"Either all images have an `image_id` or none, but {named.sum()} of {len(ids)} have one.")
        if named.any():
            order, first = np.unique(ids, return_index=True)[1], np.searchsorted(np.unique(ids), ids)
            _refuse_different(truths, annotated, order[first], ids)
            detections, truths = detections[_rows(detected, order)], truths[_rows(annotated, order)]
            detected, annotated = detected[order], annotated[order]
        return Scenes(
            truths=truths[:, :4],
            truth_counts=annotated,
            detections=detections[:, :4],
            scores=detections[:, 4],
            detection_counts=detected,
            visible=truths[:, 4:8],
            labels=truths[:, 8].astype(np.int64),
            ignore=truths[:, 9] != 0,
        )


def _counts(images: Sequence[Mapping[str, Tensor]]) -> list[int]:
    """Boxes of each image."""
    try:
        return [len(image["boxes"]) for image in images]
    except (KeyError, TypeError):
        raise ValueError('Every prediction and every target must be a mapping with "boxes" (n, 4).') from None


def _joined(images: Sequence[Mapping[str, Tensor]], name: str, counts: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """What every image has under a name, one after the other, float64."""
    missing = next((image for image in images if name not in image), None)
    if missing is not None:
        raise ValueError(f"Expected {name!r} in every image's mapping, as in the others', but one has only {sorted(missing)}.")
    parts = [image[name] for image in images]
    if [len(part) for part in parts] != list(counts):
        raise ValueError(f"Expected as many {name!r} as boxes in every image.")
    joined = torch.cat(parts)
    if len(joined) and joined.shape[1:] != shape:
        raise ValueError(f"Expected {name!r} of shape {('n', *shape)} but got {('n', *joined.shape[1:])}.")
    return joined.reshape(-1, *shape).to(with_float64(joined.device), torch.float64)


def _rows(counts: NDArray[np.int64], chosen: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows of the chosen images, in the order chosen, where each image has so many."""
    starts, lengths = (np.cumsum(counts) - counts)[chosen], counts[chosen]
    return np.arange(lengths.sum()) + np.repeat(starts - np.cumsum(lengths) + lengths, lengths)


def _refuse_different(
    truths: NDArray[np.float64], counts: NDArray[np.int64], first: NDArray[np.int64], ids: NDArray[np.int64]
) -> None:
    """An error if two images of one id are not annotated alike."""
    repeated = np.flatnonzero(first != np.arange(len(first)))
    alike = counts[repeated] == counts[first[repeated]]
    if alike.all():
        alike = np.array(
            [np.array_equal(truths[_rows(counts, first[[at]])], truths[_rows(counts, np.array([at]))]) for at in repeated]
        )
    if not alike.all():
        raise ValueError(
            f"Two different images have the `image_id` {ids[repeated[np.argmin(alike)]]}; number them through, or leave ids out."
        )
