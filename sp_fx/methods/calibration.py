"""Calibration: the standard deviation of every gate's pre-activation, over data or by the statistics of a BatchNorm, and the
temperatures in units of it. The report's column of spreads is measured the same way."""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..analysis.calls import name_of
from ..analysis.ops import SAME_VALUES
from ..capture.arguments import ByName, are_named
from ..capture.passed import lets_through
from ..containers import tensors_of, type_of
from ..gates.adjoints.row import wide
from ..gates.dual_path import OPTIONS, distance, unit
from ..gates.table import TABLE
from ..measured.scales import is_scaled, scaled_nodes, scaled_sites
from ..rewrite.batch_norm import norm_before
from ..rewrite.report import Report, Site
from .requests import naming_inputs

STEP_KINDS = ("relu", "leaky_relu", "prelu")  # their gates are open beyond a kink


@dataclass
class Spread:
    """Mean and sum of squared deviations of the numbers seen so far, in float64, and the largest of them.

    Merged by Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
    """

    count: int = 0
    mean: Tensor | float = 0.0
    squares: Tensor | float = 0.0
    highest: Tensor | float = -math.inf
    unit: float | None = None  # of a temperature by batch norm: the root of the mean of its squares over channels

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
        """The biased standard deviation: of the numbers seen, not of the population they were drawn from."""
        return math.sqrt(max(float(self.squares), 0.0) / self.count)

    @property
    def opened(self) -> bool:
        """Whether any number was beyond the kink."""
        return float(self.highest) > 0


class Gauge(ByName):
    """Runs a captured module's graph and measures how far the pre-activation of each gate is from its kink."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.spreads = {node: Spread() for node in scaled_nodes(module.graph)}

    def run_node(self, n: fx.Node) -> Any:
        if n in self.spreads:
            (kind, *tensors), options = self.fetch_args_kwargs_from_env(n)
            args = {key: value for key, value in options.items() if key not in OPTIONS}
            self.spreads[n].see(distance(kind, tensors, args))
            if options.get("scale") == "batch_norm":
                self.spreads[n].unit = float(unit(kind, "batch_norm", tensors, args).double().square().mean().sqrt())
        return super().run_node(n)


def measure(module: fx.GraphModule, batches: Tensor | Iterable[Any], kwargs: Mapping[str, Any]) -> list[Spread]:
    """Returns the spread of each scaled gate's pre-activation over all `batches`, by one forward over each.

    `batches` is a tensor or an iterable of batches; a batch is a tensor, or a tuple or a mapping of them where the model takes
    several, or the mapping that it takes.

    Raises:
        ValueError: no batch, or none with a sample in it; a batch that the model cannot take; inputs that are all constant;
            pre-activations that are not finite.
        TypeError: a batch that is neither a tensor nor a tuple or a mapping of them.
    """
    gauge, varied = Gauge(module), False
    takes = len(module.graph.find_nodes(op="placeholder"))
    with torch.inference_mode(False), torch.no_grad():
        for i, batch in enumerate((batches,) if isinstance(batches, Tensor) else batches):
            by_name = isinstance(batch, Mapping) and are_named(inspect.signature(module.forward), batch)
            inputs = () if by_name else batch if isinstance(batch, tuple) else (batch,)
            if isinstance(batch, list) or not all(map(tensors_of, inputs)):
                got = "a list: of (inputs, labels), take the inputs" if isinstance(batch, list) else type_of(batch)
                expected = "a tensor, or a tuple or a mapping of the model's inputs"
                raise TypeError(f"batch {i} of the calibration set is {got}; expected {expected}")
            if len(inputs) > takes:
                raise TypeError(f"batch {i} of the calibration set is a tuple of {len(inputs)} inputs; the model takes {takes}")
            tensors = tensors_of(batch)
            try:
                named = {**kwargs, **batch} if by_name else kwargs
                with naming_inputs(module.forward, inputs, named):
                    gauge.run_by_name(inspect.signature(module.forward).bind(*inputs, **named).arguments)
            except (RuntimeError, ValueError, TypeError) as error:
                tried = f"batch {i} of the calibration set, of shape {', '.join(str(list(x.shape)) for x in tensors)}"
                raise ValueError(f"the model cannot take {tried}: {str(error).splitlines()[0]}") from error
            varied = varied or any(bool((x != x.flatten()[0]).any()) for x in tensors if x.numel())
    spreads = list(gauge.spreads.values())
    if any(not spread.count for spread in spreads) or (not spreads and not varied):
        raise ValueError("the calibration set is empty: expected at least one batch with one sample")
    if not varied:
        raise ValueError("the calibration set is constant: every number of a batch is the same, which says nothing of the scale")
    return spreads


def calibrated(report: Report, graph: fx.Graph, spreads: list[Spread]) -> Report:
    """Writes the temperatures in units of `spreads` into `graph`, and returns its report, whose rules have the measured scales.

    Raises:
        ValueError: a pre-activation was not finite.

    Warns:
        UserWarning: gates that were constant over the calibration set, which stay hard, and ReLUs that it never opened.
    """
    measured = [(site, spread) for (site, _), spread in zip(scaled_sites(report, graph), spreads, strict=True)]
    for site, spread in measured:
        if not math.isfinite(spread.deviation):
            raise ValueError(f"the pre-activation of {site.place} is not finite over the calibration set")
    measured = [(site, spread) for site, spread in measured if has_unit(site)]
    constant = [site.place for site, spread in measured if spread.deviation == 0]
    closed = [site.place for site, spread in measured if site.kind in STEP_KINDS and not spread.opened]
    if constant:
        warnings.warn(f"gates that are constant over the calibration set, and stay hard: {', '.join(constant)}", stacklevel=3)
    if closed:
        warnings.warn(f"gates that are never active on the calibration set: {', '.join(closed)}", stacklevel=3)
    return at_scales(report, graph, {site.place: max(spread.deviation, 1e-30) for site, spread in measured})


def calibrated_by_norms(report: Report, module: fx.GraphModule, graph: fx.Graph) -> Report:
    """As `calibrated`, without data: gates that a BatchNorm feeds get the deviation it implies, the others keep their scale.

    Raises:
        ValueError: no gate is fed by one.
    """
    scales = [(site, norm_deviation(module, node)) for site, node in scaled_sites(report, graph) if has_unit(site)]
    if all(scale is None for _, scale in scales) and all(site.scale != "batch_norm" for site in report.sites):
        reason = "no gate of this model is fed by a BatchNorm with running statistics"
        raise ValueError(f"{reason}: calibrate(batches) measures the scales on data")
    return at_scales(report, graph, {site.place: site.scale if s is None else max(s, 1e-30) for site, s in scales})


def norm_deviation(module: fx.GraphModule, gate: fx.Node) -> float | None:
    """Returns the standard deviation, over channels, places and samples, of the BatchNorm's output that `gate` reads, or of what
    a number times it plus a number is; None where no BatchNorm feeds it.

    Over the data of its running variance v a channel has the mean beta and the variance gamma^2 v / (v + eps). The variance over
    all channels is the mean of these variances plus the variance of these means.
    """
    behind = norm_before(gate.args[1], functools.partial(keeps_values, module), lambda node: None)
    if behind is None:
        return None
    norm: Any = behind.norm
    variance, gamma, beta = (None if n is None else fetched(module, n.target).double() for n in norm.args[3:])
    assert variance is not None
    within = variance / (variance + norm.kwargs["eps"]) * (1.0 if gamma is None else gamma.square())
    return abs(behind.factor) * math.sqrt(float(within.mean() + (0.0 if beta is None else beta.var(correction=0))))


def keeps_values(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a call returns, in eval mode, the numbers that it got, as dropout and flatten do."""
    if node.op != "call_module":
        return node.op in ("call_function", "call_method") and name_of(node) in SAME_VALUES
    called = module.get_submodule(str(node.target))
    return lets_through(called) or isinstance(called, nn.Identity | nn.modules.dropout._DropoutNd)


