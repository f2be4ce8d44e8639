"""Containers of tensors, however nested, and plain arguments as text.

A model takes and returns tensors in tuples, lists, mappings and dataclasses. Whatever has to look inside goes through here:
`rebuilt(output, change)` returns the same containers round `change(leaf)`, `tensors_of(output)` lists the tensors. A leaf is what
is no container: a tensor, a number, None.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

PLAIN = (bool, int, float, str, type(None))  # arguments that a graph may carry as they are


def items(value: Any) -> tuple[str, dict[Any, Any]] | None:
    """How a container is taken apart, by "items" or by "fields", and its contents by key; None of a leaf.

    A tuple `(a, b)` gives ("items", {0: a, 1: b}), a dataclass ("fields", {"logits": a}).
    """
    if isinstance(value, Mapping):  # the outputs of transformers are mappings and dataclasses
        return "items", dict(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return "fields", {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return "items", dict(enumerate(value))
    return None


def rebuilt(value: Any, change: Callable[[Any], Any]) -> Any:
    """The containers of `value` anew, with `change(leaf)` in place of every leaf, however deep."""
    parts = items(value)
    if parts is None:
        return change(value)
    form, contents = parts
    return refilled(value, form, {key: rebuilt(item, change) for key, item in contents.items()})


def refilled(value: Any, form: str, inner: dict[Any, Any]) -> Any:
    """A container like `value`, taken apart by `form`, with the contents `inner`."""
    if form == "fields" or hasattr(value, "to_tuple"):  # a dataclass, or one of transformers' mappings that are dataclasses
        return type(value)(**inner)
    if isinstance(value, Mapping):
        return type(value)(inner)  # type: ignore[call-arg]
    if hasattr(value, "_fields"):
        return type(value)(*inner.values())
    return (list if isinstance(value, list) else tuple)(inner.values())


class Slot:
    """Stands for leaf number `index` in a skeleton. No dataclass: those are containers."""

    def __init__(self, index: int) -> None:
        self.index = index


def slotted(outputs: Any) -> tuple[Any, list[Any]]:
    """The skeleton of `outputs`, its containers with numbered slots for leaves; and the leaves: `(a, [b])` gives
    `(Slot(0), [Slot(1)])` and `[a, b]`."""
    leaves: list[Any] = []

    def slot(leaf: Any) -> Slot:
        leaves.append(leaf)
        return Slot(len(leaves) - 1)

    return rebuilt(outputs, slot), leaves


def filled(skeleton: Any, leaves: Sequence[Any]) -> Any:
    """A skeleton with `leaves` in its slots, the inverse of `slotted`; what is no slot stays."""
    return rebuilt(skeleton, lambda leaf: leaves[leaf.index] if isinstance(leaf, Slot) else leaf)


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in the containers of `value`, in order."""
    tensors: list[Tensor] = []
    rebuilt(value, lambda leaf: tensors.append(leaf) if isinstance(leaf, Tensor) else None)
    return tensors


def cloned(value: Any, dtype: torch.dtype | None = None) -> Any:
    """`value` with its tensors copied, since a forward may write over its inputs; floating ones to `dtype`, if there is one."""

    def copied(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.detach().to(dtype if dtype and leaf.is_floating_point() else leaf.dtype, copy=True)

    return rebuilt(value, copied)


def encoded(value: Any) -> Any:
    """Plain arguments in the types whose `repr` `ast.literal_eval` reads: sizes and lists as tuples, `torch.float32` as
    {"dtype": "float32"}, an infinity as {"float": "inf"}, a dict as {"dict": ((key, value), ...)}."""
    if isinstance(value, tuple | list):
        return tuple(map(encoded, value))
    if isinstance(value, dict):
        return {"dict": tuple((key, encoded(item)) for key, item in value.items())}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    return {"float": repr(value)} if isinstance(value, float) and not math.isfinite(value) else value


def decoded(value: Any) -> Any:
    """The inverse of `encoded`, lists as tuples."""
    if isinstance(value, tuple):
        return tuple(map(decoded, value))
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "dict":
        return {key: decoded(item) for key, item in content}
    return getattr(torch, content) if kind == "dtype" else float(content)
