"""Where the sample's axis is at each gate whose temperature follows the sample's scale, written into the graph.

A rewritten graph measures such a scale over all axes but the first. Where the sample is not on the first, or is folded into one,
the pre-activation is turned so that it is, and the gate's output turned back.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from ..analysis.calls import name_of
from ..analysis.ops import POINTWISE, PRODUCT
from ..gates.calls.layout import laid_out
from ..gates.dual_path import dual_path
from ..gates.rules import KINDS, UNTEMPERED
from ..gates.table import rule_of
from ..rewrite.report import Report, Site
from .sample_axis import Axis

UNKNOWN = "absolute, since no axis is the sample's here: calibrate() measures a scale"


MEASURED = ("sample", "channel")  # scales that are taken of each sample in the pass
SCALED = frozenset(KINDS) - {*UNTEMPERED, "attention"}  # kinds whose pre-activation is one tensor, the first


def scaled_nodes(graph: fx.Graph) -> list[fx.Node]:
    """Returns the calls of `dual_path` whose pre-activation has a scale; one for each such site of the report, in its order."""
    gates = [node for node in graph.nodes if node.target is dual_path]
    return [node for node in gates if rule_of(str(node.kwargs.get("row", node.args[0]))) in SCALED]


def scaled_sites(report: Report, graph: fx.Graph) -> list[tuple[Site, fx.Node]]:
    """Returns the sites of the report whose pre-activation has a scale, each with its call."""
    return list(zip(filter(is_scaled, report.sites), scaled_nodes(graph), strict=True))


def is_scaled(site: Site) -> bool:
    return site.status == "rewritten" and site.kind in SCALED


def follows_sample(report: Report) -> bool:
    """Whether any temperature is in units of the sample's own scale."""
    return any(site.scale in MEASURED for site in report.sites)


def placed(graph: fx.Graph, report: Report, axes: Mapping[fx.Node, Axis]) -> tuple[fx.Graph, Report]:
    """Returns a copy of a rewritten graph whose scales are measured over the `axes` of its nodes, and its report: gates for
    which none is known have absolute temperatures there."""
    copies: dict[fx.Node, fx.Node] = {}
    own = fx.Graph()
    own.output(own.graph_copy(graph, copies))
    whole = next(((copies[n], axis.index) for n, axis in axes.items() if axis.alone), None)
    sites = {site.place: site for site in report.sites}
    for site, node in scaled_sites(report, graph):
        if node.kwargs.get("scale") not in MEASURED:
            continue
        gate, axis = copies[node], axes.get(node.args[1])  # type: ignore[arg-type]
        channel = None
        if axis is not None and node.kwargs["scale"] == "channel":
            channel = channel_axis(gate.args[1], axis.rank)
        among = axis is not None and axis.index == 0 and not site.idle and chooses_among_samples(gate, axis.rank)
        if axis is not None and axis.alone and axis.index == 0 and channel in (None, 1) and not among:
            continue
        turn = None if among or axis is None or whole is None else turn_of(gate, axis, channel)
        if turn is None:
            gate.kwargs = {key: value for key, value in gate.kwargs.items() if key != "scale"}
            sites[site.place] = replace(site, scale="absolute", reason=UNKNOWN)
        else:
            turn.apply(own, gate, whole)  # type: ignore[arg-type]
    own.lint()
    return own, replace(report, sites=tuple(sites.get(site.place, site) for site in report.sites))


