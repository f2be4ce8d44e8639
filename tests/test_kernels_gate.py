"""Pointwise pullbacks against their formulas in float64 (arXiv:2507.22832, and E[gain(z + tau eps)] for the other kinds)."""

import math

import pytest
import torch
import torch.nn.functional as F

from kernel_case import DTYPES, kernels, runs_kernels, triton, unit
from sp_fx.gates.table import TABLE

pytestmark = runs_kernels

tl = triton.language
FROZEN = "frozen"


def step(z, tau):
    return (z.sign() + 1) / 2 if isinstance(tau, str) else torch.special.ndtr(z / tau)


def cooled(z, tau):
    return z if tau == FROZEN else z / tau


def elu(z, tau, alpha=1.0, output_scale=1.0, input_scale=1.0):
    s = input_scale
    if tau == FROZEN:
        negative = torch.exp(s * z.clamp(max=0)) * step(-z, tau)
    else:
        z = z.clamp(-1e5, 1e5)
        negative = torch.exp(s * z + (s * tau) ** 2 / 2 + torch.special.log_ndtr(-z / tau - s * tau))
    return output_scale * (step(z, tau) + alpha * s * negative)


def hardtanh(z, tau, low=-1.0, high=1.0):
    return (1 if low is None else step(z - low, tau)) - (0 if high is None else step(z - high, tau))


CASES = {
    "relu": ("relu", {}, step),
    "leaky_relu": ("leaky_relu", {"negative_slope": 0.2}, lambda z, tau: 0.2 + 0.8 * step(z, tau)),
    "hardtanh": ("hardtanh", {}, hardtanh),
    "relu6": ("hardtanh", {"low": 0.0, "high": 6.0}, lambda z, tau: hardtanh(z, tau, 0.0, 6.0)),
    "clamp_min": ("hardtanh", {"low": -0.5, "high": None}, lambda z, tau: hardtanh(z, tau, -0.5, None)),
    "clamp_max": ("hardtanh", {"low": None, "high": 0.5}, lambda z, tau: hardtanh(z, tau, None, 0.5)),
    "elu": ("elu", {}, elu),
    "selu": ("elu", {"alpha": 1.6733, "output_scale": 1.0507}, lambda z, tau: elu(z, tau, 1.6733, 1.0507)),
    "celu": ("elu", {"alpha": 0.4, "input_scale": 2.5}, lambda z, tau: elu(z, tau, 0.4, 1.0, 2.5)),
    "gelu": ("gelu", {}, lambda z, tau: torch.special.ndtr(cooled(z, tau))),
    "gelu_tanh": (
        "gelu",
        {"approximate": "tanh"},
        lambda z, tau: (
            (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2 if tau == FROZEN else torch.special.ndtr(z / tau)
        ),
    ),
    "silu": ("silu", {}, lambda z, tau: torch.sigmoid(cooled(z, tau))),
    "hardswish": ("hardswish", {}, lambda z, tau: F.hardsigmoid(cooled(z, tau))),
    "mish": ("mish", {}, lambda z, tau: torch.tanh(F.softplus(cooled(z, tau)))),
}


def draw(shape, dtype, device, seed=0):
    g = torch.Generator().manual_seed(seed)
    z, v = 3 * torch.randn(shape, generator=g), torch.randn(shape, generator=g)
    return v.to(device, dtype), z.to(device, dtype)


def compare(got, v, gain):
    """One rounding to the output's dtype, and 5e-7 in the gain: erf, exp and the scaled erfc in float32 stay within 4e-7."""
    expected = v.double().cpu() * gain
    tolerance = unit(got.dtype) * expected.abs() + 5e-7 * v.double().cpu().abs() + torch.finfo(got.dtype).tiny
    assert got.isfinite().all()
    assert ((got.double().cpu() - expected).abs() <= tolerance).all()


@pytest.mark.parametrize("tau", [0.6, 1.7, FROZEN])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_formula(case, tau, dtype, device):
    kind, numbers, gain = CASES[case]
    v, z = draw((3, 5, 7, 11), dtype, device)  # 1155 elements: a whole block and a ragged one
    z.view(-1)[:9] = torch.tensor([0.0, -0.0, 1.0, -1.0, 6.0, 0.5, -0.5, 1e-30, -1e-30])  # the kinks
    got = kernels.gate_adjoint(kind, v, z, tau=tau, **numbers)
    assert got.dtype == dtype and got.shape == z.shape
    compare(got, v, gain(z.double().cpu(), tau))


@pytest.mark.parametrize("tau", [0.05, 0.6, 4.0, FROZEN])
@pytest.mark.parametrize("case", CASES)
def test_far_out_and_infinite(case, tau, device):
    kind, numbers, gain = CASES[case]
    ends = torch.tensor([12.0, 40.0, 200.0, 1e4, 3e5, 1e30, 3e38, math.inf], device=device)
    z = torch.cat([ends, -ends])
    expected = gain(z.double().cpu(), tau).nan_to_num(0.0)
    compare(kernels.gate_adjoint(kind, torch.ones_like(z), z, tau=tau, **numbers), torch.ones_like(z), expected)


def test_kinks_open_by_half_when_frozen(device):
    z = torch.tensor([0.0, -0.0, 6.0], device=device)
    one = torch.ones_like(z)
    assert kernels.gate_adjoint("relu", one, z, tau=FROZEN).tolist() == [0.5, 0.5, 1]
    assert kernels.gate_adjoint("hardtanh", one, z, tau=FROZEN, low=0.0, high=6.0).tolist() == [0.5, 0.5, 0.5]
    assert kernels.gate_adjoint("relu", one, z, tau=0.6).tolist() == [0.5, 0.5, 1]


def test_nan_stays(device):
    z = torch.tensor([math.nan, 3.0, 3.0], device=device)
    v = torch.tensor([1.0, 1.0, math.nan], device=device)
    for kind in ("relu", "leaky_relu", "hardtanh", "elu", "gelu", "silu", "hardswish", "mish"):
        got = kernels.gate_adjoint(kind, v, z, tau=0.6)
        assert got.isnan().tolist() == [True, False, True]


def layouts(t):
    wide = torch.empty(t.shape[0], t.shape[1], t.shape[2], 2 * t.shape[3], dtype=t.dtype, device=t.device)
    wide[..., ::2] = t
    offset = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:].view(t.shape).copy_(t)
    return {
        "contiguous": t,
        "channels_last": t.contiguous(memory_format=torch.channels_last),
        "batch_inside": t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
        "sliced": wide[..., ::2],
        "misaligned": offset,
        "transposed": t.transpose(2, 3).contiguous().transpose(2, 3),
    }


