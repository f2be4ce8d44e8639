"""Calls of max pooling in every form, and of maxima over axes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import fx

from .reader import Gate, Unread, aten, per_axis, reads
from .relu import maximum, minimum


def max_pool(axes: int, first: bool | None = None) -> Callable[..., Gate | Unread]:
    """`first`: whether the call returns indices too; None where it is asked to."""

    def read(input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
        return Gate(
            "max_pool",
            (input,),
            {
                "kernel": per_axis(kernel_size, axes),
                "stride": per_axis(kernel_size if stride in (None, []) else stride, axes),
                "padding": per_axis(padding, axes),
                "dilation": per_axis(dilation, axes),
                "ceil_mode": ceil_mode,
            },
            first=return_indices if first is None else first,
        )

    return read


def adaptive_max_pool(axes: int, first: bool | None = None) -> Callable[..., Gate | Unread]:
    def read(input, output_size, return_indices=False):
        several = return_indices if first is None else first
        size = per_axis(output_size, axes)
        if set(size) == {1}:
            return Gate("amax", (input,), {"dim": tuple(range(-axes, 0)), "keepdim": True}, several)
        return Gate("adaptive_max_pool", (input,), {"size": size}, several)

    return read


def fractional_max_pool(axes: int, first: bool | None = None) -> Callable[..., Gate | Unread]:
    def read(input, kernel_size, output_size=None, output_ratio=None, return_indices=False, _random_samples=None):
        if _random_samples is None:
            return Unread("fractional max pooling draws random windows at every call: fix them by _random_samples")
        several = return_indices if first is None else first
        size, ratio = (None if n is None else n if isinstance(n, tuple) else (n,) * axes for n in (output_size, output_ratio))
        args = {"kernel": per_axis(kernel_size, axes), "size": size, "ratio": ratio}
        return Gate("fractional_max_pool", (input, _random_samples), args, several)

    return read


def aten_fractional_max_pool(input, kernel_size, output_size, random_samples):
    return fractional_max_pool(len(kernel_size), True)(input, kernel_size, output_size, _random_samples=random_samples)


for _axes in (1, 2, 3):
    for _name, _reader in (("max_pool", max_pool), ("adaptive_max_pool", adaptive_max_pool)):
        _plain, _both = f"{_name}{_axes}d", f"{_name}{_axes}d_with_indices"
        # Of the adaptive ATen ops those without "with_indices" return both, too; so does torch's one-dimensional one.
        _aten_both = _name == "adaptive_max_pool"
        reads(getattr(F, _plain))(_reader(_axes))
        reads(getattr(F, _both))(_reader(_axes, True))
        reads(getattr(aten, _plain))(_reader(_axes, _aten_both))
        if hasattr(torch, _plain):
            reads(getattr(torch, _plain))(_reader(_axes, _aten_both))
        if hasattr(torch, _both):
            reads(getattr(torch, _both))(_reader(_axes, True))
        if hasattr(aten, _both):
            reads(getattr(aten, _both))(_reader(_axes, True))
    if _axes > 1:
        reads(getattr(F, f"fractional_max_pool{_axes}d"))(fractional_max_pool(_axes))
        reads(getattr(F, f"fractional_max_pool{_axes}d_with_indices"))(fractional_max_pool(_axes, True))
        reads(getattr(aten, f"fractional_max_pool{_axes}d"))(aten_fractional_max_pool)


@reads(torch.amax, "amax", aten.amax)
def amax(input, dim=(), keepdim=False):
    dim = (dim,) if isinstance(dim, int) else tuple(dim)
    return Gate("amax", (input,), {"dim": dim, "keepdim": keepdim})


@reads(torch.amin, "amin", aten.amin)
def amin(input, dim=(), keepdim=False):
    dim = (dim,) if isinstance(dim, int) else tuple(dim)
    return Gate("amin", (input,), {"dim": dim, "keepdim": keepdim})


@reads(torch.max, "max", aten.max)
def maximum_over(input, dim=None, keepdim=False, other=None):
    if other is not None or isinstance(dim, fx.Node):
        return maximum(input, dim if other is None else other)
    if dim is None:
        return amax(input)
    return Gate("amax", (input,), {"dim": (dim,), "keepdim": keepdim}, first=True)


@reads(torch.topk, "topk", aten.topk)
def topk(input, k, dim=-1, largest=True, sorted=True):
    if k == 1 and largest:
        return Gate("amax", (input,), {"dim": (dim,), "keepdim": True}, first=True)
    return Unread("topk chooses by value and has no rule")  # but for the choice, which stays as it is


@reads(torch.min, "min", aten.min)
def minimum_over(input, dim=None, keepdim=False, other=None):
    if other is not None or isinstance(dim, fx.Node):
        return minimum(input, dim if other is None else other)
    if dim is None:
        return amin(input)
    return Gate("amin", (input,), {"dim": (dim,), "keepdim": keepdim}, first=True)
