"""What a forward takes out of autograd, or gives a backward of its own, and what it computes under an autocast, by both tracers.

The reference is the model itself: its forward bit for bit, and under plain rules its own gradient.
"""

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

import sp_fx
from helpers import fill, relative

PLAIN = sp_fx.Rules(**dict.fromkeys(sp_fx.gates.rules.KINDS))
BF16 = torch.bfloat16
pytestmark = pytest.mark.filterwarnings("ignore:.*NOT REWRITTEN", "ignore:.*no gate to rewrite")


def net(forward):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.skip, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.act, self.norm, self.gru = nn.ReLU(inplace=True), nn.LayerNorm(6), nn.GRU(6, 6, batch_first=True)

        def forward(self, x):
            return self.head(F.relu(forward(self, x).float() + self.skip(x)))

    return fill(Net())


def agrees(model, tracer, x=None):
    """Whether the explainer computes the model's forward and, under plain rules, its gradient; returns the explainer."""
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(2)) if x is None else x
    explainer = sp_fx.transform(model, rules=PLAIN, tracer=tracer, example_inputs=x if tracer == "export" else None)
    assert explainer.report().tracer == f"torch.{tracer}"
    y = x.clone().requires_grad_()
    out = model(y)
    expected = torch.autograd.grad(out[:, 1].sum(), y)[0]
    assert torch.equal(explainer(x), out)
    assert tracer == "export" or torch.equal(sp_fx.transform(model)(x), out)
    assert relative(explainer.pullback(x, 1), expected) <= 1e-6
    return explainer


def without_grad(m, x):
    with torch.no_grad():
        return m.b(m.act(m.a(x)))


def partly_with_grad(m, x):
    with torch.no_grad():
        h = m.a(x)
        with torch.enable_grad():
            g = m.b(x) * 2
        h = h + g
    return h + g


def switched(m, x):
    torch.set_grad_enabled(False)
    h = F.gelu(m.a(x))
    torch.set_grad_enabled(True)
    return h


def several(m, x):
    with torch.no_grad():
        h, g = m.a(x).chunk(2, 1)
        values, _ = m.b(x).topk(3)
    return torch.cat([h * g, values], 1)


def detached_in_place(m, x):
    h = m.a(x)
    h.detach_()
    return h


class Decorated:
    @torch.no_grad()
    def no_grad(m, x):
        return m.a(x)

    @torch.autocast("cpu", dtype=BF16)
    def autocast(m, x):
        return m.b(m.act(m.a(x)))


STOPS = {
    "no_grad": without_grad,
    "enable_grad inside": partly_with_grad,
    "set_grad_enabled": switched,
    "several outputs": several,
    "a decorator": Decorated.no_grad,
    "detach": lambda m, x: m.a(x).detach(),
    "detach_": lambda m, x: m.a(x).detach_(),
    "detach_, a statement": detached_in_place,
    "data": lambda m, x: m.a(x).data,
}


EXPORTED = ("no_grad", "enable_grad inside", "several outputs", "detach_, a statement", "data")


@pytest.mark.parametrize("name, tracer", [*((name, "fx") for name in STOPS), *((name, "export") for name in EXPORTED)])
def test_signals_stop_where_the_models_do(name, tracer):
    explainer = agrees(net(STOPS[name]), tracer)
    told = [note for note in explainer.report().notes if "no signal passes" in note]
    assert bool(told) == ("detach" not in name and name != "data") or tracer == "export"
    assert all("test_capture_regions.py:" in note for note in told)


def on(m, x):
    with torch.autocast("cpu", dtype=BF16):
        h = m.norm(m.b(m.act(m.a(x))))
        return torch.softmax(h @ h.mT, -1) @ h


def off_inside(m, x):
    with torch.autocast("cpu", dtype=BF16):
        h = m.a(x)
        with torch.autocast("cpu", enabled=False):
            h = F.gelu(m.b(h.float()))
        return m.gru(m.a(h)[:, None])[0][:, 0]


def without_grad_inside(m, x):
    with torch.autocast("cpu", dtype=BF16):
        g = m.b(x)
        with torch.no_grad():
            h = m.a(x)
        return h * g


AUTOCAST = {"on": on, "off inside": off_inside, "a decorator": Decorated.autocast, "no_grad inside": without_grad_inside}


@pytest.mark.filterwarnings("ignore:no axis is known")  # one attends over the batch
@pytest.mark.parametrize("tracer", ["fx", "export"])
@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast_of_the_models_own(name, tracer):
    if (name, tracer) == ("no_grad inside", "export"):
        pytest.skip("torch.export forgets what is without gradients inside an autocast")
    explainer = agrees(net(AUTOCAST[name]), tracer)
    assert not explainer.report().of("rewritten")
    x = torch.randn(5, 6)
    if tracer == "fx":  # torch.fx cannot unpickle the zeros that an exported GRU starts from
        assert torch.equal(pickle.loads(pickle.dumps(explainer)).pullback(x, 1), explainer.pullback(x, 1))
    stem, tail = explainer.split("a")
    assert stem(x).dtype == BF16 and torch.equal(tail(stem(x), x), explainer(x))


@pytest.mark.parametrize("tracer", ["fx", "export"])
def test_a_part_without_autocast_under_the_callers(tracer):
    def off(m, x):
        with torch.autocast("cpu", enabled=False):
            h = m.a(x)
        return m.b(h)

    model, x = net(off), torch.randn(5, 6)
    explainer = sp_fx.transform(model, tracer=tracer, example_inputs=x)
    with torch.autocast("cpu", dtype=BF16):
        assert torch.equal(explainer(x), model(x))
    assert torch.equal(explainer(x), model(x))


