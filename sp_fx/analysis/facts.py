"""Facts: what is known of a captured graph. Nothing here changes it.

The attributes are computed once, before any edit, of a graph whose calls in place are normalised (`rewrite/out_of_place.py`).
The methods answer for the graph as the edits so far have left it: `maker` of a product's factor is the row of a gate, once that
gate is a dual-path call.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx, nn

from ..capture.capture import Capture
from ..capture.kept_functions import Marked
from ..capture.passed import lets_through, operands
from ..gates.dual_path import dual_path
from .aliasing import Aliasing
from .calls import is_multiplication, masks_of, name_of
from .ops import ACTIVATIONS, COMPARISONS, LOGICAL, MULTIPLES, SHAPES, SHARES
from .registered_gates import marked_gate, registered_gate
from .written_gates import Graph, Written, written_gate
from .written_norms import Statistic, written_norm


class Facts:
    """Of one captured graph, with the gates that an export has marked in it as `registered`.

    Attributes:
        varying: the nodes whose values depend on the values of the inputs, and not on their shapes alone.
        patterns: the gates and norms that the model writes out itself or has registered, by the node that closes them.
        parts: the nodes inside such a pattern, and the node that closes it.
        aliasing: whose storage a node may share.
    """

    def __init__(self, capture: Capture, registered: Sequence[Marked] = ()) -> None:
        self.modules, self.graph = capture.modules, capture.graph
        self.aliasing = Aliasing(self.modules, self.graph)
        self.varying: set[fx.Node] = set()
        self.patterns: dict[fx.Node, Written | Statistic] = {}
        self.parts: dict[fx.Node, fx.Node] = {}
        self._find_varying()
        self._find_registered(registered)
        self._find_patterns()

    # -- computed once

    def _find_varying(self) -> None:
        for node in self.graph.nodes:
            name = "" if node.op == "call_module" else node.args[1] if node.target is getattr else name_of(node)
            if node.op == "placeholder" or (name not in SHAPES and self.varying_inputs(node)):
                self.varying.add(node)

    def _find_registered(self, registered: Sequence[Marked]) -> None:
        for marked in registered:
            self.patterns[marked.output] = marked_gate(marked)
            self.parts |= {n: marked.output for n in marked.inside if n is not marked.output}
        for node in self.graph.nodes:  # a registered module that ends in a registered function is the module's gate
            if node in self.patterns or self.is_identity(node):
                continue
            if (gate := registered_gate(node, self.leaf(node))) is not None:
                self.patterns[node] = gate

    def _find_patterns(self) -> None:
        view = Graph(self.varying.__contains__, self.is_identity, self.modules)
        for node in self.graph.nodes:
            if node not in self.varying or node in self.parts or node in self.patterns:
                continue
            gate = written_gate(view, node)
            if gate is not None and not (set(gate.inside) & set(self.parts)) and self._separable(gate, node):
                self.patterns[node] = gate
                self.parts |= {n: node for n in gate.inside if n is not node}
            elif (norm := written_norm(view, node)) is not None:
                self.patterns[node] = norm
                self.parts |= {n: node for n in norm.inside if n not in self.patterns}

    def _separable(self, gate: Written, node: fx.Node) -> bool:
        """Whether what is inside a written gate is used nowhere else."""
        return all(user in gate.inside or self.is_identity(user) for n in gate.inside if n is not node for user in n.users)

    # -- what a node calls

    def leaf(self, node: fx.Node) -> nn.Module | None:
        """Returns the module that `node` calls, if it calls one."""
        return self.modules.get_submodule(str(node.target)) if node.op == "call_module" else None

    def is_identity(self, node: fx.Node) -> bool:
        """Whether `node` is the mark of a module that the trace went through."""
        return (leaf := self.leaf(node)) is not None and lets_through(leaf)

    def op(self, node: fx.Node) -> str:
        """Returns the op's plain name, or the class of the module that `node` calls: "relu", "Conv2d"."""
        return name_of(node) if (leaf := self.leaf(node)) is None else type(leaf).__name__

    # -- where its inputs come from

    def varies(self, node: object) -> bool:
        """Whether `node` depends on the values of the inputs. What an edit has inserted since is taken to,
        but for the tensors that it reads off the modules."""
        inserted = isinstance(node, fx.Node) and node not in self.aliasing.position and node.op != "get_attr"
        return node in self.varying or inserted

    def varying_inputs(self, node: fx.Node) -> list[fx.Node]:
        return [n for n in operands(node, self.is_identity) if self.varies(n)]

    def has_weights(self, node: fx.Node) -> bool:
        """Whether weights of the model had a part in `node`."""
        seen, queue = set(), [node]
        while queue:
            at = queue.pop()
            if at.op == "get_attr" or (at.op == "call_module" and not self.is_identity(at)):
                return True
            inputs = operands(at, self.is_identity)
            queue += [n for n in inputs if n not in seen]
            seen.update(inputs)
        return False

    def chooses_by_comparison(self, node: fx.Node) -> bool:
        """Whether `node` chooses by a mask that the model makes by comparing what its weights had a part in, as
        `torch.where(h > t, a, b)` does. Masks that are made of inputs alone are the caller's, as those of token ids are."""
        return any(map(self._compares, masks_of(node)))

    def _compares(self, mask: object) -> bool:
        while isinstance(mask, fx.Node) and self.varies(mask) and name_of(mask) not in COMPARISONS:
            inputs = self.varying_inputs(mask)
            if not inputs or not (self.aliasing.is_view(mask) or name_of(mask) in LOGICAL):
                return False
            mask = inputs[0]
        return isinstance(mask, fx.Node) and self.varies(mask) and self.has_weights(mask)

    def gating_factors(self, node: fx.Node) -> list[fx.Node]:
        """Returns the factors of a product that are gates: those made by a sigmoid and its like, or where there is none, by an
        activation. For example `s` in `x * s` after `s = torch.sigmoid(h).view(-1, c, 1, 1)`."""
        if not is_multiplication(node):
            return []
        makers = {n: self.maker(n) for n in self.varying_inputs(node)}
        shares = [n for n, name in makers.items() if name in SHARES]
        return shares or [n for n, name in makers.items() if name in ACTIVATIONS]

    def maker(self, node: fx.Node) -> str:
        """Returns the name of the call that made `node`, back through views and multiples; of a dual-path call, its row."""
        while node.target is not dual_path:
            inputs = self.varying_inputs(node)
            name = name_of(node) if node.op in ("call_function", "call_method") else ""
            if not inputs or not (self.aliasing.is_view(node) or (name in MULTIPLES and len(inputs) == 1)):
                return name
            node = inputs[0]
        return str(node.kwargs.get("row", node.args[0]))
