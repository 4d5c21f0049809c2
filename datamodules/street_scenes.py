"""Streets with people, drawn from a seed: what the embedded pedestrian set consists of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi, sin
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from lit_compress.pedestrians.annotations import LABELS, Annotations

Generator = np.random.Generator
Pixels = NDArray[np.float64]
Colour = tuple[int, int, int]
Point = tuple[float, float]

_FINER = 3  # drawn so many times finer, and then averaged: Pillow draws hard edges
_PEOPLE = 2  # mean number of single persons in a street, beside groups


class Stamp(NamedTuple):
    """Something cut out, to be put into a scene."""

    colours: Pixels
    """``(h, w, 3)`` in [0, 1]."""
    cover: Pixels
    """``(h, w)``: how much of what is behind it each pixel hides, in [0, 1]."""


class Thing(NamedTuple):
    """Something that stands in a street."""

    foot: float
    """Where it stands, in pixels from the top: the lower, the nearer."""
    left: float
    """Where its stamp begins."""
    stamp: Stamp
    who: int
    """Number of the person or group, from 1; 0 for a thing."""


@dataclass(frozen=True, kw_only=True)
class StreetScene:
    """What streets look like.

    Args:
        size: Height and width in pixels.
        heights: Least and greatest height of a person in pixels.
        crowds: Probability of a group of people too close to be told apart: an ignore region.
        occlusion: Probability, for each person, of a thing that stands in front.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> image, annotations = StreetScene(size=(96, 128), heights=(20, 60)).draw(np.random.default_rng(0))
        >>> image.shape, image.dtype, annotations.boxes.shape[1]
        ((96, 128, 3), dtype('uint8'), 4)
    """

    size: tuple[int, int] = (192, 256)
    heights: tuple[float, float] = (24.0, 120.0)
    crowds: float = 0.3
    occlusion: float = 0.35

    def __post_init__(self) -> None:
        if min(self.size) < 32:
            raise ValueError(f"Argument `size` must be at least 32 pixels each way but got {self.size}.")
        if not 8 <= self.heights[0] <= self.heights[1] <= 0.7 * self.size[0]:
            raise ValueError(
                f"Argument `heights` must be a range from 8 pixels to 0.7 of the image's {self.size[0]} but got {self.heights}."
            )
        for name, share in (("crowds", self.crowds), ("occlusion", self.occlusion)):
            if not 0 <= share <= 1:
                raise ValueError(f"Argument `{name}` must lie in [0, 1] but got {share}.")

    def draw(self, generator: Generator) -> tuple[NDArray[np.uint8], Annotations]:
        """A scene ``(H, W, 3)``, and who is in it: persons, with the visible part of those who are occluded, and groups."""
        height, width = self.size
        horizon = height * generator.uniform(0.25, 0.3)
        scene = _street(generator, height, width, horizon)
        things, labels = self._things(generator, horizon)
        owner = np.zeros(self.size, dtype=np.int64)
        outlines: dict[int, NDArray[np.bool_]] = {}
        for thing in sorted(things, key=lambda one: one.foot):
            outline = _paint(scene, thing)
            owner[outline] = thing.who
            if thing.who:
                outlines[thing.who] = outlines.get(thing.who, np.zeros(self.size, dtype=np.bool_)) | outline
        # A camera's light and noise: a slope of brightness, and grain.
        light = 1 + generator.uniform(-0.2, 0.2) * np.linspace(-1, 1, width)[None, :, None]
        noisy = scene * light + generator.normal(0, generator.uniform(0.01, 0.04), scene.shape)
        return (noisy.clip(0, 1) * 255).round().astype(np.uint8), _annotations(outlines, labels, owner)

    def _things(self, generator: Generator, horizon: float) -> tuple[list[Thing], dict[int, str]]:
        height, width = self.size
        things: list[Thing] = []
        labels: dict[int, str] = {}

        def place(tall: float) -> float:
            return min(horizon + tall / 1.15, height - 2.0)  # heads are a little above the horizon, wherever people stand

        def stand(stamp: Stamp, foot: float, middle: float, who: int) -> None:
            things.append(Thing(foot, middle - stamp.cover.shape[1] / 2, stamp, who))

        for _ in range(generator.integers(2, 6)):
            kind = (_pole, _tree, _car, _bin)[generator.integers(4)]
            tall = float(np.exp(generator.uniform(*np.log(self.heights))))
            stand(kind(generator, tall), place(tall), generator.uniform(0, width), 0)
        for _ in range(generator.poisson(_PEOPLE)):
            tall = float(np.exp(generator.uniform(*np.log(self.heights))))
            margin = min(0.3 * tall + 1, width / 2)
            foot, middle, who = place(tall), generator.uniform(margin, width - margin), len(labels) + 1
            labels[who] = "person"
            stand(figure(generator, tall), foot, middle, who)
            if generator.random() < self.occlusion:
                hidden = (_car, _bin, _pole)[generator.integers(3)](generator, tall * generator.uniform(0.8, 1.1))
                stand(hidden, foot + 1, middle + generator.normal(0, 0.25 * tall), 0)
        if generator.random() < self.crowds:
            tall = self.heights[0] * generator.uniform(0.8, 1.3)
            margin = min(2 * tall, width / 2)
            middle, who = generator.uniform(margin, width - margin), len(labels) + 1
            labels[who] = "people"
            for _ in range(generator.integers(4, 9)):
                stand(
                    figure(generator, tall * generator.uniform(0.9, 1.1)),
                    place(tall),
                    middle + generator.normal(0, 0.4 * tall),
                    who,
                )
        return things, labels


def figure(generator: Generator, tall: float) -> Stamp:
    """A person in the middle of a step: head, trunk, and arms and legs of two parts each.

    Args:
        generator: Where clothes, shape and step come from.
        tall: Height in pixels.
    """
    scale = tall * _FINER / (1 + 0.02)
    canvas = Image.new("RGBA", (round(scale * 0.9), round(scale * 1.02)))
    pen = ImageDraw.Draw(canvas)
    skin = _colour(generator, (230, 190, 160), 60)
    shirt, trousers, hair = (tuple(generator.integers(10, 240, 3).tolist()) for _ in range(3))
    middle, stout = 0.45, generator.uniform(0.85, 1.25)
    step, phase = generator.uniform(0.05, 0.55), generator.uniform(0, 2 * pi)
    lean = generator.normal(0, 0.015)

    def limb(
        start: Point, angles: tuple[float, float], lengths: tuple[float, float], wide: float, upper: Colour, lower: Colour
    ) -> None:
        joint = start
        for angle, length, colour in zip(angles, lengths, (upper, lower), strict=True):
            end = (joint[0] + length * sin(angle), joint[1] + length * cos(angle))
            pen.line([(x * scale, y * scale) for x, y in (joint, end)], fill=colour, width=max(round(wide * scale), 1))
            for x, y in (joint, end):
                _disc(pen, (x * scale, y * scale), wide * scale / 2, colour)
            joint = end

    hips, shoulders = (middle, 0.51), (middle + lean, 0.2)
    bare_arms = skin if generator.random() < 0.4 else shirt
    for side in (-1, 1):  # the far arm and leg first
        swing = side * step * sin(phase)
        knee = -abs(step * cos(phase)) * 0.6
        limb((hips[0] + 0.025 * side, hips[1]), (swing, swing + knee), (0.24, 0.23), 0.085 * stout, trousers, trousers)
        if side < 0:
            limb(
                (shoulders[0] - 0.07 * stout, shoulders[1] + 0.02),
                (swing, swing + 0.4),
                (0.17, 0.15),
                0.055 * stout,
                shirt,
                bare_arms,
            )
    trunk = [
        (shoulders[0] - 0.11 * stout, shoulders[1]),
        (shoulders[0] + 0.11 * stout, shoulders[1]),
        (hips[0] + 0.085 * stout, hips[1] + 0.03),
        (hips[0] - 0.085 * stout, hips[1] + 0.03),
    ]
    pen.polygon([(x * scale, y * scale) for x, y in trunk], fill=shirt)
    if generator.random() < 0.25:  # a coat or a skirt
        pen.polygon(
            [
                (x * scale, y * scale)
                for x, y in (trunk[3], trunk[2], (middle + 0.12 * stout, 0.68), (middle - 0.12 * stout, 0.68))
            ],
            fill=shirt,
        )
    limb(
        (shoulders[0] + 0.07 * stout, shoulders[1] + 0.02),
        (-step * sin(phase), 0.3),
        (0.17, 0.15),
        0.055 * stout,
        shirt,
        bare_arms,
    )
    if generator.random() < 0.3:  # a bag
        pen.rectangle([(middle + 0.1) * scale, 0.42 * scale, (middle + 0.2) * scale, 0.54 * scale], fill=hair)
    _disc(pen, (shoulders[0] * scale, 0.15 * scale), 0.035 * scale, skin)
    _disc(pen, ((shoulders[0] + lean) * scale, 0.072 * scale), 0.072 * scale, hair)
    _disc(pen, ((shoulders[0] + lean + generator.uniform(-0.02, 0.02)) * scale, 0.085 * scale), 0.056 * scale, skin)
    return _stamp(canvas, generator)


def _annotations(outlines: dict[int, NDArray[np.bool_]], labels: dict[int, str], owner: NDArray[np.int64]) -> Annotations:
    rows = []
    for who, outline in outlines.items():
        if not outline.any():  # beyond the edge
            continue
        seen = owner == who
        # Who is hidden but for a tenth is nobody that could be found, nor a mistake to be found.
        hidden = seen.sum() < 0.1 * outline.sum()
        part = (0.0, 0.0, 0.0, 0.0) if seen.sum() > 0.98 * outline.sum() or hidden else _box(seen)
        rows.append((_box(outline), LABELS[labels[who]], part, hidden))
    return Annotations.of(*([row[column] for row in rows] for column in range(4)))


def _box(mask: NDArray[np.bool_]) -> tuple[float, float, float, float]:
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    return float(columns[0]), float(rows[0]), float(columns[-1] - columns[0] + 1), float(rows[-1] - rows[0] + 1)


def _paint(scene: Pixels, thing: Thing) -> NDArray[np.bool_]:
    """Put a thing where it stands; give the pixels that are more its own than of what is behind."""
    outline = np.zeros(scene.shape[:2], dtype=np.bool_)
    high, wide = thing.stamp.cover.shape
    top, left = round(thing.foot) - high, round(thing.left)
    rows = slice(max(top, 0), min(top + high, scene.shape[0]))
    columns = slice(max(left, 0), min(left + wide, scene.shape[1]))
    if rows.start >= rows.stop or columns.start >= columns.stop:
        return outline
    inside = (slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left))
    cover = thing.stamp.cover[inside]
    scene[rows, columns] += cover[..., None] * (thing.stamp.colours[inside] - scene[rows, columns])
    outline[rows, columns] = cover > 0.5
    return outline


def _stamp(canvas: Image.Image, generator: Generator) -> Stamp:
    """What was drawn, at its size, with the grain of cloth and bark."""
    size = (max(round(canvas.width / _FINER), 2), max(round(canvas.height / _FINER), 2))
    # Averaged with colours weighed by cover, so that edges are not darkened by the black of what is transparent.
    pixels = np.asarray(canvas.convert("RGBa").resize(size, Image.Resampling.BOX), dtype=np.float64) / 255
    cover = pixels[..., 3]
    colours = pixels[..., :3] / np.maximum(cover, 1e-3)[..., None]
    shade = 1 + generator.uniform(-0.25, 0.25) * np.linspace(-1, 1, size[0])[None, :, None]
    grain = generator.normal(1, 0.06, (size[1], size[0], 1))
    return Stamp((colours * shade * grain).clip(0, 1), cover)


def _street(generator: Generator, height: int, width: int, horizon: float) -> Pixels:
    """Sky, houses with windows, pavements and the road."""
    canvas = Image.new("RGB", (width, height), _colour(generator, (170, 190, 215), 40))
    pen = ImageDraw.Draw(canvas)
    x = -generator.uniform(0, width / 4)
    ground = horizon + 0.12 * height
    while x < width:
        wide = generator.uniform(0.15, 0.4) * width
        top = horizon - generator.uniform(0.05, 0.4) * height
        wall = _colour(generator, (135, 125, 120), 70)
        pen.rectangle([x, top, x + wide, ground], fill=wall)
        pane, gap = generator.uniform(0.02, 0.05) * width, generator.uniform(0.03, 0.07) * width
        glass = _colour(generator, wall, 60)
        y = top + gap / 2
        while y < ground - pane:
            across = x + gap / 2
            while across < x + wide - pane:
                pen.rectangle([across, y, across + pane, y + 1.6 * pane], fill=glass)
                across += pane + gap
            y += 1.6 * pane + gap
        x += wide
    pen.rectangle([0, ground, width, height], fill=_colour(generator, (150, 145, 140), 25))
    vanishing = generator.uniform(0.3, 0.7) * width
    near = sorted(generator.uniform(-0.4, 1.4, 2) * width)
    pen.polygon(
        [(vanishing - 4, ground), (vanishing + 4, ground), (near[1], height), (near[0], height)],
        fill=_colour(generator, (85, 85, 88), 25),
    )
    for share in np.arange(0.15, 1, 0.2):
        x, y = vanishing + share * (sum(near) / 2 - vanishing), ground + share * (height - ground)
        pen.line(
            [(x, y), (x + 0.06 * (sum(near) / 2 - vanishing), y + 0.06 * (height - ground))],
            fill=(225, 225, 220),
            width=1 + round(3 * share),
        )
    scene = np.asarray(canvas, dtype=np.float64) / 255
    return scene * _texture(generator, height, width)


def _texture(generator: Generator, height: int, width: int) -> Pixels:
    """Noise of several sizes around 1, ``(H, W, 1)``."""
    total = np.ones((height, width))
    for cell, strength in ((3, 0.05), (8, 0.06), (24, 0.06)):
        coarse = generator.normal(0, strength, (height // cell + 2, width // cell + 2)).astype(np.float32)
        total += np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR))
    return total[..., None]


def _drawn(tall: float, wide: float, draw: Callable[[ImageDraw.ImageDraw, float, float], None], generator: Generator) -> Stamp:
    high, across = max(tall, 2) * _FINER, max(wide, 2) * _FINER
    canvas = Image.new("RGBA", (round(across), round(high)))
    draw(ImageDraw.Draw(canvas), across, high)
    return _stamp(canvas, generator)


def _pole(generator: Generator, tall: float) -> Stamp:
    colour, sign = _colour(generator, (90, 90, 90), 50), _colour(generator, (180, 60, 60), 80)
    thick, has_sign = generator.uniform(0.06, 0.2), generator.random() < 0.5

    def draw(pen: ImageDraw.ImageDraw, wide: float, high: float) -> None:
        pen.rectangle([wide * (0.5 - thick), 0, wide * (0.5 + thick), high], fill=colour)
        if has_sign:
            pen.rectangle([0, 0, wide, high * 0.12], fill=sign)

    return _drawn(tall * generator.uniform(0.8, 1.6), tall * 0.3, draw, generator)


def _tree(generator: Generator, tall: float) -> Stamp:
    bark, leaves = _colour(generator, (90, 70, 50), 30), _colour(generator, (70, 100, 55), 45)
    blobs = generator.uniform(0.2, 0.8, (9, 2)).tolist()

    def draw(pen: ImageDraw.ImageDraw, wide: float, high: float) -> None:
        pen.rectangle([wide * 0.44, high * 0.4, wide * 0.56, high], fill=bark)
        for x, y in blobs:
            _disc(pen, (x * wide, y * 0.6 * high), 0.2 * wide, leaves)

    return _drawn(tall * generator.uniform(1.0, 1.7), tall * 0.8, draw, generator)


def _car(generator: Generator, tall: float) -> Stamp:
    paint, glass = _colour(generator, (130, 120, 120), 110), _colour(generator, (60, 70, 80), 30)

    def draw(pen: ImageDraw.ImageDraw, wide: float, high: float) -> None:
        pen.rounded_rectangle([0, high * 0.4, wide, high * 0.88], radius=high * 0.1, fill=paint)
        pen.polygon([(wide * 0.2, high * 0.45), (wide * 0.3, 0), (wide * 0.72, 0), (wide * 0.85, high * 0.45)], fill=paint)
        pen.polygon(
            [(wide * 0.26, high * 0.42), (wide * 0.33, high * 0.08), (wide * 0.69, high * 0.08), (wide * 0.78, high * 0.42)],
            fill=glass,
        )
        for x in (0.22, 0.78):
            _disc(pen, (x * wide, high * 0.85), high * 0.15, (25, 25, 25))

    return _drawn(tall * 0.75, tall * generator.uniform(1.5, 2.2), draw, generator)


def _bin(generator: Generator, tall: float) -> Stamp:
    colour, lid = _colour(generator, (90, 100, 90), 70), _colour(generator, (60, 60, 60), 40)

    def draw(pen: ImageDraw.ImageDraw, wide: float, high: float) -> None:
        pen.polygon([(wide * 0.05, high * 0.1), (wide * 0.95, high * 0.1), (wide * 0.85, high), (wide * 0.15, high)], fill=colour)
        pen.rectangle([0, 0, wide, high * 0.12], fill=lid)

    return _drawn(tall * generator.uniform(0.4, 0.7), tall * 0.4, draw, generator)


def _disc(pen: ImageDraw.ImageDraw, middle: Point, radius: float, colour: Colour) -> None:
    pen.ellipse([middle[0] - radius, middle[1] - radius, middle[0] + radius, middle[1] + radius], fill=colour)


def _colour(generator: Generator, around: Colour, spread: int) -> Colour:
    """A colour brighter or darker by up to the spread, and a little off in hue."""
    off = generator.uniform(-spread, spread) + generator.uniform(-spread / 4, spread / 4, 3)
    red, green, blue = (np.asarray(around) + off).clip(0, 255).astype(int).tolist()
    return red, green, blue
