"""Calls of gates that users have registered, as each tracer leaves them in a graph."""

from __future__ import annotations

import ast
from typing import Any

import torch
from torch import fx, nn

from ..containers import decoded
from ..gates.registry import FUNCTIONS, STAND_INS, call_registered, named, registered
from .written_gates import Written


def registered_gate(node: fx.Node, module: nn.Module | None) -> Written | None:
    """The registered gate that `node` is a call of, if it is one."""
    target = node.target.overloadpacket if isinstance(node.target, torch._ops.OpOverload) else node.target
    source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    if source is None:
        return None
    if node.op == "call_module" and module is not None and (name := registered(module)) is not None:
        extra = named(type(module).forward, (module, *node.args), dict(node.kwargs))
        return Written(name, {k: v for k, v in extra.items() if v is not source}, source, (node,))
    if node.op == "call_function" and (name := FUNCTIONS.get(target, "")):
        function: Any = next((f for f, stand in STAND_INS.items() if stand is target), target)
        extra = named(function, node.args, dict(node.kwargs))
        if function is not target:  # by its name, so that no later trace goes into it
            node.target, node.args = call_registered, (name, *node.args)
        return Written(name, extra, source, (node,))
    return None


def unmark(node: fx.Node) -> tuple[fx.Node, Written] | None:
    """Of a marker that an export left: what it marks, and the gate that that is. The marker goes."""
    if node.target is not torch.ops.sp_fx.registered.default:
        return None
    source, y, name, args = node.args
    inside: dict[fx.Node, None] = {}
    queue = [y]
    while queue:
        at = queue.pop()
        if at is not source and at not in inside and at.op not in ("placeholder", "get_attr"):  # type: ignore[union-attr]
            inside[at] = None  # type: ignore[index]
            queue.extend(at.all_input_nodes)  # type: ignore[union-attr]
    node.replace_all_uses_with(y)  # type: ignore[arg-type]
    node.graph.erase_node(node)
    return y, Written(str(name), decoded(ast.literal_eval(str(args))), source, tuple(reversed(inside)))  # type: ignore[arg-type,return-value]
