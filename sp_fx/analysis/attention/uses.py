"""Attention that a model writes out: a softmax whose weights reach values, and are summed up with them along the softmax's axis.

Where the weights of a softmax (`weights.py`) meet something else that varies they are attention, if the sum of the products runs
over the axis that the softmax is over: `w @ v`, `(w[..., None] * v).sum(1)`, `w[:, 0] * a + w[:, 1] * b`. Where it does not, as
in `x * s.softmax(1)`, they are a gate on each place. Names do not say which of the two it is; runs do (`Probe`): on weights that
are all at one place of the axis, and at another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..calls import argument, operands_of
from ..facts import Facts
from ..ops import CARRIES, CHOICES, ITSELF, MIXES, PASSED, POINTWISE, QUOTIENT, REDUCES
from ..written.softmax import SIZES, Axes, Softmax, axes_of
from . import by_index
from .probe import Probe, Shapes, Verdict, by_name
from .weights import Weights, inputs_of, softmax_of, weights_of, weights_of_any


@dataclass(frozen=True)
class Use:
    """What a graph uses a softmax for."""

    softmax: Softmax
    weights: Weights
    verdict: Verdict


def uses(facts: Facts, shapes: Shapes | None) -> dict[fx.Node, Use | str]:
    """Returns what each softmax is used for, by the node that closes it; or, of one whose arguments cannot be read, why."""
    found: dict[fx.Node, Use | str] = {}
    of_any = weights_of_any(facts), weights_of_any(facts, layers=True)
    for node in facts.graph.nodes:
        softmax = softmax_of(node, facts) if node in facts.varying else None
        if isinstance(softmax, Softmax):
            weights = weights_of(node, facts, of_any)
            answer = verdict(node, softmax, weights, facts, shapes)
            if answer == "attention":
                weights.products[:] = [p for p in weights.products if p not in weights.likenesses]
            found[node] = Use(softmax, weights, answer if weights.products else "elsewhere" if weights.likenesses else "alone")
        elif softmax is not None:
            found[node] = softmax
    return found


def verdict(node: fx.Node, softmax: Softmax, weights: Weights, facts: Facts, shapes: Shapes | None) -> Verdict:
    """Whether the products of the weights with values are summed up along the softmax's axis: "attention"; or along another one,
    or not at all: "elsewhere"; or whether the weights are summed up before they multiply anything: "alone".

    By the `shapes`; without them by those that are tried, where all of them agree, and else by the names of the products.
    """
    if not weights.products:
        return "alone"
    if softmax.late:
        return "attention"
    if softmax.grouped:
        return by_index.verdict(node, softmax, weights, facts, shapes)
    dims = softmax.dims
    if shapes is not None and isinstance(shapes.get(node), Tensor):
        try:
            matrices = all(facts.op(p) in MIXES and is_left_of(p, node, dims, facts, shapes) for p in weights.products)
            if matrices and not weights.alike:
                return "attention"
            return best(probes(node, dims, weights, facts, shapes))
        except Exception:  # values that have no shape, calls that do not run on numbers alone
            return by_name(weights, facts)
    tried = set()
    for shape in shapes_of(dims):
        with contextlib.suppress(Exception):
            tried.add(best(probes(node, dims, weights, facts, {node: torch.empty(shape)})))
    if len(tried) == 1:
        return tried.pop()
    facts.undecided.add(node)
    return by_name(weights, facts)


def shapes_of(dims: Axes) -> Iterator[list[int]]:
    """Shapes to try, of several ranks; also those in which the axis has size 2, since weights may be of two things, and of a
    softmax over several axes those in which one has size 1."""
    for rank in (2, 3, 4):
        yield list(SIZES[:rank])
        for dim in dims:
            if -rank <= dim < rank:
                yield [(2 if len(dims) == 1 else 1) if i == dim % rank else n for i, n in enumerate(SIZES[:rank])]


def probes(softmax: fx.Node, dims: Axes, weights: Weights, facts: Facts, shapes: Shapes) -> Iterator[Verdict]:
    """What runs say of the softmax, and of weights that are divided by their own sum along another axis."""
    probe = Probe(softmax, dims, weights, facts, shapes)
    yield probe.verdict()
    weights.likenesses.update(probe.likenesses)
    for node in weights.passing:
        for axis in divided_along(node, weights, facts):
            yield Probe(node, (axis,), weights, facts, {**shapes, node: shapes[softmax]}).verdict()


def best(verdicts: Iterable[Verdict]) -> Verdict:
    return min(verdicts, key=("attention", "elsewhere", "alone").index)


def is_left_of(product: fx.Node, softmax: fx.Node, dims: Axes, facts: Facts, shapes: Shapes) -> bool:
    """Whether a product is `w @ v`, of weights that are a softmax over the last axis and kept their axes since: without a run."""
    if not isinstance(node := product.args[0], fx.Node) or dims not in ((-1,), (shapes[softmax].dim() - 1,)):
        return False
    while node is not softmax:
        kept = facts.is_identity(node) or facts.op(node) in CHOICES | ITSELF | CARRIES & POINTWISE
        read = inputs_of(node, facts)
        if not kept or len(read) != 1:
            return False
        node = read[0]
    return True


def divided_along(node: fx.Node, weights: Weights, facts: Facts) -> list[int]:
    """Returns the axes along which weights are divided by their own sum, as in `w / w.sum(1, keepdim=True)`."""
    if facts.op(node) in PASSED:
        return [dim] if isinstance(dim := argument(node, "dim"), int) else []
    if facts.op(node) not in QUOTIENT or not isinstance(divisor := node.args[1], fx.Node):
        return []
    while facts.op(divisor) not in REDUCES and (read := inputs_of(divisor, facts)):
        divisor = read[0]
    own = facts.op(divisor) in REDUCES and set(inputs_of(divisor, facts)) <= weights.passing
    return list(axes_of(divisor)) if own else []


def mixing(product: fx.Node, weights: set[fx.Node], facts: Facts) -> tuple[fx.Node, fx.Node, dict[str, Any]] | None:
    """Returns the weights, the values and the arguments of the row `mix`, of a product that it covers: `weights @ values`,
    `values @ weights`, or an einsum of the two."""
    if facts.op(product) in MIXES and len(product.args) == 2:
        left, right = product.args
        if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
            return None
        return (left, right, {}) if left in weights else (right, left, {"form": "values @ weights"})
    if facts.op(product) == "einsum" and isinstance(product.args[0], str):
        given: Any = operands_of(product)
        equation = product.args[0].replace(" ", "")
        terms = equation.split("->")[0].split(",")
        if len(given) != 2 or len(terms) != 2 or "->" not in equation:
            return None
        swapped = given[0] not in weights
        (first, second), out = (terms[::-1] if swapped else terms), equation.split("->")[1]
        traced = any(len(set(letters)) < len(letters) for letters in (first.replace(".", ""), second.replace(".", "")))
        if set(second) <= set(first + out) and not traced:
            mixed_by, values = given[::-1] if swapped else given
            return mixed_by, values, {"form": equation, **({"swapped": True} if swapped else {})}
    return None
