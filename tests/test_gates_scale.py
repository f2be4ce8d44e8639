"""The deviation of a sample, which temperatures follow, against NumPy's in float64: by each of its formulas."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import sp_fx
from sp_fx.gates.dual_path import dual_path
from sp_fx.gates.scale import by_batch_norm, deviation, distance_by_channel, moments_of_norm
from sp_fx.program.inductor import suited

FORMULAS = {
    "at once": torch.no_grad,  # eager on a CPU has a formula of its own
    "under autograd": torch.enable_grad,
}
SHAPES = [(3, 8, 12, 10), (3, 8, 1, 1), (3, 8, 16), (3, 8), (2, 4097)]
AWKWARD = {
    "plain": lambda z: z,
    "far from zero": lambda z: z + 300,
    "1e5 deviations from zero": lambda z: z + 1e5,
    "three deviations from zero": lambda z: z + 3,
    "small": lambda z: 1e-12 * z,
    "positions of other means": lambda z: z + 30 * (torch.arange(z[0].numel()) % 8).view(z[0].shape),
    "half of it far from the rest": lambda z: torch.where(
        torch.arange(z[0].numel()).view(z[0].shape) < z[0].numel() // 2, z + 1e3, z
    ),
    "constant but for one": lambda z: 7.3 + 1e-3 * first(z),
    **{f"an outlier of {size:g} first": lambda z, size=size: z + size * first(z) for size in (1e2, 1e3, 3e3, 1e4, 1e5, 1e6)},
}


def first(z):
    """1 at the first number of each sample, else 0."""
    return (torch.arange(z[0].numel()).view(z[0].shape) == 0).to(z.dtype).expand_as(z)


def exact(z):
    return np.std(z.detach().double().numpy().reshape(len(z), -1), axis=1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", AWKWARD)
@pytest.mark.parametrize("formula", FORMULAS)
def test_awkward_samples(formula, kind, shape):
    """Of the float32 numbers as they are: the rounding that made them is not the formula's. 1e-5 is the promise."""
    z = AWKWARD[kind](torch.randn(shape, generator=torch.Generator().manual_seed(3)))
    layouts = [z, z.contiguous(memory_format=torch.channels_last), z.transpose(1, 3)] if z.dim() == 4 else [z]
    for laid_out in [*layouts, torch.cat([z, z])[::2], z[:1].expand(z.shape)]:
        with FORMULAS[formula]():
            got = deviation(laid_out.requires_grad_(formula == "under autograd"))
        assert got.shape == (len(laid_out), *[1] * (z.dim() - 1)) and got.dtype == torch.float32
        assert got.detach().flatten().numpy() == pytest.approx(exact(laid_out), rel=1e-5, abs=0)