@pytest.mark.parametrize("of_z", ["contiguous", "channels_last", "batch_inside", "sliced", "misaligned", "transposed"])
@pytest.mark.parametrize("of_v", ["contiguous", "channels_last", "sliced", "expanded"])
def test_strides(of_v, of_z, device):
    v, z = draw((2, 6, 5, 9), torch.float32, device)
    slope = torch.linspace(-0.3, 0.6, 6, device=device)
    v = v[:, :, :1, :1].expand(z.shape) if of_v == "expanded" else layouts(v)[of_v]
    got = kernels.gate_adjoint("prelu", v, layouts(z)[of_z], slope, tau=0.6)
    if of_z in ("contiguous", "channels_last", "transposed"):
        assert got.stride() == layouts(z)[of_z].stride()
    s = slope.double().cpu().view(-1, 1, 1)
    compare(got, v, s + (1 - s) * step(z.double().cpu(), 0.6))


def test_dense_tensors_are_read_as_they_lie():
    from sp_fx_kernels.common import in_one_layout

    z = torch.randn(2, 6, 5, 9).contiguous(memory_format=torch.channels_last)
    v = torch.randn(2, 6, 5, 9).contiguous(memory_format=torch.channels_last)
    assert all(a is b for a, b in zip(in_one_layout(z, v), (z, v), strict=True))
    assert in_one_layout(z, v.contiguous())[1].stride() == z.stride()


@pytest.mark.parametrize("shape,channels", [((4, 6), 6), ((4, 6), 1), ((5,), 1), ((3, 7, 5), 7), ((1, 6, 3, 2, 2), 6), ((), 1)])
@pytest.mark.parametrize("tau", [0.6, FROZEN])
def test_prelu_channels(shape, channels, tau, device):
    v, z = draw(shape, torch.float32, device)
    slope = torch.linspace(-0.4, 1.3, channels, device=device)
    got = kernels.gate_adjoint("prelu", v, z, slope, tau=tau)
    s = slope.double().cpu().view([-1] + [1] * (z.dim() - 2) if channels > 1 else [1] * z.dim())
    compare(got, v, s + (1 - s) * step(z.double().cpu(), tau))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", ["relu", "leaky_relu", "prelu", "hardtanh"])
def test_a_temperature_for_each_sample(kind, channels_last, device):
    v, z = draw((3, 8, 13, 11), torch.float32, device)  # 1144 elements a sample: two programs each
    if channels_last:
        z = z.contiguous(memory_format=torch.channels_last)
    tau = torch.tensor([0.1, 0.7, 30.0], device=device).view(3, 1, 1, 1)
    slope = torch.linspace(-0.4, 1.3, 8, device=device) if kind == "prelu" else None
    got = kernels.gate_adjoint(kind, v, z, slope, tau=tau)
    wide, t = z.double().cpu(), tau.double().cpu()
    if kind == "hardtanh":
        return compare(got, v, hardtanh(wide, t))
    s = {"relu": 0.0, "leaky_relu": 0.01}.get(kind) if slope is None else slope.double().cpu().view(-1, 1, 1)
    compare(got, v, s + (1 - s) * step(wide, t))


