"""The edit of attention that is written out."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch import fx

from ...analysis.attention.weights import Weights
from ...analysis.written.softmax import Softmax
from ...gates.adjoints.attention import alive, is_tempered, tempered_below, tempered_groups, tempered_softmax
from ...gates.adjoints.row import Temperature
from ...gates.dual_path import dual_path, frozen
from .again import made_with, replayed, replayed_after, temper_behind
from .rewriting import Edit, Rewriting


@dataclass
class FreezeSoftmax(Edit):
    """The weights that the softmax `node` makes become constants; at a temperature that is not the forward's, what they multiply
    receives by tempered weights, which go through the same calls as the forward's.

    `rows` are those of the products that the table has a row for, with the weights that they take, the values, and the row's
    arguments; the others are calculated a second time, with the tempered weights, and receive by that.
    """

    node: fx.Node
    softmax: Softmax
    written: bool
    dtype: Any
    weights: Weights
    rows: dict[fx.Node, tuple[fx.Node, fx.Node, dict[str, Any]]]
    tau: Temperature

    def apply(self, to: Rewriting) -> None:
        graph, node, last = to.graph, self.node, self.weights.products[-1]
        if not self.softmax.later:  # whose exponentials nothing else reads
            self.give_others_their_own(to)
        with graph.inserting_after(node):
            hard = graph.call_function(frozen, (node,))
        hard.meta.update(node.meta)
        node.meta.pop("place", None)
        node.replace_all_uses_with(hard, lambda user: user is not hard)
        to.instead[node] = hard
        soft = self.tempered(to, hard) if is_tempered(self.tau) else None
        copies: dict[fx.Node, fx.Node] = {} if soft is None else {hard: soft}
        passing = {to.instead.get(n, n) for n in self.weights.passing}
        products = self.weights.products
        if soft is not None and self.softmax.late:  # what divides is tempered, too
            passing, products = made_with(hard), list(self.softmax.late)
        for product in products:
            now = to.instead.get(product, product)
            if now is not product:  # another softmax has weights in it
                if soft is not None:
                    temper_behind(to, now.args[2], passing, copies)
                to.passing[product] = now
            elif product in self.rows and products is self.weights.products:
                mixing, values, args = self.rows[product]
                mixing, values = to.instead.get(mixing, mixing), to.instead.get(values, values)  # a product may mix another's
                with graph.inserting_before(product):
                    tempered = replayed(to, mixing, passing, copies) if soft is not None else None
                    mixed = graph.call_function(dual_path, ("mix", mixing, tempered, values), {"tau": self.tau, **args})
                mixed.meta.update(product.meta)
                to.supersede(product, mixed)
                to.passing[product] = mixed
                passing |= {mixed} if product in passing else set()
            elif soft is not None:
                to.passing[product] = to.surrogate(product, replayed_after(to, product, passing, copies), self.tau)
        to.passing[node] = to.passing.get(last, to.instead.get(last, last))

    def give_others_their_own(self, to: Rewriting) -> None:
        """Let what reads the weights beside these products, as the output may, read weights of its own, which keep their
        derivative."""
        passing, products = self.weights.passing, {*self.weights.products, *to.copies}
        within, queue = set[fx.Node](), list(self.weights.products)
        while queue:
            new = [n for n in queue.pop().all_input_nodes if n in passing and n not in within]
            within.update(new)
            queue += new
        copies: dict[fx.Node, fx.Node] = {}
        for n in [n for n in to.graph.nodes if n in within]:
            for user in list(n.users):
                if user not in within and user not in products and n in values_of(user, to):
                    with to.graph.inserting_before(n.next):
                        user.replace_input_with(n, replayed(to, n, within, copies))

    def tempered(self, to: Rewriting, hard: fx.Node) -> fx.Node:
        """Returns the weights at the temperature, in the dtype of the forward's."""
        graph, scores = to.graph, to.instead.get(self.softmax.scores, self.softmax.scores)
        with graph.inserting_before(hard.next):
            cut = graph.call_method("detach", (scores,))
            if not self.written:
                options = {"tau": self.tau, "dim": self.softmax.dim, "dtype": self.dtype}
                soft = graph.call_function(tempered_softmax, (cut,), options)
            elif self.softmax.grouped:
                copies = {scores: graph.call_function(tempered_groups, (cut, self.tau, self.softmax.sign))}
                soft = replayed(to, self.node, set(self.softmax.inside), copies)
            else:
                below = (cut, self.tau, self.softmax.dim, self.softmax.sign)
                copies = {scores: graph.call_function(tempered_below, below)}
                soft = replayed(to, self.node, set(self.softmax.inside), copies)
                unmasked = graph.call_function(alive, (cut, self.softmax.dim))
                soft = graph.call_function(operator.mul, (soft, unmasked))
            return graph.call_method("type_as", (soft, hard))


def values_of(user: fx.Node, to: Rewriting) -> list[fx.Node]:
    """Returns the nodes whose values a call, or the output, takes a derivative of."""
    return user.all_input_nodes if user.op == "output" else to.facts.signal_inputs(user)
