"""What becomes of a softmax: attention, whose weights are constants; of a classifier or a router, which keeps its derivative."""

from __future__ import annotations

from typing import Any

from torch import fx

from ..analysis.attention import is_softmax, mixing, verdict, weights_of
from ..analysis.calls import keywords, op_of
from ..analysis.facts import Facts
from ..analysis.readers import SOFTMAX
from ..analysis.written.softmax import Softmax
from .account import Account
from .edits import FreezeSoftmax
from .report import WRITTEN_OUT

ALONE = "a softmax that multiplies no values"  # but by what it is summed up to
ELSEWHERE = "a softmax whose products are not summed up along its axis"


def softmax(node: fx.Node, facts: Facts, account: Account) -> bool:
    """A softmax, by torch's own call or written out."""
    softmax, refusal = softmax_of(node, facts)
    if softmax is None:
        if refusal:
            account.note(node, "NOT REWRITTEN", refusal)
        return bool(refusal)
    written = node in facts.patterns
    weights = weights_of(node, facts)
    found = verdict(node, softmax.dim, weights, facts, account.shapes)
    if found != "attention":
        account.note(node, "kept", ALONE if found == "alone" else ELSEWHERE)
    elif (tau := account.gate(node, "attention")) is not None:
        rows = {p: mixing(p, weights.passing, facts) for p in weights.products}
        plain = {p: form for p, form in rows.items() if form is not None and form[0] not in weights.gated}
        dtype = None if written else dtype_of(node)
        account.apply(FreezeSoftmax(node, softmax, written, dtype, weights, plain, tau))
    if written and len(softmax.inside) > 1:
        account.amend(op=f"{facts.op(node)}{WRITTEN_OUT}")
    return True


def has_softmax(facts: Facts) -> bool:
    """Whether any node of a graph is a softmax."""
    return any(is_softmax(node, facts) for node in facts.graph.nodes)


def softmax_of(node: fx.Node, facts: Facts) -> tuple[Softmax | None, str]:
    """Returns the softmax that a node closes; or, of one with arguments that cannot be read, why."""
    if isinstance(pattern := facts.patterns.get(node), Softmax):
        return pattern, ""
    reader = SOFTMAX.get(op_of(node))
    if reader is None:
        return None, ""
    try:
        scores, dim, *_ = reader(*node.args, **keywords(node))
    except TypeError as error:
        return None, f"its arguments are not constants of the graph: {error}"
    if dim is None:
        return None, "softmax without a dim"
    return Softmax(scores, dim, (node,)), ""


def dtype_of(node: fx.Node) -> Any:
    """Returns the dtype that a call of torch's softmax computes in, where it names one."""
    return SOFTMAX[op_of(node)](*node.args, **keywords(node))[2]
