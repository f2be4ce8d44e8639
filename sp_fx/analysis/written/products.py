"""Gates whose two factors stand apart in a longer product, as those of SiLU in `(x * g) * torch.sigmoid(x)`: a product means the
same in any order, and so it is read as one of the gate and of what is left."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from ..calls import op_of
from ..ops import FACTORS, QUOTIENT
from ..readers import READERS
from .functions import gate_of, multiple_of, points, smooth_of
from .gates import Written, is_pointwise, numbers_in, written_as
from .graph import Graph


@dataclass(frozen=True)
class Factor:
    """What a product multiplies by, or where it `divides`, divides by: a node, or a number."""

    value: Any
    divides: bool = False


@dataclass(frozen=True)
class Product:
    """A product of gates and of the factors `others`. Each of the gates is its source times a factor; `products` are the products
    inside this one that multiply them with the rest."""

    gates: tuple[tuple[Written, Factor], ...]
    others: tuple[Factor, ...]
    products: tuple[fx.Node, ...]

    @property
    def kind(self) -> str:
        """The rows of its gates."""
        return " and ".join(gate.kind for gate, _ in self.gates)


def regrouped(graph: Graph, node: fx.Node, claimed: Collection[fx.Node]) -> Product | None:
    """Returns the product whose last call is `node` as one of gates and of others, where these are no neighbours in it."""
    products: list[fx.Node] = []
    factors = list(factors_of(graph, node, claimed, products))
    gates: list[tuple[Written, Factor]] = []
    while len(products) > 1 and (found := gate_among(graph, factors)) is not None:
        first, second, gate = found
        gates.append((gate, second))
        factors = [factor for factor in factors if factor is not first and factor is not second]
    return Product(tuple(gates), tuple(factors), tuple(products[1:])) if gates else None


def gate_among(graph: Graph, factors: list[Factor]) -> tuple[Factor, Factor, Written] | None:
    """Returns two factors, and the gate that is their product, if there are such."""
    for first in factors:
        if first.divides or first.value not in graph.signals:
            continue
        for second in factors:
            if second is not first and (gate := gate_by(graph, first.value, second)) is not None:
                return first, second, gate
    return None


def factors_of(graph: Graph, node: fx.Node, claimed: Collection[fx.Node], products: list[fx.Node]) -> Iterator[Factor]:
    """The factors of a product and of the products in it that nothing else reads, which go into `products`, the last first."""
    products.append(node)
    for i, value in enumerate(node.args[:2]):
        divides = i == 1 and graph.called(node) in QUOTIENT
        alone = isinstance(value, fx.Node) and len(value.users) == 1 and node.args.count(value) == 1
        if alone and not divides and value not in claimed and is_product(graph, value):  # type: ignore[arg-type]
            yield from factors_of(graph, value, claimed, products)  # type: ignore[arg-type]
        else:
            yield Factor(value, divides)


def is_product(graph: Graph, node: fx.Node) -> bool:
    return graph.called(node) in FACTORS | QUOTIENT and len(node.args) == 2 and not node.kwargs and node in graph.signals


def gate_by(graph: Graph, source: fx.Node, factor: Factor) -> Written | None:
    """Returns the gate that is `source` times the factor, if the factor is a function of the source and that is one."""
    inside = graph.between(source, factor.value, lambda n: is_pointwise(graph, n) or graph.passes(n))
    if not inside:
        return None
    z = points(numbers_in(graph, inside))
    try:
        y = graph.computed(inside, {source: z.clone()})
    except Exception:  # a form that does not run on numbers is none of these gates
        return None
    if not isinstance(y, Tensor) or y.shape != z.shape or y.is_complex():
        return None
    y = z / y if factor.divides else z * y
    if (gate := gate_of(z, y) or multiple_of(z, y)) is not None:
        return written_as(gate, graph, source, inside)
    if any(op_of(n) in READERS for n in inside) and (smooth := smooth_of(z, y)) is not None:
        return written_as(smooth, graph, source, inside, smooth=True)
    return None
