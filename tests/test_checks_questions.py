"""`check` answers for every model that can be explained, and alarms only where something is wrong."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sp_fx
from helpers import fill
from sp_fx import targets
from sp_fx.gates import table

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(4, 6, generator=GENERATOR)
IMAGE = torch.randn(2, 3, 24, 24, generator=GENERATOR)
IDS = torch.randint(0, 9, (3, 5), generator=GENERATOR)
NAMES = ["forward", "capture", "affine identity", "tau -> 0", "samples", "coverage"]


class Net(nn.Module):
    """`function(self, h)` after a linear layer, a head behind it."""

    def __init__(self, function, head=True):
        super().__init__()
        self.layer, self.head, self.function = nn.Linear(6, 6), nn.Linear(6, 3) if head else nn.Identity(), function

    def forward(self, x):
        return self.head(self.function(self, self.layer(x)))


class Refuses(nn.Module):
    """Like einops' layers, which compile a recipe of their own."""

    def forward(self, h):
        return F.relu(h)

    def __deepcopy__(self, memo):
        raise NotImplementedError("no copies")


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.places, self.layer, self.head = nn.Embedding(9, 6), nn.Embedding(5, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, ids, mask=None):
        h = F.gelu(self.layer(self.table(ids) + self.places(torch.arange(5))))
        h = h if mask is None else h * mask[..., None]
        return {"logits": self.head(h.mean(1)), "hidden": h}


class Lstm(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.cell, self.head = nn.Linear(6, 6), nn.LSTM(6, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        h, _ = self.cell(F.relu(self.first(x))[:, None].expand(-1, 3, -1))
        return self.head(h[:, -1])


class Bordered(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3), nn.Linear(6, 2)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.first(x)), 2)
        return self.head(F.relu(self.second(x)).amax((2, 3)))


def bordered():
    image = IMAGE.clone()
    image[:, :, :8], image[..., 18:] = 0, 0
    return image


MODELS = {
    "two outputs": (lambda: Net(lambda m, h: F.relu(h), head=False), X, {}),
    "a tuple": (lambda: nn.Sequential(Net(lambda m, h: F.relu(h)), Splits()), X, {}),
    "a float32 cast": (lambda: Net(lambda m, h: F.relu(h.float() * torch.ones(6))), X, {}),
    "a module that refuses copies": (lambda: nn.Sequential(nn.Linear(6, 6), Refuses(), nn.Linear(6, 2)), X, {}),
    "a modulus": (lambda: Net(lambda m, h: torch.fft.rfft(F.relu(h)).abs().repeat(1, 2)[:, :6]), X, {}),
    "a cosine": (lambda: Net(lambda m, h: F.cosine_similarity(F.relu(h), h.flip(-1), dim=-1)[:, None].expand(-1, 6)), X, {}),
    "straight-through": (lambda: Net(lambda m, h: F.relu(h) + (h.round() - h).detach()), X, {}),
    "finite": (lambda: Net(lambda m, h: F.relu(torch.where(torch.isfinite(h), h, 0.0))), X, {}),
    "an LSTM": (Lstm, X, {}),
    "a black border": (Bordered, bordered(), {}),
    "token ids": (Text, IDS, {}),
    "a mapping": (Text, {"ids": IDS, "mask": (IDS > 2).float()}, {}),
    "one sample": (lambda: Net(lambda m, h: F.relu(h)), X[:1], {}),
    "with respect to a layer": (lambda: Net(lambda m, h: F.relu(h)), X, {"wrt": "layer"}),
    "a class": (lambda: Net(lambda m, h: F.relu(h)), X, {"target": 1}),
    "a direction": (lambda: Net(lambda m, h: F.relu(h)), X, {"target": targets.margin(2)}),
    "half weights": (lambda: Net(lambda m, h: F.relu(h) * (h.softmax(-1).to(torch.bfloat16).float())), X, {}),
    "samples by each other": (lambda: Net(lambda m, h: (h @ h.mT).softmax(-1) @ F.relu(h)), X, {}),
}


class Splits(nn.Module):
    def forward(self, y):
        return y[:, :1], {"rest": y[:, 1:]}


@pytest.mark.filterwarnings("ignore:1 calls")
@pytest.mark.parametrize("tracer", ["fx", "export"])
@pytest.mark.parametrize("name", MODELS)
def test_it_answers(name, tracer):
    make, inputs, asked = MODELS[name]
    example = {**inputs} if isinstance(inputs, dict) else inputs
    explainer = sp_fx.transform(fill(make()), tracer=tracer, example_inputs=example)
    found = sp_fx.check(explainer, inputs, **asked)
    assert found and [line.name for line in found.lines] == NAMES, str(found)
    answered = {line.name for line in found.lines if line.verdict == "ok"}
    assert answered >= {"forward", "capture", "coverage"} and ("affine identity" in answered or name == "an LSTM"), str(found)


def test_half_precision():
    model = fill(Net(lambda m, h: F.gelu(h))).to(torch.bfloat16)
    assert sp_fx.check(sp_fx.transform(model), X.bfloat16())


