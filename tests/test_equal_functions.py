"""Equal functions have equal maps, whatever their spelling, and alike lines in the report; near-misses are not recognised."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sp_fx
from helpers import fill
from spellings import SPELLINGS, Function, scores, written_softmax

X = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1.5


def transformed(model, tracer, **rules):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sp_fx.transform(model, tracer=tracer, example_inputs=X if tracer == "export" else None, rules=sp_fx.Rules(**rules))


def lines(report, place):
    """The kinds that were rewritten in a module, and whether something there was NOT REWRITTEN."""
    sites = [site for site in report.sites if site.place.startswith(f"{place}.") and not site.idle]
    return {site.kind for site in sites if site.status == "rewritten"}, any(s.status == "NOT REWRITTEN" for s in sites)


def test_there_are_enough():
    assert len(SPELLINGS) > 100 and sum(map(len, SPELLINGS.values())) > 500  # as docs/rules.md says


@pytest.mark.parametrize("tracer", ["fx", "export"])
@pytest.mark.parametrize("function", SPELLINGS)
def test_spellings(function, tracer):
    model = fill(Function(SPELLINGS[function])).double()
    explainer = transformed(model, tracer)
    outputs = explainer(X)
    assert all(torch.equal(a, b) for a, b in zip(outputs, model(X)))
    u = torch.randn(outputs[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    maps = [explainer.pullback(X, lambda out, i=i: (out[i].reshape(u.shape) * u).sum()) for i in range(len(outputs))]
    report = explainer.report()
    kinds = NORMS_ALIKE.get(function)
    for i, (y, v) in enumerate(zip(outputs, maps)):
        where = f"{function}, spelling {i}: {[s.sentence for s in report.sites if s.place.startswith(f'forms.{i}.')]}"
        torch.testing.assert_close(y.reshape(u.shape), outputs[0], rtol=1e-6, atol=1e-8, msg=lambda m, w=where: f"{w}\n{m}")
        assert (v - maps[0]).norm() <= 1e-6 * maps[0].norm(), where
        assert lines(report, f"forms.{i}")[1] == lines(report, "forms.0")[1], where
        if kinds is None:
            assert lines(report, f"forms.{i}") == lines(report, "forms.0"), where


# Norms of the same numbers by other names have other kinds, each with its rule: a group norm of one group is a layer norm.
NORMS_ALIKE = dict.fromkeys(
    ("layer norm", "rms norm", "normalisation by length", "normalisation by magnitudes", "group norm", "instance norm"), True
)


OTHER_RULES = {
    "attention='frozen', product='frozen'": ("values behind a gate", "a mixture of softmaxes"),
    "attention=0.5": (
        *("attention", "attention, and the entropy of its weights", "attention beside its weights", "masked weights"),
        *("masked scores", "talking heads", "attention pooling", "mixture of experts", "attention pooling over two axes"),
        *("weights of weights", "weights twice", "the difference of two"),
    ),
    "product='frozen'": ("swiglu", "geglu", "reglu", "swish, times two others"),
    "silu=None, gelu=None": ("swiglu", "geglu", "thrice swish", "twice gelu", "swish, times two others"),
    "silu=0.3, relu=0.4, leaky_relu='frozen'": ("swiglu", "reglu", "swish and its argument", "twice a leaky relu"),
    "layer_norm=None, normalize=None, rms_norm=None": ("rms norm", "cosine of two", "cosines of all pairs"),
}  # fmt: skip


@pytest.mark.parametrize(("rules", "function"), [(rules, f) for rules, functions in OTHER_RULES.items() for f in functions])
def test_spellings_under_other_rules(rules, function):
    model = fill(Function(SPELLINGS[function])).double()
    explainer, plain = transformed(model, "fx", **eval(f"dict({rules})")), transformed(model, "fx")
    u = torch.randn(model(X)[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    targets = [lambda out, i=i: (out[i].reshape(u.shape) * u).sum() for i in range(len(model.forms))]
    maps = [explainer.pullback(X, target) for target in targets]
    for i, v in enumerate(maps):
        assert (v - maps[0]).norm() <= 1e-6 * maps[0].norm(), (function, i)
    if rules != "attention='frozen', product='frozen'":  # which is what the defaults are there
        assert (maps[0] - plain.pullback(X, targets[0])).norm() > 1e-3 * maps[0].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_large_scores_do_not_overflow_at_a_temperature(dtype):
    forms = [
        lambda m, h: (20 * scores(m, h)).softmax(-1) @ m.v(h),
        lambda m, h: written_softmax(20 * scores(m, h)) @ m.v(h),
        lambda m, h: (lambda e: e @ m.v(h) / e.sum(-1, keepdim=True))(
            (scores(m, h) * (4 if dtype == torch.float32 else 1)).exp()
        ),
    ]
    model = fill(Function(forms)).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        explainer = sp_fx.transform(model, rules=sp_fx.Rules(attention=0.1))
    for i in range(len(forms)):
        found = explainer.pullback(X.to(dtype), lambda out, i=i: out[i].float().sum())
        assert found.isfinite().all() and found.any()


def test_attention_over_nothing():
    model = fill(Function([lambda m, h: h.sum(1) + (m.s(h[:, :0]).softmax(1) * m.v(h[:, :0])).sum(1)])).double()
    found = transformed(model, "fx", attention=0.5).pullback(X, lambda out: out[0].sum())
    assert found.isfinite().all() and found.any()


class Rows(nn.Module):
    """A function's outputs as one, [B, N]."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return torch.cat([y.reshape(x.shape[0], -1) for y in self.function(x)], 1)


