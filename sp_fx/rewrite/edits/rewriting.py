"""A graph while edits are applied to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal

from torch import fx, nn

from ...analysis.calls import known, name_of, op_of
from ...analysis.facts import Facts
from ...analysis.ops import CARRIES, SAME_CHANNELS, SAME_VALUES
from ...analysis.readers import Gate
from ...analysis.written.gates import Written
from ...capture.passed import Passed
from ...gates.adjoints.row import FROZEN, Soft, Temperature
from ...gates.dual_path import dual_path
from ...gates.scale import moments_of_norm
from ..batch_norm import Behind, norm_before

Softness = Soft | Literal["frozen", "smooth"]  # of a call that is rewritten


class Rewriting:
    """A graph while edits are applied to it.

    Attributes:
        instead: for a node that was replaced, what its users read now.
        passing: for a call of the captured graph, the node through which its signal passes now.
        copies: the calls that were made again, with tempered weights.
        unshared: the gates that are written out with calls of their own, by their last call.
        opened: the paths of leaves whose calls are written out, and which are marks once all edits are applied.
    """

    def __init__(self, facts: Facts) -> None:
        self.facts, self.graph, self.modules = facts, facts.graph, facts.modules
        self.instead: dict[fx.Node, fx.Node] = {}
        self.passing: dict[fx.Node, fx.Node] = {}
        self.copies: set[fx.Node] = set()
        self.unshared: dict[fx.Node, Written] = {}
        self.opened: list[str] = []

    def dual_path(self, node: fx.Node, gate: Gate, at: Softness) -> fx.Node:
        """Returns a dual-path call in place of `node`."""
        fit: dict[str, Any] = {"tau": at if isinstance(at, str) else at.tau}
        tensors = gate.tensors
        if isinstance(at, Soft):
            fit |= {} if at.scale in (None, "absolute") else {"scale": at.scale}
            fit |= {"margin": at.margin} if at.margin else {}
            tensors = (*tensors, self.moments(tensors[0])) if at.scale == "batch_norm" else tensors
        soft = self.passing[node] = self.graph.call_function(dual_path, (gate.kind, *tensors), {**fit, **gate.args})
        soft.meta.update(node.meta)
        return soft

    def norm_before(self, node: object) -> Behind | None:
        """Returns the batch norm that made what `node` is, as `batch_norm.norm_before` does."""
        return norm_before(node, self.passes, self.number)

    def number(self, value: Any) -> float | None:
        """Returns the number that a constant is, of at most one axis: one of more may add axes to what it is multiplied with, and
        of constants that are made in the forward the axes are not known."""
        at = value
        while isinstance(at, fx.Node) and at.op == "call_function" and name_of(at) in SAME_CHANNELS | SAME_VALUES - CARRIES:
            at = at.all_input_nodes[0]
        stored = isinstance(at, fx.Node) and at.op == "get_attr" and self.facts.view.attribute(at).dim() <= 1
        return self.facts.view.fixed_number(value) if stored or not isinstance(value, fx.Node) else None

    def passes(self, node: fx.Node) -> bool:
        """Whether a call of the graph as it is now gives each channel the numbers that it got."""
        if node.op != "call_module":
            name, trained = name_of(node), node.kwargs.get("training", True)
            if "dropout" in name and (node.args[2] if len(node.args) > 2 else trained):
                return False
            return name in SAME_CHANNELS and (node.op == "call_method" or known(op_of(node)))
        module = self.modules.get_submodule(str(node.target))
        return str(node.target) in self.opened or isinstance(module, Passed | nn.Identity | nn.modules.dropout._DropoutNd)

    def moments(self, node: object) -> fx.Node:
        """Returns a call of what the batch norm before a gate, whose pre-activation `node` is, says of its channels."""
        found = self.norm_before(node)
        assert found is not None
        line: dict[str, Any] = {} if (found.factor, found.shift) == (1.0, 0.0) else {"factor": found.factor, "shift": found.shift}
        return self.graph.call_function(moments_of_norm, (*found.norm.args[3:], found.norm.kwargs["eps"]), line)

    def surrogate(self, node: fx.Node, soft: fx.Node, tau: Temperature = FROZEN) -> fx.Node:
        """Returns a call that gives what `node` does and goes back through `soft`, which stands behind it: at the temperature
        `tau` of the attention that it is a part of."""
        users = [user for user in node.users if user is not soft]
        with self.graph.inserting_before(soft.next):
            exact = self.graph.call_function(dual_path, ("surrogate", node, soft), {"tau": tau})
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
