"""Clamps behind batch norms have temperatures by what the norm says, in every spelling; others those of a ReLU."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sp_fx
from helpers import relative
from sp_fx import Rules, Soft

X = torch.randn(3, 3, 9, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A convolution, a batch norm of channels of different sizes, `between(self, z)`, and a head."""

    def __init__(self, between):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, eps=0.1), nn.Linear(6, 4)
        self.relu6, self.dropout, self.identity = nn.ReLU6(), nn.Dropout(), nn.Identity()
        self.between = between
        g = torch.Generator().manual_seed(1)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=g)
        self.norm.running_mean = torch.randn(6, generator=g)
        self.norm.running_var = 20 * torch.rand(6, generator=g)
        self.eval()

    def forward(self, x):
        return self.head(self.between(self, self.conv(x)).mean((2, 3)))


def functional(n, z):
    return F.batch_norm(z, n.norm.running_mean, n.norm.running_var, n.norm.weight, n.norm.bias, False, 0.1, 0.1)


BEHIND = {
    "modules": lambda n, z: n.relu6(n.norm(z)),
    "functions": lambda n, z: F.relu6(functional(n, z)),
    "clamp": lambda n, z: n.norm(z).clamp(0, 6),
    "two bounds": lambda n, z: F.relu(n.norm(z)).clamp(max=6),
    "minimum": lambda n, z: torch.minimum(n.norm(z).clamp(min=0), torch.full((1,), 6.0)),
    "in place": lambda n, z: F.relu6(n.norm(z), inplace=True),
    "dropout": lambda n, z: n.relu6(n.dropout(n.norm(z))),
    "identities": lambda n, z: n.relu6(F.dropout(n.identity(n.norm(z)), 0.5, n.training).contiguous().clone()),
    "another dtype": lambda n, z: n.relu6(n.norm(z).to(torch.float32)),
}
ELSEWHERE = {
    "no norm": lambda n, z: n.relu6(z),
    "a sum": lambda n, z: n.relu6(n.norm(z) + z),
    "a function": lambda n, z: n.relu6(torch.tanh(n.norm(z))),
    "a parameter's multiple": lambda n, z: n.relu6(n.head.bias[0] * n.norm(z)),
    "a constant of more axes": lambda n, z: n.relu6(torch.full((1, 1, 1, 1, 1), 2.0) * n.norm(z))[0],
    "another shape": lambda n, z: n.relu6(n.norm(z).flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (7, 6)),
    "statistics of the pass": lambda n, z: n.relu6(
        F.batch_norm(z, z.mean((0, 2, 3)).detach(), z.var((0, 2, 3)).detach(), None, n.norm.bias)
    ),
}


def made(between, tracer="fx", rules=None):
    return sp_fx.transform(Net(between), rules=rules, tracer=tracer, example_inputs=X)


def scales(explainer):
    return [(s.temperature, s.margin, s.scale) for s in explainer.report().of("rewritten") if s.kind == "hardtanh"]


@pytest.mark.parametrize("tracer", ["fx", "export"])
@pytest.mark.parametrize("spelling", BEHIND)
def test_the_norm_is_found_in_every_spelling(spelling, tracer):
    explainer = made(BEHIND[spelling], tracer)
    assert scales(explainer) == [(1.7, 0.4, "batch_norm")]
    assert relative(explainer.pullback(X, 1), made(BEHIND["modules"]).pullback(X, 1)) < 1e-6
    assert torch.equal(explainer(X), Net(BEHIND[spelling])(X))


@pytest.mark.parametrize("tracer", ["fx", "export"])
@pytest.mark.parametrize("spelling", ELSEWHERE)
def test_elsewhere_a_clamp_is_a_relu_with_an_upper_kink(spelling, tracer):
    explainer = made(ELSEWHERE[spelling], tracer)
    assert scales(explainer) == [(1.0, 0.0, "sample")]


def test_a_clamp_that_never_reaches_its_upper_bound_has_the_map_of_the_relu():
    clamped, relu = (made(f).pullback(X, 1) for f in (lambda n, z: z.clamp(0, 1e6), lambda n, z: z.relu()))
    assert relative(clamped, relu) < 1e-6


