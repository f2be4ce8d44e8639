"""Runs that tell whether the weights of a softmax weigh values: on weights all at one place of its axis, and at another."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from ...capture.passed import operands
from ...containers import tensors_of
from ..calls import argument, operands_of_einsum
from ..facts import Facts
from ..ops import AFFINE_LAYERS, CHOICES, FACTORS, FORM, LOGARITHMS, MIXES, PASSED, POINTWISE, PRODUCT, QUOTIENT, REDUCES, SHIFTS
from ..written.graph import made
from ..written.softmax import Axes, Softmax
from .weights import Weights, inputs_of, softmax_of, weights_of

Shapes = Mapping[fx.Node, Tensor]  # what nodes are, as fake tensors
Results = tuple[Any, ...]  # what a call gives, for weights at one place and at others
Verdict = Literal["attention", "elsewhere", "alone"]


class Probe:
    """Runs the calls between a softmax and the sums of its weights with values on weights that are all at one place of the axis,
    at several places in turn.

    While the axis is there, what they give at one place is 0 where it is not at another. Where they overlap, the axis is summed
    up. Values are 1, masks let everything through, what divides is 1, what is added is 0, and a matrix of weights that keeps the
    shape is the identity.
    """

    def __init__(self, softmax: fx.Node, dims: Axes, weights: Weights, facts: Facts, shapes: Shapes) -> None:
        self.weights, self.facts, self.shapes, self.dims, self.softmax = weights, facts, shapes, dims, softmax
        self.likenesses: set[fx.Node] = set()  # products that say how alike softmaxes are

    def verdict(self) -> Verdict:
        if self.length < 2:
            return by_name(self.weights, self.facts)
        there: Verdict = "alone"
        for node, before, results in self.run():
            if not any(map(is_alive, before)):
                continue
            if node in self.weights.products and there == "alone":
                there = "elsewhere"
            if node in self.weights.mixed and there != "alone" and not is_alive(results):
                likenesses = self.likenesses_at(node)
                self.likenesses |= likenesses
                there = there if likenesses else "attention"
        return there

    @property
    def length(self) -> int:
        """The size of the axis, or of several as one."""
        return math.prod(int(self.shapes[self.softmax].shape[dim]) for dim in self.dims)

    def run(self) -> Iterator[tuple[fx.Node, list[Results], Results]]:
        """The calls, with what they read of the weights, and what they give."""
        shape = [int(n) for n in self.shapes[self.softmax].shape]
        at = places(self.length)
        values: dict[fx.Node, Results] = {self.softmax: tuple(self.placed(shape, i) for i in at)}
        for node in self.facts.graph.nodes:
            if node is self.softmax or not (node in self.weights.passing or node in self.weights.mixed):
                continue
            results = tuple(self.value(node, {n: v[i] for n, v in values.items()}) for i in range(len(at)))
            if not any(result is None for result in results):
                yield node, [values[n] for n in node.all_input_nodes if n in values], results
                values[node] = results

    def likenesses_at(self, node: fx.Node) -> set[fx.Node]:
        """Returns the products whose sum at `node` says how alike softmaxes are, since it runs along the axes of both, as that of
        `p * q.log()` does; none where it weighs values, as that of `gates * q` over the gates weighs q."""
        found = {product for product, others in self.weights.alike.items() if not others and product is node}
        for product, others in self.weights.alike.items():
            for other in others:
                for n, before, results in self.of_other(other).run():
                    if n is node and any(map(is_alive, before)) and not is_alive(results):
                        found.add(product)
        return found

    def of_other(self, other: fx.Node) -> Probe:
        """Returns the same for the softmax that alone `other` is made of: from `other` on, or from the views that it is of."""
        at, path = other, [other]
        while (dims := self.dims_of(at)) is None:
            at = inputs_of(at, self.facts)[0]
            path.append(at)
        start = next((n for n in path if not self.facts.aliasing.is_view(n)), at)
        like = self.shapes.get(start, self.shapes[self.softmax])
        return Probe(start, dims, weights_of(start, self.facts), self.facts, {**self.shapes, start: like})

    def dims_of(self, node: fx.Node) -> Axes | None:
        """Returns the axes of a softmax, or of its logarithm; None of other nodes."""
        if node in self.facts.logarithms:
            return self.facts.logarithms[node]
        if self.facts.op(node) in LOGARITHMS:
            dim = argument(node, "dim")
            return (dim if isinstance(dim, int) else -1,)
        softmax = softmax_of(node, self.facts)
        return softmax.dims if isinstance(softmax, Softmax) else None

    def placed(self, shape: list[int], place: int) -> Tensor:
        """Weights of 1 at one place of the axis, or of several axes as one, and 0 elsewhere."""
        rank, rest = len(shape), torch.ones(shape, dtype=torch.float32)
        for dim in self.dims:
            place, index = divmod(place, shape[dim])
            rest = rest * (torch.arange(shape[dim]) == index).view([-1 if i == dim % rank else 1 for i in range(rank)])
        return rest

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
            result = self.called(node, first, values)
        constant = len(known) == 1 and not any(facts.varies(n) for n in node.all_input_nodes if n is not known[0])
        by_weights = leaf is not None or name in PRODUCT | AFFINE_LAYERS
        return first if constant and by_weights and isinstance(result, Tensor) and result.shape == first.shape else result

    def called(self, node: fx.Node, first: Any, values: Mapping[fx.Node, Any]) -> Any:
        """Returns what a call gives on `values`."""
        return made(node, fx.map_arg((node.args, node.kwargs), lambda n: self.operand(n, node, first, values)))

    def filled(self, shape: Iterable[Any], number: float) -> Tensor:
        """Returns what stands for a tensor that is not known: the number, everywhere."""
        return torch.full([int(size) for size in shape], number)

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
            return self.filled(like.shape, neutral)
        if n in self.shapes:
            return like
        if name in FACTORS | SHIFTS:
            return self.filled(first.shape, neutral) if isinstance(first, Tensor) else neutral
        if not self.facts.varies(n):
            return self.filled(self.constant(n).shape, neutral)
        if name in MIXES and isinstance(first, Tensor):
            left = node.args[0] in values
            return self.filled((*first.shape[:-2], *((first.shape[-1], 3) if left else (3, first.shape[-2]))), 1.0)
        if name == "einsum":
            return self.fitting(n, node, first)
        raise ValueError("known by shapes alone")

    def constant(self, n: fx.Node) -> Any:
        """Returns the value of a node that does not vary.

        Raises:
            Exception: whatever its calls raise on their own.
        """
        if n.op == "get_attr":
            return self.facts.view.attribute(n).detach().cpu()
        options = {key: value for key, value in n.kwargs.items() if not isinstance(value, fx.Node)}  # the others are dtypes
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return made(n, fx.map_arg((n.args, options), self.constant))

    def fitting(self, n: fx.Node, node: fx.Node, first: Tensor) -> Tensor:
        """Returns ones that an einsum takes for its operand `n`."""
        terms = str(node.args[0]).replace(" ", "").split("->")[0].split(",")
        of = dict(zip(operands_of_einsum(node), terms, strict=True))
        (weights,) = (term for operand, term in of.items() if operand is not n)
        sizes = dict(zip(weights, first.shape, strict=True))
        return self.filled([sizes.get(letter, 3) for letter in of[n]], 1.0)


def places(length: int) -> list[int]:
    return sorted({0, 1, length // 2, length - 1})


def is_alive(results: Results) -> bool:
    """Whether what two places of an axis give is nowhere at once, so that the axis is there still. Places of which nothing is
    left, since weights were selected, say nothing."""
    parts = [ts for ts in map(tensors_of, results) if any(bool(t.any()) for t in ts)]
    pairs = list(itertools.combinations(parts, 2))
    return not pairs or any(not any(bool((a * b).any()) for a, b in zip(one, other)) for one, other in pairs)


def same_leaf(leaf: nn.Module | None) -> bool:
    return isinstance(leaf, nn.Identity | nn.modules.dropout._DropoutNd | nn.modules.batchnorm._NormBase)


def by_name(weights: Weights, facts: Facts) -> Verdict:
    """What names say: products of matrices are attention, and those place by place where sums or several terms follow."""
    summed = any(facts.op(p) not in FACTORS for p in weights.products) or any(
        facts.op(n) in REDUCES or len(weights.mixed.intersection(facts.varying_inputs(n))) > 1 for n in weights.mixed
    )
    return "attention" if summed else "elsewhere"
