"""The ascent step against its formula in float64: P(x + step v / ||v||), ball first, then box (method: arXiv:2507.22832)."""

import math

import pytest
import torch

from kernel_case import DTYPES, kernels, runs_kernels, unit

pytestmark = runs_kernels


def draw(shape, dtype, device, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g).to(device, dtype) for _ in range(3)]


def norm(t):
    return t.flatten(1).square().sum(1).sqrt().view(-1, *[1] * (t.dim() - 1))


def check(got, x, v, start=None, *, step, radius=None, low=None, high=None):
    """Equal to the formula but for one rounding to the output's dtype, that of x, step and start in float32 (which may cancel in
    the sum), and 2e-6 of the step and of the offset for their norms, sums of up to 3e5 squares."""
    x, v = x.double().cpu(), v.double().cpu()
    move = step * v / norm(v).where(norm(v) > 0, 1.0)
    want, slack = x + move, 2.0**-23 * (x.abs() + move.abs()) + 2e-6 * move.abs()
    if radius is not None:
        start = start.double().cpu()
        offset = want - start
        want = start + offset * (radius / norm(offset).where(norm(offset) > 0, 1.0)).clamp(max=1)
        slack += 2.0**-23 * start.abs() + 2e-6 * offset.abs()
    want = want if low is None else want.clamp(min=low)
    want = want if high is None else want.clamp(max=high)
    assert got.isfinite().all()
    assert ((got.double().cpu() - want).abs() <= unit(got.dtype) * want.abs() + slack).all()


SHAPES = [(3, 1), (2, 3, 5, 7), (4, 1000), (1, 5000), (2, 3, 37, 41)]  # from part of a block to three pieces of a sample


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "projection", [{}, {"low": -1.0, "high": 1.0}, {"low": -0.5}, {"radius": 2.0}, {"radius": 3.0, "high": 0.5}]
)
def test_formula(projection, shape, dtype, device):
    x, v, start = draw(shape, dtype, device)
    got = kernels.ascent_step(x, v, start, step=5.0, **projection)
    assert got.dtype == dtype and got.shape == shape
    check(got, x, v, start, step=5.0, **projection)


def test_a_piece_of_several_blocks(device):
    x, v, start = draw((1, 2048 * 130 + 77), torch.float32, device)
    v[0, ::1000] *= 1e4  # the peak rises on the way
    for projection in ({}, {"radius": 300.0}):
        check(kernels.ascent_step(x, v, start, step=40.0, **projection), x, v, start, step=40.0, **projection)


@pytest.mark.parametrize("size", [1e-38, 1e-25, 1.0, 1e25, 3e37])
@pytest.mark.parametrize("radius", [None, 4.0])
def test_pullbacks_of_any_size(size, radius, device):
    x, v, start = draw((3, 3000), torch.float32, device)
    v = v * size
    v[1] *= torch.linspace(0, 1, 3000, device=device) ** 8  # a wide range within one sample
    got = kernels.ascent_step(x, v, start, step=5.0, radius=radius)
    assert (got - x).abs().amax(1).min() > 0.05
    check(got, x, v, start, step=5.0, radius=radius)


@pytest.mark.parametrize("projection", [{}, {"radius": 1e4}])
def test_a_zero_pullback_makes_a_zero_step(projection, device):
    x, v, start = draw((3, 700), torch.float32, device)
    v[1] = 0
    got = kernels.ascent_step(x, v, start, step=5.0, **projection)
    assert torch.equal(got[1], x[1])
    check(got, x, v, start, step=5.0, **projection)
    outside = kernels.ascent_step(x, torch.zeros_like(x), start, step=5.0, radius=1.0)
    check(outside, x, torch.zeros_like(x), start, step=5.0, radius=1.0)
    assert torch.equal(kernels.ascent_step(x, torch.zeros_like(x), x, step=5.0, radius=1.0), x)


def test_from_the_centre_of_the_ball_and_back(device):
    """The offset's closed form where its terms cancel: a step straight back through the centre."""
    start, v, _ = draw((2, 900), torch.float32, device)
    away = kernels.ascent_step(start, v, start, step=7.0, radius=5.0)
    assert torch.allclose(norm(away - start), torch.tensor(5.0, device=device), rtol=1e-5)
    for step in (5.0, 9.0, 30.0):
        check(kernels.ascent_step(away, -v, start, step=step, radius=5.0), away, -v, start, step=step, radius=5.0)


def test_nan_stays_in_its_sample(device):
    x, v, start = draw((2, 50), torch.float32, device)
    v[0, 3] = math.nan
    for projection in ({}, {"radius": 1.0}, {"low": -1.0, "high": 1.0}):
        got = kernels.ascent_step(x, v, start, step=5.0, **projection)
        assert got[0].isnan().all() and got[1].isfinite().all()


@pytest.mark.parametrize("of_v", ["contiguous", "channels_last", "expanded", "sliced"])
@pytest.mark.parametrize("of_x", ["contiguous", "channels_last", "batch_inside", "sliced"])
def test_strides(of_x, of_v, device):
    def laid_out(t, name):
        if name == "channels_last":
            return t.contiguous(memory_format=torch.channels_last)
        if name == "batch_inside":
            return t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
        if name == "expanded":
            return t[:, :, :1, :1].expand_as(t)
        return t if name == "contiguous" else torch.cat([t, t], 3)[..., : t.shape[3]]

    x, v, start = draw((2, 3, 9, 11), torch.float32, device)
    x, v = laid_out(x, of_x), laid_out(v, of_v)
    got = kernels.ascent_step(x, v, start, step=5.0, radius=3.0, low=-1.0)
    if of_x == "channels_last":
        assert got.stride() == x.stride()
    check(got, x, v, start, step=5.0, radius=3.0, low=-1.0)


def test_mixed_dtypes_and_a_result_of_its_own(device):
    x, v, start = draw((2, 300), torch.float32, device)
    before = x.clone()
    got = kernels.ascent_step(x, v.half(), start.bfloat16(), step=5.0, radius=3.0)
    check(got, x, v.half(), start.bfloat16(), step=5.0, radius=3.0)
    assert torch.equal(x, before) and got.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0,)])
def test_empty(shape, device):
    x = torch.empty(shape, device=device)
    assert kernels.ascent_step(x, x, step=5.0).shape == shape


def test_errors(device):
    x = torch.ones(2, 8, device=device)
    with pytest.raises(TypeError, match="float64"):
        kernels.ascent_step(x, x.double(), step=5.0)
    with pytest.raises(ValueError, match="one shape"):
        kernels.ascent_step(x, x[:1], step=5.0)
    with pytest.raises(ValueError, match="one shape"):
        kernels.ascent_step(x[0, 0], x[0, 0], step=5.0)
    with pytest.raises(ValueError, match="radius"):
        kernels.ascent_step(x, x, step=5.0, radius=1.0)
    with pytest.raises(ValueError, match="radius"):
        kernels.ascent_step(x, x, x, step=5.0, radius=0.0)
    with pytest.raises(ValueError, match="low"):
        kernels.ascent_step(x, x, step=5.0, low=1.0, high=1.0)
    with pytest.raises(ValueError, match="step"):
        kernels.ascent_step(x, x, step=math.inf)
