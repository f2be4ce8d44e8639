"""Gates that a model writes out itself, as `x * torch.sigmoid(1.702 * x)`: recognised by what they compute.

The pointwise calls that lead from one node, the source, to another are run on numbers (`functions.points`), in whatever order
they are written, and the values compared with those of the gates in the table. The widest form is taken that is a gate: of
`x * relu6(x + 3) / 6` the whole, which is Hardswish, not the Hardsigmoid inside.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..calls import op_of
from ..ops import ACTIVATIONS, BOUNDS, CARRIES, JOINS, MULTIPLES, PIECEWISE, POINTWISE, REDUCES, SMOOTH
from ..readers import READERS
from .functions import Fit, gate_of, multiple_of, points, smooth_of
from .graph import Graph

LIMIT = 16  # calls; the longest form known, GELU by tanh, has 9


@dataclass(frozen=True)
class Written:
    """A function of `source` that the calls `inside` compute, the last of which closes it: `times` the gate `kind`, a row of the
    table, with its arguments, plus `through` times the source; or a smooth function of that name, which is no gate.

    `weights` names the model's weights that the arguments were read from: "rate" of `x * sigmoid(self.rate * x)`.
    """

    kind: str
    args: dict[str, Any]
    source: fx.Node
    inside: tuple[fx.Node, ...]
    weights: tuple[str, ...] = ()
    smooth: bool = False
    times: float = 1.0
    through: float = 0.0


def written_as(fit: Fit, graph: Graph, source: fx.Node, inside: Sequence[fx.Node], smooth: bool = False) -> Written:
    """Returns the function of `source` that fits what the calls `inside` compute."""
    weights = graph.weights_of(inside)
    return Written(fit.kind, fit.args, source, tuple(inside), weights, smooth, fit.times, fit.through)


def written_gates(graph: Graph, nodes: Collection[fx.Node], taken: Collection[fx.Node]) -> dict[fx.Node, Written]:
    """Returns the gates that are written out, by their last call, the widest of each; none of the nodes `taken` is in one."""
    order = {node: position for position, node in enumerate(nodes)}
    claimed, found = set(taken), dict[fx.Node, Written]()
    for node in reversed(order):
        if node not in claimed and (gate := written_gate(graph, node, order, claimed)) is not None:
            found[node] = gate
            claimed |= graph.private(gate.inside, node)
    return found


def written_gate(graph: Graph, node: fx.Node, order: Mapping[fx.Node, int], claimed: Collection[fx.Node]) -> Written | None:
    """Returns the widest gate whose last call is `node`, if there is one."""
    if not is_pointwise(graph, node) or graph.called(node) in CARRIES:
        return None
    widest = None
    for source, inside in subgraphs(graph, node, order):
        if any(n in claimed for n in inside):
            break
        calls = [name for n in inside if (name := graph.called(n)) and name not in CARRIES]
        names = set(calls)
        alone = len(calls) == 1 and sum(a is source for a in node.args) < 2  # which has a reader of its own, if it is a gate
        if alone or names <= MULTIPLES or source not in graph.signals or source in graph.complex:
            continue
        if is_chain(graph, inside) and not (names <= BOUNDS | ACTIVATIONS and len(calls) == 2):
            continue
        z = points(numbers_in(graph, inside))
        try:
            y = graph.computed(inside, {source: z.clone()})
        except Exception:  # a form that does not run on numbers is none of these gates
            continue
        if not (isinstance(y, Tensor) and y.shape == z.shape and y.is_floating_point()):
            continue
        if adds_nothing(graph, inside, z, y):
            continue
        gate = gate_of(z, y)
        if is_chain(graph, inside) and (gate is None or gate.kind != "hardtanh"):
            continue
        if gate is None and named(graph, inside) is None:
            gate = multiple_of(z, y)
        if gate is not None:
            widest = written_as(gate, graph, source, inside)
        elif (not names <= SMOOTH | MULTIPLES or names & PIECEWISE) and (smooth := smooth_of(z, y)) is not None:
            widest = written_as(smooth, graph, source, inside, smooth=True)
    return widest


def is_chain(graph: Graph, inside: Collection[fx.Node]) -> bool:
    """Whether the calls are gates by name, one on the other: each is rewritten on its own, as the method has it. Two bounds are
    one gate, though: `relu(x).clamp(max=6)` is ReLU6."""

    def is_gate(n: fx.Node) -> bool:
        inputs = graph.inputs(n)
        return op_of(n) in READERS and len(inputs) == 1 and sum(a is inputs[0] for a in n.args) == 1

    return all(is_gate(n) for n in inside if graph.called(n) not in {"", *CARRIES})


def adds_nothing(graph: Graph, inside: Collection[fx.Node], z: Tensor, y: Tensor) -> bool:
    """Whether all that the calls compute is one gate by name, and multiples that change nothing, as `relu(x) * 1`."""
    gate = named(graph, inside)
    return gate is not None and torch.equal(graph.computed([gate], {graph.inputs(gate)[0]: z.clone()}), y)


def named(graph: Graph, inside: Collection[fx.Node]) -> fx.Node | None:
    """Returns the gate by name of which the calls compute a multiple and what is affine beside it: the call `silu` of
    `2 * F.silu(x) + x`. None where they call something else, too."""
    others = [n for n in inside if graph.called(n) not in {"", *CARRIES, *MULTIPLES}]
    alone = len(others) == 1 and op_of(others[0]) in READERS and len(graph.inputs(others[0])) == 1
    return others[0] if alone else None


def is_pointwise(graph: Graph, node: fx.Node) -> bool:
    """Whether a call maps element by element; also a reduction of a stack along the axis that the stack has made, and a gated
    linear unit of two halves that are put together for it."""
    return graph.called(node) in POINTWISE or is_join(graph, node) or undoes_join(graph, node) or is_largest(graph, node)


def is_largest(graph: Graph, node: fx.Node) -> bool:
    """Whether a node takes the values alone of what reduces a stack: `torch.stack([a, b], -1).max(-1).values`."""
    if node.target not in (operator.getitem, getattr) or node.args[1] not in (0, "values"):
        return False
    return isinstance(node.args[0], fx.Node) and graph.called(node.args[0]) == "max" and undoes_join(graph, node.args[0])


def is_join(graph: Graph, node: fx.Node) -> bool:
    users = [user for user in node.users if not graph.passes(user)]
    return graph.called(node) in JOINS and bool(users) and all(undoes_join(graph, user) for user in users)


def undoes_join(graph: Graph, node: fx.Node) -> bool:
    joined = node.args[0] if node.args else None
    if not isinstance(joined, fx.Node) or graph.called(joined) not in JOINS:
        return False
    axis = axis_of(node)
    if (-1 if axis is None and graph.called(node) == "glu" else axis) != (axis_of(joined) or 0):
        return False
    if graph.called(joined) == "stack":
        return graph.called(node) in REDUCES and not node.kwargs.get("keepdim")
    return graph.called(node) == "glu" and len(joined.args[0]) == 2  # type: ignore[arg-type]


def axis_of(node: fx.Node) -> Any:
    axis = node.kwargs.get("dim", node.kwargs.get("axis", node.args[1] if len(node.args) > 1 else None))
    return axis[0] if isinstance(axis, tuple | list) and len(axis) == 1 else axis


def numbers_in(graph: Graph, inside: Collection[fx.Node]) -> list[float]:
    """Returns the numbers that the calls `inside` are written with, constants of the graph and weights among them, and what two
    of them make together: kinks lie there, as that of `relu(2 * x - 3)` at 1.5."""
    arguments = [a for n in inside for a in (*n.args, *n.kwargs.values())]
    numbers = {abs(n) for a in arguments if (n := graph.number(a)) is not None and n != 0}
    if len(numbers) > 8:
        return sorted(numbers)
    pairs = {n for a in numbers for b in numbers for n in (a / b, a * b, a + b, abs(a - b)) if n != 0}
    return sorted(numbers | pairs)


def subgraphs(graph: Graph, node: fx.Node, order: Mapping[fx.Node, int]) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """Pairs of a source, which alone determines `node` by pointwise calls, and these calls in the graph's order; nearest first.

    Of `x * sigmoid(1.702 * x)` the product has the source x, with the calls mul, sigmoid and mul. No more than `LIMIT` calls.
    """
    pointwise: dict[fx.Node, None] = {}
    edge: list[fx.Node] = []
    queue = [node]
    while queue:
        at = queue.pop()
        if at in pointwise or at in edge:
            continue
        if at is not node and not is_pointwise(graph, at) and not graph.passes(at):
            edge.append(at)
            continue
        pointwise[at] = None
        if len(pointwise) > LIMIT:
            edge.extend(graph.inputs(at))
        else:
            queue.extend(graph.inputs(at))
    for source in sorted((n for n in (*pointwise, *edge) if n is not node), key=order.__getitem__, reverse=True):
        inside: dict[fx.Node, None] = {}
        queue, closed = [node], True
        while queue and closed:
            at = queue.pop()
            if at is source or at in inside:
                continue
            closed = at in pointwise
            inside[at] = None
            queue.extend(graph.inputs(at))
        while len(readers := [n for n in inside if source in graph.inputs(n)]) == 1 and graph.passes(readers[0]):
            source = readers[0]  # what the hooks of that module have seen
            del inside[source]
        if closed and (len(inside) > 1 or sum(a is source for a in node.args) > 1):
            yield source, sorted(inside, key=order.__getitem__)
