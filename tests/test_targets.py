"""Directions against the derivatives that they are named after, in float64."""

import collections
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import sp_fx
from helpers import relative
from sp_fx import targets

Y = 3 * torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
CLASSES = torch.tensor([0, 6, 3, 3, 1])


def derivative(function, y=Y):
    y = y.clone().requires_grad_()
    return torch.autograd.grad(function(y).sum(), y)[0]


def taken(y, target=CLASSES):
    return y.gather(1, target[:, None])[:, 0]


def log_odds(y):
    p = taken(y.softmax(1))
    return torch.log(p) - torch.log(1 - p)


def runner_up(y):
    others = [torch.cat([row[:c], row[c + 1 :]]) for row, c in zip(y, CLASSES.tolist(), strict=True)]
    return taken(y) - torch.stack([o.max() for o in others])


@pytest.mark.parametrize(
    "direction, function",
    [
        (targets.score(CLASSES), taken),
        (targets.log_probability(CLASSES), lambda y: taken(y.log_softmax(1))),
        (targets.margin(CLASSES), log_odds),
        (targets.margin(CLASSES, rivals=1), runner_up),
        (targets.log_probability(2), lambda y: y.log_softmax(1)[:, 2]),
        (targets.log_probability(), lambda y: y.log_softmax(1).amax(1)),
        (2 * targets.score(1) - targets.score(0) * 0.5, lambda y: 2 * y[:, 1] - 0.5 * y[:, 0]),
        (-targets.score(1) + targets.score(2), lambda y: y[:, 2] - y[:, 1]),
    ],
)
def test_a_direction_is_the_derivative_of_its_name(direction, function):
    assert relative(direction.of(Y), derivative(function)) <= 1e-9  # float64; log-odds cancel where p is near 1
    assert relative(derivative(direction), direction.of(Y)) <= 1e-12  # and it is constant: nothing is differentiated through it


@pytest.mark.parametrize("damping", [1e-6, 1e-3, 1.0, 1e6])
def test_fisher_rao_solves_its_equation(damping):
    u = targets.fisher_rao(CLASSES, damping).of(Y)
    for y, c, direction in zip(Y, CLASSES, u, strict=True):
        p = y.softmax(0)
        fisher = torch.diag(p) - torch.outer(p, p)
        e = torch.eye(7, dtype=torch.float64)
        expected = torch.linalg.solve(fisher + damping * e, e[c] - p)
        assert relative(direction, expected - expected.mean()) <= 1e-6  # the system's condition is 1 / damping
        assert abs(direction.sum()) <= 1e-9 * direction.abs().sum()


def test_fisher_rao_between_its_limits():
    flat = targets.fisher_rao(CLASSES, 1e6).of(Y)
    assert torch.cosine_similarity(flat, targets.log_probability(CLASSES).of(Y)).min() > 1 - 1e-8
    steep = targets.fisher_rao(CLASSES, 1e-12).of(Y)
    one = torch.zeros_like(Y).scatter_(1, CLASSES[:, None], 1)
    assert torch.cosine_similarity(steep, one - one.mean(1, keepdim=True)).min() > 1 - 1e-6


def test_certain_and_hopeless_classes_are_finite():
    y = torch.tensor([[500.0, -500.0, 0.0], [-1e4, 1e4, 0.0]])
    for direction in (targets.margin(0), targets.margin(0, 1), targets.log_probability(0), targets.fisher_rao(0)):
        assert direction.of(y).isfinite().all() and direction.of(y)[:, 0].min() >= 0


def test_inner_neurons_and_channels():
    y = torch.randn(2, 4, 3, 3)
    assert torch.equal(targets.neuron(1, 2, 0)(y), y[:, 1, 2, 0])
    assert torch.allclose(targets.channel(3)(y), y[:, 3].mean((1, 2)))
    assert torch.allclose(targets.channel(3)(y.mean((2, 3))), y[:, 3].mean((1, 2)))
    u = torch.randn(4, 3, 3)
    assert torch.allclose(targets.free(u)(y), (u * y).sum((1, 2, 3)))
    with pytest.raises(ValueError, match=r"neuron of an output \[2, 4, 3, 3\] has 3 indices, got 1"):
        targets.neuron(1)(y)
    with pytest.raises(IndexError, match="target 4 is outside 0 to 3"):
        targets.channel(4)(y)
    with pytest.raises(ValueError, match=r"shaped like one sample's output \[4, 3, 3\], got \[4\]"):
        targets.free(torch.ones(4))(y)


