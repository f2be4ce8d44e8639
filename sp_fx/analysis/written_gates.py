"""Gates that a model writes out itself, as `x * torch.sigmoid(1.702 * x)`: recognised by what they compute.

In whatever order such a gate is written, the pointwise calls between one node and a product, quotient or choice are run on a grid
in float64 and compared with the gates of the table.
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
