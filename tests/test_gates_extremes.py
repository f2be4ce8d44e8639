"""Gains at the ends of the floats: each pointwise gate at any input and any temperature, against its formula in float64."""

import itertools
import math

import pytest
import torch

from sp_fx.gates.dual_path import dual_path
from sp_fx.gates.table import TABLE

TINY = torch.finfo(torch.float32).tiny
SIZES = [
    0.0,
    1e-45,
    1e-40,
    TINY,
    1e-30,
    1e-20,
    1e-8,
    1e-3,
    0.1,
    0.5,
    1,
    1.5,
    3,
    5,
    8,
    12,
    30,
    1e2,
    1e4,
    1e6,
    1e10,
    1e20,
    1e30,
    3.4e38,
]
TEMPERATURES = [1e-30, 1e-20, 1e-9, 1e-3, 0.1, 0.6, 1.0, 2.0, 30.0, 1e3, 1e6, 1e12, 1e20, 1e30]
OF_TAU = [1e-30, 1e-20, 1e-10, 1e-3, 1.0, 3.0, 5.5]  # in units of the temperature


def points(tau):
    positive = torch.tensor([*SIZES, math.inf, *(size * tau for size in OF_TAU)])
    return torch.cat([positive, -positive])


def phi(t):
    return torch.special.ndtr(t)


def elu(z, tau, s=1.0):
    """In float64, whose exponents reach to 1e308: `E[e^{s y}; y < 0]`, y normal round z, by completing the square."""
    a = z / tau + s * tau
    tail = torch.exp(-((z / tau) ** 2) / 2) * torch.special.erfcx(a.clamp(0, 1e200) / math.sqrt(2)) / 2
    bulk = torch.exp((s * z + min((s * tau) ** 2 / 2, 1e300)).clamp(max=0)) * phi(-a)
    return phi(z / tau) + s * torch.where(a < 0, bulk, tail)


GAINS = {
    "relu": ({}, lambda z, tau: phi(z / tau)),
    "gelu": ({"approximate": "none"}, lambda z, tau: phi(z / tau)),
    "leaky_relu": ({"negative_slope": 0.25}, lambda z, tau: 0.25 + 0.75 * phi(z / tau)),
    "abs": ({}, lambda z, tau: 2 * phi(z / tau) - 1),
    "threshold": ({"threshold": 0.5, "value": 0.0}, lambda z, tau: phi((z - 0.5) / tau)),
    "hardtanh": ({"low": -1.0, "high": 1.0}, lambda z, tau: phi((z + 1) / tau) - phi((z - 1) / tau)),
    "hardtanh, no bounds": ({"low": -math.inf, "high": math.inf}, lambda z, tau: torch.ones_like(z)),
    "hardshrink": ({"width": 0.5}, lambda z, tau: phi((z - 0.5) / tau) + phi((-z - 0.5) / tau)),
    "softshrink": ({"width": 0.5}, lambda z, tau: phi((z - 0.5) / tau) + phi((-z - 0.5) / tau)),
    "elu": ({"alpha": 1.0, "output_scale": 1.0, "input_scale": 1.0}, elu),
    "elu, steep": ({"alpha": 0.5, "output_scale": 1.0, "input_scale": 2.0},
                   lambda z, tau: 0.5 * phi(z / tau) + 0.5 * elu(z, tau, 2.0)),
    "silu": ({}, lambda z, tau: torch.sigmoid(z / tau)),
    "quick_gelu": ({"rate": 1.702}, lambda z, tau: torch.sigmoid(1.702 * (z / tau))),
    "hardswish": ({}, lambda z, tau: ((z / tau + 3) / 6).clamp(0, 1)),
    "mish": ({}, lambda z, tau: torch.tanh(torch.nn.functional.softplus(z / tau))),
}  # fmt: skip


def at_once(kind, z, tau, args):
    with torch.no_grad():
        return TABLE[kind].adjoint(torch.ones_like(z), z, tau=tau, **args)


def by_vjp(kind, z, tau, args):
    return torch.func.vjp(lambda z: dual_path(kind, z, tau=tau, **args), z)[1](torch.ones_like(z))[0]


WAYS = {"at once": at_once, "vjp": by_vjp}  # eager calls may write in place


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", GAINS)
def test_every_input_at_every_temperature(kind, way):
    """Within 1e-6 of the formula, which for all kinds but leaky_relu, abs and ELU is between 0 and 1."""
    args, gain = GAINS[kind]
    for tau in TEMPERATURES:
        z = points(tau)
        got = WAYS[way](kind.split(",")[0], z, tau, args)
        error = (got.double() - gain(z.double(), tau)).abs()
        assert (error <= 1e-6).all(), (tau, z[~(error <= 1e-6)].tolist(), got[~(error <= 1e-6)].tolist())
        assert (got.abs() <= 1 + 1e-6).all()
        if kind in ("relu", "gelu"):
            assert ((got >= 0) & (got <= 1)).all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", GAINS)
def test_frozen_gates_are_finite(kind, way):
    got = WAYS[way](kind.split(",")[0], points(1.0), "frozen", GAINS[kind][0])
    assert (got.abs() <= 1 + 1e-6).all()


@pytest.mark.parametrize("way", WAYS)
def test_one_temperature_a_sample(way):
    """Each sample's own, over the whole range at once."""
    taus = torch.tensor(TEMPERATURES)
    z = torch.stack([points(tau) for tau in TEMPERATURES])
    got = at_once("relu", z, taus[:, None], {})
    assert (got.double() - phi(z.double() / taus.double()[:, None])).abs().max() <= 1e-6


def test_a_nan_stays_one():
    for kind, way in itertools.product(GAINS, WAYS.values()):
        if kind != "hardtanh, no bounds":
            assert way(kind.split(",")[0], torch.tensor([torch.nan, 1.0]), 0.6, GAINS[kind][0]).isnan().tolist() == [True, False]


@pytest.mark.parametrize("kind", ["relu", "leaky_relu", "abs"])
@pytest.mark.parametrize("size", [1e-25, 1e-15, 1.0, 1e15, 1e19, 1e25])
def test_the_scale_of_a_sample_leaves_its_gate(kind, size):
    z = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))

    def gain(z):
        z = z.clone().requires_grad_()
        return torch.autograd.grad(dual_path(kind, z, tau=1.0, scale="sample", **GAINS[kind][0]).sum(), z)[0]

    assert torch.allclose(gain(size * z), gain(z), rtol=0, atol=1e-5)
