"""Copies where a call in place would write over what is still needed.

Requires: a rewritten graph. Ensures: nothing writes over what a dual-path call has saved for its adjoint, over the caller's input
or over the model's buffers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx
from torch.overrides import handle_torch_function, has_torch_function

from ..analysis.aliasing import Aliasing
from ..analysis.calls import writes
from ..containers import rebuilt
from ..gates.dual_path import dual_path
from ..gates.multihead import multihead_attention


def protect(graph: fx.Graph, aliasing: Aliasing) -> list[str]:
    """Insert the copies into `graph`; returns notes for the reader of a report."""
    saving: list[fx.Node] = []  # the calls so far that save their inputs
    notes: list[str] = []
    for node in list(graph.nodes):
        if node.target in (dual_path, multihead_attention):
            saving.append(node)
        if not writes(node) or not node.all_input_nodes:
            continue
        owner = aliasing.owner(node.all_input_nodes[0])
        if owner.op == "get_attr":
            notes.append(f"the forward writes over {owner.target}: each call over a copy of it, the model's own stays")
        if owner.op in ("placeholder", "get_attr"):  # the caller's input, or the model's buffer
            owner = replace_by_copy(graph, owner)
        for gate in saving:
            for saved in gate.all_input_nodes:
                if saved.op != "get_attr" and aliasing.owner(saved) is owner:
                    with graph.inserting_before(gate):
                        gate.replace_input_with(saved, graph.call_method("clone", (saved,)))
    return notes


def replace_by_copy(graph: fx.Graph, owner: fx.Node) -> fx.Node:
    """Returns a copy of `owner` that is made before anything reads `owner`, and that everything reads in place of it."""
    same = [n for n in graph.nodes if n is owner or (n.op == owner.op == "get_attr" and n.target == owner.target)]
    with graph.inserting_after(same[0]):
        copy = graph.call_function(copied, (same[0],))
    for node in same:
        for user in [user for user in node.users if user is not copy]:
            user.replace_input_with(node, copy)
    return copy


def copied(x: Any) -> Any:
    """Returns `x` with its tensors in storage of their own; it may be a container of them."""
    if has_torch_function((x,)):
        return handle_torch_function(copied, (x,), x)
    return rebuilt(x, lambda t: t.clone() if isinstance(t, Tensor) else t)
