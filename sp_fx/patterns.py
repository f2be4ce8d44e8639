"""Gates and norms that a model writes out itself: `x * torch.sigmoid(1.702 * x)`, `x * (x.pow(2).mean(-1, True) + eps).rsqrt()`.

A gate is recognised by what it computes, in whatever order it is written: the pointwise calls between one node and a product,
quotient or choice are run on a grid in float64 and compared with the gates of the table. A norm is recognised by its form: a
signal times or over a statistic of itself, which is made of its squares (or other powers of a norm) by a reduction.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

POINTWISE = frozenset(
    """add iadd sub isub rsub subtract mul imul multiply truediv itruediv div divide true_divide neg negative reciprocal pow
    square sqrt rsqrt sigmoid tanh erf exp expm1 log1p softplus relu relu6 hardtanh clamp clip clamp_min clamp_max hardsigmoid gt
    ge lt le where masked_fill abs sign to float type_as contiguous clone""".split()
)
CLOSERS = frozenset("mul imul multiply truediv itruediv div divide where masked_fill".split())
CASTS = frozenset("to float type_as contiguous clone view reshape expand expand_as unsqueeze squeeze flatten unflatten".split())
LIMIT = 16  # calls; the longest form known, GELU by tanh, has 9


@dataclass(frozen=True)
class Written:
    """A gate of `source`, by the calls `inside`: what the rules call it, its row of the table and the row's arguments, and the
    weights that these were read from."""

    kind: str
    args: dict[str, Any]
    source: fx.Node
    inside: tuple[fx.Node, ...]
    weights: tuple[str, ...] = ()


@dataclass(frozen=True)
class Statistic:
    """A norm: `constants` are the calls and the numbers of their arguments that are statistics, `inside` what makes these."""

    kind: str
    constants: tuple[tuple[fx.Node, int], ...]
    inside: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Graph:
    """What the two readers ask of the graph: the plain name of a call, and whether the input's values reach a node."""

    name: Callable[[fx.Node], str]
    varies: Callable[[fx.Node], bool]
    passes: Callable[[fx.Node], bool]
    modules: torch.nn.Module

    def inputs(self, node: fx.Node) -> list[fx.Node]:
        return [n for n in node.all_input_nodes if self.varies(n)]


# -- gates --------------------------------------------------------------------------------------------------------------


def written_gate(graph: Graph, node: fx.Node) -> Written | None:
    """The gate that `node` closes, if it closes one."""
    if node.op not in ("call_function", "call_method") or graph.name(node) not in CLOSERS:
        return None
    for source, inside in cones(graph, node):
        if sum(source in n.all_input_nodes for n in inside) < 2 and not repeated(node, source):
            continue
        z = torch.cat([torch.linspace(-8, 8, 33, dtype=torch.float64), far_points(graph, inside)])
        try:
            y = computed(graph, source, inside, z)
        except Exception:  # a form that does not run on the grid is none of these gates
            continue
        found = named(z, y) if isinstance(y, Tensor) and y.shape == z.shape else None
        if found is not None:
            return Written(*found, source, tuple(inside), read_by(graph, inside))
    return None


def far_points(graph: Graph, inside: list[fx.Node]) -> Tensor:
    """Where a form may have other pieces: far out, and beside each number that it has, written or read."""
    numbers = {abs(float(a)) for n in inside for a in (*n.args, *n.kwargs.values()) if isinstance(a, int | float)}
    value = evaluator(graph, {})
    for constant in {a for n in inside for a in n.all_input_nodes if not graph.varies(a)}:
        with contextlib.suppress(Exception):  # what is no number
            numbers.add(abs(float(value(constant))))
    beside = [factor * number for number in sorted(numbers) if 0 < number < 200 for factor in (0.9, 1.1, 1.5)]  # no exp overflows
    return torch.tensor([sign * at for at in (20.0, 100.0, *beside) for sign in (-1, 1)], dtype=torch.float64)


def read_by(graph: Graph, inside: list[fx.Node]) -> tuple[str, ...]:
    """The names of the weights that a form is computed with."""
    found: dict[str, None] = {}
    queue = [a for n in inside for a in n.all_input_nodes if a not in inside]
    while queue:
        at = queue.pop()
        if at.op == "get_attr":
            found[str(at.target)] = None
        elif not graph.varies(at):
            queue += at.all_input_nodes
    return tuple(found)


