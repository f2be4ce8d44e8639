"""The study of shares: attention whose queries, keys and values each get a part of their derivative, against autograd."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sp_fx

BENCH = Path(__file__).parents[1] / "bench"
if not BENCH.exists():
    pytest.skip("the benches are not beside these tests", allow_module_level=True)
sys.path.insert(0, str(BENCH))

from shares import SHARES, at_shares, shared  # noqa: E402

X, TARGET = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1)).double(), torch.tensor([0, 2])


class Attending(nn.Module):
    """Two layers of attention round skips, with a GELU between them, and the head; every number from a fixed seed."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.projections = nn.ModuleList(nn.Linear(6, 18) for _ in range(2))
        self.head = nn.Linear(6, 3)
        self.double().eval()

    def forward(self, x):
        for projection in self.projections:
            q, k, v = projection(x).chunk(3, -1)
            x = x + F.gelu(F.scaled_dot_product_attention(q, k, v))
        return self.head(x.mean(1))


def expected(model, shares):
    """The same network, of whose queries, keys and values shares are differentiated, with the default's gate of GELU."""
    x = leaf = X.clone().requires_grad_()
    for projection in model.projections:
        parts = (share * t + (1 - share) * t.detach() for t, share in zip(projection(x).chunk(3, -1), shares))
        x = x + soft_gelu(F.scaled_dot_product_attention(*parts))
    return torch.autograd.grad(model.head(x.mean(1)).gather(1, TARGET[:, None]).sum(), leaf)[0]


def soft_gelu(z):
    """GELU, whose gain on the way back is Phi((z - m) / t), t = 1.25, m = t / 2."""
    tau, margin = 1.25, 0.5
    gain = torch.special.ndtr((z.detach() - margin * tau) / tau)
    return F.gelu(z).detach() + gain * (z - z.detach())


@pytest.mark.parametrize("shares", [(0, 0, 1), *SHARES])
def test_shares_by_autograd(shares):
    model = Attending()
    explainer = sp_fx.transform(model)
    assert torch.allclose(at_shares(explainer, shares)(X, TARGET), expected(model, shares), rtol=1e-9, atol=1e-12)
    if shares == (0, 0, 1):
        assert torch.allclose(at_shares(explainer, shares)(X, TARGET), explainer.pullback(X, TARGET), rtol=1e-12)


def test_each_way_is_another():
    maps = {name: run(X, TARGET) for name, run in shared(Attending()).items()}
    assert len(maps) == len(SHARES) + 2
    assert len({tuple(m.flatten().tolist()) for m in maps.values()}) == len(maps)
