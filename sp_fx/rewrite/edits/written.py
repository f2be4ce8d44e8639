"""Edits of gates that a model writes out itself."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from ...analysis.readers import Gate
from ...analysis.written.gates import Written
from ...analysis.written.products import Factor, Product
from ...gates.dual_path import frozen
from .again import made_with, replayed
from .rewriting import Edit, Rewriting, Softness


@dataclass
class Unshare(Edit):
    """Those of the calls inside `gate`, which `node` closes, that something else reads as well are made a second time for the
    gate alone. Applied before any decision."""

    node: fx.Node
    gate: Written

    def apply(self, to: Rewriting) -> None:
        own = to.facts.view.private(self.gate.inside, self.node)
        copies: dict[fx.Node, fx.Node] = {}
        for n in self.gate.inside:
            if n in own:
                for shared, copy in copies.items():
                    n.replace_input_with(shared, copy)
            else:
                with to.graph.inserting_before(n.next):
                    replayed(to, n, {n}, copies)
        to.unshared[self.node] = replace(self.gate, inside=tuple(copies.get(n, n) for n in self.gate.inside))


@dataclass
class CloseWritten(Edit):
    """The calls inside `gate`, which `node` closes, stay, cut off from its source; what they compute passes through a dual-path
    call that differentiates it. They are its own (`Unshare`)."""

    node: fx.Node
    gate: Written
    at: Softness

    def apply(self, to: Rewriting) -> None:
        node, gate, graph = self.node, self.gate, to.graph
        source = to.instead.get(gate.source, gate.source)
        with graph.inserting_before(gate.inside[0]):
            constant = graph.call_function(frozen, (source,))
        for n in gate.inside:
            n.replace_input_with(source, constant)
        users = list(node.users)
        with graph.inserting_before(node.next):
            soft = to.dual_path(node, Gate("written", (source, node), written_arguments(gate)), self.at)
        for user in users:
            user.replace_input_with(node, soft)
        node.meta.pop("place", None)
        to.instead[node] = soft


@dataclass
class Freeze(Edit):
    """The `operand` of the call `node` becomes a constant, for what the call `closing` reads alone: where something else reads
    what `node` makes, the calls between the two are made again."""

    node: fx.Node
    operand: fx.Node
    closing: fx.Node | None = None

    def apply(self, to: Rewriting) -> None:
        with to.graph.inserting_before(self.node):
            constant = to.graph.call_function(frozen, (self.operand,))
        between = made_with(self.node, until=self.closing)
        if self.closing in (None, self.node) or not any(n.op == "output" for n in between):
            self.node.replace_input_with(self.operand, constant)
            return
        last: Any = self.closing
        copies = {self.operand: constant}
        for n in last.all_input_nodes:
            if n in between and n.target is not frozen:
                with to.graph.inserting_before(last):
                    last.replace_input_with(n, replayed(to, n, between - {last}, copies))


@dataclass
class Regroup(Edit):
    """The product `node` stays, and its cotangent goes back through one of its gates, each `softened` (None: with its
    derivative), and of its other factors. `constant` is the factor that a product with a gate holds constant: the number of a
    gate, or one of the others."""

    node: fx.Node
    product: Product
    softened: list[Softness | None]
    constant: object

    def apply(self, to: Rewriting) -> None:
        with to.graph.inserting_before(self.node.next):
            factors: list[tuple[bool, Any]] = []
            for i, ((gate, second), at) in enumerate(zip(self.product.gates, self.softened)):
                soft = self.softly(to, self.product.products[-1 - i], gate, second, at)
                factors.append((False, to.graph.call_function(frozen, (soft,)) if i == self.constant else soft))
            for factor in self.product.others:
                value = self.now(to, factor.value)
                held = isinstance(value, fx.Node) and factor.value is self.constant
                factors.append((factor.divides, to.graph.call_function(frozen, (value,)) if held else value))
            soft = factors[0][1]
            for divides, value in factors[1:]:
                soft = to.graph.call_function(operator.truediv if divides else operator.mul, (soft, value))
        to.passing[self.node] = to.surrogate(self.node, soft)

    def softly(self, to: Rewriting, node: fx.Node, gate: Written, second: Factor, at: Softness | None) -> fx.Node:
        """Returns a gate of the product, made of its two factors; its line in the report is that of the product `node`."""
        factors = [self.now(to, n) for n in (gate.source, second.value)]
        times = operator.truediv if second.divides else operator.mul
        if at is None:
            return to.graph.call_function(times, tuple(factors))
        y = to.graph.call_function(times, tuple(to.graph.call_function(frozen, (n,)) for n in factors))
        written = Gate("written", (factors[0], y), written_arguments(gate))
        return to.dual_path(node, written, at)

    def now(self, to: Rewriting, n: Any) -> Any:
        return to.instead.get(n, n) if isinstance(n, fx.Node) else n


def written_arguments(gate: Written) -> dict[str, Any]:
    """Returns the arguments of the row `written` for a gate."""
    multiple = {} if (gate.times, gate.through) == (1.0, 0.0) else {"times": gate.times, "through": gate.through}
    return {"row": gate.kind, "args": tuple(gate.args.items()), **multiple}
