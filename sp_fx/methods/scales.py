"""Where the sample's axis is at each gate whose temperature follows the sample's scale, written into the graph.

A rewritten graph measures such a scale over all axes but the first. Where the sample is not on the first, or is folded into one,
the pre-activation is turned so that it is, and the gate's output turned back.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import fx

from ..analysis.sample_axis import Axis
from ..gates.table import rule_of
from ..rewrite.report import Report
from .calibration import scaled_sites

UNKNOWN = "absolute, since no axis is the sample's here: calibrate() measures a scale"
POINTWISE = ("relu", "leaky_relu", "abs")  # gates that can be turned: they have no axes of their own


def follows_sample(report: Report) -> bool:
    """Whether any temperature is in units of the sample's own scale."""
    return any(site.scale == "sample" for site in report.sites)


def placed(graph: fx.Graph, report: Report, axes: Mapping[fx.Node, Axis]) -> tuple[fx.Graph, Report]:
    """Returns a copy of a rewritten graph whose scales are measured over the `axes` of its nodes, and its report: gates for
    which none is known have absolute temperatures there."""
    copies: dict[fx.Node, fx.Node] = {}
    own = fx.Graph()
    output = own.graph_copy(graph, copies)
    own.output(output)
    whole = next(((copies[n], axis.index) for n, axis in axes.items() if not axis.fold), None)
    sites = {site.place: site for site in report.sites}
    for site, node in scaled_sites(report, graph):
        if node.kwargs.get("scale") != "sample":
            continue
        axis = axes.get(node.args[1])  # type: ignore[arg-type]
        gate = copies[node]
        kind = rule_of(str(node.kwargs.get("row", node.args[0])))
        if axis == Axis(0) or (axis is not None and kind not in POINTWISE and axis.index == 0):
            continue  # each row has a scale of its own
        pool = axis is not None and axis.index == 1 and not axis.fold and node.args[0] == "max_pool"
        if axis is None or (axis.fold and whole is None) or not (kind in POINTWISE or pool):
            gate.kwargs = {key: value for key, value in gate.kwargs.items() if key != "scale"}
            sites[site.place] = replace(site, scale="absolute", reason=UNKNOWN)
            continue
        turn(own, gate, axis, whole)
    own.lint()
    return own, replace(report, sites=tuple(sites.get(site.place, site) for site in report.sites))


def turn(graph: fx.Graph, gate: fx.Node, axis: Axis, whole: tuple[fx.Node, int] | None) -> None:
    """Turns the pre-activation of `gate` so that the sample is its first axis, and the gate's output back. `whole` is a tensor
    with the batch on an axis of its own, and that axis."""
    at = axis.index + (axis.fold == "inner")

    def turned(node: fx.Node) -> fx.Node:
        if axis.fold:
            batch = graph.call_method("size", whole)
            parts = (batch, -1) if axis.fold == "outer" else (-1, batch)
            node = graph.call_method("unflatten", (node, axis.index, parts))
        return graph.call_function(torch.movedim, (node, at, 0)) if at else node

    operands = gate.args[1:3] if gate.args[0] == "written" else gate.args[1:2]
    users = list(gate.users)
    with graph.inserting_before(gate):
        gate.args = (gate.args[0], *map(turned, operands), *gate.args[1 + len(operands) :])  # type: ignore[arg-type]
    with graph.inserting_after(gate):
        back = graph.call_function(torch.movedim, (gate, 0, at)) if at else gate
    if axis.fold:
        with graph.inserting_after(back):
            back = graph.call_method("flatten", (back, axis.index, axis.index + 1))
    for user in users:
        user.replace_input_with(gate, back)


def unknown(report: Report, reason: str) -> None:
    """Warns of gates whose temperature should follow the sample's scale, where no axis is known to be the sample's.

    Warns:
        UserWarning: there are such gates. `reason` says why the axes could not be measured, if they could not.
    """
    places = [site.place for site in report.sites if site.reason == UNKNOWN]
    if not places:
        return
    why = ""
    if reason:
        why = f": axis 0 of the inputs is the batch, and the model was run on fake tensors to see it vary, but {reason}"
    warnings.warn(
        f"no axis is known to be the sample's at {len(places)} gates, whose temperatures are absolute: {', '.join(places[:3])}"
        f"{', ...' if len(places) > 3 else ''}{why}",
        stacklevel=4,
    )
