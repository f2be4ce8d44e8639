"""Gates that users register: every form of call, both tracers, rules, pickles."""

import functools
import math
import pickle
import sys
import threading
import warnings

import pytest
import torch
from torch import nn

import sp_fx
from helpers import relative
from sp_fx.gates import registry
from sp_fx.gates.table import TABLE


def sharp(z, rate=2.0):
    """A gate of one's own, with a branch that no trace may enter."""
    if float(rate) > 0:
        return z * torch.sigmoid(rate * z)
    return z


def sharp_gain(z, tau, rate=2.0):
    return torch.sigmoid(rate * z / tau)


class Snake(nn.Module):
    """Ziyin et al., arXiv:2006.08195: z + sin(z)^2."""

    def forward(self, z):
        return z + torch.sin(z) ** 2


class Wide(Snake):
    pass


class Squashes(nn.Module):
    """A gate of one's own that ends in another."""

    def forward(self, z):
        return torch.ops.sp_fx_tests.squash(z + 1.0)


@torch.library.custom_op("sp_fx_tests::squash", mutates_args=())
def squash(z: torch.Tensor) -> torch.Tensor:
    return z.clamp(min=0) * 2


squash.register_fake(torch.empty_like)


def snake_gain(z, tau):
    """E[1 + sin 2(z + tau e)] = 1 + exp(-2 tau^2) sin 2z."""
    return 1 + math.exp(-2 * tau**2) * torch.sin(2 * z)


def hard_gain(z, tau):
    return 2 * torch.special.ndtr(z / tau)


@pytest.fixture(autouse=True, scope="module")
def gates():
    sp_fx.register_gate(sharp, sharp_gain, tau=0.7)
    sp_fx.register_gate(Snake, snake_gain, tau=0.5, frozen_at=1e-9, name="snake")
    sp_fx.register_gate(torch.ops.sp_fx_tests.squash.default, hard_gain, tau=0.4, frozen_at=1e-9)
    sp_fx.register_gate(Squashes, lambda z, tau: 3.0 + z, name="squashes")
    yield
    for name in ("sharp", "snake", "squash", "squashes"):
        del TABLE[name]
    for names in (registry.FUNCTIONS, registry.MODULES, registry.STAND_INS):
        names.clear()


class ByName(nn.Module):
    def forward(self, x):
        return sharp(x * 2) * 3


