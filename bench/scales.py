"""Other things that a temperature could be in units of: what temperatures.py tries on clamps beside the scales of `Soft`.

The default, "batch_norm", is the root of the mean of a channel's mean square distance from the kink and of all channels', as the
batch norm before the clamp has them; "channel" is the same of the sample.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from methods import Run
from torch import Tensor, nn

import sp_fx
from sp_fx import Rules, Soft
from sp_fx.gates import dual_path

Scale = Callable[[Tensor], Tensor]  # of distances from the kink [B, C, H, W]: a scale that broadcasts with them
MARGIN = 0.4  # of the default


def root_mean_square(away: Tensor, *axes: int) -> Tensor:
    return away.square().mean(axes, keepdim=True).sqrt().clamp_min(1e-30)


def windows(away: Tensor) -> Tensor:
    """Of each channel, in windows of a quarter of the height and width (the whole of what is smaller than 4 x 4), and of the
    sample: the root of the mean of the two mean squares."""
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


def by_depth(explainer: sp_fx.Explainer, first: float, last: float) -> Rules:
    """Returns the default rules with the temperature of clamps going from `first` to `last`, in equal steps."""
    places = [site.place for site in explainer.report().sites if site.kind == "hardtanh"]
    temperatures = torch.linspace(first, last, len(places), dtype=torch.float64).tolist()
    return Rules(overrides={place: Soft(tau, MARGIN, "batch_norm") for place, tau in zip(places, temperatures)})


def scaled(model: nn.Module) -> dict[str, Run]:
    """Returns the soft pullback of `model`, whose clamps come after batch norms, by each scale, and by two slopes of depth."""
    explainer = sp_fx.transform(model)
    runs = {name: at_scale(explainer, scale) for name, scale in SCALES.items()}
    for first, last in ((1.2, 2.2), (2.2, 1.2)):
        rules = by_depth(explainer, first, last)
        runs[f"{first} at the first clamp to {last} at the last"] = sp_fx.transform(model, rules=rules).pullback
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
