"""What is counted below the model's Python code is what the report lists, family by family."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sp_fx
from helpers import fill
from sp_fx.checks.coverage import dispatched, listed
from sp_fx.gates.modules.multihead import multihead_attention

COUNTED = {
    "relu": lambda x: F.relu(x) + x.relu_(),
    "clamp": lambda x: F.relu6(x) + x.clamp(0, 1) + F.hardtanh(x) + torch.maximum(x, x.new_zeros(1)) + F.normalize(x),
    "max_pool": lambda x: F.max_pool2d(x, 2).amax() + x.max(1)[0].max() + F.adaptive_max_pool2d(x, 3).sum(),
    "softmax": lambda x: F.scaled_dot_product_attention(x, x, x) + x.softmax(-1),
    "elu": lambda x: F.elu(x) + F.selu(x) + F.celu(x),
}


@pytest.mark.parametrize("family", COUNTED)
def test_what_is_counted(family):
    class Net(nn.Module):
        def forward(self, x):
            return COUNTED[family](x * 1)

    ran, every = dispatched(Net(), (torch.randn(2, 3, 4, 4),), {})
    assert ran == listed(sp_fx.transform(Net()).report())[1] and set(ran) == {family} and ran == every
    assert ran[family] >= 2


def test_parameters_alone_are_no_gates():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return x.relu() * self.scale.clamp(max=2.0).exp()

    assert dispatched(Scaled(), (torch.randn(2, 3),), {})[1] == {"relu": 1}


def test_multihead_attention_counts_once():
    model = fill(nn.MultiheadAttention(8, 2, batch_first=True))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(x, x, x)[0]

    explainer = sp_fx.transform(Net())
    assert any(n.target is multihead_attention for n in explainer.graph.nodes)
    assert sp_fx.check(explainer, torch.randn(2, 5, 8))["coverage"].found == 0


class Heads(nn.Module):
    """A head that serves the loss alone, of which the outputs have nothing; what it takes in place is another matter."""

    def __init__(self, writes):
        super().__init__()
        self.layer, self.other, self.writes = nn.Linear(3, 3), nn.Linear(3, 3), writes

    def forward(self, x):
        h = self.layer(x)
        auxiliary = self.other(h).relu()
        if self.writes:
            h[:, :1].relu_()
        _ = auxiliary.sum()
        return h.clamp(-1, 1)


@pytest.mark.parametrize("writes", [False, True])
def test_what_the_outputs_are_not_made_of_need_not_be_listed(writes):
    model, x = fill(Heads(writes)), torch.randn(2, 3)
    used, every = dispatched(model, (x,), {})
    assert used == {"clamp": 1, "relu": 1} if writes else used == {"clamp": 1}
    assert every == {"clamp": 1, "relu": 1 + writes}
    for tracer in ("fx", "export"):
        line = sp_fx.check(sp_fx.transform(model, tracer=tracer, example_inputs=x), x)["coverage"]
        assert line.verdict == "ok", line


def test_what_a_number_is_read_of_counts():
    class Asks(nn.Module):
        def forward(self, x):
            return x * 2 if x.relu().sum().item() > 0 else x

    assert dispatched(Asks(), (torch.ones(2, 3),), {})[0] == {"relu": 1}


class Sparse(torch.autograd.Function):
    """Whose backward is not the derivative of its forward."""

    @staticmethod
    def forward(ctx, x):
        return (x - x.amax(-1, keepdim=True) + 1).clamp(min=0)

    @staticmethod
    def backward(ctx, v):
        return v / 2


sparse = Sparse.apply


@pytest.mark.filterwarnings("ignore:1 calls")
@pytest.mark.parametrize("tracer", ["fx", "export"])
def test_a_function_of_autograd_is_one_line(tracer):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return sparse(self.layer(x)).relu()

    model, x = fill(Net()), torch.randn(2, 4)
    explainer = sp_fx.transform(model, tracer=tracer, example_inputs=x)
    assert [site.op for site in explainer.report().of("NOT REWRITTEN")] == ["Sparse"]
    line = sp_fx.check(explainer, x)["coverage"]
    assert (line.verdict, line.note) == ("ok", "1 run, 1 NOT REWRITTEN")
