"""Norms that a model writes out itself, as `x * (x.pow(2).mean(-1, True) + eps).rsqrt()`: recognised by their form.

Such a norm is a signal times or over a statistic of itself, which is made of its squares (or other powers of a norm) by a
reduction.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from .written_gates import CLOSERS, Graph

CASTS = frozenset("to float type_as contiguous clone view reshape expand expand_as unsqueeze squeeze flatten unflatten".split())


@dataclass(frozen=True)
class Statistic:
    """A norm: `constants` are the calls and the numbers of their arguments that are statistics, `inside` what makes these."""

    kind: str
    constants: tuple[tuple[fx.Node, int], ...]
    inside: tuple[fx.Node, ...]


# -- norms --------------------------------------------------------------------------------------------------------------

REDUCTIONS = frozenset("mean sum var std norm vector_norm linalg_vector_norm var_mean std_mean avg_pool2d avg_pool3d".split())


SECOND = frozenset("square var std norm vector_norm linalg_vector_norm var_mean std_mean".split())


BETWEEN = "pow ipow mul imul truediv itruediv div sqrt rsqrt add iadd sub isub clamp clamp_min maximum reciprocal getitem pad"


STATISTIC = REDUCTIONS | SECOND | CASTS | frozenset(BETWEEN.split()) | {"constant_pad_nd"}


def written_norm(graph: Graph, node: fx.Node) -> Statistic | None:
    """The norm that `node` closes, if it closes one."""
    name = graph.name(node)
    if node.op not in ("call_function", "call_method") or name not in CLOSERS - {"where", "masked_fill"} or len(node.args) < 2:
        return None
    first, second = node.args[:2]
    if not (isinstance(first, fx.Node) and isinstance(second, fx.Node) and graph.varies(first) and graph.varies(second)):
        return None
    for signal, operand, at in [(first, second, 1)] if "div" in name else [(first, second, 1), (second, first, 0)]:
        chain, mean = signal_of(graph, signal)
        made = statistic(graph, operand, chain)
        names = set() if made is None else named_by(graph, made)
        if not names & REDUCTIONS or not names & (SECOND | {"even"}):
            continue
        constants, inside = [(node, at)], list(made or ())
        if mean is not None:
            constants.append(mean[:2])
            inside += mean[2]
            kind = "layer_norm"
        elif names & {"avg_pool2d", "avg_pool3d"}:
            kind = "local_response_norm"
        else:
            kind = "rms_norm" if "mean" in names and not names & {"norm", "vector_norm", "linalg_vector_norm"} else "normalize"
        return Statistic(kind, tuple(constants), tuple(inside))
    return None


def carried(graph: Graph, node: fx.Node) -> fx.Node:
    """Back through casts, views and module boundaries."""
    while graph.inputs(node) and (graph.passes(node) or (graph.name(node) in CASTS and node.op != "call_module")):
        node = graph.inputs(node)[0]
    return node


def signal_of(graph: Graph, node: fx.Node) -> tuple[set[fx.Node], tuple[fx.Node, int, list[fx.Node]] | None]:
    """What a statistic may be one of: `node`, what it is a multiple of, and what it is after a mean was taken off, with the
    difference, the mean's place in it and the calls that make the mean."""
    at = carried(graph, node)
    chain = {at}
    while True:
        inputs = graph.inputs(at)
        name = graph.name(at) if at.op in ("call_function", "call_method") else ""
        if name in ("mul", "truediv", "div") and len(inputs) == 1 and at.args[:1] != at.args[1:2]:
            at = carried(graph, inputs[0])
            chain.add(at)
        elif name in ("sub", "isub") and len(inputs) == 2:
            base = carried(graph, inputs[0])
            made = statistic(graph, inputs[1], {base})
            if made is None or not named_by(graph, made) & {"mean", "sum", "var_mean", "std_mean"}:
                return chain, None
            return chain | {base}, (at, 1, made)
        else:
            return chain, None


def statistic(graph: Graph, node: fx.Node, of: set[fx.Node]) -> list[fx.Node] | None:
    """The calls by which `node` is made from `of` alone; None where it is not, or is one of them itself."""
    made: dict[fx.Node, None] = {}
    queue = [node]
    while queue:
        at = queue.pop()
        if at in made:
            continue
        if carried(graph, at) in of:
            if at is node:
                return None
            continue
        if not graph.passes(at) and (at.op not in ("call_function", "call_method") or graph.name(at) not in STATISTIC):
            return None
        made[at] = None
        queue.extend(graph.inputs(at))
    return list(made)


def named_by(graph: Graph, made: list[fx.Node]) -> set[str]:
    """The names of calls, with "even" where one of them is a square."""
    names = {graph.name(n) for n in made if n.op != "call_module"}
    for n in made:
        square = graph.name(n) in ("pow", "ipow") and n.args[1:2] == (2,)
        if square or (graph.name(n) == "mul" and n.args[:1] == n.args[1:2]):
            names.add("even")
    return names
