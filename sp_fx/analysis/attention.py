"""Attention that a model writes out: a softmax whose weights reach values, and are summed up with them along the softmax's axis.

The weights of a softmax go on as weights through casts, views, masks, dropout, talking heads, a second normalisation, whatever is
made of weights and constants alone. Where they meet something else that varies they are attention, if the sum of the products
runs over the axis that the softmax is over: `w @ v`, `(w[..., None] * v).sum(1)`, `w[:, 0] * a + w[:, 1] * b`. Where it does not,
as in `x * s.softmax(1)`, they are a gate on each place. Names do not say which of the two it is; runs do (`Probe`): on weights
that are all at one place of the axis, and at another.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from ..capture.passed import operands
from ..containers import tensors_of
from ..gates.dual_path import frozen
from .calls import argument, op_of, operands_of_einsum
from .facts import Facts
from .ops import (
    AFFINE,
    AFFINE_LAYERS,
    CARRIES,
    CHOICES,
    FACTORS,
    FORM,
    ITSELF,
    JOINS,
    MIXES,
    PASSED,
    POINTWISE,
    PRODUCT,
    QUOTIENT,
    REDUCES,
    SHIFTS,
)
from .readers import SOFTMAX
from .written.graph import made
from .written.softmax import SIZES, Softmax, axes_of

AFFINE_LEAVES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Identity, nn.modules.dropout._DropoutNd,
                 nn.modules.batchnorm._NormBase)  # fmt: skip
Shapes = Mapping[fx.Node, Tensor]  # what nodes are, as fake tensors


@dataclass(frozen=True)
class Weights:
    """Where the weights of a softmax go.

    Attributes:
        passing: the nodes that they pass through; those in `gated` are weights times something else, place by place.
        products: their products with something else that varies.
        mixed: what is made of these products by sums.
    """

    passing: set[fx.Node]
    gated: set[fx.Node]
    products: list[fx.Node]
    mixed: set[fx.Node]


def weights_of(softmax: fx.Node, facts: Facts) -> Weights:
    """Returns where the weights go that the node `softmax` makes."""
    of_softmaxes = weights_of_any(facts)
    passing, products, gated, mixed = {softmax}, list[fx.Node](), set[fx.Node](), set[fx.Node]()
    for node in facts.graph.nodes:
        read = inputs_of(node, facts)
        weighing = [n for n in read if n in passing]
        others = [n for n in read if n not in passing and not (n in of_softmaxes and facts.op(node) in SHIFTS)]
        name = facts.op(node) if node.op != "output" else ""
        if node is softmax or not (weighing or mixed.intersection(read)):
            continue
        if weighing and others and name in FACTORS and of_softmaxes.issuperset(others):
            continue  # how alike two softmaxes are: neither has the values that the other weighs
        if weighing and others and name in PRODUCT | AFFINE_LAYERS:
            products.append(node)
            mixed.add(node)
            if name in FACTORS:
                passing.add(node)
                gated.add(node)
        elif sum(isinstance(a, fx.Node) and a in passing for a in node.args) > 1 and name in PRODUCT | AFFINE_LAYERS:
            continue  # no multiple of the weights
        elif weighing and (not others or (name in QUOTIENT and node.args[0] in passing)):
            alike = facts.aliasing.is_view(node) or name in CARRIES | CHOICES
            if gated.intersection(weighing):
                gated.update([node] if alike else ())
                passing.update([node] if alike else ())
                mixed.update([node] if alike or is_linear(node, name, facts) else ())
            elif alike or name in PRODUCT | AFFINE | QUOTIENT | JOINS | PASSED or isinstance(facts.leaf(node), AFFINE_LEAVES):
                passing.add(node)
        elif mixed.intersection(read) - matrix_products(products, facts) and is_linear(node, name, facts):
            mixed.add(node)
    return Weights(passing, gated, products, mixed)


def weights_of_any(facts: Facts) -> set[fx.Node]:
    """Returns the softmaxes of a graph, and what is made of one and of constants: the difference of two is weights, too."""
    found: set[fx.Node] = set()
    for node in facts.graph.nodes:
        read = inputs_of(node, facts) if node.op != "output" else []
        linear = facts.op(node) in AFFINE | PRODUCT or facts.aliasing.is_view(node) if node.op.startswith("call") else False
        linear = linear or node.target is frozen  # by an edit
        if is_softmax(node, facts) or (linear and read and all(n in found for n in read)):
            found.add(node)
    return found


def is_softmax(node: fx.Node, facts: Facts) -> bool:
    return op_of(node) in SOFTMAX or isinstance(facts.patterns.get(node), Softmax)


def matrix_products(products: list[fx.Node], facts: Facts) -> set[fx.Node]:
    """Those of the products that sum up on their own, so that no later sum makes attention of them."""
    return {product for product in products if facts.op(product) in MIXES}


def inputs_of(node: fx.Node, facts: Facts) -> list[fx.Node]:
    """Returns the operands of `node` whose values a derivative goes through: neither masks nor what only lends its form."""
    read = facts.signal_inputs(node)
    return read[:1] if facts.op(node) in FORM else read


def is_linear(node: fx.Node, name: str, facts: Facts) -> bool:
    """Whether a call of a sum of products may be one of a larger sum."""
    return name in (AFFINE | REDUCES | JOINS) - AFFINE_LAYERS or facts.aliasing.is_view(node)


Verdict = Literal["attention", "elsewhere", "alone"]


def verdict(softmax: fx.Node, dim: int, weights: Weights, facts: Facts, shapes: Shapes | None) -> Verdict:
    """Whether the products of the weights with values are summed up along the softmax's axis: "attention"; or along another one,
    or not at all: "elsewhere"; or whether the weights are summed up before they multiply anything: "alone".

    By the `shapes`; without them by those that are tried, where all of them agree, and else by the names of the products.
    """
    if not weights.products:
        return "alone"
    if shapes is not None and isinstance(shapes.get(softmax), Tensor):
        try:
            if all(facts.op(p) in MIXES and is_left_of(p, softmax, dim, facts, shapes) for p in weights.products):
                return "attention"
            return best(probes(softmax, dim, weights, facts, shapes))
        except Exception:  # values that have no shape, calls that do not run on numbers alone
            return by_name(weights, facts)
    tried = set()
    for rank in (2, 3, 4):
        sizes = {softmax: torch.empty(SIZES[:rank])}
        with contextlib.suppress(Exception):
            tried.add(best(probes(softmax, dim, weights, facts, sizes)))
    if len(tried) == 1:
        return tried.pop()
    facts.undecided.add(softmax)
    return by_name(weights, facts)


def by_name(weights: Weights, facts: Facts) -> Verdict:
    """What names say: products of matrices are attention, and those place by place where sums or several terms follow."""
    summed = any(facts.op(p) not in FACTORS for p in weights.products) or any(
        facts.op(n) in REDUCES or len(weights.mixed.intersection(facts.varying_inputs(n))) > 1 for n in weights.mixed
    )
    return "attention" if summed else "elsewhere"


def probes(softmax: fx.Node, dim: int, weights: Weights, facts: Facts, shapes: Shapes) -> Iterator[Verdict]:
    """What runs say of the softmax, and of weights that are divided by their own sum along another axis."""
    yield Probe(softmax, dim, weights, facts, shapes).verdict()
    for node in weights.passing:
        for axis in divided_along(node, weights, facts):
            yield Probe(node, axis, weights, facts, {**shapes, node: shapes[softmax]}).verdict()


def best(verdicts: Iterable[Verdict]) -> Verdict:
    return min(verdicts, key=("attention", "elsewhere", "alone").index)


def is_left_of(product: fx.Node, softmax: fx.Node, dim: int, facts: Facts, shapes: Shapes) -> bool:
    """Whether a product is `w @ v`, of weights that are a softmax over the last axis and kept their axes since: without a run."""
    if not isinstance(node := product.args[0], fx.Node) or dim not in (-1, shapes[softmax].dim() - 1):
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


class Probe:
    """Runs the calls between a softmax and the sums of its weights with values on weights that are all at one place of the axis,
    at several places in turn.

    While the axis is there, what they give at one place is 0 where it is not at another. Where they overlap, the axis is summed
    up. Values are 1, masks let everything through, what divides is 1, what is added is 0, and a matrix of weights that keeps the
    shape is the identity.
    """

    def __init__(self, softmax: fx.Node, dim: int, weights: Weights, facts: Facts, shapes: Shapes) -> None:
        self.weights, self.facts, self.shapes, self.dim, self.softmax = weights, facts, shapes, dim, softmax

    def verdict(self) -> Verdict:
        shape = [int(n) for n in self.shapes[self.softmax].shape]
        length = shape[self.dim]
        if length < 2:
            return by_name(self.weights, self.facts)
        values: dict[fx.Node, tuple[Any, ...]] = {self.softmax: tuple(self.placed(shape, i) for i in places(length))}
        there: Verdict = "alone"
        for node in self.facts.graph.nodes:
            if node is self.softmax or not (node in self.weights.passing or node in self.weights.mixed):
                continue
            results = tuple(self.value(node, {n: v[i] for n, v in values.items()}) for i in range(len(places(length))))
            if any(result is None for result in results):
                continue
            values[node] = results
            if node in self.weights.products and any(is_alive(values[n]) for n in node.all_input_nodes if n in values):
                there = "elsewhere"
            if node in self.weights.mixed and there == "elsewhere" and not is_alive(results):
                return "attention"
        return there

    def placed(self, shape: list[int], place: int) -> Tensor:
        """Weights of 1 at one place of the axis, and 0 elsewhere."""
        at = torch.zeros(shape, dtype=torch.float32)
        at.select(self.dim, place).fill_(1)
        return at

    def value(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        facts, name = self.facts, self.facts.op(node)
        known = [n for n in operands(node, facts.is_identity) if n in values]
        if not known:
            return None
        first = values[known[0]]
        if facts.is_identity(node) or name in PASSED | CHOICES | FORM & POINTWISE or same_leaf(facts.leaf(node)):
            return first
        if name in SHIFTS and len(known) == 1:
            return first + sum(self.operand(n, node, first, values) for n in node.all_input_nodes if n not in values)
        if name in QUOTIENT and node.args[0] in values:
            return values[node.args[0]]  # type: ignore[index]
        if (leaf := facts.leaf(node)) is not None:
            with torch.no_grad():
                given = first.to(next(leaf.parameters()))
                result = (leaf(given) - leaf(torch.zeros_like(given))).cpu().float()
        else:
            result = made(node, fx.map_arg((node.args, node.kwargs), lambda n: self.operand(n, node, first, values)))
        constant = len(known) == 1 and not any(facts.varies(n) for n in node.all_input_nodes if n is not known[0])
        by_weights = leaf is not None or name in PRODUCT | AFFINE_LAYERS
        return first if constant and by_weights and isinstance(result, Tensor) and result.shape == first.shape else result

    def operand(self, n: fx.Node, node: fx.Node, first: Any, values: Mapping[fx.Node, Any]) -> Any:
        """Returns what stands for an operand of the call `node`, beside weights that are like `first`."""
        name = self.facts.op(node)
        if n in values:
            return values[n]
        neutral = 1.0 if name in PRODUCT | AFFINE_LAYERS else 0.0
        like = self.shapes.get(n)
        if isinstance(like, Tensor) and n.op == "get_attr" and not (like.is_floating_point() or name in PRODUCT):
            return like.cpu()  # an index
        if isinstance(like, Tensor):
            return torch.full([int(size) for size in like.shape], neutral)
        if n in self.shapes:
            return like
        if name in FACTORS | SHIFTS:
            return neutral
        if name in MIXES and isinstance(first, Tensor):
            left = node.args[0] in values
            return torch.ones(*first.shape[:-2], *((first.shape[-1], 3) if left else (3, first.shape[-2])))
        if name == "einsum":
            return self.fitting(n, node, first)
        raise ValueError("known by shapes alone")

    def fitting(self, n: fx.Node, node: fx.Node, first: Tensor) -> Tensor:
        """Returns ones that an einsum takes for its operand `n`."""
        terms = str(node.args[0]).replace(" ", "").split("->")[0].split(",")
        of = dict(zip(operands_of_einsum(node), terms, strict=True))
        (weights,) = (term for operand, term in of.items() if operand is not n)
        sizes = dict(zip(weights, first.shape, strict=True))
        return torch.ones([sizes.get(letter, 3) for letter in of[n]])


def places(length: int) -> list[int]:
    return sorted({0, 1, length // 2, length - 1})


def is_alive(results: tuple[Any, ...]) -> bool:
    """Whether what two places of an axis give is nowhere at once, so that the axis is there still. Places of which nothing is
    left, since weights were selected, say nothing."""
    parts = [ts for ts in map(tensors_of, results) if any(bool(t.any()) for t in ts)]
    pairs = list(itertools.combinations(parts, 2))
    return not pairs or any(not any(bool((a * b).any()) for a, b in zip(one, other)) for one, other in pairs)


def same_leaf(leaf: nn.Module | None) -> bool:
    return isinstance(leaf, nn.Identity | nn.modules.dropout._DropoutNd | nn.modules.batchnorm._NormBase)


def mixing(product: fx.Node, weights: set[fx.Node], facts: Facts) -> tuple[fx.Node, fx.Node, dict[str, Any]] | None:
    """Returns the weights, the values and the arguments of the row `mix`, of a product that it covers: `weights @ values`,
    `values @ weights`, or an einsum of the two."""
    if facts.op(product) in MIXES and len(product.args) == 2:
        left, right = product.args
        if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
            return None
        return (left, right, {}) if left in weights else (right, left, {"form": "values @ weights"})
    if facts.op(product) == "einsum" and isinstance(product.args[0], str):
        given: Any = operands_of_einsum(product)
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
