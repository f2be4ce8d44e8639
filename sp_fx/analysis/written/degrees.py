"""How a value grows with the signals that it is made of: twice the signal has four times the variance.

A norm is told by that (`norms.py`): what it divides by grows as the signal does.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Literal

from torch import fx

from .. import ops
from ..calls import operands_of
from .graph import Graph, is_new_axis

SMALL = 0.1  # what is added to a statistic, to keep it from 0, is at most that
LIMIT = 24  # calls; the longest statistic known, the difference of two means of squares, has 9
KNOWN = ops.PRODUCT | ops.QUOTIENT | ops.POWERS | ops.SHIFTS | ops.SCALES | ops.CHOICES | ops.BOUNDS | ops.DEGREES.keys()
Parity = Literal["even", "odd"] | None


@dataclass(frozen=True)
class Degree:
    """How a value grows with the signals it is made of: `powers` of each, 2 for a variance; `parities` of those in which it is
    not even: "odd", or None where neither. `reduced` says whether it has one number for all places along an axis of theirs, as a
    mean and whatever is made of means alone."""

    powers: Mapping[fx.Node, Fraction] = field(default_factory=dict)
    parities: Mapping[fx.Node, Parity] = field(default_factory=dict)
    reduced: bool = True

    @property
    def parity(self) -> Parity:
        """Its parity in all signals together."""
        if None in self.parities.values():
            return None
        return "odd" if len(self.parities) % 2 else "even"

    def times(self, other: Degree, sign: int = 1) -> Degree:
        keys = {**self.powers, **other.powers}
        powers = {n: self.powers.get(n, Fraction(0)) + sign * other.powers.get(n, Fraction(0)) for n in keys}
        parities: dict[fx.Node, Parity] = {}
        for n in {**self.parities, **other.parities}:
            both = self.parities.get(n, "even"), other.parities.get(n, "even")
            if both != ("odd", "odd"):
                parities[n] = None if None in both else "odd"
        return Degree({n: power for n, power in powers.items() if power}, parities, self.reduced and other.reduced)

    def to(self, exponent: Fraction) -> Degree:
        parities: dict[fx.Node, Parity] = {}
        for n, parity in self.parities.items():
            if parity is None or exponent % 2 != 0:
                parities[n] = parity if exponent in (1, -1) else None
        return Degree({n: power * exponent for n, power in self.powers.items()}, parities, self.reduced)

    def by(self, parity: Parity) -> Degree:
        """Returns the same with another parity in the signals in which it is odd."""
        odd = {n: parity for n, own in self.parities.items() if own == "odd" and parity != "even"}
        return replace(self, parities={**{n: own for n, own in self.parities.items() if own is None}, **odd})


class Made:
    """How something is made of signals alone, each of which has several forms that are multiples of each other.

    Attributes:
        forms: the forms, and the signal that each is of: the first form by name.
        calls: the calls that it is made by.
        exact: whether nothing was added to it on the way but small numbers, which keep a statistic from 0.
    """

    def __init__(self, graph: Graph, *signals: set[fx.Node]) -> None:
        self.graph = graph
        self.forms = {form: min(forms, key=lambda n: n.name) for forms in signals for form in forms}
        self.calls: dict[fx.Node, None] = {}
        self.exact = True
        self._known: dict[fx.Node, Degree | None] = {}

    def degree(self, node: object) -> Degree | None:
        """Returns the degree of `node`; None where it is made of something else, or grows otherwise than by a power."""
        if not isinstance(node, fx.Node) or not self.graph.varies(node):
            return Degree()
        base = self.graph.carried(node)
        if base in self.forms:
            views = []
            while node is not base:  # views and casts of the signal
                views.append(node)
                node = self.graph.inputs(node)[0]
            self.calls |= dict.fromkeys(reversed(views))
            signal = self.forms[base]
            return Degree({signal: Fraction(1)}, {signal: "odd"}, reduced=False)
        if node not in self._known:
            degree, name = self._degree(node), self.graph.called(node)
            self.calls[node] = None
            if degree is not None and (name in ops.REDUCES | ops.WINDOWS or is_inner(node, name)):
                degree = replace(degree, reduced=True)
            self._known[node] = degree
        return self._known[node]

    def _degree(self, node: fx.Node) -> Degree | None:
        graph, name, inputs = self.graph, self.graph.called(node), self.graph.inputs(node)
        item = graph.passes(node) or name in ops.CARRIES or is_new_axis(node) or node.target in (operator.getitem, getattr)
        if not inputs or not (item or name in KNOWN) or name in ops.MIXTURES or len(self.calls) > LIMIT:
            return None
        operands = [self.degree(n) for n in inputs]
        if any(degree is None for degree in operands):
            return None
        first: Degree = operands[0]  # type: ignore[assignment]
        if item:
            return self._item(node, inputs[0], first)
        if name in ops.PRODUCT and len(inputs) <= 2:
            return self._product(node, name, first, operands[-1])  # type: ignore[arg-type]
        if name in ops.QUOTIENT:
            upper, lower = (self.degree(a) for a in node.args[:2])
            return None if upper is None or lower is None else upper.times(lower, -1)
        if name in ops.POWERS:
            number = graph.number(node.args[1]) if node.args[:1] == (inputs[0],) and len(node.args) > 1 else None
            exponent = Fraction(0 if number is None else number).limit_denominator(64)
            return None if number is None or abs(exponent - Fraction(number)) > 1e-9 else first.to(exponent)
        if name in ops.SHIFTS | ops.CHOICES | ops.BOUNDS:
            return self._sum(node, name, operands)  # type: ignore[arg-type]
        if name in ops.DEGREES:
            exponent = ops.DEGREES[name]
            parity = ops.PARITIES.get(name)
            if parity == "odd":
                return replace(first.to(exponent), parities=first.parities)
            if parity == "even":
                return first.by("even").to(exponent)
            largest = name in ops.REDUCES and name not in ops.CENTRES | ops.WINDOWS
            return (first.by(None) if largest else first).to(exponent)
        return first if name in ops.SCALES and len(inputs) == 1 else None

    def _item(self, node: fx.Node, source: fx.Node, degree: Degree) -> Degree | None:
        """A view, or an item of what returns several: the variance or the mean of `var_mean`, the values of `max`."""
        name, index = self.graph.called(source), node.args[1] if len(node.args) > 1 else 0
        if name in ops.SEVERAL and name in ops.CENTRES:
            inner = self.degree(self.graph.inputs(source)[0])
            if inner is None or index == 1:
                return inner and replace(inner, reduced=True)
            return Degree(inner.to(Fraction(2 if name.startswith("var") else 1)).powers)
        return degree

    def _product(self, node: fx.Node, name: str, first: Degree, last: Degree) -> Degree | None:
        operands = [a for a in operands_of(node) if isinstance(a, fx.Node) and self.graph.varies(a)]
        alone = name in ops.FACTORS or is_inner(node, name) or (first.reduced and last.reduced)
        if len(operands) == 2 and not alone:
            return None
        return first.times(first if len(operands) == 2 and operands[0] is operands[1] else last) if len(operands) == 2 else first

    def _sum(self, node: fx.Node, name: str, operands: list[Degree]) -> Degree | None:
        """Sums, differences and choices of equal degrees; a constant may be added, or be a bound, where it is small."""
        first = operands[0]
        if any(dict(degree.powers) != dict(first.powers) for degree in operands):
            return None
        constants = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, int | float | fx.Node)]
        for value in constants:
            if isinstance(value, fx.Node) and self.graph.varies(value):
                continue
            number = self.graph.number(value)
            self.exact &= number is not None and abs(number) <= SMALL and all(power > 0 for power in first.powers.values())
        of = {n for degree in operands for n in degree.parities}
        alike = {n: {degree.parities.get(n, "even") for degree in operands} for n in of}
        parities: dict[fx.Node, Parity] = {n: "odd" if found == {"odd"} else None for n, found in alike.items()}
        return Degree(first.powers, parities, all(d.reduced for d in operands))


def is_inner(node: fx.Node, name: str) -> bool:
    """Whether a product of two tensors sums up the products of equal places, as the einsum "bi,bi->b" does."""
    equation = node.args[0] if node.args and isinstance(node.args[0], str) else ""
    terms, _, out = equation.replace(" ", "").partition("->")
    first, comma, second = terms.partition(",")
    return bool(comma) and first == second and set(out) < set(first) if equation else name.endswith(("vecdot", "dot"))
