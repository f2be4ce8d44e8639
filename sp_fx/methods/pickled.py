"""A graph as plain data, which pickle takes.

`torch.fx` pickles a graph as code, and traces that code again to load it: calls that no input reaches, such as
`torch.arange(4)`, would then be constants, and what a node knows of itself would be lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..containers import Slot

KEPT = ("place",)  # of what a node knows, what a loaded graph is asked for


@dataclass(frozen=True)
class Operator:
    """An op of `torch.ops` by its name: "aten::relu" and "default", "higher_order" and "cond"; "" for all overloads."""

    name: str
    overload: str

    def looked_up(self) -> Any:
        """Returns the op.

        Raises:
            LookupError: this process has no such op: the library that registers it is to be imported first.
        """
        space, _, name = self.name.rpartition("::")
        try:
            packet = getattr(getattr(torch.ops, space), name)
            return getattr(packet, self.overload) if self.overload else packet
        except AttributeError as error:
            raise LookupError(f"{self.name}, which the graph calls, is not registered here: import what registers it") from error


def rows(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """Returns the nodes of a graph, each as what `graph_of` makes it of; in their operands a slot stands for a node."""
    number = {node: i for i, node in enumerate(graph.nodes)}

    def slot(leaf: Any) -> Any:
        return Slot(number[leaf]) if isinstance(leaf, fx.Node) else leaf

    def operands(value: Any) -> Any:
        return fx.node.map_aggregate(value, slot)

    return [
        (
            node.op,
            by_name(node.target),
            operands(node.args),
            operands(node.kwargs),
            node.name,
            {key: node.meta[key] for key in KEPT if key in node.meta},
        )
        for node in graph.nodes
    ]


def graph_of(saved: list[tuple[Any, ...]]) -> fx.Graph:
    """Returns the graph whose `rows` were saved."""
    graph = fx.Graph()
    nodes: list[fx.Node] = []

    def operands(value: Any) -> Any:
        return fx.node.map_aggregate(value, lambda leaf: nodes[leaf.index] if isinstance(leaf, Slot) else leaf)

    for op, target, args, kwargs, name, meta in saved:
        target = target.looked_up() if isinstance(target, Operator) else target
        node = graph.create_node(op, target, operands(args), operands(kwargs), name)
        node.meta.update(meta)
        nodes.append(node)
    return graph


def by_name(target: Any) -> Any:
    """Returns what stands for the target of a node in a pickle: of an op of `torch.ops` its name, of the others themselves."""
    if isinstance(target, torch._ops.OpOverload):
        return Operator(target._schema.name, target._overloadname)
    if isinstance(target, torch._ops.OpOverloadPacket):
        return Operator(target._qualified_op_name, "")
    if isinstance(target, torch._ops.HigherOrderOperator):
        return Operator(f"higher_order::{target.name()}", "")
    return target
