"""Attention that a model writes out: a softmax whose weights, by affine calls, reach a product with values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx, nn

from ..analysis.ops import AFFINE, MIXES, MIXES_OTHERWISE
from ..gates.adjoints.attention import tempered_softmax
from ..gates.adjoints.row import FROZEN, Temperature
from ..gates.dual import dual_path

if TYPE_CHECKING:
    from .rewrite import Pass


PRODUCTS = MIXES


OTHERS = MIXES_OTHERWISE


AFFINE_LEAVES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Identity, nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)


def products_of(run: Pass, softmax: fx.Node) -> tuple[list[fx.Node], set[fx.Node]]:
    """The products of a softmax's weights with something else that varies, and the nodes that the weights pass through."""
    weights, products = {softmax}, []
    for node in run.graph.nodes:
        inputs = [n for n in node.all_input_nodes if n in run.varying]
        if node is softmax or not any(n in weights for n in inputs):
            continue
        name = run.op(node) if node.op != "output" else ""
        if any(n not in weights for n in inputs):
            if name.strip("_") in PRODUCTS | OTHERS:
                products.append(node)
        elif run.storage.is_view(node) or name in AFFINE or isinstance(run.leaf(node), AFFINE_LEAVES):
            weights.add(node)
    return products, weights


def freeze_softmax(
    run: Pass, node: fx.Node, products: list[fx.Node], weights: set[fx.Node], read: tuple[fx.Node, int, Any], tau: Temperature
) -> None:
    """Make the weights constants; at a temperature that is not the forward's, let the values receive by tempered ones."""
    graph, soft = run.graph, None
    scores, dim, dtype = read
    hot = tau not in (1, FROZEN)
    with graph.inserting_before(node):
        hard = graph.call_function(dual_path, ("softmax", scores), {"tau": tau, "dim": dim, "dtype": dtype})
        if hot:
            cut = graph.call_method("detach", (scores,))
            soft = graph.call_function(tempered_softmax, (cut,), {"tau": tau, "dim": dim, "dtype": dtype})
            soft = graph.call_method("type_as", (soft, hard))
    hard.meta.update(node.meta)
    run.supersede(node, hard)
    graph.erase_node(node)
    weights = (weights - {node}) | {hard}
    again: dict[fx.Node, fx.Node] = {} if soft is None else {hard: soft}
    for product in products:
        form = mixing(product, weights, run)
        run.moved[node] = product  # where the signal passes: the weights are constants
        if form is None:
            if hot:
                run.amend(temperature=1.0, reason=f"at temperature 1, for want of the adjoint of {run.op(product)}")
            continue
        mixed_by, values, args = form
        with graph.inserting_before(product):
            tempered = replayed(graph, mixed_by, weights, again) if hot else None
            mixed = graph.call_function(dual_path, ("mix", mixed_by, tempered, values), {"tau": tau, **args})
        mixed.meta.update(product.meta)
        run.supersede(product, mixed)
        run.moved[product] = run.moved[node] = mixed
        graph.erase_node(product)


def replayed(graph: fx.Graph, node: fx.Node, weights: set[fx.Node], again: dict[fx.Node, fx.Node]) -> fx.Node:
    """What `node` would be, were the softmax another."""
    if node not in weights:
        return node
    if node not in again:
        for n in node.all_input_nodes:
            replayed(graph, n, weights, again)
        again[node] = graph.node_copy(node, lambda n: again.get(n, n))
    return again[node]


def mixing(product: fx.Node, weights: set[fx.Node], run: Pass) -> tuple[fx.Node, fx.Node, dict[str, Any]] | None:
    """The weights, the values and the row's arguments of a product that the table has."""
    if run.op(product).strip("_") in PRODUCTS and len(product.args) == 2:
        left, right = product.args
        if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
            return None
        return (left, right, {}) if left in weights else (right, left, {"form": "values @ weights"})
    if run.op(product) == "einsum" and isinstance(product.args[0], str):
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
