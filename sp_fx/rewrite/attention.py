"""What becomes of a softmax: attention, whose weights are constants; of a classifier or a router, which keeps its derivative."""

from __future__ import annotations

from typing import Any

from torch import fx

from ..analysis.attention.uses import mixing
from ..analysis.calls import keywords, op_of
from ..analysis.facts import Facts
from ..analysis.ops import LISTED
from ..analysis.readers import SOFTMAX
from .account import Account
from .edits.softmax import FreezeSoftmax
from .report import WRITTEN_OUT

ALONE = "a softmax that multiplies no values"  # but by what it is summed up to
ELSEWHERE = "a softmax whose products are not summed up along its axis"


def softmax(node: fx.Node, facts: Facts, account: Account) -> bool:
    """A softmax, by torch's own call or written out."""
    use = account.softmaxes.get(node)
    if use is None:
        return False
    if isinstance(use, str):
        account.note(node, "NOT REWRITTEN", use)
        return True
    written = node in facts.patterns
    if use.verdict != "attention":
        account.note(node, "kept", ALONE if use.verdict == "alone" else ELSEWHERE)
    elif (tau := account.gate(node, "attention")) is not None:
        rows = {p: mixing(p, use.weights.passing, facts) for p in use.weights.products}
        plain = {p: form for p, form in rows.items() if form is not None and form[0] not in use.weights.gated}
        dtype = None if written else dtype_of(node)
        account.weighed.update(use.weights.products)
        account.apply(FreezeSoftmax(node, use.softmax, written, dtype, use.weights, plain, tau))
    if written and facts.op(node) not in LISTED:
        account.amend(op=f"{facts.op(node)}{WRITTEN_OUT}")
    return True


def dtype_of(node: fx.Node) -> Any:
    """Returns the dtype that a call of torch's softmax computes in, where it names one."""
    return SOFTMAX[op_of(node)](*node.args, **keywords(node))[2]
