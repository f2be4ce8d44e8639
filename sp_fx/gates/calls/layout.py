"""Where the numbers of a gate's output are in memory. Matrix products and convolutions round by it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch._prims_common import (
    compute_elementwise_output_strides,
    make_channels_last_strides_for,
    make_contiguous_strides_for,
    suggest_memory_format,
)
from torch.overrides import handle_torch_function, has_torch_function

from .in_place import same_strides


def laid_out(y: Tensor, z: Tensor, kind: Literal["pointwise", "pooling", "reduction"]) -> Tensor:
    """Returns `y`, which an op of that kind gave of `z` with other axes and which was turned back, in the layout that the op of
    `z` itself gives: a pointwise op keeps the order of the axes, a pooling channels_last, and all else is contiguous."""
    if has_torch_function((y, z)):
        return handle_torch_function(laid_out, (y, z), y, z, kind)
    formats = (torch.channels_last, torch.channels_last_3d)
    if kind == "pointwise":
        strides = compute_elementwise_output_strides(z)
        if same_strides(y.shape, y.stride(), strides):
            return y
    elif kind == "pooling" and z.dim() in (4, 5) and suggest_memory_format(z) in formats:
        strides = make_channels_last_strides_for(y.shape)
    else:
        strides = make_contiguous_strides_for(y.shape)
    return y if y.stride() == tuple(strides) else y.new_empty_strided(y.shape, strides).copy_(y)


laid_out.stands_for = "clone"  # type: ignore[attr-defined]  # to the table of ops
