"""What PyTorch itself says of an op, by its schemas: what it returns, whether it draws random numbers or writes over an operand.

An op is looked up by its plain name: `F.relu`, `torch.relu`, the method `"relu"` and `aten.relu.default` are all `aten::relu`.
"""

from __future__ import annotations

import functools
import inspect
import operator
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..capture import is_a_models_file

# What a schema calls a type, and the class of what an op of that type returns. A number may be of any class.
CLASSES = {"Tensor": Tensor, "int": int, "float": float, "bool": bool, "str": str, "Device": torch.device}
EXAMPLE = torch.empty(1, 1, device="meta")  # a tensor without numbers, to be asked what tensors have
IN_PLACE = frozenset(
    {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow}
    | {operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift, operator.setitem}
)


def name_of(target: Any) -> str:
    """The name of the aten op that a node's target would be: "add" of `operator.add`, "relu_" of the method."""
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        packet = target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target
        return packet.__name__ if packet._qualified_op_name.startswith("aten::") else ""
    name = str(getattr(target, "__name__", ""))
    return name.strip("_") if getattr(target, "__module__", "") == "_operator" else name


@functools.cache
def schemas(name: str) -> tuple[Any, ...]:
    """The schemas of `aten::name`, none where there is no such op. Those of TorchScript alone, for numbers, are left out."""
    packet = getattr(torch.ops.aten, name, None) if name and not name.startswith("__") else None
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return ()
    found = (getattr(packet, overload)._schema for overload in packet.overloads())
    return tuple(s for s in found if any("Tensor" in str(a.type) for a in (*s.arguments, *s.returns)))


