"""Where the input's values go in a graph, and where a derivative could follow them.

A node *varies* where its value depends on the values of the inputs, and not on their shapes alone. It is a *signal* where,
moreover, a derivative goes through all the way: of `mask = (h > 0).float()` and of positions it does not. Whole numbers that are
made of what the model computes *choose* whatever reads them, and what chooses has no derivative: reports say so.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx, nn

from ..capture.passed import operands, sources
from .calls import masks_of, name_of
from .ops import (
    AFFINE_LAYERS,
    BOUNDS,
    CARRIES,
    CHOICES,
    COMPARISONS,
    COMPLEX,
    FACTORS,
    FORM,
    GUARDS,
    INDEXED,
    JOINS,
    LOOKUPS,
    PIECEWISE,
    POINTWISE,
    PRODUCT,
    QUOTIENT,
    REAL,
    SCALES,
    SHAPES,
    SHIFTS,
    VIEW,
    WHOLE,
)

# What gives whole numbers of whole numbers: views but no casts, what is put together, sums, bounds, remainders.
KEEPS_WHOLE = (
    (VIEW - (CARRIES & POINTWISE)) | JOINS | BOUNDS | {"sum"} | (SCALES - QUOTIENT) | SHIFTS | PIECEWISE
)  # fmt: skip


class Signals:
    """Of the nodes of one graph. `passes` says which nodes are modules that give what they get.

    Attributes:
        varying: the nodes whose values depend on the values of the inputs.
        signals: those of them that a derivative reaches.
        choosing: the nodes that are whole numbers, or masks, by a comparison of what weights of the model had a part in.
        complex: the nodes that are complex numbers, as far as names say.
        whole: the nodes that are known to be whole numbers or masks.
    """

    def __init__(self, modules: nn.Module, graph: fx.Graph, passes: Callable[[fx.Node], bool]) -> None:
        self.passes = passes
        self.varying: set[fx.Node] = set()
        self.signals: set[fx.Node] = set()
        self.choosing: set[fx.Node] = set()
        self.complex: set[fx.Node] = set()
        self.whole: set[fx.Node] = set()
        self._weighed: set[fx.Node] = set()  # weights of the model had a part in these
        self._positions = positions(modules, graph, passes)
        for node in graph.nodes:
            self._visit(node)

    def _visit(self, node: fx.Node) -> None:
        name = called(node)
        inputs = [n for n in sources(node, self.passes) if n in self.varying]
        if name in FORM:  # of `index.expand_as(h)`, h says the shape: the index has nothing of what h was made by
            inputs = [n for n in inputs if n is node.args[0]]
        if any(n in self._weighed for n in inputs) or has_weights_of_its_own(node, self.passes):
            self._weighed.add(node)
        if node.op == "placeholder":
            self.varying.add(node)
            (self.signals if is_floating(node) and node not in self._positions else self.whole).add(node)
            return
        if not inputs or name in SHAPES:
            return
        self.varying.add(node)
        if name in COMPLEX or (name not in REAL and any(n in self.complex for n in inputs)):
            self.complex.add(node)
        if is_whole(node, name) or (name in KEEPS_WHOLE and all(n in self.whole for n in inputs)):
            self.whole.add(node)
        read = [n for n in inputs if n not in self.masks(node)]
        starts = self._looks_up(node, name)  # maps may be with respect to what is looked up
        if (starts or any(n in self.signals for n in read)) and node not in self.whole and is_floating(node):
            self.signals.add(node)
        elif self._chooses(node, name, inputs):
            self.choosing.add(node)

    def _looks_up(self, node: fx.Node, name: str) -> bool:
        """Whether a call makes numbers of whole numbers by weights: it looks them up in a table, or is an affine map of them."""
        by_weights = name in LOOKUPS - {"getitem"} | PRODUCT - FACTORS | AFFINE_LAYERS
        return (by_weights and any(n.op == "get_attr" for n in node.all_input_nodes)) or (
            node.op == "call_module" and not self.passes(node)
        )  # fmt: skip

    def masks(self, node: fx.Node) -> set[fx.Node]:
        """Returns the operands of a call that say where to take the others from, and get no derivative: of `where`, the mask."""
        return {n for n in masks_of(node) if isinstance(n, fx.Node)} if called(node) in CHOICES else set()

    def _chooses(self, node: fx.Node, name: str, inputs: list[fx.Node]) -> bool:
        """Whether the node has whole numbers that say something of what the model computed."""
        if name in GUARDS:
            return False
        if any(n in self.choosing for n in inputs):
            return True
        if name in COMPARISONS and node.args[:1] == node.args[1:2]:  # `h != h`, where h is NaN
            return False
        return is_whole(node, name) and any(n in self._weighed and n in self.signals for n in inputs)


def positions(modules: nn.Module, graph: fx.Graph, passes: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """Returns the nodes that are read as positions in a table, as token ids are, and what these are computed from by
    arithmetic."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        name = called(node)
        if node.op == "call_module" and isinstance(modules.get_submodule(str(node.target)), nn.Embedding | nn.EmbeddingBag):
            found.update(operands(node, passes)[:1])
        elif name in LOOKUPS:
            read = operands(node, passes)
            found.update(read[:1] if name != "getitem" else [n for n in read if n is not node.args[0]])
        elif name in INDEXED:
            index = node.kwargs.get("index", node.args[2] if len(node.args) > 2 else None)
            found.update([index] if isinstance(index, fx.Node) else [])
        if name == "getitem" and node in found:  # a row of positions
            found.update(operands(node, passes)[:1])
        elif node in found and (name in POINTWISE | VIEW or passes(node)) and not is_whole(node, name):
            found.update(operands(node, passes))
    return found


def called(node: fx.Node) -> str:
    """Returns the plain name of what a function or method call, or the reading of an attribute, asks for."""
    if node.target is getattr:
        return str(node.args[1])
    return name_of(node) if node.op in ("call_function", "call_method") else ""


def has_weights_of_its_own(node: fx.Node, passes: Callable[[fx.Node], bool]) -> bool:
    return any(n.op == "get_attr" for n in node.all_input_nodes) or (node.op == "call_module" and not passes(node))


def is_whole(node: fx.Node, name: str) -> bool:
    """Whether a call gives whole numbers or masks: a comparison, a cast to integers, the positions that `topk` returns."""
    if isinstance(value := node.meta.get("val"), torch.Tensor):
        return not (value.is_floating_point() or value.is_complex())
    source = node.args[0] if node.args else None
    if node.target in (operator.getitem, getattr) and isinstance(source, fx.Node):
        return node.args[1] in (1, "indices") and called(source) in PIECEWISE - {"aminmax"}
    wanted = [a for a in (*node.args[1:], *node.kwargs.values()) if isinstance(a, torch.dtype)]
    return name in WHOLE | GUARDS or any(not (d.is_floating_point or d.is_complex) for d in wanted)


def is_floating(node: fx.Node) -> bool:
    """Whether the value may be a floating tensor, as far as is known."""
    value = node.meta.get("val")
    return not isinstance(value, torch.Tensor) or value.is_floating_point() or value.is_complex()
