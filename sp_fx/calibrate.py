"""The scale of every gate's pre-activation over a set of inputs: what calibrated temperatures, and the report, measure with."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from .adjoints import TABLE, rule_of, wide
from .dual import dual_path
from .report import Report
from .rules import KINDS, UNTEMPERED

STEPS = ("relu", "leaky_relu", "prelu")  # kinds that are active above 0
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

    `batches` is a tensor or an iterable of batches; a batch is a tensor, or a tuple of tensors where the model takes several.

    Raises:
        ValueError: no batch, or none with a sample in it; a batch that the model cannot take; inputs that are all constant;
            pre-activations that are not finite.
        TypeError: a batch that is neither a tensor nor a tuple of them.
    """
    gauge, varied = Gauge(module), False
    takes = len(module.graph.find_nodes(op="placeholder"))
    with torch.inference_mode(False), torch.no_grad():
        for i, batch in enumerate((batches,) if isinstance(batches, Tensor) else batches):
            inputs = batch if isinstance(batch, tuple) else (batch,)
            if not all(isinstance(x, Tensor) for x in inputs):
                got = "a list: of (inputs, labels), take the inputs" if isinstance(batch, list) else type(batch).__name__
                raise TypeError(f"batch {i} of the calibration set is {got}; expected a tensor, or a tuple of the model's inputs")
            if len(inputs) > takes:
                raise TypeError(f"batch {i} of the calibration set is a tuple of {len(inputs)} inputs; the model takes {takes}")
            gauge.given = kwargs
            try:
                gauge.run(*inputs)
            except (RuntimeError, ValueError, TypeError) as error:
                told = f"{', '.join(str(list(x.shape)) for x in inputs)}: {str(error).splitlines()[0]}"
                raise ValueError(f"the model cannot take batch {i} of the calibration set, of shape {told}") from error
            varied = varied or any(bool((x != x.flatten()[0]).any()) for x in inputs if x.is_floating_point() and x.numel())
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
    nodes, scales, sites = iter(zip(scaled_nodes(graph), spreads, strict=True)), {}, []
    constant, closed = [], []
    for site in report.sites:
        if site.status == "rewritten" and site.kind in SCALED:
            node, spread = next(nodes)
            if not math.isfinite(spread.deviation):
                raise ValueError(f"the pre-activation of {site.place} is not finite over the calibration set")
            if TABLE[site.kind].homogeneous and isinstance(site.temperature, int | float):
                scale = scales[site.place] = max(spread.deviation, 1e-30)
                node.kwargs = {**{k: v for k, v in node.kwargs.items() if k != "scale"}, "tau": site.temperature * scale}
                constant += [site.place] if spread.deviation == 0 else []
                closed += [site.place] if site.kind in STEPS and not spread.opened else []
                site = replace(site, scale=scale, reason="")
        sites.append(site)
    if constant:
        warnings.warn(f"gates that are constant over the calibration set, and stay hard: {', '.join(constant)}", stacklevel=3)
    if closed:
        warnings.warn(f"gates that are never active on the calibration set: {', '.join(closed)}", stacklevel=3)
    return replace(report, rules=replace(report.rules, scale=scales), sites=tuple(sites))


def measured(report: Report, spreads: list[Spread]) -> Report:
    """`report` with the deviation of each pre-activation."""
    found = iter(spreads)
    each = [s.status == "rewritten" and s.kind in SCALED for s in report.sites]
    return replace(report, sites=tuple(replace(s, spread=next(found).deviation) if e else s for s, e in zip(report.sites, each)))
