"""Alias analysis: whose storage a node of a graph may share, and who reads that storage later.

For example, after `y = x.view(-1); y.relu_()`, the node of `x` owns the storage of `y`, and whatever reads `x` afterwards reads
what `relu_` has written.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import fx, nn

from ..capture.passed import lets_through
from .calls import name_of, writes
from .ops import VIEW

RETURN_THEIR_INPUT = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)  # or a view of it


class Aliasing:
    """Of the nodes of `graph` as it is when this is made; nodes that are inserted later are nobody's later readers."""

    def __init__(self, modules: nn.Module, graph: fx.Graph) -> None:
        self.modules = modules
        self.position = {node: i for i, node in enumerate(graph.nodes)}

    def is_view(self, node: fx.Node) -> bool:
        """Whether the output of `node` may share the storage of its first input."""
        if node.op == "call_module":
            module = self.modules.get_submodule(str(node.target))
            return lets_through(module) or isinstance(module, RETURN_THEIR_INPUT)
        return node.op in ("call_function", "call_method") and (name_of(node) in VIEW or writes(node))

    def owner(self, node: fx.Node) -> fx.Node:
        """Returns the node whose storage `node` may share: `x` of `x.view(-1)`."""
        while self.is_view(node) and node.all_input_nodes:
            node = node.all_input_nodes[0]
        return node

    def later_readers(self, source: fx.Node, node: fx.Node, through: Collection[fx.Node] = ()) -> list[fx.Node]:
        """Returns the nodes after `node` that read the storage of `source` otherwise than through `node` and `through`."""
        sharers = [self.owner(source)]
        for sharer in sharers:
            views = [n for n in sharer.users if self.is_view(n) and n.all_input_nodes[0] is sharer]
            sharers += [n for n in views if n is not node and n not in through]
        return [user for n in sharers for user in n.users if self.position.get(user, -1) > self.position[node]]
