"""One step of pullback ascent, `x <- P(x + step v / ||v||)` per sample, for the whole batch in two launches.

The first writes partial sums for each piece of each sample, the second adds them up and moves. With a ball of some radius round
the start, the offset after the step is d + step u with d = x - start and u = v / ||v||; its square norm
<d, d> + 2 step <d, u> + step^2 is made of sums that the first launch takes.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import OPTIONS, check, in_one_layout, on_device_of


@triton.jit
def _sums_kernel(
    v_ptr, x_ptr, start_ptr, partial_ptr,  # [samples, n] three times, [samples, 4, pieces]
    n, pieces, blocks,
    BALL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """peak = max |v|, <v, v> / peak^2, <d, v> / peak, <d, d> over one piece, `blocks` blocks long, of one sample."""
    pid = tl.program_id(0)
    sample, piece = (pid // pieces).to(tl.int64), pid % pieces
    lane = tl.arange(0, BLOCK)  # [BLOCK]
    # Pullbacks of 1e-25 are real, and their squares are 0 in float32. The bounds keep 1 / peak finite and out of the denormals.
    peak, vv, dv, dd = 0.0 * sample + 7.52316384526264e-37, 0.0 * sample, 0.0 * sample, 0.0 * sample
    peak, vv, dv, dd = peak.to(tl.float32), vv.to(tl.float32), dv.to(tl.float32), dd.to(tl.float32)
    for block in range(blocks):
        first = (piece * blocks + block).to(tl.int64) * BLOCK
        inside = lane < n - first
        v = tl.load(v_ptr + sample * n + first + lane, mask=inside, other=0).to(tl.float32)  # [BLOCK]
        above = tl.minimum(tl.maximum(peak, tl.max(tl.abs(v), 0)), 1.329227995784916e36)
        v = v * (1 / above)
        vv = vv * (peak / above) * (peak / above) + tl.sum(v * v, 0)
        if BALL:
            x = tl.load(x_ptr + sample * n + first + lane, mask=inside, other=0).to(tl.float32)  # [BLOCK]
            d = x - tl.load(start_ptr + sample * n + first + lane, mask=inside, other=0).to(tl.float32)  # [BLOCK]
            dv = dv * (peak / above) + tl.sum(d * v, 0)
            dd += tl.sum(d * d, 0)
        peak = above
    at = partial_ptr + sample * 4 * pieces + piece
    tl.store(at, peak)
    tl.store(at + pieces, vv)
    if BALL:
        tl.store(at + 2 * pieces, dv)
        tl.store(at + 3 * pieces, dd)


@triton.jit
def _move_kernel(
    v_ptr, x_ptr, start_ptr, partial_ptr, out_ptr,  # [samples, n] three times, [samples, 4, pieces], [samples, n]
    n, pieces, tiles,
    STEP: tl.constexpr, RADIUS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, PIECES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    sample, first = (pid // tiles).to(tl.int64), (pid % tiles).to(tl.int64) * BLOCK
    piece = tl.arange(0, PIECES)  # [PIECES]
    at, real = partial_ptr + sample * 4 * pieces + piece, piece < pieces
    peaks = tl.load(at, mask=real, other=0)  # [PIECES]
    peak = tl.max(peaks, 0)
    ratio = peaks / peak
    vv = tl.sum(tl.load(at + pieces, mask=real, other=0) * ratio * ratio, 0)
    per_norm = tl.where(vv > 0, 1 / tl.sqrt(tl.where(vv > 0, vv, 1.0)), 0.0)  # a zero pullback makes a zero step
    per_norm = tl.where(vv == vv, per_norm, vv)  # NaN stays

    lane = tl.arange(0, BLOCK)  # [BLOCK]
    inside = lane < n - first
    v = tl.load(v_ptr + sample * n + first + lane, mask=inside, other=0).to(tl.float32)  # [BLOCK]
    x = tl.load(x_ptr + sample * n + first + lane, mask=inside, other=0).to(tl.float32)  # [BLOCK]
    step = v * (1 / peak) * (per_norm * STEP)  # [BLOCK]
    moved = x + step
    if RADIUS is not None:
        du = tl.sum(tl.load(at + 2 * pieces, mask=real, other=0) * ratio, 0) * per_norm
        dd = tl.sum(tl.load(at + 3 * pieces, mask=real, other=0), 0)
        offset = tl.sqrt(tl.maximum(dd + 2 * STEP * du + tl.where(vv > 0, STEP * STEP, 0.0), 0.0))
        start = tl.load(start_ptr + sample * n + first + lane, mask=inside, other=0).to(tl.float32)  # [BLOCK]
        # Inside the ball x + step stands as it is, so that a zero step returns x to the bit.
        moved = tl.where(offset > RADIUS, start + (x - start + step) * (RADIUS / tl.maximum(offset, RADIUS)), moved)
    if LOW is not None:
        moved = tl.where(moved < LOW, LOW, moved)
    if HIGH is not None:
        moved = tl.where(moved > HIGH, HIGH, moved)
    tl.store(out_ptr + sample * n + first + lane, moved.to(out_ptr.dtype.element_ty), mask=inside)


def ascent_step(
    x: Tensor, v: Tensor, start: Tensor | None = None, *, step: float, radius: float | None = None,
    low: float | None = None, high: float | None = None,
) -> Tensor:  # fmt: skip
    """`P(x + step * v / ||v||)`, norms over all axes but the first, in the dtype and memory layout of `x`.

    `x`, its pullback `v` and `start`: one shape [B, ...], float32, float16 or bfloat16 (also mixed), any strides; dense tensors
    in one layout are read as they lie. `P` projects on the L2 ball of `radius` round `start`, then clamps to `low` and `high`,
    where there are such. A zero pullback makes a zero step; pullbacks of any size above 1e-38 keep their direction.
    The partial sums are added in a fixed order. Numbers are compiled in: each new one compiles anew.

    Raises:
        TypeError: a dtype that is none of the three (float64 among them).
        ValueError: shapes or devices that do not fit; a radius without a start, or not above 0; low not below high; a step that
            is not finite.
        RuntimeError: CPU tensors outside of Triton's interpreter.
    """
    check("ascent_step", x, v, *(() if start is None else (start,)))
    if x.dim() == 0 or v.shape != x.shape or (start is not None and start.shape != x.shape):
        got = [tuple(t.shape) for t in (x, v, start) if t is not None]
        raise ValueError(f"x, v and start have one shape [B, ...], got {got}")
    if not math.isfinite(step):
        raise ValueError(f"step is a finite L2 length, got {step!r}")
    if radius is not None and (start is None or not 0 < radius < math.inf):
        raise ValueError(f"radius is a finite L2 length above 0 round a start, got {radius!r} and start {start!r}")
    if low is not None and high is not None and not low < high:
        raise ValueError(f"low is below high, got {low!r} and {high!r}")
    x, v, *others = in_one_layout(x, v, *((start,) if start is not None and radius is not None else ()))
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    samples, n = x.shape[0], x[0].numel()
    centre = others[0] if others else x  # without a ball no program reads it
    block, most = 2048, 128  # elements at a time; pieces of one sample, all of which every program of the second launch adds up
    tiles = triton.cdiv(n, block)
    blocks = triton.cdiv(tiles, most)
    pieces = triton.cdiv(tiles, blocks)
    partial = torch.empty((samples, 4, pieces), dtype=torch.float32, device=x.device)
    with on_device_of(x):
        _sums_kernel[(samples * pieces,)](
            v, x, centre, partial, n, pieces, blocks, BALL=radius is not None, BLOCK=block, num_warps=4, **OPTIONS
        )
        _move_kernel[(samples * tiles,)](
            v, x, centre, partial, out, n, pieces, tiles,
            STEP=float(step), RADIUS=radius if radius is None else float(radius), LOW=low if low is None else float(low),
            HIGH=high if high is None else float(high), PIECES=triton.next_power_of_2(pieces), BLOCK=block,
            num_warps=4, **OPTIONS,
        )  # fmt: skip
    return out
