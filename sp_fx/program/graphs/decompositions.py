"""Decompositions of PyTorch's backward ops into ops that every engine runs well; `TABLE` is what the trace replaces by what.

There is no `convolution_backward` in a program (ONNX has none, and Inductor calls out for it), and no scatter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


def convolution_backward(v, x, weight, bias_sizes, stride, padding, dilation, transposed, output_padding, groups, mask):
    """The input's gradient, in one of four forms; parameters are constants here, and get none."""
    if mask[1] or mask[2]:
        return NotImplemented
    if transposed:  # the adjoint of a transposed convolution is the convolution
        return plain(v, weight, stride, padding, dilation, groups), None, None
    if all(s == 1 for s in stride):
        return unit_stride(v, weight, padding, dilation, groups), None, None
    # For few channels (a stem) engines have no good transposed convolution: 24 against 10 ms for ResNet-18's at batch 4 on CPU.
    # From 16 on it takes the time of the forward, the phases up to twice that (2.7, 4.9 and 2.6 ms for 64 to 128 channels).
    if x.shape[1] < 16 and all(d == 1 for d in dilation):
        return by_phases(v, x.shape[2:], weight, stride, padding, groups), None, None
    spans = [  # of the input, along each axis, by the taps of all outputs
        (o - 1) * s - 2 * p + d * (k - 1) + 1 for o, s, p, d, k in zip(v.shape[2:], stride, padding, dilation, weight.shape[2:])
    ]
    output_padding = [m - span for m, span in zip(x.shape[2:], spans)]
    return aten.convolution.default(v, weight, None, stride, padding, dilation, True, output_padding, groups), None, None


def plain(v: Tensor, weight: Tensor, stride, padding, dilation, groups: int) -> Tensor:
    return aten.convolution.default(v, weight, None, stride, padding, dilation, False, [0] * len(stride), groups)


def swapped(weight: Tensor, groups: int) -> Tensor:
    """[out, in / groups, *kernel] as [in, out / groups, *kernel]."""
    out, width, *kernel = weight.shape
    return weight.reshape(groups, out // groups, width, *kernel).transpose(1, 2).reshape(groups * width, out // groups, *kernel)


def flipped(weight: Tensor) -> Tensor:
    return weight.flip(list(range(2, weight.dim())))


def fitted(y: Tensor, margins) -> Tensor:
    """`y` with (before, after) zeros added to each spatial axis, or taken away where negative."""
    sides = [side for pair in reversed(list(margins)) for side in pair]
    return F.pad(y, sides) if any(sides) else y


def unit_stride(v: Tensor, weight: Tensor, padding, dilation, groups: int) -> Tensor:
    """The input's gradient at stride 1: a convolution with flipped weights."""
    margins = [d * (k - 1) - p for d, k, p in zip(dilation, weight.shape[2:], padding)]
    v = fitted(v, [(min(m, 0), min(m, 0)) for m in margins])
    return plain(v, flipped(swapped(weight, groups)), [1] * len(margins), [max(m, 0) for m in margins], dilation, groups)


def by_phases(v: Tensor, spatial, weight: Tensor, stride, padding, groups: int) -> Tensor:
    """The input's gradient at stride s. Pixel `s j + a` of the padded input is read for output o by the tap `s (j - o) + a`: for
    each phase a that is a convolution of stride 1 over j. All phases are one convolution, with s times the channels for each
    axis, and a pixel shuffle."""
    n, channels = len(stride), groups * weight.shape[1]
    # Phases that no tap falls in are zero, and are not computed.
    phases = [min(s, k) for s, k in zip(stride, weight.shape[2:])]
    taps = [-(-k // s) for k, s in zip(weight.shape[2:], stride)]
    w = fitted(swapped(weight, groups), [(0, s * t - k if t > 1 else 0) for k, s, t in zip(weight.shape[2:], stride, taps)])
    w = w.reshape(*w.shape[:2], *(size for t, p in zip(taps, phases) for size in (t, p)))  # [in, out/g, tap, phase, tap, phase]
    w = w.permute(0, *range(3, 3 + 2 * n, 2), 1, *range(2, 2 + 2 * n, 2)).reshape(-1, w.shape[1], *taps)
    y = plain(v, flipped(w), [1] * n, [t - 1 for t in taps], [1] * n, groups)  # [B, in * phases, *places]
    places = [-(-(m + p) // s) for m, p, s in zip(spatial, padding, stride)]
    y = fitted(y, [(0, q - o) for q, o in zip(places, y.shape[2:])])
    y = y.reshape(y.shape[0], channels, *phases, *places)
    y = y.permute(0, 1, *(axis for i in range(n) for axis in (2 + n + i, 2 + i)))  # [B, in, place, phase, place, phase]
    if phases != list(stride):
        y = F.pad(y, [side for s, p in zip(reversed(stride), reversed(phases)) for side in (0, s - p, 0, 0)])
    y = y.reshape(y.shape[0], channels, *(q * s for q, s in zip(places, stride)))
    inside: Any = (..., *(slice(p, p + m) for p, m in zip(padding, spatial)))
    return y[inside]


def slice_backward(v, sizes, dim, start, end, step):
    """The cotangent of a slice with zeros before and after it; steps other than 1 are left to torch."""
    if step != 1:
        return NotImplemented
    size = sizes[dim]
    start = min(max(start + size if start < 0 else start, 0), size)
    after = size - start - v.shape[dim]
    return aten.constant_pad_nd.default(v, [0, 0] * (v.dim() - 1 - dim % v.dim()) + [start, after])


def select_backward(v, sizes, dim, index):
    dim, index = dim % len(sizes), index % sizes[dim]
    return slice_backward(v.unsqueeze(dim), sizes, dim, index, index + 1, 1)


TABLE: dict[torch._ops.OpOverload, Callable[..., Any]] = {
    aten.convolution_backward.default: convolution_backward,
    aten.slice_backward.default: slice_backward,
    aten.select_backward.default: select_backward,
}
