"""Forwards that ask for the values of what they compute: the graph is the path that the example takes, and says so where another
call takes another one."""

import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sp_fx
from helpers import fill, relative
from sp_fx.gates.dual_path import plain_derivatives
from sp_fx.program.program import ProgramError

PLAIN = sp_fx.Rules(**dict.fromkeys(sp_fx.gates.rules.KINDS))


def truth(h, mask):
    return h + 1 if mask.all() else h * 2


def whole_number(h, mask):
    return h[:, : int(mask.sum(1).max())].sum(1, keepdim=True) + h


def listed(h, mask):
    return torch.stack([row[:n].sum(0) + row for row, n in zip(h, mask.sum(1).tolist())])


def items(h, mask):
    return h * (mask.sum().item() + 1)


def indices(h, mask):
    kept = mask[0].nonzero()[:, 0]
    return h[:, kept].sum(1, keepdim=True) + h


def masked(h, mask):
    return h + h[mask].mean(0)


def written_over(h, mask):
    out = torch.zeros_like(h)
    out[mask] = h[mask].relu()
    return out


def of_two(h, mask):
    return h if torch.equal(mask[0], mask[1]) else h.tanh()


FORWARDS = [truth, whole_number, listed, items, indices, masked, written_over, of_two]


class Asks(nn.Module):
    def __init__(self, asks):
        super().__init__()
        torch.manual_seed(0)
        self.asks, self.first, self.last = asks, nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x, mask):
        return self.last(F.gelu(self.asks(self.first(x), mask)).mean(1))


X = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
MASKS = [
    torch.ones(2, 5, dtype=torch.bool),
    torch.tensor([[True] * 4 + [False], [True] * 2 + [False] * 3]),
    torch.tensor([[True] * 3 + [False] * 2] * 2),
]


def gradient(model, x, mask):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(model(x, mask)[:, 1].sum(), x)[0]


@pytest.mark.parametrize("asks", FORWARDS)
def test_each_path_is_captured_when_it_is_met(asks):
    model = Asks(asks).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the plain gradient
        explainer = sp_fx.transform(model, rules=PLAIN, tracer="export", example_inputs=(X, MASKS[0]))
        for mask in [*MASKS, MASKS[0]]:
            assert torch.equal(explainer(X, mask), model(X, mask))
            found = explainer.pullback(X, 1, forward_kwargs={"mask": mask})
            assert relative(found, gradient(model, X, mask)) <= 1e-6


@pytest.mark.parametrize("asks", [truth, whole_number, of_two])
def test_the_report_names_the_line(asks):
    explainer = sp_fx.transform(Asks(asks).eval(), tracer="export", example_inputs=(X, MASKS[0]))
    line = asks.__code__.co_firstlineno + 1
    assert f"test_capture_answers.py:{line}, in {asks.__name__}" in str(explainer.report())
    assert "the graph is the path that the forward takes on its example" in str(explainer.report())


def test_what_cannot_be_captured_again_refuses_another_path():
    explainer = sp_fx.transform(Asks(truth).eval(), example_inputs=(X, MASKS[0]))
    saved = pickle.loads(pickle.dumps(explainer))
    assert torch.equal(saved(X, MASKS[0]), explainer(X, MASKS[0]))
    with pytest.raises(ValueError, match=r"it asks for bool at .*, in truth, which was True and is False now"):
        saved(X, MASKS[1])


