"""The scale of a pre-activation, which temperatures may follow: its standard deviation in each sample."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .adjoints.row import at_once, wide


def deviation(z: Tensor) -> Tensor:
    """The standard deviation of each sample over its own axes, [B, 1, ...]: the scale of a pre-activation.

    Biased (over n, not n - 1); at least 1e-30, so that a constant sample has a hard gate; 1 where it is not finite.
    """
    z, axes = wide(z), tuple(range(1, z.dim()))
    if not axes or 0 in z.shape[1:]:
        return z.new_full((*z.shape[:1], *[1] * len(axes)), 1e-30)
    root, spread = math.sqrt(math.prod(z.shape[1:])), None
    # From the moments where their difference does not cancel: 6 ms on CPU over ResNet-50's gates at batch 4, against 84 from the
    # centred values and 92 by torch.var. To ask whether it cancels would stall a GPU.
    if z.device.type == "cpu" and at_once():
        flat = z.flatten(1)
        mean = flat.mean(1)
        square = torch.linalg.vector_norm(flat, dim=1) / root
        spread = (square * square - mean * mean).clamp_min(0).sqrt()
        spread = spread.view(-1, *[1] * len(axes)) if bool((spread > 0.1 * square).all()) else None
    if spread is None:
        # In one pass, about the mean of one row: at most sqrt(rows) deviations off, which loses rows * 6e-8 of the variance.
        # Over the axes, not flattened: Inductor follows any layout so, 0.1 against 5.3 ms for [4, 64, 56, 56]. Not by
        # vector_norm, which sums in one row over several axes: 1.7e-4 off on ResNet-18's stem.
        centred = z - z.narrow(min(2, len(axes)), 0, 1).mean(axes, keepdim=True)
        mean, square = centred.mean(axes, keepdim=True), centred.square().mean(axes, keepdim=True)
        spread = (square - mean * mean).clamp_min(0).sqrt()
    return torch.where(spread.isfinite(), spread, 1.0).clamp_min(1e-30)
