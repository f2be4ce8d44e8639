"""LayerNorm's and RMSNorm's pullback with frozen statistics, v * gamma / deviation, in float64 (method: arXiv:2507.22832)."""

import pytest
import torch

from kernel_case import DTYPES, kernels, runs_kernels, unit
from sp_fx.gates.table import TABLE

pytestmark = runs_kernels


def draw(rows, shape, dtype, device, mean=0.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    v, x = torch.randn(rows + shape, generator=g), torch.randn(rows + shape, generator=g) * 2 + mean
    gamma = torch.randn(shape, generator=g)
    return v.to(device, dtype), x.to(device, dtype), gamma.to(device, dtype)


def expected(v, x, gamma, axes, eps, centred):
    v, x = v.double().cpu(), x.double().cpu()
    square = (x - x.mean(axes, keepdim=True) if centred else x).square().mean(axes, keepdim=True)
    return v * (1 if gamma is None else gamma.double().cpu()) / (square + eps).sqrt()


def compare(got, want):
    """One rounding to the output's dtype; 2e-6 for the mean square of up to 2e4 numbers summed in float32, and its root."""
    assert got.isfinite().all()
    tiny = torch.finfo(got.dtype).tiny
    assert ((got.double().cpu() - want).abs() <= (unit(got.dtype) + 2e-6) * want.abs() + tiny).all()


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rows,shape", [((5,), (1,)), ((2, 9), (33,)), ((7,), (96,)), ((3,), (1000,)), ((2, 2), (3, 5, 7)), ((), (20,))]
)
def test_formula(rows, shape, dtype, centred, device):
    v, x, gamma = draw(rows, shape, dtype, device)
    axes = tuple(range(-len(shape), 0))
    got = kernels.norm_adjoint(v, x, gamma, shape, eps=1e-5, centred=centred)
    assert got.dtype == dtype and got.is_contiguous()
    compare(got, expected(v, x, gamma, axes, 1e-5, centred))
    compare(kernels.norm_adjoint(v, x, None, shape, eps=1e-2, centred=centred), expected(v, x, None, axes, 1e-2, centred))


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("n", [8192, 8193, 20000])
def test_rows_longer_than_a_block(n, centred, device):
    v, x, gamma = draw((2,), (n,), torch.float32, device, mean=3.0)
    got = kernels.norm_adjoint(v, x, gamma, (n,), eps=1e-5, centred=centred)
    compare(got, expected(v, x, gamma, -1, 1e-5, centred))


@pytest.mark.parametrize("n", [50, 20000])
def test_a_mean_much_larger_than_the_spread(n, device):
    """E[x^2] - E[x]^2 in float32 would leave nothing of a variance of 4 beside a squared mean of 1e8."""
    v, x, gamma = draw((2,), (n,), torch.float32, device, mean=1e4)
    got = kernels.norm_adjoint(v, x, gamma, (n,), eps=1e-5, centred=True)
    want = expected(v, x, gamma, -1, 1e-5, True)
    assert ((got.double().cpu() - want).abs() <= 2e-5 * want.abs()).all()


def test_a_constant_row_is_divided_by_the_root_of_eps(device):
    v = torch.ones(3, 40, device=device)
    got = kernels.norm_adjoint(v, 5 * v, None, (40,), eps=1e-4, centred=True)
    compare(got, torch.full((3, 40), 100.0).double())


def test_statistics_at_hand(device):
    v, x, gamma = draw((2, 5), (70,), torch.float16, device)
    rstd = torch.rand(2, 5, 1, device=device) + 0.5
    got = kernels.norm_adjoint(v, x, gamma, (70,), eps=1e-5, centred=True, rstd=rstd)
    compare(got, v.double().cpu() * gamma.double().cpu() * rstd.double().cpu())


def test_strides(device):
    v, x, gamma = draw((2, 6, 5), (24,), torch.float32, device)
    want = expected(v[:, :1].expand_as(x), x, gamma, -1, 1e-5, True)
    permuted = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)  # channels in the middle of memory: LayerNorm2d
    wider = torch.randn(2, 6, 5, 40, device=device)
    wider[..., 3:27] = x
    for of_x in (x, permuted, wider[..., 3:27]):
        got = kernels.norm_adjoint(v[:, :1].expand_as(x), of_x, gamma, (24,), eps=1e-5, centred=True)
        compare(got, want)
    spaced = torch.stack([gamma, gamma], 1)[:, 0]
    compare(kernels.norm_adjoint(v, x, spaced, (24,), eps=1e-5, centred=True), expected(v, x, gamma, -1, 1e-5, True))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (4, 0)])
def test_empty(shape, device):
    x = torch.empty(shape, device=device)
    assert kernels.norm_adjoint(x, x, None, shape[-1:], eps=1e-5, centred=True).shape == shape


def test_agrees_with_the_table(device):
    v, x, gamma = draw((4,), (45,), torch.float32, device)
    parts = [t.double().cpu() for t in (v, x, gamma)]
    layer = TABLE["layer_norm"].adjoint(*parts, None, tau="frozen", normalized_shape=(45,), eps=1e-5)
    rms = TABLE["rms_norm"].adjoint(*parts, tau="frozen", normalized_shape=(45,), eps=1e-5)
    compare(kernels.norm_adjoint(v, x, gamma, (45,), eps=1e-5, centred=True), layer)
    compare(kernels.norm_adjoint(v, x, gamma, (45,), eps=1e-5, centred=False), rms)


def test_errors(device):
    x = torch.ones(2, 8, device=device)
    with pytest.raises(TypeError, match="float64"):
        kernels.norm_adjoint(x.double(), x.double(), None, (8,), eps=1e-5, centred=True)
    with pytest.raises(ValueError, match="ends in"):
        kernels.norm_adjoint(x, x, None, (4,), eps=1e-5, centred=True)
    with pytest.raises(ValueError, match="ends in"):
        kernels.norm_adjoint(x[:1], x, None, (8,), eps=1e-5, centred=True)
    with pytest.raises(ValueError, match="gamma"):
        kernels.norm_adjoint(x, x, x[0, :1], (8,), eps=1e-5, centred=True)
    with pytest.raises(ValueError, match="2 rows"):
        kernels.norm_adjoint(x, x, None, (8,), eps=1e-5, centred=True, rstd=x)
