"""The form of a call, which is measured once for all calls of it, and what keeps a call from being measured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..containers import PLAIN, items, tensors_of

Form = Any  # what a call looks like but for sizes: containers, dtypes, ranks, devices, flags


def form_of(value: Any, exported: bool) -> Form:
    """Returns what `value` looks like but for sizes: containers, dtypes, ranks, devices, flags. Of a graph that was `exported`
    also which lengths are 1 or 0, of which torch.export may make another path; the batch is compared at 1 at the capture."""
    if isinstance(value, Tensor):
        short = tuple(axis for axis, n in enumerate(value.shape) if axis and n < 2) if exported else ()
        return value.dtype, value.dim(), value.device, short
    parts = items(value)
    if parts is not None:
        return type(value), tuple((key, form_of(item, exported)) for key, item in parts[1].items())
    return value if isinstance(value, bool | str | None) else type(value)


def described(value: Any) -> str:
    """Returns what an argument is, as text: "torch.int64 [2, 7]"; of containers what is in them."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}".removeprefix("torch.")
    parts = items(value)
    if parts is None:
        return repr(value) if isinstance(value, PLAIN) else type(value).__name__
    return f"({', '.join(f'{key}: {described(item)}' for key, item in parts[1].items())})"


def inside_a_transform() -> str:
    """Says which transform of PyTorch or trace a call is inside, where tensors have no values to look at; "" where it is not."""
    if torch._C._are_functorch_transforms_active():
        return "inside vmap and other transforms of torch.func"
    return "inside a trace" if torch._C._len_torch_dispatch_stack() or torch.jit.is_tracing() else ""


def obstacle_to_comparing(arguments: Any) -> str:
    """Says what keeps a call from being compared with the model; "" where nothing does."""
    if torch.is_inference_mode_enabled():
        return "inside inference mode"
    if inside := inside_a_transform():
        return inside
    tensors = tensors_of(arguments)
    if any(t.is_cuda for t in tensors) and torch.cuda.is_current_stream_capturing():
        return "inside the capture of a CUDA graph"
    return "on an empty batch" if any(0 in t.shape for t in tensors) else ""
