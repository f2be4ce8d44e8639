"""Containers of tensors, however nested: what is in them, with other things in place of it, and plain arguments as text.

A model takes and returns tensors in tuples, lists, mappings and dataclasses. Whatever has to look inside goes through here:
`rebuilt(output, change)` returns the same containers round `change(tensor)`, `tensors_of(output)` lists the tensors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

PLAIN = (bool, int, float, str, type(None))


def items(value: Any) -> tuple[str, dict[Any, Any]] | None:
    """How a container is read, "items" or "fields", and what it holds; None of what is no container."""
    if isinstance(value, Mapping):  # the outputs of transformers are mappings and dataclasses
        return "items", dict(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return "fields", {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return "items", dict(enumerate(value))
    return None


def rebuilt(value: Any, each: Callable[[Any], Any]) -> Any:
    """`value` with `each` of what is in its containers, however deep, in place of it."""
    held = items(value)
    if held is None:
        return each(value)
    inner = {key: rebuilt(item, each) for key, item in held[1].items()}
    if held[0] == "fields" or hasattr(value, "to_tuple"):  # a dataclass, or one of transformers' mappings that are dataclasses
        return type(value)(**inner)
    if isinstance(value, Mapping):
        return type(value)(inner)  # type: ignore[call-arg]
    if hasattr(value, "_fields"):
        return type(value)(*inner.values())
    return (list if isinstance(value, list) else tuple)(inner.values())


class Slot:
    """Stands for value number `index` in a container. No dataclass: those are containers."""

    def __init__(self, index: int) -> None:
        self.index = index


def slotted(outputs: Any) -> tuple[Any, list[Any]]:
    """The containers of `outputs`, with numbered slots in place of what they hold; and that."""
    leaves: list[Any] = []

    def slot(leaf: Any) -> Slot:
        leaves.append(leaf)
        return Slot(len(leaves) - 1)

    return rebuilt(outputs, slot), leaves


def filled(skeleton: Any, leaves: list[Any]) -> Any:
    """The containers of a skeleton with `leaves` in its slots."""
    return rebuilt(skeleton, lambda slot: leaves[slot.index])


def tensors_of(value: Any) -> list[Tensor]:
    """Those in the containers of `value`, in order."""
    found: list[Tensor] = []
    rebuilt(value, lambda t: found.append(t) if isinstance(t, Tensor) else None)
    return found


def cloned(value: Any, dtype: torch.dtype | None = None) -> Any:
    """The tensors of `value` copied, since a forward may write over its inputs; floating ones to `dtype`, if there is one."""

    def each(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        return t.detach().to(dtype if dtype and t.is_floating_point() else t.dtype, copy=True)

    return rebuilt(value, each)


def encoded(value: Any) -> Any:
    """Plain arguments as `ast.literal_eval` reads their `repr`: sizes as tuples, dtypes by name, infinities in words."""
    if isinstance(value, tuple | list):
        return tuple(map(encoded, value))
    if isinstance(value, dict):
        return {"dict": tuple((key, encoded(item)) for key, item in value.items())}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    return {"float": repr(value)} if isinstance(value, float) and not math.isfinite(value) else value


def decoded(value: Any) -> Any:
    """What `encoded` was given, lists as tuples."""
    if isinstance(value, tuple):
        return tuple(map(decoded, value))
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "dict":
        return {key: decoded(item) for key, item in held}
    return getattr(torch, held) if kind == "dtype" else float(held)
