"""What the pass makes of each call: gates, what keeps its derivative, what works in place."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sp_fx
from helpers import relative


def net(function):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.function = function

        def forward(self, x):
            return self.function(x)

    return Net()


def explain(function, **options):
    return sp_fx.transform(net(function), **options)


RELUS = [F.relu, torch.relu, lambda x: x.relu(), lambda x: F.relu(x + 0, inplace=True), lambda x: (x + 0).relu_(),
         lambda x: torch.relu_(x + 0), lambda x: F.relu_(x + 0), torch.ops.aten.relu.default, torch.ops.aten.relu,
         nn.ReLU(), nn.ReLU(inplace=True)]  # fmt: skip


@pytest.mark.parametrize("form", range(len(RELUS)))
def test_every_call_form_is_one_gate(form):
    explainer = explain(RELUS[form])
    assert [s.kind for s in explainer.report().sites] == ["relu"]
    x = torch.randn(2, 5)
    given = x.clone()
    assert torch.equal(explainer(x), x.relu()) and torch.equal(x, given)


def test_subclasses_are_read_by_what_they_compute():
    class Doubled(nn.ReLU):
        def forward(self, x):
            return F.silu(x) * 2

    assert [s.kind for s in sp_fx.transform(Doubled()).report().of("rewritten")] == ["silu"]


# In-place calls whose effect is seen elsewhere: reference by what PyTorch computes.


def residual_after(x):
    y = x * 2
    z = F.relu(y, inplace=True)
    return z + y  # y was written over


def view_before(x):
    y = x * 2
    row = y.view(-1)
    F.relu(row, inplace=True)
    return y * 3  # seen through the other view


def written_after(x):
    y = x * 2
    z = F.gelu(y)
    y.add_(1)  # the gate has saved y, so that the model's own backward raises; `y += 1` would be traced out of place
    return z * y


def written_after_out_of_place(x):
    return F.gelu(x * 2) * (x * 2 + 1)


def unused_result(x):
    y = x * 2
    F.relu_(y)
    return y - 1


def on_the_input(x):
    x.relu_()
    return x * 2


def slice_of_a_tensor(x):
    y = x * 2
    y[:, :2].relu_()
    return y


@pytest.mark.filterwarnings("ignore:Net has no gate to rewrite")
@pytest.mark.parametrize("f", [residual_after, view_before, written_after, unused_result, on_the_input, slice_of_a_tensor])
def test_in_place_calls_mean_what_they_meant(f):
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    given = x.clone()
    rules = {name: sp_fx.Rules(gelu=None, relu=tau) for name, tau in [("plain", None), ("frozen", "frozen")]}
    reference = x.clone().requires_grad_()
    expected = f(reference * 1.0)
    grad = torch.autograd.grad(expected.sum(), reference)[0] if f is not written_after else None
    for each in [sp_fx.Rules()] if f is written_after else rules.values():
        explainer = explain(f, rules=each)
        assert torch.equal(explainer(x), expected) and torch.equal(x, given)
        found = explainer.pullback(x, lambda y: y.sum())
        if grad is not None:
            assert relative(found, grad) <= 1e-12  # away from the kink, hard gates are the derivative
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                expected.sum().backward()
            assert relative(found, explain(written_after_out_of_place).pullback(x, lambda y: y.sum())) <= 1e-12
    assert torch.equal(x, given)


LISTED = {
    lambda x: torch.fmax(x, x.flip(1)): "fmax",
    lambda x: torch.clamp(x, -x.abs().mean(), x.abs().mean()): "clamp",
    lambda x: F.fractional_max_pool2d(x[None, None], 2, 2): "fractional_max_pool2d",
    lambda x: torch.round(x) * x: "round",
}


@pytest.mark.parametrize("f", LISTED)
def test_gates_without_a_rule_are_visible(f):
    with pytest.warns(UserWarning, match="NOT REWRITTEN"):
        report = explain(f).report()
    assert LISTED[f] in [s.op for s in report.of("NOT REWRITTEN")] and "NOT REWRITTEN" in str(report)
    with pytest.raises(sp_fx.NotRewrittenError, match=LISTED[f]):
        explain(f, strict=True)


@torch.library.custom_op("sp_fx_tests::gated", mutates_args=())
def gated(x: torch.Tensor) -> torch.Tensor:
    return x.relu()


def test_custom_ops_are_opaque():
    with pytest.warns(UserWarning, match="gated is opaque"):
        report = explain(lambda x: torch.ops.sp_fx_tests.gated(x).relu()).report()
    assert [s.op for s in report.of("NOT REWRITTEN")] == ["gated"]


KEPT = {
    lambda x: x.median(1, keepdim=True).values.relu(): ("median", "goes back where it is from"),
    lambda x: x.sort().values.relu(): ("sort", "goes back where it is from"),
    lambda x: x.topk(2).values.relu(): ("topk", "goes back where it is from"),
    lambda x: x.kthvalue(2).values.relu(): ("kthvalue", "goes back where it is from"),
    lambda x: x.cummax(1).values.relu(): ("cummax", "goes back where it is from"),
    lambda x: torch.tanh(x).relu(): ("tanh", "smooth"),
    lambda x: (x * (x + x.flip(1)).sigmoid()).relu(): ("mul", "product rule"),
    lambda x: (x * x.flip(1)).relu(): ("mul", "product rule"),
    lambda x: F.glu(x[:, :4]).relu(): ("glu", "product rule"),
    lambda x: (x / x.sum(1, keepdim=True)).relu(): ("truediv", "quotient rule"),
    lambda x: x.relu().softmax(-1): ("softmax", "multiplies no values"),
}


@pytest.mark.parametrize("f", KEPT)
def test_what_keeps_its_derivative_says_why(f):
    op, reason = KEPT[f]
    site = next(s for s in explain(f).report().of("kept") if s.op == op)
    assert reason in site.reason


def test_shapes_and_constants_are_no_gates():
    weight = torch.randn(4, 4)
    report = explain(lambda x: (x.relu() @ weight * 2).view(x.shape[0] * 2, x.shape[1] // 2)).report()
    assert [s.kind for s in report.sites] == ["relu"]


def test_rules_by_place():
    model = nn.Sequential(nn.Sequential(nn.ReLU(), nn.GELU()), nn.ReLU(), nn.LayerNorm(4), nn.Linear(4, 2))
    rules = sp_fx.Rules(overrides={"0.*": 2.0, "0.1": {"gelu": None}, "2": None})
    sites = {s.place: s.temperature for s in sp_fx.transform(model, rules=rules).report().sites}
    assert sites == {"0.0": 2.0, "0.1": None, "1": 1.0, "2": None}
    with pytest.raises(ValueError, match=r"layer9.*fits no gate.*0\.0"):
        sp_fx.transform(model, rules=sp_fx.Rules(overrides={"layer9.*": 1.0}))


def test_plain_derivatives_are_plain():
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 2)).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    with pytest.warns(UserWarning, match="plain gradient"):
        found = sp_fx.transform(model, rules=sp_fx.Rules(gelu=None, layer_norm=None)).pullback(x, 1)
    y = x.clone().requires_grad_()
    assert relative(found, torch.autograd.grad(model(y)[:, 1].sum(), y)[0]) <= 1e-14


def test_the_report_reads_as_a_table():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Tanh())
    lines = str(sp_fx.transform(model, example_inputs=torch.randn(1, 3, 8, 8)).report()).splitlines()
    assert lines[0] == "Sequential with Rules(), captured by torch.fx: 2 rewritten, 1 kept, 0 NOT REWRITTEN"
    assert lines[2].split() == ["1", "relu", "relu", "1.0", "x", "scale"]
    assert "smooth, no gate" in lines[4]


def test_modules_that_are_called_like_functions():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("size", "repeat", "detach", "softmax", "view"):
                setattr(self, name, nn.Sequential(nn.Linear(4, 4), nn.ReLU()))

        def forward(self, x):
            return self.view(self.softmax(self.detach(self.repeat(self.size(x)))))

    model, x = Net().double(), torch.randn(3, 4, dtype=torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            p.abs_()  # five layers of random signs may have every gate closed
    explainer = sp_fx.transform(model, rules=sp_fx.Rules.frozen())
    assert [s.kind for s in explainer.report().sites] == ["relu"] * 5
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(model(leaf).sum(), leaf)[0]
    assert expected.any() and relative(explainer.pullback(x, lambda y: y.sum()), expected) <= 1e-12


class Layered(nn.Module):
    """What `run` makes of [B, 4], with a layer, a token and a number of its own."""

    def __init__(self, run):
        super().__init__()
        self.layer, self.norm, self.run = nn.Linear(4, 4), nn.BatchNorm1d(4), run
        self.token, self.rate = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.tensor(1.3))

    def forward(self, x):
        return self.run(self, x)


def layered(run):
    torch.manual_seed(0)
    return Layered(run).eval()


@pytest.mark.parametrize("name", ["layer", "norm", "again"])
def test_a_leaf_that_is_called_on_a_constant_too(name):
    """It becomes an identity for all of its calls, so all of them are rewritten."""
    model = layered(lambda m, x: F.relu(getattr(m, name)(x) + m.layer(m.token) + m.norm(m.token)))
    model.again = model.layer  # one module under two names
    explainer, x = sp_fx.transform(model), torch.randn(2, 4)
    assert torch.equal(explainer(x), model(x))
    y = x.clone().requires_grad_()
    expected = torch.autograd.grad(model(y).sum(), y)[0]
    assert relative(sp_fx.transform(model, rules=sp_fx.Rules.frozen()).pullback(x, lambda y: y.sum()), expected) <= 1e-6


CHOOSING = {
    "where": lambda m, x: torch.where(m.layer(x) > 0.5, 2 * x, x * x),
    "masked_fill": lambda m, x: m.layer(x).masked_fill(m.layer(x) < 0.5, 0.0),
    "mul": lambda m, x: m.layer(x) * (m.layer(x) > 0.5).float(),
}


@pytest.mark.parametrize("name", CHOOSING)
def test_choosing_by_comparison_is_visible(name):
    with pytest.warns(UserWarning, match="NOT REWRITTEN"):
        report = sp_fx.transform(layered(CHOOSING[name])).report()
    assert [(s.op, "comparing what the model computed" in s.reason) for s in report.of("NOT REWRITTEN")] == [(name, True)]


def test_masks_made_of_inputs_are_the_callers():
    explainer = sp_fx.transform(layered(lambda m, x: F.relu(m.layer(x)).masked_fill(x > 0, 0.0)), strict=True)
    assert len(explainer.report().of("rewritten")) == 1


WITH_OTHER_PIECES = {
    "clipped far out": ("where", lambda m, h: torch.where(h > 20.0, torch.full_like(h, 21.0), F.relu(h))),
    "silu clipped at 60": ("where", lambda m, h: torch.where(h > 60, h * 0, h * torch.sigmoid(h))),
    "a threshold beside 0": ("mul", lambda m, h: h * (h > 0.3)),
    "a threshold that is learned": ("mul", lambda m, h: h * (h > m.rate / 10)),
}


@pytest.mark.filterwarnings("ignore:1 calls")
@pytest.mark.parametrize("name", WITH_OTHER_PIECES)
def test_a_form_with_other_pieces_is_no_gate_of_the_table(name):
    op, run = WITH_OTHER_PIECES[name]
    report = sp_fx.transform(layered(lambda m, x: run(m, m.layer(x)))).report()
    assert [s.op for s in report.of("NOT REWRITTEN")] == [op] and f"{op}, written out" not in [
        s.op for s in report.of("rewritten") if s.kind == "relu"
    ]


def test_weights_that_a_written_gate_has_read_are_told():
    model = layered(lambda m, x: (lambda h: h * torch.sigmoid(m.rate * h))(m.layer(x)))
    (site,) = sp_fx.transform(model).report().of("rewritten")
    assert site.kind == "silu" and "with rate as it was at transform" in site.note


def test_numpy_names_of_arguments():
    explainer = sp_fx.transform(layered(lambda m, x: m.layer(x).softmax(axis=-1) @ m.layer(x).T))
    assert [s.op for s in explainer.report().of("rewritten")] == ["softmax"]
    x, found = torch.randn(3, 4), []
    for f in (lambda x: x.amax(axis=1, keepdims=True) * 2, lambda x: x.amax(1, True) * 2):
        explainer = explain(f)
        assert explainer.report().of("rewritten")
        found.append(explainer.pullback(x, 0))
    assert torch.equal(*found)


def test_a_linear_map_to_one_number():
    """`F.linear` with a weight of one axis."""
    weight = torch.randn(4, dtype=torch.float64)
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    explainer = explain(lambda x: F.linear(x, weight).relu(), rules=sp_fx.Rules.frozen())
    expected = (F.linear(x, weight) > 0)[:, 2, None, None] * weight * (torch.arange(5) == 2)[:, None]
    assert relative(explainer.pullback(x, 2), expected) <= 1e-12


def test_attention_of_other_spellings():
    special = sp_fx.transform(layered(lambda m, x: torch.special.softmax(m.layer(x) @ x.T, -1) @ m.layer(x)))
    assert [s.kind for s in special.report().of("rewritten")] == ["attention"]
    weights = [torch.randn(12, 4), torch.zeros(12), None, None, False, 0.0, torch.eye(4), torch.zeros(4)]
    with pytest.warns(UserWarning, match="multi_head_attention_forward is opaque"):
        explain(lambda x: F.multi_head_attention_forward(x[:, None], x[:, None], x[:, None], 4, 2, *weights, False)[0])


def test_the_modulus_of_complex_numbers_is_no_gate():
    explainer = explain(lambda x: torch.fft.rfft(x).abs().relu())
    assert [(s.op, s.status) for s in explainer.report().sites] == [("abs", "kept"), ("relu", "rewritten")]
    x = torch.randn(3, 8)
    y = x.clone().requires_grad_()
    expected = torch.autograd.grad(torch.fft.rfft(y).abs()[:, 1].sum(), y)[0]
    assert (
        relative(explain(lambda x: torch.fft.rfft(x).abs().relu(), rules=sp_fx.Rules.frozen()).pullback(x, 1), expected) <= 1e-5
    )


def test_written_attention_passes_the_signal():
    """Its weights are constants; the site is the place where the values come through."""
    explainer = sp_fx.transform(layered(lambda m, x: F.relu(m.layer((x @ x.T).softmax(-1) @ m.layer(x)))))
    softmax = next(s for s in explainer.report().sites if s.kind == "attention")
    assert softmax.status == "rewritten" and not softmax.reason


class TwoLinears(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.a, self.b, self.body = nn.Linear(8, 8), nn.Linear(8, 8), body

    def forward(self, x):
        return self.body(self, x)


def relu_by_its_old_name(m, x):
    h = m.a(x)
    F.relu_(h)
    return m.b(x) * h


def relu_by_its_old_name_after_a_mean(m, x):
    h = m.a(x)
    F.relu_(h)
    return m.b(x) * h * h.mean(1, keepdim=True)


def sigmoid_written_over(m, x):
    h = torch.sigmoid(m.a(x))
    F.elu_(h)
    return m.b(x) * h


def times_itself(m, x):
    h = m.a(x)
    r = F.relu_(h)
    return h * r + x


def a_mask_clamped(m, x):
    return m.b(x) * (m.a(x) > 0).float().clamp_(0, 1)


OUT_OF_PLACE = {
    relu_by_its_old_name: lambda m, x: m.b(x) * F.relu(m.a(x)),
    relu_by_its_old_name_after_a_mean: lambda m, x: (lambda b, h: b * h * h.mean(1, keepdim=True))(m.b(x), F.relu(m.a(x))),
    sigmoid_written_over: lambda m, x: m.b(x) * F.elu(torch.sigmoid(m.a(x))),
    times_itself: lambda m, x: (lambda r: r * r + x)(F.relu(m.a(x))),
    a_mask_clamped: lambda m, x: m.b(x) * (m.a(x) > 0).float().clamp(0, 1),
}


@pytest.mark.parametrize("rules", [{}, {"product": "frozen"}], ids=["default", "frozen product"])
@pytest.mark.parametrize("tracer", ["fx", "export"])
@pytest.mark.parametrize("body", OUT_OF_PLACE, ids=lambda body: body.__name__)
def test_a_decision_sees_what_the_edits_before_it_have_left(body, tracer, rules):
    """A gate in place is read by the old name of what it wrote over: a product of that is a product with the gate."""
    found = []
    for spelling in (body, OUT_OF_PLACE[body]):
        torch.manual_seed(0)
        model, x = TwoLinears(spelling).double().eval(), torch.randn(3, 5, 8, dtype=torch.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            explainer = sp_fx.transform(model, rules=sp_fx.Rules(**rules), tracer=tracer, example_inputs=x)
        assert torch.equal(explainer(x), model(x.clone()))
        u = torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        sites = sorted((s.op, s.kind, s.status, s.reason) for s in explainer.report().sites)
        found.append((explainer.pullback(x, u), sites))
    (in_place, its_sites), (expected, sites) = found
    assert its_sites == sites
    torch.testing.assert_close(in_place, expected, rtol=1e-12, atol=1e-12)


def quick_gelu(z):
    return z * torch.sigmoid(1.702 * z)


FACTORS = {  # a product of two signals: the factor that is a gate is held, and the other passes
    "a quick GELU": (lambda u, z: u * quick_gelu(z), lambda u, z: u * quick_gelu(z).detach()),
    "beside a clamp": (lambda u, z: u.clamp(-0.5, 0.5) * quick_gelu(z), lambda u, z: u.clamp(-0.5, 0.5) * quick_gelu(z).detach()),
    "a clamp beside SiLU": (lambda u, z: F.silu(z) * u.clamp(-0.5, 0.5), lambda u, z: F.silu(z).detach() * u.clamp(-0.5, 0.5)),
    "a clamp, alone": (lambda u, z: u * F.relu6(z), lambda u, z: u * F.relu6(z).detach()),
    "as gpt_oss has it": (lambda u, z: (u.clamp(-0.5, 0.5) + 1) * quick_gelu(z.clamp(max=0.7)),
                          lambda u, z: (u.clamp(-0.5, 0.5) + 1) * quick_gelu(z.clamp(max=0.7)).detach()),
}  # fmt: skip


@pytest.mark.parametrize("tracer", ["fx", "export"])
@pytest.mark.parametrize("name", FACTORS)
def test_the_gate_among_two_factors(name, tracer):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.up, self.gate, self.down = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.down(FACTORS[name][0](self.up(x), self.gate(x)))

    model, x = Two().double().eval(), torch.randn(5, 4, dtype=torch.float64)
    explainer = sp_fx.transform(model, rules=sp_fx.Rules.frozen(), tracer=tracer, example_inputs=x)
    leaf = x.clone().requires_grad_()
    y = model.down(FACTORS[name][1](model.up(leaf), model.gate(leaf)))
    assert relative(explainer.pullback(x, 1), torch.autograd.grad(y[:, 1].sum(), leaf)[0]) <= 1e-12
