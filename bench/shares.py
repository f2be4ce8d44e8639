"""Attention that the signal goes through by three ways: what temperatures.py tries on the transformer.

The default sends the signal through the values alone, queries and keys being constants. Here each of the three gets a share of
its own derivative: 1, 1, 1 is attention's Jacobian, and 1/4, 1/4, 1/2 are the shares of AttnLRP (arXiv:2402.05602), whose rule
halves a product for its two factors, and the scores' half again.
"""

from __future__ import annotations

from collections.abc import Sequence
from unittest import mock

import torch
from methods import Run
from torch import Tensor, nn

import sp_fx
from sp_fx import Rules, Soft
from sp_fx.gates import dual_path
from sp_fx.gates.adjoints.attention import attention

SHARES = ((0.25, 0.25, 0.5), (0.1, 0.1, 0.8), (0.25, 0.25, 1.0), (0.0, 0.0, 0.5), (1.0, 1.0, 1.0))  # of q, k, v
GELU = {"gelu 1.5": Soft(1.5), "gelu 1.6, margin 0.5": Soft(1.6, 0.5)}


def shared(model: nn.Module) -> dict[str, Run]:
    """Returns the soft pullback of `model` with each of `SHARES`, and the first of them at other temperatures of GELU."""
    runs = {f"shares {named(shares)}": at_shares(sp_fx.transform(model), shares) for shares in SHARES}
    for name, gelu in GELU.items():
        runs[f"shares {named(SHARES[0])}, {name}"] = at_shares(sp_fx.transform(model, rules=Rules(gelu=gelu)), SHARES[0])
    return runs


def named(shares: Sequence[float]) -> str:
    return "q {:g}, k {:g}, v {:g}".format(*shares)


def at_shares(explainer: sp_fx.Explainer, shares: Sequence[float]) -> Run:
    """Returns the soft pullback that has the `shares` of queries, keys and values in each call of attention, at temperature 1."""
    pullback = dual_path.pullback

    def run(x: Tensor, target: Tensor) -> Tensor:
        def other(gate: dual_path.GateSpec, v: Tensor, saved: Sequence[Tensor | None]) -> list[Tensor | None]:
            if gate[0] != "attention":
                return pullback(gate, v, saved)
            *operands, mask = saved
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_() for t in operands]  # type: ignore[union-attr]
                grads = torch.autograd.grad(attention(*leaves, mask, **dict(gate[4])), leaves, v)
            return [*(share * grad for share, grad in zip(shares, grads, strict=True)), None]

        with mock.patch.object(dual_path, "pullback", other):
            return explainer.pullback(x, target)

    return run
