"""Norms that a model writes out itself, as `x * (x.pow(2).mean(-1, True) + eps).rsqrt()`: recognised by their form.

Such a norm is a signal times, or over, a statistic of that signal, which a reduction makes of its squares or other powers.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from . import ops
from .calls import name_of
from .written_gates import Graph


@dataclass(frozen=True)
class Statistic:
    """A norm: `constants` are the arguments that are statistics, each as a call and its argument's index; `inside` are the calls
    that make the statistics.

    Of `(x - mean) / std` they are argument 1 of the difference and argument 1 of the quotient.
    """

    kind: str
    constants: tuple[tuple[fx.Node, int], ...]
    inside: tuple[fx.Node, ...]


def written_norm(graph: Graph, node: fx.Node) -> Statistic | None:
    """The norm whose last call is `node`, if there is one."""
    name = name_of(node)
    if node.op not in ("call_function", "call_method") or name not in ops.CLOSERS - ops.CHOICES or len(node.args) < 2:
        return None
    first, second = node.args[:2]
    if not (isinstance(first, fx.Node) and isinstance(second, fx.Node) and graph.varies(first) and graph.varies(second)):
        return None
    for signal, operand, index in [(first, second, 1)] if name in ops.QUOTIENT else [(first, second, 1), (second, first, 0)]:
        forms, centring = signal_of(graph, signal)
        calls = statistic(graph, operand, forms)
        names = set() if calls is None else names_of(graph, calls)
        if not names & ops.REDUCES or not names & (ops.SQUARES | {"even"}):
            continue
        constants, inside = [(node, index)], list(calls or ())
        if centring is not None:
            difference, mean = centring
            constants.append((difference, 1))
            inside += mean
            kind = "layer_norm"
        elif names & ops.WINDOWS:
            kind = "local_response_norm"
        else:
            kind = "rms_norm" if "mean" in names and not names & ops.NORMS else "normalize"
        return Statistic(kind, tuple(constants), tuple(inside))
    return None


def carried(graph: Graph, node: fx.Node) -> fx.Node:
    """The node whose values `node` has, back through casts, views and module boundaries: x of `x.float().unsqueeze(1)`."""
    while graph.inputs(node) and (graph.passes(node) or (name_of(node) in ops.CARRIES and node.op != "call_module")):
        node = graph.inputs(node)[0]
    return node


def signal_of(graph: Graph, node: fx.Node) -> tuple[set[fx.Node], tuple[fx.Node, list[fx.Node]] | None]:
    """Returns the nodes that a statistic of the signal `node` may be made from, and how the signal was centred.

    The nodes are the signal, what it is a multiple of, and what it was before a mean was taken off. Of `2 * (x - x.mean())` they
    are the product, the difference and x. The second result is that difference and the calls that make its mean, or None.
    """
    at = carried(graph, node)
    forms = {at}
    while True:
        inputs = graph.inputs(at)
        name = name_of(at) if at.op in ("call_function", "call_method") else ""
        if name in ops.SCALES and len(inputs) == 1 and at.args[:1] != at.args[1:2]:
            at = carried(graph, inputs[0])
            forms.add(at)
        elif name in ops.DIFFERENCES and len(inputs) == 2:
            base = carried(graph, inputs[0])
            mean = statistic(graph, inputs[1], {base})
            if mean is None or not names_of(graph, mean) & ops.CENTRES:
                return forms, None
            return forms | {base}, (at, mean)
        else:
            return forms, None


def statistic(graph: Graph, node: fx.Node, forms: set[fx.Node]) -> list[fx.Node] | None:
    """The calls that make the statistic `node` of `forms` alone; None where other calls do, or where it is one of `forms`."""
    calls: dict[fx.Node, None] = {}
    queue = [node]
    while queue:
        at = queue.pop()
        if at in calls:
            continue
        if carried(graph, at) in forms:
            if at is node:
                return None
            continue
        if not graph.passes(at) and (at.op not in ("call_function", "call_method") or name_of(at) not in ops.STATISTIC):
            return None
        calls[at] = None
        queue.extend(graph.inputs(at))
    return list(calls)


def names_of(graph: Graph, calls: list[fx.Node]) -> set[str]:
    """The names of the calls, and "even" where one of them is a square: `x * x`, or `x.pow(2)`."""
    names = {name_of(n) for n in calls if n.op != "call_module"}
    for n in calls:
        square = name_of(n) in ops.POWERS and n.args[1:2] == (2,)
        if square or (name_of(n) == "mul" and n.args[:1] == n.args[1:2]):
            names.add("even")
    return names
