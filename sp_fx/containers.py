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
        return type(value)._make(inner.values())  # a PackedSequence would ask what is no tensor for its device
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


def leaves_by_path(value: Any, path: str) -> dict[str, Any]:
    """The leaves of `value`, each by the code that reads it from a variable called `path`: of a dictionary {"a": (1, 2)} in `out`
    {"out['a'][0]": 1, "out['a'][1]": 2}, of a dataclass {"out.logits": tensor}."""
    parts = items(value)
    if parts is None:
        return {path: value}
    form, contents = parts
    steps = {f"{path}.{key}" if form == "fields" else f"{path}[{key!r}]": item for key, item in contents.items()}
    return {deeper: leaf for step, item in steps.items() for deeper, leaf in leaves_by_path(item, step).items()}


def primary(output: Any) -> Tensor:
    """Returns the tensor of the output that is explained: the output itself, its only tensor, or its `logits`.

    Raises:
        TypeError: there is no tensor, or there are several and none is called `logits`.
    """
    if isinstance(output, Tensor):
        return output
    named = dict(output) if isinstance(output, dict) else getattr(output, "__dict__", {})
    if isinstance(output, tuple) and hasattr(output, "_asdict"):
        named = output._asdict()
    if not named and isinstance(output, Sequence):
        named = {str(i): value for i, value in enumerate(output)}
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    if "logits" in tensors:
        return tensors["logits"]
    if len(tensors) == 1:
        return next(iter(tensors.values()))
    leaves = leaves_by_path(output, "out")
    paths = [p for p, leaf in leaves.items() if isinstance(leaf, Tensor)] or [f"out.{name}" for name in tensors]
    kind = type(output).__name__.removeprefix("immutable_")  # as the containers are called that fx has in a graph
    if not paths:
        raise TypeError(f"the model returns a {kind} with no tensor: there is nothing to explain")
    raise TypeError(
        f"the model returns a {kind} with the tensors {', '.join(paths)}: pass a callable as the target that picks one, such as "
        f"lambda out: {paths[0]}[:, 3]"
    )


def refuse_nested(value: Any) -> None:
    """Raises TypeError for a nested tensor, which torch has no sizes of: nothing can be measured on it."""
    if any(t.is_nested for t in tensors_of(value)):
        raise TypeError(
            "a nested tensor has no one size: pass its sequences padded, `x.to_padded_tensor(0.0)`, with a mask or their lengths"
        )


def is_array(value: Any) -> bool:
    """Whether `value` is an array or a number of NumPy, which this package does not import."""
    return type(value).__module__ == "numpy" and hasattr(value, "ndim")


def type_of(value: Any) -> str:
    """What an error calls a value that should have been a tensor: "int", or "list of numpy.ndarray: torch.from_numpy makes a
    tensor of an array"."""
    if not any(map(is_array, leaves_by_path(value, "").values())):
        return type(value).__name__
    of = "" if is_array(value) else f"{type(value).__name__} of "
    return f"{of}numpy.ndarray: torch.from_numpy makes a tensor of an array"


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
