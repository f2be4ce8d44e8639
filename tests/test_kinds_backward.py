"""The model's own backward: functions with a gradient of their own, stop-gradients, checkpoints, second derivatives."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import sp_fx
from helpers import fill, relative
from kinds import PLAIN, WAYS, assert_clear, assert_forward, assert_kind, assert_same_map, explain, net, noise, own_gradient

X = noise(4, 6)


class Spike(torch.autograd.Function):
    """The step of a spiking neuron, with the derivative of an arc tangent for its own."""

    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return (u > 0).to(u.dtype)

    @staticmethod
    def backward(ctx, g):
        (u,) = ctx.saved_tensors
        return g / (1 + (math.pi * u) ** 2)


class Quantised(torch.autograd.Function):
    """Rounding with a straight-through gradient."""

    @staticmethod
    def forward(ctx, x):
        return torch.round(x * 4) / 4

    @staticmethod
    def backward(ctx, g):
        return g


class Sign(torch.autograd.Function):
    """The sign of a binarised network, whose gradient passes near zero."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.sign(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (x.abs() <= 1)


class Reversed(torch.autograd.Function):
    """Gradient reversal of domain-adversarial networks."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -g


class Scaled(torch.autograd.Function):
    """Two tensors and a number in, two tensors out; the second gradient is twice its own."""

    @staticmethod
    def forward(ctx, a, b, factor):
        ctx.factor = factor
        return a * factor, a + b

    @staticmethod
    def backward(ctx, g, k):
        return g * ctx.factor + 2 * k, 2 * k, None


def with_gradient(value, surrogate):
    """`value` forward, the derivative of `surrogate` backward."""
    return surrogate + (value - surrogate).detach()


def scaled(m, h):
    a, b = Scaled.apply(h, torch.relu(m.more(h)), 0.5)
    return torch.relu(a + b - 0.1)


def scaled_spelled(m, h):
    r = torch.relu(m.more(h))
    return torch.relu(0.5 * h + with_gradient(h + r, 2 * h + 2 * r) - 0.1)


FUNCTIONS = {
    "spike": (
        lambda m, h: Spike.apply(torch.relu(h) - 0.1),
        lambda m, h: (lambda u: with_gradient((u > 0).to(u.dtype), torch.atan(math.pi * u) / math.pi))(torch.relu(h) - 0.1),
    ),
    "straight-through": (
        lambda m, h: Quantised.apply(torch.relu(h)),
        lambda m, h: with_gradient(torch.round(torch.relu(h) * 4) / 4, torch.relu(h)),
    ),
    "sign": (
        lambda m, h: Sign.apply(torch.relu(h)),
        lambda m, h: with_gradient(torch.sign(torch.relu(h)), torch.relu(h) * (torch.relu(h) <= 1).to(h.dtype).detach()),
    ),
    "reversal": (
        lambda m, h: torch.relu(Reversed.apply(h)),
        lambda m, h: torch.relu(with_gradient(h, -h)),
    ),
    "two in, two out": (scaled, scaled_spelled),
}


CLASSES = dict(zip(FUNCTIONS, (Spike, Quantised, Sign, Reversed, Scaled)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_keep_their_own_gradient(name, way):
    """And are in the report by the name of their class, since they may hide gates."""
    body, spelling = FUNCTIONS[name]
    model = net(body)
    explainer = explain(model, X, way)
    assert_same_map(explainer, model, net(spelling), X)
    assert CLASSES[name].__name__ in str(explainer.report())
    if way == "an example":
        plain = explain(model, X, way, rules=sp_fx.Rules(**PLAIN))
        assert relative(plain.pullback(X, 1), own_gradient(model, X)) <= 1e-9


class CheapSwish(torch.autograd.Function):
    """SiLU that keeps only its input for the way back, as EfficientNets have it: the gradient is the exact one."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return g * (s * (1 + x * (1 - s)))


@pytest.mark.parametrize("way", WAYS)
def test_a_function_that_is_a_gate(way):
    """Its forward is recognised, with the gate's map; or it is listed, with its own gradient."""
    model = net(lambda m, h: CheapSwish.apply(h))
    explainer = explain(model, X, way)
    if explainer.report().of("NOT REWRITTEN"):
        assert_forward(explainer, model, X)
        assert relative(explainer.pullback(X, 1), own_gradient(model, X)) <= 1e-9
    else:
        assert_same_map(explainer, model, net(lambda m, h: F.silu(h)), X)


class Clipped(torch.autograd.Function):
    """Clips at 50 and goes straight through: equal to the derivative wherever nothing is as large."""

    @staticmethod
    def forward(ctx, x):
        return x.clamp(-50, 50)

    @staticmethod
    def backward(ctx, g):
        return g


@pytest.mark.parametrize("size", [1.0, 1e3])
@pytest.mark.parametrize("way", WAYS)
def test_a_backward_that_differs_far_out_is_kept(way, size):
    model = net(lambda m, h: torch.relu(Clipped.apply(h)))
    explainer = explain(model, X, way, rules=sp_fx.Rules(**PLAIN))
    assert relative(explainer.pullback(size * X, 1), own_gradient(model, size * X)) <= 1e-9


