"""Drawn scenes: one object of a known kind, at known pixels, in front of clutter.

Only its shape shows the kind: pose, size, position, colour, texture and background are drawn without looking at it. So the
same seed with other `kinds` gives the same scenes with other objects in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from .patterns import PATTERNS
from .shapes import KINDS, SHAPES, box, disc, polygon

Rng = np.random.Generator


class Scenes(NamedTuple):
    """Scenes with their truth: `pixels` float32 [N, 3, S, S] in [-1, 1], `labels` int64 [N], `masks` bool [N, S, S]."""

    pixels: torch.Tensor
    labels: torch.Tensor
    masks: torch.Tensor


def draw(seed: int, count: int, size: int = 96, kinds: Sequence[str] | None = None, start: int = 0) -> Scenes:
    """Draw `count` scenes of `size` x `size` pixels; scene i depends on `seed`, i, `size` and its kind only.

    `kinds` are names from `KINDS` (None: all ten), taken in turn: scene i shows `kinds[i % len(kinds)]`.
    `start` is the number of the first scene, to draw a long series in parts.

    Returns `Scenes`: `pixels` float32 [count, 3, size, size] in [-1, 1]; `labels` int64 [count], indices into `KINDS`;
    `masks` bool [count, size, size], True where more than half of a pixel shows the object.
    """
    kinds = KINDS if kinds is None else tuple(kinds)
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"kinds must be one or more of {', '.join(KINDS)}; got {unknown or 'none'}")
    if count < 0 or size < 16 or seed < 0 or start < 0:
        raise ValueError(f"need seed, start, count >= 0 and size >= 16; got {seed=}, {start=}, {count=}, {size=}")
    pixels = np.empty((count, 3, size, size), np.float32)
    masks = np.empty((count, size, size), bool)
    names = [kinds[i % len(kinds)] for i in range(start, start + count)]
    for i, name in enumerate(names):
        pixels[i], masks[i] = _scene(np.random.default_rng((seed, start + i)), name, size)
    labels = torch.tensor([KINDS.index(name) for name in names], dtype=torch.int64)
    return Scenes(torch.from_numpy(pixels), labels, torch.from_numpy(masks))


def _scene(rng: Rng, kind: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    canvas = _Canvas(size)
    _background(rng, canvas)
    for _ in range(rng.integers(2, 7)):
        _distractor(rng, canvas)
    visible = _object(rng, canvas, kind)
    for _ in range(rng.integers(1, 4)):
        _distractor(rng, canvas, visible)
    picture = canvas.picture
    picture += np.float32(rng.uniform(0.0, 0.05)) * rng.standard_normal(picture.shape, dtype=np.float32)
    return np.clip(picture, 0, 1) * 2 - 1, visible > 0.5


class _Canvas:
    """A picture, float32 [3, S, S] in [0, 1], with pixel coordinates in picture widths from the centre, y up."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.picture = np.empty((3, size, size), np.float32)
        self.x = ((np.arange(size, dtype=np.float32) + 0.5) / size - 0.5)[None, :]
        self.y = -self.x.T

    def window(self, cx: float, cy: float, radius: float) -> tuple[slice, slice]:
        """Rows and columns that hold a disc, so that small things cost little."""

        def span(centre: float) -> slice:
            low, high = (centre - radius + 0.5) * self.size - 2, (centre + radius + 0.5) * self.size + 2
            return slice(max(0, int(low)), max(0, min(self.size, int(high) + 1)))

        return span(-cy), span(cx)

    def cover(self, distance: np.ndarray) -> np.ndarray:
        """Coverage in [0, 1] from a signed distance in picture widths: an edge one pixel wide, so it is smooth."""
        return np.clip(0.5 - distance * self.size, 0, 1)

    def paint(self, where: tuple[slice, slice], cover: np.ndarray, colour: np.ndarray) -> None:
        part = self.picture[:, *where]
        part += cover * (colour - part)


def _colour(rng: Rng) -> np.ndarray:
    return rng.random((3, 1, 1), dtype=np.float32)


