"""What a rewritten graph calls where the model works in place: copies to write over, the writes, and what they leave.

`rewrite/prepared/out_of_place.py` says where.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ...containers import rebuilt


def copied(x: Any) -> Any:
    """Returns `x` with its tensors in storage of their own, with the strides that they have; it may be a container of them."""
    if has_torch_function((x,)):
        return handle_torch_function(copied, (x,), x)
    return rebuilt(x, lambda t: copy_of(t) if isinstance(t, Tensor) else t)


def copy_of(t: Tensor) -> Tensor:
    copy = t.clone()
    if t.layout != torch.strided or same_strides(t.shape, copy.stride(), t.stride()):
        return copy
    once = t  # an expanded axis once
    for axis, (size, stride) in enumerate(zip(t.shape, t.stride())):
        once = once.narrow(axis, 0, 1) if stride == 0 and size > 1 else once
    return once.new_empty_strided(once.shape, once.stride()).copy_(once).expand(t.shape)


def same_strides(shape: Sequence[int], a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two strides of one shape are the same, along axes of one element whatever."""
    return all(n == 1 or s == t for n, s, t in zip(shape, a, b))


def in_form_of(result: Tensor, target: Tensor, resizes: bool = False) -> Tensor:
    """Returns `result` in the dtype and strides of `target`, over which a call in place would have written it.

    Raises:
        RuntimeError: `target` cannot take it. Where the call `resizes` its target, another shape is right.
    """
    if has_torch_function((result, target)):
        return handle_torch_function(in_form_of, (result, target), result, target, resizes)
    if not isinstance(result, Tensor) or not isinstance(target, Tensor):  # `+=` of numbers
        return result
    if result.dtype != target.dtype:
        if not torch.can_cast(result.dtype, target.dtype):
            raise RuntimeError(f"result type {result.dtype} can't be cast to the desired output type {target.dtype}")
        result = result.to(target.dtype)
    if result.shape != target.shape:
        if resizes:
            return result
        shapes = f"{list(target.shape)} doesn't match the broadcast shape {list(result.shape)}"
        raise RuntimeError(f"output with shape {shapes}")
    if target.layout != torch.strided or same_strides(target.shape, result.stride(), target.stride()):
        return result
    if any(n > 1 and s == 0 for n, s in zip(target.shape, target.stride())):
        raise RuntimeError("a call in place writes over a tensor whose elements share memory: clone() it before")
    return result.new_empty_strided(target.shape, target.stride()).copy_(result)


def overwrite_(target: Tensor, result: Tensor) -> Tensor:
    """Writes `result` over `target` and returns it, as a call in place does that computes the result."""
    if has_torch_function((target, result)):
        return handle_torch_function(overwrite_, (target, result), target, result)
    return target.copy_(in_form_of(result, target))


def setitem_(x: Any, index: Any, value: Any) -> Any:
    """Returns `x` after `x[index] = value`."""
    if has_torch_function((x, value)):
        return handle_torch_function(setitem_, (x, value), x, index, value)
    x[index] = value
    return x


def after(x: Any, write: Any) -> Any:
    """Returns `x`, which the call that gave `write` has written over, so that what reads it depends on that call."""
    if has_torch_function((x, write)):
        return handle_torch_function(after, (x, write), x, write)
    return x


copied.stands_for = "clone"  # type: ignore[attr-defined]  # to the table of ops
in_form_of.stands_for = "type_as"  # type: ignore[attr-defined]
