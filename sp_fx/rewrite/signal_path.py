"""Where the signal goes on its way back through a rewritten graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import fx

from ..analysis.facts import Facts
from ..analysis.ops import FORM, SHAPES
from ..analysis.signals import called
from ..capture.passed import operands
from ..gates.dual_path import dual_path, frozen
from ..gates.modules.multihead import multihead_attention
from ..gates.table import TABLE
from .report import PART, Site, Status

STEERS = "steers a frozen gate: no signal passes here"
STOPPED = "the model itself lets no derivative through behind it (detach, no_grad): no signal passes here"
COMPARED = "only compared, or rounded to whole numbers, behind it: no signal passes here"
UNUSED = "nothing that the output is made of reads it: no signal passes here"


def mark_steering(
    facts: Facts, sites: Sequence[Site], nodes: Sequence[fx.Node], passing: Mapping[fx.Node, fx.Node]
) -> tuple[Site, ...]:
    """Returns the `sites`, with a word on those that no signal passes, and why: since all that they make steers frozen gates or
    is held constant, as the activations of a squeeze-and-excite branch whose product is frozen; since the model stops derivatives
    there; since it is compared alone.

    `nodes` are the calls of the sites, `passing` says what stands in place of those that were replaced.
    """
    reached: set[fx.Node] = set()
    for node in reversed(facts.graph.nodes):
        if node.op == "output" or node in reached:
            reached.update(receivers(node, facts))
    marked = []
    for site, node in zip(sites, nodes):
        if (now := passing.get(node, node)) not in reached and not site.reason.startswith(PART):
            status: Status = "kept" if site.status == "NOT REWRITTEN" else site.status
            site = replace(site, status=status, reason=why_not(now, facts))
        marked.append(site)
    return tuple(marked)


def why_not(node: fx.Node, facts: Facts) -> str:
    """Says what keeps the signal from `node`: of several things, the first of those above."""
    seen, queue, obstacles = {node}, [node], set[str]()
    while queue:
        at = queue.pop()
        for user in at.users:
            if at in receivers(user, facts):
                if user not in seen:
                    seen.add(user)
                    queue.append(user)
            elif user.target in (frozen, dual_path, multihead_attention):
                obstacles.add(STEERS)
            elif stops(user):
                obstacles.add(STOPPED)
            elif user in facts.varying and user not in facts.signals and at in operands(user, facts.is_identity):
                obstacles.add(COMPARED)
    return next((reason for reason in (STEERS, STOPPED, COMPARED) if reason in obstacles), UNUSED)


def stops(node: fx.Node) -> bool:
    """Whether a call is the model's own stop of derivatives."""
    return node.op != "call_module" and called(node) in ("detach", "data")


def receivers(node: fx.Node, facts: Facts) -> list[fx.Node]:
    """Returns the inputs of `node` that get a cotangent from it."""
    if node.target is frozen or stops(node) or node in facts.whole:
        return []
    if node.target is dual_path:
        at = node.args[1 + TABLE[str(node.args[0])].receives]
        return [at] if isinstance(at, fx.Node) else []
    if node.target is multihead_attention:
        return [node.args[2]]  # type: ignore[list-item]
    if node in facts.varying and called(node) in FORM:
        return operands(node, facts.is_identity)[:1]
    return [] if called(node) in SHAPES else operands(node, facts.is_identity)