# -- stop-gradients -----------------------------------------------------------------------------------------------------------


def in_no_grad(m, h):
    with torch.no_grad():
        a = m.more(h) * 2
    return torch.relu(a + h)


def a_gate_in_no_grad(m, h):
    with torch.no_grad():
        a = torch.relu(m.more(h)) * 2
    return torch.relu(a + h)


def a_module_in_no_grad(m, h):
    with torch.no_grad():
        a = m.block(h)
    return torch.relu(a + h)


@torch.no_grad()
def frozen_branch(m, h):
    return m.more(h) * 2


def by_a_switch(m, h):
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    a = m.more(h) * 2
    torch.set_grad_enabled(before)
    return torch.relu(a + h)


def with_gradients_again(m, h):
    with torch.no_grad():
        a = m.more(h)
        with torch.enable_grad():
            b = m.more(h)
    return torch.relu(a + b + h)


def detached_in_place(m, h):
    a = m.more(h) * 2
    a.detach_()
    return torch.relu(a + h)


def detached_by_result(m, h):
    a = (m.more(h) * 2).detach_()
    return torch.relu(a + h)


def one_branch(m, h):
    return torch.relu((m.more(h) * 2).detach() + h)


BLOCK = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
STOPS = {
    in_no_grad: one_branch,
    a_gate_in_no_grad: lambda m, h: torch.relu((torch.relu(m.more(h)) * 2).detach() + h),
    a_module_in_no_grad: lambda m, h: torch.relu(m.block(h).detach() + h),
    by_a_switch: one_branch,
    with_gradients_again: lambda m, h: torch.relu(m.more(h).detach() + m.more(h) + h),
    detached_in_place: one_branch,
    detached_by_result: one_branch,
}


STOP_WAYS = [*((body, way) for body in STOPS for way in ("no example", "an example")),
             *((body, "export") for body in (a_gate_in_no_grad, by_a_switch, detached_in_place, detached_by_result))]  # fmt: skip


@pytest.mark.parametrize("body, way", STOP_WAYS, ids=lambda f: getattr(f, "__name__", f))
def test_stop_gradients_are_kept(body, way):
    model, spelling = net(body, block=BLOCK), net(STOPS[body], block=BLOCK)
    assert_kind(model, spelling, X, way, refusable=body is by_a_switch and way == "export")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", ["a decorated method", "data"])
def test_stop_gradients_of_other_forms(form, way):
    body = (
        (lambda m, h: torch.relu(frozen_branch(m, h) + h))
        if form != "data"
        else lambda m, h: torch.relu((m.more(h) * 2).data + h)
    )
    refusable = form == "data" and way == "export"  # torch.export has no place for the constant
    assert_kind(net(body), net(one_branch), X, way, refusable=refusable)


# -- checkpoints --------------------------------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """Three residual blocks, [B, 6] to [B, 3], run by `run(block, x)`."""

    def __init__(self, run):
        super().__init__()
        self.stem, self.head, self.run = nn.Linear(6, 8), nn.Linear(8, 3), run
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(3))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + self.run(block, x)
        return self.head(x)


RUNS = {
    "reentrant": lambda block, x: checkpoint(block, x, use_reentrant=True),
    "a method": lambda block, x: checkpoint(block.forward, x, use_reentrant=True),
    "a lambda": lambda block, x: checkpoint(lambda t: block(t), x, use_reentrant=True),
    "not reentrant": lambda block, x: checkpoint(block, x, use_reentrant=False),
    "sequential": lambda block, x: checkpoint_sequential(block, 2, x, use_reentrant=True),
}


RUN_WAYS = [*((name, way) for name in RUNS for way in ("no example", "an example")), ("reentrant", "export")]


@pytest.mark.parametrize("name, way", RUN_WAYS)
def test_checkpoints_are_what_they_run(name, way):
    model, other = (fill(Checkpointed(run)).double() for run in (RUNS[name], lambda block, x: block(x)))
    try:
        explainer = explain(model, X, way)
    except sp_fx.CaptureError as error:  # a symbolic trace takes no functions for arguments
        assert way == "no example" and name in ("a method", "a lambda", "sequential")
        return assert_clear(error)
    assert_same_map(explainer, model, other, X)
    report = explainer.report()
    assert len(report.of("rewritten")) == 3 and report.of("NOT REWRITTEN") == []
    assert sp_fx.check(explainer, X)  # though a reentrant checkpoint has no `autograd.grad`


@pytest.mark.parametrize("way", WAYS)
def test_hooks_on_activations_are_kept_or_refused(way):
    """`h.register_hook` in the forward changes the gradient: both tracers keep it, or the model is refused."""

    def hooked(m, h):
        if h.requires_grad:
            h.register_hook(lambda g: -2 * g)
        return torch.relu(h)

    model = net(hooked)
    try:
        plain = explain(model, X, way, rules=sp_fx.Rules(**PLAIN))
        maps = plain.pullback(X, 1)
    except sp_fx.CaptureError as error:
        return assert_clear(error, WAYS[way][1])
    assert relative(maps, own_gradient(model, X)) <= 1e-9