@pytest.mark.parametrize("function", [name for name in SPELLINGS if "over samples" not in name])
def test_checks_of_spellings(function):
    """The frozen network is affine, hard gates have the gradient, and coverage counts what is written out."""
    model = fill(Rows(Function(SPELLINGS[function]))).double()
    found = sp_fx.check(transformed(model, "fx"), X, model=model)
    assert found, found


EXPORTS_QUANTILE = not torch.__version__.startswith("2.11")
NEAR_MISSES = {
    "a gate by another tensor": lambda m, h: h * torch.sigmoid(h.flip(-1)),
    "relu's gate of another tensor": lambda m, h: h * torch.sigmoid(h.roll(1, -1) * 2),
    "a steep sigmoid beside 0": lambda m, h: h * torch.sigmoid(100 * h - 25),
    "swish of a shifted argument": lambda m, h: h * torch.sigmoid(h + 0.01),
    "swish of an offset": lambda m, h: (h + 0.01) * torch.sigmoid(h),
    "gelu with another constant": lambda m, h: 0.5 * h * (1 + torch.erf(h / 1.5)),
    "times its energy": lambda m, h: h * h.pow(2).mean(-1, keepdim=True),
    "times its length": lambda m, h: h * h.norm(dim=-1, keepdim=True),
    "over its squared length": lambda m, h: h / (1e-6 + h.pow(2).sum(-1, keepdim=True)),
    "over its sum": lambda m, h: h / h.exp().sum(-1, keepdim=True),
    "over the length of another": lambda m, h: h / h.flip(1).mul(2).add(1).norm(dim=-1, keepdim=True),
    "over its length and one": lambda m, h: h / (1 + h.norm(dim=-1, keepdim=True)),
    "over its squares and their mean": lambda m, h: h / (h.pow(2) + h.pow(2).mean(-1, keepdim=True)).sqrt(),
    "over its squares in its length": lambda m, h: h / (h.pow(2) / h.norm(dim=-1, keepdim=True) + 1e-3),
    "over its length twice": lambda m, h: h / h.norm(dim=-1, keepdim=True) ** 2 + 0 * (h / h.pow(2).sum(-1, keepdim=True)),
    "two products over one length": lambda m, h: (h * h.flip(1)).sum(-1) / (h.norm(dim=-1) * h.norm(dim=-1)),
    "one product over another": lambda m, h: (lambda e: (e @ m.v(h)) / (99 + e @ m.q(h)))((m.q(h) @ m.k(h).mT / 9).exp()),
    "exponentials over their largest": lambda m, h: (lambda e: (e @ m.v(h)) / e.amax(-1, True).detach())(m.q(h).mT.exp()),
    "exponentials that are not divided": lambda m, h: (m.q(h) @ m.k(h).mT / 9).exp() @ m.v(h),
    "over the sum of some": lambda m, h: (lambda e: (e / (e * m.mask).sum(-1, True)) @ m.v(h))((m.q(h) @ m.k(h).mT / 9).exp()),
    "over the sum of some, late": lambda m, h: (lambda e: e @ m.v(h) / e.masked_fill(m.mask == 0, 0.0).sum(-1, True))(
        (m.q(h) @ m.k(h).mT / 9).exp()
    ),
    "a cross-entropy": lambda m, h: (lambda k: -(m.q(h).softmax(-1) * (k - k.logsumexp(-1, True))).sum(-1))(m.k(h)),
    "likeness by a matrix": lambda m, h: ((m.q(h).softmax(-1) @ m.heads.weight[0, 0].expand(8, 8)) * m.k(h).softmax(-1)).sum(-1),
    "a power near a half": lambda m, h: h / h.pow(2).mean(-1, keepdim=True) ** 0.503,
    "over the sum of other exponentials": lambda m, h: (lambda s: s.exp() * m.v(h) / (2 * s).exp().sum(-1, True))(m.q(h) / 9),
    "a gate and one of another": lambda m, h: h * m.q(h) * torch.sigmoid(m.v(h) + h),
    "a gate of twice the signal": lambda m, h: h * m.q(h) * torch.tanh(h),
    "weights along another axis": lambda m, h: F.silu(m.q(h) * 0) + (m.q(h) @ m.k(h).mT).softmax(1) @ m.v(h),
    "a softmax gate": lambda m, h: m.v(h) * m.q(h).softmax(-1),
    "a softmax gate before a mean of tokens": lambda m, h: (m.v(h) * m.q(h).softmax(-1)).mean(1),
    "squared weights": lambda m, h: (m.q(h) @ m.k(h).mT).softmax(-1) ** 2 @ m.v(h),
    "likeness of two softmaxes": lambda m, h: (m.q(h).softmax(-1) * m.v(h).softmax(-1)).sum(-1),
    "soft-argmax": lambda m, h: (h.softmax(-1) * torch.arange(8.0, dtype=h.dtype)).sum(-1),
    "a signal by a soft-argmax": lambda m, h: h * (m.v(h).softmax(-1) * torch.arange(8.0, dtype=h.dtype)).sum(-1, True),
    "a signal by a product of weights": lambda m, h: h * (m.v(h).softmax(-1) @ torch.arange(8.0, dtype=h.dtype))[..., None],
    "a rate by the size": lambda m, h: h * torch.sigmoid(h / (h.size(-1) - 5.5)),
    "straight-through": lambda m, h: h + (h.round() - h).detach(),
    "stopped gate": lambda m, h: h * torch.sigmoid(h).detach(),
    "stopped signal": lambda m, h: h.detach() * torch.sigmoid(h),
    "top-k mask": lambda m, h: h * (h >= h.topk(3, -1).values[..., -1:]),
    "quantile": lambda m, h: h * (h > h.quantile(0.5, dim=-1, keepdim=True)),
    "median": lambda m, h: h * (h > h.median(-1, keepdim=True).values),
    "threshold beside 0": lambda m, h: torch.where(10 * h > 3, h, 0.0),
    "winner takes all": lambda m, h: h * (h == h.amax(-1, keepdim=True)),
    "losers masked": lambda m, h: h.masked_fill(h != h.amax(-1, keepdim=True), 0.0),
    "chosen of two others": lambda m, h: torch.where(h > 0, h.flip(-1), h.roll(1, -1)),
    "sorted": lambda m, h: h.gather(-1, h.argsort(-1)),
    "a masked scatter": lambda m, h: h.masked_scatter(h > 0.1, h.flip(1)),
}


