"""The scale of every gate's pre-activation over a set of inputs, or by the statistics of a BatchNorm: what calibrated
temperatures, and the report, measure with."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..analysis.calls import name_of
from ..analysis.ops import SAME_VALUES
from ..capture.clone import lets_through
from ..gates.adjoints.row import wide
from ..gates.dual import dual_path
from ..gates.rules import KINDS, UNTEMPERED
from ..gates.table import TABLE, rule_of
from ..rewrite.report import Report, Site

STEPS = ("relu", "leaky_relu", "prelu")  # kinds that are active above 0


KEEPERS = SAME_VALUES


SCALED = frozenset(KINDS) - {*UNTEMPERED, "attention"}  # kinds whose pre-activation is one tensor, the first


@dataclass
class Spread:
    """Mean and sum of squared deviations of what was seen so far, in float64, and the largest value.

    Merged by Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
    """

    count: int = 0
    mean: Tensor | float = 0.0
    squares: Tensor | float = 0.0
    highest: Tensor | float = -math.inf

    def see(self, z: Tensor) -> None:
        if not z.numel():
            return
        flat, n = wide(z.detach()).flatten(), z.numel()
        mean = flat.double().mean()
        squares = (flat - mean.to(flat.dtype)).square().sum(dtype=torch.float64)
        shift, total = mean - self.mean, self.count + n
        self.squares = self.squares + squares + shift * shift * (self.count * n / total)
        self.mean, self.count = self.mean + shift * (n / total), total
        self.highest = torch.maximum(torch.as_tensor(self.highest).to(flat), flat.amax())

    @property
    def deviation(self) -> float:
        """Biased: of what was seen, not of what it was drawn from."""
        return math.sqrt(max(float(self.squares), 0.0) / self.count)

    @property
    def opened(self) -> bool:
        """Whether anything was above 0."""
        return float(self.highest) > 0


class Gauge(fx.Interpreter):
    """Runs an explainer's graph and measures what goes into its gates, in the order of the graph."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.spreads = {node: Spread() for node in scaled_nodes(module.graph)}
        self.given: Mapping[str, Any] = {}

    def placeholder(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.given[target] if target in self.given else super().placeholder(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        if n in self.spreads:
            self.spreads[n].see(self.fetch_args_kwargs_from_env(n)[0][1])
        return super().run_node(n)


def scaled_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The calls of `dual_path` whose pre-activation has a scale; one for each such site of the report, in its order."""
    calls = [node for node in graph.nodes if node.target is dual_path]
    return [node for node in calls if rule_of(str(node.kwargs.get("row", node.args[0]))) in SCALED]


def measure(module: fx.GraphModule, batches: Tensor | Iterable[Any], kwargs: Mapping[str, Any]) -> list[Spread]:
    """One forward over `batches`; the spread of each scaled gate's pre-activation over all of them.

    `batches` is a tensor or an iterable of batches; a batch is a tensor, or a tuple or a mapping of them where the model takes
    several.

    Raises:
        ValueError: no batch, or none with a sample in it; a batch that the model cannot take; inputs that are all constant;
            pre-activations that are not finite.
        TypeError: a batch that is neither a tensor nor a tuple or a mapping of them.
    """
    gauge, varied = Gauge(module), False
    takes = len(module.graph.find_nodes(op="placeholder"))
    with torch.inference_mode(False), torch.no_grad():
        for i, batch in enumerate((batches,) if isinstance(batches, Tensor) else batches):
            by_name = isinstance(batch, Mapping)
            inputs = () if by_name else batch if isinstance(batch, tuple) else (batch,)
            if not all(isinstance(x, Tensor) for x in inputs):
                got = "a list: of (inputs, labels), take the inputs" if isinstance(batch, list) else type(batch).__name__
                expected = "a tensor, or a tuple or a mapping of the model's inputs"
                raise TypeError(f"batch {i} of the calibration set is {got}; expected {expected}")
            if len(inputs) > takes:
                raise TypeError(f"batch {i} of the calibration set is a tuple of {len(inputs)} inputs; the model takes {takes}")
            gauge.given = {**kwargs, **batch} if by_name else kwargs
            given = [x for x in batch.values() if isinstance(x, Tensor)] if by_name else inputs
            try:
                gauge.run(*inputs)
            except (RuntimeError, ValueError, TypeError) as error:
                told = f"{', '.join(str(list(x.shape)) for x in given)}: {str(error).splitlines()[0]}"
                raise ValueError(f"the model cannot take batch {i} of the calibration set, of shape {told}") from error
            varied = varied or any(bool((x != x.flatten()[0]).any()) for x in given if x.numel())
    spreads = list(gauge.spreads.values())
    if any(not spread.count for spread in spreads) or (not spreads and not varied):
        raise ValueError("the calibration set is empty: expected at least one batch with one sample")
    if not varied:
        raise ValueError("the calibration set is constant: every number of a batch is the same, which says nothing of the scale")
    return spreads


def calibrated(report: Report, graph: fx.Graph, spreads: list[Spread]) -> Report:
    """Write temperatures of `spreads` into `graph`; returns the report of it, whose rules hold the measured scales.

    Raises:
        ValueError: a pre-activation was not finite.

    Warns:
        UserWarning: gates that were constant over the calibration set, which stay hard, and ReLUs that it never opened.
    """
    seen = list(zip(gauged(report, graph), spreads, strict=True))
    for (site, _), spread in seen:
        if not math.isfinite(spread.deviation):
            raise ValueError(f"the pre-activation of {site.place} is not finite over the calibration set")
    seen = [(pair, spread) for pair, spread in seen if has_unit(pair[0])]
    constant = [site.place for (site, _), spread in seen if spread.deviation == 0]
    closed = [site.place for (site, _), spread in seen if site.kind in STEPS and not spread.opened]
    if constant:
        warnings.warn(f"gates that are constant over the calibration set, and stay hard: {', '.join(constant)}", stacklevel=3)
    if closed:
        warnings.warn(f"gates that are never active on the calibration set: {', '.join(closed)}", stacklevel=3)
    return at_scales(report, graph, {site.place: max(spread.deviation, 1e-30) for (site, _), spread in seen})


def by_norms(report: Report, module: fx.GraphModule, graph: fx.Graph) -> Report:
    """As `calibrated`, without data, for the gates that a BatchNorm feeds; the others keep the scale they had.

    Raises:
        ValueError: no gate is fed by one.
    """
    found = [(site, norm_deviation(module, node)) for site, node in gauged(report, graph) if has_unit(site)]
    if all(scale is None for _, scale in found):
        told = "no gate of this model is fed by a BatchNorm with running statistics"
        raise ValueError(f"{told}: calibrate(batches) measures the scales on data")
    return at_scales(report, graph, {site.place: site.scale if s is None else max(s, 1e-30) for site, s in found})


def norm_deviation(module: fx.GraphModule, gate: fx.Node) -> float | None:
    """The deviation over channels, places and samples of what a BatchNorm gives to `gate`, where one does.

    A channel has the mean beta and the variance gamma^2 v / (v + eps) over the data that its statistics v are of; all of them
    together the mean of these variances plus the variance of these means.
    """
    norm: Any = gate.args[1]
    while keeps_values(module, norm):
        norm = norm.args[0]
    if norm.target is not dual_path or norm.args[0] != "affine_norm":
        return None
    if any(n is not None and n.op != "get_attr" for n in norm.args[3:]):  # computed in the pass
        return None
    variance, gamma, beta = (None if n is None else fetched(module, n.target).double() for n in norm.args[3:])
    assert variance is not None
    within = variance / (variance + norm.kwargs["eps"]) * (1.0 if gamma is None else gamma.square())
    return math.sqrt(float(within.mean() + (0.0 if beta is None else beta.var(correction=0))))


def keeps_values(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a call gives, in eval mode, the numbers that it got."""
    if node.op != "call_module":
        return node.op in ("call_function", "call_method") and name_of(node) in KEEPERS
    called = module.get_submodule(str(node.target))
    return lets_through(called) or isinstance(called, nn.Identity | nn.modules.dropout._DropoutNd)


def fetched(module: nn.Module, name: str) -> Tensor:
    path, _, last = name.rpartition(".")
    return getattr(module.get_submodule(path), last).detach()


def gauged(report: Report, graph: fx.Graph) -> list[tuple[Site, fx.Node]]:
    """The sites whose pre-activation has a scale, and their calls."""
    sites = [site for site in report.sites if site.status == "rewritten" and site.kind in SCALED]
    return list(zip(sites, scaled_nodes(graph), strict=True))


def has_unit(site: Site) -> bool:
    """Whether the temperature is measured in units of a scale."""
    return TABLE[site.kind].homogeneous and isinstance(site.temperature, int | float)


def at_scales(report: Report, graph: fx.Graph, scales: Mapping[str, float | str]) -> Report:
    """Write the temperatures, in units of those of the `scales`, by place, that are numbers, into `graph`; the report of it."""
    known = {place: scale for place, scale in scales.items() if isinstance(scale, float)}
    for site, node in gauged(report, graph):
        if site.place in known:
            rest = {k: v for k, v in node.kwargs.items() if k != "scale"}
            node.kwargs = {**rest, "tau": site.temperature * known[site.place]}  # type: ignore[operator]
    sites = tuple(replace(s, scale=known[s.place], reason="") if s.place in known else s for s in report.sites)
    return replace(report, rules=replace(report.rules, scale=scales), sites=sites)


def measured(report: Report, spreads: list[Spread]) -> Report:
    """`report` with the deviation of each pre-activation."""
    found = iter(spreads)
    each = [s.status == "rewritten" and s.kind in SCALED for s in report.sites]
    return replace(report, sites=tuple(replace(s, spread=next(found).deviation) if e else s for s, e in zip(report.sites, each)))
