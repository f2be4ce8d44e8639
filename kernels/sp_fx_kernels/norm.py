"""The pullback of LayerNorm and RMSNorm with frozen statistics, `v * gamma / deviation`: the mean is a constant too."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import triton
import triton.language as tl
from torch import Tensor, contiguous_format, empty_like, float32

from .common import OPTIONS, check, on_device_of


@triton.jit
def _norm_kernel(
    v_ptr, x_ptr, gamma_ptr, rstd_ptr, out_ptr,  # [rows, n], [rows, n], [n], [rows], [rows, n]
    rows, n, v_stride, x_stride,
    EPS: tl.constexpr, CENTRED: tl.constexpr, SCALED: tl.constexpr, SAVED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    present = row < rows
    row = row.to(tl.int64)
    lane = tl.arange(0, BLOCK)  # [BLOCK]
    if SAVED:
        rstd = tl.load(rstd_ptr + row, mask=present, other=0).to(tl.float32)  # [ROWS]
    else:
        # Deviations from the block's own mean, merged as Chan, Golub and LeVeque do: one read of x, and no difference of squares.
        mean = tl.zeros([ROWS], tl.float32)
        total = tl.zeros([ROWS], tl.float32)  # sum of squared deviations; of squares where the mean stays out
        for first in range(0, n if LOOP else 1, BLOCK):
            inside = present[:, None] & (first + lane < n)[None, :]
            at = x_ptr + row[:, None] * x_stride + first + lane[None, :]
            x = tl.load(at, mask=inside, other=0).to(tl.float32)  # [ROWS, BLOCK]
            if CENTRED:
                count = tl.minimum(n - first, BLOCK).to(tl.float32)
                block_mean = tl.sum(x, 1) / count  # [ROWS]
                deviation = tl.where(inside, x - block_mean[:, None], 0.0)  # [ROWS, BLOCK]
                shift = block_mean - mean
                total += tl.sum(deviation * deviation, 1) + shift * shift * (count * first / (first + count))
                mean += shift * (count / (first + count))
            else:
                total += tl.sum(x * x, 1)
        rstd = tl.rsqrt(total / n + EPS)  # [ROWS]
    for first in range(0, n if LOOP else 1, BLOCK):
        inside = present[:, None] & (first + lane < n)[None, :]
        at = v_ptr + row[:, None] * v_stride + first + lane[None, :]
        v = tl.load(at, mask=inside, other=0).to(tl.float32)  # [ROWS, BLOCK]
        gain = rstd[:, None]
        if SCALED:
            gamma = tl.load(gamma_ptr + first + lane, mask=first + lane < n, other=0).to(tl.float32)  # [BLOCK]
            gain = gain * gamma[None, :]  # [ROWS, BLOCK]
        tl.store(out_ptr + row[:, None] * n + first + lane[None, :], (v * gain).to(out_ptr.dtype.element_ty), mask=inside)


def norm_adjoint(
    v: Tensor, x: Tensor, gamma: Tensor | None, normalized_shape: Sequence[int], *, eps: float, centred: bool,
    rstd: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`v * gamma * rstd` with `rstd = 1 / sqrt(var(x) + eps)` over the last axes: LayerNorm's pullback, statistics frozen.

    `v` and `x`: one shape that ends in `normalized_shape`, float32, float16 or bfloat16, read in place where rows are contiguous.
    `gamma`: `normalized_shape`, or None. `centred=False` takes the mean square instead of the variance: RMSNorm. `rstd`: one
    number a row, if the forward pass has saved it; then `x` is not read. The result is contiguous, in x's dtype.

    Raises:
        TypeError: a dtype that is none of the three (float64 among them).
        ValueError: shapes or devices that do not fit.
        RuntimeError: CPU tensors outside of Triton's interpreter.
    """
    check("norm_adjoint", v, x, *(t for t in (gamma, rstd) if t is not None))
    shape, n = tuple(normalized_shape), prod(normalized_shape)
    if v.shape != x.shape or not shape or x.shape[-len(shape) :] != shape:
        raise ValueError(f"v and x have one shape that ends in {shape}, got {tuple(v.shape)} and {tuple(x.shape)}")
    if gamma is not None and gamma.shape != shape:
        raise ValueError(f"gamma has the normalized shape {shape}, got {tuple(gamma.shape)}")
    out = empty_like(x, memory_format=contiguous_format)
    if x.numel() == 0:
        return out
    rows = x.numel() // n
    if rstd is not None and rstd.numel() != rows:
        raise ValueError(f"rstd holds one number for each of the {rows} rows, got {tuple(rstd.shape)}")
    v, x = (t if n == 1 or t.stride(1) == 1 else t.contiguous() for t in (v.reshape(rows, n), x.reshape(rows, n)))
    block = min(triton.next_power_of_2(n), 8192)
    together = max(1, min(16, 1024 // block))  # short rows share a program, or most of its threads would idle
    with on_device_of(x):
        _norm_kernel[(triton.cdiv(rows, together),)](
            v, x, x if gamma is None else gamma.contiguous(), x if rstd is None else rstd.to(float32).contiguous(), out,
            rows, n, v.stride(0), x.stride(0),
            EPS=float(eps), CENTRED=centred, SCALED=gamma is not None, SAVED=rstd is not None,
            ROWS=together, BLOCK=block, LOOP=n > block, num_warps=4 if block <= 2048 else 8, **OPTIONS,
        )  # fmt: skip
    return out
