"""Facts: read off a captured graph, which stays as it is; and what they are, on graphs small enough to count by hand."""

import dataclasses
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers import NETS, golden
from sp_fx.analysis.facts import Facts
from sp_fx.analysis.written.gates import Written
from sp_fx.analysis.written.norms import Statistic
from sp_fx.capture.arguments import Given
from sp_fx.capture.exported import export
from sp_fx.capture.sizes import freedoms
from sp_fx.capture.symbolic import trace
from sp_fx.rewrite.prepared.out_of_place import normalise


class Mixed(nn.Module):
    """Written gates and norms, views, a write in place, a comparison, a gated product, a constant."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.register_buffer("offset", torch.ones(6))

    def forward(self, x):
        h = self.first(x)
        h = h * torch.sigmoid(1.702 * h)
        h = h * torch.rsqrt(h.pow(2).mean(-1, True) + 1e-6)
        gate = torch.sigmoid(self.second(h)).view(-1, 6)
        h = h * gate
        y = h.view(-1)
        y.relu_()
        h = torch.where(h > 0.1, h, self.offset * 2)
        return F.gelu(h) + self.offset.exp()


def captures(model, x):
    yield trace(model)
    call = Given((x,), {})
    yield export(model, call, freedoms(call)[0])


@pytest.mark.parametrize("name", ["mixed", *NETS])
def test_nothing_changes_the_graph(name):
    model, x = (Mixed().eval(), torch.randn(2, 6)) if name == "mixed" else (golden(name)[0], golden(name)[1]["input"])
    for capture in captures(model, x):
        nodes = list(capture.graph.nodes)
        before = [(n.op, n.target, n.args, n.kwargs, dict(n.meta)) for n in nodes]
        Facts(capture)
        assert nodes == list(capture.graph.nodes)
        assert [(n.op, n.target, n.args, n.kwargs, dict(n.meta)) for n in nodes] == before


def named(facts, name):
    return [n for n in facts.graph.nodes if n.op != "placeholder" and facts.op(n) == name]


def test_facts_of_a_small_graph():
    capture = trace(Mixed().eval())
    normalise(capture.modules, capture.graph)
    facts = Facts(capture)
    kinds = [p.kind for p in facts.patterns.values()]
    assert kinds == ["quick_gelu", "rms_norm"]
    gate, norm = facts.patterns.values()
    assert isinstance(gate, Written) and len(gate.inside) == 3 and isinstance(norm, Statistic)
    (exp,), (where,), (relu,) = named(facts, "exp"), named(facts, "where"), named(facts, "relu")
    assert exp not in facts.varying and where in facts.varying
    assert facts.is_chosen(where) and not facts.is_chosen(relu)
    (view,) = [n for n in named(facts, "view") if relu in n.users]
    product = facts.aliasing.viewed(view)
    assert product is view.all_input_nodes[0] and facts.aliasing.viewed(relu) is None
    (written,) = {n.all_input_nodes[0] for n in named(facts, "gt")}  # what `relu_` has left of the product
    assert written in where.all_input_nodes and written is not product
    assert [facts.op(n) for n in facts.gating_factors(product)] == ["view"]
    assert facts.maker(facts.gating_factors(product)[0]) == "sigmoid"


@dataclasses.dataclass
class Points:
    state: torch.Tensor
    points: torch.Tensor
    more: tuple


class Decoder(nn.Module):
    """Returns a container whose points and scales do not depend on the inputs, as the reference points of a DETR do."""

    def __init__(self, container):
        super().__init__()
        self.layer, self.query, self.container = nn.Linear(6, 6), nn.Parameter(torch.ones(6)), container

    def forward(self, x):
        return self.container(self.layer(x), self.query.sigmoid(), (self.query * 2, x.abs()))


class Named(NamedTuple):
    state: torch.Tensor
    points: torch.Tensor
    more: tuple


CONTAINERS = {
    "a dataclass": (Points, "state", "points", "more"),
    "a named tuple": (Named, 0, 1, 2),
    "a dictionary": (lambda *args: dict(zip("abc", args)), "a", "b", "c"),
    "a tuple": (lambda *args: args, 0, 1, 2),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_an_item_of_what_a_module_returns_is_that_item_alone(name):
    container, *keys = CONTAINERS[name]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = nn.Sequential(Decoder(container))

        def forward(self, x):
            out = self.decoder(x)
            state, points, more = ((getattr(out, k) if name == "a dataclass" else out[k]) for k in keys)
            return state.relu() + points.clamp(min=0.1) + more[0].tanh() + more[1].sigmoid()

    for capture in captures(Net().eval(), torch.randn(2, 6)):
        facts = Facts(capture)
        called = {op: [n in facts.varying for n in named(facts, op)] for op in ("relu", "clamp", "tanh", "sigmoid")}
        assert called == {"relu": [True], "clamp": [False], "tanh": [False], "sigmoid": [False, True]}, capture.tracer
