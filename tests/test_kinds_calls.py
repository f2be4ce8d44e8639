"""Calls by kind: a tensor for two arguments, keyword tensors as long as the batch, samples that are single numbers, extremes."""

import copy
import inspect
import math
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sp_fx
from helpers import fill, relative
from kinds import PLAIN, explain, net, noise, own_gradient, score
from sp_fx.gates.scale import deviation

X = noise(4, 6)


class Two(nn.Module):
    """A comparison of two pictures, as siamese pairs and encoder-decoders have it."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x, y):
        return self.head(torch.relu(self.a(x) - 2 * self.b(y)))


@pytest.mark.parametrize("tracer", ["fx", "export"])
@pytest.mark.parametrize("form", ["positional", "by keyword"])
def test_an_example_of_one_tensor_for_two_arguments(tracer, form):
    model, y = fill(Two()).double(), noise(4, 6, seed=2)
    same, two = ((X, X), (X, y)) if form == "positional" else ({"x": X, "y": X}, {"x": X, "y": y})
    explainer = sp_fx.transform(model, tracer=tracer, example_inputs=same)
    reference = sp_fx.transform(model)
    assert torch.equal(explainer(X, y), model(X, y))
    leaves = X.clone().requires_grad_(), y.clone().requires_grad_()
    expected = torch.autograd.grad(score(reference(*leaves)).sum(), leaves)
    maps = explainer.pullback(two, 1)
    for a, b in zip(maps if form == "positional" else maps.values(), expected, strict=True):
        assert relative(a, b) <= 1e-9


@pytest.mark.parametrize("given", ["one tensor", "two equal ones"])
def test_a_call_with_one_tensor_for_two_arguments(given):
    """Each argument has its own map."""
    model = fill(Two()).double()
    explainer, other = sp_fx.transform(model), X if given == "one tensor" else X.clone()
    leaves = X.clone().requires_grad_(), X.clone().requires_grad_()
    expected = torch.autograd.grad(score(explainer(*leaves)).sum(), leaves)
    for a, b in zip(explainer.pullback((X, other), 1), expected, strict=True):
        assert relative(a, b) <= 1e-9


class Prototypes(nn.Module):
    """Scores by prototypes that are given by keyword."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))

    def forward(self, x, prototypes):
        return self.body(x) @ prototypes.t()


@pytest.mark.parametrize("count", [4, 5])
def test_a_keyword_tensor_as_long_as_the_batch(count):
    """4 prototypes and 4 samples are no batch of pairs: many targets at once are single ones, pieces are the whole."""
    explainer = sp_fx.transform(fill(Prototypes()).double())
    kwargs = {"prototypes": noise(count, 8, seed=3)}
    whole = explainer.pullback(X, 0, forward_kwargs=kwargs)
    assert relative(explainer.pullback(X, 0, forward_kwargs=kwargs, batch_size=2), whole) <= 1e-9
    targets = torch.tensor([[0, 1]] * 4)
    together = explainer.ascend(X, targets, steps=2, forward_kwargs=kwargs)
    single = [explainer.ascend(X, torch.full((4,), k), steps=2, forward_kwargs=kwargs) for k in (0, 1)]
    assert relative(together, torch.stack(single, 1)) <= 1e-9