@pytest.mark.parametrize("tracer", ["fx", "export"])
def test_the_derivative_of_a_map_is_refused(tracer):
    """Autograd would answer with another number: what a gate reads comes from gates, whose adjoints it would take again."""
    model = fill(nn.Sequential(nn.Conv2d(2, 4, 3), nn.GELU(), nn.GroupNorm(2, 4), nn.AdaptiveMaxPool2d(2), nn.Flatten()))
    model, x = model.double(), noise(2, 2, 7, 7)
    explainer = sp_fx.transform(model, tracer=tracer, example_inputs=x)
    leaf = x.clone().requires_grad_()
    (own,) = torch.autograd.grad(explainer(leaf)[:, 3].sum(), leaf, create_graph=True)
    assert relative(own, explainer.pullback(x, 3)) <= 1e-12
    with pytest.raises(RuntimeError, match=r"a map cannot be differentiated.*second derivative"):
        own.square().sum().backward()

    def grad(x):
        return torch.func.grad(lambda x: explainer(x)[:, 3].sum())(x)

    assert relative(grad(x), explainer.pullback(x, 3)) <= 1e-6
    for second in (lambda: torch.func.grad(lambda x: grad(x).square().sum())(x), lambda: torch.func.jacrev(grad)(x)):
        with pytest.raises(RuntimeError, match="a map cannot be differentiated"):
            second()
    assert relative(torch.func.vmap(lambda one: grad(one[None])[0])(x), explainer.pullback(x, 3)) <= 1e-6


def surrogate(slope):
    """A spike as libraries make them: a class of its own for each slope."""

    class Surrogate(torch.autograd.Function):
        @staticmethod
        def forward(ctx, u):
            return (u > 0).to(u.dtype)

        @staticmethod
        def backward(ctx, g):
            return g * slope

    return Surrogate.apply


BOUND = Spike.apply


class Holds(nn.Module):
    """A spiking network that has kept `apply`: in an attribute, in a list, in its file."""

    def __init__(self, where, function=BOUND):
        super().__init__()
        self.inner, self.outer, self.where = nn.Linear(6, 6), nn.Linear(6, 3), where
        self.spike, self.spikes = function, [function]

    def forward(self, x):
        function = {"attribute": self.spike, "list": self.spikes[0], "file": BOUND}[self.where]
        return self.outer(function(self.inner(x)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("where", ["attribute", "list", "file"])
def test_a_function_that_is_kept_as_apply(where, way):
    model = fill(Holds(where)).double()
    explainer = explain(model, X, way, rules=sp_fx.Rules(**PLAIN))
    assert torch.equal(explainer(X), model(X)) and relative(explainer.pullback(X, 1), own_gradient(model, X)) <= 1e-12
    assert explainer.pullback(X, 1).abs().max() > 0


@pytest.mark.parametrize("way", WAYS)
def test_functions_of_one_name_are_several(way):
    """Two models, and two layers of one, have classes that are called the same."""
    models = [fill(Holds("attribute", surrogate(slope))).double() for slope in (2.0, 7.0)]
    models.append(
        fill(nn.Sequential(Holds("attribute", surrogate(3.0)), nn.Linear(3, 6), Holds("attribute", surrogate(0.5)))).double()
    )
    explainers = [explain(model, X, way, rules=sp_fx.Rules(**PLAIN)) for model in models]
    for model, explainer in zip(models, explainers):
        assert torch.equal(explainer(X), model(X)) and relative(explainer.pullback(X, 1), own_gradient(model, X)) <= 1e-12


class Doubled(torch.autograd.Function):
    """Writes over its argument, and says so."""

    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, g):
        return g * 3


@pytest.mark.parametrize("way", WAYS)
def test_a_function_that_writes_over_its_argument_is_refused(way):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 3)
            self.register_buffer("size", torch.ones(3))

        def forward(self, x):
            return torch.relu(self.inner(x) + Doubled.apply(self.size))

    model = fill(Net()).double()
    before = model.size.clone()
    with pytest.raises(sp_fx.CaptureError, match=r"Doubled writes over its argument.*test_kinds_backward.py:\d+"):
        explain(model, X, way)
    assert torch.equal(model.size, before)


@torch.library.custom_op("sp_fx_tests::fill_twice", mutates_args=("x",))
def fill_twice(x: torch.Tensor) -> None:
    x.mul_(2)


fill_twice.register_fake(lambda x: None)


@pytest.mark.parametrize("way", WAYS)
def test_an_op_of_ones_own_that_writes_is_called_over_a_copy(way):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 3)
            self.register_buffer("size", torch.ones(3))

        def forward(self, x):
            torch.ops.sp_fx_tests.fill_twice(self.size)
            return torch.relu(self.inner(x) * self.size)

    model = fill(Net()).double()
    before = model.size.clone()
    explainer = explain(model, X, way)
    assert torch.equal(explainer(X), explainer(X)) and torch.equal(model.size, before)
    assert torch.equal(explainer(X), model(X))