def test_the_temperature_by_hand():
    model = Net(BEHIND["modules"]).double()
    norm = model.norm
    square = norm.bias**2 + norm.weight**2 * norm.running_var / (norm.running_var + 0.1)
    tau = 1.7 * ((square + square.mean()) / 2).sqrt().view(1, -1, 1, 1)
    z = model.norm(model.conv(X.double()))
    gain = torch.special.ndtr(z / tau - 0.4) - torch.special.ndtr((z - 6) / tau - 0.4)
    v = gain * model.head.weight[1].view(1, -1, 1, 1) / (7 * 6)
    v = v * (norm.weight / (norm.running_var + 0.1).sqrt()).view(1, -1, 1, 1)
    expected = F.conv_transpose2d(v, model.conv.weight).detach()
    assert relative(sp_fx.transform(model).pullback(X.double(), 1), expected) < 1e-12


def test_other_kinds_may_have_it_and_none_that_no_norm_feeds():
    rules = Rules(relu=Soft(0.8, 0.1, "batch_norm", otherwise=Soft(0.9, 0.2)), max_pool=1.0)
    report = made(lambda n, z: F.max_pool2d(n.norm(z).relu() + z.relu(), 2), rules=rules).report()
    assert [(s.temperature, s.margin, s.scale) for s in report.sites] == [
        (0.8, 0.1, "batch_norm"), (0.9, 0.2, "sample"), (1.0, 0.0, "sample")
    ]  # fmt: skip
    assert "0.8 x scale by batch norm, margin 0.1" in str(report) and "0.9 x scale, margin 0.2" in str(report)


def test_calibration_leaves_what_the_norm_says():
    explainer = made(lambda n, z: n.relu6(n.norm(z)) + z.relu())
    for calibrated in (explainer.calibrate(X), sp_fx.transform(Net(lambda n, z: n.norm(n.relu6(n.norm(z))).relu())).calibrate()):
        assert scales(calibrated) == [(1.7, 0.4, "batch_norm")]
        rules = calibrated.report().rules
        assert len(rules.scale) == 1 and all(isinstance(scale, float) for scale in rules.scale.values())
    nothing = made(BEHIND["modules"]).calibrate()
    assert scales(nothing) == [(1.7, 0.4, "batch_norm")] and not nothing.report().rules.scale
    assert torch.equal(nothing.pullback(X, 1), made(BEHIND["modules"]).pullback(X, 1))
    given = made(lambda n, z: n.relu6(n.norm(z)), rules=Rules(scale={"relu6": 2.5}))
    assert scales(given) == [(1.7, 0.4, 2.5)]


def test_copies_pickles_and_other_dtypes():
    explainer = made(BEHIND["modules"])
    expected = explainer.pullback(X, 1)
    assert torch.equal(pickle.loads(pickle.dumps(explainer)).pullback(X, 1), expected)
    assert relative(made(BEHIND["modules"]).double().pullback(X.double(), 1).float(), expected) < 1e-5
    alone = torch.cat([explainer.pullback(x[None], 1) for x in X])
    assert relative(alone, expected) < 1e-6


def test_a_program_and_its_packages_have_it(tmp_path):
    explainer = made(BEHIND["modules"])
    program = explainer.compile(example_inputs=X)
    assert relative(program(X[:2], 1)[1], explainer.pullback(X[:2], 1)) < 1e-5
    program.save(tmp_path / "net.pt2")
    loaded = sp_fx.load(tmp_path / "net.pt2")
    assert relative(loaded(X[:2], 1)[1], explainer.pullback(X[:2], 1)) < 1e-5


# -- what a review found


LINES = {
    "a shift": (lambda n, z: F.relu6(n.norm(z) + 3), lambda n, z: F.relu6(n.norm(z) + 3) / 6, 6.0),
    "a multiple": (lambda n, z: F.relu6(2 * n.norm(z)), lambda n, z: 0.5 * F.relu6(2 * n.norm(z)), 2.0),
    "a quotient": (lambda n, z: F.relu6(n.norm(z) / 2), lambda n, z: F.relu6(0.5 * n.norm(z)), 1.0),
    "a difference": (lambda n, z: F.relu6(1 - n.norm(z)), lambda n, z: F.relu6(-n.norm(z) + 1), 1.0),
    "tensors of one number": (lambda n, z: F.relu6(torch.tensor([2.0]) * n.norm(z)), lambda n, z: F.relu6(n.norm(z) * 2), 1.0),
}


@pytest.mark.parametrize("tracer", ["fx", "export"])
@pytest.mark.parametrize("name", LINES)
def test_numbers_beside_the_norm_are_followed(name, tracer):
    a, b, times = LINES[name]
    first, second = made(a, tracer), made(b, tracer)
    assert [scale for *_, scale in scales(first)] == ["batch_norm"] == [s.scale for s in second.report().of("rewritten")]
    assert relative(first.pullback(X, 1), times * second.pullback(X, 1)) < 1e-5


