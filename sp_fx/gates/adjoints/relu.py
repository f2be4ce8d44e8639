"""Gates with kinks: ReLU and its like, clamps and thresholds, shrinkage, absolute value, ELU.

The hard gate is a step at each kink, the soft one the step's average over Gaussian eps. With `u(z)` the step `z > 0` where frozen
(one half at 0), and `P(z + tau eps > 0) = Phi(z / tau)`, the normal distribution function, where soft, the way back is

    relu                    v u(z)                                          arXiv:2507.22832
    leaky_relu, prelu       v (s + (1 - s) u(z))                            of slope s below 0
    hardtanh, between       v (u(z - low) - u(z - high))                    ReLU6 and clamp, by numbers or tensors
    maximum, minimum        v u(z - floor), v u(ceiling - z)
    threshold               v u(z - threshold)
    hardshrink, softshrink  v (u(z - width) + u(-z - width))
    abs                     v (u(z) - u(-z))
    elu                     v o (u(z) + a s E[e^{s (z + tau eps)}; z + tau eps < 0])    of scale a, output scale o, input scale s

All but ReLU, which is the paper's: same principle.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .row import FROZEN, Row, Tau, at_once, gain_row

OFFSET = torch.full((), 1e-30)


def opening(z: Tensor, tau: Tau) -> Tensor:
    """`u(z)`, the average of the step `z > 0`. Frozen, the step itself, one half at the kink: the limit as tau -> 0."""
    return torch.sign(z).add_(1).mul_(0.5) if isinstance(tau, str) else normal_cdf(z, tau)


def normal_cdf(z: Tensor, tau: float | Tensor = 1.0) -> Tensor:
    """`Phi(z / tau)`."""
    if z.dtype == torch.float32 and z.device.type == "cpu" and at_once():
        # As gelu(t) / t: a fifth of the time of PyTorch's erf on CPU (48 against 237 ms over ResNet-50's gates, batch 4), and
        # within 3e-7 of Phi. The offset keeps 0 / 0 out, the bounds inf/inf. Gains below 2^-24 are 0, as by erf: a network whose
        # gates are all closed has a zero map, and their products make no denormals.
        t = scaled(z, 1 / tau) if isinstance(tau, Tensor) else torch.add(OFFSET, z, alpha=1 / tau)
        t.clamp_(-38, 38)
        return torch.threshold_(F.gelu(t).div_(t), 2.0**-24, 0.0)
    return torch.erf(z * (math.sqrt(0.5) / tau)).mul_(0.5).add_(0.5)  # erf, not erfc: Inductor vectorises it, ONNX has it


def scaled(z: Tensor, by: Tensor) -> Tensor:
    """`by * z + 1e-30`, where `by` [B, 1, ...] has one number a sample. Large samples one at a time, which takes one pass."""
    if by.numel() == 1:
        return torch.add(OFFSET, z, alpha=float(by))
    if by.numel() != len(z) or z.numel() < len(z) << 14:
        return (z * by).add_(OFFSET)
    out = torch.empty_like(z)
    for sample, factor, product in zip(z, by.flatten().tolist(), out):
        torch.add(OFFSET, sample, alpha=factor, out=product)
    return out


def leaky(z: Tensor, tau: Tau, slope: Tensor | float) -> Tensor:
    return slope + (1 - slope) * opening(z, tau)


def prelu_gain(z: Tensor, weight: Tensor, tau: Tau) -> Tensor:
    """`weight` holds one slope, or one for each channel, axis 1 of `z`."""
    channels = [-1] + [1] * (z.dim() - 2) if weight.numel() > 1 else [1] * z.dim()
    return leaky(z, tau, weight.to(z.dtype).view(channels))


def hardtanh_gain(z: Tensor, tau: Tau, low: float | None, high: float | None) -> Tensor:
    above_low = torch.ones_like(z) if low is None else opening(z - low, tau)
    return above_low if high is None else above_low - opening(z - high, tau)


def maximum_gain(z: Tensor, floor: Tensor, tau: Tau) -> Tensor:
    return opening(z - floor.to(z.dtype), tau)


def minimum_gain(z: Tensor, ceiling: Tensor, tau: Tau) -> Tensor:
    return opening(ceiling.to(z.dtype) - z, tau)


def between_gain(z: Tensor, floor: Tensor, ceiling: Tensor, tau: Tau) -> Tensor:
    return maximum_gain(z, floor, tau) - maximum_gain(z, ceiling, tau)


def shrink_gain(z: Tensor, tau: Tau, width: float) -> Tensor:
    return opening(z - width, tau) + opening(-z - width, tau)


def elu(z: Tensor, alpha: float, output_scale: float, input_scale: float) -> Tensor:
    return torch.ops.aten.elu(z, alpha, output_scale, input_scale)


def elu_gain(z: Tensor, tau: Tau, alpha: float, output_scale: float, input_scale: float) -> Tensor:
    # With s = input_scale: E[e^{s(z + tau eps)}; z + tau eps < 0] = e^{sz + (s tau)^2 / 2} Phi(-z/tau - s tau), here as
    # one exponential of a sum because the product is inf * 0 at large z. At |z| = 1e4 both sides have long saturated.
    z, s = z.clamp(-1e4, 1e4), input_scale
    if isinstance(tau, str):
        negative = torch.exp(s * z.clamp(max=0)) * opening(-z, FROZEN)
    else:
        negative = torch.exp(s * z + (s * tau) ** 2 / 2 + torch.special.log_ndtr(-z / tau - s * tau))
    return output_scale * (opening(z, tau) + alpha * s * negative)


ROWS: dict[str, Row] = {
    "relu": gain_row(F.relu, opening, 1.0, homogeneous=True),
    "leaky_relu": gain_row(F.leaky_relu, lambda z, tau, negative_slope: leaky(z, tau, negative_slope), 1.0, homogeneous=True),
    "prelu": gain_row(F.prelu, prelu_gain, 1.0, tensors=2, homogeneous=True),
    "hardtanh": gain_row(lambda z, low, high: torch.clamp(z, low, high), hardtanh_gain, 0.6),
    "maximum": gain_row(torch.maximum, maximum_gain, 0.6, tensors=2, rule="hardtanh"),
    "minimum": gain_row(torch.minimum, minimum_gain, 0.6, tensors=2, rule="hardtanh"),
    "between": gain_row(torch.clamp, between_gain, 0.6, tensors=3, rule="hardtanh"),
    "threshold": gain_row(F.threshold, lambda z, tau, threshold, value: opening(z - threshold, tau), 0.6, rule="hardtanh"),
    "hardshrink": gain_row(lambda z, width: F.hardshrink(z, width), shrink_gain, 0.6),
    "softshrink": gain_row(lambda z, width: F.softshrink(z, width), shrink_gain, 0.6),
    "abs": gain_row(torch.abs, lambda z, tau: opening(z, tau) - opening(-z, tau), 1.0, homogeneous=True),
    "elu": gain_row(elu, elu_gain, 0.6),
}