@pytest.mark.parametrize("formula", FORMULAS)
def test_long_samples(formula):
    """Sums of many terms, beside which an outlier of 3000 leaves none of their squares in float32."""
    for kind in ("plain", "1e5 deviations from zero", "an outlier of 3000 first", "an outlier of 1e+06 first"):
        z = AWKWARD[kind](torch.randn(2, 300_000, generator=torch.Generator().manual_seed(3)))
        with FORMULAS[formula]():
            assert deviation(z).flatten().numpy() == pytest.approx(exact(z), rel=1e-5, abs=0)


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_measured_in_float32_at_least(formula, dtype):
    z = (10 + torch.randn(2, 500, generator=torch.Generator().manual_seed(0))).to(dtype)
    with FORMULAS[formula]():
        got = deviation(z)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got.flatten().numpy() == pytest.approx(exact(z), rel=1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("formula", FORMULAS)
def test_samples_that_have_none(formula):
    """Constant samples, of any constant; those of one number and of no number."""
    with FORMULAS[formula]():
        for shape in [(2, 1), (2,), (2, 3, 0), (2, 0), (0, 3), (), (2, 5000), (2, 3, 5, 7)]:
            for constant in (0.0, 7.3, -1e5, 1e-20):
                assert (deviation(torch.full(shape, constant)) == 1e-30).all()
        broken = torch.randn(4, 4, 5, generator=torch.Generator().manual_seed(0))
        broken[0, 1, 2], broken[1, 0, 0], broken[2, 3, 4] = torch.inf, torch.nan, -torch.inf
        assert deviation(broken).flatten()[:3].tolist() == [1, 1, 1]
        assert deviation(broken).flatten()[3].item() == pytest.approx(exact(broken[3:])[0], rel=1e-5)


@pytest.mark.parametrize("size", [1e-30, 1e-25, 1e-19, 1e-12, 1e12, 1e19, 1e25, 1e30])
def test_samples_whose_squares_no_float_holds(size):
    """Eager on a CPU; the other formula takes the deviation of 1e19 for infinite, that is 1, and of 1e-23 for none."""
    z = size * torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    z[1] /= size
    with torch.no_grad():
        assert deviation(z).flatten().numpy() == pytest.approx(exact(z).clip(1e-30), rel=1e-5, abs=0)


def test_one_samples_deviation_does_not_depend_on_its_batch():
    g = torch.Generator().manual_seed(0)
    z = torch.stack([torch.randn(5000, generator=g), 1e4 + torch.randn(5000, generator=g), 1e25 * torch.randn(5000, generator=g)])
    with torch.no_grad():
        alone = torch.cat([deviation(z[i : i + 1]) for i in range(3)])
        assert deviation(z).flatten().tolist() == pytest.approx(alone.flatten().tolist(), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 300_000), (2, 64, 56, 56), (2, 197, 768)], ids=str)
def test_as_programs_compile_it(shape):
    """Inductor adds up from left to right: beside an outlier of 1e4, 3e-5 off in float32. In a program the sums are float64's."""
    inputs = {kind: change(torch.randn(shape, generator=torch.Generator().manual_seed(3))) for kind, change in AWKWARD.items()}
    compiled = torch.compile(suited(make_fx(deviation, tracing_mode="fake")(inputs["plain"])))
    for kind, z in inputs.items():
        with torch.no_grad():
            assert compiled(z).flatten().numpy() == pytest.approx(exact(z), rel=1e-5, abs=0), kind


# -- margins, and the scale of a channel, in gates


def phi(z):
    return torch.special.ndtr(z)


FLOOR, CEILING, SLOPES = (
    torch.tensor(v, dtype=torch.float64)[:, None, None] for v in ([-0.3, 0.0, 0.4], [0.5, 2, 1], [0.1, -0.4, 2])
)
GATES = {  # tensors beside z, arguments, the kinks with the height of their steps, what there is below, 1 or -1 where it opens
    "relu": ((), {}, [(0, 1)], 0, 1),
    "floor": ((), {"low": -0.4}, [(-0.4, 1)], 0, 1),
    "ceiling": ((), {"high": 0.7}, [(0.7, 1)], 0, -1),
    "threshold": ((), {"threshold": 0.2, "value": -7.0}, [(0.2, 1)], 0, 1),
    "maximum": ((FLOOR,), {}, [(FLOOR, 1)], 0, 1),
    "minimum": ((CEILING,), {}, [(CEILING, 1)], 0, -1),
    "negative_relu": ((), {}, [(0, 1)], 0, -1),
    "leaky_relu": ((), {"negative_slope": 0.2}, [(0, 0.8)], 0.2, 1),
    "prelu": ((SLOPES.flatten(),), {}, [(0, 1 - SLOPES)], SLOPES, 1),
    "hardtanh": ((), {"low": -0.5, "high": 1.5}, [(-0.5, 1), (1.5, -1)], 0, 1),
    "hardsigmoid": ((), {}, [(-3, 1 / 6), (3, -1 / 6)], 0, 1),
    "between": ((FLOOR, CEILING), {}, [(FLOOR, 1), (CEILING, -1)], 0, 1),
}


