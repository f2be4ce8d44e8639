"""The adjoint of a convolution that steps over places, averaged over its grids, against explicit loops in float64."""

import itertools
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sp_fx
from helpers import fill, relative
from sp_fx import Rules
from sp_fx.gates.adjoints.affine import over_grids
from test_explainer_oracle import Calls

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRACERS = ("fx", "export")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def adjoint_by_loops(conv, v, shape):
    """Each output number sends its cotangent to the input numbers that it was made of: [B, in, *places] of float64."""
    weight, grad = conv.weight.detach().double().numpy(), np.zeros(shape)
    outs, ins = conv.out_channels // conv.groups, conv.in_channels // conv.groups
    for place in np.ndindex(*v.shape[2:]):
        for tap in np.ndindex(*conv.kernel_size):
            steps = zip(place, tap, conv.stride, conv.padding, conv.dilation, strict=True)
            at = tuple(o * s - p + t * d for o, t, s, p, d in steps)
            if all(0 <= a < n for a, n in zip(at, shape[2:], strict=True)):
                for o, i in itertools.product(range(conv.out_channels), range(ins)):
                    grad[(slice(None), o // outs * ins + i, *at)] += v[(slice(None), o, *place)] * weight[(o, i, *tap)]
    return grad


def box_mean(grad, axis, size, before, rows):
    """The mean of the numbers from `before` places before each of the `rows` on, `size` of them or as many as there are."""
    columns = np.moveaxis(grad, axis, 0)
    means = [columns[max(row - before, 0) : row - before + size].mean(0) for row in range(rows)]
    return np.moveaxis(np.stack(means), 0, axis)


def smoothed(grad, kernel, stride):
    for axis, (k, s) in enumerate(zip(kernel, stride, strict=True), start=2):
        if k > s > 1:
            n = grad.shape[axis]
            grad = box_mean(box_mean(grad, axis, s, s // 2, n + 1 - s % 2), axis, s, (s - 1) // 2, n)
    return grad


CASES = {  # channels in and out, size, arguments
    "1-d": ((3, 4), (11,), {"kernel_size": 3, "stride": 2, "padding": 1}),
    "the first of a ResNet": ((3, 4), (12, 13), {"kernel_size": 7, "stride": 2, "padding": 3, "bias": False}),
    "one axis": ((3, 2), (9, 8), {"kernel_size": 3, "stride": (2, 1), "padding": 1}),
    "one axis overlaps": ((2, 2), (9, 8), {"kernel_size": (3, 2), "stride": 2}),
    "two steps, of patches one": ((2, 3), (11, 9), {"kernel_size": (3, 4), "stride": (3, 2), "padding": (0, 2)}),
    "depthwise": ((6, 6), (7, 8), {"kernel_size": 3, "stride": 2, "padding": 1, "groups": 6}),
    "groups of four": ((8, 4), (7, 7), {"kernel_size": 3, "stride": 2, "groups": 2}),
    "dilated": ((3, 2), (10, 9), {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": 2}),
    "3-d": ((2, 3), (7, 6, 5), {"kernel_size": 3, "stride": 2, "padding": 1}),
    "3-d, uneven": ((4, 2), (7, 5, 6), {"kernel_size": (3, 2, 4), "stride": (2, 1, 2), "groups": 2}),
}


def built(name):
    (i, o), size, arguments = CASES[name]
    conv = fill(CONVS[len(size) - 1](i, o, **arguments)).double()
    return conv, randn(2, i, *size, seed=1)


def transform(model, x, tracer="fx", **rules):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of having nothing to rewrite
        return sp_fx.transform(model, tracer=tracer, example_inputs=x if tracer == "export" else None, rules=Rules(**rules))


def strides(explainer):
    return [(site.status, site.temperature) for site in explainer.report().sites if site.kind == "stride"]


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("name", CASES)
def test_the_adjoint_is_the_mean_over_the_grids(name, tracer):
    conv, x = built(name)
    explainer = transform(nn.Sequential(conv), x, tracer)
    u = randn(*conv(x).shape, seed=2)
    expected = adjoint_by_loops(conv, u.numpy(), tuple(x.shape))
    soft = torch.from_numpy(smoothed(expected, conv.kernel_size, conv.stride))
    assert torch.equal(explainer(x), conv(x))
    assert relative(explainer.pullback(x, u), soft) <= 1e-12 and relative(soft, torch.from_numpy(expected)) > 0.01
    assert strides(explainer) == [("rewritten", "smooth")]
    exact = transform(nn.Sequential(conv), x, tracer, stride=None)
    assert relative(exact.pullback(x, u), torch.from_numpy(expected)) <= 1e-12 and strides(exact) == []


@pytest.mark.parametrize("name", ["1-d", "two steps, of patches one", "depthwise", "3-d"])
def test_without_a_batch_axis_it_is_that_of_a_batch_of_one(name):
    conv, x = built(name)
    explainer = sp_fx.transform(conv)

    def soft(x, v):
        z = x.clone().requires_grad_()
        return torch.autograd.grad(explainer(z), z, v)[0]

    u = randn(*conv(x).shape, seed=2)
    assert torch.allclose(soft(x[0], u[0]), soft(x[:1], u[:1])[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("stride", [2, 3, 4, 5])
def test_inside_it_is_the_mean_over_the_grids_that_a_stride_might_have(stride):
    """Grids moved by -(s - 1), ..., s - 1 places, each as often as two that are drawn apart differ by it."""
    g = randn(1, 1, 40, seed=3)
    expected = torch.zeros_like(g)
    for first, second in itertools.product(range(stride), repeat=2):
        expected += g.roll(first - second, -1) / stride**2
    inside = (..., slice(2 * stride, -2 * stride))
    assert torch.allclose(over_grids(g, (stride,))[inside], expected[inside], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kernel, stride", [(3, 2), (4, 2), (5, 2), (7, 2)])
def test_an_even_cotangent_leaves_no_checkerboard(kernel, stride):
    conv = fill(nn.Conv1d(1, 1, kernel, stride)).double()
    x = randn(1, 1, 60)
    v = torch.ones_like(conv(x))
    inside = (..., slice(3 * stride + kernel, -3 * stride - kernel))
    soft, exact = (transform(nn.Sequential(conv), x, stride=s).pullback(x, v)[inside] for s in ("smooth", None))
    assert soft.std() <= 1e-12 < 1e-2 < exact.std() and torch.allclose(soft.mean(), conv.weight.sum() / stride, rtol=1e-12)


UNTOUCHED = {
    "patches": nn.Conv2d(3, 4, 4, 4), "gaps": nn.Conv2d(3, 4, 2, 3), "points": nn.Conv2d(3, 4, 1, 2),
    "steps of three": nn.Conv2d(3, 4, 5, 3), "steps of four and two": nn.Conv2d(1, 2, 7, (4, 2)),
    "one step": nn.Conv2d(3, 4, 3, padding=1), "many channels": nn.Conv2d(5, 4, 3, 2),
    "groups of five": nn.Conv2d(10, 4, 3, 2, groups=2),
    "transposed": nn.ConvTranspose2d(3, 4, 3, 2), "one axis of patches": nn.Conv2d(3, 4, (2, 3), (2, 1)),
}  # fmt: skip


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("name", UNTOUCHED)
def test_other_convolutions_keep_their_exact_adjoint(name, tracer):
    conv = fill(UNTOUCHED[name]).double()
    x = randn(2, conv.in_channels, 9, 8).requires_grad_()
    u = randn(*conv(x).shape, seed=1)
    explainer = transform(nn.Sequential(conv), x.detach(), tracer)
    assert relative(explainer.pullback(x.detach(), u), torch.autograd.grad(conv(x), x, u)[0]) <= 1e-12
    assert strides(explainer) == []


class Functional(nn.Module):
    def __init__(self, conv, **arguments):
        super().__init__()
        self.weight, self.bias, self.arguments = conv.weight, conv.bias, arguments

    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, **self.arguments)


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize(
    "name", ["module", "valid", "function", "function, tuples", "function, valid", "padded before", "subclass"]
)
def test_equal_convolutions_have_equal_maps(name, tracer):
    conv = fill(nn.Conv2d(3, 4, 3, 2)).double()
    padded = nn.Conv2d(3, 4, 3, 2).double()
    padded.load_state_dict(conv.state_dict())
    subclass = type("Own", (nn.Conv2d,), {"forward": lambda self, x: self._conv_forward(x, self.weight, self.bias)})(3, 4, 3, 2)
    subclass.double().load_state_dict(conv.state_dict())
    valid = nn.Conv2d(3, 4, 3, 2, padding="valid").double()
    valid.load_state_dict(conv.state_dict())
    model = {
        "module": padded, "valid": valid, "function": Functional(conv, stride=2), "subclass": subclass,
        "function, tuples": Functional(conv, stride=(2, 2), padding=(0, 0)),
        "function, valid": Functional(conv, stride=2, padding="valid"),
        "padded before": nn.Sequential(Calls(lambda x: F.pad(x, (0, 0, 0, 0))), conv),
    }[name]  # fmt: skip
    x = randn(2, 3, 9, 8)
    u = randn(*conv(x).shape, seed=1)
    expected = torch.from_numpy(smoothed(adjoint_by_loops(conv, u.numpy(), tuple(x.shape)), (3, 3), (2, 2)))
    explainer = transform(nn.Sequential(model), x, tracer)
    assert relative(explainer.pullback(x, u), expected) <= 1e-12 and strides(explainer) == [("rewritten", "smooth")]


def network():
    stem = nn.Conv2d(3, 6, 5, 2, padding=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, 2, padding=1, groups=6), nn.ReLU6()
    return fill(nn.Sequential(*stem, nn.Conv2d(6, 5, 3, 2), nn.Flatten(), nn.Linear(5, 4))), randn(3, 3, 14, 13, seed=4).float()


def test_the_rule_is_set_by_place_and_kept_by_the_others():
    model, _ = network()
    places = [site.place for site in sp_fx.transform(model).report().sites if site.kind == "stride"]
    assert places == ["0", "3"]  # not the dense one
    for override, left in [({"0": None}, ["3"]), ({"*": {"stride": None}}, []), ({"*": "frozen"}, places), ({"*": 0.5}, places)]:
        report = sp_fx.transform(model, rules=Rules(overrides=override)).report()
        assert [site.place for site in report.of("rewritten") if site.kind == "stride"] == left
        kept = [(site.place, site.reason) for site in report.of("kept") if site.kind == "stride"]
        assert kept == [(place, "exact adjoint, by the rules") for place in places if place not in left]
    explained = sp_fx.transform(model).report().explain("0")
    assert "mean over the grids" in explained


@pytest.mark.parametrize("rules", [Rules.paper(), Rules.frozen()], ids=["paper", "frozen"])
def test_the_papers_rules_and_frozen_ones_have_exact_adjoints(rules):
    assert rules.stride is None
    model, _ = network()
    assert not strides(sp_fx.transform(model, rules=rules))


def test_a_program_has_the_map_of_the_explainer(interpreted):
    model, x = network()
    explainer = sp_fx.transform(model)
    logits, map = explainer.compile("pullback", example_inputs=x)(x, 2)
    assert relative(logits, model(x)) <= 1e-5 and relative(map, explainer.pullback(x, 2)) <= 1e-5
    exact = sp_fx.transform(model, rules=Rules(stride=None)).pullback(x, 2)
    assert relative(exact, explainer.pullback(x, 2)) > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_kept(dtype):
    conv, x = built("depthwise")
    u = randn(*conv(x).shape, seed=2)
    expected = sp_fx.transform(conv).pullback(x, u)
    got = sp_fx.transform(conv.to(dtype)).pullback(x.to(dtype), u.to(dtype))
    assert got.dtype == dtype and relative(got.double(), expected) <= 3e-2
