"""Measures of maps against known truth, one number a sample, and the intervals that comparisons are reported with."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def mass_inside(x: Tensor, maps: Tensor, masks: Tensor) -> Tensor:
    """Share of the positive relevance that lies inside the mask, [B] in [0, 1]; NaN where no relevance is positive.

    The relevance of a pixel is input times map, summed over channels. `x`, `maps` [B, C, H, W] floating; `masks` [B, H, W] bool.
    """
    relevance = (x * maps).double().sum(1).clamp(min=0)
    return (relevance * masks).sum((1, 2)) / relevance.sum((1, 2))


def pointing(x: Tensor, maps: Tensor, masks: Tensor) -> Tensor:
    """Whether the pixel of the greatest relevance lies inside the mask, [B] bool. Shapes as in `mass_inside`."""
    best = (x * maps).double().sum(1).flatten(1).argmax(1, keepdim=True)
    return masks.flatten(1).gather(1, best)[:, 0]


def paired_interval(differences: Tensor, confidence: float = 0.95, draws: int = 10_000, seed: int = 0) -> dict[str, float]:
    """Mean of paired `differences` [N] with the percentile bootstrap interval over the pairs: `mean`, `low`, `high`.

    Raises:
        ValueError: fewer than 10 pairs, or a difference that is not finite.
    """
    values = differences.double()
    if len(values) < 10 or not bool(values.isfinite().all()):
        raise ValueError(f"an interval needs at least 10 finite differences, got {int(values.isfinite().sum())} of {len(values)}")
    chosen = torch.randint(len(values), (draws, len(values)), generator=torch.Generator().manual_seed(seed))
    tail = (1 - confidence) / 2
    low, high = values[chosen].mean(1).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return {"mean": values.mean().item(), "low": low, "high": high}


def ratio_interval(a: Tensor, b: Tensor, confidence: float = 0.95, draws: int = 10_000, seed: int = 0) -> dict[str, float]:
    """Ratio of the means of paired `a` and `b` [N], with its percentile bootstrap interval over the pairs."""
    chosen = torch.randint(len(a), (draws, len(a)), generator=torch.Generator().manual_seed(seed))
    tail = (1 - confidence) / 2
    ratios = a.double()[chosen].mean(1) / b.double()[chosen].mean(1)
    low, high = ratios.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return {"ratio": (a.double().mean() / b.double().mean()).item(), "ratio_low": low, "ratio_high": high}


def share_interval(hits: Tensor, z: float = 1.96) -> dict[str, float]:
    """A share of `hits` [N] bool with Wilson's interval: `share`, `low`, `high`."""
    n, p = len(hits), hits.double().mean().item()
    centre, half = (p + z * z / (2 * n)) / (1 + z * z / n), z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return {"share": p, "low": centre - half, "high": centre + half}
