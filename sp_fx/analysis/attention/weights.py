"""Where the weights of a softmax go in a graph: through what they pass as weights, what they multiply, what is summed up of that.

The weights go on as weights through casts, views, masks, dropout, talking heads, a second normalisation, products with weights of
another softmax, whatever is made of weights and constants alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx, nn

from ..calls import keywords, op_of, operands_of
from ..facts import Facts
from ..ops import (
    AFFINE,
    AFFINE_LAYERS,
    BY_INDEX,
    CARRIES,
    CHOICES,
    FACTORS,
    FORM,
    JOINS,
    LOGARITHMS,
    MIXES,
    PASSED,
    POINTWISE,
    PRODUCT,
    QUOTIENT,
    REDUCES,
    SHIFTS,
)
from ..readers import READERS, SOFTMAX
from ..written.softmax import Softmax

AFFINE_LEAVES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Identity, nn.modules.dropout._DropoutNd,
                 nn.modules.batchnorm._NormBase)  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """Where the weights of a softmax go.

    Attributes:
        passing: the nodes that they pass through; those in `gated` are weights times something else, place by place.
        products: their products with something else that varies.
        mixed: what is made of these products by sums.
        alike: of products with what softmaxes alone have made, and may say how alike these are, these; none of weights by itself.
        likenesses: those of them that do.
    """

    passing: set[fx.Node] = field(default_factory=set)
    gated: set[fx.Node] = field(default_factory=set)
    products: list[fx.Node] = field(default_factory=list)
    mixed: set[fx.Node] = field(default_factory=set)
    alike: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    likenesses: set[fx.Node] = field(default_factory=set)


def weights_of(softmax: fx.Node, facts: Facts, of_any: tuple[set[fx.Node], set[fx.Node]] | None = None) -> Weights:
    """Returns where the weights go that the node `softmax` makes; `of_any` are those of any softmax, without and with layers."""
    of_softmaxes, of_layers = of_any or (weights_of_any(facts), weights_of_any(facts, layers=True))
    weights = Weights({softmax})
    passing, products, gated, mixed = weights.passing, weights.products, weights.gated, weights.mixed
    for node in facts.graph.nodes:
        read = inputs_of(node, facts)
        weighing = [n for n in read if n in passing]
        others = [n for n in read if n not in passing and not (n in of_softmaxes and facts.op(node) in SHIFTS)]
        name = facts.op(node) if node.op != "output" else ""
        if node is softmax or not (weighing or mixed.intersection(read)):
            continue
        twice = name in PRODUCT and sum(isinstance(a, fx.Node) and a in passing for a in operands_of(node)) > 1
        if twice and name in FACTORS:
            continue  # no multiple of the weights
        if name in PRODUCT and (others or twice) and weighing and of_layers.issuperset(others):
            weights.alike[node] = others
        if weighing and (others or twice) and name in PRODUCT | AFFINE_LAYERS:
            products.append(node)
            mixed.add(node)
            if name in FACTORS:
                passing.add(node)
                gated.add(node)
            elif of_softmaxes.issuperset(others):  # the product of two matrices of weights is one
                passing.add(node)
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
    return weights


def weights_of_any(facts: Facts, layers: bool = False) -> set[fx.Node]:
    """Returns the softmaxes of a graph and their logarithms, and what is made of them alone: place by place, as the difference of
    two, or by products of two; and with `layers`, by products with constants."""
    found: set[fx.Node] = set()
    for node in facts.graph.nodes:
        read = inputs_of(node, facts) if node.op.startswith("call") else []
        if not read:
            continue
        placewise = facts.op(node) in AFFINE - AFFINE_LAYERS | POINTWISE or facts.aliasing.is_view(node)
        alike = placewise or (facts.op(node) in PRODUCT and (layers or len(read) > 1))
        alike = alike or (layers and (facts.op(node) in AFFINE_LAYERS or isinstance(facts.leaf(node), AFFINE_LEAVES)))
        logarithm = facts.op(node) in LOGARITHMS or node in facts.logarithms
        if logarithm or is_softmax(node, facts) or (alike and all(n in found for n in read)):
            found.add(node)
    return found


def is_softmax(node: fx.Node, facts: Facts) -> bool:
    return op_of(node) in SOFTMAX or isinstance(facts.patterns.get(node), Softmax)


def has_softmax(facts: Facts) -> bool:
    """Whether any node of a graph is a softmax."""
    return any(is_softmax(node, facts) for node in facts.graph.nodes)


def softmax_of(node: fx.Node, facts: Facts) -> Softmax | str | None:
    """Returns the softmax that a node closes; or, of one with arguments that cannot be read, why."""
    if isinstance(pattern := facts.patterns.get(node), Softmax):
        return pattern
    reader = SOFTMAX.get(op_of(node))
    if reader is None:
        return None
    try:
        scores, dim, *_ = reader(*node.args, **keywords(node))
    except TypeError as error:
        return f"its arguments are not constants of the graph: {error}"
    return "softmax without a dim" if dim is None else Softmax(scores, dim, (node,))


def matrix_products(products: list[fx.Node], facts: Facts) -> set[fx.Node]:
    """Those of the products that sum up on their own, so that no later sum makes attention of them."""
    return {product for product in products if facts.op(product) in MIXES}


def inputs_of(node: fx.Node, facts: Facts) -> list[fx.Node]:
    """Returns the operands of `node` whose values a derivative goes through: neither masks nor what only lends its form."""
    read = facts.signal_inputs(node)
    return [n for n in read if n is node.args[0]] if facts.op(node) in FORM else read


def is_linear(node: fx.Node, name: str, facts: Facts) -> bool:
    """Whether a call of a sum of products may be one of a larger sum."""
    linear = name in (AFFINE | REDUCES | JOINS) - AFFINE_LAYERS or facts.aliasing.is_view(node)
    return linear or (name in BY_INDEX and adds_up(node))


def adds_up(node: fx.Node) -> bool:
    """Whether a call that reduces over groups that an index says adds up, or takes means, rather than chooses."""
    reader = READERS.get(op_of(node))
    try:
        return reader is None or reader(*node.args, **keywords(node)) is None
    except TypeError:  # a signature that the reader does not know
        return False