# torch.export of 2.11 compares quantile's tensors, which it cannot trace; it says so.
@pytest.mark.parametrize(
    ("name", "tracer"),
    [(n, t) for n in NEAR_MISSES for t in ("fx", "export") if (n, t) != ("quantile", "export") or EXPORTS_QUANTILE],
)
def test_near_misses_keep_their_derivative(name, tracer):
    model = fill(Function([NEAR_MISSES[name]])).double()
    explainer = transformed(model, tracer, silu=None)
    x = X.clone().requires_grad_()
    (y,) = model(x)
    u = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (expected,) = torch.autograd.grad(y, x, u)
    found = explainer.pullback(X, lambda out: (out[0] * u).sum())
    assert (found - expected).norm() <= 1e-12 * expected.norm().clamp_min(1)
    sites = [s for s in explainer.report().sites if s.place.startswith("forms.0")]
    assert sites and not [s for s in sites if s.status == "rewritten" and not s.idle]  # each has a line


CHOICES = {
    "in place": lambda h: h.clone().masked_fill_(h > 0.3, 0.0),
    "equal": lambda h: h * (h == h.amax(-1, keepdim=True)).to(h.dtype),
    "different": lambda h: torch.where(h != h.amax(-1, keepdim=True), 0.5 * h, h),
    "index": lambda h: h[h > 0.1].sum()[None],
    "argsort": lambda h: h.gather(-1, torch.argsort(h, -1)),
    "take along": lambda h: torch.take_along_dim(h, h.argsort(-1, descending=True), -1),
    "close": lambda h: h * torch.isclose(h, h.flip(-1)).logical_not(),
    "bucketize": lambda h: h * torch.bucketize(h.detach() * 1 + h, torch.tensor([-1.0, 0.0, 1.0], dtype=h.dtype)),
    "casts": lambda h: h * (h > 0.2).long().bool().to(h.dtype),
    "positions of the largest": lambda h: h * torch.zeros_like(h).scatter(-1, h.topk(2, -1).indices, 1.0),
    "a code of the largest": lambda h: F.one_hot(h.argmax(-1), 8) * h,
    "order": lambda h: h.gather(-1, h.sort(-1).indices),
    "casts by dtype": lambda h: h + h.to(torch.int64),
    "signs": lambda h: h.flip(-1) * torch.signbit(h),
    "masks of masks": lambda h: h * ((h > 0.2) & ~(h > 0.7)),
}


