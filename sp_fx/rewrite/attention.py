"""Attention that a model writes out: a softmax whose weights, by affine calls, reach a product with values."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from ..analysis.calls import keywords, op_of
from ..analysis.facts import Facts
from ..analysis.ops import AFFINE, MIXES, MIXES_OTHERWISE
from ..analysis.readers import SOFTMAX
from ..gates.adjoints.attention import is_tempered
from .account import Account
from .edits import FreezeSoftmax

AFFINE_LEAVES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Identity, nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)


def softmax(node: fx.Node, facts: Facts, account: Account) -> bool:
    """A softmax: attention, where it multiplies values; of a classifier or a router, which keeps its derivative, elsewhere."""
    reader = SOFTMAX.get(op_of(node))
    if reader is None:
        return False
    products, weights = products_of(node, facts)
    if not products:
        account.note(node, "kept", "a softmax that multiplies no values")
        return True
    try:
        scores, dim, dtype = reader(*node.args, **keywords(node))
    except TypeError as error:
        account.note(node, "NOT REWRITTEN", f"its arguments are not constants of the graph: {error}")
        return True
    if dim is None:
        account.note(node, "NOT REWRITTEN", "softmax without a dim")
        return True
    tau = account.gate(node, "attention")
    if tau is None:
        return True
    known = []
    for product in products:
        form = mixing(product, weights, facts)
        if form is not None:
            known.append((product, *form))
        elif is_tempered(tau):
            account.amend(temperature=1.0, reason=f"at temperature 1, for want of the adjoint of {facts.op(product)}")
    account.apply(FreezeSoftmax(node, scores, dim, dtype, weights, products[-1], known, tau))
    return True


def products_of(softmax: fx.Node, facts: Facts) -> tuple[list[fx.Node], set[fx.Node]]:
    """Returns the products of a softmax's weights with something else that varies, and the nodes that the weights pass through on
    the way: talking heads, dropout, a mask, a second normalisation."""
    weights, products = {softmax}, []
    for node in facts.graph.nodes:
        inputs = facts.varying_inputs(node)
        if node is softmax or not any(n in weights for n in inputs):
            continue
        name = facts.op(node) if node.op != "output" else ""
        if any(n not in weights for n in inputs):
            if name in MIXES | MIXES_OTHERWISE:
                products.append(node)
        elif facts.aliasing.is_view(node) or name in AFFINE or isinstance(facts.leaf(node), AFFINE_LEAVES):
            weights.add(node)
    return products, weights


def mixing(product: fx.Node, weights: set[fx.Node], facts: Facts) -> tuple[fx.Node, fx.Node, dict[str, Any]] | None:
    """Returns the weights, the values and the arguments of the row `mix`, of a product that it covers: `weights @ values`,
    `values @ weights`, or an einsum of the two."""
    if facts.op(product) in MIXES and len(product.args) == 2:
        left, right = product.args
        if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
            return None
        return (left, right, {}) if left in weights else (right, left, {"form": "values @ weights"})
    if facts.op(product) == "einsum" and isinstance(product.args[0], str):
        operands: Any = product.args[1] if isinstance(product.args[1], tuple | list) else product.args[1:]
        equation = product.args[0].replace(" ", "")
        terms = equation.split("->")[0].split(",")
        if len(operands) != 2 or len(terms) != 2 or "->" not in equation:
            return None
        swapped = operands[0] not in weights
        (first, second), out = (terms[::-1] if swapped else terms), equation.split("->")[1]
        traced = any(len(set(letters)) < len(letters) for letters in (first.replace(".", ""), second.replace(".", "")))
        if set(second) <= set(first + out) and not traced:
            mixed_by, values = operands[::-1] if swapped else operands
            return mixed_by, values, {"form": equation, **({"swapped": True} if swapped else {})}
    return None
