"""Where the numbers of a gate's output are in memory. Matrix products and convolutions round by it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._prims_common import compute_elementwise_output_strides, make_channels_last_strides_for, make_contiguous_strides_for
from torch.overrides import handle_torch_function, has_torch_function


def laid_out(y: Tensor, z: Tensor, pooled: bool) -> Tensor:
    """Returns `y`, which was computed of `z` with other axes and turned back, in the layout that the op of `z` itself gives:
    a pooling of channels_last numbers gives such, of all others contiguous ones; a pointwise op keeps the order of the axes."""
    if has_torch_function((y, z)):
        return handle_torch_function(laid_out, (y, z), y, z, pooled)
    if not pooled:
        strides = compute_elementwise_output_strides(z)
    elif z.dim() in (4, 5) and torch._prims_common.suggest_memory_format(z) in (torch.channels_last, torch.channels_last_3d):
        strides = make_channels_last_strides_for(y.shape)
    else:
        strides = make_contiguous_strides_for(y.shape)
    return y if y.stride() == tuple(strides) else y.new_empty_strided(y.shape, strides).copy_(y)


laid_out.stands_for = "clone"  # type: ignore[attr-defined]  # to the table of ops
