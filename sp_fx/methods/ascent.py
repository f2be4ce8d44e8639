"""Pullback ascent: normalised steps along the pullback, projected on a pixel box and an L2 ball."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..gates.kernels import ascent_step

Bounds = tuple[float | Tensor, float | Tensor]
Clip = Literal["every", "last", "never"] | int
PAPER_STEP, PAPER_NUMEL = 20.0, 3 * 224 * 224


@dataclass(frozen=True)
class Ascent:
    """`x <- P(x + step_size * v / ||v||)`, `steps` times; `v` is the pullback at `x`, norms are over a whole sample.

    `P` first projects on the ball of `radius`, in L2, round the start, then clamps to `bounds`: after "every" step, the "last",
    or "never", or after each `clip`-th step and the last. Source: arXiv:2507.22832, and for the other steps its published code.

    Attributes:
        step_size: the length of a step, in `norm`; None is the paper's 20 at 3 x 224 x 224 for inputs in [-1, 1], which is
            0.0516 for each number, r: in L2 that is r * sqrt(numel of a sample), in L1 r * numel, in the maximum norm r.
        norm: p of the L^p norm that measures a step, from 1 to `math.inf`; None for steps that are not normalised,
            `x + step_size * v`, of step size 1 where there is none.
        joint: norms are over all inputs as one sample: those of a graph, say, whose axis 0 has nodes.
        relative: `step_size` is a part of the norm of the iterate, `x + step_size * ||x|| * v / ||v||`; none is taken from x = 0.

    Raises:
        ValueError: `steps` or `clip` below 1; `step_size` or `radius` not above 0; a low bound not below its high bound; unknown
            `clip`; `norm` below 1; `relative` without a norm or a step size.
    """

    steps: int = 5
    step_size: float | None = None
    bounds: Bounds | None = None
    radius: float | None = None
    clip: Clip = "every"
    norm: float | None = 2.0
    relative: bool = False
    joint: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps is a whole number of at least 1, got {self.steps!r}")
        for name in ("step_size", "radius"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (number and 0 < value < math.inf):
                raise ValueError(f"{name} is a finite length above 0, or None, got {value!r}")
        words = isinstance(self.clip, str) and self.clip in ("every", "last", "never")
        if not words and not (type(self.clip) is int and self.clip >= 1):
            raise ValueError(f"clip is 'every', 'last', 'never', or a whole number n for each n-th step, got {self.clip!r}")
        if self.norm is not None and not (type(self.norm) in (int, float) and self.norm >= 1):
            raise ValueError(f"norm is the p of an L^p norm, 1 or above (math.inf for the largest), or None, got {self.norm!r}")
        if not isinstance(self.relative, bool):
            raise ValueError(f"relative is True or False, got {self.relative!r}")
        if self.relative and (self.norm is None or self.step_size is None):
            raise ValueError("a relative step needs a norm, and a step_size, which is a part of the norm of the inputs: 0.1, say")
        if self.bounds is not None:
            if not isinstance(self.bounds, tuple | list) or len(self.bounds) != 2:
                raise ValueError(f"bounds are (low, high), two numbers or tensors, got {self.bounds!r}")
            low, high = (torch.as_tensor(bound) for bound in self.bounds)
            if not bool((low < high.to(low.device)).all()):
                raise ValueError(f"bounds are (low, high) with low < high throughout, got {self.bounds!r}")

    def length(self, start: Sequence[Tensor]) -> float:
        """Returns the length of a step, in `norm`, for inputs shaped like `start`; of a relative one its part of their norm."""
        if self.step_size is not None or self.norm is None:
            return 1.0 if self.step_size is None else self.step_size
        numel = sum((x if self.joint else x[:1]).numel() for x in start) if start[0].shape[0] else 0
        return PAPER_STEP / math.sqrt(PAPER_NUMEL) * numel ** (1 / self.norm)

    def clamps(self, number: int) -> bool:
        """Returns whether the bounds apply after step `number`, from 1 to `steps`."""
        if isinstance(self.clip, int):
            return number % self.clip == 0 or number == self.steps
        return self.clip == "every" or (self.clip == "last" and number == self.steps)

    def check(self, start: Sequence[Tensor]) -> None:
        """Raises ValueError where a bound does not broadcast to inputs shaped like `start`."""
        for bound in self.bounds or ():
            shape = torch.as_tensor(bound).shape
            for x in start:
                fits = len(shape) <= x.dim() and all(n in (1, m) for n, m in zip(shape[::-1], x.shape[::-1]))
                if not fits:
                    raise ValueError(f"a bound broadcasts to the inputs, {list(x.shape)}, got one of shape {list(shape)}")

    def iterates(self, start: list[Tensor], pull: Callable[[list[Tensor]], list[Tensor]]) -> Iterator[list[Tensor]]:
        """Yields the iterate after each step, and keeps no other; `pull` maps inputs to their pullbacks."""
        self.check(start)
        x = start
        for number in range(1, self.steps + 1):
            x = self.step(start, x, pull, self.clamps(number))
            yield x

    def step(
        self, start: list[Tensor], x: list[Tensor], pull: Callable[[list[Tensor]], list[Tensor]], clamp: bool
    ) -> list[Tensor]:
        """Returns the iterate after `x`; `clamp` says whether the bounds apply to it."""
        length, pulled = self.length(start), pull(x)
        with torch.no_grad():
            if len(x) == 1 and self.norm == 2 and not (self.relative or self.joint):
                fused = ascent_step(x[0], pulled[0], start[0], length, self.radius, self.bounds if clamp else None)
                if fused is not None:
                    return [fused]
            return self.project(start, [a + move for a, move in zip(x, self.moves(x, pulled, length))], clamp)

    def moves(self, x: list[Tensor], v: list[Tensor], length: float) -> list[Tensor]:
        """Returns what a step along `v` adds to `x`, scaled in float32 at least: the numbers of a unit vector in L1 are small."""
        if self.norm is None:
            return [length * part for part in v]
        sizes: list[Any] = [length * norm for norm in norms(x, self.norm, self.joint)] if self.relative else [length] * len(x)
        units = [part / torch.where(norm > 0, norm, 1) for part, norm in zip(v, norms(v, self.norm, self.joint))]
        return [(size * part).to(old.dtype) for size, part, old in zip(sizes, units, v)]

    def project(self, start: list[Tensor], x: list[Tensor], clamp: bool) -> list[Tensor]:
        """Returns `x` projected on the ball round `start` and then, with `clamp`, on the bounds."""
        if self.radius is not None:
            offset = [b - a for a, b in zip(start, x)]
            shrink = [(self.radius / norm).clamp(max=1) for norm in norms(offset, joint=self.joint)]
            x = [a + (s * d).to(d.dtype) for a, s, d in zip(start, shrink, offset)]
        return self.clamped(x) if clamp else x

    def clamped(self, x: list[Tensor]) -> list[Tensor]:
        if self.bounds is None:
            return x
        low, high = self.bounds
        low, high = (b if isinstance(b, Tensor) else torch.tensor(b, dtype=torch.float64) for b in (low, high))
        return [xi.clamp(low.to(xi), high.to(xi)) for xi in x]


def norms(parts: list[Tensor], p: float = 2.0, joint: bool = False) -> list[Tensor]:
    """Returns the L^p norm of each sample over all its `parts` (inputs), float32 at least, once a part, to broadcast with it;
    `joint`: of all as one sample."""
    if joint:
        parts = [part[None] for part in parts]
        return [norm[0] for norm in norms(parts, p)]
    wide = [part.detach().to(torch.promote_types(part.dtype, torch.float32)) for part in parts]
    wide = [part.flatten(1) if part.dim() > 1 else part[:, None] for part in wide]
    peak = torch.stack([torch.linalg.vector_norm(part, math.inf, dim=1) for part in wide]).amax(0)
    total = peak
    if p != math.inf:
        scale = torch.where(peak > 0, peak, 1)  # pullbacks of 1e-25 are real, and their squares are 0 in float32
        scaled = [part / scale[:, None] for part in wide]
        powers = [(part.square() if p == 2 else part.abs().pow(p)).sum(1) for part in scaled]
        total = scale * torch.stack(powers).sum(0).pow(1 / p)
    return [total.view(-1, *[1] * (part.dim() - 1)) for part in parts]
