"""Attention's pullback through the values, softmax((q k^T scale + mask) / tau)^T v, in float64 (method: arXiv:2507.22832)."""

import math

import pytest
import torch

from kernel_case import DTYPES, kernels, runs_kernels, unit
from sp_fx.gates.table import TABLE

pytestmark = runs_kernels


LOWEST = torch.finfo(torch.float32).min


def draw(shape, dtype, device, seed=0):
    """B, HQ, HK, N, M, D, DV -> v, q, k."""
    b, hq, hk, n, m, d, dv = shape
    g = torch.Generator().manual_seed(seed)
    v, q, k = torch.randn(b, hq, n, dv, generator=g), torch.randn(b, hq, n, d, generator=g), torch.randn(b, hk, m, d, generator=g)
    return v.to(device, dtype), 1.5 * q.to(device, dtype), k.to(device, dtype)


def probabilities(q, k, mask=None, *, tau=1.0, is_causal=False, scale=None):
    q, k = q.double().cpu(), k.double().cpu()
    k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
    scores = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if is_causal:
        mask = torch.arange(q.shape[-2])[:, None] >= torch.arange(k.shape[-2])
    if mask is not None:
        mask = mask.cpu()
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    return torch.softmax(scores / tau, -1).nan_to_num(0.0)


def check(got, v, q, k, mask=None, slack=2e-5, **options):
    """One rounding to the output's dtype; for each term p v, one rounding of p to the dtype of v, and 2e-5 for the scores, whose
    error in float32 (some 2e-6 at scores of 10) the exponential takes over; tf32x3 products are as good."""
    p = probabilities(q, k, mask, **options)

    def received(t):
        t = p.mT @ t.double().cpu()
        return t.unflatten(-3, (k.shape[-3], -1)).sum(-3)

    want, size = received(v), received(v.abs())
    assert got.shape == want.shape and got.isfinite().all()
    assert ((got.double().cpu() - want).abs() <= unit(got.dtype) * want.abs() + (unit(v.dtype) + slack) * size + 1e-30).all()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("tau", [1.0, 0.5, 3])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 2, 2, 37, 37, 16, 16),
        (1, 4, 2, 70, 33, 20, 24),  # ragged blocks, padded heads, grouped queries
        (1, 3, 1, 33, 70, 64, 8),  # more keys than queries, one key head
        (1, 1, 1, 64, 64, 128, 128),
        (2, 1, 1, 1, 5, 3, 1),
    ],
)
def test_formula(shape, tau, is_causal, device):
    v, q, k = draw(shape, torch.float32, device)
    check(kernels.attention_adjoint(v, q, k, tau=tau, is_causal=is_causal), v, q, k, tau=tau, is_causal=is_causal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_causal", [False, True])
def test_dtypes(dtype, is_causal, device):
    v, q, k = draw((1, 4, 2, 50, 40, 32, 32), dtype, device)
    got = kernels.attention_adjoint(v, q, k, tau=0.7, is_causal=is_causal, scale=0.3)
    assert got.dtype == dtype and got.is_contiguous()
    check(got, v, q, k, tau=0.7, is_causal=is_causal, scale=0.3)


@pytest.mark.parametrize("mask_shape", [(1, 1, 1, 45), (2, 1, 37, 45), (1, 4, 37, 45), (37, 45), (45,), (2, 4, 37, 1)])
@pytest.mark.parametrize("kind", ["bool", "float32", "float16"])
def test_masks_broadcast(kind, mask_shape, device):
    v, q, k = draw((2, 4, 2, 37, 45, 16, 20), torch.float32, device)
    mask = torch.randn(mask_shape, generator=torch.Generator().manual_seed(1)).to(device)
    mask = mask > -0.5 if kind == "bool" else mask.to(getattr(torch, kind)).masked_fill(mask < -1, -math.inf)
    for tau in (1.0, 0.5):
        check(kernels.attention_adjoint(v, q, k, mask, tau=tau), v, q, k, mask, tau=tau)


@pytest.mark.parametrize("kind", ["bool", "added"])
def test_rows_that_see_nothing_send_nothing(kind, device):
    v, q, k = draw((1, 2, 2, 40, 35, 16, 16), torch.float32, device)
    mask = torch.rand(40, 35, generator=torch.Generator().manual_seed(1)).to(device) > 0.5
    mask[3] = mask[33] = False
    if kind == "added":
        mask = torch.zeros(40, 35, device=device).masked_fill(~mask, -math.inf)
    v[:, :, [3, 33]] *= 1e6  # any share of it would show
    got = kernels.attention_adjoint(v, q, k, mask, tau=0.5)
    check(got, v, q, k, mask, tau=0.5)
    nobody = torch.zeros(40, 35, dtype=torch.bool, device=device)
    assert kernels.attention_adjoint(v, q, k, nobody, tau=0.5).count_nonzero() == 0


@pytest.mark.parametrize("tau", [1.0, 0.1])
def test_masks_of_the_lowest_number(tau, device):
    """Rows of finfo.min throughout are uniform, as in a softmax of equal scores, and do not overflow at tau < 1."""
    v, q, k = draw((1, 1, 1, 34, 40, 16, 16), torch.float32, device)
    mask = torch.zeros(34, 40, device=device)
    mask[:, 20:] = LOWEST
    mask[[5, 33]] = LOWEST
    p = probabilities(q, k, torch.where(mask < 0, -math.inf, 0.0).to(device), tau=tau)
    p[..., [5, 33], :] = 1 / 40
    got = kernels.attention_adjoint(v, q, k, mask, tau=tau)
    assert torch.allclose(got.double().cpu(), p.mT @ v.double().cpu(), rtol=2e-5, atol=2e-5)


def test_large_scores(device):
    """Near arg-max, without overflow. The two passes round their products on their own: some 5e-7 of the largest score."""
    v, q, k = draw((1, 1, 1, 33, 40, 16, 16), torch.float32, device)
    got = kernels.attention_adjoint(v, q, k, tau=1.0, scale=100.0)
    largest = (q.cpu().double() @ k.cpu().double().mT).abs().max().item() * 100
    check(got, v, q, k, scale=100.0, slack=5e-7 * largest)
    assert largest > 1000
    assert kernels.attention_adjoint(v, q, k, tau=1e-30).isfinite().all()
    q[0, 0, 3, 3] = math.nan
    assert kernels.attention_adjoint(v, q, k).isnan().all()


@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_a_log_sum_exp_at_hand(tau, device):
    v, q, k = draw((2, 4, 2, 37, 45, 16, 20), torch.float32, device)
    keys = k.double().cpu().repeat_interleave(2, 1)
    mask = torch.rand(37, 45, generator=torch.Generator().manual_seed(1)) > 0.5
    mask[7] = mask[8] = False
    scores = (q.double().cpu() @ keys.mT / 4).masked_fill(~mask, -math.inf) / tau
    lse = scores.logsumexp(-1).float()
    lse[:, :, 8] = math.inf  # flash kernels mark rows that see nothing by either infinity
    got = kernels.attention_adjoint(v, q, k, mask.to(device), tau=tau, lse=lse.to(device))
    check(got, v, q, k, mask, tau=tau)


def test_strides(device):
    v, q, k = draw((2, 4, 2, 37, 45, 16, 20), torch.float32, device)
    heads_inside = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (v, q, k)]
    check(kernels.attention_adjoint(*heads_inside, tau=0.7), v, q, k, tau=0.7)
    turned = [t.mT.contiguous().mT for t in (v, q, k)]
    check(kernels.attention_adjoint(*turned, tau=0.7), v, q, k, tau=0.7)
    packed = torch.cat([q, q], -1)[..., 16:]
    expanded = v[:, :, :1, :1].expand_as(v)
    check(kernels.attention_adjoint(expanded, packed, k[:1].expand_as(k), tau=0.7), expanded, q, k[:1].expand_as(k), tau=0.7)