def _mix(rng: Rng, x: np.ndarray, y: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return first + PATTERNS[rng.integers(len(PATTERNS))](rng, x, y) * (second - first)


def _background(rng: Rng, canvas: _Canvas) -> None:
    base = _colour(rng)
    near = [base + np.float32(0.6) * (_colour(rng) - base) for _ in range(4)]
    canvas.picture[:] = _mix(rng, canvas.x, canvas.y, near[0], near[1])
    # A second texture shows through where a third pattern lets it.
    other = _mix(rng, canvas.x, canvas.y, near[2], near[3])
    through = PATTERNS[rng.integers(1, len(PATTERNS))](rng, canvas.x, canvas.y)
    canvas.picture += np.float32(rng.uniform(0.2, 0.8)) * through * (other - canvas.picture)
    for _ in range(rng.integers(0, 4)):
        _blob(rng, canvas)
    for _ in range(rng.integers(0, 4)):
        _line(rng, canvas)


def _blob(rng: Rng, canvas: _Canvas) -> None:
    (cx, cy), radius = rng.uniform(-0.5, 0.5, 2), rng.uniform(0.1, 0.3)
    falloff = np.exp(-(((canvas.x - cx) / radius) ** 2)) * np.exp(-(((canvas.y - cy) / radius) ** 2))
    canvas.paint((slice(None), slice(None)), np.float32(rng.uniform(0.3, 0.8)) * falloff.astype(np.float32), _colour(rng))


def _line(rng: Rng, canvas: _Canvas) -> None:
    angle, offset, half = rng.uniform(0, np.pi), rng.uniform(-0.45, 0.45), rng.uniform(0.004, 0.02)
    across = canvas.x * np.float32(np.cos(angle)) + (canvas.y * np.float32(np.sin(angle)) - np.float32(offset))
    canvas.paint((slice(None), slice(None)), canvas.cover(np.abs(across) - np.float32(half)), _colour(rng))


def _distractor(rng: Rng, canvas: _Canvas, visible: np.ndarray | None = None) -> None:
    """Paint a small simple shape. `visible` [S, S] is the object's share of each pixel: a shape that would hide more than a
    twentieth of it is left out, and any other takes what it hides out of `visible`."""
    (cx, cy), radius, which = rng.uniform(-0.5, 0.5, 2), rng.uniform(0.03, 0.085), rng.integers(4)
    angle, colour, strength = rng.uniform(0, 2 * np.pi), _colour(rng), rng.uniform(0.7, 1)
    where = rows, columns = canvas.window(cx, cy, 1.5 * radius)
    x, y = _local(canvas.x[:, columns] - np.float32(cx), canvas.y[rows] - np.float32(cy), _turn(angle) / radius)
    if which == 0:
        distance = disc(x, y, 0, 0, 0.9)
    elif which == 1:
        distance = box(x, y, 0, 0, 0.85, 0.85)
    elif which == 2:
        distance = polygon(x, y, (0, 1.1), (-0.95, -0.55), (0.95, -0.55))
    else:
        distance = box(x, y, 0, 0, 1.4, 0.3)
    cover = canvas.cover(distance * np.float32(radius))
    if visible is not None:
        hidden = visible[where] * cover
        if hidden.sum() > 0.05 * visible.sum():
            return
        visible[where] -= hidden
    canvas.paint(where, np.float32(strength) * cover, colour)


def _object(rng: Rng, canvas: _Canvas, kind: str) -> np.ndarray:
    """Paint the object. Returns the share of each pixel that it covers, float32 [S, S]."""
    # Half its width, in picture widths: 25% to 60% of the picture from side to side.
    half = rng.uniform(0.135, 0.305)
    stretch, shear, angle = np.exp(rng.uniform(-0.15, 0.15)), rng.uniform(-0.15, 0.15), np.deg2rad(rng.uniform(-35, 35))
    pose = _turn(angle) @ np.array([[stretch, shear], [0, 1 / stretch]]) @ np.diag([rng.choice((-1.0, 1.0)), 1.0])
    reach = 1.02 * half * float(np.linalg.norm(pose, 2))
    cx, cy = rng.uniform(-1, 1, 2) * (0.49 - reach)
    variation = rng.uniform(-1, 1, 4)

    where = rows, columns = canvas.window(cx, cy, reach)
    right, up = canvas.x[:, columns] - np.float32(cx), canvas.y[rows] - np.float32(cy)
    x, y = _local(right, up, np.linalg.inv(half * pose))
    outline, detail = SHAPES[kind](x, y, variation)

    first, second = _contrasting(rng, canvas.picture[:, rows, columns].mean((1, 2), keepdims=True))
    skin = _mix(rng, right, up, first, second)
    rim, shade = rng.uniform(0.0, 0.02), np.float32(rng.choice((0.15, 0.85)))
    has_rim, detail_shade = rng.random() < 0.5, np.float32(rng.choice((0.1, 0.9)))
    unit = np.float32(half)
    if detail is not None:
        skin += np.float32(0.8) * canvas.cover(detail * unit) * (detail_shade - skin)
    if has_rim:
        skin += (1 - canvas.cover(outline * unit + np.float32(rim))) * (shade - skin)
    cover = canvas.cover(outline * unit)
    canvas.paint(where, cover, skin)

    visible = np.zeros((canvas.size, canvas.size), np.float32)
    visible[where] = cover
    return visible


def _contrasting(rng: Rng, ground: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two colours that stand out from `ground`: of eight drawn, the first far enough away, and one between the rest."""
    colours = rng.random((8, 3, 1, 1), dtype=np.float32)
    far = np.sqrt(((colours - ground) ** 2).sum((1, 2, 3)))
    order = np.argsort(far < 0.6, kind="stable")
    first, second = colours[order[0]], colours[order[1]]
    return first, first + np.float32(rng.uniform(0.4, 0.9)) * (second - first)


def _turn(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _local(x: np.ndarray, y: np.ndarray, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    (a, b), (c, d) = matrix.astype(np.float32)
    return a * x + b * y, c * x + d * y
