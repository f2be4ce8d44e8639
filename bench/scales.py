"""Other things that a temperature could be in units of: what temperatures.py tries on clamps beside the scales of `Soft`.

The default, "channel", is the root of the mean of a sample's mean square distance from the kink and of its channel's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from methods import Run
from torch import Tensor, nn

import sp_fx
from sp_fx import Rules, Soft
from sp_fx.gates import dual_path
from sp_fx.gates.adjoints.row import FROZEN

Scale = Callable[[Tensor], Tensor]  # of distances from the kink [B, C, H, W]: a scale that broadcasts with them
MARGIN = 0.4  # of the default


def root_mean_square(away: Tensor, *axes: int) -> Tensor:
    return away.square().mean(axes, keepdim=True).sqrt().clamp_min(1e-30)


def windows(away: Tensor) -> Tensor:
    """Of each channel, in windows of a quarter of the height and width (the whole of what is smaller than 4 x 4), and of the
    sample: the root of the mean of the two mean squares, as the default has it of channels."""
    grid = [min(4, size) if size >= 4 else 1 for size in away.shape[2:]]
    local = F.interpolate(F.adaptive_avg_pool2d(away.square(), grid), size=away.shape[2:], mode="nearest")
    return ((local + away.square().mean((1, 2, 3), keepdim=True)) / 2).sqrt().clamp_min(1e-30)


SCALES: dict[str, Scale] = {
    "of the channel alone": lambda away: root_mean_square(away, 2, 3),
    "of the sample alone, from the kink": lambda away: root_mean_square(away, 1, 2, 3),
    "geometric mean of sample and channel": lambda away: (root_mean_square(away, 2, 3) * root_mean_square(away, 1, 2, 3)).sqrt(),
    "windows of a quarter": windows,
    "of each place, over channels": lambda away: root_mean_square(away, 1),
    "of each number": lambda away: away.abs().clamp_min(1e-30),
}


@dataclass
class FromBatchNorm:
    """What the batch norm before each clamp says of it: a channel with weight g and bias b has mean square g^2 + b^2 over the
    pictures it was trained on. Mixed with the layer's mean of that, as the default mixes; no picture is looked at."""

    squares: list[Tensor]  # of the clamps, the last first: in the order of the way back
    at: int = 0

    def __call__(self, away: Tensor) -> Tensor:
        square = self.squares[self.at % len(self.squares)]
        self.at += 1
        return ((square + square.mean()) / 2).sqrt().view(1, -1, 1, 1).clamp_min(1e-30)


def clamps_of(explainer: sp_fx.Explainer) -> Iterator[torch.fx.Node]:
    for node in explainer.graph.nodes:
        if node.target is dual_path.dual_path and node.args[0] == "hardtanh" and node.kwargs["tau"] != FROZEN:
            yield node


def from_batch_norm(explainer: sp_fx.Explainer) -> FromBatchNorm:
    """Raises ValueError where a clamp does not come right after a batch norm."""
    squares = []
    for clamp in clamps_of(explainer):
        (module,) = clamp.all_input_nodes
        norm = next(iter(module.all_input_nodes))
        if norm.target is not dual_path.dual_path or norm.args[0] != "affine_norm":
            raise ValueError(f"{clamp} comes after {norm}, which is no batch norm")
        weight, bias = (attrgetter(str(n.target))(explainer).detach() for n in norm.all_input_nodes[-2:])
        squares.append(weight.square() + bias.square())
    return FromBatchNorm(squares[::-1])


def by_depth(explainer: sp_fx.Explainer, first: float, last: float) -> Rules:
    """Returns the default rules with the temperature of clamps going from `first` to `last`, in equal steps."""
    places = [site.place for site in explainer.report().sites if site.kind == "hardtanh"]
    temperatures = torch.linspace(first, last, len(places), dtype=torch.float64).tolist()
    return Rules(overrides={place: Soft(tau, MARGIN, "channel") for place, tau in zip(places, temperatures)})


def scaled(model: nn.Module) -> dict[str, Run]:
    """Returns the soft pullback of `model`, whose clamps come after batch norms, by each scale, and by two slopes over depth."""
    explainer = sp_fx.transform(model)
    runs = {name: at_scale(explainer, scale) for name, scale in SCALES.items()}
    runs["batch norm's own statistics"] = at_scale(explainer, from_batch_norm(explainer))
    for name, first, last in (
        ("1.2 at the first to 2.2 at the last", 1.2, 2.2),
        ("2.2 at the first to 1.2 at the last", 2.2, 1.2),
    ):
        runs[name] = sp_fx.transform(model, rules=by_depth(explainer, first, last)).pullback
    return {f"scale: {name}": run for name, run in runs.items()}


def at_scale(explainer: sp_fx.Explainer, scale: Scale) -> Run:
    """Returns the soft pullback whose clamps have another scale; other gates keep their own."""
    unit = dual_path.unit

    def run(x: Tensor, target: Tensor) -> Tensor:
        def other(kind: str, its: str, saved: Any, args: dict[str, Any]) -> Tensor:
            return scale(dual_path.distance(kind, saved, args)) if kind == "hardtanh" else unit(kind, its, saved, args)

        with mock.patch.object(dual_path, "unit", other):
            return explainer.pullback(x, target)

    return run
