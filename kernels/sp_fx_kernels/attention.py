"""The soft pullback of attention through its values, `softmax((q k^T scale + mask) / tau)^T v`, without the matrix in memory.

One pass finds each row's maximum and normaliser, a second adds up P^T v for a block of keys over all blocks of queries. At
tau = 1 the first pass computes what a flash forward already returns: hand its log-sum-exp over, and only the second pass runs.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import INTERPRETED, OPTIONS, bounded, check, on_device_of


@triton.jit
def _biased(
    s, rows, cols, mask_ptr, mask_row, mask_col, n, m,
    PER_TAU: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Scores in units of log 2 with the mask, -inf where a query may not look. `rows` and `cols` broadcast to the shape of s."""
    if MASK == "none" and not EDGE:
        return s
    else:
        seen = (rows < n) & (cols < m)
        if CAUSAL:
            seen = seen & (rows >= cols)
        if MASK == "none":
            return tl.where(seen, s, float("-inf"))
        at = mask_ptr + rows.to(tl.int64) * mask_row + cols.to(tl.int64) * mask_col
        if MASK == "bool":
            # As a bound, not a choice: Triton 3.9 fails on AMD to carry truth values from the mask's layout to the product's.
            return tl.minimum(s, tl.where(tl.load(at, mask=seen, other=0) != 0, float("inf"), float("-inf")))
        else:
            # A mask of finfo.min overflows on its way to units of log 2, and a row of them is uniform: bound it. -inf stays.
            bias = tl.load(at, mask=seen, other=float("-inf")).to(tl.float32)
            return s + tl.where(bias == float("-inf"), bias, bounded(bias * (PER_TAU * 1.4426950408889634)))