def test_moments_of_a_line():
    """Those of 2 y - 1 are as if the norm had the weight 2 g and the bias 2 b - 1."""
    model = Net(lambda n, z: n.relu6(2 * n.norm(z) - 1))
    other = Net(BEHIND["modules"])
    with torch.no_grad():
        other.norm.weight *= 2
        other.norm.bias.mul_(2).sub_(1)
    assert relative(sp_fx.transform(model).pullback(X, 1), sp_fx.transform(other).pullback(X, 1)) < 1e-6


def test_inputs_and_keywords_that_have_the_names_of_ops():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.dropout, self.last = nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 2)

        def forward(self, type):
            return self.last(F.relu6(self.dropout(input=self.first(F.relu(type)))))

    explainer = sp_fx.transform(Keywords().eval())
    assert [s.scale for s in explainer.report().sites] == ["sample", "sample"]
    assert explainer.pullback(torch.randn(2, 4), 1).isfinite().all()
    behind = made(lambda n, z: F.relu6(torch.clone(input=n.norm(z))))
    assert scales(behind) == [(1.7, 0.4, "batch_norm")]


def test_an_override_with_it_is_no_rule_of_gates_that_no_one_kink_opens():
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.MaxPool2d(2), nn.BatchNorm2d(6), nn.GELU(), nn.Flatten())
    rules = Rules(overrides={"*": Soft(1.7, 0.4, "batch_norm", otherwise=0.8)})
    explainer = sp_fx.transform(net.eval(), rules=rules)
    assert [(s.kind, s.temperature, s.scale) for s in explainer.report().of("rewritten") if s.kind != "stride"] == [
        ("max_pool", 0.8, "sample"), ("gelu", 0.8, "absolute")
    ]  # fmt: skip
    assert explainer.pullback(X, 1).isfinite().all()


def test_dropout_that_draws_passes_other_numbers():
    explainer = sp_fx.transform(Net(lambda n, z: n.relu6(F.dropout(n.norm(z), 0.5, training=True))), verify=False)
    assert scales(explainer) == [(1.0, 0.0, "sample")]


@pytest.mark.parametrize("tracer", ["fx", "export"])
def test_a_norm_of_many_processes(tracer):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(Net(BEHIND["modules"]))
    explainer = sp_fx.transform(model, tracer=tracer, example_inputs=X)
    assert scales(explainer) == [(1.7, 0.4, "batch_norm")]
    assert relative(explainer.pullback(X, 1), made(BEHIND["modules"]).pullback(X, 1)) < 1e-6


def test_half_types_do_not_overflow_in_the_unit():
    model = Net(BEHIND["modules"])
    with torch.no_grad():
        model.norm.weight[0] = 300.0
        model.conv.weight.mul_(0.05)
    expected = sp_fx.transform(model).pullback(X, 1)
    assert relative(sp_fx.transform(model).half().pullback(X.half(), 1).float(), expected) < 2e-2


def test_a_report_on_data_compares_what_the_norm_says_with_them():
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU6(), nn.Flatten()).eval()
    explainer = sp_fx.transform(net)
    assert "effectively hard" in str(explainer.report(1000 * X)) and "effectively" not in str(explainer.report(X))
    site = next(s for s in explainer.report(X).sites if s.kind == "hardtanh")
    assert site.unit == pytest.approx(1.0, rel=1e-4) and site.relative == pytest.approx(1.7 / site.spread, rel=1e-4)


def test_a_kernel_is_for_temperatures_of_samples(monkeypatch):
    """With as many samples as channels the two have equally many numbers."""
    from sp_fx.gates import kernels

    class Kernels:
        @staticmethod
        def gate_adjoint(kind, v, z, *others, tau, **args):
            return tau

    monkeypatch.setattr(kernels, "reached", lambda t: True)
    monkeypatch.setattr(kernels, "at_once", lambda: True)
    monkeypatch.setattr(kernels, "triton_kernels", lambda: Kernels)
    z = torch.ones(6, 6, 2, 2)
    for shape, taken in (((6, 1, 1, 1), True), ((1, 6, 1, 1), False), ((6, 6, 1, 1), False)):
        got = kernels.by_kernel("hardtanh", z, [z], torch.ones(shape), {"low": 0.0, "high": 6.0})
        assert (got is not None) == taken
