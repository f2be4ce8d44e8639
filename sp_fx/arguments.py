"""The arguments that a model is traced with, and what a traced graph checks of those it is called with.

A *form* says what an argument looked like: `("tensor", shape)` with None for an axis of any size, `("is", constant)`,
`("items", {key: form})` of a mapping, a tuple or a list, `("fields", {name: form})` of a dataclass.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import handle_torch_function, has_torch_function

PLAIN = (bool, int, float, str, type(None))
VARIADIC: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


def bound(module: nn.Module, example_inputs: Any) -> dict[str, Any]:
    """The example arguments by parameter of the forward, defaults included; `example_inputs` is a tensor, a tuple of positional
    arguments, or a mapping of keyword arguments.

    Raises:
        TypeError: arguments that the forward does not take.
    """
    signature = inspect.signature(module.forward)
    if isinstance(example_inputs, PLAIN):
        expected = "a tensor, a tuple of positional arguments, or a mapping of keyword arguments"
        raise TypeError(f"example_inputs is {expected}, got {example_inputs!r}")
    try:
        if isinstance(example_inputs, Mapping):
            arguments = signature.bind(**example_inputs)
        else:
            arguments = signature.bind(*(example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)))
    except TypeError as error:
        raise TypeError(
            f"example_inputs do not fit {type(module).__name__}.forward{signature}: {error}. Pass a tensor, a tuple of "
            "positional arguments, or a mapping of keyword arguments"
        ) from None
    arguments.apply_defaults()
    return arguments.arguments


def settings(module: nn.Module, example: Mapping[str, Any] | None) -> dict[str, Any]:
    """The arguments of a forward that a symbolic trace fixes, since `if mask is not None` is true of every proxy: those that are
    plain in the example, or else have plain defaults. Another value is refused when the graph runs."""
    if example is not None:
        return {name: value for name, value in example.items() if isinstance(value, PLAIN)}
    parameters = inspect.signature(module.forward).parameters.values()
    return {p.name: p.default for p in parameters if isinstance(p.default, PLAIN) and p.default is not p.empty}


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
    (kind, held), = value.items()
    if kind == "dict":
        return {key: decoded(item) for key, item in held}
    return getattr(torch, held) if kind == "dtype" else float(held)


def form(value: Any, any_size: Callable[[Tensor, int], bool]) -> tuple[str, Any]:
    """The form of `value`; `any_size(tensor, axis)` says where the size does not matter.

    Raises:
        TypeError: an object that is neither tensor, container nor plain.
    """
    if isinstance(value, Tensor):
        return "tensor", tuple(None if any_size(value, axis) else size for axis, size in enumerate(value.shape))
    held = items(value)
    if held is not None:
        return held[0], {key: form(item, any_size) for key, item in held[1].items()}
    if isinstance(value, PLAIN):
        return "is", value
    raise TypeError(f"an argument is a {type(value).__name__}: expected tensors, plain values, and containers of them")


def checked(value: Any, name: str, expected: tuple[str, Any]) -> Any:
    """`value`, if it has the form of the argument that the graph was traced with.

    Raises:
        ValueError: it has not; the message says what is different.
    """
    if has_torch_function((value,)):
        return handle_torch_function(checked, (value,), value, name, expected)
    kind, content = expected
    remedy = "the graph was captured by torch.export for its example_inputs: transform the model with some of this kind"
    if kind == "tensor":
        wanted = f"a tensor [{', '.join('*' if n is None else str(n) for n in content)}]"
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}: expected {wanted}, got {value!r}; {remedy}")
        if len(content) != value.dim() or any(n is not None and n != m for n, m in zip(content, value.shape)):
            raise ValueError(f"{name}: expected {wanted}, got {list(value.shape)}; {remedy}")
    elif kind == "is":
        if isinstance(value, Tensor) or items(value) is not None or value != content:
            got = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"{name}: expected {content!r}, got {got}; {remedy}")
    else:
        held = items(value)
        if held is None or set(held[1]) != set(content):
            got = f"a {type(value).__name__}" + ("" if held is None else f" of {list(held[1])}")
            raise ValueError(f"{name}: expected one of {list(content)}, got {got}; {remedy}")
        for key, item in held[1].items():
            checked(item, f"{name}[{key!r}]" if kind == "items" else f"{name}.{key}", content[key])
    return value


fx.node.has_side_effect(checked)
