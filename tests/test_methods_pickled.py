"""Explainers that are pickled: the graph is loaded as it was, with what no input reaches, and follows the weights."""

import pickle

import pytest
import torch
from torch import nn

import sp_fx
from helpers import fill
from sp_fx.methods import pickled


class Constants(nn.Module):
    """Calls that no input reaches: of nothing, of a parameter, of a buffer that is written to."""

    def __init__(self):
        super().__init__()
        self.layer, self.places = nn.Linear(4, 4), nn.Embedding(9, 4)
        self.register_buffer("mean", torch.ones(4))

    def forward(self, x):
        place = self.places(torch.arange(4, device=x.device)).relu().sum(0)
        mean = self.mean.mul(0.5)
        mean += 1
        return (self.layer(x) + place + mean + x.new_zeros(x.shape[0], 1) + torch.zeros(4)).relu()


def reloaded(explainer):
    return pickle.loads(pickle.dumps(explainer))


@pytest.mark.parametrize("tracer", ["fx", "export"])
def test_calls_that_no_input_reaches(tracer):
    model, x = fill(Constants()), torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    explainer = sp_fx.transform(model, tracer=tracer, example_inputs=x)
    loaded = reloaded(reloaded(explainer))
    assert torch.equal(loaded(x), model(x)) and torch.equal(loaded.pullback(x, 1), explainer.pullback(x, 1))
    assert loaded.report().sites == explainer.report().sites
    assert [node.meta.get("place") for node in loaded.graph.nodes] == [node.meta.get("place") for node in explainer.graph.nodes]
    with torch.no_grad():  # the weights are still read, not what was computed of them
        for mine, theirs in ((loaded.places, model.places), (loaded.layer, model.layer)):
            mine.weight.add_(1.0)
            theirs.weight.add_(1.0)
    assert torch.equal(loaded(x), model(x))


def test_recurrent_networks_by_export():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(3, 4, batch_first=True)

        def forward(self, x):
            return {"last": self.gru(x)[0][:, -1].relu()}

    model, x = fill(Net()), torch.randn(3, 5, 3, generator=torch.Generator().manual_seed(0))
    explainer = sp_fx.transform(model, tracer="export", example_inputs=x)
    assert not explainer.report().notes  # in eval mode it draws nothing
    assert torch.equal(reloaded(explainer)(x[:2])["last"], explainer(x[:2])["last"])


def test_an_op_that_is_not_registered_here():
    assert pickled.Operator("aten::relu", "default").looked_up() is torch.ops.aten.relu.default
    assert pickled.Operator("aten::relu", "").looked_up() is torch.ops.aten.relu
    with pytest.raises(LookupError, match="nowhere::gone, which the graph calls, is not registered here: import what"):
        pickled.Operator("nowhere::gone", "default").looked_up()
