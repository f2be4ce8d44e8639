"""The five edits of a rewrite.

An edit is applied as soon as it is decided: the next decision sees what it has left.

- `ReplaceCall`: a call becomes a dual-path call.
- `CloseWritten`: the calls of a gate that is written out stay, and what they compute passes through a dual-path call.
- `Freeze`: an operand of a call becomes a constant.
- `OpenLeaf`: a leaf module's computation becomes a call on its tensors.
- `FreezeSoftmax`: the weights of attention that is written out become constants, and the values receive by tempered ones.
"""

from __future__ import annotations

import inspect
import operator
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from ..analysis.calls import AFFINE_ROWS
from ..analysis.facts import Facts
from ..analysis.readers import Gate
from ..analysis.written_gates import Written
from ..gates.adjoints.attention import is_tempered, tempered_softmax
from ..gates.adjoints.row import FROZEN, Temperature
from ..gates.dual_path import dual_path, frozen
from ..gates.multihead import multihead_attention


class Rewriting:
    """A graph while edits are applied to it.

    Attributes:
        instead: for a node that was replaced, what its users read now.
        passing: for a call of the captured graph, the node through which its signal passes now.
        opened: the paths of leaves whose calls are written out, and which are marks once all edits are applied.
    """

    def __init__(self, facts: Facts) -> None:
        self.facts, self.graph, self.modules = facts, facts.graph, facts.modules
        self.instead: dict[fx.Node, fx.Node] = {}
        self.passing: dict[fx.Node, fx.Node] = {}
        self.opened: list[str] = []

    def dual_path(self, node: fx.Node, gate: Gate, tau: Temperature, scale: str | float) -> fx.Node:
        """Returns a dual-path call in place of `node`."""
        if isinstance(scale, float) and not isinstance(tau, str):
            tau = tau * scale
        fit = {"tau": tau, **({"scale": scale} if scale == "sample" else {})}
        soft = self.passing[node] = self.graph.call_function(dual_path, (gate.kind, *gate.tensors), {**fit, **gate.args})
        soft.meta.update(node.meta)
        return soft

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
class CloseWritten(Edit):
    """The calls inside `gate`, which `node` closes, stay, cut off from its source; what they compute passes through a dual-path
    call that differentiates it."""

    node: fx.Node
    gate: Written
    tau: Temperature
    scale: str | float

    def apply(self, to: Rewriting) -> None:
        node, gate = self.node, self.gate
        first = min(gate.inside, key=to.facts.aliasing.position.__getitem__)
        source = to.instead.get(gate.source, gate.source)
        with to.graph.inserting_before(first):
            constant = to.graph.call_function(frozen, (source,))
        for n in gate.inside:
            n.replace_input_with(source, constant)
        users = list(node.users)
        with to.graph.inserting_before(node.next):
            args = {"row": gate.kind, "args": tuple(gate.args.items())}
            soft = to.dual_path(node, Gate("written", (source, node), args), self.tau, self.scale)
        for user in users:
            user.replace_input_with(node, soft)
        to.instead[node] = soft


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
    """The weights that the softmax `node` makes over `dim` become constants; at a temperature that is not the forward's, the
    values of the `products` receive by tempered weights, which go through the same calls as the forward's.

    `weights` are the nodes that the softmax's weights pass through, `last` the last call that multiplies values by them;
    `products` are those of these calls that the table has a row for: the call, the weights that it takes, the values, the row's
    arguments.
    """

    node: fx.Node
    scores: fx.Node
    dim: int
    dtype: Any
    weights: set[fx.Node]
    last: fx.Node
    products: list[tuple[fx.Node, fx.Node, fx.Node, dict[str, Any]]]
    tau: Temperature

    def apply(self, to: Rewriting) -> None:
        graph, soft = to.graph, None
        options = {"tau": self.tau, "dim": self.dim, "dtype": self.dtype}
        hot = is_tempered(self.tau)
        with graph.inserting_before(self.node):
            hard = graph.call_function(dual_path, ("softmax", self.scores), options)
            if hot:
                cut = graph.call_method("detach", (self.scores,))
                soft = graph.call_function(tempered_softmax, (cut,), options)
                soft = graph.call_method("type_as", (soft, hard))
        hard.meta.update(self.node.meta)
        to.supersede(self.node, hard)
        weights = (self.weights - {self.node}) | {hard}
        copies: dict[fx.Node, fx.Node] = {} if soft is None else {hard: soft}
        for product, mixing, values, args in self.products:
            mixing, values = to.instead.get(mixing, mixing), to.instead.get(values, values)  # a product may mix another's values
            with graph.inserting_before(product):
                tempered = replayed(graph, mixing, weights, copies) if hot else None
                mixed = graph.call_function(dual_path, ("mix", mixing, tempered, values), {"tau": self.tau, **args})
            mixed.meta.update(product.meta)
            to.supersede(product, mixed)
            to.passing[product] = mixed
        to.passing[self.node] = to.passing.get(self.last, self.last)


def replayed(graph: fx.Graph, node: fx.Node, weights: set[fx.Node], copies: dict[fx.Node, fx.Node]) -> fx.Node:
    """Returns what `node` would be, were the softmax another; `copies` has what was copied already."""
    if node not in weights:
        return node
    if node not in copies:
        for n in node.all_input_nodes:
            replayed(graph, n, weights, copies)
        copies[node] = graph.node_copy(node, lambda n: copies.get(n, n))
    return copies[node]


def with_first(result: Any, first: Any) -> Any:
    """Returns `result`, a tuple, with another first element."""
    return first, *tuple(result)[1:]


fx.wrap("with_first")