def test_other_numbers_of_axes(device):
    v, q, k = draw((6, 2, 2, 21, 25, 16, 16), torch.float32, device)
    batched = kernels.attention_adjoint(v, q, k, tau=0.7)
    assert torch.equal(kernels.attention_adjoint(v[1, 0], q[1, 0], k[1, 0], tau=0.7), batched[1, 0])
    assert torch.equal(kernels.attention_adjoint(v[1], q[1], k[1], tau=0.7), batched[1])
    folded = [t.view(2, 3, *t.shape[1:]) for t in (v, q, k)]
    mask = torch.rand(2, 1, 1, 21, 25, generator=torch.Generator().manual_seed(1)).to(device) > 0.3
    assert torch.equal(kernels.attention_adjoint(*folded, tau=0.7), batched.view(2, 3, 2, 25, 16))
    check(kernels.attention_adjoint(*folded, mask, tau=0.7), *folded, mask, tau=0.7)


@pytest.mark.parametrize("shape", [(0, 2, 2, 5, 5, 16, 16), (2, 2, 2, 0, 5, 16, 16), (2, 2, 2, 5, 0, 16, 16)])
def test_empty(shape, device):
    v, q, k = draw(shape, torch.float32, device)
    got = kernels.attention_adjoint(v, q, k)
    assert got.shape == (*k.shape[:3], 16) and got.count_nonzero() == 0


