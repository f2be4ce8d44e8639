"""Calls of gates that are smooth already, `f(z) = z g(z)`, and of gated linear units."""

from __future__ import annotations

import torch.nn.functional as F

from .reader import Gate, aten, reads


@reads(F.gelu, aten.gelu, aten.gelu_)
def gelu(input, approximate="none"):
    return Gate("gelu", (input,), {"approximate": approximate})


@reads(F.silu, aten.silu, aten.silu_)
def silu(input, inplace=False):
    return Gate("silu", (input,))


@reads(F.hardswish, aten.hardswish, aten.hardswish_)
def hardswish(input, inplace=False):
    return Gate("hardswish", (input,))


@reads(F.mish, aten.mish, aten.mish_)
def mish(input, inplace=False):
    return Gate("mish", (input,))


@reads(F.glu, aten.glu)
def glu(input, dim=-1):
    return Gate("glu", (input,), {"dim": dim})