@pytest.mark.parametrize("of_v", DTYPES)
@pytest.mark.parametrize("of_z", DTYPES)
def test_mixed_dtypes(of_v, of_z, device):
    v, z = draw((3, 50), torch.float32, device)
    got = kernels.gate_adjoint("gelu", v.to(of_v), z.to(of_z), tau=1.0)
    assert got.dtype == of_z
    compare(got, v.to(of_v), torch.special.ndtr(z.to(of_z).double().cpu()))


def test_offsets_of_64_bits(device):
    from sp_fx_kernels.gate import _gate_kernel

    v, z = draw((4, 6, 5), torch.float32, device)
    slope, out = torch.linspace(-0.4, 1.3, 6, device=device), torch.empty_like(z)
    _gate_kernel[(1,)](
        v, z, slope, z, out, z.numel(), 1, 6, 5, KIND="prelu", TAU=0.6, HARD=False, A=None, B=None, C=None, WIDE=True, BLOCK=128
    )
    assert torch.equal(out, kernels.gate_adjoint("prelu", v, z, slope, tau=0.6))


@pytest.mark.parametrize("shape", [(0,), (0, 3, 4), (2, 0, 4)])
def test_empty(shape, device):
    z = torch.empty(shape, device=device)
    assert kernels.gate_adjoint("relu", z, z, tau=0.6).shape == shape


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tau", [0.6, FROZEN])
def test_agrees_with_the_table(case, tau, device):
    kind, numbers, _ = CASES[case]
    full = {"gelu": {"approximate": "none"}}.get(kind, kernels.gate.GATES[kind]) | numbers
    v, z = draw((3, 37), torch.float32, device)
    expected = TABLE[kind].adjoint(v.cpu().double(), z.cpu().double(), tau=tau, **full)
    compare(kernels.gate_adjoint(kind, v, z, tau=tau, **numbers), torch.ones_like(v), expected)


scaled_erfc = kernels.gate._scaled_erfc


@triton.jit
def scaled_erfc_kernel(t_ptr, out_ptr, N: tl.constexpr):
    lane = tl.arange(0, N)
    tl.store(out_ptr + lane, scaled_erfc(tl.load(t_ptr + lane)))


def test_scaled_erfc(device):
    t = torch.cat([torch.linspace(0, 10, 3072), torch.logspace(1, 15, 1024)]).to(device)
    out = torch.empty_like(t)
    scaled_erfc_kernel[(1,)](t, out, N=4096)
    expected = torch.special.erfcx(t.double().cpu())
    assert ((out.double().cpu() - expected).abs() <= 4e-7 * expected).all()  # 1.6e-7 of the polynomial, the rest rounding


def test_elu_keeps_relative_accuracy_at_large_z(device):
    """The negative part alone, which the opening hides: as alpha grows, the gain is alpha times it."""
    z = torch.linspace(-12, 6, 1000, device=device)
    for tau in (0.3, 0.6, 2.0):
        got = kernels.gate_adjoint("elu", torch.ones_like(z), z, tau=tau, alpha=1e12) / 1e12
        expected = elu(z.double().cpu(), tau, 1e12) / 1e12
        # Exponents reach 90 before a weight drops to 1e-38, at half an ulp of 2^-24 * 90 each; below 1e-13 the opening counts.
        assert ((got.double().cpu() - expected).abs() <= 1e-5 * expected + 1e-19).all()


def test_errors(device):
    z = torch.ones(2, 3, device=device)
    with pytest.raises(TypeError, match="float64"):
        kernels.gate_adjoint("relu", z.double(), z.double(), tau=0.6)
    with pytest.raises(TypeError, match="int64"):
        kernels.gate_adjoint("relu", z, z.long(), tau=0.6)
    with pytest.raises(TypeError, match="negative_slope"):
        kernels.gate_adjoint("leaky_relu", z, z, tau=0.6, slop=0.1)
    with pytest.raises(ValueError, match="relu, leaky_relu"):
        kernels.gate_adjoint("rellu", z, z, tau=0.6)
    with pytest.raises(ValueError, match="one shape"):
        kernels.gate_adjoint("relu", z[:1], z, tau=0.6)
    for tau in (0, -1.0, math.inf, math.nan, "froozen"):
        with pytest.raises(ValueError, match="tau is a finite number above 0"):
            kernels.gate_adjoint("relu", z, z, tau=tau)
    with pytest.raises(ValueError, match="one for each sample"):
        kernels.gate_adjoint("relu", z, z, tau=torch.ones(3))
    with pytest.raises(ValueError, match="'gelu'"):
        kernels.gate_adjoint("gelu", z, z, tau=torch.ones(2))
    with pytest.raises(ValueError, match="slope"):
        kernels.gate_adjoint("prelu", z, z, tau=0.6)
    with pytest.raises(ValueError, match="slope"):
        kernels.gate_adjoint("prelu", z, z, torch.ones(2, device=device), tau=0.6)
