"""Whose storage a node of a graph may share, and copies where a call in place would write over what is still needed.

Requires: a graph over the modules it calls. Ensures, after `protect`: nothing writes over what a dual-path call has saved, over
the caller's input or over the model's buffers.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, fx, nn
from torch.overrides import handle_torch_function, has_torch_function

from ..capture.clone import lets_through
from ..containers import rebuilt
from ..gates.dual import dual_path
from ..gates.multihead import multihead_attention
from .calls import name_of, writes
from .ops import VIEW

KEEPERS = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)  # their output may be their input


class Storage:
    """What the nodes of `graph` share, as it was when this was made."""

    def __init__(self, modules: nn.Module, graph: fx.Graph) -> None:
        self.modules, self.graph = modules, graph
        self.position = {node: i for i, node in enumerate(graph.nodes)}

    def is_view(self, node: fx.Node) -> bool:
        """Whether the output may share the storage of the first input."""
        if node.op == "call_module":
            module = self.modules.get_submodule(str(node.target))
            return lets_through(module) or isinstance(module, KEEPERS)
        return node.op in ("call_function", "call_method") and (name_of(node) in VIEW or writes(node))

    def owner(self, node: fx.Node) -> fx.Node:
        """The node whose storage `node` may share."""
        while self.is_view(node) and node.all_input_nodes:
            node = node.all_input_nodes[0]
        return node

    def later_readers(self, source: fx.Node, node: fx.Node, through: Collection[fx.Node] = ()) -> list[fx.Node]:
        """What comes after `node` and reads the storage of `source`, other than through `node` and `through`."""
        sharers = [self.owner(source)]
        for sharer in sharers:
            views = [n for n in sharer.users if self.is_view(n) and n.all_input_nodes[0] is sharer]
            sharers += [n for n in views if n is not node and n not in through]
        return [user for n in sharers for user in n.users if self.position.get(user, -1) > self.position[node]]

    def protect(self) -> list[str]:
        """Insert the copies; returns what is to be told of them."""
        keepers: list[fx.Node] = []
        notes: list[str] = []
        for node in list(self.graph.nodes):
            if node.target in (dual_path, multihead_attention):
                keepers.append(node)
            if not writes(node) or not node.all_input_nodes:
                continue
            owner = self.owner(node.all_input_nodes[0])
            if owner.op == "get_attr":
                notes.append(f"the forward writes over {owner.target}: each call over a copy of it, the model's own stays")
            if owner.op in ("placeholder", "get_attr"):  # the caller's input, or the model's buffer
                owner = self.copied(owner)
            for keeper in keepers:
                for kept in keeper.all_input_nodes:
                    if kept.op != "get_attr" and self.owner(kept) is owner:
                        with self.graph.inserting_before(keeper):
                            keeper.replace_input_with(kept, self.graph.call_method("clone", (kept,)))
        return notes

    def copied(self, owner: fx.Node) -> fx.Node:
        """A copy made before anything else reads `owner`, which everything reads in place of it."""
        same = [n for n in self.graph.nodes if n is owner or (n.op == owner.op == "get_attr" and n.target == owner.target)]
        with self.graph.inserting_after(same[0]):
            copy = self.graph.call_function(copied, (same[0],))
        for each in same:
            for user in [user for user in each.users if user is not copy]:
                user.replace_input_with(each, copy)
        return copy


def copied(x: Any) -> Any:
    """The tensors of an input, which may be a container of them, in storage of their own."""
    if has_torch_function((x,)):
        return handle_torch_function(copied, (x,), x)
    return rebuilt(x, lambda t: t.clone() if isinstance(t, Tensor) else t)
