"""Calls of gates that users have registered, as each tracer leaves them in a graph."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from ..capture.kept_functions import Marked
from ..gates.registry import FUNCTIONS, STAND_INS, call_registered, named, registered
from .calls import op_of
from .written.gates import Written


def registered_gate(node: fx.Node, module: nn.Module | None) -> Written | None:
    """The registered gate that `node` is a call of, if it is one; `module` is the leaf that it calls, if it calls one.

    For example, after `register_gate(snake, gain)`: the gate "snake" of `h` at a call `snake(h, alpha=2.0)`.
    """
    target, arguments = op_of(node), node.args
    if target is call_registered:
        name, *arguments = arguments  # type: ignore[assignment]
    source = arguments[0] if arguments and isinstance(arguments[0], fx.Node) else None
    if source is None:
        return None
    if node.op == "call_module" and module is not None and (name := registered(module)) is not None:
        extra = named(type(module).forward, (module, *arguments), dict(node.kwargs))
        return Written(name, {k: v for k, v in extra.items() if v is not source}, source, (node,))
    if node.op != "call_function":
        return None
    if target is call_registered:
        function: Any = next(f for f in STAND_INS if FUNCTIONS[f] == name)
        return Written(str(name), named(function, tuple(arguments), dict(node.kwargs)), source, (node,))
    if known := FUNCTIONS.get(target, ""):
        return Written(known, named(target, tuple(arguments), dict(node.kwargs)), source, (node,))
    return None


def marked_gate(marked: Marked) -> Written:
    """Returns the registered gate that a marker of an export names."""
    return Written(marked.name, marked.arguments, marked.source, marked.inside)