class Attribute(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = sharp

    def forward(self, x):
        return self.act(x * 2, rate=3.0) * 3


class Moduled(nn.Module):
    def __init__(self):
        super().__init__()
        self.act, self.again = Snake(), Wide()

    def forward(self, x):
        return self.again(self.act(x * 2)) * 3


class Op(nn.Module):
    def forward(self, x):
        return torch.ops.sp_fx_tests.squash(x * 2) * 3


def expected(model, x, scale=1.0):
    z = x * 2
    match model:
        case ByName():
            return 6 * sharp_gain(z, 0.7)
        case Attribute():
            return 6 * sharp_gain(z, 0.7, 3.0)
        case Moduled():
            return 6 * snake_gain(z, 0.5) * snake_gain(Snake()(z), 0.5)
    return 6 * hard_gain(z, 0.4)


X = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("tracer", ["fx", "export"])
@pytest.mark.parametrize("model", [ByName, Attribute, Moduled, Op])
def test_every_form_under_both_tracers(model, tracer):
    net = model()
    explainer = sp_fx.transform(net, tracer=tracer, example_inputs=X, strict=True)
    assert torch.equal(explainer(X), net(X))
    report = explainer.report()
    name = {ByName: "sharp", Attribute: "sharp", Moduled: "snake", Op: "squash"}[model]
    assert {s.kind for s in report.of("rewritten")} == {name} and len(report.of("rewritten")) == 1 + (model is Moduled)
    pulled = explainer.pullback(X, lambda y: y.sum())
    assert relative(pulled, expected(net, X)) <= 1e-12
    assert relative(torch.func.vjp(explainer, X)[1](torch.ones_like(X))[0], pulled) <= 1e-12
    again = pickle.loads(pickle.dumps(explainer))
    assert torch.equal(again.pullback(X, lambda y: y.sum()), pulled)


@pytest.mark.parametrize("tracer", ["fx", "export"])
def test_a_registered_module_that_ends_in_a_registered_op_is_the_module_s_gate(tracer):
    net = nn.Sequential(nn.Linear(5, 5), Squashes()).double()
    explainer = sp_fx.transform(net, tracer=tracer, example_inputs=X)
    assert [site.kind for site in explainer.report().of("rewritten")] == ["squashes"]
    z = net[0](X).detach()
    assert relative(explainer.pullback(X, lambda y: y.sum()), (3.0 + z) @ net[0].weight.detach()) <= 1e-12


def test_its_exported_explainer_keeps_the_adjoint():
    explainer = sp_fx.transform(ByName())
    leaf = X.clone().requires_grad_()
    y = torch.export.export(explainer, (X,)).module()(leaf)
    assert relative(torch.autograd.grad(y.sum(), leaf)[0], expected(ByName(), X)) <= 1e-12


def test_rules_reach_it():
    def pulled(**rules):
        return sp_fx.transform(ByName(), rules=sp_fx.Rules(**rules)).pullback(X, lambda y: y.sum())

    z = X * 2
    assert relative(pulled(registered={"sharp": 0.3}), 6 * sharp_gain(z, 0.3)) <= 1e-12
    assert relative(pulled(registered={"sharp": "frozen"}), 6 * sharp_gain(z, 1.0)) <= 1e-12
    assert relative(pulled(overrides={"sharp": 0.2}), 6 * sharp_gain(z, 0.2)) <= 1e-12
    assert relative(pulled(overrides={"*": {"sharp": 0.2}}), 6 * sharp_gain(z, 0.2)) <= 1e-12
    leaf = X.clone().requires_grad_()
    with pytest.warns(UserWarning, match="no gate"):
        plain = pulled(registered={"sharp": None})
    assert relative(plain, torch.autograd.grad(ByName()(leaf).sum(), leaf)[0]) <= 1e-12
    assert sp_fx.Rules.frozen().registered["sharp"] == "frozen"
    assert pickle.loads(pickle.dumps(sp_fx.Rules(registered={"sharp": 0.3}))).registered == {"sharp": 0.3}
    with pytest.raises(ValueError, match="no gate is registered as 'sharpe'; registered are: sharp"):
        sp_fx.Rules(registered={"sharpe": 1.0})


def test_the_caller_s_module_and_file_stay_as_they_are():
    net, before = Attribute(), globals()["sharp"]
    sp_fx.transform(net)
    sp_fx.transform(ByName(), tracer="export", example_inputs=X)
    assert globals()["sharp"] is before and net.act is before


def test_a_function_that_a_decorator_registered():
    stand_in = sp_fx.register_gate(lambda z: z * z.tanh(), lambda z, tau: (z / tau).tanh(), name="tanh gate")

    class Net(nn.Module):
        def forward(self, x):
            return stand_in(x)

    try:
        pulled = sp_fx.transform(Net()).pullback(X, lambda y: y.sum())
        assert relative(pulled, X.tanh()) <= 1e-12
    finally:
        del TABLE["tanh gate"]


def test_strict_mode_names_the_remedy():
    class Net(nn.Module):
        def forward(self, x):
            return x.relu() + torch.round(x)

    with pytest.raises(sp_fx.NotRewrittenError, match="register_gate"):
        sp_fx.transform(Net(), strict=True)


def test_what_cannot_be_registered():
    with pytest.raises(TypeError, match="takes a function, an op"):
        sp_fx.register_gate(nn.ReLU(), hard_gain)
    with pytest.raises(ValueError, match="'relu' is a gate that the library knows"):
        sp_fx.register_gate(lambda z: z, hard_gain, name="relu")
    with pytest.raises(TypeError, match="a string, got 3"):
        sp_fx.register_gate(lambda z: z, hard_gain, name=3)
    for target in (lambda: 1.0, type("Empty", (nn.Module,), {"forward": lambda self: 1.0})):
        with pytest.raises(TypeError, match=r"first argument of .* is to be the pre-activation"):
            sp_fx.register_gate(target, hard_gain, name="other")
    for temperature in (0, -1.0, math.inf, math.nan, "much", None, True):
        for option in ("tau", "frozen_at"):
            with pytest.raises(ValueError, match=f"{option} is a temperature, a finite number above 0, got "):
                sp_fx.register_gate(lambda z: z, hard_gain, name="other", **{option: temperature})
    assert "other" not in TABLE and "other" not in registry.FUNCTIONS.values()


NO_GAINS = {
    "no function": (2.0, "got the gain 2.0; expected a function of z and tau"),
    "no tau": (lambda z: z, "expected a function of z and tau"),
    "tau by keyword": (lambda z, *, tau: z, "expected a function of z and tau"),
    "another shape": (lambda z, tau: z.sum(1), r"returns a torch.float32 tensor \[2\] for a z \[2, 3\]"),
    "no tensor": (lambda z, tau: 1.0, r"returns a float for a z \[2, 3\]"),
    "complex": (lambda z, tau: z * 1j, r"returns a torch.complex64 tensor"),
    "a typing error": (lambda z, tau: z.sigmiod(), "raises AttributeError at a z .*sigmiod"),
}


@pytest.mark.parametrize("name", NO_GAINS)
def test_what_is_no_gain(name):
    gain, message = NO_GAINS[name]
    with pytest.raises(TypeError, match=message):
        sp_fx.register_gate(lambda z: z, gain, name="other")
    assert "other" not in TABLE and "other" not in registry.FUNCTIONS.values()


def test_gains_that_cannot_be_tried_are_taken():
    """They need the call's arguments, or pictures."""
    for gain in (lambda z, tau, rate: z, lambda z, tau: z * z.mean((2, 3), keepdim=True)):
        sp_fx.register_gate(lambda z: z, gain, name="other")
        del TABLE["other"]


def test_registering_again():
    """As a notebook does whose cell runs twice: the same changes nothing, another gain replaces the first, with a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sp_fx.register_gate(sharp, sharp_gain, tau=0.7) is registry.STAND_INS[sharp]
    before = sp_fx.transform(ByName()).pullback(X, lambda y: y.sum())
    try:
        for again in (sharp, registry.STAND_INS[sharp]):
            with pytest.warns(UserWarning, match="'sharp' is registered anew"):
                sp_fx.register_gate(again, lambda z, tau: 0 * z, tau=0.7)
        assert not torch.equal(sp_fx.transform(ByName()).pullback(X, lambda y: y.sum()), before)
    finally:
        with pytest.warns(UserWarning, match="anew"):
            sp_fx.register_gate(sharp, sharp_gain, tau=0.7)
    assert torch.equal(sp_fx.transform(ByName()).pullback(X, lambda y: y.sum()), before)
    with pytest.raises(ValueError, match="sharp is registered already, as 'sharp'"):
        sp_fx.register_gate(sharp, sharp_gain, name="sharper")
    assert "sharper" not in TABLE


def test_a_gain_of_numbers_is_refused():
    with pytest.raises(TypeError, match="the gain raises"):
        sp_fx.register_gate(lambda z: z * 2, lambda z, tau: math.exp(z) * z, name="by_numbers")


# -- however a model holds a function


def ripple(z, a=1.0):
    return z + torch.sin(a * z) ** 2 / a


def in_another_function(z):
    return ripple(z)


class Holds(nn.Module):
    by_class = staticmethod(ripple)

    def __init__(self, way):
        super().__init__()
        self.lin, self.way = nn.Linear(4, 4), way
        self.held, self.table, self.partial = ripple, {"a": [ripple]}, functools.partial(ripple, a=2.0)
        self.closure = (lambda f: lambda z: f(z))(ripple)

    def by_default(self, z, f=ripple):
        return f(z)

    def forward(self, x):
        return WAYS[self.way](self, self.lin(x))


WAYS = {
    "by its name": lambda m, z: ripple(z),
    "in another function": lambda m, z: in_another_function(z),
    "of another file": lambda m, z: sys.modules[__name__].ripple(z),
    "an attribute": lambda m, z: m.held(z),
    "in a dictionary": lambda m, z: m.table["a"][0](z),
    "a partial": lambda m, z: m.partial(z),
    "of the class": lambda m, z: m.by_class(z),
    "in a closure": lambda m, z: m.closure(z),
    "by keyword": lambda m, z: ripple(z=z),
    "a partial by keyword": lambda m, z: functools.partial(ripple)(**{"z": z}),
    "a default": lambda m, z: m.by_default(z),
}


@pytest.fixture
def registered_ripple():
    before = ripple.__code__, ripple.__defaults__, dict(ripple.__globals__)
    sp_fx.register_gate(ripple, lambda z, tau, a=1.0: 1 + torch.exp(-2 * torch.as_tensor(a * tau) ** 2) * torch.sin(2 * a * z))
    yield
    assert (ripple.__code__, ripple.__defaults__) == before[:2] and set(ripple.__globals__) == set(before[2])
    del TABLE["ripple"]
    stand_in = registry.STAND_INS.pop(ripple)
    del registry.FUNCTIONS[ripple], registry.FUNCTIONS[stand_in]


@pytest.mark.parametrize("tracer", ["fx", "export"])
@pytest.mark.parametrize("way", WAYS)
def test_a_function_is_found_however_it_is_held(way, tracer, registered_ripple):
    model, x = Holds(way).eval(), torch.randn(3, 4)
    explainer = sp_fx.transform(model, tracer=tracer, example_inputs=x)
    assert [(s.kind, s.status) for s in explainer.report().sites] == [("ripple", "rewritten")]
    a, z = 2.0 if way == "a partial" else 1.0, model.lin(x)
    gain = 1 + math.exp(-2 * a**2) * torch.sin(2 * a * z)
    torch.testing.assert_close(explainer.pullback(x, torch.ones(3, 4)), gain @ model.lin.weight)
    assert not [note for note in explainer.report().notes if "not met" in note and "ripple" in note]


def test_functions_are_what_they_were_after_a_trace_that_fails(registered_ripple):
    class Fails(Holds):
        def forward(self, x):
            if ripple(x).sum() > 0:
                return x
            raise ValueError("no")

    with pytest.raises(sp_fx.CaptureError):
        sp_fx.transform(Fails("by its name").eval())
    assert torch.equal(ripple(torch.ones(2)), torch.ones(2) + torch.sin(torch.ones(2)) ** 2)


def test_what_was_registered_and_not_met_is_told(registered_ripple):
    report = sp_fx.transform(nn.Sequential(nn.Linear(3, 3), nn.ReLU())).report()
    assert any(note.startswith("registered, and not met in this model: ") and "ripple" in note for note in report.notes)


def test_other_threads_call_a_function_while_it_is_traced(registered_ripple):
    stop, wrong, x = threading.Event(), [], torch.linspace(-1, 1, 5)
    expected = ripple(x)

    def calls():
        while not stop.is_set():
            if not torch.equal(ripple(x), expected):
                wrong.append(1)

    threads = [threading.Thread(target=calls) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(10):
        sp_fx.transform(Holds("a partial").eval())
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
