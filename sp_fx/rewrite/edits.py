"""The edits of a rewrite.

An edit is applied as soon as it is decided: the next decision sees what it has left.

- `ReplaceCall`: a call becomes a dual-path call.
- `Unshare`: calls inside a gate that is written out, which something else reads too, are made again for the gate.
- `CloseWritten`: the calls of a gate that is written out stay, and what they compute passes through a dual-path call.
- `Freeze`: an operand of a call becomes a constant.
- `OpenLeaf`: a leaf module's computation becomes a call on its tensors.
- `FreezeSoftmax`: the weights of attention that is written out become constants, and the values receive by tempered ones.
- `Surrogate`: a call stays, and its cotangent goes back through another one: a cosine similarity through one of constant norms.
- `Compete`: a maximum of two signals becomes a maximum over both, which a max pooling is.
"""

from __future__ import annotations

import inspect
import operator
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..analysis.attention import Weights
from ..analysis.calls import AFFINE_ROWS, is_affine_row
from ..analysis.facts import Facts
from ..analysis.readers import Gate
from ..analysis.written.gates import Written
from ..analysis.written.softmax import Softmax
from ..gates.adjoints.attention import alive, is_tempered, tempered, tempered_softmax
from ..gates.adjoints.norms import frozen_cosine
from ..gates.adjoints.row import FROZEN, Temperature
from ..gates.dual_path import dual_path, frozen
from ..gates.multihead import multihead_attention


class Rewriting:
    """A graph while edits are applied to it.

    Attributes:
        instead: for a node that was replaced, what its users read now.
        passing: for a call of the captured graph, the node through which its signal passes now.
        unshared: the gates that are written out with calls of their own, by their last call.
        opened: the paths of leaves whose calls are written out, and which are marks once all edits are applied.
    """

    def __init__(self, facts: Facts) -> None:
        self.facts, self.graph, self.modules = facts, facts.graph, facts.modules
        self.instead: dict[fx.Node, fx.Node] = {}
        self.passing: dict[fx.Node, fx.Node] = {}
        self.unshared: dict[fx.Node, Written] = {}
        self.opened: list[str] = []

    def dual_path(self, node: fx.Node, gate: Gate, tau: Temperature, scale: str | float) -> fx.Node:
        """Returns a dual-path call in place of `node`."""
        if isinstance(scale, float) and not isinstance(tau, str):
            tau = tau * scale
        fit = {"tau": tau, **({"scale": scale} if scale == "sample" else {})}
        soft = self.passing[node] = self.graph.call_function(dual_path, (gate.kind, *gate.tensors), {**fit, **gate.args})
        soft.meta.update(node.meta)
        return soft

    def surrogate(self, node: fx.Node, soft: fx.Node) -> fx.Node:
        """Returns a call that gives what `node` does and goes back through `soft`, which stands behind it."""
        users = [user for user in node.users if user is not soft]
        with self.graph.inserting_before(soft.next):
            exact = self.graph.call_function(dual_path, ("surrogate", node, soft), {"tau": FROZEN})
        exact.meta.update(node.meta)
        node.meta.pop("place", None)
        for user in users:
            user.replace_input_with(node, exact)
        self.instead[node] = exact
        return exact

    def supersede(self, node: fx.Node, by: fx.Node) -> None:
        """Let everything read `by` in place of `node`, which goes."""
        node.replace_all_uses_with(by)
        self.instead[node] = by
        self.graph.erase_node(node)


class Edit(ABC):
    """What is to be done at one call of a captured graph."""

    node: fx.Node

    @abstractmethod
    def apply(self, to: Rewriting) -> None: ...


@dataclass
class ReplaceCall(Edit):
    """The call `node` becomes a dual-path call of `gate`; where it returns indices too, these still come from the call."""

    node: fx.Node
    gate: Gate
    tau: Temperature
    scale: str | float

    def apply(self, to: Rewriting) -> None:
        if self.gate.first:
            self.replace_first(to)
        else:
            self.replace_all(to)

    def replace_all(self, to: Rewriting) -> None:
        with to.graph.inserting_before(self.node):
            soft = to.dual_path(self.node, self.gate, self.tau, self.scale)
        to.supersede(self.node, soft)

    def replace_first(self, to: Rewriting) -> None:
        node = self.node
        with to.graph.inserting_before(node):
            soft = to.dual_path(node, self.gate, self.tau, self.scale)
        rest = []
        for user in list(node.users):
            index = user.args[1] if user.target in (operator.getitem, getattr) else None
            if index in (0, "values"):
                to.supersede(user, soft)
            elif index not in (1, "indices"):
                rest.append(user)
        if rest:
            with to.graph.inserting_after(node):
                both = to.graph.call_function(with_first, (node, soft))
            for user in rest:
                user.replace_input_with(node, both)
        if not node.users:
            to.graph.erase_node(node)


