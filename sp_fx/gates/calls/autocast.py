"""Calls under the autocast that a model turns on, or off, for a part of its forward.

A graph has no regions: each call in one is made under its autocast on its own, `under(region, "torch.matmul", a, b)`.
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.overrides import handle_torch_function, has_torch_function

Region = tuple[tuple[str, torch.dtype, bool], ...]  # of each device type its dtype, and whether it is on

CALLED: dict[str, Callable] = {}  # the functions that graphs call under autocast, by their full names


def under(region: Region, target: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls `target` under the autocast of `region`: a module or a function, a function by its full name ("torch.matmul"), or a
    method of the first argument by its name ("matmul")."""
    if has_torch_function(args):
        return handle_torch_function(under, args, region, target, *args, **kwargs)
    if region:
        device, dtype, enabled = region[0]
        with torch.autocast(device, dtype, enabled, cache_enabled=False):
            return under(region[1:], target, *args, **kwargs)
    if not isinstance(target, str):
        return target(*args, **kwargs)
    return function(target)(*args, **kwargs) if "." in target else getattr(args[0], target)(*args[1:], **kwargs)


def put_under(node: fx.Node, region: Region) -> None:
    """Makes a call of a graph, of a function, a method or a module, one under the autocast of `region`."""
    target: Any = node.target
    if node.op == "call_module":
        with node.graph.inserting_before(node):
            target = node.graph.get_attr(str(node.target))
    elif not isinstance(target, str):
        CALLED[fx.node._get_qualified_name(target)] = target
        target = fx.node._get_qualified_name(target)
    node.args = (region, target, *node.args)
    node.op, node.target = "call_function", under


def function(name: str) -> Callable:
    """The function that has `name` for its full name.

    Raises:
        LookupError: there is none in this process, which has unpickled the graph.
    """
    parts = name.split(".")
    for i in range(len(parts) - 1, 0, -1) if name not in CALLED else ():
        try:
            CALLED[name] = operator.attrgetter(".".join(parts[i:]))(importlib.import_module(".".join(parts[:i])))
            break
        except (ImportError, AttributeError):
            continue
    if name not in CALLED:
        raise LookupError(f"the function {name} of an unpickled graph is not found here")
    return CALLED[name]
