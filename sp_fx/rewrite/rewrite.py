"""The graph pass: every gating call becomes a dual-path call, and a report says so, place by place.

Requires: a graph from `capture`, over modules in eval mode. Ensures: the same outputs, bit for bit; every gate that has a rule
and a temperature is a call of `dual_path` (or `multihead_attention`); no rewritten gate works in place, and nothing writes
over what one has saved; the graph lints; each gating call of the model, rewritten or not, has one `Site` in the report.
"""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from ..analysis.aliasing import Storage
from ..analysis.calls import AFFINE_MODULES, AFFINE_ROWS, is_affine_row, keywords, known, name_of, op_of, writes
from ..analysis.ops import (
    ACTIVATIONS,
    CELLS,
    CHOICES,
    COMPARISONS,
    COMPLEX,
    FACTORS,
    FUSED,
    INDICES,
    LOGICAL,
    MULTIPLES,
    PIECEWISE,
    PRODUCT,
    QUOTIENT,
    RECURRENT,
    SHAPES,
    SHARES,
    SMOOTH,
)
from ..analysis.readers.attention import SOFTMAX
from ..analysis.readers.reader import READERS, Gate, Unread
from ..analysis.registered import registered_gate, unmark
from ..analysis.sample_axis import Axis, sample_axis
from ..analysis.written_gates import Graph, Written, written_gate
from ..analysis.written_norms import Statistic, written_norm
from ..capture.capture import Capture
from ..capture.clone import lets_through, passes
from ..gates.adjoints.attention import nothing
from ..gates.adjoints.row import FROZEN, Temperature
from ..gates.dual import dual_path
from ..gates.multihead import multihead_attention
from ..gates.rules import KINDS, Rules
from ..gates.table import TABLE, rule_of
from .attention import freeze_softmax, products_of
from .report import Report, Site, Status


def rewrite(model: str, capture: Capture, rules: Rules) -> Report:
    """Rewrite the captured graph of the model of that name in place; returns what became of its gates.

    Whether `rules` fit the model (`Rules.check_places`, `Rules.check_scales`) is for the caller to ask of the report, since
    another capture may have other places.
    """
    graph = capture.graph
    run = Pass(capture.modules, graph, rules)
    run.read_patterns()
    for node in list(graph.nodes):
        run.visit(node)
    for leaf in run.opened:
        leaf.__dict__["forward"] = passes
    run.notes += run.storage.protect()
    run.mark_steering()
    graph.lint()
    return Report(model, rules, tuple(run.sites), capture.tracer, (*capture.notes, *run.notes))


