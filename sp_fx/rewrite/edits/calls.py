"""Edits of single calls."""

from __future__ import annotations

import inspect
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...analysis.calls import AFFINE_ROWS, name_of, recurrent_name
from ...analysis.ops import STATEFUL
from ...analysis.readers import Gate
from ...gates.adjoints.norms import frozen_cosine
from ...gates.adjoints.row import FROZEN, Temperature
from ...gates.dual_path import dual_path
from ...gates.modules.multihead import multihead_attention
from ...gates.modules.recurrent import recurrent
from .rewriting import Edit, Rewriting, Softness


@dataclass
class ReplaceCall(Edit):
    """The call `node` becomes a dual-path call of `gate`; where it returns indices too, these still come from the call."""

    node: fx.Node
    gate: Gate
    at: Softness

    def apply(self, to: Rewriting) -> None:
        if self.gate.first:
            self.replace_first(to)
        else:
            self.replace_all(to)

    def replace_all(self, to: Rewriting) -> None:
        with to.graph.inserting_before(self.node):
            soft = to.dual_path(self.node, self.gate, self.at)
        to.supersede(self.node, soft)

    def replace_first(self, to: Rewriting) -> None:
        node = self.node
        with to.graph.inserting_before(node):
            soft = to.dual_path(node, self.gate, self.at)
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
class Compete(Edit):
    """The maximum of two signals, or the minimum, becomes one over both, side by side: `v softmax((a, b) / tau)` is its way
    back."""

    node: fx.Node
    tensors: tuple[fx.Node, fx.Node]
    at: Softness
    sign: int

    def apply(self, to: Rewriting) -> None:
        graph, node = to.graph, self.node
        with graph.inserting_before(node):
            both = graph.call_function(side_by_side, self.tensors, {} if self.sign > 0 else {"sign": self.sign})
            soft = to.dual_path(node, Gate("amax", (both,), {"dim": (-1,), "keepdim": False}), self.at)
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
        options = {"tau": self.tau, **{arg: getattr(self.leaf, arg) for arg in args}}
        if options.get("padding") == "valid":
            options["padding"] = (0,) * len(options["stride"])
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
class Recur(Edit):
    """What an LSTM or a GRU returns goes back through the loop over its steps, whose gates are constants: of the module `leaf`,
    or of a call of torch's own op."""

    node: fx.Node
    leaf: nn.Module | None

    def apply(self, to: Rewriting) -> None:
        node, users = self.node, list(self.node.users)
        with to.graph.inserting_before(node):
            (inputs, state, weights), options = self.of_op() if self.leaf is None else self.of_leaf(to)
        name = name_of(node) if self.leaf is None else recurrent_name(self.leaf)
        options |= {"stateful": name in STATEFUL, "cell": name.endswith("_cell")}
        options |= {"autocast": node.meta["autocast"]} if node.meta.get("autocast") else {}
        with to.graph.inserting_after(node):
            soft = to.graph.call_function(recurrent, (node, inputs, state, weights), options)
        soft.meta.update(node.meta)
        node.meta.pop("place", None)
        for user in users:
            user.replace_input_with(node, soft)
        to.instead[node] = to.passing[node] = soft

    def of_leaf(self, to: Rewriting) -> tuple[tuple[Any, Any, list[Any]], dict[str, Any]]:
        leaf: Any = self.leaf
        arguments = {**dict(zip(("input", "hx"), self.node.args)), **self.node.kwargs}
        if isinstance(leaf, nn.RNNCellBase):
            names, options = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if leaf.bias else [])], {}
        else:
            names = list(leaf._flat_weights_names)
            options = {"layers": leaf.num_layers, "bidirectional": leaf.bidirectional, "batch_first": leaf.batch_first}
        weights = [to.graph.get_attr(f"{self.node.target}.{name}") for name in names]
        return (arguments["input"], arguments.get("hx"), weights), {"biases": leaf.bias, **options}

    def of_op(self) -> tuple[tuple[Any, Any, list[Any]], dict[str, Any]]:
        args = list[Any](self.node.args)
        if name_of(self.node).endswith("_cell"):
            inputs, state, *weights = args[:6]
            biases = len(weights) == 4 and weights[2] is not None
            return (inputs, state, weights if biases else weights[:2]), {"biases": biases}
        options: dict[str, Any] = {"flat": True}
        if isinstance(args[3], list | tuple):  # of packed data, whose steps have these many samples
            options["batch_sizes"] = args.pop(1)
        inputs, state, weights, biases, layers, _, _, bidirectional, *batch_first = args
        options |= {"biases": biases, "layers": layers, "bidirectional": bidirectional, "batch_first": batch_first == [True]}
        return (inputs, state, list(weights)), options


def side_by_side(a: Tensor, b: Tensor, sign: int = 1) -> Tensor:
    """`a` and `b`, times `sign`, along a new last axis."""
    both = torch.stack(torch.broadcast_tensors(a, b), -1)
    return both if sign == 1 else sign * both


def with_first(result: Any, first: Any) -> Any:
    """Returns `result`, a tuple, with another first element."""
    return first, *tuple(result)[1:]


fx.wrap("side_by_side")
fx.wrap("with_first")
