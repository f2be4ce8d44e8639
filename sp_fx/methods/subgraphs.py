"""Subgraphs of a rewritten graph: the part that ends at an inner activation, and the part that starts there.

Requires: a graph that `rewrite` has made, where what depends on a call in place depends on it by data flow. Ensures: the values
stay the same; a call whose result nobody reads is gone.

An activation has the name of the module that returns it, or the place of the gate, as the report prints them: `layer2.0.relu`,
and `layer2.0.relu#2` for the second call of that module. Of a module that returns a tuple it is the first tensor.
"""

from __future__ import annotations

import keyword
import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import fx, nn

from ..capture.admission import checks
from ..capture.passed import lets_through
from ..gates.modules.multihead import multihead_attention
from ..gates.rules import nearest
from ..rewrite.report import Report


def activations(graph: fx.Graph) -> dict[str, fx.Node]:
    """Returns, by name, the nodes whose values have names."""
    named: dict[str, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            number = sum(name.partition("#")[0] == node.target for name in named) + 1
            named[str(node.target) if number == 1 else f"{node.target}#{number}"] = node
    for node in graph.nodes:
        if "place" in node.meta:
            named.setdefault(node.meta["place"], node)
    return {name: first_tensor(node) for name, node in named.items()}


def first_tensor(node: fx.Node) -> fx.Node:
    """Returns `node[0]` of a call whose users all index its result, as they do an LSTM's tuple; of any other, the node itself."""
    parts = [user for user in node.users if user.target is operator.getitem]
    is_tuple = node.users and len(parts) == len(node.users) and (node.op == "call_module" or node.target is multihead_attention)
    return next((part for part in parts if part.args[1] == 0), node) if is_tuple else node


def find(graph: fx.Graph, name: str, option: str) -> fx.Node:
    """Returns the node of the activation `name`, or of the only one whose name ends so: "word_embeddings". `option` is the
    argument that named it, for the message.

    Raises:
        ValueError: there is none; the message has the nearest names.
    """
    named = activations(graph)
    if name not in named:  # a word of Python's own, such as "heads.class", has an underscore in a graph
        name = ".".join(f"{part}_" if keyword.iskeyword(part) else part for part in str(name).split("."))
    if name not in named and (shared := paths_of(graph, name)):
        found = [path for path in shared if path in named]
        if len(found) > 1:
            raise ValueError(f"{option}={name!r} is run as {' and as '.join(found)}: say which")
        name = found[0] if found else name
    if name not in named and (ends := [full for full in named if full.endswith(f".{name}")]):
        if len(ends) > 1:
            raise ValueError(f"{option}={name!r} is the end of {len(ends)} names: {', '.join(ends[:5])}: say which")
        name = ends[0]
    if name not in named:
        near = nearest(name, named, cutoff=0.4) or list(named)[:5]
        raise ValueError(f"{option}={name!r} names no activation of this model; the nearest are {', '.join(near) or 'none'}")
    return named[name]


def paths_of(graph: fx.Graph, name: str) -> list[str]:
    """Returns the other paths, in the model that a graph was captured from, of the module `name` or of modules of its class with
    the same weights: T5's `shared` is run as its `encoder.embed_tokens` and as its `decoder.embed_tokens`."""
    origin = getattr(graph.owning_module, "origin", None)
    modules = {} if origin is None else dict(origin.named_modules(remove_duplicate=False))
    if name not in modules:
        return []

    def like(module: nn.Module) -> tuple[Any, ...]:
        own = [id(p) for p in module.parameters(recurse=False)]
        return (type(module), *own) if own and not list(module.children()) else (id(module),)

    return [path for path, module in modules.items() if path != name and like(module) == like(modules[name])]


def ending_at(graph: fx.Graph, name: str, option: str = "output") -> fx.Graph:
    """Returns the subgraph up to the activation `name`, which is its output. It keeps all inputs."""
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
    return pruned(cut)


def starting_at(modules: nn.Module, graph: fx.Graph, name: str) -> fx.Graph:
    """Returns the subgraph from the activation `name` on, its first input; it keeps those of the inputs that it needs.

    The hooks of a module that is entered before it see None in place of what was computed there.
    """
    start, cut = find(graph, name, "wrt"), fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    taken = {str(node.target).lstrip("*") for node in graph.find_nodes(op="placeholder")}
    argument = "activation_"
    while argument in taken:
        argument += "_"
    activation = cut.placeholder(argument)
    after = {start}
    for node in graph.nodes:
        if after.intersection(node.all_input_nodes):
            after.add(node)
        copies[node] = activation if node is start else cut.node_copy(node, copies.__getitem__)
        if node is not start and node.op == "call_module" and lets_through(modules.get_submodule(str(node.target))):
            known = lambda n: copies[n] if n in after else None  # noqa: E731
            copies[node].args = (copies[node].args[0], *fx.map_arg(node.args[1:], known))
            copies[node].kwargs = fx.map_arg(node.kwargs, known)
    return pruned(cut, needed_only=True)


def needed_after(graph: fx.Graph, arguments: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns those of the `arguments` of a whole graph, by name, that the subgraph from an activation on needs beside it: by
    position and by keyword. Those before `*args` come by position."""
    names = [str(node.target) for node in graph.find_nodes(op="placeholder")][1:]
    by_position: list[Any] = []
    named: dict[str, Any] = {}
    for name in names:
        if name.startswith("**"):
            named |= arguments.get(name[2:], {})
        elif name.startswith("*"):
            by_position, named = [*named.values(), *arguments.get(name[1:], ())], {}
        elif name in arguments:
            named[name] = arguments[name]
    return tuple(by_position), named


def pruned(graph: fx.Graph, needed_only: bool = False) -> fx.Graph:
    """Erases the calls whose results nobody reads, and returns the graph; with `needed_only`, unread inputs and the checks of
    what it is called with as well."""
    first, asked = next(iter(graph.nodes)), set() if needed_only else set(checks(graph))
    for node in reversed(list(graph.nodes)):
        kept = node.op == "output" or (node.op == "placeholder" and (not needed_only or node is first))
        if not (node.users or kept or node in asked):
            graph.erase_node(node)
    graph.lint()
    return graph


def within(report: Report, graph: fx.Graph) -> Report:
    """Returns the report with the sites of those gates alone that are in `graph`."""
    places = {node.meta.get("place") for node in graph.nodes}
    return replace(report, sites=tuple(site for site in report.sites if site.place in places))
