"""Max pooling's soft pullback against a direct float64 computation, tap by tap (method: arXiv:2507.22832)."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from kernel_case import DTYPES, kernels, runs_kernels, unit
from sp_fx.gates.table import TABLE

pytestmark = runs_kernels


FROZEN = "frozen"
#        kernel  stride  padding dilation ceil   size
WINDOWS = {
    "resnet": ((3, 3), (2, 2), (1, 1), (1, 1), False, (13, 11)),
    "tiling": ((2, 2), (2, 2), (0, 0), (1, 1), False, (7, 9)),  # a last row and column in no window
    "ceil": ((3, 3), (2, 2), (0, 0), (1, 1), True, (8, 10)),
    "ceil_padded": ((3, 2), (2, 3), (1, 0), (1, 1), True, (9, 11)),
    "dense": ((5, 5), (1, 1), (2, 2), (1, 1), False, (9, 7)),  # spatial pyramid pooling
    "wide": ((13, 5), (1, 1), (6, 2), (1, 1), False, (6, 7)),  # more taps than are unrolled
    "gaps": ((2, 2), (3, 4), (0, 0), (1, 1), False, (11, 13)),  # pixels between the windows
    "dilated": ((3, 2), (2, 1), (1, 1), (2, 3), False, (12, 9)),
    "dilated_coprime": ((2, 3), (3, 2), (1, 1), (2, 3), True, (13, 14)),
    "one_axis": ((1, 3), (1, 2), (0, 1), (1, 1), False, (1, 20)),  # max_pool1d
    "global": ((6, 5), (6, 5), (0, 0), (1, 1), False, (6, 5)),
}


def pool(x, kernel, stride, padding, dilation, ceil):
    return F.max_pool2d(x, kernel, stride, padding, dilation, ceil)


def direct(v, x, tau, kernel, stride, padding, dilation, ceil):
    """Weights of all taps stacked, each share added to its pixels by a strided slice; pixels off the picture have weight 0."""
    v, x = v.double().cpu(), x.double().cpu().clamp(-1e300, 1e300)
    (oh, ow), (h, w) = v.shape[-2:], x.shape[-2:]
    reach = [(o - 1) * s + d * (k - 1) + 1 for o, s, d, k in zip((oh, ow), stride, dilation, kernel, strict=True)]
    margins = (padding[1], max(0, reach[1] - padding[1] - w), padding[0], max(0, reach[0] - padding[0] - h))
    padded, real = F.pad(x, margins), F.pad(torch.ones_like(x), margins) > 0
    slices = [
        (..., slice(i * dilation[0], i * dilation[0] + (oh - 1) * stride[0] + 1, stride[0]),
         slice(j * dilation[1], j * dilation[1] + (ow - 1) * stride[1] + 1, stride[1]))
        for i, j in itertools.product(range(kernel[0]), range(kernel[1]))
    ]  # fmt: skip
    taps, alive = torch.stack([padded[p] for p in slices]), torch.stack([real[p] for p in slices])
    taps = taps.masked_fill(~alive, -math.inf)
    if isinstance(tau, str):
        weights = (taps == taps.amax(0)).double()
    else:
        weights = torch.exp((taps - taps.amax(0)) / tau)
    weights = weights / weights.sum(0)
    spread = torch.zeros_like(padded)
    for tap, weight in zip(slices, weights, strict=True):
        spread[tap] += weight * v
    return spread[..., padding[0] : padding[0] + h, padding[1] : padding[1] + w]


def draw(size, window, dtype, device, ties=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-2, 3, size, generator=g).float() if ties else torch.randn(size, generator=g)
    x = x.to(device, dtype)
    y = pool(x, *window)
    return torch.randn(y.shape, generator=g).to(device, dtype), x, y


def compare(got, want, v):
    """One rounding to the output's dtype, and 2e-6 of the largest cotangent: exp2 and sums of up to 65 taps in float32."""
    assert got.isfinite().all()
    assert ((got.double().cpu() - want).abs() <= unit(got.dtype) * want.abs() + 2e-6 * v.double().cpu().abs().max()).all()


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("tau", [0.3, FROZEN])
@pytest.mark.parametrize("name", WINDOWS)
def test_formula(name, tau, ties, device):
    *window, size = WINDOWS[name]
    v, x, y = draw((2, 3, *size), window, torch.float32, device, ties)
    want = direct(v, x, tau, *window)
    for layout in (torch.contiguous_format, torch.channels_last):
        got = kernels.max_pool_adjoint(v, x.contiguous(memory_format=layout), y, tau=tau, **arguments(window))
        assert got.is_contiguous(memory_format=layout)
        compare(got, want, v)
    if name not in ("tiling", "gaps"):
        assert torch.allclose(got.double().sum(), v.double().sum(), atol=1e-4)  # all that comes in goes on