@dataclass
class Unshare(Edit):
    """Those of the calls inside `gate`, which `node` closes, that something else reads as well are made a second time for the
    gate alone. Applied before any decision."""

    node: fx.Node
    gate: Written

    def apply(self, to: Rewriting) -> None:
        own = to.facts.view.private(self.gate.inside, self.node)
        copies: dict[fx.Node, fx.Node] = {}
        for n in self.gate.inside:
            if n in own:
                for shared, copy in copies.items():
                    n.replace_input_with(shared, copy)
            else:
                with to.graph.inserting_before(n.next):
                    replayed(to, n, {n}, copies)
        to.unshared[self.node] = replace(self.gate, inside=tuple(copies.get(n, n) for n in self.gate.inside))


@dataclass
class CloseWritten(Edit):
    """The calls inside `gate`, which `node` closes, stay, cut off from its source; what they compute passes through a dual-path
    call that differentiates it. They are its own (`Unshare`)."""

    node: fx.Node
    gate: Written
    tau: Temperature
    scale: str | float

    def apply(self, to: Rewriting) -> None:
        node, gate, graph = self.node, self.gate, to.graph
        source = to.instead.get(gate.source, gate.source)
        with graph.inserting_before(gate.inside[0]):
            constant = graph.call_function(frozen, (source,))
        for n in gate.inside:
            n.replace_input_with(source, constant)
        users = list(node.users)
        with graph.inserting_before(node.next):
            args = {"row": gate.kind, "args": tuple(gate.args.items())}
            soft = to.dual_path(node, Gate("written", (source, node), args), self.tau, self.scale)
        for user in users:
            user.replace_input_with(node, soft)
        node.meta.pop("place", None)
        to.instead[node] = soft


@dataclass
class Compete(Edit):
    """The maximum of two signals, or the minimum, becomes one over both, side by side: `v softmax((a, b) / tau)` is its way
    back."""

    node: fx.Node
    tensors: tuple[fx.Node, fx.Node]
    tau: Temperature
    scale: str | float
    sign: int

    def apply(self, to: Rewriting) -> None:
        graph, node = to.graph, self.node
        with graph.inserting_before(node):
            both = graph.call_function(side_by_side, self.tensors, {} if self.sign > 0 else {"sign": self.sign})
            soft = to.dual_path(node, Gate("amax", (both,), {"dim": (-1,), "keepdim": False}), self.tau, self.scale)
            if self.sign < 0:
                soft = graph.call_function(operator.neg, (soft,))
        to.supersede(node, soft)


@dataclass
class Surrogate(Edit):
    """The cosine similarity of two signals stays, and its cotangent goes back through one whose norms are constants."""

    node: fx.Node
    gate: Gate

    def apply(self, to: Rewriting) -> None:
        with to.graph.inserting_before(self.node.next):
            soft = to.graph.call_function(frozen_cosine, self.gate.tensors, self.gate.args)
        to.passing[self.node] = to.surrogate(self.node, soft)


@dataclass
class Freeze(Edit):
    """The `operand` of the call `node` becomes a constant."""

    node: fx.Node
    operand: fx.Node

    def apply(self, to: Rewriting) -> None:
        with to.graph.inserting_before(self.node):
            constant = to.graph.call_function(frozen, (self.operand,))
        self.node.replace_input_with(self.operand, constant)


