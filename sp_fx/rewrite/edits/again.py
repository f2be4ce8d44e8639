"""Calls that are made a second time, of other numbers."""

from __future__ import annotations

from typing import Any

from torch import fx

from ...analysis.calls import is_affine_row
from ...gates.dual_path import dual_path
from .calls import OpenLeaf
from .rewriting import Rewriting


def replayed(to: Rewriting, node: fx.Node, within: set[fx.Node], copies: dict[fx.Node, fx.Node]) -> fx.Node:
    """Returns what `node` would be, were the nodes that `copies` has what it says; calls `within` are made again for it."""
    if node.target is dual_path and node.args[0] == "surrogate":  # made again already
        return node.args[2]  # type: ignore[return-value]
    if node not in copies and node in within:
        for n in node.all_input_nodes:
            copies[n] = replayed(to, n, within, copies)
        if to.facts.is_identity(node):  # nobody's hooks run twice
            copies[node] = copies.get(node.all_input_nodes[0], node.all_input_nodes[0])
        else:
            copies[node] = to.graph.node_copy(node, lambda n: copies.get(n, n))
            to.copies.add(copies[node])
            copies[node].meta.pop("place", None)
            if (leaf := to.facts.leaf(node)) is not None and is_affine_row(leaf):
                OpenLeaf(copies[node], leaf).apply(to)
    return copies.get(node, node)


def replayed_after(to: Rewriting, product: fx.Node, within: set[fx.Node], copies: dict[fx.Node, fx.Node]) -> fx.Node:
    """Returns the call `product` made again behind itself, of the same values and other weights."""
    with to.graph.inserting_before(product.next):
        return replayed(to, product, within | {product}, {**copies})


def temper_behind(to: Rewriting, node: Any, within: set[fx.Node], copies: dict[fx.Node, fx.Node]) -> None:
    """Let the calls that were made again, of those that `node` is made by, read what `copies` make of the calls `within`."""
    queue = [node]
    while queue:
        at = queue.pop()
        if at in to.copies and at not in copies.values():
            queue += at.all_input_nodes
            for n in at.all_input_nodes:
                with to.graph.inserting_before(at):
                    at.replace_input_with(n, replayed(to, n, within, copies))


def made_with(node: fx.Node, until: fx.Node | None = None) -> set[fx.Node]:
    """Returns the node, and what it has a part in; `until` where it has a part in it, and not what that is in."""
    found, queue = {node}, [node]
    while queue:
        at = queue.pop()
        new = [user for user in at.users if user not in found and at is not until]
        found.update(new)
        queue += new
    return found