class InTheMiddle(nn.Module):
    """Asks for a value of what a layer computes, which is known when the graph runs."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = self.first(x)
        return self.last(h.relu() if h.sum() > 0 else h.tanh())


def test_a_path_that_a_layer_chooses_is_refused_where_the_layer_chooses_another():
    torch.manual_seed(0)
    model = InTheMiddle().eval()
    x = torch.randn(4, 4)
    other = x * -5
    assert (model.first(x).sum() > 0) != (model.first(other).sum() > 0)
    explainer = sp_fx.transform(model, example_inputs=x)
    assert torch.equal(explainer(x), model(x)) and explainer.pullback(x, 1).norm() > 0
    with pytest.raises(ValueError, match="takes another path than on its example"):
        explainer(other)
    assert torch.equal(explainer(x), model(x))


def test_a_number_that_floats_is_no_path():
    class Scaled(nn.Module):
        def forward(self, x):
            return x.relu() * (2 if float(x.abs().max()) > 1 else 3)

    with pytest.raises(sp_fx.CaptureError, match="asks for the value of what it computes"):
        sp_fx.transform(Scaled(), example_inputs=torch.randn(2, 3))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2)
        self.head = nn.Linear(8, 3)

    def forward(self, x, mask=None, padding=None):
        return self.head(self.layers(x, mask=mask, src_key_padding_mask=padding)[:, -1])


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 12, batch_first=True), 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x, memory, mask=None):
        return self.head(self.layers(x, memory, tgt_mask=mask)[:, -1])


def causal(length):
    return nn.Transformer.generate_square_subsequent_mask(length)


def test_transformers_of_pytorch_with_causal_and_padding_masks():
    """They compare the mask with a causal one, to take a faster path."""
    x = torch.randn(2, 6, 8)
    padding = torch.tensor([[False] * 6, [True] * 2 + [False] * 4])
    model = Encoder().eval()
    for given in ({"mask": causal(6)}, {"padding": padding}, {"mask": causal(6), "padding": padding}):
        explainer = sp_fx.transform(model, example_inputs={"x": x, **given})
        assert {s.kind for s in explainer.report().of("rewritten")} == {"attention", "layer_norm", "relu"}
        assert not explainer.report().of("NOT REWRITTEN")
        assert relative(explainer(x, **given), model(x, **given)) <= 1e-6
        found = explainer.pullback(x, 1, forward_kwargs=given)
        assert "padding" not in given or not found[1, :2].any()
    model = Decoder().eval()
    explainer = sp_fx.transform(model, example_inputs={"x": x, "memory": x, "mask": causal(6)})
    assert sum(s.kind == "attention" for s in explainer.report().of("rewritten")) == 2
    some = torch.full((6, 6), float("-inf")).triu(3)
    for mask in (causal(6), some, torch.zeros(6, 6)):
        assert relative(explainer(x, x, mask), model(x, x, mask)) <= 1e-6


class OfABuffer(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(4, 3)
        self.register_buffer("flag", torch.tensor(True))

    def forward(self, x):
        return self.head(x.relu() if self.flag else x)


def test_a_program_is_one_path():
    explainer = sp_fx.transform(Asks(truth).eval(), example_inputs=(X, MASKS[0]))
    with pytest.raises(ProgramError, match=r"goes by values of its inputs, at .*, in truth"):
        explainer.compile("pullback", example_inputs=(X, MASKS[0]), inductor=False)
    constant = sp_fx.transform(OfABuffer().eval(), tracer="export", example_inputs=X[:, 0])
    assert constant.compile("pullback", example_inputs=X[:, 0], inductor=False).error <= 1e-6


class Experts(nn.Module):
    """A mixture of experts as libraries write it out: a loop over the experts that have tokens, each on its own tokens."""

    def __init__(self):
        super().__init__()
        self.inner, self.gate = nn.Linear(8, 8), nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(4))

    def forward(self, x):
        h = self.inner(x).reshape(-1, 8)
        top, chosen = self.gate(h).softmax(-1).topk(2, -1)
        total, mask = torch.zeros_like(h), F.one_hot(chosen, 4).permute(2, 1, 0)
        for (expert,) in torch.greater(mask.sum((-1, -2)), 0).nonzero():
            place, token = torch.where(mask[expert])
            total.index_add_(0, token, self.experts[int(expert)](h[token]) * top[token, place, None])
        return total.view_as(x)


def test_tokens_that_go_to_an_expert_may_be_any():
    """The path is which experts have tokens; how many they have, each call says."""
    model = fill(Experts()).double()
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, 8, generator=draw, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        explainer = sp_fx.transform(model, example_inputs=x)
    assert explainer.report().tracer == "torch.export" and any("path" in note for note in explainer.report().notes)
    # How many tokens there are on the example is no number of samples.
    assert {site.scale for site in explainer.report().of("rewritten")} == {"absolute"}
    others = [torch.randn(b, n, 8, generator=draw, dtype=torch.float64) for b, n in ((2, 9), (3, 9), (1, 20), (4, 12))]
    for z in (x, *others):
        counts = model.gate(model.inner(z)).topk(2, -1).indices.flatten().bincount(minlength=4)
        assert counts.all()  # the path of the example
        assert torch.equal(explainer(z), model(z))
        z = z.clone().requires_grad_()
        (expected,) = torch.autograd.grad(model(z).pow(2).sum(), z)
        with plain_derivatives():
            (found,) = torch.autograd.grad(explainer(z).pow(2).sum(), z)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    one = x[:1, :1]  # a token, which has two experts
    with pytest.raises(ValueError, match=r"another path than on its example.*with an example that takes this one"):
        explainer(one)


def test_a_frozen_map_through_experts_is_that_of_a_loop_by_hand():
    model = fill(Experts()).double()
    x = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        explainer = sp_fx.transform(model, example_inputs=x, rules=sp_fx.Rules.frozen())
    z = x.clone().requires_grad_()
    h = model.inner(z).reshape(-1, 8)
    top, chosen = model.gate(h).softmax(-1).topk(2, -1)
    y = torch.stack([sum(top[i, k] * model.experts[int(e)](h[i]) for k, e in enumerate(chosen[i])) for i in range(len(h))])
    (expected,) = torch.autograd.grad((y.view_as(x) * u).sum(), z)
    torch.testing.assert_close(explainer.pullback(x, u), expected, rtol=1e-10, atol=1e-12)