def fetched(module: nn.Module, name: str) -> Tensor:
    path, _, last = name.rpartition(".")
    return getattr(module.get_submodule(path), last).detach()


def has_unit(site: Site) -> bool:
    """Whether the temperature is measured in units of a scale, other than that which a batch norm says of each channel."""
    return site.scale != "batch_norm" and TABLE[site.kind].homogeneous and isinstance(site.temperature, int | float)


def at_scales(report: Report, graph: fx.Graph, scales: Mapping[str, float | str]) -> Report:
    """Writes into `graph` the temperature of each gate in units of its scale, and returns the report of that.

    `scales` has them by place; a scale that is no number, such as "sample", leaves the gate as it is.
    """
    numbers = {place: scale for place, scale in scales.items() if isinstance(scale, float)}
    for site, node in scaled_sites(report, graph):
        if site.place in numbers:
            rest = {k: v for k, v in node.kwargs.items() if k != "scale"}
            node.kwargs = {**rest, "tau": site.temperature * numbers[site.place]}  # type: ignore[operator]
    sites = tuple(replace(s, scale=numbers[s.place], reason="") if s.place in numbers else s for s in report.sites)
    return replace(report, rules=replace(report.rules, scale=scales), sites=sites)


def with_spreads(report: Report, spreads: list[Spread]) -> Report:
    """Returns the report with the standard deviation of each pre-activation, the `spreads` being in the order of its sites."""
    remaining = iter(spreads)
    measured = [(site, next(remaining) if is_scaled(site) else None) for site in report.sites]
    sites = tuple(s if seen is None else replace(s, spread=seen.deviation, unit=seen.unit) for s, seen in measured)
    return replace(report, sites=sites)
