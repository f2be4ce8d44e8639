"""Where the signal goes on its way back through a rewritten graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import fx

from ..analysis.calls import name_of
from ..analysis.facts import Facts
from ..capture.passed import operands
from ..gates.adjoints.attention import nothing
from ..gates.dual_path import dual_path, frozen
from ..gates.multihead import multihead_attention
from ..gates.table import TABLE
from .report import Site, Status


def mark_steering(
    facts: Facts, sites: Sequence[Site], nodes: Sequence[fx.Node], passing: Mapping[fx.Node, fx.Node]
) -> tuple[Site, ...]:
    """Returns the `sites`, with a word on those that no signal passes, since all that they make steers frozen gates or is held
    constant: the activations of a squeeze-and-excite branch whose product is frozen, say.

    `nodes` are the calls of the sites, `passing` says what stands in place of those that were replaced.
    """
    reached: set[fx.Node] = set()
    for node in reversed(facts.graph.nodes):
        if node.op == "output" or node in reached:
            reached.update(receivers(node, facts))
    marked = []
    for site, node in zip(sites, nodes):
        if passing.get(node, node) not in reached and not site.reason.startswith("part of"):
            status: Status = "kept" if site.status == "NOT REWRITTEN" else site.status
            site = replace(site, status=status, reason="steers a frozen gate: no signal passes here")
        marked.append(site)
    return tuple(marked)


def receivers(node: fx.Node, facts: Facts) -> list[fx.Node]:
    """Returns the inputs of `node` that get a cotangent from it."""
    if node.target is frozen or (node.op != "call_module" and name_of(node) == "detach"):
        return []
    if node.target is dual_path:
        row = TABLE[str(node.args[0])]
        at = node.args[1 + row.receives] if row.adjoint is not nothing else None
        return [at] if isinstance(at, fx.Node) else []
    if node.target is multihead_attention:
        return [node.args[2]]  # type: ignore[list-item]
    return operands(node, facts.is_identity)