@dataclass(frozen=True)
class Turn:
    """How a pre-activation is turned so that the sample is its first axis, and the gate's output back.

    Attributes:
        axis: where the sample is.
        order: the axes in the order that the gate gets them. They have names: 0, 1, ... in the pre-activation, "sample", and
            "before" and "after" for what is folded with it.
        planes: how many of the axes after the first are read as one: of a pooling all but the last two, say.
        kind: whether the gate is pointwise, a pooling or a reduction: where its output is in memory.
        gone: the axes that the gate takes away.
        options: the gate's own arguments that count axes, as they are then.
    """

    axis: Axis
    order: tuple[Any, ...]
    planes: int = 1
    kind: str = "pointwise"
    gone: tuple[Any, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def apply(self, graph: fx.Graph, gate: fx.Node, whole: tuple[fx.Node, int]) -> None:
        """Writes it round `gate`. `whole` is a tensor with the batch on an axis of its own, and that axis."""
        users, operands = list(gate.users), gate.args[1:3] if gate.args[0] == "written" else gate.args[1:2]
        with graph.inserting_before(gate):
            sizes = [graph.call_method("size", (operands[0], i)) for i in self.sized()]
            batch = graph.call_method("size", whole)
            turned = [self.turned(graph, operand, batch) for operand in operands]
            if self.planes > 1:
                inner = [graph.call_method("size", (turned[0], 1 + i)) for i in range(self.planes)]
                turned = [graph.call_method("flatten", (t, 1, self.planes)) for t in turned]
        gate.args = (gate.args[0], *turned, *gate.args[1 + len(operands) :])
        gate.kwargs = {**gate.kwargs, **self.options}
        back, order = gate, tuple(name for name in self.order if name not in self.gone)
        with graph.inserting_before(gate.next):
            if self.planes > 1:
                back = graph.call_method("unflatten", (back, 1, tuple(inner)))
            straight = tuple(name for name in named(self.axis) if name not in self.gone)
            if order != straight:
                back = graph.call_method("permute", (back, tuple(order.index(name) for name in straight)))
            folded = [name for name in straight if not isinstance(name, int)]
            at = straight.index(folded[0])
            if len(folded) > 1:
                back = graph.call_method("flatten", (back, at, at + len(folded) - 1))
            if self.axis.span > 1:
                back = graph.call_method("unflatten", (back, at, tuple(sizes)))
            back = graph.call_function(laid_out, (back, operands[0], self.kind))
        for user in users:
            user.replace_input_with(gate, back)

    def sized(self) -> list[int]:
        """The axes that the sample is folded into, where these are several."""
        return list(range(self.axis.index, self.axis.index + self.axis.span)) if self.axis.span > 1 else []

    def turned(self, graph: fx.Graph, node: Any, batch: fx.Node) -> fx.Node:
        axis, straight = self.axis, named(self.axis)
        if axis.span > 1:
            node = graph.call_method("flatten", (node, axis.index, axis.index + axis.span - 1))
        if axis.before > 1 or axis.after > 1:
            parts: tuple[Any, ...] = (
                (batch, -1) if axis.before == 1 else (-1, batch) if axis.after == 1 else (axis.before, batch, -1)
            )
            node = graph.call_method("unflatten", (node, axis.index, parts))
        if self.order != straight:
            node = graph.call_method("permute", (node, tuple(straight.index(name) for name in self.order)))
        return node


def named(axis: Axis) -> tuple[Any, ...]:
    """The names of the axes of a pre-activation, with those that the sample is folded into taken apart."""
    fold = [name for name, times in (("before", axis.before), ("sample", 0), ("after", axis.after)) if times != 1]
    return (*range(axis.index), *fold, *range(axis.index + axis.span, axis.rank))


def channel_axis(node: Any, rank: int) -> int:
    """Returns which of the `rank` axes of a pre-activation counts channels: what a convolution or a linear layer before it makes
    one of, 1 where neither is found through calls that keep axes: of `linear(x.permute(0, 2, 3, 1))` the last one."""
    while isinstance(node, fx.Node):
        if node.target is dual_path and node.args[0] == "conv":
            return rank - 1 - len(node.kwargs["stride"])  # type: ignore[arg-type]
        name = node.args[0] if node.target is dual_path else name_of(node)
        if name == "linear" or name in PRODUCT - POINTWISE:
            return rank - 1
        if node.target is dual_path:
            node = node.args[1]
        elif node.op == "call_module" or name_of(node) in POINTWISE:
            node = next(iter(node.all_input_nodes), None)
        else:
            break
    return 1


def turn_of(gate: fx.Node, axis: Axis, channel: int | None = None) -> Turn | None:
    """Returns the turn for a gate, None where it has none: it chooses among samples, or cannot be told other axes. `channel` is
    the axis that is to follow that of the sample, where the scale asks for it."""
    names = named(axis)
    rest = [name for name in names if name != "sample"]
    row, options = str(gate.kwargs.get("row", gate.args[0])), gate.kwargs
    if channel in rest:
        rest = [channel, *(name for name in rest if name != channel)]
    if row in ALIKE:
        return Turn(axis, ("sample", *rest))
    if row == "prelu" and 1 in rest:
        return Turn(axis, ("sample", 1, *(name for name in rest if name != 1)))
    if row in ("max_pool", "adaptive_max_pool"):
        spatial = range(axis.rank - len(options["kernel" if row == "max_pool" else "size"]), axis.rank)  # type: ignore[arg-type]
        leading = [name for name in rest if name not in spatial]
        if not all(i in rest for i in spatial):
            return None
        return Turn(axis, ("sample", *leading, *spatial), planes=len(leading), kind="pooling")
    if row in ("amax", "amin"):
        dims = [d % axis.rank for d in (options["dim"] if isinstance(options["dim"], tuple | list) else [options["dim"]])]  # type: ignore[operator]
        if not dims or not all(d in rest for d in dims):
            return None
        order = ("sample", *rest)
        gone = () if options.get("keepdim") else tuple(dims)
        return Turn(axis, order, kind="reduction", gone=gone, options={"dim": tuple(order.index(d) for d in dims)})
    return None


def chooses_among_samples(gate: fx.Node, rank: int) -> bool:
    """Whether a gate takes the largest or the smallest over axis 0, where the samples are: it has no scale of one of them."""
    if str(gate.args[0]) not in ("amax", "amin", "scatter_amax", "scatter_amin"):
        return False
    dims: Any = gate.kwargs["dim"]
    dims = [dims] if isinstance(dims, int) else dims
    return not dims or 0 in [dim % rank for dim in dims]


# Rows that are the same function of every element.
ALIKE = ("relu", "negative_relu", "relu_squared", "leaky_relu", "abs", "floor", "ceiling", "threshold", "hardtanh", "hardsigmoid")


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
        why = f": axis 0 of the inputs is taken for the batch, and the model was run to see it vary, but {reason}"
    warnings.warn(
        f"no axis is known to be the sample's at {len(places)} gates, whose temperatures are absolute: {', '.join(places[:3])}"
        f"{', ...' if len(places) > 3 else ''}{why}",
        stacklevel=4,
    )
