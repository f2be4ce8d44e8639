"""A function of one's own keeps its own backward."""

import pickle

import pytest
import torch
from torch import nn

import sp_fx


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx, v):
        return v


def test_a_function_of_ones_own_keeps_its_backward():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return StraightThrough.apply(self.layer(x)).relu()

    model, x = Net(), torch.randn(2, 4)
    apply = torch.autograd.Function.__dict__["apply"]
    with pytest.warns(UserWarning, match="StraightThrough is opaque to the trace"):
        explainer = sp_fx.transform(model, rules=sp_fx.Rules(relu=None))
    assert torch.autograd.Function.__dict__["apply"] is apply
    y = x.clone().requires_grad_()
    expected = torch.autograd.grad(model(y)[:, 1].sum(), y)[0]
    assert torch.equal(explainer.pullback(x, 1), expected) and expected.any()
    again = pickle.loads(pickle.dumps(explainer))
    assert torch.equal(again.pullback(x, 1), expected)