def test_batches_that_the_model_mixes():
    found = sp_fx.check(sp_fx.transform(fill(Net(lambda m, h: F.relu(h - h.mean(0))))), X)
    assert found and found["samples"].verdict == "not applicable" and "mixes" in found["samples"].note


def test_a_mixture_that_a_layer_norm_over_one_number_hides():
    def hidden(m, h):
        pooled = h.mean(-1, keepdim=True)
        weights = (pooled @ pooled.mT).softmax(-1)  # of each sample at the others
        return h + F.layer_norm(weights @ pooled, (1,))

    found = sp_fx.check(sp_fx.transform(fill(Net(hidden))), X)
    assert found and found["samples"].verdict == "not applicable" and "mix" in found["samples"].note


# -- and what is wrong is found


def test_a_map_that_depends_on_the_other_samples_fails(monkeypatch):
    row = table.TABLE["relu"]
    wrong = dataclasses.replace(row, adjoint=lambda v, z, tau: v * torch.special.ndtr(z / z.std()))
    explainer = sp_fx.transform(fill(Net(lambda m, h: F.relu(h))))
    monkeypatch.setitem(table.TABLE, "relu", wrong)
    assert sp_fx.check(explainer, X)["samples"].verdict == "FAILED"


def test_a_graph_that_lost_a_path_fails():
    model = fill(Net(lambda m, h: F.relu(h) + h))
    explainer = sp_fx.transform(model)
    (add,) = [node for node in explainer.graph.nodes if node.name.startswith("add")]
    with explainer.graph.inserting_before(add):
        cut = explainer.graph.call_method("detach", (add.args[1],))
    add.args = (add.args[0], cut)
    explainer.recompile()
    explainer._compare = None
    found = sp_fx.check(explainer, X)
    assert found["forward"].verdict == "ok" and found["capture"].verdict == "FAILED"
    assert "another gradient" in found["capture"].note


def test_a_wrong_adjoint_of_a_surrogate_fails(monkeypatch):
    explainer = sp_fx.transform(fill(MODELS["a cosine"][0]()))
    row = table.TABLE["surrogate"]
    wrong = dataclasses.replace(row, adjoint=lambda *args, **kwargs: 1.01 * row.adjoint(*args, **kwargs))
    monkeypatch.setitem(table.TABLE, "surrogate", wrong)
    assert sp_fx.check(explainer, X)["affine identity"].verdict == "FAILED"


def experts(name, function, backward):
    """An op of `torch.library`, as the products of grouped matrices are in mixtures of experts; returns a model that calls it."""
    op = torch.library.custom_op(f"sp_fx_tests::{name}", mutates_args=(), schema="(Tensor x, Tensor w) -> Tensor")(function)
    op.register_fake(lambda x, w: x.new_empty(*x.shape[:-1], w.shape[1]))
    op.register_autograd(
        lambda ctx, v: (backward(v, *ctx.saved_tensors), None),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )
    return fill(Net(lambda m, h: F.relu(op(h, m.layer.weight))))


@pytest.mark.filterwarnings("ignore:1 calls")
@pytest.mark.parametrize("tracer", ["fx", "export"])
def test_the_identity_holds_through_an_op_whose_tangent_pytorch_drops(tracer):
    def line(model):
        return sp_fx.check(sp_fx.transform(model, tracer=tracer, example_inputs=X, verify=False), X)["affine identity"]

    right = line(experts(f"grouped_{tracer}", lambda x, w: x @ w, lambda v, x, w: v @ w.T))
    assert right.verdict == "ok" and right.found < 1e-9
    wrong = line(experts(f"wrong_{tracer}", lambda x, w: x @ w, lambda v, x, w: v @ w))
    assert wrong.verdict == "FAILED" and wrong.found > 1e-2
    bent = line(experts(f"bent_{tracer}", lambda x, w: (x @ w).tanh(), lambda v, x, w: v * (1 - (x @ w).tanh() ** 2) @ w.T))
    assert bent.verdict == "not applicable" and "no forward-mode formula" in bent.note


def test_what_it_is_asked_about_is_left_as_it_was():
    model = fill(Text()).train()
    explainer = sp_fx.transform(model)
    before = copy.deepcopy(model.state_dict()), torch.get_rng_state(), IDS.clone()
    assert sp_fx.check(explainer, IDS)
    after = model.state_dict()
    assert all(torch.equal(t, after[k]) and t.dtype == after[k].dtype for k, t in before[0].items())
    assert torch.equal(before[1], torch.get_rng_state()) and torch.equal(before[2], IDS) and model.training
    assert all(p.grad is None and p.dtype == torch.float32 for p in (*model.parameters(), *explainer.parameters()))


def test_bad_questions():
    explainer = sp_fx.transform(fill(Net(lambda m, h: F.relu(h))))
    with pytest.raises(ValueError, match="names no activation"):
        sp_fx.check(explainer, X, wrt="lair")
    with pytest.raises(IndexError, match="target 7"):
        sp_fx.check(explainer, X, 7)