@pytest.mark.parametrize("way", ["no example", "an example", "export"])
def test_samples_that_are_single_numbers(way):
    """An input of one axis: a number a sample, each with its own map."""

    class Curve(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.head = nn.Linear(1, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(torch.relu(self.w(x[:, None])))

    model, x = fill(Curve()).double(), noise(5)
    explainer = explain(model, x, way)
    maps = explainer.pullback(x, 1)
    assert maps.shape == (5,) and torch.equal(explainer(x), model(x))
    for i in range(5):
        alone = explain(model, x, "no example").pullback(x[i : i + 1], 1)
        assert abs(float(maps[i] - alone)) <= 1e-9 * float(alone.abs())
    with torch.no_grad():
        leaf = explain(model, x, way, rules=sp_fx.Rules(**PLAIN)).pullback(x, 1)
    assert leaf.isfinite().all()


@pytest.mark.parametrize("way", ["no example", "an example", "export"])
def test_the_largest_of_a_transposed_input(way):
    """`x.T.amax(-2)`: the axis that is reduced is before the sample's."""

    class Largest(nn.Module):
        def __init__(self, reduce):
            super().__init__()
            self.head, self.reduce = nn.Linear(1, 3), reduce

        def forward(self, x):
            return self.head(F.relu(self.reduce(x))[:, None])

    model, other = (fill(Largest(f)).double() for f in (lambda x: x.T.amax(-2), lambda x: x.amax(1)))
    explainer = explain(model, X, way)
    assert torch.equal(explainer(X), model(X))
    rules = sp_fx.Rules(relu=None)  # a sample of one number has no deviation
    maps = [explain(m, X, way, rules=rules).pullback(X, 1) for m in (model, other)]
    assert relative(*maps) <= 1e-9


def test_a_forgotten_batch_axis():
    """One sample without its axis: a map of it as of a batch of 1, or an error about the batch."""
    explainer = sp_fx.transform(net(lambda m, h: torch.relu(h)))
    try:
        alone = explainer.pullback(X[0], 1)
    except (ValueError, IndexError, TypeError, UserWarning) as error:
        assert re.search("batch|axis", str(error))
    else:
        assert relative(alone, explainer.pullback(X[:1], 1)[0]) <= 1e-9


# -- extremes -----------------------------------------------------------------------------------------------------------------


GATED = nn.Sequential(nn.Identity(), nn.ReLU()).eval()


@pytest.mark.parametrize("tau", [1e-30, 1e-3, 1.0, 1e6, 1e30])
def test_gates_are_finite_at_extremes(tau):
    z = torch.tensor([[0.0, 1e-30, -1e-30, -1e-30 * tau, 1e-8, -1.0, 30.0, -30.0, 1e10, -1e10, 1e30, -1e30]])
    maps = sp_fx.transform(GATED, rules=sp_fx.Rules(relu=tau, scale="absolute")).pullback(z, torch.ones_like(z))
    expected = 0.5 * torch.erfc(-z.double() / tau / math.sqrt(2))
    assert maps.isfinite().all() and (maps.double() - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("mean", [0.0, 10.0, 100.0])
@pytest.mark.parametrize("place", [0, 5])
def test_a_deviation_about_an_outlier(mean, place):
    """Also where autograd follows it, as inside torch.compile and vmap."""
    z = torch.randn(2, 100_000, generator=torch.Generator().manual_seed(0)) * 1e-2 + mean
    z[:, place] = 1e4
    expected = z.double().std(1, unbiased=False)
    for each in (z, z.clone().requires_grad_()):
        assert relative(deviation(each).detach().flatten().double(), expected) <= 1e-4


@pytest.mark.parametrize("factor", [1e-3, 100.0])
def test_a_network_at_another_scale_has_the_same_map(factor):
    """A layer up and the next down by one factor: the same function, and the same default map wherever Rules says a temperature
    is in units of the sample's deviation."""

    def scaled(gate):
        return lambda m, h: gate(h * factor) / factor

    for gate in (torch.relu, torch.abs, lambda h: F.leaky_relu(h, 0.1), lambda h: F.max_pool1d(h[:, None], 2, 1, 1)[:, 0, :8]):
        model, other = net(scaled(gate)), net(lambda m, h, gate=gate: gate(h))
        assert relative(explain(model, X, "no example").pullback(X, 1), explain(other, X, "no example").pullback(X, 1)) <= 1e-9


def test_outputs_that_are_not_numbers_are_said_to_be():
    """A NaN in the model's own output fails `check` with a reason, and verification does not stumble over it."""
    model = net(lambda m, h: torch.relu(h) + float("nan"))
    explainer = explain(model, X, "an example")
    checks = sp_fx.check(explainer, X)
    assert torch.equal(explainer(X).isnan(), model(X).isnan())
    assert "-nan" not in str(checks) and "nothing of the model's output is finite" in str(checks)
    assert explainer.pullback(X, 1).isfinite().all()  # the derivative is there all the same
    without = explain(net(lambda m, h: torch.relu(h) / (h * 0)), X, "an example")
    with pytest.raises(ValueError, match=r"output of shape \[4, 3\], is NaN"):
        without.pullback(X, 1)


class Named(nn.Module):
    """A forward whose arguments are called like what the code of a graph names itself."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(6, 8), nn.Linear(8, 3)


class OfInf(Named):
    def forward(self, inf, nan=None):
        h = self.layer(inf)
        return self.head(F.relu(torch.where(h > 0, h, float("-inf")).nan_to_num(0.5, neginf=-0.5)))


class OfDevice(Named):
    def forward(self, x, device=None, slice=1):
        h = F.relu(self.layer(x)) + torch.arange(8, device=torch.device("cpu"))
        return self.head(h)[:, slice - 1 :]


class OfTorch(Named):
    def forward(self, torch, range=None, NoneType=None):
        return self.head(F.relu(self.layer(torch)) * 2)


@pytest.mark.parametrize("tracer", ["fx", "export"])
@pytest.mark.parametrize("kind", [OfInf, OfDevice, OfTorch])
def test_arguments_that_are_called_like_what_a_graph_names(kind, tracer):
    """What a graph computes is verified by running its nodes; a user runs the code that is generated of them."""
    model = fill(kind()).double()
    explainer = sp_fx.transform(model, tracer=tracer, example_inputs=X, rules=sp_fx.Rules(**PLAIN))
    for own in (explainer, copy.deepcopy(explainer), pickle.loads(pickle.dumps(explainer))):
        assert torch.equal(own(X), model(X))
        assert relative(own.pullback(X, 1), own_gradient(model, X)) <= 1e-12
    stem, tail = explainer.split("layer")
    assert torch.equal(tail(stem(X)), model(X))
    first = next(iter(inspect.signature(model.forward).parameters))
    assert torch.equal(explainer(**{first: X}), model(X))
