"""Max pooling of every form: each window's cotangent is spread over the window by `softmax(window / tau)`.

    max_pool                                      v -> sum over the windows w of v_w softmax(z_w / tau)     arXiv:2507.22832
    amax, adaptive_max_pool, fractional_max_pool  the same, over other windows; same principle
    amin  the same of what is negated; same principle
    scatter_amax, scatter_amin    the same, over the groups that an index says; same principle

Frozen, a cotangent goes to the maxima of its window equally, the limit as tau -> 0. `v` and the forward's output `y` are
[..., *windows], the input `x` [..., *spatial]; a temperature of one number a sample has its other axes 1.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .row import Row, Tau, wide


def max_pool(x: Tensor, kernel, stride, padding, dilation, ceil_mode) -> Tensor:
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(kernel) - 1]
    return pool(x, kernel, stride, padding, dilation, ceil_mode)


def max_pool_adjoint(v: Tensor, x: Tensor, y: Tensor, tau: Tau, kernel, stride, padding, dilation, ceil_mode) -> Tensor:
    """A gather, without scatter or unfold: with stride s, tap i of window o reads pixel `s o + i dilation`, that is, cell `o + j`
    of phase `a` for `i dilation = s j + a`. Each phase is a strided slice; the phases are interleaved at the end.

    Kernel, stride, padding, dilation: a tuple, one number an axis.
    """
    n, lead, lowest = len(kernel), v.dim() - len(kernel), torch.finfo(wide(x).dtype).min
    windows, spatial = v.shape[lead:], x.shape[lead:]
    reach = [(o - 1) * s + d * (k - 1) + 1 for o, s, d, k in zip(windows, stride, dilation, kernel)]
    cells = [-(-max(r, p + m) // s) for r, p, m, s in zip(reach, padding, spatial, stride)]
    margins = [(p, q * s - p - m) for p, q, s, m in zip(padding, cells, stride, spatial)]
    # Finite bounds keep inf - inf out of the differences: equal infinities tie, as they do in the forward pass.
    padded = F.pad(wide(x), flat(margins), value=-math.inf).clamp(lowest, -lowest)
    y = wide(y).clamp(lowest, -lowest)
    split = padded.reshape(*x.shape[:lead], *(size for pair in zip(cells, stride) for size in pair))
    phase_axes, cell_axes = range(lead + 1, lead + 2 * n, 2), range(lead, lead + 2 * n, 2)
    phases = split.permute(*phase_axes, *range(lead), *cell_axes).contiguous()  # [*stride, ..., *cells]

    taps = []  # (phase, shift, weight of this tap in each window [..., *windows])
    for index in itertools.product(*map(range, kernel)):
        shift, phase = zip(*(divmod(i * d, s) for i, d, s in zip(index, dilation, stride)))
        tap: Any = (*phase, ..., *(slice(j, j + o) for j, o in zip(shift, windows)))
        taps.append((phase, shift, weights(phases[tap] - y, tau)))
    per_weight = v / sum(weight for _, _, weight in taps)  # the maximum itself weighs 1: never a division by zero

    shares: dict[tuple[int, ...], Tensor] = {}
    for phase, shift, weight in taps:
        room = [(j, q - o - j) for j, q, o in zip(shift, cells, windows)]
        share = F.pad(per_weight * weight, flat(room))
        shares[phase] = shares[phase] + share if phase in shares else share
    zeros = torch.zeros_like(next(iter(shares.values())))
    spread = torch.stack([shares.get(phase, zeros) for phase in itertools.product(*map(range, stride))])
    spread = spread.reshape(*stride, *spread.shape[1:])
    interleaved = [axis for i in range(n) for axis in (n + lead + i, i)]  # [..., cell, stride, cell, stride, ...]
    spread = spread.permute(*range(n, n + lead), *interleaved).reshape(padded.shape)
    inside: Any = (..., *(slice(p, p + m) for p, m in zip(padding, spatial)))
    return spread[inside].to(x.dtype)


def amax(x: Tensor, dim, keepdim: bool) -> Tensor:
    return torch.amax(x, dim, keepdim)


def amax_adjoint(v: Tensor, x: Tensor, y: Tensor, tau: Tau, dim, keepdim: bool) -> Tensor:
    """Global max pooling: one window, the axes `dim` (all of them where it is empty)."""
    if not keepdim:
        for axis in sorted(d % x.dim() for d in dim or range(x.dim())):
            v, y = v.unsqueeze(axis), y.unsqueeze(axis)
    lowest = torch.finfo(wide(x).dtype).min
    difference = wide(x).clamp(lowest, -lowest) - wide(y).clamp(lowest, -lowest)
    weight = weights(difference, tau)
    return (weight * (v / weight.sum(dim or tuple(range(x.dim())), keepdim=True))).to(x.dtype)


def amin(x: Tensor, dim, keepdim: bool) -> Tensor:
    return torch.amin(x, dim, keepdim)


def amin_adjoint(v: Tensor, x: Tensor, y: Tensor, tau: Tau, dim, keepdim: bool) -> Tensor:
    """The lowest is the highest of what is negated, negated."""
    return amax_adjoint(v, -x, -y, tau, dim, keepdim)


def scatter_amax(x: Tensor, index: Tensor, base: Tensor, dim: int, include_self: bool, flat: bool, by: str = "amax") -> Tensor:
    """The largest of each group: place i along `dim` is in group `index[i]`; `index` is like `x`, or `flat` [size of `dim`]."""
    reduce = base.index_reduce if flat else base.scatter_reduce
    return reduce(dim, index, x, by, include_self=include_self)


def scatter_amax_adjoint(
    v: Tensor, x: Tensor, index: Tensor, base: Tensor, y: Tensor, tau: Tau, dim: int, include_self: bool, flat: bool
) -> Tensor:
    """Each group is one window. `v`, `y` and `base` have the groups along `dim`, in which one without a member keeps its `base`;
    with `include_self` the base is a member of its group, and what it gets goes nowhere."""
    if flat:
        index = index.view([-1 if axis == dim % x.dim() else 1 for axis in range(x.dim())]).expand(x.shape)
    lowest = torch.finfo(wide(x).dtype).min
    z, y, base = (wide(t).clamp(lowest, -lowest) for t in (x, y, base))
    z = z[tuple(slice(size) for size in index.shape)]  # an index may leave out the end of an axis
    weight = weights(z - y.gather(dim, index), tau)
    total = torch.zeros_like(y).scatter_add(dim, index, weight)
    if include_self:
        total = total + weights(base - y, tau)
    share = weight * (v / torch.where(total > 0, total, 1)).gather(dim, index)
    return F.pad(share, flat_margins(index.shape, x.shape)).to(x.dtype)


def flat_margins(inner: torch.Size, outer: torch.Size) -> list[int]:
    """What is to be put behind each axis of `inner` for the sizes of `outer`, in the order `F.pad` reads it."""
    return flat([(0, m - n) for n, m in zip(inner, outer)])


def scatter_amin(x: Tensor, index: Tensor, base: Tensor, dim: int, include_self: bool, flat: bool) -> Tensor:
    return scatter_amax(x, index, base, dim, include_self, flat, "amin")


def scatter_amin_adjoint(
    v: Tensor, x: Tensor, index: Tensor, base: Tensor, y: Tensor, tau: Tau, dim: int, include_self: bool, flat: bool
) -> Tensor:
    return scatter_amax_adjoint(v, -x, index, -base, -y, tau, dim, include_self, flat)


def adaptive_max_pool(x: Tensor, size) -> Tensor:
    pool: Any = (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)[len(size) - 1]
    return pool(x, size)


def adaptive_max_pool_adjoint(v: Tensor, x: Tensor, y: Tensor, tau: Tau, size) -> Tensor:
    """Over windows from `floor(i n / m)` to `ceil((i + 1) n / m)`, for n pixels and m windows an axis."""
    starts, ends = [], []
    for n, m in zip(x.shape[-len(size) :], v.shape[-len(size) :]):
        window = torch.arange(m, device=x.device)
        starts.append(window * n // m)
        ends.append(-(-(window + 1) * n // m))
    taps = [-(-n // m) + 1 for n, m in zip(x.shape[-len(size) :], v.shape[-len(size) :])]
    return spread_over(v, x, y, tau, starts, ends, taps)


def fractional_max_pool(x: Tensor, samples: Tensor, kernel, size, ratio) -> Tensor:
    pool: Any = F.fractional_max_pool2d if len(kernel) == 2 else F.fractional_max_pool3d
    return pool(x, kernel, size, ratio, _random_samples=samples)


def fractional_max_pool_adjoint(v: Tensor, x: Tensor, samples: Tensor, y: Tensor, tau: Tau, kernel, size, ratio) -> Tensor:
    """Over the windows that `samples` [B, C, axes] choose (Graham, "Fractional Max-Pooling", arXiv:1412.6071): with
    a = (n - k) / (m - 1), window i starts at floor((i + s) a) - floor(s a), the last one at n - k."""
    lead = x.shape[: -len(kernel)]
    samples = samples.reshape(*lead, len(kernel)) if len(lead) == 2 else samples.reshape(*lead, -1)
    starts = []
    for axis, (n, m, k) in enumerate(zip(x.shape[-len(kernel) :], v.shape[-len(kernel) :], kernel)):
        s = samples[..., axis if len(kernel) == 3 else 1 - axis, None].to(x.dtype)  # torch's 2-d form has the width first
        step = (n - k) / (m - 1) if m > 1 else 0.0
        begin = ((torch.arange(m, device=x.device) + s) * step).int() - (s * step).int()
        begin[..., -1] = n - k
        starts.append(begin.long())
    return spread_over(v, x, y, tau, starts, [start + k for start, k in zip(starts, kernel)], kernel)


def weights(difference: Tensor, tau: Tau) -> Tensor:
    """`exp(difference / tau)`, for an element's difference to its window's maximum, at most 0; frozen, 1 at a maximum, else 0."""
    if isinstance(tau, str):
        return (difference >= 0).to(difference.dtype)
    return torch.exp((difference * (1 / tau)).clamp_min(-60))  # no denormals


def flat(margins: list[tuple[int, int]]) -> list[int]:
    """Per-axis (before, after) in the order `F.pad` reads them."""
    return [side for pair in reversed(margins) for side in pair]


def spread_over(v: Tensor, x: Tensor, y: Tensor, tau: Tau, starts: list[Tensor], ends: list[Tensor], widest) -> Tensor:
    """Spreads the cotangents of windows of any position and size: for each pooled axis `starts` and `ends` [..., windows], and
    `widest`, a bound on the pixels of a window."""
    n, lowest = len(starts), torch.finfo(wide(x).dtype).min
    lead, spatial, windows = x.shape[:-n], x.shape[-n:], v.shape[-n:]
    index = torch.zeros((), dtype=torch.long, device=x.device)
    inside = torch.ones((), dtype=torch.bool, device=x.device)
    for axis, (start, end, pixels, most) in enumerate(zip(starts, ends, spatial, widest)):
        pixel = start[..., None] + torch.arange(most, device=x.device)  # [..., windows, taps]
        shape = [*pixel.shape[:-2], *(pixel.shape[-2] if a == axis else 1 for a in range(n))]
        shape += [pixel.shape[-1] if a == axis else 1 for a in range(n)]
        inside = inside & (pixel < end[..., None]).reshape(shape)
        index = index * pixels + pixel.clamp_max(pixels - 1).reshape(shape)
    taps = math.prod(index.shape[-n:])
    index, inside = (t.flatten(-n).expand(*lead, *windows, taps).flatten(-n - 1) for t in (index, inside))
    value = wide(x).clamp(lowest, -lowest).flatten(-n).gather(-1, index).reshape(*v.shape, taps)
    difference = value - wide(y).clamp(lowest, -lowest)[..., None]
    fitted = tau[..., None] if isinstance(tau, Tensor) else tau
    # What is outside a window may be above its maximum.
    weight = weights(difference.clamp_max(0), fitted) * inside.reshape(*v.shape, taps)
    share = weight * (v / weight.sum(-1))[..., None]
    spread = share.new_zeros(*lead, math.prod(spatial)).scatter_add(
        -1, index, share.reshape(*lead, math.prod(share.shape[len(lead) :]))
    )
    return spread.reshape(x.shape).to(x.dtype)


ROWS: dict[str, Row] = {
    "max_pool": Row(max_pool, max_pool_adjoint, 1.0, sees_output=True, homogeneous=True),
    "amax": Row(amax, amax_adjoint, 1.0, sees_output=True, homogeneous=True, rule="max_pool"),
    "amin": Row(amin, amin_adjoint, 1.0, sees_output=True, homogeneous=True, rule="max_pool"),
    "scatter_amax": Row(scatter_amax, scatter_amax_adjoint, 1.0, tensors=3, sees_output=True, homogeneous=True, rule="max_pool"),
    "scatter_amin": Row(scatter_amin, scatter_amin_adjoint, 1.0, tensors=3, sees_output=True, homogeneous=True, rule="max_pool"),
    "adaptive_max_pool": Row(
        adaptive_max_pool, adaptive_max_pool_adjoint, 1.0, sees_output=True, homogeneous=True, rule="max_pool"
    ),
    "fractional_max_pool": Row(
        fractional_max_pool, fractional_max_pool_adjoint, 1.0, tensors=2, sees_output=True, homogeneous=True, rule="max_pool"
    ),
}