@pytest.mark.filterwarnings("ignore:no axis is known")  # it attends over the batch
def test_gates_under_an_autocast_are_rewritten_in_its_dtype():
    model, x = net(on), torch.randn(5, 6)
    explainer = sp_fx.transform(model)
    assert [s.kind for s in explainer.report().of("rewritten")] == ["relu", "layer_norm", "attention", "relu"]
    seen = []
    explainer.act.register_forward_hook(lambda m, a, y: seen.append(y.dtype))
    explainer(x)
    assert seen == [BF16]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:no axis is known")  # it attends over the batch
def test_programs_of_a_model_with_an_autocast():
    model, x = net(on), torch.randn(5, 6)
    explainer = sp_fx.transform(model)
    program = explainer.compile(example_inputs=x)
    outputs, found = program(x, 1)
    assert relative(outputs, model(x)) <= 1e-2 and relative(found, explainer.pullback(x, 1)) <= 3e-2


@pytest.mark.parametrize("tracer", ["fx", "export"])
def test_a_forward_that_asks_whether_gradients_are_on(tracer):
    """The report says so; where another output depends on it, the explainer would predict another than the model in service."""

    def asks(m, x):
        return m.a(x) if torch.is_grad_enabled() else m.a(x) * 1

    (note,) = agrees(net(asks), tracer).report().notes
    assert "whether gradients are on" in note and "test_capture_regions.py:" in note

    def depends(m, x):
        return m.a(x) if torch.is_grad_enabled() else x

    model, x = net(depends), torch.randn(5, 6)
    text = r"computes other outputs where gradients are off, and asks at .*test_capture_regions.py:\d+, in depends.*verify=False"
    with pytest.raises(sp_fx.CaptureError, match=text):
        sp_fx.transform(model, tracer=tracer, example_inputs=x)
    explainer = sp_fx.transform(model, tracer=tracer, example_inputs=x, verify=False)
    assert torch.equal(explainer(x), model(x))
    if tracer == "fx":
        with pytest.raises(sp_fx.CaptureError, match=text):
            sp_fx.transform(model)(x)


def test_a_write_without_grad_over_what_carries_one_is_refused():
    def forward(m, x):
        h = m.a(x)
        with torch.no_grad():
            h.mul_(2)
        return h

    with pytest.raises(sp_fx.CaptureError, match=r"under torch.no_grad\(\), mul_ writes over.*test_capture_regions.py:\d+"):
        sp_fx.transform(net(forward))


class Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, slope):
        ctx.save_for_backward(u)
        ctx.slope = slope
        return (u > 0).float()

    @staticmethod
    @once_differentiable
    def backward(ctx, v):
        return v / (1 + (ctx.slope * ctx.saved_tensors[0]) ** 2), None


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, v):
        return -v


class Pair(torch.autograd.Function):
    """Two tensors in, three things out, in the newer form."""

    @staticmethod
    def forward(x, y, flag):
        return x.sign() * y, None, torch.round(y * 4) / 4 if flag else y

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, v, _, w):
        return 2 * v, v + 3 * w, None


class Swish(torch.autograd.Function):
    """Its backward is the derivative of its forward, in less memory."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, v):
        x = ctx.saved_tensors[0]
        s = torch.sigmoid(x)
        return v * s * (1 + x * (1 - s))


class Rectified(torch.autograd.Function):
    """A ReLU with another backward, as guided backpropagation has it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, v):
        return v.clamp(min=0) * (ctx.saved_tensors[0] > 0)


def pair(m, x):
    first, nothing, second = Pair.apply(m.a(x), m.b(x), True)
    assert nothing is None or isinstance(nothing, torch.fx.Proxy)
    return first + second


FUNCTIONS = {
    "Spike": lambda m, x: Spike.apply(m.a(x), 3.0),
    "Reversal": lambda m, x: Reversal.apply(m.a(x)),
    "Pair": pair,
    "Rectified": lambda m, x: Rectified.apply(m.a(x)),
}


@pytest.mark.parametrize("tracer", ["fx", "export"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_keep_their_backward(name, tracer):
    explainer = agrees(net(FUNCTIONS[name]), tracer)
    (site,) = explainer.report().of("NOT REWRITTEN")
    assert site.op == name and site.opaque and "its own backward is kept" in site.reason
    x = torch.randn(3, 6)
    assert torch.equal(pickle.loads(pickle.dumps(explainer)).pullback(x, 1), explainer.pullback(x, 1))


def test_a_function_whose_backward_is_its_derivative_is_opened():
    model, x = net(lambda m, x: Swish.apply(m.a(x))), torch.randn(3, 6)
    explainer = sp_fx.transform(model, example_inputs=x)
    assert explainer.report().tracer == "torch.export" and not explainer.report().of("NOT REWRITTEN")
    assert [s.kind for s in explainer.report().of("rewritten")] == ["silu", "relu"]


@pytest.mark.parametrize("reentrant, tracer", [(True, "fx"), (False, "fx"), (True, "export")])
def test_checkpoints_are_the_functions_that_they_call(reentrant, tracer):
    def block(m, x, scale):
        return F.relu(m.b(m.act(m.a(x)))) * scale

    checked = net(lambda m, x: checkpoint(lambda *args: block(m, *args), x, 2.0, use_reentrant=reentrant))
    x, u = torch.randn(3, 6), torch.randn(3, 3)
    explainer = sp_fx.transform(checked, tracer=tracer, example_inputs=x)
    expected = sp_fx.transform(net(lambda m, x: block(m, x, 2.0)))
    assert torch.equal(explainer(x), checked(x)) and torch.equal(explainer.pullback(x, u), expected.pullback(x, u))
    assert explainer.report().sites == expected.report().sites
