"""The pullback of the pointwise gates, `v * gain(z)`, in one pass over memory.

Hard gates are averaged over Gaussian noise of deviation tau, smooth ones keep their own gain at temperature tau
(arXiv:2507.22832).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, empty_like, float32

from .common import OPTIONS, check, check_temperature, in_one_layout, on_device_of


@triton.jit
def _opening(z, per_tau, HARD: tl.constexpr):
    """`Phi(z / tau)`; hard, the step with one half at the kink."""
    if HARD:
        return tl.where(z > 0, 1.0, tl.where(z < 0, 0.0, 0.5))
    else:
        return 0.5 + 0.5 * tl.erf(z * (per_tau * 0.7071067811865476))


@triton.jit
def _sigmoid(z):
    return 1 / (1 + tl.exp(-z))


@triton.jit
def _scaled_erfc(t):
    """`exp(t^2) erfc(t)` for t >= 0, within 4e-7 of its value.

    `(1 + 2t) exp(t^2) erfc(t)` stays between 1 and 1.13, so in q = (t - 2.5) / (t + 2.5), which maps t >= 0 on [-1, 1], its
    Chebyshev interpolant of degree 9 is off by 1.6e-7 at most.
    """
    q = (t - 2.5) / (t + 2.5)
    p = q * 4.05488705e-4 + 3.03542855e-4
    p = p * q - 4.18024609e-3
    p = p * q + 1.08658001e-3
    p = p * q + 3.26775696e-2
    p = p * q - 1.03020474e-1
    p = p * q + 1.57644295e-1
    p = p * q - 9.90179997e-2
    p = p * q - 1.22357466e-1
    p = p * q + 1.26483806
    return p / (1 + 2 * t)


@triton.jit
def _elu_negative(z, TAU: tl.constexpr, S: tl.constexpr, HARD: tl.constexpr):
    """`E[exp(s (z + tau eps)); z + tau eps < 0] = exp(s z + (s tau)^2 / 2) Phi(-a)` with `a = z / tau + s tau`.

    The product overflows at large z. There it is `exp(-(z / tau)^2 / 2) exp(a^2 / 2) Phi(-a)`, the last two being half a scaled
    erfc, with every factor at most 1. At |z| = 1e4 all has saturated; the bound keeps inf - inf out.
    """
    z = tl.minimum(tl.maximum(z, -1e4), 1e4)
    if HARD:
        return tl.exp(S * tl.minimum(z, 0.0)) * _opening(-z, 1.0, True)
    else:
        a = z / TAU + S * TAU
        right = tl.exp(-0.5 * (z / TAU) * (z / TAU)) * 0.5 * _scaled_erfc(tl.maximum(a, 0.0) * 0.7071067811865476)
        # Its exponent is at most -(s tau)^2 / 2 where it is used.
        left = tl.exp(tl.where(a < 0, S * z + 0.5 * S * S * TAU * TAU, 0.0)) * _opening(-a, 1.0, False)
        return tl.where(a < 0, left, right)


@triton.jit
def _gate_kernel(
    v_ptr, z_ptr, slope_ptr, tau_ptr, out_ptr,  # [rows, n] in one memory order; [channels]; [rows]
    n, tiles, channels, inner,
    KIND: tl.constexpr, TAU: tl.constexpr, HARD: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row, first = (pid // tiles).to(tl.int64), (pid % tiles).to(tl.int64) * BLOCK
    base = row * n + first  # 64 bits in this scalar alone: the offsets in the block stay narrow
    lane = tl.arange(0, BLOCK)  # [BLOCK]
    inside = lane < n - first
    v = tl.load(v_ptr + base + lane, mask=inside, other=0).to(tl.float32)  # [BLOCK]
    z = tl.load(z_ptr + base + lane, mask=inside, other=0).to(tl.float32)  # [BLOCK]; float32 because tl.erf takes no less
    if TAU is None:
        per_tau = 1 / tl.load(tau_ptr + row)
    else:
        per_tau = 1 / TAU

    if KIND == "relu":
        gain = _opening(z, per_tau, HARD)
    elif KIND == "leaky_relu":  # A: negative slope
        gain = A + (1 - A) * _opening(z, per_tau, HARD)
    elif KIND == "prelu":
        element = base + lane
        if not WIDE:
            element = element.to(tl.int32)  # a division in 64 bits costs several times more
        slope = tl.load(slope_ptr + element // inner % channels).to(tl.float32)  # [BLOCK]
        gain = slope + (1 - slope) * _opening(z, per_tau, HARD)
    elif KIND == "hardtanh":  # A, B: low, high, or None
        gain = 1.0
        if A is not None:
            gain = _opening(z - A, per_tau, HARD)
        if B is not None:
            gain = gain - _opening(z - B, per_tau, HARD)
    elif KIND == "elu":  # A, B, C: alpha, output scale, input scale
        gain = B * (_opening(z, per_tau, HARD) + (A * C) * _elu_negative(z, TAU, C, HARD))
    elif KIND == "gelu":
        gain = _opening(z, per_tau, False)
    elif KIND == "gelu_tanh":  # (1 + tanh(w)) / 2 = sigmoid(2 w)
        gain = _sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    elif KIND == "silu":
        gain = _sigmoid(z * per_tau)
    elif KIND == "hardswish":
        gain = z * per_tau + 3
        gain = tl.where(gain < 0, 0.0, tl.where(gain > 6, 6.0, gain)) * (1 / 6)  # tl.minimum would lose NaN
    else:  # mish: tanh(log(1 + e)) = m / (m + 2) for e = exp(t) and m = e (e + 2), which is 1 to rounding at t = 20
        tl.static_assert(KIND == "mish")
        t = z * per_tau
        e = tl.exp(tl.where(t > 20, 20.0, t))
        gain = e * (e + 2) / (e * (e + 2) + 2)
    tl.store(out_ptr + base + lane, (v * gain).to(out_ptr.dtype.element_ty), mask=inside)


# For each kind the numbers that become A, B, C, with the defaults of torch.nn.
GATES: dict[str, dict[str, float | None]] = {
    "relu": {},
    "leaky_relu": {"negative_slope": 0.01},
    "prelu": {},
    "hardtanh": {"low": -1.0, "high": 1.0},
    "elu": {"alpha": 1.0, "output_scale": 1.0, "input_scale": 1.0},
    "gelu": {},
    "silu": {},
    "hardswish": {},
    "mish": {},
}
HOMOGENEOUS = ("relu", "leaky_relu", "prelu", "hardtanh")  # these take one temperature for each sample
SMOOTH = ("gelu", "silu", "hardswish", "mish")  # their frozen gate is tau = 1


def gate_adjoint(
    kind: str, v: Tensor, z: Tensor, slope: Tensor | None = None, *, tau: float | Tensor | str, approximate: str = "none",
    **numbers: float | None,
) -> Tensor:  # fmt: skip
    """`v * gain(z)`, the pullback of a pointwise gate, in the dtype and memory layout of `z`.

    `v` and `z`: one shape, float32, float16 or bfloat16 (also mixed), any strides; dense tensors in one layout are read as they
    lie, others are copied. `kind`: a key of `GATES`, with that row's numbers; "gelu" takes `approximate`, which matters when
    frozen. `slope`: for "prelu", [1] or [z.shape[1]]. `tau`: a number above 0, "frozen" (the gate of the forward pass), or for
    the kinds in `HOMOGENEOUS` a tensor of z.shape[0] numbers, one a sample. Numbers are compiled in: each new one compiles anew.

    Raises:
        TypeError: a dtype that is none of the three (float64 among them), or a number that the kind does not take.
        ValueError: an unknown kind, shapes or devices that do not fit, a temperature that is none.
        RuntimeError: CPU tensors outside of Triton's interpreter.
    """
    if kind not in GATES:
        raise ValueError(f"gate_adjoint knows no kind {kind!r}; the kinds are {', '.join(GATES)}")
    if unknown := sorted(numbers.keys() - GATES[kind].keys()):
        raise TypeError(f"a gate of kind {kind!r} takes {', '.join(GATES[kind]) or 'no numbers'}, got {', '.join(unknown)}")
    check("gate_adjoint", v, z)
    check_temperature("gate_adjoint", tau)
    if v.shape != z.shape:
        raise ValueError(f"v and z have one shape, got {tuple(v.shape)} and {tuple(z.shape)}")
    if (kind == "prelu") != (slope is not None):
        raise ValueError(f"a slope tensor belongs to 'prelu' and to no other kind, got kind {kind!r} and slope {slope!r}")
    channels = 1
    if slope is not None:
        check("gate_adjoint", z, slope)
        channels, slope = slope.numel(), slope.contiguous()
        if channels != 1 and (z.dim() < 2 or channels != z.shape[1]):
            raise ValueError(f"slope holds one number, or one for each channel of z {tuple(z.shape)}, got {tuple(slope.shape)}")
    per_sample = isinstance(tau, Tensor) and tau.numel() != 1
    if isinstance(tau, Tensor):
        if kind not in HOMOGENEOUS:
            raise ValueError(f"a temperature for each sample is for {', '.join(HOMOGENEOUS)}, got kind {kind!r}")
        if per_sample and tau.numel() != (z.shape[0] if z.dim() else 1):
            raise ValueError(f"tau holds one number, or one for each sample of z {tuple(z.shape)}, got {tuple(tau.shape)}")
        tau = tau.to(z.device, float32).contiguous()

    z, v = in_one_layout(z, v)
    out = empty_like(z)
    if z.numel() == 0:
        return out
    rows = z.shape[0] if per_sample else 1
    n, inner = z.numel() // rows, z.stride(1) if z.dim() > 1 else 1
    frozen = isinstance(tau, str)
    if kind == "gelu" and frozen and approximate == "tanh":
        kind = "gelu_tanh"
    fixed = None if isinstance(tau, Tensor) else 1.0 if frozen else float(tau)
    a, b, c = ([*{**GATES[kind.removesuffix("_tanh")], **numbers}.values()] + [None] * 3)[:3]
    block = 1024  # 8 elements a thread: one 16-byte access in half precision, two in float32
    tiles = triton.cdiv(n, block)
    with on_device_of(z):
        _gate_kernel[(rows * tiles,)](
            v, z, z if slope is None else slope, tau if isinstance(tau, Tensor) else z, out, n, tiles, channels, inner,
            KIND=kind, TAU=fixed, HARD=frozen and kind not in SMOOTH, A=a, B=b, C=c,
            WIDE=z.numel() >= 2**31, BLOCK=block, num_warps=4, **OPTIONS,
        )  # fmt: skip
    return out