@dataclass
class OpenLeaf(Edit):
    """What the leaf of `node` computes becomes a call on its tensors: an affine leaf its row of the table, and then an identity
    that can be hooked; `nn.MultiheadAttention` the same with dual-path attention inside, at temperature `tau`."""

    node: fx.Node
    leaf: nn.Module
    tau: Temperature = FROZEN

    def apply(self, to: Rewriting) -> None:
        with to.graph.inserting_before(self.node):
            soft = self.multihead(to) if isinstance(self.leaf, nn.MultiheadAttention) else self.affine(to)
        soft.meta.update(self.node.meta)
        if isinstance(self.leaf, nn.MultiheadAttention):
            to.passing[self.node] = soft
            to.supersede(self.node, soft)
        else:
            self.node.args = (soft, *self.node.args)
            to.opened.append(str(self.node.target))

    def affine(self, to: Rewriting) -> fx.Node:
        kind, names, args = AFFINE_ROWS[type(self.leaf)]
        path = self.node.target
        tensors = [None if getattr(self.leaf, name) is None else to.graph.get_attr(f"{path}.{name}") for name in names]
        inputs = (*self.node.args, *self.node.kwargs.values())
        options = {"tau": FROZEN, **{arg: getattr(self.leaf, arg) for arg in args}}
        return to.graph.call_function(dual_path, (kind, *inputs, *tensors), options)

    def multihead(self, to: Rewriting) -> fx.Node:
        leaf: Any = self.leaf
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "bias_k", "bias_v")
        tensors = {name: getattr(leaf, name) for name in names}
        tensors |= {"out_proj.weight": leaf.out_proj.weight, "out_proj.bias": leaf.out_proj.bias}
        weights = {n: t if t is None else to.graph.get_attr(f"{self.node.target}.{n}") for n, t in tensors.items()}
        parameters = inspect.signature(nn.MultiheadAttention.forward).parameters
        arguments: dict[str, Any] = {**dict(zip(parameters, (None, *self.node.args))), **self.node.kwargs}
        arguments.pop("self", None)
        inputs = tuple(arguments.pop(name) for name in ("query", "key", "value"))
        return to.graph.call_function(multihead_attention, inputs, {
            "weights": weights, "num_heads": leaf.num_heads, "tau": self.tau, "batch_first": leaf.batch_first,
            "add_zero_attn": leaf.add_zero_attn, **arguments,
        })  # fmt: skip


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
        with graph.inserting_after(node):
            hard = graph.call_function(frozen, (node,))
        hard.meta.update(node.meta)
        node.meta.pop("place", None)
        node.replace_all_uses_with(hard, lambda user: user is not hard)
        to.instead[node] = hard
        hot = is_tempered(self.tau)
        copies: dict[fx.Node, fx.Node] = {hard: self.tempered(to, hard)} if hot else {}
        passing = (self.weights.passing - {node}) | {hard}
        for product in self.weights.products:
            if product in self.rows:
                mixing, values, args = self.rows[product]
                mixing, values = to.instead.get(mixing, mixing), to.instead.get(values, values)  # a product may mix another's
                with graph.inserting_before(product):
                    tempered = replayed(to, mixing, passing, copies) if hot else None
                    mixed = graph.call_function(dual_path, ("mix", mixing, tempered, values), {"tau": self.tau, **args})
                mixed.meta.update(product.meta)
                to.supersede(product, mixed)
            elif hot:
                mixed = to.surrogate(product, replayed_after(to, product, passing, copies))
            else:
                continue
            to.passing[product] = mixed
        to.passing[node] = to.passing.get(last, last)

    def tempered(self, to: Rewriting, hard: fx.Node) -> fx.Node:
        """Returns the weights at the temperature, in the dtype of the forward's."""
        graph, scores = to.graph, to.instead.get(self.softmax.scores, self.softmax.scores)
        with graph.inserting_before(hard.next):
            cut = graph.call_method("detach", (scores,))
            if not self.written:
                options = {"tau": self.tau, "dim": self.softmax.dim, "dtype": self.dtype}
                soft = graph.call_function(tempered_softmax, (cut,), options)
            else:
                copies = {scores: graph.call_function(tempered, (cut, self.tau))}
                soft = replayed(to, self.node, set(self.softmax.inside), copies)
                unmasked = graph.call_function(alive, (cut, self.softmax.dim))
                soft = graph.call_function(operator.mul, (soft, unmasked))
            return graph.call_method("type_as", (soft, hard))


def replayed(to: Rewriting, node: fx.Node, within: set[fx.Node], copies: dict[fx.Node, fx.Node]) -> fx.Node:
    """Returns what `node` would be, were the nodes that `copies` has what it says; calls `within` are made again for it."""
    if node.target is dual_path and node.args[0] == "surrogate":  # made again already
        return node.args[2]  # type: ignore[return-value]
    if node not in copies and node in within:
        for n in node.all_input_nodes:
            copies[n] = replayed(to, n, within, copies)
        if to.facts.is_identity(node):  # nobody's hooks run twice
            copies[node] = copies.get(node.all_input_nodes[0], node.all_input_nodes[0])
        else:
            copies[node] = to.graph.node_copy(node, lambda n: copies.get(n, n))
            copies[node].meta.pop("place", None)
            if (leaf := to.facts.leaf(node)) is not None and is_affine_row(leaf):
                OpenLeaf(copies[node], leaf).apply(to)
    return copies.get(node, node)


def replayed_after(to: Rewriting, product: fx.Node, within: set[fx.Node], copies: dict[fx.Node, fx.Node]) -> fx.Node:
    """Returns the call `product` made again behind itself, of the same values and other weights."""
    with to.graph.inserting_before(product.next):
        return replayed(to, product, within | {product}, {**copies})


def side_by_side(a: Tensor, b: Tensor, sign: int = 1) -> Tensor:
    """`a` and `b`, times `sign`, along a new last axis."""
    both = torch.stack(torch.broadcast_tensors(a, b), -1)
    return both if sign == 1 else sign * both


def with_first(result: Any, first: Any) -> Any:
    """Returns `result`, a tuple, with another first element."""
    return first, *tuple(result)[1:]


fx.wrap("side_by_side")
fx.wrap("with_first")