class Pass:
    """One run over one graph."""

    def __init__(self, modules: nn.Module, graph: fx.Graph, rules: Rules) -> None:
        self.modules, self.graph, self.rules = modules, graph, rules
        self.sites: list[Site] = []
        self.notes: list[str] = []
        self.nodes: list[fx.Node] = []  # one for each site; `moved` has what stands in its place
        self.moved: dict[fx.Node, fx.Node] = {}
        self.instead: dict[fx.Node, fx.Node] = {}  # what the users of an erased node read now
        self.patterns: dict[fx.Node, Written | Statistic] = {}
        self.parts: dict[fx.Node, fx.Node] = {}  # calls inside a gate that is written out, and the one that closes it
        self.calls: Counter[str] = Counter()
        self.opened: list[nn.Module] = []  # leaves whose calls are written out, and which are identities once all of them are
        self.storage = Storage(modules, graph)
        self.varying: set[fx.Node] = set()  # what depends on the values of the input, not on its shape
        self.axes: dict[fx.Node, Axis] = {}  # where each of them has the sample
        self.entering: dict[fx.Node, Axis] = {}  # and where its first input has it
        for node in graph.nodes:
            name = "" if node.op == "call_module" else node.args[1] if node.target is getattr else name_of(node)
            if node.op == "placeholder" or (name not in SHAPES and any(n in self.varying for n in node.all_input_nodes)):
                self.varying.add(node)
                self.axes[node] = sample_axis(node, self.axes, name_of, self.called, self.constant_shape)
                self.entering[node] = next((self.axes[n] for n in node.all_input_nodes if n in self.axes), None)

    # -- facts about nodes

    def module(self, node: fx.Node) -> nn.Module:
        return self.modules.get_submodule(str(node.target))

    def passes(self, node: fx.Node) -> bool:
        return node.op == "call_module" and lets_through(self.module(node))

    def called(self, node: fx.Node) -> nn.Module | None:
        """The leaf that a node calls, if it is no identity."""
        return None if self.passes(node) else self.leaf(node)

    def constant_shape(self, node: fx.Node) -> torch.Size | None:
        held = operator.attrgetter(str(node.target))(self.modules) if node.op == "get_attr" else node.meta.get("val")
        return held.shape if isinstance(held, torch.Tensor) else None

    def op(self, node: fx.Node) -> str:
        return type(self.module(node)).__name__ if node.op == "call_module" else name_of(node)

    def place(self, node: fx.Node) -> str:
        """A module's path for its own call; for a function called in a module, the path and the function's name."""
        path, module = next(reversed(node.meta.get("nn_module_stack", {"": ("", None)}).values()))
        if node.op == "call_module":
            place = str(node.target)
        elif module is not None and module.__module__.startswith("torch.nn.") and not issubclass(module, nn.Sequential):
            place = path
        else:
            place = f"{path}.{name_of(node)}".lstrip(".")
        self.calls[place] += 1
        node.meta["place"] = place if self.calls[place] == 1 else f"{place}#{self.calls[place]}"
        return node.meta["place"]

    # -- the pass

    def read_patterns(self) -> None:
        for node in list(self.graph.nodes):
            if (marked := unmark(node)) is not None:
                y, gate = marked
                self.patterns[y] = gate
                self.parts |= {n: y for n in gate.inside if n is not y}
            elif (called := registered_gate(node, self.leaf(node))) is not None and not self.passes(node):
                self.patterns[node] = called
        graph = Graph(name_of, self.varying.__contains__, self.passes, self.modules)
        for node in self.graph.nodes:
            if node not in self.varying or node in self.parts or node in self.patterns:
                continue
            found = written_gate(graph, node)
            if found is not None and not (set(found.inside) & set(self.parts)) and self.separable(found, node):
                self.patterns[node] = found
                self.parts |= {n: node for n in found.inside if n is not node}
            elif (norm := written_norm(graph, node)) is not None:
                self.patterns[node] = norm
                self.parts |= {n: node for n in norm.inside if n not in self.patterns}

    def separable(self, gate: Written, node: fx.Node) -> bool:
        """Whether what is inside a written gate is used nowhere else, and writes over nothing that is read afterwards."""
        used = all(user in gate.inside or self.passes(user) for n in gate.inside if n is not node for user in n.users)
        if not any(map(writes, gate.inside)):
            return used
        first = min(gate.inside, key=self.storage.position.__getitem__)
        later = self.storage.later_readers(gate.source, first, gate.inside)
        return used and all(user in gate.inside for user in later)

    def visit(self, node: fx.Node) -> None:
        if node.op not in ("call_module", "call_function", "call_method") or self.passes(node):
            return
        if node not in self.patterns and (leaf := self.leaf(node)) is not None and is_affine_row(leaf):
            self.replace_affine(node, leaf)  # of constants too: a leaf is opened for all of its calls
            return
        if node not in self.varying:
            return
        if isinstance(pattern := self.patterns.get(node), Written):
            self.visit_written(node, pattern)
            return
        if node.op == "call_module":
            self.visit_leaf(node, self.module(node))
            return
        target = op_of(node)
        if isinstance(pattern, Statistic):
            self.visit_norm(node, pattern)
        elif node in self.parts:
            if target in READERS:
                self.note(node, "kept", f"part of the {self.patterns[self.parts[node]].kind} written out here")
        elif target in SOFTMAX:
            self.visit_softmax(node, SOFTMAX[target])
        elif target in READERS:
            self.visit_gate(node, READERS[target])
        elif (name := name_of(node)) in CELLS:
            self.note(node, "NOT REWRITTEN", RECURRENT)
        elif name in PIECEWISE and (name not in INDICES or any(map(self.weighed, node.all_input_nodes))):
            self.note(node, "NOT REWRITTEN", f"{name} chooses by value and has no rule")
        elif name in SMOOTH:
            self.note(node, "kept", "smooth, no gate")
        elif any(map(self.by_comparison, self.masks(node))):
            self.note(node, "NOT REWRITTEN", "chooses by comparing what the model computed, and has no rule")
        elif name in PRODUCT | QUOTIENT and sum(n in self.varying for n in node.all_input_nodes) > 1:
            factors = self.factors(node) if name in FACTORS else []
            if len(factors) == 1:
                self.visit_product(node, factors[0])
            else:
                self.note(node, "kept", "product rule" if name in PRODUCT else "quotient rule")
        elif node.op == "call_function" and (name in FUSED or not known(target)):
            self.note(node, "NOT REWRITTEN", f"{name} is opaque to the trace and may hold gates", opaque=True)

    @staticmethod
    def masks(node: fx.Node) -> list[Any]:
        """The arguments of a call that may choose between others."""
        name = name_of(node)
        if name in CHOICES:
            return [node.args[0 if name == "where" and node.op == "call_function" else 1]] if len(node.args) > 1 else []
        return list(node.args[:2]) if name in FACTORS else []

    def by_comparison(self, node: Any) -> bool:
        """Whether a mask is made by comparing what the model's weights had a part in: masks made of inputs alone are the
        caller's, as those of token ids are."""
        while isinstance(node, fx.Node) and node in self.varying and name_of(node) not in COMPARISONS:
            inputs = [n for n in node.all_input_nodes if n in self.varying]
            if not inputs or not (self.storage.is_view(node) or name_of(node) in LOGICAL):
                return False
            node = inputs[0]
        return isinstance(node, fx.Node) and node in self.varying and self.weighed(node)

    def weighed(self, node: fx.Node) -> bool:
        """Whether weights of the model had a part in `node`."""
        seen, queue = set(), [node]
        while queue:
            at = queue.pop()
            if at.op == "get_attr" or (at.op == "call_module" and not self.passes(at)):
                return True
            queue += [n for n in at.all_input_nodes if n not in seen]
            seen.update(at.all_input_nodes)
        return False

    def note(self, node: fx.Node, status: Status, reason: str, opaque: bool = False) -> None:
        self.sites.append(Site(self.place(node), self.op(node), "", status, None, reason, opaque=opaque))
        self.nodes.append(node)

    def visit_leaf(self, node: fx.Node, leaf: nn.Module) -> None:
        if isinstance(leaf, nn.MultiheadAttention):
            tau = self.temperature(node, "attention")
            if tau is not None:
                self.replace_multihead(node, leaf, tau)
        elif isinstance(leaf, nn.RNNBase | nn.RNNCellBase):
            self.note(node, "NOT REWRITTEN", RECURRENT)
        elif not isinstance(leaf, AFFINE_MODULES):
            self.note(node, "NOT REWRITTEN", "a leaf of the trace that may hold gates", opaque=True)

    def temperature(self, node: fx.Node, kind: str) -> Temperature | None:
        """The rules' temperature for the gate at `node`, which gets its line in the report."""
        place = self.place(node)
        tau = self.rules.temperature(kind, place)
        status: Status = "kept" if tau is None else "rewritten"
        reason = "plain derivative, by the rules" if tau is None else ""
        scale = self.rules.scale_of(kind, place, tau)
        if scale == "sample" and not self.follows_sample(kind, self.op(node), self.entering.get(node)):
            # Across samples it would let one sample's map depend on the others of its batch.
            scale, reason = "absolute", "absolute, since axis 0 may not be the sample here: calibrate() measures a scale"
        self.sites.append(Site(place, self.op(node), kind, status, tau, reason, scale))
        self.nodes.append(node)
        return tau

    @staticmethod
    def follows_sample(kind: str, op: str, axis: Axis) -> bool:
        """Whether a gate's scale can be taken over each sample: its axis is the first, or can be moved there."""
        movable = kind in ("relu", "leaky_relu", "abs") or (op.startswith("max_pool") and axis == 1)
        return axis in (0, "rows") or (isinstance(axis, int) and movable)

    def visit_gate(self, node: fx.Node, reader: Any) -> None:
        try:
            gate = reader(*node.args, **keywords(node))
        except TypeError as error:  # a signature that the reader does not know, or arguments computed at run time
            gate = Unread(f"its arguments are not constants of the graph: {error}")
        if isinstance(gate, Gate) and gate.fixed:
            if sum(t in self.varying for t in gate.tensors) > 1:
                gate = Unread(f"{name_of(node)} of two things that both vary has no rule")
            elif gate.tensors[0] not in self.varying:
                gate = replace(gate, tensors=gate.tensors[::-1])
        if isinstance(gate, Unread):
            self.note(node, "NOT REWRITTEN", gate.reason)
        elif gate is not None and gate.kind == "abs" and self.made_by(node.all_input_nodes[0]).startswith(COMPLEX):
            self.note(node, "kept", "the modulus of a complex number, no gate")
        elif gate is not None and (rule := rule_of(gate.kind)) in KINDS:
            tau = self.temperature(node, rule)
            if tau is None and gate.kind == "glu":
                self.amend(reason="product rule")
            elif tau is not None and gate.first:
                self.put_dual_first(node, gate, tau)
            elif tau is not None:
                self.put_dual(node, gate, tau, self.sites[-1].scale)
        elif gate is not None and not any(t in self.varying for t in gate.tensors[1:]):
            self.put_dual(node, gate, FROZEN, "absolute")  # affine
        elif gate is not None:
            self.note(node, "kept", "product rule")  # its weights are computed from the input

    def put_dual(self, node: fx.Node, gate: Gate, tau: Temperature, scale: str | float) -> None:
        source = node.all_input_nodes[0]
        later = self.storage.later_readers(source, node) if writes(node) else []
        redirected = all(source in user.all_input_nodes for user in later) and not self.storage.is_view(source)
        with self.graph.inserting_before(node):
            if later and not redirected:  # views of what was written over are read afterwards: they must see it
                copy = self.graph.call_method("clone", (source,))
                gate = replace(gate, tensors=tuple(copy if t is source else t for t in gate.tensors))
            soft = self.dual(node, gate, tau, scale)
            result = self.graph.call_method("copy_", (source, soft)) if later and not redirected else soft
        self.supersede(node, result)
        for user in later if redirected else []:
            user.replace_input_with(source, result)
        self.graph.erase_node(node)

    def dual(self, node: fx.Node, gate: Gate, tau: Temperature, scale: str | float) -> fx.Node:
        """A dual-path call in place of `node`."""
        axis = self.entering.get(node)
        moved = axis if scale == "sample" and axis != "rows" else 0
        if isinstance(scale, float) and not isinstance(tau, str):
            tau = tau * scale
        fit = {"tau": tau, **({"scale": scale} if scale == "sample" else {})}
        first, *steering = gate.tensors
        if moved:
            first = self.graph.call_function(torch.movedim, (first, moved, 0))
            if gate.kind == "written":
                steering = [self.graph.call_function(torch.movedim, (steering[0], moved, 0))]
        soft = self.moved[node] = self.graph.call_function(dual_path, (gate.kind, first, *steering), {**fit, **gate.args})
        soft.meta.update(node.meta)
        result = self.graph.call_function(torch.movedim, (soft, 0, moved)) if moved else soft
        self.varying |= {soft, result}
        return result

    def supersede(self, node: fx.Node, by: fx.Node) -> None:
        node.replace_all_uses_with(by)
        self.instead[node] = by
        self.varying.add(by)

    def put_dual_first(self, node: fx.Node, gate: Gate, tau: Temperature) -> None:
        """A gate whose call returns indices too: they still come from that call."""
        with self.graph.inserting_before(node):
            soft = self.dual(node, gate, tau, self.sites[-1].scale)
        rest = []
        for user in list(node.users):
            index = user.args[1] if user.target in (operator.getitem, getattr) else None
            if index in (0, "values"):
                self.supersede(user, soft)
                self.graph.erase_node(user)
            elif index not in (1, "indices"):
                rest.append(user)
        if rest:
            with self.graph.inserting_after(node):
                both = self.graph.call_function(with_first, (node, soft))
            self.varying.add(both)
            for user in rest:
                user.replace_input_with(node, both)
        if not node.users:
            self.graph.erase_node(node)

    def visit_written(self, node: fx.Node, gate: Written) -> None:
        """The calls stay, cut off from the input; what they compute passes through a dual-path call that differentiates it."""
        tau = self.temperature(node, rule_of(gate.kind))
        if not TABLE[gate.kind].registered:
            self.amend(op=f"{name_of(node)}, written out")
        if gate.weights:
            reason = f"with {', '.join(gate.weights)} as it was at transform: after an update, transform again"
            self.amend(reason="; ".join(filter(None, (self.sites[-1].reason, reason))))
        if tau is None:
            return
        first, source = min(gate.inside, key=self.storage.position.__getitem__), self.instead.get(gate.source, gate.source)
        with self.graph.inserting_before(first):
            cut = self.graph.call_method("detach", (source,))
            if any(map(writes, gate.inside)):
                cut = self.graph.call_method("clone", (cut,))
        for n in gate.inside:
            n.replace_input_with(source, cut)
        users = list(node.users)
        with self.graph.inserting_before(node.next):
            args = {"row": gate.kind, "args": tuple(gate.args.items())}
            soft = self.dual(node, Gate("written", (source, node), args), tau, self.sites[-1].scale)
        for user in users:
            user.replace_input_with(node, soft)
        self.instead[node] = soft

    def visit_norm(self, node: fx.Node, norm: Statistic) -> None:
        """Its statistics become constants."""
        if self.temperature(node, norm.kind) is not None:
            for call, at in norm.constants:
                self.freeze(call, call.args[at])  # type: ignore[arg-type]
        self.amend(op=f"{name_of(node)}, written out")

    def visit_product(self, node: fx.Node, factor: fx.Node) -> None:
        """A signal times a gate."""
        if self.temperature(node, "product") is None:
            self.amend(reason="product rule")
        else:
            self.freeze(node, factor)

    def freeze(self, node: fx.Node, operand: fx.Node) -> None:
        with self.graph.inserting_before(node):
            constant = self.graph.call_method("detach", (operand,))
        self.varying.add(constant)
        node.replace_input_with(operand, constant)

    def factors(self, node: fx.Node) -> list[fx.Node]:
        """What among the factors of a product is a gate: a sigmoid and its like, or where there is none, an activation."""
        made_by = {n: self.made_by(n) for n in node.all_input_nodes if n in self.varying}
        shares = [n for n, name in made_by.items() if name in SHARES]
        return shares or [n for n, name in made_by.items() if name in ACTIVATIONS]

    def made_by(self, node: fx.Node) -> str:
        """The name of the call that made `node`, back through views and multiples; of a gate, its row."""
        while True:
            if node.target is dual_path:
                return str(node.kwargs.get("row", node.args[0]))
            inputs = [n for n in node.all_input_nodes if n in self.varying]
            name = name_of(node) if node.op in ("call_function", "call_method") else ""
            multiple = name in MULTIPLES and len(inputs) == 1
            if not inputs or not (self.storage.is_view(node) or multiple):
                return name
            node = inputs[0]

    def replace_affine(self, node: fx.Node, leaf: Any) -> None:
        """An affine leaf as its row of the table; the leaf stays as an identity that can be hooked."""
        kind, names, args = AFFINE_ROWS[type(leaf)]
        with self.graph.inserting_before(node):
            held = [None if getattr(leaf, n) is None else self.graph.get_attr(f"{node.target}.{n}") for n in names]
            soft = self.graph.call_function(dual_path, (kind, *node.args, *node.kwargs.values(), *held),
                                            {"tau": FROZEN, **{arg: getattr(leaf, arg) for arg in args}})  # fmt: skip
        soft.meta.update(node.meta)
        node.args, node.kwargs = (soft,), {}
        self.opened.append(leaf)

    def replace_multihead(self, node: fx.Node, leaf: nn.MultiheadAttention, tau: Temperature) -> None:
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "bias_k", "bias_v")
        with self.graph.inserting_before(node):
            weights = {name: getattr(leaf, name) for name in names}
            weights |= {"out_proj.weight": leaf.out_proj.weight, "out_proj.bias": leaf.out_proj.bias}
            held = {n: w if w is None else self.graph.get_attr(f"{node.target}.{n}") for n, w in weights.items()}
            given = {**dict(zip(inspect.signature(nn.MultiheadAttention.forward).parameters, (None, *node.args))), **node.kwargs}
            given.pop("self", None)
            inputs = tuple(given.pop(name) for name in ("query", "key", "value"))
            soft = self.moved[node] = self.graph.call_function(multihead_attention, inputs, {
                "weights": held, "num_heads": leaf.num_heads, "tau": tau, "batch_first": leaf.batch_first,
                "add_zero_attn": leaf.add_zero_attn, **given,
            })  # fmt: skip
        soft.meta.update(node.meta)
        self.supersede(node, soft)
        self.graph.erase_node(node)

    def visit_softmax(self, node: fx.Node, reader: Any) -> None:
        products, weights = products_of(self, node)
        if not products:
            self.note(node, "kept", "a softmax that multiplies no values")
            return
        try:
            read = reader(*node.args, **keywords(node))
        except TypeError as error:
            self.note(node, "NOT REWRITTEN", f"its arguments are not constants of the graph: {error}")
            return
        if read[1] is None:
            self.note(node, "NOT REWRITTEN", "softmax without a dim")
            return
        tau = self.temperature(node, "attention")
        if tau is not None:
            freeze_softmax(self, node, products, weights, read, tau)

    def amend(self, **changes: Any) -> None:
        self.sites[-1] = replace(self.sites[-1], **changes)

    def leaf(self, node: fx.Node) -> nn.Module | None:
        return self.module(node) if node.op == "call_module" else None

    def mark_steering(self) -> None:
        """Say so of sites through which no signal passes, since all that they make steers frozen gates or is held constant."""
        reached: set[fx.Node] = set()
        for node in reversed(self.graph.nodes):
            if node.op == "output" or node in reached:
                reached.update(receivers(node))
        for i, (site, node) in enumerate(zip(self.sites, self.nodes)):
            if self.moved.get(node, node) not in reached and not site.reason.startswith("part of"):
                status: Status = "kept" if site.status == "NOT REWRITTEN" else site.status
                self.sites[i] = replace(site, status=status, reason="steers a frozen gate: no signal passes here")


def with_first(result: Any, first: Any) -> Any:
    """`result` with another first element."""
    return first, *tuple(result)[1:]


fx.wrap("with_first")


def receivers(node: fx.Node) -> list[fx.Node]:
    """The inputs of `node` that get a cotangent from it."""
    if node.op != "call_module" and name_of(node) == "detach":
        return []
    if node.target is dual_path:
        row = TABLE[str(node.args[0])]
        at = node.args[1 + row.receives] if row.adjoint is not nothing else None
        return [at] if isinstance(at, fx.Node) else []
    if node.target is multihead_attention:
        return [node.args[2]]  # type: ignore[list-item]
    return node.all_input_nodes
