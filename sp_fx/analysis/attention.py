"""Attention that a model writes out: a softmax whose weights reach values, and are summed up with them along the softmax's axis.

The weights of a softmax go on as weights through casts, views, masks, dropout, talking heads, a second normalisation, whatever is
made of weights and constants alone. Where they meet something else that varies they are attention, if the sum of the products
runs over the axis that the softmax is over: `w @ v`, `(w[..., None] * v).sum(1)`, `w[:, 0] * a + w[:, 1] * b`. Where it does not,
as in `x * s.softmax(1)`, they are a gate on each place. Names do not say which of the two it is; shapes do: the calls are run on
numbers, once with weights and once with some of them moved along that axis, and the sum of products with ones stays the same in
attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..capture.passed import operands
from .calls import operands_of_einsum
from .facts import Facts
from .ops import AFFINE, CARRIES, CHOICES, FACTORS, FORM, ITSELF, JOINS, MIXES, POINTWISE, PRODUCT, QUOTIENT, REDUCES
from .written.graph import made
from .written.softmax import axes_of

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
    passing, products, gated, mixed = {softmax}, list[fx.Node](), set[fx.Node](), set[fx.Node]()
    for node in facts.graph.nodes:
        read = inputs_of(node, facts)
        weighing, others = [n for n in read if n in passing], [n for n in read if n not in passing]
        name = facts.op(node) if node.op != "output" else ""
        if node is softmax or not (weighing or mixed.intersection(read)):
            continue
        if weighing and others and name in PRODUCT:
            products.append(node)
            mixed.add(node)
            if name in FACTORS:
                passing.add(node)
                gated.add(node)
        elif sum(isinstance(a, fx.Node) and a in passing for a in node.args) > 1 and name in PRODUCT:
            continue  # no multiple of the weights
        elif weighing and (not others or (name in QUOTIENT and node.args[0] in passing)):
            alike = facts.aliasing.is_view(node) or name in CARRIES | CHOICES
            if gated.intersection(weighing):
                gated.update([node] if alike else ())
                passing.update([node] if alike else ())
                mixed.update([node] if alike or is_linear(node, name, facts) else ())
            elif alike or name in PRODUCT | AFFINE | QUOTIENT | JOINS or isinstance(facts.leaf(node), AFFINE_LEAVES):
                passing.add(node)
        elif mixed.intersection(read) - matrix_products(products, facts) and is_linear(node, name, facts):
            mixed.add(node)
    return Weights(passing, gated, products, mixed)


def matrix_products(products: list[fx.Node], facts: Facts) -> set[fx.Node]:
    """Those of the products that sum up on their own, so that no later sum makes attention of them."""
    return {product for product in products if facts.op(product) in MIXES}


def inputs_of(node: fx.Node, facts: Facts) -> list[fx.Node]:
    """Returns the operands of `node` whose values a derivative goes through: neither masks nor what only lends its form."""
    read = [n for n in facts.varying_inputs(node) if n in facts.signals]
    return read[:1] if facts.op(node) in FORM else read


def is_linear(node: fx.Node, name: str, facts: Facts) -> bool:
    """Whether a call of a sum of products may be one of a larger sum."""
    return name in AFFINE | REDUCES | JOINS or facts.aliasing.is_view(node)


def sums_over(softmax: fx.Node, dim: int, weights: Weights, facts: Facts, shapes: Shapes | None) -> bool:
    """Whether the products of the weights with values are summed up along the softmax's axis, by the shapes; without them,
    whether they are summed up at all."""
    if shapes is None or not isinstance(shapes.get(softmax), Tensor):
        facts.undecided.add(softmax)
        return any(facts.op(p) not in FACTORS for p in weights.products) or any(
            facts.op(n) in REDUCES or len(weights.mixed.intersection(facts.varying_inputs(n))) > 1 for n in weights.mixed
        )
    if all(
        facts.op(p) in MIXES and is_left_of(p, softmax, dim, facts, shapes) for p in weights.products if p not in weights.gated
    ):
        if set(weights.products) - weights.gated:
            return True
    starts = [(softmax, dim), *((n, axis) for n in weights.passing for axis in divided_along(n, weights, facts))]
    try:
        return any(Probe(start, axis, weights, facts, shapes).sums() for start, axis in starts)
    except Exception:  # values that have no shape, calls that do not run on numbers alone
        return any(facts.op(p) not in FACTORS for p in weights.products)


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
    if facts.op(node) not in QUOTIENT or not isinstance(divisor := node.args[1], fx.Node):
        return []
    while facts.op(divisor) not in REDUCES and (read := inputs_of(divisor, facts)):
        divisor = read[0]
    own = facts.op(divisor) in REDUCES and set(inputs_of(divisor, facts)) <= weights.passing
    return list(axes_of(divisor)) if own else []


class Probe:
    """Runs the calls between a softmax and the sums of its weights with values, on weights and on weights moved along the axis.

    Values are 1, masks let everything through, what divides is 1 and what is added is 0: the sum over the axis then stays.
    """

    def __init__(self, softmax: fx.Node, dim: int, weights: Weights, facts: Facts, shapes: Shapes) -> None:
        self.weights, self.facts, self.shapes, self.dim, self.softmax = weights, facts, shapes, dim, softmax

    def sums(self) -> bool:
        """Whether one of the sums of products is the same for both."""
        generator = torch.Generator().manual_seed(0)
        shape = [int(n) for n in self.shapes[self.softmax].shape]
        if shape[self.dim] < 2:
            return any(self.facts.op(p) not in FACTORS for p in self.weights.products)
        one = torch.rand(shape, generator=generator, dtype=torch.float64)
        moved = torch.rand(shape, generator=generator, dtype=torch.float64)
        other = one + moved - moved.mean(self.dim, keepdim=True)
        values: dict[fx.Node, tuple[Any, ...]] = {self.softmax: (one, other)}
        for node in self.facts.graph.nodes:
            if node is self.softmax or not (node in self.weights.passing or node in self.weights.mixed):
                continue
            pair = tuple(self.value(node, {n: v[i] for n, v in values.items()}) for i in (0, 1))
            if any(v is None for v in pair):
                continue
            values[node] = pair
            one, other = pair
            sums = node in self.weights.mixed and isinstance(one, Tensor) and isinstance(other, Tensor)
            if sums and torch.allclose(one, other, rtol=1e-6, atol=1e-9):
                return True
        return False

    def value(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        facts, name = self.facts, self.facts.op(node)
        known = [n for n in operands(node, facts.is_identity) if n in values]
        if not known:
            return None
        if facts.is_identity(node) or name in CHOICES | FORM & POINTWISE:
            return values[known[0]]
        if name in QUOTIENT and node.args[0] in values:
            return values[node.args[0]]  # type: ignore[index]
        if (leaf := facts.leaf(node)) is not None:
            return self.by_leaf(leaf, values[known[0]])
        neutral = 1.0 if name in PRODUCT else 0.0

        def operand(n: fx.Node) -> Any:
            if n in values:
                return values[n]
            if facts.varies(n) and n in self.shapes and isinstance(self.shapes[n], Tensor):
                return torch.full([int(s) for s in self.shapes[n].shape], neutral, dtype=torch.float64)
            if n.op == "get_attr" and name in PRODUCT:  # a mask, say
                return torch.ones(facts.view.attribute(n).shape, dtype=torch.float64)
            if n.op == "get_attr":
                constant = facts.view.attribute(n)
                return constant.cpu().double() if isinstance(constant, Tensor) and constant.is_floating_point() else constant
            value = self.shapes.get(n, n)
            return torch.full([int(s) for s in value.shape], neutral, dtype=torch.float64) if isinstance(value, Tensor) else value

        return made(node, fx.map_arg((node.args, node.kwargs), operand))

    @staticmethod
    def by_leaf(leaf: nn.Module, value: Tensor) -> Tensor:
        if isinstance(leaf, nn.Identity | nn.modules.dropout._DropoutNd | nn.modules.batchnorm._NormBase):
            return value
        with torch.no_grad():
            weight: Any = next(leaf.parameters())
            return leaf(value.to(weight)).cpu().double()


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
