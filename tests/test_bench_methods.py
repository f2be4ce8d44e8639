"""The methods that maps are compared with: which of them apply, and FusionGrad by hand."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import sp_fx
from helpers import fill

BENCH = Path(__file__).parents[1] / "bench"
if not BENCH.exists():
    pytest.skip("the benches are not beside these tests", allow_module_level=True)
sys.path.insert(0, str(BENCH))

from methods import deep_lift, fusion, gradient, methods  # noqa: E402


class ReLUsOfManyKinds(nn.Module):
    def __init__(self, last):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)
        self.last = last

    def forward(self, x):
        x = torch.relu_(self.a(x)).relu()
        x = nn.functional.relu(x - 0.1).mean((2, 3))
        return self.b(self.last(x - 0.01))


def test_peers_that_hook_modules_see_every_relu_or_are_left_out():
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    modules = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    )
    assert "DeepLift" in methods(fill(modules), x)[0]
    model = fill(ReLUsOfManyKinds(lambda x: x.relu_()))
    chosen, left = methods(model, x)
    target = torch.tensor([0, 2])
    completeness = chosen["DeepLift"].run(x, target).flatten(1).sum(1)
    with torch.no_grad():
        change = (model(x) - model(0 * x)).gather(1, target[:, None])[:, 0]
    assert torch.allclose(completeness, change, atol=1e-5)
    chosen, left = methods(fill(ReLUsOfManyKinds(lambda x: x.clamp(min=0))), x)
    assert "DeepLift" not in chosen and left["DeepLift"] == "sees modules alone, and 1 of 4 ReLUs are none"


def test_fusion_grad_by_hand():
    """The mean over draws of weights and inputs, each parameter times its own draw; the model itself stays as it was."""
    model = fill(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)))
    kept = [p.clone() for p in model.parameters()]
    x, target = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 2])
    torch.manual_seed(5)
    got = fusion(model, gradient, weights=0.3, inputs=0.2, n=3, m=2)(x, target)
    torch.manual_seed(5)
    total = torch.zeros_like(x)
    for _ in range(3):
        noisy = kept[0] * (1 + 0.3 * torch.randn_like(kept[0]))
        torch.randn_like(kept[1])
        for _ in range(2):
            torch.randn_like(x)
            total += noisy[target].view_as(x)  # a linear model's gradient does not see its input
    assert torch.allclose(got, total / 6, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(kept, model.parameters()))


def test_the_deep_lift_pullback_of_hard_gates_is_captums_deep_lift():
    """The mean of a hard gate on a line is (relu(z) - relu(z')) / (z - z'), by quadrature."""
    from captum.attr import DeepLift

    torch.manual_seed(2)
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(32, 3)
    model = nn.Sequential(*layers)
    x, target = torch.randn(4, 3, 8, 8), torch.tensor([0, 2, 1, 0])
    expected = DeepLift(model).attribute(x, target=target).detach()
    frozen = sp_fx.transform(model, rules=sp_fx.Rules.frozen())
    for nodes, tolerance in ((8, 0.1), (128, 0.01)):
        got = deep_lift(frozen, nodes=nodes)(x, target)
        assert (got - expected).norm() < tolerance * expected.norm()
    assert (x * frozen.pullback(x, target) - expected).norm() > 0.2 * expected.norm()


def test_the_deep_lift_pullback_of_soft_gates_by_hand():
    """Through one layer of ReLUs: the mean of Phi(z / tau) on the line, whose integral is z Phi(z / tau) + tau phi(z / tau), with
    the temperature in units of each sample's scale, which goes from the reference's to the picture's."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 3)).double()
    x, target = torch.randn(2, 3, 2, 2, dtype=torch.float64), torch.tensor([0, 2])

    def integral(z, tau):
        density = torch.exp(-0.5 * (z / tau) ** 2) / (2 * torch.pi) ** 0.5
        return z * torch.special.ndtr(z / tau) + tau * density

    z, reference = model[1](x.flatten(1)).detach(), model[1].bias.detach().expand(2, -1)
    gate = (integral(z, 0.6) - integral(reference, 0.6)) / (z - reference)
    slope = (model[3].weight.detach()[target] * gate) @ model[1].weight.detach()
    got = deep_lift(sp_fx.transform(model, rules=sp_fx.Rules(relu=0.6, scale="absolute")))(x, target)
    assert torch.allclose(got, slope.view_as(x) * x, rtol=1e-6)

    parts = torch.linspace(0, 1, 4001, dtype=torch.float64)[:, None, None]
    deviations = z.std(1, correction=0, keepdim=True), reference.std(1, correction=0, keepdim=True)
    on_line = (reference + parts * (z - reference)) / (0.6 * (deviations[1] + parts * (deviations[0] - deviations[1])))
    gate = torch.trapezoid(torch.special.ndtr(on_line), dx=1 / 4000, dim=0)
    slope = (model[3].weight.detach()[target] * gate) @ model[1].weight.detach()
    got = deep_lift(sp_fx.transform(model, rules=sp_fx.Rules(relu=0.6, scale="sample")))(x, target)
    assert torch.allclose(got, slope.view_as(x) * x, rtol=1e-4)


def test_the_deep_lift_pullback_leaves_the_table_as_it_was():
    from sp_fx.gates.table import TABLE

    before = dict(TABLE)
    model = fill(nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.ReLU()))
    run = deep_lift(sp_fx.transform(model))
    with pytest.raises(RuntimeError):
        run(torch.randn(2, 3, 2, 2), torch.tensor([0, 7]))
    assert all(TABLE[kind] is row for kind, row in before.items())