@triton.jit
def _normalise(
    peak, total, q, k_ptr, k_row, k_col, mask_ptr, mask_row, mask_col, row, start, stop, n, m,
    SCALE: tl.constexpr, PER_TAU: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, EDGE: tl.constexpr, D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Returns each row's maximum and sum of exponentials with the keys from start to stop taken in: [BLOCK_N] both."""
    lane_m, lane_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    for first in range(start, stop, BLOCK_M):
        col = first + lane_m  # [BLOCK_M]
        at = k_ptr + tl.cast(first, tl.int64) * k_row + lane_m[None, :] * k_row + lane_d[:, None] * k_col
        if EDGE or BLOCK_D != D:
            k = tl.load(at, mask=(col < m)[None, :] & (lane_d < D)[:, None], other=0)  # [BLOCK_D, BLOCK_M]
        else:
            k = tl.load(at)  # [BLOCK_D, BLOCK_M]
        s = tl.dot(q, k, input_precision=PRECISION) * (SCALE * PER_TAU * 1.4426950408889634)  # [BLOCK_N, BLOCK_M]
        s = _biased(s, row[:, None], col[None, :], mask_ptr, mask_row, mask_col, n, m, PER_TAU, MASK, CAUSAL, EDGE)
        higher = tl.maximum(peak, tl.max(s, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen so far: no -inf - -inf
        total = total * tl.exp2(peak - base) + tl.sum(tl.exp2(s - base[:, None]), 1)
        peak = higher
    return peak, total


@triton.jit
def _rows_kernel(
    q_ptr, k_ptr, mask_ptr, peak_ptr, inverse_ptr,  # [B, HQ, N, D], [B, HK, M, D], [B, HQ, N, M], [B, HQ, N] twice
    q_batch, q_head, q_row, q_col, k_batch, k_head, k_row, k_col, mask_batch, mask_head, mask_row, mask_col,
    heads, groups, n, m,
    SCALE: tl.constexpr, PER_TAU: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Stores each query's largest score, in units of log 2, and its inverse sum of exponentials; 0 and 0 where it sees no key."""
    blocks = tl.cdiv(n, BLOCK_N)
    first = tl.program_id(0) % blocks * BLOCK_N
    batch_head = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    lane_n, lane_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    row = first + lane_n  # [BLOCK_N]
    q_ptr += batch * q_batch + head * q_head + first.to(tl.int64) * q_row
    k_ptr += batch * k_batch + head // groups * k_head
    mask_ptr += batch * mask_batch + head * mask_head
    here = (row < n)[:, None] & (lane_d < D)[None, :]
    q = tl.load(q_ptr + lane_n[:, None] * q_row + lane_d[None, :] * q_col, mask=here, other=0)  # [BLOCK_N, BLOCK_D]

    peak = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    # Full blocks that every row sees go without a comparison; then, from `ragged` on, the diagonal and the last block.
    ragged = tl.minimum(first, m) // BLOCK_M * BLOCK_M if CAUSAL else m // BLOCK_M * BLOCK_M
    stop = tl.minimum(first + BLOCK_N, m) if CAUSAL else m
    peak, total = _normalise(
        peak, total, q, k_ptr, k_row, k_col, mask_ptr, mask_row, mask_col, row, 0, ragged, n, m,
        SCALE, PER_TAU, MASK, CAUSAL, False, D, BLOCK_N, BLOCK_M, BLOCK_D, PRECISION,
    )  # fmt: skip
    peak, total = _normalise(
        peak, total, q, k_ptr, k_row, k_col, mask_ptr, mask_row, mask_col, row, ragged, stop, n, m,
        SCALE, PER_TAU, MASK, CAUSAL, True, D, BLOCK_N, BLOCK_M, BLOCK_D, PRECISION,
    )  # fmt: skip
    blind = peak == float("-inf")
    at = batch_head * n + row
    tl.store(peak_ptr + at, tl.where(blind, 0.0, peak), mask=row < n)
    tl.store(inverse_ptr + at, tl.where(blind, 0.0, 1 / tl.where(blind, 1.0, total)), mask=row < n)


@triton.jit
def _at_most_zero(x):
    """The two passes round their products on their own: scores of 1e9 can pass their row's maximum by hundreds. NaN stays."""
    return tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _receive(
    received, k, q_ptr, q_row, q_col, v_ptr, v_row, v_col, mask_ptr, mask_row, mask_col, peak_ptr, inverse_ptr,
    col, start, stop, n, m,
    SCALE: tl.constexpr, PER_TAU: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, EDGE: tl.constexpr, SAVED: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Returns `received` plus what the queries from start to stop send to a block of keys: [BLOCK_M, BLOCK_DV]."""
    lane_n, lane_d, lane_v = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    for first in range(start, stop, BLOCK_N):
        row = first + lane_n  # [BLOCK_N]
        first64 = tl.cast(first, tl.int64)
        at = q_ptr + first64 * q_row + lane_n[None, :] * q_row + lane_d[:, None] * q_col
        q = tl.load(at, mask=(row < n)[None, :] & (lane_d < D)[:, None], other=0)  # [BLOCK_D, BLOCK_N]
        s = tl.dot(k, q, input_precision=PRECISION) * (SCALE * PER_TAU * 1.4426950408889634)  # [BLOCK_M, BLOCK_N]
        s = _biased(s, row[None, :], col[:, None], mask_ptr, mask_row, mask_col, n, m, PER_TAU, MASK, CAUSAL, EDGE)
        peak = tl.load(peak_ptr + row, mask=row < n, other=float("inf"))  # [BLOCK_N]; rows past the end weigh exp2(-inf) = 0
        if SAVED:  # a log-sum-exp in units of e; flash kernels mark rows that see nothing by either infinity
            peak = tl.where(peak == float("-inf"), float("inf"), peak * 1.4426950408889634)
            p = tl.exp2(_at_most_zero(s - peak[None, :]))  # [BLOCK_M, BLOCK_N]
        else:
            # The two factors stay apart: with scores near finfo.min a log-sum-exp would lose the logarithm to rounding.
            inverse = tl.load(inverse_ptr + row, mask=row < n, other=0)  # [BLOCK_N]
            p = tl.exp2(_at_most_zero(s - peak[None, :])) * inverse[None, :]  # [BLOCK_M, BLOCK_N]
        at = v_ptr + first64 * v_row + lane_n[:, None] * v_row + lane_v[None, :] * v_col
        v = tl.load(at, mask=(row < n)[:, None] & (lane_v < DV)[None, :], other=0)  # [BLOCK_N, BLOCK_DV]
        received = tl.dot(p.to(v.dtype), v, received, input_precision=PRECISION)  # [BLOCK_M, BLOCK_DV]
    return received


@triton.jit
def _keys_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, peak_ptr, inverse_ptr, out_ptr,  # v [B, HQ, N, DV], out [B, HK, M, DV], others as above
    q_batch, q_head, q_row, q_col, k_batch, k_head, k_row, k_col, v_batch, v_head, v_row, v_col,
    mask_batch, mask_head, mask_row, mask_col,
    heads, groups, n, m,
    SCALE: tl.constexpr, PER_TAU: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, SAVED: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Stores P^T v for one block of keys, summed over the queries and over the query heads that share these keys."""
    blocks, key_heads = tl.cdiv(m, BLOCK_M), heads // groups
    first = tl.program_id(0) % blocks * BLOCK_M
    batch_head = (tl.program_id(0) // blocks).to(tl.int64)
    batch, key_head = batch_head // key_heads, batch_head % key_heads
    lane_m, lane_d, lane_v = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    col = first + lane_m  # [BLOCK_M]
    k_ptr += batch * k_batch + key_head * k_head + first.to(tl.int64) * k_row
    here = (col < m)[:, None] & (lane_d < D)[None, :]
    k = tl.load(k_ptr + lane_m[:, None] * k_row + lane_d[None, :] * k_col, mask=here, other=0)  # [BLOCK_M, BLOCK_D]

    received = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    # Queries before the first key see none of the block, those from `below` on all of it; only those between are compared.
    start = tl.minimum(first, n) // BLOCK_N * BLOCK_N if CAUSAL else 0
    below = tl.minimum(tl.cdiv(first + BLOCK_M, BLOCK_N), tl.cdiv(n, BLOCK_N)) * BLOCK_N if CAUSAL else 0
    for member in range(groups):
        head = key_head * groups + member
        q_head_ptr = q_ptr + batch * q_batch + head * q_head
        v_head_ptr = v_ptr + batch * v_batch + head * v_head
        mask_head_ptr = mask_ptr + batch * mask_batch + head * mask_head
        statistics = (batch * heads + head) * n
        if CAUSAL:
            received = _receive(
                received, k, q_head_ptr, q_row, q_col, v_head_ptr, v_row, v_col, mask_head_ptr, mask_row, mask_col,
                peak_ptr + statistics, inverse_ptr + statistics, col, start, below, n, m,
                SCALE, PER_TAU, MASK, CAUSAL, True, SAVED, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION,
            )  # fmt: skip
        # Keys past the end need no comparison: what they receive is not stored.
        received = _receive(
            received, k, q_head_ptr, q_row, q_col, v_head_ptr, v_row, v_col, mask_head_ptr, mask_row, mask_col,
            peak_ptr + statistics, inverse_ptr + statistics, col, below, n, n, m,
            SCALE, PER_TAU, MASK, CAUSAL, False, SAVED, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION,
        )  # fmt: skip
    at = out_ptr + (batch_head * m + first) * DV + lane_m[:, None] * DV + lane_v[None, :]
    tl.store(at, received.to(out_ptr.dtype.element_ty), mask=(col < m)[:, None] & (lane_v < DV)[None, :])


def _configurations(kept: str, streamed: str) -> list[triton.Config]:
    """Sizes of the block that a program keeps and of those that it streams past it; the arguments name the two constants."""
    sizes = ((64, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2))  # in registers, streamed, warps, stages
    return [triton.Config({kept: own, streamed: passing}, num_warps=w, num_stages=s) for own, passing, w, s in sizes]


# One tuning for each magnitude of the sequence, not for each length.
_rows_tuned = triton.autotune(_configurations("BLOCK_N", "BLOCK_M"), ["SIZE", "D", "MASK", "CAUSAL"])(_rows_kernel)
_keys_tuned = triton.autotune(_configurations("BLOCK_M", "BLOCK_N"), ["SIZE", "D", "DV", "MASK", "CAUSAL", "SAVED"])(_keys_kernel)
_UNTUNED = {"BLOCK_N": 32, "BLOCK_M": 32}  # autotuning asks for a GPU driver, which the interpreter has none of


def attention_adjoint(
    v: Tensor, q: Tensor, k: Tensor, mask: Tensor | None = None, *, tau: float | str = 1.0, is_causal: bool = False,
    scale: float | None = None, lse: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`softmax((q k^T scale + mask) / tau)^T v`, the cotangent of attention's values, [..., HK, M, DV] contiguous in v's dtype.

    `q` [..., HQ, N, D], `k` [..., HK, M, D] and the output's cotangent `v` [..., HQ, N, DV] agree in their leading axes and have
    one dtype, float32, float16 or bfloat16, with any strides; D and DV are at most 128. HQ is a multiple of HK: query head h
    reads key head h // (HQ / HK), and the group is summed. Without a head axis (two or three axes) heads count as one, or as
    what the third axis from the end says. `mask`: bool (True may look) or floating, added to the scores; it broadcasts to
    [..., HQ, N, M] and is not copied. A row that sees no key sends nothing. `is_causal`: query i sees keys up to i.
    `scale`: None is 1 / sqrt(D). `tau`: a number above 0; "frozen" is 1. `lse`: the natural log-sum-exp of each row
    [..., HQ, N] at this temperature, float32; it saves the first pass.
    float32 products run in three TF32 parts on NVIDIA, which is near full precision, and in float32 elsewhere.

    Raises:
        TypeError: dtypes that differ or are none of the three (float64 among them), a mask of integers.
        ValueError: shapes or devices that do not fit, D or DV above 128, a mask together with `is_causal`, a temperature that is
            none.
        RuntimeError: CPU tensors outside of Triton's interpreter.
    """
    check("attention_adjoint", v, q, k, *(() if lse is None else (lse,)))
    temperature = 1.0 if isinstance(tau, str) and tau == "frozen" else tau
    if not isinstance(temperature, int | float) or not 0 < temperature < math.inf:
        raise ValueError(f"attention_adjoint: tau is a finite number above 0, or 'frozen', got {tau!r}")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if mask is not None and is_causal:
        raise ValueError("attention_adjoint takes a mask or is_causal, not both")
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() >= 2:
        raise ValueError(f"q, k and v have the same number of axes, at least two, got {shapes}")
    lead, out_shape = q.shape[:-2], (*k.shape[:-1], v.shape[-1])

    def four_axes(t: Tensor) -> Tensor:
        t = t[(None,) * (4 - t.dim())]
        return t if t.dim() == 4 else t.flatten(0, -4)

    if q.shape[:-1] != v.shape[:-1] or q.shape[:-3] != k.shape[:-3] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q is [..., HQ, N, D], k [..., HK, M, D] and v [..., HQ, N, DV], got {shapes}")
    rows_shape = (*lead, q.shape[-2], k.shape[-2])
    q4, k4, v4 = four_axes(q), four_axes(k), four_axes(v)
    (batch, heads, n, d), (_, key_heads, m, _), dv = q4.shape, k4.shape, v4.shape[-1]
    if key_heads and heads % key_heads:
        raise ValueError(f"the query heads are a multiple of the key heads, got {shapes}")
    if max(d, dv) > 128:
        raise ValueError(f"attention_adjoint holds head dimensions up to 128, got {shapes}")
    if lse is not None and lse.shape != q.shape[:-1]:
        raise ValueError(f"lse is {tuple(q.shape[:-1])}, got {tuple(lse.shape)}")
    if mask is not None:
        if mask.dtype != torch.bool:
            check("attention_adjoint", q, mask)
        elif mask.device != q.device:
            raise ValueError(f"attention_adjoint wants its tensors on one device, got {q.device} and {mask.device}")
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    if 0 in (*v4.shape, *k4.shape):
        return torch.zeros(out_shape, dtype=v.dtype, device=v.device)
    mask_kind = "none" if mask is None else "bool" if mask.dtype == torch.uint8 else "added"
    mask4 = q4 if mask is None else four_axes(mask.expand(rows_shape))
    mask_strides = (0, 0, 0, 0) if mask is None else mask4.stride()

    out = torch.empty((batch, key_heads, m, dv), dtype=v.dtype, device=v.device)
    common = dict(
        SCALE=1 / math.sqrt(d) if scale is None else float(scale), PER_TAU=1 / temperature, MASK=mask_kind, CAUSAL=is_causal, D=d,
        SIZE=min(triton.next_power_of_2(max(n, m)), 4096), BLOCK_D=max(16, triton.next_power_of_2(d)),
        PRECISION="tf32x3" if q.dtype == torch.float32 and torch.version.cuda and not INTERPRETED else "ieee",
        **OPTIONS,
    )  # fmt: skip
    sizes = (heads, heads // key_heads, n, m)
    rows_kernel, keys_kernel, blocks = (_rows_kernel, _keys_kernel, _UNTUNED) if INTERPRETED else (_rows_tuned, _keys_tuned, {})
    with on_device_of(q):
        if lse is None:
            peak, inverse = torch.empty((2, batch, heads, n), dtype=torch.float32, device=q.device)
            rows_kernel[lambda meta: (triton.cdiv(n, meta["BLOCK_N"]) * batch * heads,)](
                q4, k4, mask4, peak, inverse, *q4.stride(), *k4.stride(), *mask_strides, *sizes, **common, **blocks
            )
        else:
            peak = inverse = lse.float().contiguous()
        keys_kernel[lambda meta: (triton.cdiv(m, meta["BLOCK_M"]) * batch * key_heads,)](
            q4, k4, v4, mask4, peak, inverse, out, *q4.stride(), *k4.stride(), *v4.stride(), *mask_strides, *sizes,
            DV=dv, BLOCK_DV=max(16, triton.next_power_of_2(dv)), SAVED=lse is not None, **common, **blocks,
        )  # fmt: skip
    return out.view(out_shape)
