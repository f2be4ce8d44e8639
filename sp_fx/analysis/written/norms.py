"""Norms that a model writes out itself, as `x * (x.pow(2).mean(-1, True) + eps).rsqrt()`: recognised by their algebra.

Such a norm is a signal over a statistic of that signal, or times the inverse of one: twice the signal has twice the statistic, so
that the result stays. `x * x.pow(2).mean()` has twice the signal and four times the statistic, and is none. The statistic is the
same for the negative of the signal, as that of squares or magnitudes is, so that `x / x.sum()` is none.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Literal

from torch import fx

from .. import ops
from ..calls import operands_of_einsum
from .graph import Graph

SMALL = 0.1  # what is added to a statistic, to keep it from 0, is at most that


LIMIT = 24  # calls; the longest statistic known, the difference of two means of squares, has 9
KNOWN = ops.PRODUCT | ops.QUOTIENT | ops.POWERS | ops.SHIFTS | ops.SCALES | ops.CHOICES | ops.BOUNDS | ops.DEGREES.keys()


@dataclass(frozen=True)
class Statistic:
    """A norm: `constants` are the arguments that are statistics, each as a call and its argument's index, and `statistics` these
    arguments; `inside` are the calls that make them.

    Of `(x - mean) / std` they are argument 1 of the difference and argument 1 of the quotient.
    """

    kind: str
    constants: tuple[tuple[fx.Node, int], ...]
    statistics: tuple[Any, ...]
    inside: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Degree:
    """How a value grows with the signals it is made of: `powers` of each, 2 for a variance; whether it is "even" or "odd" in them
    all together, None where neither; `reduced` says whether it has one number for all places along an axis of theirs, as a mean
    and whatever is made of means alone."""

    powers: Mapping[fx.Node, Fraction] = field(default_factory=dict)
    parity: Literal["even", "odd"] | None = "even"
    reduced: bool = True

    def times(self, other: Degree, sign: int = 1) -> Degree:
        keys = {**self.powers, **other.powers}
        powers = {n: self.powers.get(n, Fraction(0)) + sign * other.powers.get(n, Fraction(0)) for n in keys}
        parity: Literal["even", "odd"] | None = None
        if self.parity and other.parity:
            parity = "even" if self.parity == other.parity else "odd"
        return Degree({n: power for n, power in powers.items() if power}, parity, self.reduced and other.reduced)

    def to(self, exponent: Fraction) -> Degree:
        even = self.parity == "even" or (self.parity == "odd" and exponent % 2 == 0)
        parity: Literal["even", "odd"] | None = "even" if even else self.parity if exponent in (1, -1) else None
        return Degree({n: power * exponent for n, power in self.powers.items()}, parity, self.reduced)


@dataclass(frozen=True)
class Signal:
    """What a norm is of: the nodes that its statistic may be made from, the difference by which it was centred, if it was, and
    the calls that make the mean."""

    forms: set[fx.Node]
    centring: fx.Node | None = None
    mean: tuple[fx.Node, ...] = ()


def written_norm(graph: Graph, node: fx.Node) -> Statistic | None:
    """The norm whose last call is `node`, if there is one."""
    name = graph.called(node)
    if name in ops.DIFFERENCES:
        return folded_norm(graph, node)
    if name not in ops.FACTORS | ops.QUOTIENT or len(node.args) < 2:
        return None
    first, second = node.args[:2]
    if not (isinstance(first, fx.Node) and isinstance(second, fx.Node) and graph.varies(first) and graph.varies(second)):
        return None
    divides = name in ops.QUOTIENT
    for numerator, operand, index in [(first, second, 1)] if divides else [(first, second, 1), (second, first, 0)]:
        signal = signal_of(graph, numerator)
        made = Made(graph, signal.forms)
        degree = made.degree(operand)
        if degree is None or degree.parity != "even" or graph.carried(operand) in signal.forms:
            continue
        names = {statistic_name(graph, n) for n in made.calls}
        power = sum(degree.powers.values()) * (1 if divides else -1)
        window = bool(names & ops.WINDOWS)
        relative = power == 0 and bool(names & ops.NORMS) and bool(names & ops.QUOTIENT)  # |x| over the mean of |x| over channels
        if not degree.reduced or not (power > 0 if window else (power == 1 or relative) and made.exact):
            continue
        constants, inside = [(node, index)], tuple(made.calls)
        if signal.centring is not None:
            constants.append((signal.centring, 1))
            inside += signal.mean
            kind = "layer_norm"
        elif window:
            kind = "local_response_norm"
        else:
            kind = "rms_norm" if "mean" in names and not names & ops.NORMS else "normalize"
        return Statistic(kind, tuple(constants), tuple(call.args[at] for call, at in constants), inside)
    return None


def folded_norm(graph: Graph, node: fx.Node) -> Statistic | None:
    """The layer norm `h * r - h.mean(-1, True) * r`, with `r` the inverse of a deviation, whose last call is `node`."""
    if len(node.args) < 2 or not all(isinstance(a, fx.Node) and graph.varies(a) for a in node.args[:2]):
        return None
    scaled, shift = node.args[:2]
    norm = written_norm(graph, graph.carried(scaled))  # type: ignore[arg-type]
    if norm is None or len(norm.constants) != 1:
        return None
    call, at = norm.constants[0]
    made = Made(graph, signal_of(graph, call.args[1 - at]).forms)  # type: ignore[arg-type]
    degree = made.degree(shift)
    centred = {graph.called(n) for n in made.calls} & ops.CENTRES
    if degree is None or degree.parity != "odd" or degree.powers or not centred:
        return None
    constants = (*norm.constants, (node, 1))
    inside = tuple(dict.fromkeys((*norm.inside, *made.calls, call)))
    return Statistic("layer_norm", constants, tuple(c.args[i] for c, i in constants), inside)


def statistic_name(graph: Graph, node: fx.Node) -> str:
    """Returns the name of a call; "mean" of a pooling over all places."""
    name = graph.called(node)
    sizes = node.args[1] if len(node.args) > 1 else None
    return "mean" if name.startswith("adaptive") and set(sizes if isinstance(sizes, tuple | list) else [sizes]) == {1} else name


def signal_of(graph: Graph, node: fx.Node) -> Signal:
    """Returns what the statistic of the signal `node` may be made from, and how the signal was centred.

    The nodes are the signal, what it is a multiple of, and what it was before a mean was taken off. Of `2 * (x - x.mean())` they
    are the product, the difference and x.
    """
    at = graph.carried(node)
    forms = {at}
    while True:
        inputs = graph.inputs(at)
        name = graph.called(at)
        if name in ops.SCALES and len(inputs) == 1 and at.args[:1] != at.args[1:2]:
            at = graph.carried(inputs[0])
            forms.add(at)
        elif name in ops.DIFFERENCES and len(inputs) == 2:
            base = graph.carried(inputs[0])
            made = Made(graph, {base})
            degree = made.degree(inputs[1])
            mean = degree is not None and degree.parity == "odd" and list(degree.powers.values()) == [1]
            if not mean or not {graph.called(n) for n in made.calls} & ops.CENTRES:
                return Signal(forms)
            return Signal(forms | {base}, at, tuple(made.calls))
        else:
            return Signal(forms)


class Made:
    """How something is made of the nodes `forms` alone.

    Attributes:
        calls: the calls that it is made by.
        exact: whether nothing was added to it on the way but small numbers, which keep a statistic from 0.
    """

    def __init__(self, graph: Graph, forms: set[fx.Node]) -> None:
        self.graph, self.forms = graph, forms
        self.calls: dict[fx.Node, None] = {}
        self.exact = True
        self._known: dict[fx.Node, Degree | None] = {}

    def degree(self, node: object) -> Degree | None:
        """Returns the degree of `node`; None where it is made of something else, or grows otherwise than by a power."""
        if not isinstance(node, fx.Node) or not self.graph.varies(node):
            return Degree()
        base = self.graph.carried(node)
        if base in self.forms:
            while node is not base:  # views and casts of the signal
                self.calls[node] = None
                node = self.graph.inputs(node)[0]
            return Degree({self.signal: Fraction(1)}, "odd", reduced=False)
        if node not in self._known:
            self.calls[node] = None
            degree, name = self._degree(node), self.graph.called(node)
            if degree is not None and (name in ops.REDUCES | ops.WINDOWS or is_inner(node, name)):
                degree = replace(degree, reduced=True)
            self._known[node] = degree
        return self._known[node]

    @property
    def signal(self) -> fx.Node:
        """Stands for the forms, which are multiples of each other."""
        return next(iter(sorted(self.forms, key=lambda n: n.name)))

    def _degree(self, node: fx.Node) -> Degree | None:
        graph, name, inputs = self.graph, self.graph.called(node), self.graph.inputs(node)
        item = graph.passes(node) or name in ops.CARRIES or node.target in (operator.getitem, getattr)
        if not inputs or not (item or name in KNOWN) or len(self.calls) > LIMIT:
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
            return None if number is None else first.to(Fraction(number).limit_denominator(64))
        if name in ops.SHIFTS | ops.CHOICES | ops.BOUNDS:
            return self._sum(node, name, operands)  # type: ignore[arg-type]
        if name in ops.DEGREES:
            exponent = ops.DEGREES[name]
            raised = first.to(exponent)
            even = first.parity == "even" or (first.parity == "odd" and ops.PARITIES.get(name) == "even")
            reduced = name in ops.REDUCES and not even and name not in ops.CENTRES | ops.WINDOWS
            return replace(raised, parity="even" if even else None if reduced else raised.parity)
        return first if name in ops.SCALES and len(inputs) == 1 else None

    def _item(self, node: fx.Node, source: fx.Node, degree: Degree) -> Degree | None:
        """A view, or an item of what returns several: the variance or the mean of `var_mean`, the values of `max`."""
        name, index = self.graph.called(source), node.args[1] if len(node.args) > 1 else 0
        if name in ops.SEVERAL and name in ops.CENTRES:
            inner = self.degree(self.graph.inputs(source)[0])
            if inner is None or index == 1:
                return inner and replace(inner, reduced=True)
            return Degree(inner.to(Fraction(2 if name.startswith("var") else 1)).powers, "even")
        return degree

    def _product(self, node: fx.Node, name: str, first: Degree, last: Degree) -> Degree | None:
        given = operands_of_einsum(node) if name == "einsum" else node.args
        operands = [a for a in given if isinstance(a, fx.Node) and self.graph.varies(a)]
        if len(operands) == 2 and name not in ops.FACTORS and not is_inner(node, name):
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
        parity = first.parity if all(d.parity == first.parity for d in operands) else None
        return Degree(first.powers, parity, all(d.reduced for d in operands))


def is_inner(node: fx.Node, name: str) -> bool:
    """Whether a product of two tensors sums up the products of equal places, as the einsum "bi,bi->b" does."""
    equation = node.args[0] if node.args and isinstance(node.args[0], str) else ""
    terms, _, out = equation.replace(" ", "").partition("->")
    first, comma, second = terms.partition(",")
    return bool(comma) and first == second and set(out) < set(first) if equation else name.endswith(("vecdot", "dot"))