def repeated(node: fx.Node, source: fx.Node) -> bool:
    return sum(a is source for a in node.args) > 1


def cones(graph: Graph, node: fx.Node) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """Nodes that alone determine `node` by pointwise calls, the nearest first, and these calls in order."""
    pointwise: dict[fx.Node, None] = {}
    edge: list[fx.Node] = []
    queue = [node]
    while queue:
        at = queue.pop()
        if at in pointwise or at in edge:
            continue
        call = at.op in ("call_function", "call_method") and graph.name(at) in POINTWISE
        if at is not node and not call and not graph.passes(at):
            edge.append(at)
            continue
        pointwise[at] = None
        if len(pointwise) > LIMIT:
            edge.extend(graph.inputs(at))
        else:
            queue.extend(graph.inputs(at))
    order = {n: i for i, n in enumerate(node.graph.nodes) if n in pointwise or n in edge}
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
        if closed and len(inside) > 1:
            yield source, sorted(inside, key=order.__getitem__)


def computed(graph: Graph, source: fx.Node, inside: list[fx.Node], z: Tensor) -> Any:
    """The value of the last of `inside` where `source` is `z`."""
    value = evaluator(graph, {source: z.clone()})
    with torch.no_grad():
        for n in inside:
            last = value(n)
    return last


def evaluator(graph: Graph, env: dict[fx.Node, Any]) -> Callable[[fx.Node], Any]:
    """What gives the value of a node where those of `env` are known; weights are to be one number."""

    def value(n: fx.Node) -> Any:
        if n not in env:
            env[n] = run(n)
        return env[n]

    def run(n: fx.Node) -> Any:
        if n.op == "get_attr":
            held = operator.attrgetter(str(n.target))(graph.modules).detach()
            if held.numel() != 1:
                raise ValueError("not one number")
            return held.double()
        if n.op == "call_module":
            return value(n.all_input_nodes[0])
        if n.op == "placeholder":
            raise ValueError("an input")
        args, kwargs = fx.map_arg((n.args, n.kwargs), value)
        if n.op == "call_method":
            return getattr(args[0], str(n.target))(*args[1:], **kwargs)
        return n.target(*args, **kwargs)  # type: ignore[operator]

    return value


def named(z: Tensor, y: Tensor) -> tuple[str, dict[str, Any]] | None:
    """The gate whose values on `z` are `y`."""
    at_one, at_minus = (float(y[z == at][0]) for at in (1.0, -1.0))
    rate = math.log(at_one / (1 - at_one)) if 0 < at_one < 1 else 1.0
    slope = -at_minus
    alpha = at_minus / math.expm1(-1)
    negative = z.clamp_max(0).expm1()
    forms: list[tuple[str, dict[str, Any], Tensor]] = [
        ("relu", {}, z.relu()),
        ("gelu", {"approximate": "none"}, F.gelu(z)),
        ("gelu", {"approximate": "tanh"}, F.gelu(z, approximate="tanh")),
        ("hardswish", {}, F.hardswish(z)),
        ("mish", {}, F.mish(z)),
        ("silu", {}, F.silu(z)),
        ("quick_gelu", {"rate": rate}, z * torch.sigmoid(rate * z)),
        ("leaky_relu", {"negative_slope": slope}, torch.where(z > 0, z, slope * z)),
        ("elu", {"alpha": alpha, "output_scale": 1.0, "input_scale": 1.0}, torch.where(z > 0, z, alpha * negative)),
    ]
    for kind, args, expected in forms:
        # 1e-5: constants are written with eight digits or so, and casts to float32 may be inside; the two GELUs differ by 5e-4.
        if torch.allclose(y.double(), expected, rtol=1e-5, atol=1e-5) and not (kind == "leaky_relu" and abs(slope - 1) < 1e-6):
            if kind == "quick_gelu" and abs(rate - 1.702) > 1e-3:
                return "silu", args  # Swish of another rate
            return kind, args
    return None


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
