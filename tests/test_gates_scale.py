"""The deviation of a sample, which temperatures follow, against NumPy's in float64: by each of its formulas."""

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from sp_fx.gates.scale import deviation
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