def test_they_are_targets_of_every_method():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 5)).eval()
    explainer, x = sp_fx.transform(model), torch.randn(3, 6)
    probability = model(x).softmax(1)
    u = torch.eye(5)[2] - probability
    assert relative(explainer.pullback(x, targets.log_probability(2)), explainer.pullback(x, u)) <= 1e-5  # float32
    assert torch.equal(explainer.pullback(x, targets.score(4)), explainer.pullback(x, 4))
    assert relative(explainer.pullback(x, targets.score()), explainer.pullback(x)) <= 1e-6
    for direction in (targets.margin(2), targets.fisher_rao(2), targets.log_probability(2)):
        moved = model(x + explainer.ascend(x, direction, steps=3, step_size=1.0)).softmax(1)
        assert (moved[:, 2] > probability[:, 2]).all()
        assert explainer.double_pullback(x, direction).shape == x.shape
    cut = explainer.pullback(x, targets.margin(2), batch_size=2)
    assert relative(cut, explainer.pullback(x, targets.margin(2))) <= 1e-6


def test_channels_of_an_inner_layer():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    x = torch.randn(2, 3, 9, 9)
    body(x)
    inner = sp_fx.transform(body.eval(), output="2")
    cut = sp_fx.transform(nn.Sequential(*body[:3]))
    assert relative(inner.pullback(x, targets.channel(1)), cut.pullback(x, 1) / 25) <= 1e-6  # the mean over 5 x 5 places
    assert relative(inner.pullback(x, targets.neuron(1, 2, 2)), cut.pullback(x, (1, 2, 2))) <= 1e-6


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: targets.fisher_rao(1, damping=0), "damping is above 0, got 0"),
        (lambda: targets.fisher_rao(1, damping="much"), "damping is above 0, got 'much'"),
        (lambda: targets.margin(1, rivals=7)(Y), "rivals is None or from 1 to 6 for 7 classes, got 7"),
        (lambda: targets.margin(1, rivals="all")(Y), "rivals is None or from 1 to 6 for 7 classes, got 'all'"),
        (lambda: targets.score(1)(Y[0]), r"got torch.float64 \[7\]"),
        (lambda: targets.score(torch.zeros(5, 2, dtype=torch.long))(Y), "one class a sample, got 2"),
        (lambda: targets.score()(Y[..., None]), "no single predicted class: name one"),
        (lambda: targets.margin(0)(Y[:, :1]), "a margin needs a rival"),
    ],
)
def test_bad_directions(make, message):
    with pytest.raises(ValueError, match=message):
        make()


SCORE = targets.score(1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SCORE * torch.ones(5), lambda: torch.ones(5) * SCORE, lambda: SCORE / torch.ones(5), lambda: np.ones(5) * SCORE,
        lambda: SCORE * np.ones(5), lambda: SCORE * SCORE, lambda: SCORE / SCORE, lambda: SCORE * "2", lambda: SCORE * None,
        lambda: SCORE / 0, lambda: SCORE * float("nan"), lambda: SCORE * 1j, lambda: SCORE + 1, lambda: 1 + SCORE,
        lambda: SCORE - 1.0, lambda: 1 - SCORE, lambda: SCORE + torch.ones(5, 7), lambda: torch.ones(5, 7) + SCORE,
        lambda: SCORE + taken, lambda: taken + SCORE, lambda: SCORE - taken,
    ],
)  # fmt: skip
def test_arithmetic_that_directions_do_not_have(make):
    with pytest.raises(TypeError, match=r"got a direction .*; directions add and subtract.*weights \* direction\(out\)"):
        make()


def test_numbers_of_every_kind_multiply_a_direction():
    for two in (2, 2.0, np.float32(2), np.int64(2), torch.tensor(2.0)):
        for direction in (SCORE * two, two * SCORE, SCORE / (1 / two), 0 - SCORE * -two):
            assert torch.equal(direction.of(Y), 2 * SCORE.of(Y))


def test_weights_of_samples_go_into_a_callable():
    weights = torch.arange(5.0).double()
    found = derivative(lambda y: weights * SCORE(y))
    assert torch.equal(found, weights[:, None] * SCORE.of(Y))


ONE_HOT = torch.eye(7, dtype=torch.long)[CLASSES]


@pytest.mark.parametrize("form", ["long", "int", "bool", "tolist", "numpy"])
def test_one_hot_integers_are_no_classes(form):
    target = getattr(ONE_HOT, form)()
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7))
    explainer, x = sp_fx.transform(model), torch.randn(5, 6)
    for method in (explainer.pullback, explainer.ascend, explainer.attribute):
        with pytest.raises(ValueError, match=r"one-hot target \[5, 7\] .*target\.argmax\(1\), or the direction, target\.float"):
            method(x, target)
    torch.testing.assert_close(explainer.pullback(x, ONE_HOT.float()), explainer.pullback(x, CLASSES))


