"""Which pedestrians an evaluation counts, and which are ignore regions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf
from types import MappingProxyType
from typing import Literal

CALTECH_BOUNDS = (4.0, 4.0, 634.0, 474.0)
"""What a box must lie in to count, as left, top, right, bottom: 640x480 pixels less a margin (5 to 635 and 475, from 1)."""

ASPECT_RATIO = 0.41
"""Width over height that Caltech's evaluation gives to every pedestrian: the mean of its annotations."""


@dataclass(frozen=True, kw_only=True)
class Subset:
    """What a pedestrian must be like to count; all others are ignore regions, which cost and earn nothing.

    Args:
        heights: Least height in pixels, and the height from which on it is too tall.
        visible: Least and greatest share of the box that is visible, both included; of a pedestrian without a visible box it is
            infinite, so that ``(inf, inf)`` asks for pedestrians annotated as fully visible.
        bounds: Left, top, right and bottom of the region that the box must lie in; None for anywhere.
        aspect: What the box's width over height must be like: ``"typical"`` is nearer than 0.1 to ``aspect_ratio``,
            ``"atypical"`` further; None for any.
        aspect_ratio: Width over height that detections and those who count are resized to, about their centre and at their
            height; None leaves boxes as they are.
        overlap: Least overlap of a match, in (0, 1]: intersection over union, for an ignore region over the detection's area.
        expand: By what factor a detection's height may miss ``heights`` before it is left out, at least 1.

    Raises:
        ValueError: If a number is out of range.

    Source: Dollár et al., *Pedestrian Detection: An Evaluation of the State of the Art*, 2012, and its ``dbEval``.

    Example:
        >>> from dataclasses import replace
        >>> replace(SUBSETS["reasonable"], heights=(30.0, 80.0)).detection_heights
        (24.0, 100.0)
    """

    heights: tuple[float, float] = (50.0, inf)
    visible: tuple[float, float] = (0.65, inf)
    bounds: tuple[float, float, float, float] | None = CALTECH_BOUNDS
    aspect: Literal["typical", "atypical"] | None = None
    aspect_ratio: float | None = ASPECT_RATIO
    overlap: float = 0.5
    expand: float = 1.25

    def __post_init__(self) -> None:
        for name, (low, high) in (("heights", self.heights), ("visible", self.visible)):
            if not 0 <= low <= high:
                raise ValueError(f"Argument `{name}` must be a range from 0 on but got ({low}, {high}).")
        if self.bounds is not None and not (self.bounds[0] < self.bounds[2] and self.bounds[1] < self.bounds[3]):
            raise ValueError(f"Argument `bounds` must be left, top, right and bottom but got {self.bounds}.")
        if self.aspect not in ("typical", "atypical", None):
            raise ValueError(f'Argument `aspect` must be "typical", "atypical" or None but got {self.aspect!r}.')
        if self.aspect is not None and self.aspect_ratio is None:
            raise ValueError(f'Argument `aspect="{self.aspect}"` needs an `aspect_ratio` to be compared with.')
        if self.aspect_ratio is not None and self.aspect_ratio <= 0:
            raise ValueError(f"Argument `aspect_ratio` must be positive but got {self.aspect_ratio}.")
        if not 0 < self.overlap <= 1:
            raise ValueError(f"Argument `overlap` must lie in (0, 1] but got {self.overlap}.")
        if self.expand < 1:
            raise ValueError(f"Argument `expand` must be at least 1 but got {self.expand}.")

    @property
    def detection_heights(self) -> tuple[float, float]:
        """Least height of a detection that takes part, and the height from which on it does not."""
        return self.heights[0] / self.expand, self.heights[1] * self.expand

    def as_marked(self) -> Subset:
        """The subset for annotations that say who is ignored, as files made for one subset do: only heights are left to ask."""
        return replace(self, visible=(0.0, inf), bounds=None, aspect=None)


_REASONABLE = Subset()
_VISIBLE = Subset(visible=(inf, inf))

SUBSETS: Mapping[str, Subset] = MappingProxyType(
    {
        "reasonable": _REASONABLE,
        "all": Subset(heights=(20.0, inf), visible=(0.2, inf)),
        "large": replace(_VISIBLE, heights=(100.0, inf)),
        "near": replace(_VISIBLE, heights=(80.0, inf)),
        "medium": replace(_VISIBLE, heights=(30.0, 80.0)),
        "far": replace(_VISIBLE, heights=(20.0, 30.0)),
        "occlusion_none": _VISIBLE,
        "occlusion_partial": Subset(visible=(0.65, 1.0)),
        "occlusion_heavy": Subset(visible=(0.2, 0.65)),
        "aspect_all": _VISIBLE,
        "aspect_typical": replace(_VISIBLE, aspect="typical"),
        "aspect_atypical": replace(_VISIBLE, aspect="atypical"),
        "overlap_25": Subset(overlap=0.25),
        "overlap_50": _REASONABLE,
        "overlap_75": Subset(overlap=0.75),
        "expand_100": Subset(expand=1.0),
        "expand_125": _REASONABLE,
        "expand_150": Subset(expand=1.5),
    }
)
"""The subsets of Caltech's evaluation, by name."""


def subset_of(subset: str | Subset) -> Subset:
    """A subset by its name.

    Raises:
        ValueError: If there is none of that name.
    """
    if isinstance(subset, Subset):
        return subset
    if subset not in SUBSETS:
        raise ValueError(f"Argument `subset` must be a `Subset` or one of {', '.join(SUBSETS)} but got {subset!r}.")
    return SUBSETS[subset]
