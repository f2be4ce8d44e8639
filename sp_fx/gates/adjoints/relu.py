"""Gates with kinks: ReLU and its like, clamps and thresholds, shrinkage, absolute value, ELU.

The hard gate is a step at each kink, the soft one the step's average over Gaussian eps. With `u(z)` the step `z > 0` where frozen
(one half at 0), and `P(z + tau eps > 0) = Phi(z / tau)`, the normal distribution function, where soft, the way back is

    relu                    v u(z)                                          arXiv:2507.22832
    leaky_relu, prelu       v (s + (1 - s) u(z))                            of slope s below 0
    hardtanh, between       v (u(z - low) - u(z - high))                    ReLU6 and clamp, by numbers or tensors
    floor, maximum          v u(z - low)                                    max(z, low), the ReLU moved: by a number, a tensor
    ceiling, minimum        v u(high - z)                                   min(z, high)
    negative_relu           v u(-z)                                         of min(z, 0), the ReLU's other side
    threshold               v u(z - threshold)
    hardsigmoid             v (u(z + 3) - u(z - 3)) / 6                     its two kinks
    relu_squared            v 2 max(z, 0) u(z)                              the ReLU's gate, then the square's derivative
    hardshrink, softshrink  v (u(z - width) + u(-z - width))
    abs                     v (u(z) - u(-z))
    elu                     v o (u(z) + a s E[e^{s (z + tau eps)}; z + tau eps < 0])    of scale a, output scale o, input scale s

All but ReLU, which is the paper's: same principle.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .row import Row, Soft, Tau, at_once, first_tensor, gain_row


def opening(z: Tensor, tau: Tau) -> Tensor:
    """`u(z)`, the average of the step `z > 0`. Frozen, the step itself, one half at the kink: the limit as tau -> 0."""
    return torch.sign(z).add_(1).mul_(0.5) if isinstance(tau, str) else normal_cdf(z, tau)


def normal_cdf(z: Tensor, tau: float | Tensor = 1.0) -> Tensor:
    """`Phi(z / tau)`."""
    t = z * (math.sqrt(0.5) / tau)
    if at_once():
        return torch.add(HALF, t.erf_(), alpha=0.5, out=t)  # in one tensor: half the time for [4, 64, 112, 112] on CPU
    return torch.erf(t).mul_(0.5).add_(0.5)  # erf, not erfc: Inductor vectorises it, ONNX has it


def scaled_erfc(t: Tensor) -> Tensor:
    """`exp(t^2) erfc(t)` for t >= 0, within 4e-7 of its value in float32.

    `(1 + 2t) exp(t^2) erfc(t)` stays between 1 and 1.13, so in q = (t - 2.5) / (t + 2.5), which maps t >= 0 on [-1, 1], its
    Chebyshev interpolant of degree 9 is off by 1.6e-7 at most. torch.special.erfcx takes three times as long on CPU, Inductor
    does not vectorise it, and its ONNX form is NaN from t = 9.4 on.
    """
    if t.dtype == torch.float64:
        return torch.special.erfcx(t)
    q = (t - 2.5) / (t + 2.5)
    p = torch.full_like(q, ERFC[0])
    for coefficient in ERFC[1:]:
        p = p * q + coefficient
    return p / (1 + 2 * t)


HALF = torch.full((), 0.5)
ERFC = (
    *(4.05488705e-4, 3.03542855e-4, -4.18024609e-3, 1.08658001e-3, 3.26775696e-2, -1.03020474e-1, 1.57644295e-1),
    *(-9.90179997e-2, -1.22357466e-1, 1.26483806),
)


def leaky(z: Tensor, tau: Tau, slope: Tensor | float) -> Tensor:
    return slope + (1 - slope) * opening(z, tau)


def prelu_gain(z: Tensor, weight: Tensor, tau: Tau) -> Tensor:
    """`weight` holds one slope, or one for each channel, axis 1 of `z`."""
    channels = [-1] + [1] * (z.dim() - 2) if weight.numel() > 1 else [1] * z.dim()
    return leaky(z, tau, weight.to(z.dtype).view(channels))


def hardtanh_gain(z: Tensor, tau: Tau, low: float | None, high: float | None) -> Tensor:
    above_low = torch.ones_like(z) if low in (None, -math.inf) else opening(z - low, tau)
    return above_low if high in (None, math.inf) else above_low - opening(z - high, tau)


def above(z: Tensor, floor: Tensor) -> Tensor:
    """How far `z` is above `floor`, in the dtype of `z`."""
    return z - floor.to(z.dtype)


def between_gain(z: Tensor, floor: Tensor, ceiling: Tensor, tau: Tau) -> Tensor:
    return opening(above(z, floor), tau) - opening(above(z, ceiling), tau)


def hardsigmoid_gain(z: Tensor, tau: Tau) -> Tensor:
    return hardtanh_gain(z, tau, -3.0, 3.0) / 6


def relu_squared_gain(z: Tensor, tau: Tau) -> Tensor:
    return 2 * z.relu() * opening(z, tau)


def shrink_gain(z: Tensor, tau: Tau, width: float) -> Tensor:
    return opening(z - width, tau) + opening(-z - width, tau)


def elu(z: Tensor, alpha: float, output_scale: float, input_scale: float) -> Tensor:
    return torch.ops.aten.elu(z, alpha, output_scale, input_scale)


def elu_gain(z: Tensor, tau: Tau, alpha: float, output_scale: float, input_scale: float) -> Tensor:
    s = input_scale
    negative = torch.exp(s * z.clamp(max=0)) * opening(-z, tau) if isinstance(tau, str) else exp_below(z, tau, s)
    return output_scale * (opening(z, tau) + alpha * s * negative)


def exp_below(z: Tensor, tau: float | Tensor, s: float) -> Tensor:
    """`E[e^{s (z + tau eps)}; z + tau eps < 0] = e^{s z + (s tau)^2 / 2} Phi(-a)` with `a = z / tau + s tau`.

    The product is inf * 0 where z or tau is large. For a >= 0 it is `e^{-(z / tau)^2 / 2}` times `e^{a^2 / 2} Phi(-a)`, half a
    scaled erfc, and for a < 0 its exponent is at most s z / 2: every factor stays at most 1.
    """
    a, most = z / tau + s * tau, 1e30  # finite bounds keep inf - inf and inf / inf out
    above = torch.exp(-0.5 * (z / tau).square()) * 0.5 * scaled_erfc(a.clamp(0.0, most) * math.sqrt(0.5))
    below = torch.exp(torch.where(a < 0, s * z + min(s * tau * s * tau / 2, most), 0)) * normal_cdf(-a)
    return torch.where(a < 0, below, above)


def step_row(forward: Callable[..., Tensor], distance: Callable[..., Tensor], opens: int = 1, **facts: Any) -> Row:
    """A gate with one kink, `v u(distance)`: that of a ReLU, wherever the kink lies."""

    def gain(z: Tensor, *steering: Tensor, tau: Tau, **args: Any) -> Tensor:
        return opening(distance(z, *steering, **args), tau)

    return gain_row(forward, gain, 1.0, homogeneous=True, distance=distance, opens=opens, rule="relu", **facts)


# Chosen on EfficientNet-Lite0 and twelve photographs; `bench/fidelity.py --networks efficientnet_lite0` judges it on others. The
# margin moves both kinks the same way: one that narrows the gate from both sides made maps less faithful. Without a batch norm a
# clamp is a ReLU with an upper kink, and has its temperature: SqueezeNet, which has none, is ruined by temperatures by channel.
CLAMP = Soft(1.7, margin=0.4, scale="batch_norm", otherwise=1.0)


def clamp_row(forward: Callable[..., Tensor], gain: Callable[..., Tensor], **facts: Any) -> Row:
    """A gate with two kinks, which opens at the lower one."""
    return gain_row(forward, gain, CLAMP, homogeneous=True, opens=1, rule="hardtanh", **facts)


ROWS: dict[str, Row] = {
    "relu": step_row(F.relu, first_tensor),
    "floor": step_row(lambda z, low: z.clamp(min=low), lambda z, low: z - low),
    "ceiling": step_row(lambda z, high: z.clamp(max=high), lambda z, high: high - z, -1),
    "maximum": step_row(torch.maximum, above, tensors=2),
    "minimum": step_row(torch.minimum, lambda z, ceiling: -above(z, ceiling), -1, tensors=2),
    "threshold": step_row(F.threshold, lambda z, threshold, value: z - threshold),
    "negative_relu": step_row(lambda z: z.clamp(max=0), torch.neg, -1),
    "relu_squared": gain_row(lambda z: F.relu(z).square(), relu_squared_gain, 1.0, homogeneous=True, opens=1, rule="relu"),
    "leaky_relu": gain_row(
        F.leaky_relu, lambda z, tau, negative_slope: leaky(z, tau, negative_slope), 1.0, homogeneous=True, opens=1
    ),
    "prelu": gain_row(F.prelu, prelu_gain, 1.0, tensors=2, homogeneous=True, opens=1),
    "hardtanh": clamp_row(
        lambda z, low, high: torch.clamp(z, low, high),
        hardtanh_gain,
        distance=lambda z, low, high: z if low in (None, -math.inf) else z - low,
    ),
    "between": clamp_row(torch.clamp, between_gain, tensors=3, distance=lambda z, floor, ceiling: above(z, floor)),
    "hardsigmoid": clamp_row(F.hardsigmoid, hardsigmoid_gain, distance=lambda z: z + 3),
    "hardshrink": gain_row(lambda z, width: F.hardshrink(z, width), shrink_gain, 0.6),
    "softshrink": gain_row(lambda z, width: F.softshrink(z, width), shrink_gain, 0.6),
    "abs": gain_row(torch.abs, lambda z, tau: opening(z, tau) - opening(-z, tau), 1.0, homogeneous=True),
    "elu": gain_row(elu, elu_gain, 0.6),
}
