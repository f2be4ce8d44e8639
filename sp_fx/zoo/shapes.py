"""The ten kinds of object, as signed distances.

A kind is a function of local coordinates `x` (right) and `y` (up), both float32 of one shape, and of `v`, four numbers
in [-1, 1] that vary its proportions. It fills about the unit disc and returns two arrays of that shape: the signed
distance to its outline, negative inside, in local units; and that to its inner details (a door, an eye), or None.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy import abs, hypot, maximum, minimum

Field = np.ndarray
Shape = Callable[[Field, Field, np.ndarray], tuple[Field, "Field | None"]]


def disc(x: Field, y: Field, cx: float, cy: float, radius: float) -> Field:
    return hypot(x - cx, y - cy) - radius


def box(x: Field, y: Field, cx: float, cy: float, half_width: float, half_height: float) -> Field:
    return maximum(abs(x - cx) - half_width, abs(y - cy) - half_height)


def ellipse(x: Field, y: Field, cx: float, cy: float, a: float, b: float) -> Field:
    # The implicit function over the length of its gradient: exact on the outline, which is all that is drawn.
    u, w = (x - cx) / a, (y - cy) / b
    radius = hypot(u, w)
    return radius * (radius - 1) / (hypot(u / a, w / b) + 1e-6)


def polygon(x: Field, y: Field, *points: tuple[float, float]) -> Field:
    near = np.full(x.shape, np.inf, np.float32)
    inside = np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(points, points[1:] + points[:1], strict=True):
        ex, ey, px, py = bx - ax, by - ay, x - ax, y - ay
        along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
        near = minimum(near, (px - along * ex) ** 2 + (py - along * ey) ** 2)
        # A ray to the right crosses this edge when the edge spans y and the point lies to the left of it.
        inside ^= ((ay > y) != (by > y)) & ((px * ey < py * ex) == (ey > 0))
    return np.where(inside, -1, 1).astype(np.float32) * np.sqrt(near)


def arrow(x, y, v):
    neck, head, shaft = 0.15 + 0.15 * v[0], 0.6 + 0.1 * v[1], 0.21 + 0.05 * v[2]
    tail = ((neck, -shaft), (-0.97, -shaft), (-0.97, shaft), (neck, shaft))
    return polygon(x, y, (neck, head), (0.97, 0), (neck, -head), *tail), None


def crescent(x, y, v):
    return maximum(disc(x, y, 0, 0, 0.94), -disc(x, y, 0.5 + 0.1 * v[0], 0.12 * v[1], 0.74 + 0.06 * v[2])), None


def cross(x, y, v):
    long, arm = 0.92, 0.27 + 0.07 * v[0]
    return minimum(box(x, y, 0, 0, long, arm), box(x, y, 0, 0, arm, long)), None


def fish(x, y, v):
    body = ellipse(x, y, 0.24, 0, 0.72, 0.43 + 0.06 * v[0])
    fork, spread = -0.8 + 0.1 * v[1], 0.5 + 0.08 * v[2]
    tail = polygon(x, y, (-0.3, 0.08), (-0.98, spread), (fork, 0), (-0.98, -spread), (-0.3, -0.08))
    fin = polygon(x, y, (0.5, 0.3), (-0.1, 0.72 + 0.06 * v[3]), (-0.2, 0.2))
    return minimum(minimum(body, tail), fin), disc(x, y, 0.6, 0.1, 0.1)


def heart(x, y, v):
    # A square on its corner, with a half disc on each upper side.
    half = 0.72 + 0.03 * v[0]
    x, y = abs(x), y + 0.22
    diamond = (x + abs(y) - half) * np.float32(0.5**0.5)
    return minimum(diamond, disc(x, y, half / 2, half / 2, half * 0.5**0.5)), None


def house(x, y, v):
    eaves, ridge, wall = 0.02 + 0.1 * v[0], 0.86 + 0.08 * v[1], 0.6 + 0.05 * v[2]
    walls = box(x, y, 0, (eaves - 0.82) / 2, wall, (eaves + 0.82) / 2 + 0.01)
    roof = polygon(x, y, (-0.86, eaves), (0, ridge), (0.86, eaves))
    chimney = box(x, y, 0.46, 0.5, 0.11, 0.3)
    side = 0.25 if v[3] > 0 else -0.25
    door, window = box(x, y, side, -0.57, 0.13, 0.26), box(x, y, -side, -0.36, 0.15, 0.14)
    return minimum(minimum(walls, roof), chimney), minimum(door, window)


def key(x, y, v):
    bow = abs(disc(x, y, -0.54, 0, 0.33 + 0.03 * v[0])) - (0.13 + 0.02 * v[1])
    stem = box(x, y, 0.34, 0, 0.6, 0.11)
    bits = minimum(box(x, y, 0.82, -0.2, 0.11, 0.24 + 0.04 * v[2]), box(x, y, 0.48, -0.2, 0.1, 0.2 + 0.04 * v[3]))
    return minimum(minimum(bow, stem), bits), None


def mushroom(x, y, v):
    brim = 0.02 + 0.08 * v[0]
    cap = maximum(ellipse(x, y, 0, brim, 0.92, 0.82 + 0.06 * v[1]), brim - y)
    foot, neck = 0.34 + 0.05 * v[2], 0.22 + 0.04 * v[2]
    stem = polygon(x, y, (-foot, -0.9), (foot, -0.9), (neck, brim + 0.1), (-neck, brim + 0.1))
    spots = minimum(disc(x, y, -0.42, brim + 0.28, 0.13), disc(x, y, 0.36, brim + 0.22, 0.15))
    return minimum(cap, stem), minimum(spots, disc(x, y, -0.02, brim + 0.55, 0.12))


def ring(x, y, v):
    return abs(disc(x, y, 0, 0, 0.71)) - (0.2 + 0.05 * v[0]), None


def star(x, y, v):
    turn, waist = np.arange(10) * np.pi / 5, 0.42 + 0.05 * v[0]
    radius = np.where(np.arange(10) % 2, waist, 1.0)
    return polygon(x, y, *zip((radius * np.sin(turn)).tolist(), (radius * np.cos(turn)).tolist(), strict=True)), None


SHAPES: dict[str, Shape] = {
    shape.__name__: shape for shape in (arrow, crescent, cross, fish, heart, house, key, mushroom, ring, star)
}
KINDS: tuple[str, ...] = tuple(SHAPES)
