"""Facts: what is known of a captured graph. Nothing here changes it.

The attributes are computed once, before any edit, of a graph that is made ready for a rewrite (`rewrite/prepared/`). The methods
answer for the graph as the edits so far have left it: `maker` of a product's factor is the row of a gate, once that gate is a
dual-path call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx, nn

from ..capture.capture import Capture
from ..capture.kept_functions import Marked
from ..capture.passed import lets_through, operands
from ..gates.adjoints import smooth
from ..gates.dual_path import dual_path
from .aliasing import Aliasing
from .calls import is_multiplication, name_of
from .ops import ACTIVATIONS, BOUNDED, MULTIPLES, SHARES
from .registered_gates import marked_gate, registered_gate
from .signals import Signals
from .written.gates import Written, written_gates
from .written.graph import Graph
from .written.norms import Statistic, written_norm
from .written.products import Product, is_product, regrouped
from .written.softmax import Axes, Softmax, written_log_softmax, written_softmax

Pattern = Written | Product | Statistic | Softmax


class Facts:
    """Of one captured graph, with the gates that an export has marked in it as `registered`.

    Attributes:
        varying: the nodes whose values depend on the values of the inputs, and not on their shapes alone.
        signals: those of them that a derivative reaches; `choosing` those that are whole numbers or masks, made of what the
            model computed; `complex` those that are complex numbers, `whole` those that are known to be whole numbers or masks.
        patterns: the functions that the model writes out itself or has registered, by the node that closes them.
        parts: the nodes inside such a pattern, and the node that closes it.
        logarithms: the logarithms of softmaxes that it writes out itself, and the axes of these.
        aliasing: whose storage a node may share.
        undecided: the softmaxes that may be attention, for all that is known without shapes.
        view: the graph as the readers of written functions see it.
    """

    def __init__(self, capture: Capture, registered: Sequence[Marked] = ()) -> None:
        self.modules, self.graph = capture.modules, capture.graph
        self.aliasing = Aliasing(self.modules, self.graph)
        signals = Signals(self.modules, self.graph, self.is_identity)
        self.varying, self.signals, self.choosing = signals.varying, signals.signals, signals.choosing
        self.complex, self.whole = signals.complex, signals.whole
        self.view = Graph(self.modules, self.is_identity, self.varying, self.signals, self.complex)
        self.patterns: dict[fx.Node, Pattern] = {}
        self.parts: dict[fx.Node, fx.Node] = {}
        self.logarithms: dict[fx.Node, Axes] = {}
        self.undecided: set[fx.Node] = set()
        self._find_registered(registered)
        self._find_written()

    # -- computed once

    def _find_registered(self, registered: Sequence[Marked]) -> None:
        for marked in registered:
            self.patterns[marked.output] = marked_gate(marked)
            self.parts |= {n: marked.output for n in marked.inside if n is not marked.output}
        for node in self.graph.nodes:  # a registered module that ends in a registered function is the module's gate
            if node in self.patterns or self.is_identity(node):
                continue
            if (gate := registered_gate(node, self.leaf(node))) is not None:
                self.patterns[node] = gate

    def _find_written(self) -> None:
        nodes = [node for node in self.graph.nodes if node in self.varying]
        order = {node: position for position, node in enumerate(nodes)}
        for node in nodes:
            if (softmax := written_softmax(self.view, node, order)) is not None:
                self.patterns[node] = softmax
                self.parts |= {n: node for n in self.view.private(softmax.inside, node) if n is not node}
            elif (softmax := written_log_softmax(self.view, node, order)) is not None:
                self.logarithms[node] = softmax.dims
        gates = written_gates(self.view, nodes, {*self.parts, *self.patterns})
        self.patterns |= gates
        for node, gate in gates.items():
            self.parts |= {n: node for n in self.view.private(gate.inside, node) if n is not node}
        for node in reversed(nodes):
            if node not in self.parts and node not in self.patterns and is_product(self.view, node):
                self._find_product(node, order)
        for node in nodes:
            if node in self.parts or node in self.patterns:
                continue
            if (norm := written_norm(self.view, node)) is not None:
                self.patterns[node] = norm
                self.parts |= {n: node for n in norm.inside if n not in self.patterns and n not in self.parts}

    def _find_product(self, node: fx.Node, order: Mapping[fx.Node, int]) -> None:
        product = regrouped(self.view, node, {*self.parts, *self.patterns})
        if product is not None:
            self.patterns[node] = product
            made_by = {n for gate, _ in product.gates for n in gate.inside}
            inside = sorted({*product.products, *made_by}, key=order.__getitem__)
            self.parts |= {n: node for n in self.view.private(inside, node) if n is not node}

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
        return node in self.varying or self.is_inserted(node)

    def is_signal(self, node: object) -> bool:
        """Whether a derivative reaches `node`."""
        return node in self.signals or self.is_inserted(node)

    def is_inserted(self, node: object) -> bool:
        """Whether an edit has made `node`."""
        return isinstance(node, fx.Node) and node not in self.aliasing.position and node.op != "get_attr"

    def varying_inputs(self, node: fx.Node) -> list[fx.Node]:
        return [n for n in operands(node, self.is_identity) if self.varies(n)]

    def signal_inputs(self, node: fx.Node) -> list[fx.Node]:
        return [n for n in operands(node, self.is_identity) if self.is_signal(n)]

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

    def is_chosen(self, node: fx.Node) -> bool:
        """Whether what `node` takes is chosen by a comparison of what the model computed, as by `torch.where(h > t, a, b)`,
        `h[h < 0] = 0` and `h.gather(1, h.argsort(1))`. Masks that are made of inputs alone are the caller's."""
        return node not in self.choosing and any(n in self.choosing for n in operands(node, self.is_identity))

    def gating_factors(self, node: fx.Node) -> list[fx.Node]:
        """Returns the factors of a product that are gates: those made by a sigmoid and its like, or where there is none, by an
        activation. For example `s` in `x * s` after `s = torch.sigmoid(h).view(-1, c, 1, 1)`."""
        if not is_multiplication(node):
            return []
        return gates_among({n: self.maker(n) for n in self.signal_inputs(node)})

    def maker(self, node: fx.Node) -> str:
        """Returns the name of the call that made `node`, back through views and multiples; of a dual-path call, its row; of a
        function that is written out, its kind."""
        while node.target is not dual_path:
            if isinstance(written := self.patterns.get(node), Written) and not written.through:
                return written.kind
            if isinstance(written, Softmax):
                return "softmax"
            inputs = self.signal_inputs(node)  # a mask that comes with the call, as of padding, is a constant of its factor
            name = name_of(node) if node.op in ("call_function", "call_method") else ""
            if not inputs or not (self.aliasing.is_view(node) or (name in MULTIPLES and len(inputs) == 1)):
                return name
            node = inputs[0]
        return "add" if node.kwargs.get("through") else str(node.kwargs.get("row", node.args[0]))


def gates_among(makers: Mapping[Any, str]) -> list[Any]:
    """Returns the factors of a product that are gates, of all by the names of what made them."""
    shares = [n for n, name in makers.items() if name in SHARES]
    activations = [n for n, name in makers.items() if name in ACTIVATIONS or name in smooth.ROWS]  # quick_gelu has no op
    return shares or [n for n in activations if makers[n] not in BOUNDED] or activations