def unit_of(distance, scale):
    """By NumPy, sample by sample: the deviation of the distance; of the channels, the root of (S + C) / 2."""
    units = []
    for sample in distance.double().numpy():
        whole = np.mean(sample**2)
        places = tuple(range(1, sample.ndim))
        channels = np.mean(sample**2, axis=places, keepdims=True) if places else whole
        units.append({"absolute": 1.0, "sample": np.std(sample), "channel": np.sqrt((whole + channels) / 2)}[scale])
    return torch.from_numpy(np.stack(np.broadcast_arrays(*units)).reshape(len(units), *np.shape(units[0]))) if units else 1.0


def expected_gain(kind, z, tau, scale, margin):
    _, _, kinks, below, opens = GATES[kind]
    unit = unit_of(opens * (z.double() - kinks[0][0]), scale)
    width = (tau * unit).reshape(len(z), *(np.shape(unit)[1:] or [1] * (z.dim() - 1))).clamp_min(1e-30)
    return below + sum(step * phi(opens * (z.double() - kink) / width - margin) for kink, step in kinks)


def gain(kind, z, tau, scale, margin):
    tensors, args, *_ = GATES[kind]
    leaf = z.clone().requires_grad_()
    made = dual_path(kind, leaf, *(t.to(z.dtype) for t in tensors), tau=tau, scale=scale, margin=margin, **args)
    return torch.autograd.grad(made, leaf, torch.ones_like(made))[0]


MOMENTS = torch.tensor([[0.2, -0.4, 1.0], [0.5, 0.0, 2.0]], dtype=torch.float64)  # of three channels


@pytest.mark.parametrize("margin", [0.0, 0.4])
@pytest.mark.parametrize("kind", GATES)
def test_the_unit_that_a_batch_norm_says(kind, margin):
    """The mean square distance of a channel is (mean - kink)^2 + variance; the unit is the root of the mean of that and of its
    mean over channels. It does not look at the pre-activation."""
    z = pre_activation(2, 3, 5, 4)
    (mean, variance), (tensors, args, kinks, below, opens) = MOMENTS[:, :, None, None], GATES[kind]
    square = (mean - kinks[0][0]) ** 2 + variance
    width = 0.8 * ((square + square.mean()) / 2).sqrt()
    expected = below + sum(step * phi(opens * (z - kink) / width - margin) for kink, step in kinks)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)):
        moved = [t.to(dtype) for t in (z, *tensors, MOMENTS)]
        leaf = moved[0].clone().requires_grad_()
        made = dual_path(kind, leaf, *moved[1:], tau=0.8, scale="batch_norm", margin=margin, **args)
        got = torch.autograd.grad(made, leaf, torch.ones_like(made))[0]
        assert got.dtype == dtype
        at = expected if dtype != torch.bfloat16 else below + sum(
            step * phi(opens * (z.to(dtype).double() - kink) / width - margin) for kink, step in kinks
        )  # fmt: skip
        assert torch.allclose(got.double(), at, rtol=0, atol=tolerance)


def test_bounds_of_samples_do_not_mix_them():
    z = pre_activation(3, 3, 4, 4)
    floor, ceiling = z.roll(1, 3) - 1, z.roll(1, 3) + torch.arange(1, 4)[:, None, None, None]
    whole, alone = z.clone().requires_grad_(), z.clone().requires_grad_()

    def made(x, low, high):
        return dual_path("between", x, low, high, MOMENTS, tau=0.8, scale="batch_norm")

    made(whole, floor, ceiling).sum().backward()
    for i in range(3):
        made(alone[i : i + 1], floor[i : i + 1], ceiling[i : i + 1]).sum().backward()
    assert torch.allclose(whole.grad, alone.grad, rtol=1e-12)


