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
    "a multiple": lambda n, z: n.relu6(2 * n.norm(z)),
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
