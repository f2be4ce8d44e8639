"""Calls that reduce over groups that whole numbers say, as messages are reduced at the nodes of a graph.

Sums and means are linear in what they add up, whatever says where it goes: no gate. A largest or a smallest is a max pooling over
the group.
"""

from __future__ import annotations

import torch

from .reader import Gate, Unread, aten, reads

LINEAR = {"sum", "mean", "add", None}
PRODUCTS = {"prod", "multiply"}
EXTREMES = {"amax": "scatter_amax", "amin": "scatter_amin"}


def reduction(input, dim, index, src, reduce, include_self, flat):
    """`flat`: whether the index has the axis `dim` alone, and so is the same for all that is beside it."""
    if reduce in LINEAR:
        return None
    if reduce in EXTREMES:
        return Gate(EXTREMES[reduce], (src, index, input), {"dim": dim, "include_self": include_self, "flat": flat})
    return other(reduce)


def other(reduce):
    if reduce in PRODUCTS:
        return Unread("product rule", kept=True)
    return Unread(f"its {reduce!r} over groups chooses by value and has no rule")


@reads(torch.scatter_reduce, "scatter_reduce", aten.scatter_reduce)
def scatter_reduce(input, dim, index, src, reduce, include_self=True):
    return reduction(input, dim, index, src, reduce, include_self, flat=False)


@reads(torch.index_reduce, "index_reduce", aten.index_reduce)
def index_reduce(input, dim, index, source, reduce, include_self=True):
    return reduction(input, dim, index, source, reduce, include_self, flat=True)


@reads(torch.scatter, "scatter", aten.scatter)
def scatter(input, dim, index, src=None, value=None, reduce=None):
    return None if reduce in LINEAR else other(reduce)


@reads(torch.segment_reduce, torch._segment_reduce, aten.segment_reduce)
def segment_reduce(data, reduce, lengths=None, indices=None, offsets=None, axis=0, unsafe=False, initial=None):
    return None if reduce in LINEAR else other(reduce)
