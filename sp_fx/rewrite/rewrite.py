"""The graph pass: every gating call becomes a dual-path call, and a report says so, place by place.

Requires: a capture, over modules in eval mode. Ensures: the same outputs, bit for bit; every gate that has a rule and a
temperature is a call of `dual_path` (or `multihead_attention`); what writes is as `out_of_place` leaves it, so that nothing
writes over what a gate has saved; the graph lints; each gating call of the model, rewritten or not, has one `Site` in the report.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx, nn

from ..analysis.attention import by_index, divided_later
from ..analysis.attention.probe import Shapes
from ..analysis.attention.uses import uses
from ..analysis.attention.weights import has_softmax
from ..analysis.facts import Facts
from ..analysis.written.gates import Written
from ..capture.capture import Capture
from ..capture.kept_functions import take_markers
from ..capture.passed import with_marks
from ..capture.tracing.regions import close_regions
from ..gates.rules import Rules, registered_kinds
from . import attention, decisions
from .account import Account
from .edits.written import Unshare
from .prepared.computed_twice import merge
from .prepared.out_of_place import normalise
from .report import Report
from .signal_path import mark_steering

Decision = Callable[[fx.Node, Facts, Account], bool]
ORDER: tuple[Decision, ...] = (  # the first that answers settles a node
    decisions.affine_leaf,
    decisions.constant,
    decisions.written_gate,
    decisions.regrouped,
    decisions.leaf,
    decisions.written_norm,
    attention.softmax,
    decisions.part,
    decisions.gate,
    decisions.no_rule,
    decisions.product,
    decisions.opaque,
)


Measure = Callable[[nn.Module, fx.Graph], Shapes]


@dataclass(frozen=True)
class Rewritten:
    """What a rewrite makes: the modules that the graph now uses, and what became of its gates; whether `undecided` softmaxes are
    attention for all that is known without shapes."""

    modules: nn.Module
    report: Report
    undecided: bool


def rewrite(model: str, capture: Capture, rules: Rules, measure: Measure | None = None) -> Rewritten:
    """Rewrite the captured graph of the model of that name in place.

    `measure` runs a graph, to say what shapes its nodes have; without one, attention is what may be it by its names.
    Whether `rules` fit the model (`Rules.check_places`, `Rules.check_scales`) is for the caller to ask of the report, since
    another capture may have other places.
    """
    graph = capture.graph
    notes = normalise(capture.modules, graph)
    merge(capture.modules, graph)
    facts = Facts(capture, take_markers(graph))
    asks = has_softmax(facts) or divided_later.may_be_in(facts) or by_index.may_be_in(facts)
    shapes = measure(capture.modules, graph) if measure is not None and asks else None
    by_index.find(facts, shapes)
    divided_later.find(facts, shapes)
    account = Account(facts, rules, uses(facts, shapes))
    nodes = list(graph.nodes)
    for node, pattern in facts.patterns.items():
        if isinstance(pattern, Written) and len(facts.view.private(pattern.inside, node)) < len(pattern.inside):
            account.apply(Unshare(node, pattern))
    for node in nodes:
        called = node.op in ("call_module", "call_function", "call_method")
        if called and node not in account.rewriting.instead and not facts.is_identity(node):
            any(decision(node, facts, account) for decision in ORDER)
    sites = mark_steering(facts, account.sites, account.nodes, account.rewriting.passing)
    modules = with_marks(capture.modules, account.rewriting.opened)
    close_regions(modules, graph)
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        # An export leaves out the copy of `contiguous` where the example needs none. An attention whose mask requires grad
        # returns its values in another layout (torch 2.11); nothing is written in place any more, so that a copy will do.
        node.target = torch.ops.aten.reshape.default
    graph.lint()
    kinds = {site.kind for site in sites}
    if unmet := [name for name in registered_kinds() if name not in kinds]:
        notes.append(f"registered, and not met in this model: {', '.join(unmet)}")
    if rules == Rules.frozen() and (left := [site for site in sites if site.status != "rewritten" and not site.idle]):
        names = ", ".join(sorted({site.op for site in left}))
        notes.append(f"not frozen are {len(left)} calls that have no gate, and keep their derivative: {names}")
    report = Report(model, rules, sites, capture.tracer, (*capture.notes, *notes), capture.inputs)
    return Rewritten(modules, report, bool(facts.undecided))