def arguments(window):
    return dict(zip(("kernel", "stride", "padding", "dilation"), window[:4], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tau", [0.05, 2.0, FROZEN])
@pytest.mark.parametrize("name", ["resnet", "dilated"])
def test_dtypes(name, tau, dtype, device):
    *window, size = WINDOWS[name]
    v, x, y = draw((1, 2, *size), window, dtype, device)
    got = kernels.max_pool_adjoint(v, x, y, tau=tau, **arguments(window))
    assert got.dtype == dtype
    compare(got, direct(v, x, tau, *window), v)


@pytest.mark.parametrize("tau", [0.3, FROZEN])
def test_infinite_pixels(tau, device):
    *window, size = WINDOWS["resnet"]
    v, x, _ = draw((3, 1, *size), window, torch.float32, device)
    x[0, 0, 3:8, 2:9] = -math.inf  # windows that see nothing else tie, like any equal values
    x[1, 0, 4, 4] = x[1, 0, 5, 5] = math.inf
    x[2] = -math.inf
    compare(kernels.max_pool_adjoint(v, x, pool(x, *window), tau=tau, **arguments(window)), direct(v, x, tau, *window), v)


def test_padding_gets_nothing_even_where_all_is_negative_infinity(device):
    x = torch.full((1, 1, 4, 4), -math.inf, device=device)
    v = torch.ones(1, 1, 2, 2, device=device)
    got = kernels.max_pool_adjoint(v, x, pool(x, 3, 2, 1, 1, False), tau=0.3, kernel=(3, 3), stride=(2, 2), padding=(1, 1))
    assert got.sum().item() == pytest.approx(4, abs=1e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_temperature_for_each_sample(layout, device):
    *window, size = WINDOWS["resnet"]
    v, x, y = draw((3, 5, *size), window, torch.float32, device)
    tau = torch.tensor([0.1, 0.7, 20.0], device=device).view(3, 1, 1, 1)
    got = kernels.max_pool_adjoint(v, x.contiguous(memory_format=layout), y, tau=tau, **arguments(window))
    compare(got, direct(v, x, tau.double().cpu(), *window), v)


def test_strides_and_mixed_dtypes(device):
    *window, size = WINDOWS["resnet"]
    v, x, y = draw((2, 4, *size), window, torch.float32, device)
    v = v[:, :, :1, :1].expand_as(y).bfloat16()
    got = kernels.max_pool_adjoint(v, x.transpose(2, 3).contiguous().transpose(2, 3), y, tau=0.3, **arguments(window))
    compare(got, direct(v, x, 0.3, *window), v)
    batchless = kernels.max_pool_adjoint(v[0], x[0], y[0], tau=0.3, **arguments(window))
    assert torch.equal(batchless, got[0])


def test_offsets_of_64_bits(device):
    from sp_fx_kernels.max_pool import _gather_kernel, _share_kernel

    *window, size = WINDOWS["resnet"]
    v, x, y = draw((2, 3, *size), window, torch.float32, device)
    share, out = torch.empty_like(v), torch.empty_like(x)
    numbers = dict(
        TAU=0.3, HARD=False, H=size[0], W=size[1], OH=y.shape[2], OW=y.shape[3], INNER=1, SAMPLE=10**6, KH=3, KW=3, SH=2, SW=2,
        PH=1, PW=1, DH=1, DW=1, WIDE=True, UNROLL=1, BLOCK=1024,
    )  # fmt: skip
    _share_kernel[(1,)](v, x, y, x, share, v.numel(), **numbers)
    _gather_kernel[(1,)](share, x, y, x, out, x.numel(), **numbers)
    assert torch.equal(out, kernels.max_pool_adjoint(v, x, y, tau=0.3, **arguments(window)))


def test_the_same_in_every_run(device):
    *window, size = WINDOWS["dense"]
    v, x, y = draw((2, 3, *size), window, torch.float32, device)
    first, second = (kernels.max_pool_adjoint(v, x, y, tau=0.3, **arguments(window)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("shape", [(0, 3, 6, 6), (2, 0, 6, 6)])
def test_empty(shape, device):
    x, y = torch.empty(shape, device=device), torch.empty(*shape[:2], 3, 3, device=device)
    assert kernels.max_pool_adjoint(y, x, y, tau=0.3, kernel=(2, 2), stride=(2, 2)).shape == shape


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("tau", [0.3, FROZEN])
def test_agrees_with_the_table(name, tau, device):
    *window, size = WINDOWS[name]
    v, x, y = draw((1, 2, *size), window, torch.float32, device)
    want = TABLE["max_pool"].adjoint(*(t.double().cpu() for t in (v, x, y)), tau, *window)
    compare(kernels.max_pool_adjoint(v, x, y, tau=tau, **arguments(window)), want, v)


def test_errors(device):
    x, y = torch.ones(1, 2, 6, 6, device=device), torch.ones(1, 2, 3, 3, device=device)
    good = dict(tau=0.3, kernel=(2, 2), stride=(2, 2))
    with pytest.raises(TypeError, match="float64"):
        kernels.max_pool_adjoint(y, x.double(), y, **good)
    with pytest.raises(ValueError, match="OH"):
        kernels.max_pool_adjoint(y[..., :2], x, y, **good)
    with pytest.raises(ValueError, match="OH"):
        kernels.max_pool_adjoint(y[:, :1], x, y[:, :1], **good)
    with pytest.raises(ValueError, match="tau"):
        kernels.max_pool_adjoint(y, x, y, tau=0.0, kernel=(2, 2), stride=(2, 2))
    with pytest.raises(ValueError, match="1 samples"):
        kernels.max_pool_adjoint(y, x, y, tau=torch.ones(2), kernel=(2, 2), stride=(2, 2))
    with pytest.raises(ValueError, match="stride"):
        kernels.max_pool_adjoint(y, x, y, tau=0.3, kernel=(2, 2), stride=(0, 2))
