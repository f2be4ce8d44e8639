"""The maps of the paper's own code."""

import pytest
import torch

import sp_fx
from helpers import NETS, golden, relative

# 1e-4 where one or two pullbacks separate the numbers, float32 against float32 in another order; 1e-3 after five normalised
# steps, each of which amplifies that.
METHODS = {
    "soft_pullback": (lambda e, x, t: e.pullback(x, t), 1e-4),
    "double_pullback": (lambda e, x, t: e.double_pullback(x, t), 1e-4),
    "ascent": (lambda e, x, t: e.ascend(x, t, step_size=20.0), 1e-3),
    "ascent_clipped": (lambda e, x, t: e.ascend(x, t, step_size=20.0, bounds=(-1, 1)), 1e-3),
}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("method", METHODS)
def test_map_equals_the_published_codes(net, method):
    model, data = golden(net)
    explainer = sp_fx.transform(model, rules=sp_fx.Rules.paper())
    run, tolerance = METHODS[method]
    assert relative(run(explainer, data["input"], data["target"]), data[method]) <= tolerance


@pytest.mark.parametrize("net", NETS)
def test_forward_is_bitwise_the_models(net):
    model, data = golden(net)
    explainer = sp_fx.transform(model)
    assert torch.equal(explainer(data["input"]), model(data["input"]))
    with torch.no_grad():
        assert torch.equal(explainer(data["input"]), model(data["input"]))
    assert relative(explainer(data["input"]), data["logits"]) <= 1e-5


@pytest.mark.parametrize("net", NETS)
def test_default_maps_are_not_the_gradient(net):
    model, data = golden(net)
    x = data["input"].clone().requires_grad_()
    plain = torch.autograd.grad(model(x)[:, 1].sum(), x)[0]
    assert relative(sp_fx.transform(model).pullback(data["input"], 1), plain) > 0.1
