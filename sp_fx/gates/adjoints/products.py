"""Products of a signal with a gate that is made from the same input.

    glu  v -> (v sigmoid(b), 0)  for z = (a, b), the halves along an axis, and `glu(z) = a sigmoid(b)`

The gate is a constant: no temperature, and no signal through it. Same principle as arXiv:2507.22832; `Rules()` leaves products
their plain derivative.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .row import Row, Tau, wide


def glu_adjoint(v: Tensor, z: Tensor, tau: Tau, dim: int) -> Tensor:
    gate = wide(z).chunk(2, dim)[1].sigmoid()
    return torch.cat([v * gate, torch.zeros_like(gate)], dim).to(z.dtype)


ROWS: dict[str, Row] = {
    "glu": Row(lambda z, dim: F.glu(z, dim), glu_adjoint, None, rule="product"),
}
