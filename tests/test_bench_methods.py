"""The methods that maps are compared with: which of them apply, and FusionGrad by hand."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers import fill

BENCH = Path(__file__).parents[1] / "bench"
if not BENCH.exists():
    pytest.skip("the benches are not beside these tests", allow_module_level=True)
sys.path.insert(0, str(BENCH))

from methods import fusion, gradient, methods  # noqa: E402


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