@pytest.mark.parametrize("tracer", ["fx", "export"])
@pytest.mark.parametrize("name", CHOICES)
def test_choices_by_what_the_model_computed_are_listed(name, tracer):
    model = fill(Function([lambda m, h: CHOICES[name](h)])).double()
    report = transformed(model, tracer).report()
    (site,) = report.of("NOT REWRITTEN")
    assert "comparing what the model computed" in site.reason and "To do: put it" in report.explain(site.place)


def test_what_dead_code_reads_is_no_part_of_a_gate():
    def dead(m, h):
        r = F.relu(h)
        unused = r.abs() + r  # noqa: F841
        return r * h

    model = fill(Function([dead, lambda m, h: F.relu(h) ** 2])).double()
    explainer = transformed(model, "fx")
    maps = [explainer.pullback(X, lambda out, i=i: out[i].sum()) for i in range(2)]
    torch.testing.assert_close(*maps)


def test_what_else_reads_the_inside_of_a_gate_keeps_its_signal():
    def shared(m, h):
        s = torch.sigmoid(h)
        return h * s + m.v(s)

    model = fill(Function([shared, lambda m, h: F.silu(h) + m.v(torch.sigmoid(h))])).double()
    explainer = transformed(model, "fx")
    maps = [explainer.pullback(X, lambda out, i=i: out[i].sum()) for i in range(2)]
    torch.testing.assert_close(*maps)


class Undecided(nn.Module):
    """Whether its softmax is attention depends on the rank of its input."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = self.layer(x)
        return self.head(F.relu((h.softmax(-1) * h).sum(1)))


def test_shapes_decide_at_the_first_call():
    model = fill(Undecided()).double()
    explainer, calls = sp_fx.transform(model), []
    assert any(note.startswith("not decided yet") for note in explainer.report().notes)
    handle = explainer.layer.register_forward_hook(lambda *args: calls.append(1))
    found = explainer.pullback(X, 1)
    assert len(calls) == 1 and not any(note.startswith("not decided yet") for note in explainer.report().notes)
    handle.remove()
    torch.testing.assert_close(explainer.pullback(X, 1), sp_fx.transform(model, example_inputs=X).pullback(X, 1))
    assert len(calls) == 1 and [s.status for s in explainer.report().sites if s.op == "softmax"] == ["kept"]
    torch.testing.assert_close(explainer.pullback(X, 1), found)


class Masked(nn.Module):
    """Masks and positions that are the caller's choose nothing of the model's."""

    def __init__(self):
        super().__init__()
        self.table, self.buckets, self.head = nn.Embedding(11, 8), nn.Embedding(4, 8), nn.Linear(8, 3)

    def forward(self, ids):
        mask = (ids != 0) & (ids < 40)
        h = self.table(ids % 11) + self.buckets(ids // 3 % 4)
        h = F.relu(h.masked_fill(~mask[..., None], 0.0))
        total = mask.sum(1, keepdim=True).clamp(min=1)
        ranks = ids.argsort(1).argsort(1)
        return self.head((h * mask[..., None] + 0 * ranks[..., None]).sum(1) / total)


@pytest.mark.parametrize("tracer", ["fx", "export"])
def test_masks_and_positions_of_the_caller_are_no_choices(tracer):
    ids = torch.randint(0, 30, (2, 6), generator=torch.Generator().manual_seed(0))
    explainer = sp_fx.transform(fill(Masked()), tracer=tracer, example_inputs=ids)
    assert not explainer.report().of("NOT REWRITTEN") and len(explainer.report().of("rewritten")) == 1
    found = sp_fx.check(explainer, ids)
    assert found and "with respect to table" in found["tau -> 0"].note
