"""Products of a signal with a gate made from the same input: GLU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .row import FROZEN, Row, Tau, wide


def glu_adjoint(v: Tensor, z: Tensor, tau: Tau, dim: int) -> Tensor:
    gate = wide(z).chunk(2, dim)[1].sigmoid()
    return torch.cat([v * gate, torch.zeros_like(gate)], dim).to(z.dtype)


ROWS: dict[str, Row] = {
    "glu": Row(lambda z, dim: F.glu(z, dim), glu_adjoint, FROZEN, rule="product"),
}
