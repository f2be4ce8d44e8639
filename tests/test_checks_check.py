"""The checks find what is wrong: each is shown something broken."""

import copy
import dataclasses
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sp_fx
from helpers import fill
from sp_fx.gates import table


def convolutional():
    return fill(nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1), nn.Conv2d(6, 6, 3),
        nn.LeakyReLU(0.1), nn.AdaptiveMaxPool2d((3, 2)), nn.Hardtanh(-2, 2), nn.Flatten(), nn.Linear(36, 5),
    ))  # fmt: skip


def quiet(model):
    """The explainer of a model that has no gate, or one that has no rule."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sp_fx.transform(model)


class Everything(nn.Module):
    """A row of the table after the other."""

    def __init__(self):
        super().__init__()
        self.stem, self.attend = nn.Conv2d(3, 8, 3), nn.MultiheadAttention(8, 2, batch_first=True)
        self.norms = nn.Sequential(nn.GroupNorm(2, 8), nn.GELU(), nn.InstanceNorm2d(8, affine=True), nn.LocalResponseNorm(3, 0.5))
        self.late, self.rms, self.q, self.head = nn.LayerNorm(8), nn.RMSNorm(8), nn.Linear(8, 24), nn.Linear(8, 4)

    def forward(self, x):
        x = self.norms(F.hardswish(self.stem(x)))
        x = x * torch.sigmoid(x.mean((2, 3), keepdim=True))
        x = self.late(x.flatten(2).transpose(1, 2))
        x = x + self.attend(x, x, x, need_weights=False)[0]
        q, k, v = self.q(self.rms(x)).chunk(3, -1)
        x = x + (q @ k.transpose(-2, -1)).softmax(-1) @ v
        x = F.glu(torch.cat([F.elu(x), F.mish(x)], -1))
        x = x * torch.sigmoid(1.702 * x) + F.normalize(F.silu(x), dim=-1)
        return self.head(x.amax(1) + F.scaled_dot_product_attention(x, x, x).mean(1)).tanh()


X = torch.randn(2, 3, 10, 9, generator=torch.Generator().manual_seed(0))


def test_all_is_well():
    model = convolutional()
    found = sp_fx.check(sp_fx.transform(model), X)
    assert found and [line.verdict for line in found.lines] == ["ok"] * 6
    assert found["forward"].note == "to the bit" and found["tau -> 0"].found < 1e-9
    told = str(found).splitlines()
    assert told[0] == "Sequential: every check holds"
    assert told[-1].endswith("each gating op that the model runs for its outputs is in the report (5 run)")
    assert "(none run)" in str(sp_fx.check(quiet(nn.Linear(270, 2)), X.flatten(1)))


@pytest.mark.parametrize("rules", [sp_fx.Rules(), sp_fx.Rules(attention=0.6, product="frozen"), sp_fx.Rules.paper()])
def test_every_row_passes(rules):
    found = sp_fx.check(sp_fx.transform(fill(Everything()), rules=rules), X)
    assert found, str(found)
    assert found["affine identity"].verdict == "ok" and "gelu" in found["tau -> 0"].note


@pytest.mark.parametrize("kind", ["relu", "max_pool", "leaky_relu"])
def test_a_wrong_adjoint_breaks_the_identity(kind, monkeypatch):
    model = convolutional()
    row = table.TABLE[kind]
    wrong = dataclasses.replace(row, adjoint=lambda *args, **kwargs: 1.01 * row.adjoint(*args, **kwargs))
    monkeypatch.setitem(table.TABLE, kind, wrong)
    found = sp_fx.check(sp_fx.transform(model), X)
    assert not found and found["affine identity"].verdict == found["tau -> 0"].verdict == "FAILED"
    assert "a check FAILED" in str(found)


@pytest.mark.parametrize("kind", ["attention", "mix", "layer_norm", "rms_norm", "gelu", "written", "glu", "amax", "normalize"])
def test_a_wrong_adjoint_of_a_smooth_gate_breaks_the_identity(kind, monkeypatch):
    row = table.TABLE[kind]
    wrong = dataclasses.replace(row, adjoint=lambda *args, **kwargs: 1.01 * row.adjoint(*args, **kwargs))
    monkeypatch.setitem(table.TABLE, kind, wrong)
    found = sp_fx.check(sp_fx.transform(fill(Everything()), rules=sp_fx.Rules(product="frozen")), X)
    assert found["affine identity"].verdict == "FAILED"


def test_other_weights_are_another_forward():
    model = convolutional()
    explainer = sp_fx.transform(model)
    model[0].bias = nn.Parameter(model[0].bias + 1e-4)  # replaced, which the explainer does not follow
    found = sp_fx.check(explainer, X)
    assert found["forward"].verdict == "FAILED" and 0 < found["forward"].found < 1e-2


def test_a_gate_that_is_not_listed_is_missed():
    model = convolutional()
    explainer = sp_fx.transform(model, example_inputs=X)
    report = explainer.report()
    explainer._report = dataclasses.replace(report, sites=report.sites[1:])
    found = sp_fx.check(explainer, X)
    assert found["coverage"].verdict == "FAILED" and found["coverage"].note == "relu: 1 run, 0 in the report"


def test_a_module_that_was_not_seen_into_says_what_to_do():
    model = fill(nn.Sequential(nn.Identity(), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)))
    x = torch.randn(2, 4, 8)
    found = sp_fx.check(quiet(model), x)["coverage"]
    assert found.verdict == "FAILED" and "did not see into TransformerEncoderLayer at 1: pass example_inputs" in found.note
    assert sp_fx.check(sp_fx.transform(model, example_inputs=x), x)


def test_nothing_of_pytorch_is_warned_of():
    """Its forward-mode derivatives are scripted when the first of a process is taken."""
    code = "import torch, sp_fx; from torch import nn; x = torch.randn(2, 3)\n"
    code += "assert sp_fx.check(sp_fx.transform(nn.Sequential(nn.Linear(3, 3), nn.ReLU())), x)"
    command = [sys.executable, "-W", "error::FutureWarning", "-c", code]
    assert subprocess.run(command, capture_output=True, text=True).stderr == ""


def test_several_classes_for_each_sample_are_checked_as_their_sum():
    explainer = sp_fx.transform(convolutional())
    for target in ([[0, 1, 2], [3, 4, 0]], np.array([[0, 1, 2], [3, 4, 0]]), [1, 4]):
        assert sp_fx.check(explainer, X, target)
    with pytest.raises(ValueError, match=r"\[2, T\] for this batch, got \[3\]"):
        sp_fx.check(explainer, X, [0, 1, 2])


def test_what_was_not_rewritten_is_told():
    class Net(nn.Module):
        def forward(self, x):
            return x.relu() + torch.round(x)

    with pytest.warns(UserWarning, match="NOT REWRITTEN"):
        explainer = sp_fx.transform(Net())
    assert "1 NOT REWRITTEN" in sp_fx.check(explainer, torch.randn(3, 4))["coverage"].note


def test_which_model_it_was_made_from():
    model = convolutional()
    explainer = sp_fx.transform(model)
    assert explainer.origin is model and not any(m is model for m in explainer.modules())
    other = copy.deepcopy(explainer)
    assert other.origin is None and pickle.loads(pickle.dumps(explainer)).origin is None
    with pytest.raises(ValueError, match="does not know"):
        sp_fx.check(other, X)
    assert sp_fx.check(other, X, model=model)
    with pytest.raises(TypeError, match="expected what transform"):
        sp_fx.check(model, X)


def test_nothing_is_changed():
    model = convolutional().train()
    explainer = sp_fx.transform(model)
    before = {k: v.clone() for k, v in (*model.state_dict().items(), *explainer.state_dict().items())}
    graph, given = str(explainer.graph), X.clone()
    assert sp_fx.check(explainer, given)
    after = {**model.state_dict(), **explainer.state_dict()}
    assert all(torch.equal(v, after[k]) and v.dtype == after[k].dtype for k, v in before.items())
    assert model.training and str(explainer.graph) == graph and torch.equal(given, X)
    assert all(p.grad is None for p in (*model.parameters(), *explainer.parameters()))


def test_several_inputs_and_keywords():
    class Masked(nn.Module):
        def forward(self, x, y, mask):
            return F.scaled_dot_product_attention(x, y, y * 2, attn_mask=mask).relu()

    x, y, mask = torch.randn(3, 2, 4, 5), torch.randn(3, 2, 6, 5), torch.rand(3, 1, 4, 6) > 0.3
    assert sp_fx.check(sp_fx.transform(Masked()), (x, y), forward_kwargs={"mask": mask})
