"""What a module computes twice is computed once, and nothing that is written over, drawn or returned is."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sp_fx
from helpers import fill
from sp_fx.capture.symbolic import trace
from sp_fx.rewrite.prepared.computed_twice import merge
from sp_fx.rewrite.prepared.out_of_place import normalise


class Of(nn.Module):
    """A function of the output of a linear layer."""

    def __init__(self, function):
        super().__init__()
        self.layer, self.function = nn.Linear(6, 6), function

    def forward(self, x):
        return self.function(self.layer(x))


X = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def merged(function):
    """How many calls of the graph of a function are merged away."""
    capture = trace(fill(Of(function)).double())
    normalise(capture.modules, capture.graph)
    before = len(capture.graph.nodes)
    merge(capture.modules, capture.graph)
    capture.graph.lint()
    return before - len(capture.graph.nodes)


def test_equal_calls_are_merged_with_what_is_made_of_them():
    assert merged(lambda h: (h - 1) * torch.sigmoid(h - 1)) == 1
    assert merged(lambda h: h.flip(-1)[:, None].sum(-1) * h.flip(-1)[:, None].sum(-1)) == 3
    assert merged(lambda h: (h - 1) * torch.sigmoid(h - 1.0)) == 0  # integers and floats round otherwise
    assert merged(lambda h: torch.relu(h - 1) * torch.relu(h - 1)) == 1  # a gate is called as often as the model calls it
    assert merged(lambda h: F.dropout(h, 0.5, True) + F.dropout(h, 0.5, True)) == 0
    assert merged(lambda h: torch.rand_like(h) * torch.rand_like(h) * h) == 0


def written_over(h):
    a, b = h + 1, h + 1
    a[:, 0].zero_()
    return a * b


def view_written_over(h):
    a, b = h * 3, h * 3
    b.view(-1)[:4].zero_()
    return a - b


def in_place(h):
    a, b = h * 2, h * 2
    a.add_(b)
    return a.mul_(b)


def under_no_grad(h):
    with torch.no_grad():
        a = h - 1
    return a * torch.sigmoid(h - 1)


def in_other_modules(h):
    return h.mean(-1, keepdim=True) * h - h.mean(-1, keepdim=True)


@pytest.mark.parametrize("tracer", ["fx", "export"])
@pytest.mark.parametrize("function", [written_over, view_written_over, in_place, under_no_grad, in_other_modules])
def test_outputs_and_derivatives_stay(function, tracer):
    model = fill(Of(function)).double()
    explainer = sp_fx.transform(
        model, tracer=tracer, example_inputs=X if tracer == "export" else None, rules=sp_fx.Rules(silu=None)
    )
    x = X.clone().requires_grad_()
    y = model(x)
    assert torch.equal(explainer(X), y)
    u = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (expected,) = torch.autograd.grad(y, x, u)
    assert (explainer.pullback(X, u) - expected).norm() <= 1e-12 * expected.norm()


def test_two_outputs_are_two_tensors():
    explainer = sp_fx.transform(fill(Of(lambda h: (h + 1, h + 1, (h * 2).view(-1), (h * 2).view(-1)))).double())
    a, b, c, d = explainer(X)
    a.zero_(), c.zero_()
    assert b.any() and d.any()
