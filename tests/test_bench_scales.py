"""The study of scales: other units of a clamp's temperature, against formulas by hand."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import sp_fx

BENCH = Path(__file__).parents[1] / "bench"
if not BENCH.exists():
    pytest.skip("the benches are not beside these tests", allow_module_level=True)
sys.path.insert(0, str(BENCH))

from scales import SCALES, at_scale, by_depth, scaled  # noqa: E402


def network():
    """Two clamps behind batch norms of different sizes, and the head; every number from a fixed seed."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU6(), nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4), nn.ReLU6())
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).double().eval()
    for norm in (model[1], model[4]):
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.uniform_(norm.bias, -1, 1)
    return model


X, TARGET = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1)).double(), torch.tensor([0, 2])


def by_hand(model, scale_of):
    """The soft pullback with Phi((z - m) / t) - Phi((z - 6 - m) / t), t = 1.7 s, m = 0.4 t, s = scale_of(clamp, z)."""
    x = X.clone().requires_grad_()
    h = x
    for i, layer in enumerate(model):
        if isinstance(layer, nn.ReLU6):
            tau = 1.7 * scale_of(i, h.detach())
            z = h.detach() - 0.4 * tau
            gain = torch.special.ndtr(z / tau) - torch.special.ndtr((z - 6) / tau)
            h = layer(h).detach() + gain * (h - h.detach())
        else:
            h = layer(h)
    return torch.autograd.grad(h.gather(1, TARGET[:, None]).sum(), x)[0]


def close(got, expected):
    return torch.allclose(got, expected, rtol=1e-9, atol=1e-12)


def test_scales_by_hand():
    model = network()
    explainer = sp_fx.transform(model)
    formulas = {
        "of the channel alone": lambda i, z: z.pow(2).mean((2, 3), keepdim=True).sqrt(),
        "of the sample alone, from the kink": lambda i, z: z.pow(2).mean((1, 2, 3), keepdim=True).sqrt(),
        "of each place, over channels": lambda i, z: z.pow(2).mean(1, keepdim=True).sqrt(),
        "of each number": lambda i, z: z.abs(),
    }
    for name, formula in formulas.items():
        assert close(at_scale(explainer, SCALES[name])(X, TARGET), by_hand(model, formula)), name


def test_windows_by_hand():
    """8 and 6 numbers to an axis, in windows of 2, and of 1 or 2 which overlap by none."""
    z = torch.randn(2, 3, 8, 4, dtype=torch.float64)
    whole = z.pow(2).mean((1, 2, 3))
    expected = torch.empty_like(z)
    for i in range(8):
        square = z[:, :, i // 2 * 2 : i // 2 * 2 + 2].pow(2)
        for j in range(4):
            expected[:, :, i, j] = ((square[:, :, :, j].mean(2) + whole[:, None]) / 2).sqrt()
    assert close(SCALES["windows of a quarter"](z), expected)


def test_equal_steps_of_depth_are_the_default():
    explainer = sp_fx.transform(network())
    equal = sp_fx.transform(network(), rules=by_depth(explainer, 1.7, 1.7))
    assert torch.equal(equal.pullback(X, TARGET), explainer.pullback(X, TARGET))
    assert len({run(X, TARGET).sum().item() for run in scaled(network()).values()}) == len(SCALES) + 2
