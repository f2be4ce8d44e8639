"""Softmaxes that a model writes out itself, as `e / e.sum(-1, True)` of `e = (x - x.amax(-1, True)).exp()`: recognised by value.

The calls that lead from the scores to a quotient, a product or an exponential are run on random numbers, and what they give is
compared with `torch.softmax` of these.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..ops import CARRIES, CENTRES, EXPONENTIALS, FACTORS, POINTWISE, QUOTIENT, REDUCES, SHIFTS, SMOOTH
from .graph import Graph

LIMIT = 12  # calls
SIZES = (3, 4, 5, 6)
Axes = tuple[int, ...]


@dataclass(frozen=True)
class Softmax:
    """The softmax of `scores`, or of their negative, over the axes `dim`, which the calls `inside` compute, the last of which
    closes it.

    Where the exponentials of the scores are divided by their sum `later`, as in `e * mask / (e * mask).sum(-1, True)`, the last
    call is the exponential; `late` are the quotients of what these have weighed by their sum, as in `(e @ v) / e.sum(-1)`.
    Where it is `grouped`, it is over groups that whole numbers say, and over no axes: over the edges that end at one node.
    """

    scores: fx.Node
    dim: int | Axes
    inside: tuple[fx.Node, ...]
    late: tuple[fx.Node, ...] = ()
    sign: int = 1  # -1 of the negative
    later: bool = False
    grouped: bool = False
    kind: str = "softmax"

    @property
    def dims(self) -> Axes:
        """The axes, as a tuple."""
        return self.dim if isinstance(self.dim, tuple) else (self.dim,)


def written_softmax(graph: Graph, node: fx.Node, order: Mapping[fx.Node, int]) -> Softmax | None:
    """Returns the widest softmax whose last call is `node`, if there is one."""
    if graph.called(node) not in QUOTIENT | FACTORS | EXPONENTIALS:
        return None
    return widest(graph, node, order, lambda y: y, EXPONENTIALS)


def written_log_softmax(graph: Graph, node: fx.Node, order: Mapping[fx.Node, int]) -> Softmax | None:
    """Returns the widest softmax of whose values `node` is the logarithm, as `x - x.logsumexp(-1, True)` is, if there is one."""
    if graph.called(node) not in SHIFTS or len(graph.inputs(node)) != 2:
        return None
    return widest(graph, node, order, torch.exp, None)


def widest(
    graph: Graph,
    node: fx.Node,
    order: Mapping[fx.Node, int],
    back: Callable[[Tensor], Tensor],
    among: Collection[str] | None,
) -> Softmax | None:
    """Returns the widest softmax that `back` gives of what `node` is, by calls `among` which there are those."""
    found = None
    for scores, inside in regions(graph, node, order):
        names = {graph.called(n) for n in inside} - {""}
        if names <= POINTWISE or (among is not None and names.isdisjoint(among)):
            continue
        axes: set[int | Axes] = {dim for n in inside for dim in axes_of(n)}
        axes |= {dims for n in inside for dims in pairs_of(n)}
        for dim in sorted(axes, key=repr):
            signs = {sign_of(graph, scores, inside, dim, rank, back) for rank in (2, 3, 4)} - {None}
            if signs in ({1}, {-1}):
                found = Softmax(scores, dim, tuple(inside), sign=signs.pop())  # type: ignore[arg-type]
    return found


def sign_of(
    graph: Graph, scores: fx.Node, inside: Collection[fx.Node], dim: int | Axes, rank: int, back: Callable[[Tensor], Tensor]
) -> int | None:
    """Returns 1 where `back` gives of the calls the softmax over `dim` of scores of that `rank`, -1 where of their negative, and
    0 where neither; None where they do not run on such."""
    z = torch.randn(SIZES[:rank], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    try:
        y = back(graph.computed(inside, {scores: z.clone()}))
        expected = {sign: e / e.sum(dim, keepdim=True) for sign, e in ((1, z.exp()), (-1, (-z).exp()))}
    except Exception:  # of another rank
        return None
    if y.shape != z.shape:
        return 0
    return next((sign for sign, of in expected.items() if torch.allclose(y.double(), of, rtol=1e-5, atol=1e-7)), 0)


def axes_of(node: fx.Node) -> Iterator[int]:
    """The axes that a call names."""
    for value in named_in(node):
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, int) and not isinstance(item, bool) and -4 <= item < 4:
                yield item


def pairs_of(node: fx.Node) -> Iterator[Axes]:
    """The axes that a call names together: (1, 2) of `x.sum((1, 2))`."""
    for value in named_in(node):
        if isinstance(value, tuple | list) and len(value) > 1 and all(type(item) is int for item in value):
            yield tuple(value)


def named_in(node: fx.Node) -> list[Any]:
    """Returns the arguments of a call that may name axes."""
    return [*node.args[1:], *(node.kwargs.get(key) for key in ("dim", "axis"))]


def regions(graph: Graph, node: fx.Node, order: Mapping[fx.Node, int]) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """Pairs of a node that alone determines `node`, by pointwise calls and reductions, and these calls; nearest first."""
    inside: dict[fx.Node, None] = {node: None}
    while len(inside) <= LIMIT:
        edge = {n for at in inside for n in graph.inputs(at) if n not in inside}
        if not edge:
            return
        latest = max(edge, key=order.__getitem__)
        if len(edge) == 1:
            yield latest, sorted(inside, key=order.__getitem__)
        name = graph.called(latest)
        known = POINTWISE | REDUCES | CARRIES | SMOOTH | CENTRES
        if not (name in known or graph.passes(latest) or latest.target in (operator.getitem, getattr)):
            return
        inside[latest] = None
