"""Textures: how much of a second colour is mixed into a first, between 0 and 1, at every pixel.

A pattern is a function of a generator and of coordinates `x` [1, W] and `y` [H, 1], float32, in picture widths and at
most half of one from the origin; it returns float32 [H, W]. Objects and backgrounds take theirs from this one list, so
a texture says nothing of the kind.
"""

from __future__ import annotations

import numpy as np

Rng = np.random.Generator


def _wave(rng: Rng, x: np.ndarray, y: np.ndarray, angle: float, cycles: float) -> np.ndarray:
    rate, phase = np.float32(2 * np.pi * cycles), np.float32(rng.uniform(0, 2 * np.pi))
    return np.sin(x * (rate * np.float32(np.cos(angle))) + (y * (rate * np.float32(np.sin(angle))) + phase))


def _lattice(rng: Rng, x: np.ndarray, y: np.ndarray, cycles: float) -> np.ndarray:
    angle = rng.uniform(0, np.pi)
    return _wave(rng, x, y, angle, cycles) * _wave(rng, x, y, angle + np.pi / 2, cycles)


def plain(rng: Rng, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.full(np.broadcast_shapes(x.shape, y.shape), rng.uniform(0, 0.3), np.float32)


def gradient(rng: Rng, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * _wave(rng, x, y, rng.uniform(0, 2 * np.pi), rng.uniform(0.4, 1.2))


def stripes(rng: Rng, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.clip(0.5 + 1.5 * _wave(rng, x, y, rng.uniform(0, np.pi), rng.uniform(4, 14)), 0, 1)


def checks(rng: Rng, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.clip(0.5 + 2.5 * _lattice(rng, x, y, rng.uniform(3, 8)), 0, 1)


def dots(rng: Rng, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.clip(4 * np.abs(_lattice(rng, x, y, rng.uniform(3, 8))) - 2, 0, 1)


def noise(rng: Rng, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    cells = int(rng.integers(4, 28))
    # Linear interpolation of a random grid is one product of matrices: hat functions along y, values, hats along x.
    values = rng.random((cells + 1, cells + 1), dtype=np.float32)
    knots = np.arange(cells + 1, dtype=np.float32)
    down = np.maximum(0, 1 - np.abs((y.reshape(-1, 1) + 0.5) * cells - knots))
    across = np.maximum(0, 1 - np.abs((x.reshape(-1, 1) + 0.5) * cells - knots))
    return np.clip(1.6 * (down @ values @ across.T) - 0.3, 0, 1)


PATTERNS = (plain, gradient, stripes, checks, dots, noise)
