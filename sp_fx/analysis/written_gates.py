"""Gates that a model writes out itself, as `x * torch.sigmoid(1.702 * x)`: recognised by what they compute.

The pointwise calls that lead from one node to a product, quotient or choice are run on a grid in float64, in whatever order they
are written, and the values compared with those of the gates in the table.
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

from ..capture.passed import operands
from .calls import name_of
from .ops import CLOSERS, POINTWISE

LIMIT = 16  # calls; the longest form known, GELU by tanh, has 9


@dataclass(frozen=True)
class Written:
    """A gate of `source` that the calls `inside` compute: its row of the table, `kind`, and the row's arguments.

    `weights` names the model's weights that the arguments were read from: "rate" of `x * sigmoid(self.rate * x)`.
    """

    kind: str
    args: dict[str, Any]
    source: fx.Node
    inside: tuple[fx.Node, ...]
    weights: tuple[str, ...] = ()


@dataclass(frozen=True)
class Graph:
    """What the readers of written gates and norms ask of a graph: whether a node varies with the input of the model, whether it
    is a module that gives what it gets."""

    varies: Callable[[fx.Node], bool]
    passes: Callable[[fx.Node], bool]
    modules: torch.nn.Module

    def inputs(self, node: fx.Node) -> list[fx.Node]:
        return [n for n in operands(node, self.passes) if self.varies(n)]


def written_gate(graph: Graph, node: fx.Node) -> Written | None:
    """The gate whose last call is `node`, if there is one."""
    if node.op not in ("call_function", "call_method") or name_of(node) not in CLOSERS:
        return None
    for source, inside in subgraphs(graph, node):
        if sum(source in n.all_input_nodes for n in inside) < 2 and not squared(node, source):
            continue
        z = torch.cat([torch.linspace(-8, 8, 33, dtype=torch.float64), far_points(graph, inside)])
        try:
            y = computed(graph, source, inside, z)
        except Exception:  # a form that does not run on the grid is none of these gates
            continue
        gate = matching_gate(z, y) if isinstance(y, Tensor) and y.shape == z.shape else None
        if gate is not None:
            return Written(*gate, source, tuple(inside), weights_of(graph, inside))
    return None


def far_points(graph: Graph, inside: list[fx.Node]) -> Tensor:
    """Points where a form may leave the gate that it is near 0: far out, and beside each number in it, be that a constant of the
    graph or a weight. `x.clamp(0, 6)` is a ReLU up to 6."""
    numbers = {abs(float(a)) for n in inside for a in (*n.args, *n.kwargs.values()) if isinstance(a, int | float)}
    value = evaluator(graph, {})
    for constant in {a for n in inside for a in n.all_input_nodes if not graph.varies(a)}:
        with contextlib.suppress(Exception):  # what is no number
            numbers.add(abs(float(value(constant))))
    beside = [factor * number for number in sorted(numbers) if 0 < number < 200 for factor in (0.9, 1.1, 1.5)]  # no exp overflows
    return torch.tensor([sign * point for point in (20.0, 100.0, *beside) for sign in (-1, 1)], dtype=torch.float64)


def weights_of(graph: Graph, inside: list[fx.Node]) -> tuple[str, ...]:
    """The names of the weights that the calls `inside` are computed with."""
    names: dict[str, None] = {}
    queue = [a for n in inside for a in n.all_input_nodes if a not in inside]
    while queue:
        at = queue.pop()
        if at.op == "get_attr":
            names[str(at.target)] = None
        elif not graph.varies(at):
            queue += at.all_input_nodes
    return tuple(names)


def squared(node: fx.Node, source: fx.Node) -> bool:
    """Whether `node` has `source` for two operands, as `x * x` has."""
    return sum(a is source for a in node.args) > 1


def subgraphs(graph: Graph, node: fx.Node) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
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
        call = at.op in ("call_function", "call_method") and name_of(at) in POINTWISE
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
    """A function that gives the value of a node, where `env` has those of the nodes that it is computed from. Weights must be one
    number; the function raises a ValueError for others, and for the model's inputs."""

    def value(n: fx.Node) -> Any:
        if n not in env:
            env[n] = run(n)
        return env[n]

    def run(n: fx.Node) -> Any:
        if n.op == "get_attr":
            weight = operator.attrgetter(str(n.target))(graph.modules).detach()
            if weight.numel() != 1:
                raise ValueError("not one number")
            return weight.double()
        if n.op == "call_module":
            return value(n.all_input_nodes[0])
        if n.op == "placeholder":
            raise ValueError("an input")
        args, kwargs = fx.map_arg((n.args, n.kwargs), value)
        if n.op == "call_method":
            return getattr(args[0], str(n.target))(*args[1:], **kwargs)
        return n.target(*args, **kwargs)  # type: ignore[operator]

    return value


def matching_gate(z: Tensor, y: Tensor) -> tuple[str, dict[str, Any]] | None:
    """The row, and its arguments, of the gate whose values at the points `z` are `y`; None where no gate has them."""
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
