"""Cuts: a rewritten graph that ends at an inner activation, or one that starts there.

Requires: a graph that `rewrite` has made. Ensures: the same values; no call that nothing reads, but those that write over what
something reads; no call that writes over an input.

An activation has the name of the module that returns it, or the place of the gate, as the report prints them, `#2` for the second
call. Of a module that returns a tuple it is the first tensor.
"""

from __future__ import annotations

import difflib
import operator
from dataclasses import replace

from torch import fx, nn

from ..analysis.aliasing import Aliasing
from ..analysis.calls import writes
from ..capture.arguments import checked
from ..gates.multihead import multihead_attention
from ..rewrite.protection import protect
from ..rewrite.report import Report


def activations(graph: fx.Graph) -> dict[str, fx.Node]:
    """The nodes whose values have names."""
    found: dict[str, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            number = sum(name.partition("#")[0] == node.target for name in found) + 1
            found[str(node.target) if number == 1 else f"{node.target}#{number}"] = node
    for node in graph.nodes:
        if "place" in node.meta:
            found.setdefault(node.meta["place"], node)
    return {name: first_of(node) for name, node in found.items()}


def first_of(node: fx.Node) -> fx.Node:
    """The node itself, or its first element where what reads it takes it apart."""
    parts = [user for user in node.users if user.target is operator.getitem]
    apart = node.users and len(parts) == len(node.users) and (node.op == "call_module" or node.target is multihead_attention)
    return next((part for part in parts if part.args[1] == 0), node) if apart else node


def find(graph: fx.Graph, name: str, option: str) -> fx.Node:
    """The node of the activation `name`.

    Raises:
        ValueError: there is none; the message has the nearest names.
    """
    known = activations(graph)
    if name not in known:
        near = difflib.get_close_matches(str(name), known, 5, 0.4) or list(known)[:5]
        raise ValueError(f"{option}={name!r} names no activation of this model; the nearest are {', '.join(near) or 'none'}")
    return known[name]


def ending_at(modules: nn.Module, graph: fx.Graph, name: str, option: str = "output") -> fx.Graph:
    """The graph up to the activation `name`, which it returns."""
    end, cut = find(graph, name, option), fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        copies[node] = cut.node_copy(node, copies.__getitem__)
        if node is end:
            break
    for node in graph.find_nodes(op="placeholder"):
        if node not in copies:
            copies[node] = cut.node_copy(node)
    cut.output(copies[end])
    return pruned(modules, cut)


def starting_at(modules: nn.Module, graph: fx.Graph, name: str) -> fx.Graph:
    """The graph from the activation `name` on, which becomes its first input; it keeps those of its inputs that it needs."""
    start, cut = find(graph, name, "wrt"), fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    given = cut.placeholder("activation_")
    for node in graph.nodes:
        copies[node] = given if node is start else cut.node_copy(node, copies.__getitem__)
    return pruned(modules, cut, needed_only=True)


def pruned(modules: nn.Module, graph: fx.Graph, needed_only: bool = False) -> fx.Graph:
    aliasing = Aliasing(modules, graph)
    protect(graph, aliasing)
    for node in reversed(list(graph.nodes)):
        kept = node.op == "output" or (node.op == "placeholder" and (not needed_only or node.target == "activation_"))
        if node.users or kept or (node.target is checked and not needed_only):
            continue
        if not (writes(node) and aliasing.later_readers(node.all_input_nodes[0], node)):
            graph.erase_node(node)
    graph.lint()
    return graph


def within(report: Report, graph: fx.Graph) -> Report:
    """What a report says of the gates that are in `graph`."""
    held = {node.meta.get("place") for node in graph.nodes}
    return replace(report, sites=tuple(site for site in report.sites if site.place in held))


def places(graph: fx.Graph) -> list[str | None]:
    """The place of each call of a graph, which a pickled graph forgets."""
    return [node.meta.get("place") for node in graph.nodes if node.op.startswith("call")]


def place(graph: fx.Graph, known: list[str | None]) -> None:
    calls = [node for node in graph.nodes if node.op.startswith("call")]
    for node, name in zip(calls, known, strict=True):
        if name is not None:
            node.meta["place"] = name
