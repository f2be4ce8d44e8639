"""What a module computes twice becomes one call, so that a gate is seen to be of one tensor: `(h - 1) * torch.sigmoid(h - 1)`.

Requires: a graph whose calls in place are normalised (`out_of_place.py`). Ensures: the same outputs, bit for bit; gates are
called as often as the model calls them.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import fx, nn

from ...analysis.aliasing import Aliasing
from ...analysis.calls import written
from ...analysis.ops import AFFINE, CARRIES, ITSELF, LISTED, NORMS, POWERS, PRODUCT, QUOTIENT, REDUCES, SIZES, SMOOTH, VIEW
from ...analysis.signals import called

# Neither gates, each of which has its line in a report, nor dropout, which may draw numbers.
ARITHMETIC = (AFFINE | POWERS | PRODUCT | QUOTIENT | SMOOTH | REDUCES | NORMS | CARRIES | VIEW | SIZES) - LISTED.keys() - ITSELF


def merge(modules: nn.Module, graph: fx.Graph) -> None:
    """Let calls of one function on the same arguments, in one module, be one."""
    over = written_over(modules, graph)
    first: dict[Hashable, fx.Node] = {}
    for node in list(graph.nodes):
        if node in over or (key := key_of(node)) is None:
            continue
        same = first.setdefault(key, node)
        if same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)


def key_of(node: fx.Node) -> Hashable | None:
    """Returns what two calls have in common that give the same; None of a call that is to be made as often as it is written."""
    if node.op == "get_attr":
        return "get_attr", str(node.target)
    if node.op not in ("call_function", "call_method") or called(node) not in ARITHMETIC | {"getitem"}:
        return None
    module = next(reversed(node.meta.get("nn_module_stack", {"": None})), "")
    key = (node.op, node.target, module, node.meta.get("autocast", ()), hashed(node.args), hashed(node.kwargs))
    try:
        hash(key)
    except TypeError:  # an argument that no two calls share
        return None
    return key


def hashed(value: Any) -> Any:
    """Returns an argument, containers and slices as tuples; 1, 1.0 and True are three, and 0.0 and -0.0 two."""
    if isinstance(value, tuple | list):
        return type(value).__name__, *map(hashed, value)
    if isinstance(value, dict):
        return "dict", *((name, hashed(item)) for name, item in value.items())
    if isinstance(value, slice):
        return "slice", *map(hashed, (value.start, value.stop, value.step))
    return type(value), repr(value) if isinstance(value, float) else value


def written_over(modules: nn.Module, graph: fx.Graph) -> set[fx.Node]:
    """Returns the nodes that share storage with one that a call, or a caller who is given it, may write over."""
    aliasing, base = Aliasing(modules, graph), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        source = aliasing.itself(node) or aliasing.viewed(node)
        base[node] = base[source] if isinstance(source, fx.Node) else node
    over = {base[n] for node in graph.nodes for n in (node.all_input_nodes if node.op == "output" else written(node))}
    return {node for node in graph.nodes if base[node] in over}
