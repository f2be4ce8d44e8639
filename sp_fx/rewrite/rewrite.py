"""The graph pass: every gating call becomes a dual-path call, and a report says so, place by place.

Requires: a capture, over modules in eval mode. Ensures: the same outputs, bit for bit; every gate that has a rule and a
temperature is a call of `dual_path` (or `multihead_attention`); what writes is as `out_of_place` leaves it, so that nothing
writes over what a gate has saved; the graph lints; each gating call of the model, rewritten or not, has one `Site` in the report.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx, nn

from ..analysis.facts import Facts
from ..capture.capture import Capture
from ..capture.kept_functions import take_markers
from ..capture.passed import with_marks
from ..capture.tracing.regions import close_regions
from ..gates.rules import Rules
from . import attention, decisions
from .account import Account
from .out_of_place import normalise
from .report import Report
from .signal_path import mark_steering

Decision = Callable[[fx.Node, Facts, Account], bool]
ORDER: tuple[Decision, ...] = (  # the first that answers settles a node
    decisions.affine_leaf,
    decisions.constant,
    decisions.written_gate,
    decisions.leaf,
    decisions.written_norm,
    decisions.part,
    attention.softmax,
    decisions.gate,
    decisions.no_rule,
    decisions.product,
    decisions.opaque,
)


def rewrite(model: str, capture: Capture, rules: Rules) -> tuple[nn.Module, Report]:
    """Rewrite the captured graph of the model of that name in place; returns the modules that it now uses, and what became of its
    gates.

    Whether `rules` fit the model (`Rules.check_places`, `Rules.check_scales`) is for the caller to ask of the report, since
    another capture may have other places.
    """
    graph = capture.graph
    notes = normalise(capture.modules, graph)
    facts = Facts(capture, take_markers(graph))
    account = Account(facts, rules)
    for node in list(graph.nodes):
        called = node.op in ("call_module", "call_function", "call_method")
        if called and node not in account.rewriting.instead and not facts.is_identity(node):
            any(decision(node, facts, account) for decision in ORDER)
    sites = mark_steering(facts, account.sites, account.nodes, account.rewriting.passing)
    modules = with_marks(capture.modules, account.rewriting.opened)
    close_regions(modules, graph)
    graph.lint()
    report = Report(model, rules, sites, capture.tracer, (*capture.notes, *notes))
    return modules, report
