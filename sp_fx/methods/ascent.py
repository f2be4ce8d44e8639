"""Pullback ascent: normalised steps along the pullback, projected on a pixel box and an L2 ball."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..gates.kernels import ascent_step

Bounds = tuple[float | Tensor, float | Tensor]
Clip = Literal["every", "last", "never"]
PAPER_STEP, PAPER_NUMEL = 20.0, 3 * 224 * 224


@dataclass(frozen=True)
class Ascent:
    """`x <- P(x + step_size * v / ||v||)`, `steps` times; `v` is the pullback at `x`, norms are L2 over a whole sample.

    `P` first projects on the ball of `radius` round the start, then clamps to `bounds` (after "every" step, the "last", or
    "never"). `step_size=None` is 20 * sqrt(numel of a sample / 150528): the paper's 20 at 3 x 224 x 224, for inputs in
    [-1, 1]. Source: arXiv:2507.22832.

    Raises:
        ValueError: `steps` below 1; `step_size` or `radius` not above 0; a low bound not below its high bound; unknown `clip`.
    """

    steps: int = 5
    step_size: float | None = None
    bounds: Bounds | None = None
    radius: float | None = None
    clip: Clip = "every"

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps is a whole number of at least 1, got {self.steps!r}")
        for name in ("step_size", "radius"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (number and 0 < value < math.inf):
                raise ValueError(f"{name} is a finite L2 length above 0, or None, got {value!r}")
        if self.clip not in ("every", "last", "never"):
            raise ValueError(f"clip is 'every', 'last' or 'never', got {self.clip!r}")
        if self.bounds is not None:
            if not isinstance(self.bounds, tuple | list) or len(self.bounds) != 2:
                raise ValueError(f"bounds are (low, high), two numbers or tensors, got {self.bounds!r}")
            low, high = (torch.as_tensor(bound) for bound in self.bounds)
            if not bool((low < high.to(low.device)).all()):
                raise ValueError(f"bounds are (low, high) with low < high throughout, got {self.bounds!r}")

    def length(self, start: Sequence[Tensor]) -> float:
        """Returns the length of a step in L2, for inputs shaped like `start`."""
        numel = sum(x[:1].numel() for x in start) if start[0].shape[0] else 0
        return PAPER_STEP * math.sqrt(numel / PAPER_NUMEL) if self.step_size is None else self.step_size

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
            clamp = self.clip == "every" or (self.clip == "last" and number == self.steps)
            x = self.step(start, x, pull, clamp)
            yield x

    def step(
        self, start: list[Tensor], x: list[Tensor], pull: Callable[[list[Tensor]], list[Tensor]], clamp: bool
    ) -> list[Tensor]:
        """Returns the iterate after `x`; `clamp` says whether the bounds apply to it."""
        length, pulled = self.length(start), pull(x)
        with torch.no_grad():
            if len(x) == 1:
                fused = ascent_step(x[0], pulled[0], start[0], length, self.radius, self.bounds if clamp else None)
                if fused is not None:
                    return [fused]
            return self.project(start, [a + length * v for a, v in zip(x, unit(pulled))], clamp)

    def project(self, start: list[Tensor], x: list[Tensor], clamp: bool) -> list[Tensor]:
        """Returns `x` projected on the ball round `start` and then, with `clamp`, on the bounds."""
        if self.radius is not None:
            offset = [b - a for a, b in zip(start, x)]
            shrink = [(self.radius / norm).clamp(max=1) for norm in norms(offset)]
            x = [a + (s * d).to(d.dtype) for a, s, d in zip(start, shrink, offset)]
        return self.clamped(x) if clamp else x

    def clamped(self, x: list[Tensor]) -> list[Tensor]:
        if self.bounds is None:
            return x
        low, high = self.bounds
        return [xi.clamp(torch.as_tensor(low).to(xi), torch.as_tensor(high).to(xi)) for xi in x]


def norms(parts: list[Tensor]) -> list[Tensor]:
    """Returns the L2 norm of each sample over all its `parts` (inputs), float32 at least, once a part, to broadcast with it."""
    wide = [part.detach().to(torch.promote_types(part.dtype, torch.float32)) for part in parts]
    wide = [part.flatten(1) if part.dim() > 1 else part[:, None] for part in wide]
    peak = torch.stack([torch.linalg.vector_norm(part, math.inf, dim=1) for part in wide]).amax(0)
    peak = torch.where(peak > 0, peak, 1)  # pullbacks of 1e-25 are real, and their squares are 0 in float32
    total = peak * torch.stack([(part / peak[:, None]).square().sum(1) for part in wide]).sum(0).sqrt()
    return [total.view(-1, *[1] * (part.dim() - 1)) for part in parts]


def unit(parts: list[Tensor]) -> list[Tensor]:
    """Returns each sample scaled to L2 norm 1 over all its `parts`; a zero sample stays zero."""
    return [(part / torch.where(norm > 0, norm, 1)).to(part.dtype) for part, norm in zip(parts, norms(parts))]
