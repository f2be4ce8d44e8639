"""The attributor against Zennit's own on the explainer."""

import pytest
import torch
from torch import nn

import sp_fx
from bridged import TARGET, Net, X
from helpers import fill, relative
from sp_fx.bridges import Attributor


@pytest.fixture(scope="module")
def explainer():
    return sp_fx.transform(fill(Net()))


def test_the_attributor_is_zennits_gradient_on_the_explainer(explainer):
    attribution = pytest.importorskip("zennit.attribution")
    direction = torch.eye(4)[TARGET]
    wanted = {"tensor": direction, "callable": lambda output: output * direction, "none": None}
    for attr_output in wanted.values():
        with attribution.Gradient(model=explainer) as theirs, Attributor(explainer) as ours:
            x = X.clone().requires_grad_()
            expected_output, expected = theirs(x, attr_output)
            output, relevance = ours(X, attr_output)
        assert torch.equal(output, expected_output) and relative(relevance, expected) <= 1e-6
    assert relative(Attributor(explainer, direction)(X)[1], explainer.pullback(X, TARGET)) <= 1e-6
    with torch.no_grad():
        assert relative(Attributor(explainer, direction)(X)[1], explainer.pullback(X, TARGET)) <= 1e-6
    with pytest.raises(TypeError, match="expected what transform"):
        Attributor(nn.ReLU())
