"""Gates that are smooth already, `f(z) = z g(z)`: the way back multiplies by their own gain at a temperature, `v g(z / tau)`.

    gelu        g(z) = Phi(z)                                       arXiv:2507.22832
    silu        g(z) = sigmoid(z), or sigmoid(rate z) written out   arXiv:2507.22832
    quick_gelu  g(z) = sigmoid(rate z)                              this and the next two: same principle
    hardswish   g(z) = min(max(z / 6 + 1/2, 0), 1)
    mish        g(z) = tanh(log(1 + e^z))

Frozen is tau = 1, the gain of the forward pass. With a margin m, `g((z - m tau) / tau)`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .relu import normal_cdf
from .row import Row, Soft, Tau, cooled, gain_row

# Chosen on the transformer of the zoo, on scenes of both seeds that `bench/fidelity.py` has. The forward's own gate is at 1.0.
GELU = Soft(1.25, margin=0.5)


def gelu_gain(z: Tensor, tau: Tau, approximate: str = "none") -> Tensor:
    if isinstance(tau, str) and approximate == "tanh":  # the forward's own gain, which differs from Phi by up to 5e-4
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    return normal_cdf(z, 1.0 if isinstance(tau, str) else tau)


def silu_gain(z: Tensor, tau: Tau, rate: float = 1.0) -> Tensor:
    return torch.sigmoid(cooled(z, tau) * rate)


ROWS: dict[str, Row] = {
    "gelu": gain_row(lambda z, approximate: F.gelu(z, approximate=approximate), gelu_gain, GELU, opens=1),
    "silu": gain_row(lambda z, rate=1.0: F.silu(z) if rate == 1 else z * torch.sigmoid(rate * z), silu_gain, 1.6, opens=1),
    "quick_gelu": gain_row(lambda z, rate: z * torch.sigmoid(rate * z), silu_gain, GELU, opens=1),
    "hardswish": gain_row(F.hardswish, lambda z, tau: F.hardsigmoid(cooled(z, tau)), 1.6, opens=1),
    "mish": gain_row(F.mish, lambda z, tau: torch.tanh(F.softplus(cooled(z, tau))), 1.6, opens=1),
}
