"""The soft pullback of 2-D max pooling: each window's cotangent spread over the window by `softmax(window / tau)`.

Two passes, neither with atomics, so that the result is the same in every run: the share that a weight of 1 gets in each window,
then for each pixel the sum over the windows that contain it. One fused pass would take every window's sum once a pixel: for
3 x 3 at stride 2 that is 36 exponentials a pixel instead of 4 + 9/4, more than the memory traffic saved is worth.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import OPTIONS, bounded, check, check_temperature, on_device_of


@triton.jit
def _weight(x, y, per_tau, HARD: tl.constexpr):
    """`exp((x - y) / tau)` against the window's maximum y, already bounded; hard, 1 at the maxima and 0 elsewhere."""
    difference = bounded(x) - y
    if HARD:
        return tl.where(difference >= 0, 1.0, 0.0)
    else:
        return tl.exp2(difference * (per_tau * 1.4426950408889634))


@triton.jit
def _share_kernel(
    v_ptr, x_ptr, y_ptr, tau_ptr, share_ptr,  # windows [outer, OH, OW, INNER], pixels [outer, H, W, INNER]
    n,
    TAU: tl.constexpr, HARD: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr, INNER: tl.constexpr, SAMPLE: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, WIDE: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stores each window's cotangent over the sum of its weights."""
    window = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = window < n
    if not WIDE:
        window = window.to(tl.int32)  # divisions in 64 bits cost several times more
    inner, ow = window % INNER, window // INNER % OW
    oh, outer = window // (INNER * OW) % OH, window // (INNER * OW * OH)
    if TAU is None:
        per_tau = 1 / tl.load(tau_ptr + window // SAMPLE, mask=inside, other=1)  # [BLOCK]
    else:
        per_tau = 1 / TAU
    y = bounded(tl.load(y_ptr + window, mask=inside, other=0).to(tl.float32))  # [BLOCK]
    total = tl.zeros([BLOCK], tl.float32)
    for tap in tl.range(0, KH * KW, loop_unroll_factor=UNROLL):
        h = oh * SH - PH + tap // KW * DH  # [BLOCK]
        w = ow * SW - PW + tap % KW * DW
        present = inside & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        x = tl.load(x_ptr + ((outer * H + h) * W + w) * INNER + inner, mask=present, other=0).to(tl.float32)  # [BLOCK]
        total += tl.where(present, _weight(x, y, per_tau, HARD), 0.0)
    v = tl.load(v_ptr + window, mask=inside, other=0).to(tl.float32)  # [BLOCK]
    total = tl.where(inside, total, 1.0)  # never 0 for a window, whose maximum weighs 1
    tl.store(share_ptr + window, v / total, mask=inside)


@triton.jit
def _gather_kernel(
    share_ptr, x_ptr, y_ptr, tau_ptr, out_ptr,  # windows [outer, OH, OW, INNER], pixels [outer, H, W, INNER]
    n,
    TAU: tl.constexpr, HARD: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr, INNER: tl.constexpr, SAMPLE: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, WIDE: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stores for each pixel the sum over the windows that contain it, at most dilation (kernel - 1) // stride + 1 an axis."""
    JH: tl.constexpr = DH * (KH - 1) // SH + 1
    JW: tl.constexpr = DW * (KW - 1) // SW + 1
    pixel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = pixel < n
    if not WIDE:
        pixel = pixel.to(tl.int32)
    inner, w = pixel % INNER, pixel // INNER % W
    h, outer = pixel // (INNER * W) % H, pixel // (INNER * W * H)
    if TAU is None:
        per_tau = 1 / tl.load(tau_ptr + pixel // SAMPLE, mask=inside, other=1)  # [BLOCK]
    else:
        per_tau = 1 / TAU
    x = tl.load(x_ptr + pixel, mask=inside, other=0).to(tl.float32)  # [BLOCK]
    received = tl.zeros([BLOCK], tl.float32)
    for window in tl.range(0, JH * JW, loop_unroll_factor=UNROLL):
        oh = (h + PH) // SH - window // JW  # [BLOCK], from the last window that begins at or before the pixel
        ow = (w + PW) // SW - window % JW
        dh, dw = h + PH - oh * SH, w + PW - ow * SW  # into the window, >= 0
        present = inside & (oh >= 0) & (oh < OH) & (ow >= 0) & (ow < OW)
        present = present & (dh % DH == 0) & (dh <= DH * (KH - 1)) & (dw % DW == 0) & (dw <= DW * (KW - 1))
        at = ((outer * OH + oh) * OW + ow) * INNER + inner  # [BLOCK]
        share = tl.load(share_ptr + at, mask=present, other=0)  # [BLOCK]
        y = bounded(tl.load(y_ptr + at, mask=present, other=0).to(tl.float32))  # [BLOCK]
        received += tl.where(present, share * _weight(x, y, per_tau, HARD), 0.0)
    tl.store(out_ptr + pixel, received.to(out_ptr.dtype.element_ty), mask=inside)


def max_pool_adjoint(
    v: Tensor, x: Tensor, y: Tensor, *, tau: float | Tensor | str, kernel: Sequence[int], stride: Sequence[int],
    padding: Sequence[int] = (0, 0), dilation: Sequence[int] = (1, 1),
) -> Tensor:  # fmt: skip
    """The cotangent of `x` for max pooling `x -> y`, in the dtype and memory format of `x`.

    `x`: [B, C, H, W] or [C, H, W]; `y`, its maxima, and `v`, their cotangent: [B, C, OH, OW] or [C, OH, OW], whose size decides
    the number of windows, so that `ceil_mode` needs no mention. All float32, float16 or bfloat16; contiguous and channels_last
    are read as they lie. Kernel, stride, padding and dilation are pairs. Padding gets nothing; overlapping windows add.
    `tau`: a number above 0, "frozen" (the maxima share equally), or a tensor of B numbers, one a sample.
    Numbers and sizes, the batch's excepted, are compiled in: divisions by what is known only at run time would cost more than the
    exponentials.

    Raises:
        TypeError: a dtype that is none of the three (float64 among them).
        ValueError: shapes or devices that do not fit, a temperature that is none.
        RuntimeError: CPU tensors outside of Triton's interpreter.
    """
    check("max_pool_adjoint", v, x, y)
    check_temperature("max_pool_adjoint", tau)
    if x.dim() not in (3, 4) or v.shape != y.shape or v.shape[:-2] != x.shape[:-2]:
        got = f"{tuple(x.shape)}, {tuple(v.shape)} and {tuple(y.shape)}"
        raise ValueError(f"x is [B, C, H, W] or [C, H, W], v and y [B, C, OH, OW] or [C, OH, OW], got {got}")
    pairs = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    for name, pair in pairs.items():
        least = 0 if name == "padding" else 1
        if len(pair) != 2 or min(pair) < least:
            raise ValueError(f"max_pool_adjoint: {name} is a pair of whole numbers of at least {least}, got {pair!r}")
    samples = x.shape[0] if x.dim() == 4 else 1
    per_sample = isinstance(tau, Tensor) and tau.numel() != 1
    if isinstance(tau, Tensor):
        if per_sample and tau.numel() != samples:
            raise ValueError(f"tau holds one number, or one for each of {samples} samples, got {tuple(tau.shape)}")
        tau = tau.to(x.device, torch.float32).contiguous()
    if x.numel() == 0 or v.numel() == 0:
        return torch.zeros_like(x)

    nhwc = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if nhwc else torch.contiguous_format
    x, v, y = (t.contiguous(memory_format=layout) for t in (x, v, y))
    share, out = torch.empty_like(v, dtype=torch.float32), torch.empty_like(x)
    (h, w), (oh, ow), channels = x.shape[-2:], v.shape[-2:], x.shape[-3]
    window = dict(zip(("KH", "KW", "SH", "SW", "PH", "PW", "DH", "DW"), (*kernel, *stride, *padding, *dilation), strict=True))
    sizes = dict(H=h, W=w, OH=oh, OW=ow, INNER=channels if nhwc else 1)
    fixed = dict(TAU=None if isinstance(tau, Tensor) else 1.0 if tau == "frozen" else float(tau), HARD=isinstance(tau, str))
    fixed["WIDE"] = max(x.numel(), v.numel()) >= 2**31 - 2**20  # room for the last block's overhang
    temperatures, block = tau if isinstance(tau, Tensor) else x, 512

    def unroll(trips: int) -> int:
        return trips if trips <= 9 else 1

    def sample(t: Tensor) -> int:
        return t[0].numel() if per_sample else t.numel() + block

    reach = [d * (k - 1) // s + 1 for k, s, d in zip(kernel, stride, dilation, strict=True)]
    with on_device_of(x):
        _share_kernel[(triton.cdiv(v.numel(), block),)](
            v, x, y, temperatures, share, v.numel(), **fixed, **sizes, **window,
            SAMPLE=sample(v), UNROLL=unroll(kernel[0] * kernel[1]), BLOCK=block, num_warps=4, **OPTIONS,
        )  # fmt: skip
        _gather_kernel[(triton.cdiv(x.numel(), block),)](
            share, x, y, temperatures, out, x.numel(), **fixed, **sizes, **window,
            SAMPLE=sample(x), UNROLL=unroll(reach[0] * reach[1]), BLOCK=block, num_warps=4, **OPTIONS,
        )  # fmt: skip
    return out