@pytest.mark.parametrize("is_causal", [False, True])
def test_agrees_with_the_table(is_causal, device):
    v, q, k = draw((2, 4, 2, 37, 45, 16, 20), torch.float32, device)
    wide = [t.double().cpu() for t in (v, q, k)]
    value = torch.zeros(2, 2, 45, 20, dtype=torch.float64)
    want = TABLE["attention"].adjoint(*wide, value, None, tau=0.7, is_causal=is_causal, enable_gqa=True)
    got = kernels.attention_adjoint(v, q, k, tau=0.7, is_causal=is_causal)
    assert torch.allclose(got.double().cpu(), want, rtol=2e-5, atol=2e-5)
    assert torch.equal(kernels.attention_adjoint(v, q, k, tau="frozen"), kernels.attention_adjoint(v, q, k, tau=1.0))


def test_errors(device):
    v, q, k = draw((1, 4, 2, 5, 6, 16, 16), torch.float32, device)
    with pytest.raises(TypeError, match="float64"):
        kernels.attention_adjoint(v.double(), q.double(), k.double())
    with pytest.raises(TypeError, match="one dtype"):
        kernels.attention_adjoint(v.half(), q, k)
    with pytest.raises(TypeError, match="int64"):
        kernels.attention_adjoint(v, q, k, torch.ones(5, 6, device=device).long())
    with pytest.raises(ValueError, match="not both"):
        kernels.attention_adjoint(v, q, k, torch.ones(5, 6, device=device), is_causal=True)
    with pytest.raises(ValueError, match="multiple"):
        kernels.attention_adjoint(v[:, :3], q[:, :3], k)
    with pytest.raises(ValueError, match="HK, M, D"):
        kernels.attention_adjoint(v, q, k[..., :8])
    with pytest.raises(ValueError, match="number of axes"):
        kernels.attention_adjoint(v, q, k[0])
    with pytest.raises(ValueError, match="128"):
        kernels.attention_adjoint(v, q.repeat(1, 1, 1, 9), k.repeat(1, 1, 1, 9))
    with pytest.raises(ValueError, match="lse"):
        kernels.attention_adjoint(v, q, k, lse=torch.zeros(1, 4, 6, device=device))
    for tau in (0, -1.0, math.nan, "froozen"):
        with pytest.raises(ValueError, match="tau"):
            kernels.attention_adjoint(v, q, k, tau=tau)