def test_the_moments_of_a_batch_norm_are_those_of_its_output():
    """Over data whose statistics are its running ones."""
    norm = nn.BatchNorm2d(3, eps=0.2, momentum=1.0).double()
    nn.init.uniform_(norm.weight, -2, 2, generator=torch.Generator().manual_seed(0))
    nn.init.uniform_(norm.bias, -1, 1, generator=torch.Generator().manual_seed(1))
    x = 5 + 3 * torch.randn(64, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    norm(x)
    y = norm.eval()(x).transpose(0, 1).flatten(1).detach()
    mean, variance = moments_of_norm(norm.running_var, norm.weight, norm.bias, norm.eps)
    assert torch.allclose(mean, y.mean(1)) and torch.allclose(variance, y.var(1), rtol=1e-4)
    plain = moments_of_norm(norm.running_var, None, None, norm.eps)
    assert torch.equal(plain, torch.stack([torch.zeros(3), norm.running_var / (norm.running_var + 0.2)]))
    assert by_batch_norm(torch.tensor([0.0, torch.inf]), torch.zeros(2)).tolist() == [1.0, 1.0]
    assert (by_batch_norm(torch.zeros(1, 2), torch.zeros(1, 2)) > 0).all()


def pre_activation(*shape):
    """Channels of different spreads, samples of different sizes."""
    z = torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return (
        (z + 0.3)
        * torch.arange(1, 1 + shape[0]).view(-1, *[1] * (len(shape) - 1))
        * torch.linspace(0.2, 3, shape[1]).view(1, -1, *[1] * (len(shape) - 2))
    )


@pytest.mark.parametrize("margin", [0.0, 0.4, -0.7])
@pytest.mark.parametrize("scale", ["absolute", "sample", "channel"])
@pytest.mark.parametrize("kind", GATES)
def test_a_gate_is_averaged_over_noise_at_its_margin_and_scale(kind, scale, margin):
    z = pre_activation(2, 3, 5, 4)
    expected = expected_gain(kind, z, 0.8, scale, margin)
    assert torch.allclose(gain(kind, z, 0.8, scale, margin), expected, rtol=1e-10, atol=1e-12)
    single = gain(kind, z.float(), 0.8, scale, margin)
    assert single.dtype == torch.float32 and torch.allclose(single.double(), expected, rtol=0, atol=2e-6)
    half = gain(kind, z.bfloat16(), 0.8, scale, margin)
    expected = expected_gain(kind, z.bfloat16(), 0.8, scale, margin)
    assert half.dtype == torch.bfloat16 and torch.allclose(half.double(), expected, rtol=2**-7, atol=6e-3)


@pytest.mark.parametrize("scale", ["sample", "channel"])
@pytest.mark.parametrize("shape", [(3, 6), (3, 6, 1, 1), (1, 6, 1), (2, 1, 7), (2, 3, 4, 3, 2)], ids=str)
def test_margins_in_other_shapes(shape, scale):
    z = pre_activation(*shape)
    for kind in ("relu", "ceiling", "leaky_relu", "hardtanh", "hardsigmoid"):
        assert torch.allclose(gain(kind, z, 1.7, scale, 0.4), expected_gain(kind, z, 1.7, scale, 0.4), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["relu", "floor", "ceiling", "leaky_relu", "hardtanh", "hardsigmoid"])
def test_of_numbers_without_axes_a_channel_scale_is_none(kind):
    """A sample of one number, of a constant, and what is not finite: the gate is hard, or has the scale 1, and none raises."""
    for shape in [(4,), (0, 3, 2), (2, 0), (2, 3, 0)]:
        assert gain(kind, torch.linspace(-2, 2, math.prod(shape)).view(shape), 0.8, "channel", 0.4).isfinite().all()
    opens, kink = GATES[kind][4], float(GATES[kind][2][0][0])
    at_kink = gain(kind, torch.full((2, 3, 4), kink, dtype=torch.float64), 0.8, "channel", 0.4)
    step, below = float(GATES[kind][2][0][1]), float(GATES[kind][3])
    u = (at_kink - below) / step
    assert torch.equal(u, u[0, 0, 0].expand(2, 3, 4))
    # A margin of 1e-30 is lost beside a kink that is not at 0: the gate is then half open, as without one.
    assert any(torch.allclose(u, phi(torch.tensor(m, dtype=u.dtype)), rtol=1e-6) for m in ([-0.4] if kink == 0 else [-0.4, 0.0]))
    beside = gain(kind, torch.full((2, 3, 4), kink + opens * 0.1, dtype=torch.float64), 0.8, "channel", 0.4)
    assert torch.allclose(beside, expected_gain(kind, torch.full((2, 3, 4), kink + opens * 0.1), 0.8, "channel", 0.4), rtol=1e-5)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_channel_that_is_not_finite_spoils_no_other_sample(bad):
    z = pre_activation(3, 4, 5)
    z[1, 2, 3] = bad
    assert distance_by_channel(z)[1].flatten().tolist() == [1, 1, 1, 1]
    got, rest = gain("hardtanh", z, 1.7, "channel", 0.4), [0, 2]
    assert torch.allclose(got[rest], gain("hardtanh", z[rest], 1.7, "channel", 0.4), rtol=1e-12)
    assert got[1].isfinite().sum() >= 19


def test_equal_channels_have_the_scale_of_the_sample_about_the_kink():
    z = pre_activation(2, 1, 50).expand(2, 4, 50)
    assert torch.allclose(distance_by_channel(z), z.square().mean((1, 2), keepdim=True).sqrt().expand(2, 4, 1), rtol=1e-12)
    assert distance_by_channel(z.bfloat16()).dtype == torch.float32


class Pixelwise(nn.Module):
    """Two layers for every pixel with a ReLU6 between them, as images, and as what else models lay out."""

    def __init__(self, how):
        super().__init__()
        self.how, g = how, torch.Generator().manual_seed(2)
        self.first = nn.Parameter(torch.randn(8, 3, generator=g, dtype=torch.float64) * torch.arange(1, 9)[:, None])
        self.second = nn.Parameter(torch.randn(5, 8, generator=g, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(8, generator=g, dtype=torch.float64))

    def forward(self, x):
        if self.how == "images":
            y = F.relu6(F.conv2d(x, self.first[:, :, None, None], self.bias))
            return F.conv2d(y, self.second[:, :, None, None]).mean((2, 3))
        tokens = {"channels last": (0, 2, 3, 1), "folded": (0, 2, 3, 1), "batch third": (2, 3, 0, 1)}[self.how]
        y = x.permute(tokens)
        y = F.relu6(F.linear(y.reshape(-1, 3) if self.how == "folded" else y, self.first, self.bias))
        y = F.linear(y, self.second)
        return (
            y.view(x.shape[0], -1, 5).mean(1) if self.how == "folded" else y.mean((0, 1) if self.how == "batch third" else (1, 2))
        )


@pytest.mark.parametrize("tracer", ["fx", "export"])
@pytest.mark.parametrize("how", ["channels last", "folded", "batch third"])
def test_a_channel_is_one_wherever_its_axis_is(how, tracer):
    x = torch.randn(4, 3, 6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rules = sp_fx.Rules(hardtanh=sp_fx.Soft(1.7, 0.4, "channel"))
    images = sp_fx.transform(Pixelwise("images"), rules=rules)
    explainer = sp_fx.transform(Pixelwise(how), rules=rules, tracer=tracer, example_inputs=x)
    assert [site.scale for site in explainer.report().of("rewritten")] == ["channel"]
    expected = images.pullback(x, 2)
    assert (explainer.pullback(x, 2) - expected).norm() <= 1e-10 * expected.norm()
    alone = torch.cat([explainer.pullback(x[i : i + 1], 2) for i in range(4)])
    assert (alone - expected).norm() <= 1e-10 * expected.norm()