def test_classes_of_two_are_no_one_hot_rows():
    explainer, x = sp_fx.transform(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 2))), torch.randn(3, 6)
    assert explainer.pullback(x, [[0, 1], [1, 0], [0, 1]]).shape == (3, 2, 6)


@pytest.mark.parametrize(
    "target, message",
    [
        ([1, 2, 3], r"has shape \[1\] or \[1, T\] for this batch, got \[3\]; .*a row, as in \[\[1, 2, 3\]\]"),
        ([[0], [1]], r"\[1, T\] for this batch, got \[2, 1\]$"),
        ([], r"\[1, T\] for this batch, got \[0\]"),
        (targets.score(torch.ones(1)), "a tensor of torch.float32 as the target"),
    ],
)
def test_targets_of_the_wrong_shape(target, message):
    explainer = sp_fx.transform(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 5)))
    with pytest.raises((ValueError, TypeError), match=message):
        explainer.pullback(torch.randn(1, 6), target)


def test_a_channel_of_many_places_in_half_precision():
    y = torch.ones(1, 2, 256, 257, dtype=torch.float16)
    assert targets.channel(1).of(y)[0, 1, 0, 0] == pytest.approx(1 / (256 * 257), rel=0.05)  # a subnormal of float16


def test_the_logits_of_a_named_tuple():
    Out = collections.namedtuple("Out", "logits aux")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            y = self.layer(x).relu()
            return Out(y, x)

    explainer, x = sp_fx.transform(Net()), torch.randn(2, 4)
    assert torch.equal(explainer.pullback(x, 1), explainer.pullback(x, lambda out: out.logits[:, 1]))


def test_an_empty_batch():
    explainer = sp_fx.transform(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)))
    assert explainer.pullback(torch.empty(0, 4)).shape == (0, 4)
    assert explainer.pullback(torch.empty(0, 4), torch.empty(0, 2, dtype=torch.long)).shape == (0, 2, 4)


def test_the_classes_of_a_direction_are_cut_with_the_batch():
    torch.manual_seed(0)
    explainer = sp_fx.transform(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 5)))
    x, classes = torch.randn(5, 6), torch.tensor([0, 4, 2, 2, 1])
    direction = targets.margin(classes) - 0.5 * targets.fisher_rao(classes) + targets.log_probability(3)
    whole = explainer.pullback(x, direction)
    assert relative(explainer.pullback(x, direction, batch_size=2), whole) <= 1e-6
    assert relative(explainer.ascend(x, direction, steps=2, batch_size=3), explainer.ascend(x, direction, steps=2)) <= 1e-5


def test_directions_that_are_no_numbers():
    explainer = sp_fx.transform(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 5)))
    with pytest.raises(ValueError, match=r"direction of shape \[2, 5\] has NaN"):
        explainer.pullback(torch.randn(2, 6), torch.full((2, 5), float("nan")))
    with pytest.raises(ValueError, match=r"free direction of shape .* has NaN"):
        targets.free(torch.tensor([float("nan")]))
    with pytest.raises(TypeError, match="a tensor shaped like one sample's output, got a list"):
        targets.free([1.0, 2.0])
    assert torch.equal(targets.free(np.arange(7.0)).of(Y), torch.arange(7.0).double().expand(5, 7))


def test_no_class_is_predicted_where_a_score_is_nan():
    """torch's argmax takes NaN for the largest score."""
    explainer = sp_fx.transform(nn.Sequential(nn.Linear(6, 5), nn.ReLU()))
    with torch.no_grad():
        explainer.get_submodule("0").bias[2] = torch.nan
    with pytest.raises(ValueError, match=r"no class is predicted: the output of shape \[2, 5\] has NaN"):
        explainer.pullback(torch.randn(2, 6))
    with pytest.raises(ValueError, match="batch axis forgotten"):
        targets.seed(torch.randn(5), None)


def test_an_infinite_score_whose_map_is_nan_is_refused():
    class Divided(nn.Module):
        def forward(self, x):
            return x / torch.zeros(())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        explainer = sp_fx.transform(nn.Sequential(nn.ReLU(), Divided(), nn.Linear(6, 5)))
    with pytest.raises(ValueError, match="NaN or infinite"):
        explainer.pullback(torch.randn(2, 6), 1)
