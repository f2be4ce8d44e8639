"""Softmaxes whose exponentials are divided by their sum when they have met something else: a mask, as in
`e * mask / (e * mask).sum(-1, True)`, or the values, as in `(e @ v) / e.sum(-1, True)`.

Such an exponential is a softmax without its division. It is known by runs: on random numbers in its place, what it is divided
into sums up to 1, or weighs values that are all 1 to 1.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ..calls import operands_of
from ..facts import Facts
from ..ops import CHOICES, EXPONENTIALS, FACTORS, PASSED, POWERS, PRODUCT, QUOTIENT
from ..written.norms import Statistic
from ..written.softmax import SIZES, Axes, Softmax
from .probe import Probe, Shapes
from .weights import Weights, inputs_of, is_linear, weights_of

TOLERANCE = 1e-4  # small numbers keep sums from 0


def may_be_in(facts: Facts) -> bool:
    """Whether a graph has an exponential that may be such a softmax."""
    return any(scores_of(node, facts) is not None for node in facts.graph.nodes)


def find(facts: Facts, shapes: Shapes | None) -> None:
    """Add the softmaxes of a graph whose exponentials are divided later to its patterns, by these exponentials."""
    divided_at_once = {n for p in facts.patterns.values() if isinstance(p, Softmax) for n in p.inside}
    for node in facts.graph.nodes:
        if node not in divided_at_once and (scores := scores_of(node, facts)) is not None:
            find_at(node, scores, facts, shapes or {})


def scores_of(node: fx.Node, facts: Facts) -> fx.Node | None:
    """Returns what an exponential is of, which no other pattern has a part in: `s` of `s.exp()` and of `2 ** s`."""
    if not node.op.startswith("call") or node not in facts.signals or node in facts.parts or node in facts.patterns:
        return None
    if facts.op(node) in POWERS:
        base, *exponent = node.args
        fits = len(exponent) == 1 and facts.view.number(base) is not None
        return exponent[0] if fits and isinstance(exponent[0], fx.Node) else None
    inputs = inputs_of(node, facts)
    return inputs[0] if facts.op(node) in EXPONENTIALS and len(inputs) == 1 else None


def find_at(node: fx.Node, scores: fx.Node, facts: Facts, shapes: Shapes) -> None:
    weights, own = weights_of(node, facts), made_of(node, facts)
    early = [n for n in weights.passing & own if n is not node and facts.op(n) in QUOTIENT | PRODUCT | PASSED]
    weighed = weighed_by(weights, facts)
    late = [n for n in facts.graph.nodes if n.op.startswith("call") and is_divided(n, weighed, own, facts)]
    divided: dict[fx.Node, Axes] = {}
    for closing in early + late:
        axes = axes_of_sum(closing, node, closing in late, weights.passing | weighed | own, weights, facts, shapes)
        if axes is not None:
            divided[closing] = axes
    if not divided or is_read_elsewhere(node, divided):
        return
    closings = tuple(n for n in late if n in divided)
    base = facts.view.number(node.args[0]) if facts.op(node) in POWERS else None
    sign = -1 if base is not None and base < 1 else 1
    facts.patterns[node] = Softmax(scores, next(iter(divided.values())), (node,), closings, sign, later=True)
    for part in between(divided, own):
        if isinstance(facts.patterns.get(part), Statistic):  # a sum of positive numbers is a norm, too
            del facts.patterns[part]
        facts.parts[part] = node


def is_read_elsewhere(node: fx.Node, closings: Mapping[fx.Node, Any]) -> bool:
    """Whether something reads what is made of a node before one of the `closings`: it would lose its derivative."""
    seen, queue = {node}, [node]
    while queue:
        new = [user for user in queue.pop().users if user not in seen and user not in closings]
        if any(user.op == "output" for user in new):
            return True
        seen.update(new)
        queue += new
    return False


def made_of(node: fx.Node, facts: Facts) -> set[fx.Node]:
    """Returns the node, and what is made of it alone."""
    own = {node}
    for n in facts.graph.nodes:
        read = inputs_of(n, facts) if n.op.startswith("call") else []
        if read and all(r in own for r in read):
            own.add(n)
    return own


def weighed_by(weights: Weights, facts: Facts) -> set[fx.Node]:
    """Returns the products of weights with values, and what is made of these by sums, views and multiples."""
    found = set(weights.products) | weights.mixed
    for node in facts.graph.nodes:
        read = inputs_of(node, facts) if node.op.startswith("call") else []
        if read and all(n in found for n in read) and is_linear(node, facts.op(node), facts):
            found.add(node)
    return found


def is_divided(node: fx.Node, weighed: set[fx.Node], own: set[fx.Node], facts: Facts) -> bool:
    """Whether a call divides what the weights have weighed by what is made of them alone, or multiplies by its inverse."""
    operands = operands_of(node)[:2]
    if facts.op(node) not in QUOTIENT | PRODUCT:
        return False
    return any(n in weighed for n in operands) and any(n in own for n in operands if isinstance(n, fx.Node))


def between(closings: Mapping[fx.Node, Any], own: set[fx.Node]) -> set[fx.Node]:
    """Returns the nodes `closings`, and what is made of the exponential alone to divide it."""
    found, queue = set[fx.Node](), list(closings)
    while queue:
        at = queue.pop()
        if at not in found:
            found.add(at)
            queue += [n for n in at.all_input_nodes if n in own]
    return {n for n in found if n in closings or not own.isdisjoint(n.all_input_nodes)}


def axes_of_sum(
    closing: fx.Node, exponential: fx.Node, late: bool, made: set[fx.Node], weights: Weights, facts: Facts, shapes: Shapes
) -> Axes | None:
    """Returns the axes over which the exponential is a softmax, divided at `closing`: those along which a factor of its own makes
    a difference to the result; None where it is none. `made` are the nodes that it has a part in."""
    found, refused = dict[int, Axes](), False
    known = shapes.get(exponential)
    divisor = divisor_of(closing, made, late, weights, facts)
    for shape in [known.shape] if isinstance(known, Tensor) else [SIZES[:rank] for rank in (2, 3, 4)]:
        z = torch.rand([int(n) for n in shape], generator=generator(0)) + 0.5
        runs = [Run(exponential, closing, made, weights, facts, shapes, masked) for masked in (None, divisor) if masked != set()]
        try:
            axes = next((axes for axes in (normalised_over(run, z, late) for run in runs) if axes), ())
        except Exception:  # of another rank, or by sizes of the model's tensors
            continue
        found |= {z.dim(): axes} if axes else {}
        refused |= not axes
    if not isinstance(known, Tensor) and (refused or not found):
        facts.undecided.add(exponential)
    from_end = {tuple(axis - rank for axis in axes) for rank, axes in found.items()}
    from_start = set(found.values())
    return next((axes.pop() for axes in (from_end, from_start) if len(axes) == 1), None)


def normalised_over(run: Run, z: Tensor, late: bool) -> Axes:
    """Returns the axes along which `z` is divided by its sum, none where it is not: a factor along the others changes nothing."""
    result, axes = run.of(z), []
    for axis, size in enumerate(z.shape):
        factor = torch.rand([size if i == axis else 1 for i in range(z.dim())], generator=generator(1)) + 0.5
        if not torch.allclose(run.of(z * factor), result, rtol=TOLERANCE):
            axes.append(axis)
    if not late and result.shape != z.shape:
        return ()
    total = run.of(z, ones=True) if late else result.sum(axes, keepdim=True) if axes else result
    same = torch.allclose(total, total.flatten()[0].expand_as(total), rtol=TOLERANCE)  # 1, or what the values are multiplied by
    return tuple(axes) if same and bool((total > 0).all()) else ()


def divisor_of(closing: fx.Node, made: set[fx.Node], late: bool, weights: Weights, facts: Facts) -> set[fx.Node]:
    """Returns the calls that make what divides at `closing`, where these are others than those that make what is divided."""
    own = [n for n in operands_of(closing)[:2] if isinstance(n, fx.Node) and n in made]
    if facts.op(closing) in QUOTIENT:
        own = own[-1:]
    elif late:
        own = [n for n in own if n not in weights.products and n not in weights.mixed]
    found, queue = set[fx.Node](), own[-1:]
    while queue:
        at = queue.pop()
        if at not in found and at in made:
            found.add(at)
            queue += at.all_input_nodes
    return found


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def single(value: Any) -> Any:
    """Returns a tensor in the dtype of the runs, if it floats."""
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


class Run(Probe):
    """Runs the calls from an exponential to a division of what is made of it, on numbers in the place of the exponential. Values
    that these weigh are random, or 1. Masks are what they are, or random where that is not known; beside the nodes `masked`, if
    these are given, they let everything through, since a mask on weights is no part of the softmax.
    """

    def __init__(
        self,
        exponential: fx.Node,
        closing: fx.Node,
        made: set[fx.Node],
        weights: Weights,
        facts: Facts,
        shapes: Shapes,
        masked: set[fx.Node] | None,
    ) -> None:
        super().__init__(exponential, (), weights, facts, shapes)
        self.closing, self.made, self.masked, self.ones = closing, made | {closing}, masked, False

    def of(self, z: Tensor, ones: bool = False) -> Tensor:
        self.ones = ones
        values: dict[fx.Node, Any] = {self.softmax: z}
        for node in self.needed():
            values[node] = self.value(node, values)
        return values[self.closing]

    def needed(self) -> Iterator[fx.Node]:
        """The calls that `closing` is made by from the exponential on, in the graph's order."""
        wanted, queue = set[fx.Node](), [self.closing]
        while queue:
            at = queue.pop()
            if at not in wanted and at is not self.softmax and at in self.made:
                wanted.add(at)
                queue += at.all_input_nodes
        return (node for node in self.facts.graph.nodes if node in wanted)

    def value(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        (first, *_) = (values[n] for n in inputs_of(node, self.facts) if n in values)
        passes = self.facts.op(node) in CHOICES and self.masked is not None and node not in self.masked
        return first if passes or self.facts.is_identity(node) else self.called(node, first, values)

    def operand(self, n: fx.Node, node: fx.Node, first: Any, values: Mapping[fx.Node, Any]) -> Any:
        if n in values or self.facts.is_signal(n):
            return super().operand(n, node, first, values)
        chooses = self.facts.op(node) in CHOICES
        if not chooses and self.facts.op(node) not in FACTORS:
            return single(self.constant(n))
        if (number := self.facts.view.number(n)) is not None:
            return torch.tensor(number)
        if not chooses and self.masked is not None and node not in self.masked:
            return torch.ones(())
        if self.shapes and not self.facts.varies(n):
            return single(self.constant(n))
        drawn = torch.rand(first.shape, generator=generator(zlib.crc32(n.name.encode()))) + 0.5
        return drawn > 0.8 if chooses else drawn

    def filled(self, shape: Any, number: float) -> Tensor:
        if self.ones or number == 0:
            return super().filled(shape, number)
        return torch.rand(list(shape), generator=generator(2)) + 0.5