def returned(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> type | None:
    """The class of what a call of an op on a tensor returns, `tuple` of several; None where that is not known.

    `returned("size", (h,), {})` is `torch.Size`, `returned("size", (h, 1), {})` is int.
    """
    name = name_of(target)
    classes = {class_of_returns(s) for s in schemas(name) if accepts(s, args, kwargs)}
    if len(classes) == 1:
        return classes.pop()
    if not classes and isinstance(target, str):  # a method that is no op: `h.float()`
        return attempted(lambda: getattr(EXAMPLE, target)(*args[1:], **kwargs))
    if not classes:
        annotated = getattr(target, "__annotations__", {}).get("return")
        several = bool(kwargs.get("return_indices"))  # of the poolings, whose annotation is that of the other case
        return tuple if several else Tensor if annotated in (Tensor, "Tensor", "torch.Tensor") else None
    return None


def of_attribute(name: str) -> type | None:
    """The class of an attribute of tensors: `torch.Size` of "shape". None where that is not known, and of a method."""
    cls = attempted(lambda: getattr(EXAMPLE, name))
    return None if cls is None or callable(getattr(EXAMPLE, name)) else cls


def of_arithmetic(function: Any, classes: list[type | None]) -> type | None:
    """The class of what an operator makes of numbers of these classes: float of `operator.truediv` of two of int."""
    if not all(cls in (int, bool, float) for cls in classes):
        return None
    return attempted(lambda: function(*(cls(1) for cls in classes)))  # type: ignore[misc]


def attempted(call: Callable[[], Any]) -> type | None:
    """The class of what a call returns; None where it raises, or returns None."""
    try:
        value = call()
    except Exception:  # whatever PyTorch raises of a tensor without numbers
        return None
    return None if value is None else Tensor if isinstance(value, Tensor) else type(value)


def class_of_returns(schema: Any) -> type | None:
    if len(schema.returns) != 1:
        return tuple if schema.returns else type(None)
    kind = str(schema.returns[0].type)
    if schema.name in ("aten::size", "aten::stride") and kind == "List[int]":
        return torch.Size if schema.name == "aten::size" else tuple
    return CLASSES.get(kind, tuple if kind == "List[Tensor]" else None)


def accepts(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a schema takes so many arguments of these names, with a number where it takes one, and a node elsewhere."""
    arguments = {a.name: a for a in schema.arguments}
    if len(args) > len(arguments) or ("out" in arguments) > ("out" in kwargs):
        return False
    renamed = {"axis": "dim", "keepdims": "keepdim", "input": "self"}
    bound = {**dict(zip(arguments, args)), **{renamed.get(k, k): v for k, v in kwargs.items()}}
    required = {n for n, a in arguments.items() if not a.has_default_value()}
    return required <= set(bound) <= set(arguments) and all(fits(str(arguments[n].type), v) for n, v in bound.items())


def fits(kind: str, value: Any) -> bool:
    """Whether a value may be an argument of a type: no number is a tensor, and no name an axis."""
    match value:
        case bool():
            return "Tensor" not in kind and "str" not in kind
        case int() | float() | str():
            return ("str" in kind or "Dimname" in kind) if isinstance(value, str) else "Tensor" not in kind and "str" not in kind
    return True


def is_seeded(target: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> bool:
    """Whether a call draws random numbers: `torch.rand(3)`, `h.uniform_()`, `F.dropout(h)`; not `F.dropout(h, 0.5, False)`."""
    name, kwargs = name_of(target).strip("_"), kwargs or {}
    if not isinstance(target, str) and getattr(target, "__module__", "").startswith("torch.nn.functional"):
        seeded = "dropout" in name or "gumbel" in name
    else:
        seeded = False
    if not seeded and not any(torch.Tag.nondeterministic_seeded in tags for tags in tags_of(name)):
        return False
    options = named(target, name, args, kwargs)
    switches = [options.get(k) for k in ("training", "train") if k in options]
    rates = [options[k] for k in ("dropout_p", "dropout", "p") if k in options]
    return all(s is not False for s in switches) and rates[:1] != [0]


@functools.cache
def tags_of(name: str) -> tuple[Any, ...]:
    packets: list[Any] = [getattr(torch.ops.aten, n, None) for n in (name, f"{name}_")]
    packets = [p for p in packets if isinstance(p, torch._ops.OpOverloadPacket)]
    return tuple(getattr(p, overload).tags for p in packets for overload in p.overloads())


def named(target: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, defaults included."""
    try:
        if isinstance(target, torch._ops.OpOverload):
            raise ValueError("its signature is (*args, **kwargs)")
        bound = inspect.signature(target).bind(*args, **kwargs)
    except (TypeError, ValueError):  # a builtin, a method or an op: by the schema
        schema = getattr(target, "_schema", None) or next(iter(schemas(name) or schemas(f"{name}_")), None)
        defaults = {} if schema is None else {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
        return {**defaults, **dict(zip([] if schema is None else [a.name for a in schema.arguments], args)), **kwargs}
    bound.apply_defaults()
    return dict(bound.arguments)


def writes(target: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call writes over its first operand."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    name = target if isinstance(target, str) else str(getattr(target, "__name__", ""))
    by_name = (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
    return by_name or kwargs.get("inplace") is True or kwargs.get("out") is not None or target in IN_PLACE


def leaf_returns(leaf: nn.Module) -> type | None:
    """The class of what a module of torch.nn returns; None of others."""
    if isinstance(leaf, nn.RNNBase | nn.MultiheadAttention | nn.LSTMCell) or getattr(leaf, "return_indices", False):
        return tuple
    known = type(leaf).__module__.startswith("torch.nn.") and not isinstance(leaf, nn.AdaptiveLogSoftmaxWithLoss)
    return Tensor if known else None


def line_of(node: fx.Node) -> str:
    """The line of the model that made a call: "net.py:7, in forward"."""
    frame = frame_of(node)
    return "no Python line" if frame is None else "{}:{}, in {}".format(*frame)


def frame_of(node: fx.Node) -> tuple[str, str, str] | None:
    """The file, the line and the function that made a call: the innermost of the model."""
    frames = re.findall(r'File "(.*)", line (\d+), in (.*)', node.stack_trace or "")
    return next((f for f in reversed(frames) if is_a_models_file(f[0])), None)
