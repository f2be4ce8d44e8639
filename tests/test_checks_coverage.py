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

    ran = dispatched(Net(), (torch.randn(2, 3, 4, 4),), {})
    assert ran == listed(sp_fx.transform(Net()).report())[1] and set(ran) == {family}
    assert ran[family] >= 2


def test_parameters_alone_are_no_gates():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return x.relu() * self.scale.clamp(max=2.0).exp()

    assert dispatched(Scaled(), (torch.randn(2, 3),), {}) == {"relu": 1}


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
