"""The networks of the studies of SiLU and gated MLPs, and the half rule of their products, against formulas by hand."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from sp_fx import zoo

BENCH = Path(__file__).parents[1] / "bench"
if not BENCH.exists():
    pytest.skip("the benches are not beside these tests", allow_module_level=True)
sys.path.insert(0, str(BENCH))

from variants import VARIANTS, GatedFeedForward, halves, variant  # noqa: E402


def feed_forward():
    torch.manual_seed(0)
    feed = GatedFeedForward(zoo.load("pyramid_transformer").stages[1].feed)
    torch.nn.init.normal_(feed.factor.weight, 0, 0.2)
    return feed.double(), torch.randn(2, 5, 7, 32, dtype=torch.float64, requires_grad=True)


def test_variants_have_the_zoo_s_weights_and_other_gates():
    x = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    for (name, made), gate in zip(VARIANTS.items(), ("relu", "gelu"), strict=True):
        zoo_s = zoo.load(name.split(",")[0])
        for module in list(zoo_s.modules()):
            for child, _ in [pair for pair in module.named_children() if type(pair[1]).__name__.lower() == gate]:
                setattr(module, child, torch.nn.SiLU())
        assert torch.allclose(made().eval()(x), zoo_s(x), atol=1e-5)
        assert not torch.allclose(zoo_s(x), zoo.load(name.split(",")[0])(x), atol=1e-2)


def test_half_of_a_product_goes_to_each_factor():
    """The Jacobian of a product is the sum of its factors'; halves of both leave half of it, and the forward as it was."""
    feed, x = feed_forward()
    whole = feed(x)
    feed.share = 0.5
    half, v = feed(x), torch.randn_like(whole)
    assert torch.allclose(half, whole, rtol=1e-12)
    a = feed.neighbours(feed.wide(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    b, back = feed.factor(x), v @ feed.narrow.weight
    by_a = torch.autograd.grad(F.silu(a), x, 0.5 * back * b.detach(), retain_graph=True)[0]
    by_b = torch.autograd.grad(b, x, 0.5 * back * F.silu(a).detach(), retain_graph=True)[0]
    assert torch.allclose(torch.autograd.grad(half, x, v)[0], by_a + by_b, rtol=1e-9, atol=1e-12)


def test_trained_once(tmp_path, monkeypatch):
    monkeypatch.setattr("variants.TRAINING", {"seed": 1, "epochs": 1, "scenes": 64, "rate": 1e-4, "push": 1.0})
    monkeypatch.setattr("variants.TEST_SCENES", 10)
    name, x = "pyramid_transformer, gated", torch.randn(2, 3, 96, 96)
    first = variant(name, tmp_path / "new")
    monkeypatch.setattr("variants.TRAINING", None)  # a second training would fail
    second = variant(name, tmp_path / "new")
    assert torch.equal(first(x), second(x)) and not torch.equal(first(x), VARIANTS[name]().eval()(x))
    maps = [run(x, torch.tensor([0, 3])) for run in halves(second).values()]
    assert len(maps) == 3 and all(torch.isfinite(m).all() for m in maps)
