"""The table: for each kind of gate its exact forward and its soft adjoint, in plain torch.

A gate is a map `z -> A(z) z + b(z)` whose `A` the input chooses. Its *pullback* is `v -> A(z)^T v`, with nothing
differentiated through the choice. Its *soft* pullback replaces a hard `A` by the average of `A(z + tau eps)` over
Gaussian `eps`, or, where the gate is smooth already, by its own gain at temperature `tau`.
Formulas: Satkiewicz, Corizzo, Pietron, "Pulling Back the Curtain on Deep Networks", arXiv:2507.22832, and the same two
principles carried over to the kinds that the paper does not list.

Gates are computed in float32 at least.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .pooling import (
    adaptive_max_pool,
    adaptive_max_pool_adjoint,
    amax,
    amax_adjoint,
    fractional_max_pool,
    fractional_max_pool_adjoint,
    max_pool,
    max_pool_adjoint,
)
from .temperature import FROZEN, Tau, Temperature, at_once, wide


@dataclass(frozen=True)
class Row:
    """One kind of gate.

    `forward(*tensors, **args)` is the model's own computation. `adjoint(v, *tensors, tau=..., **args)` maps the cotangent of
    its output to the cotangent of the one tensor that the signal came through, number `receives`; the other tensors
    (slopes, scales, queries, keys) steer the gate and receive nothing. `default` is the temperature in `Rules()`, which has it
    under the row's own name or that of `rule`.
    """

    forward: Callable[..., Tensor]
    adjoint: Callable[..., Tensor | None]
    default: Temperature
    receives: int = 0
    tensors: int = 1
    sees_output: bool = False  # the adjoint takes the forward's output too, after the tensors
    homogeneous: bool = False  # positively: its hard gate ignores the scale of the input, so its temperature may follow it
    forgets: bool = False  # the adjoint needs the shape of the first tensor, not its values
    rule: str = ""
    registered: bool = False  # by a user


def gain_row(forward: Callable[..., Tensor], gain: Callable[..., Tensor], default: Temperature, **facts: Any) -> Row:
    """A gate that multiplies: `v -> v * gain(z)`. `gain` takes the tensors (wide), the temperature and the arguments."""

    def adjoint(v: Tensor, z: Tensor, *steering: Tensor | None, tau: Tau, **args: Any) -> Tensor:
        return (v * gain(wide(z), *steering, tau=tau, **args)).to(z.dtype)

    return Row(forward, adjoint, default, **facts)


# -- pointwise gates ----------------------------------------------------------------------------------------------------


OFFSET = torch.full((), 1e-30)


def scaled(z: Tensor, by: Tensor) -> Tensor:
    """`by * z + 1e-30`, where `by` [B, 1, ...] has one number a sample. Large samples one at a time, which takes one pass."""
    if by.numel() == 1:
        return torch.add(OFFSET, z, alpha=float(by))
    if by.numel() != len(z) or z.numel() < len(z) << 14:
        return (z * by).add_(OFFSET)
    out = torch.empty_like(z)
    for one, factor, place in zip(z, by.flatten().tolist(), out):
        torch.add(OFFSET, one, alpha=factor, out=place)
    return out


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


def opening(z: Tensor, tau: Tau) -> Tensor:
    """The average of the step `z > 0`. Frozen, the step itself, one half at the kink: the limit as tau -> 0."""
    return torch.sign(z).add_(1).mul_(0.5) if isinstance(tau, str) else normal_cdf(z, tau)


def cooled(z: Tensor, tau: Tau) -> Tensor:
    """The argument of a gain that is smooth already: frozen is tau = 1."""
    return z if isinstance(tau, str) else z / tau


def leaky(z: Tensor, tau: Tau, slope: Tensor | float) -> Tensor:
    return slope + (1 - slope) * opening(z, tau)


def prelu_gain(z: Tensor, weight: Tensor, tau: Tau) -> Tensor:
    channels = [-1] + [1] * (z.dim() - 2) if weight.numel() > 1 else [1] * z.dim()
    return leaky(z, tau, weight.to(z.dtype).view(channels))


def maximum_gain(z: Tensor, floor: Tensor, tau: Tau) -> Tensor:
    return opening(z - floor.to(z.dtype), tau)


def minimum_gain(z: Tensor, ceiling: Tensor, tau: Tau) -> Tensor:
    return opening(ceiling.to(z.dtype) - z, tau)


def shrink_gain(z: Tensor, tau: Tau, width: float) -> Tensor:
    return opening(z - width, tau) + opening(-z - width, tau)


def silu_gain(z: Tensor, tau: Tau, rate: float = 1.0) -> Tensor:
    return torch.sigmoid(cooled(z, tau) * rate)


def hardtanh_gain(z: Tensor, tau: Tau, low: float | None, high: float | None) -> Tensor:
    above_low = torch.ones_like(z) if low is None else opening(z - low, tau)
    return above_low if high is None else above_low - opening(z - high, tau)


def between_gain(z: Tensor, floor: Tensor, ceiling: Tensor, tau: Tau) -> Tensor:
    return maximum_gain(z, floor, tau) - maximum_gain(z, ceiling, tau)


def elu_gain(z: Tensor, tau: Tau, alpha: float, output_scale: float, input_scale: float) -> Tensor:
    # With s = input_scale: E[s e^{s(z + tau eps)}; z + tau eps < 0] = s e^{sz + (s tau)^2 / 2} Phi(-z/tau - s tau), here as
    # one exponential of a sum because the product is inf * 0 at large z. At |z| = 1e4 both sides have long saturated.
    z, s = z.clamp(-1e4, 1e4), input_scale
    if isinstance(tau, str):
        negative = torch.exp(s * z.clamp(max=0)) * opening(-z, FROZEN)
    else:
        negative = torch.exp(s * z + (s * tau) ** 2 / 2 + torch.special.log_ndtr(-z / tau - s * tau))
    return output_scale * (opening(z, tau) + alpha * s * negative)


def elu(z: Tensor, alpha: float, output_scale: float, input_scale: float) -> Tensor:
    return torch.ops.aten.elu(z, alpha, output_scale, input_scale)


def gelu_gain(z: Tensor, tau: Tau, approximate: str = "none") -> Tensor:
    if isinstance(tau, str) and approximate == "tanh":  # the forward's own gain, which differs from Phi by up to 5e-4
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    return normal_cdf(z, 1.0 if isinstance(tau, str) else tau)


# -- normalisations: the statistics are constants, so v -> v * gamma / deviation ----------------------------------------


def last_axes(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(range(-len(shape), 0))


def per_channel(gamma: Tensor | None, rstd: Tensor) -> Tensor:
    """`rstd` [B, C, 1, ...] times `gamma` [C]."""
    return rstd if gamma is None else rstd * wide(gamma).view(-1, *[1] * (rstd.dim() - 2))


def rstd_over(x: Tensor, axes: Sequence[int], eps: float) -> Tensor:
    axes = tuple(axes)
    return torch.rsqrt((x - x.mean(axes, keepdim=True)).square().mean(axes, keepdim=True) + eps)  # torch.var is slow on CPU


def layer_norm_gain(x, gamma, beta, tau, normalized_shape, eps):
    rstd = rstd_over(x, last_axes(normalized_shape), eps)
    return rstd if gamma is None else rstd * wide(gamma)


def rms_norm_gain(x, gamma, tau, normalized_shape, eps):
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    rrms = torch.rsqrt(x.square().mean(last_axes(normalized_shape), keepdim=True) + eps)
    return rrms if gamma is None else rrms * wide(gamma)


def group_norm_gain(x, gamma, beta, tau, num_groups, eps):
    grouped = x.reshape(x.shape[0], num_groups, x.shape[1] // num_groups, *x.shape[2:]).flatten(2)
    rstd = rstd_over(grouped, [-1], eps).repeat_interleave(x.shape[1] // num_groups, 1)  # [B, C, 1]
    return per_channel(gamma, rstd.reshape(*x.shape[:2], *[1] * (x.dim() - 2)))


def instance_norm_gain(x, gamma, beta, tau, eps):
    return per_channel(gamma, rstd_over(x, range(2, x.dim()), eps))


def batch_norm_gain(x, gamma, beta, tau, eps):
    return per_channel(gamma, rstd_over(x, [0, *range(2, x.dim())], eps))


def local_response_norm_gain(x, tau, size, alpha, beta, k):
    squares = F.pad(x.square().movedim(1, -1), (size // 2, (size - 1) // 2))
    return (k + alpha * squares.unfold(-1, size, 1).mean(-1).movedim(-1, 1)) ** -beta


def normalize_gain(x, tau, p, dim, eps):
    return 1 / torch.linalg.vector_norm(x, p, dim, keepdim=True).clamp_min(eps)


def rms_norm(x, gamma, normalized_shape, eps):
    return F.rms_norm(x, normalized_shape, gamma, eps)


def layer_norm(x, gamma, beta, normalized_shape, eps):
    return F.layer_norm(x, normalized_shape, gamma, beta, eps)


def group_norm(x, gamma, beta, num_groups, eps):
    return F.group_norm(x, num_groups, gamma, beta, eps)


def instance_norm(x, gamma, beta, eps):
    return F.instance_norm(x, None, None, gamma, beta, True, 0.1, eps)


def batch_norm(x, gamma, beta, eps):
    return F.batch_norm(x, None, None, gamma, beta, True, 0.1, eps)


# -- attention: through the values only ---------------------------------------------------------------------------------


def attention(q, k, value, mask, is_causal=False, score_scale=None, enable_gqa=False) -> Tensor:
    # The mask goes in as given: detached, another CPU kernel would be chosen and the last bits would differ.
    return F.scaled_dot_product_attention(q, k, value, mask, 0.0, is_causal, scale=score_scale, enable_gqa=enable_gqa)


def attention_adjoint(v, q, k, value, mask, tau, is_causal=False, score_scale=None, enable_gqa=False) -> Tensor:
    """`softmax((q k^T scale + mask) / tau)^T v`: q [..., Hq, N, D], k and value [..., Hk, M, D], v [..., Hq, N, Dv]."""
    groups = q.shape[-3] // k.shape[-3] if enable_gqa else 1
    keys = k.repeat_interleave(groups, -3) if groups > 1 else k
    scores = (wide(q) * (1 / math.sqrt(q.shape[-1]) if score_scale is None else score_scale)) @ wide(keys).mT
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + wide(mask)
    received = tempered_softmax(scores, tau).mT @ wide(v)
    if groups > 1:
        received = received.reshape(*k.shape[:-2], groups, *received.shape[-2:]).sum(-3)
    return received.sum_to_size(value.shape).to(value.dtype)


def tempered_softmax(scores: Tensor, tau: Tau, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    """`softmax(scores / tau)` over `dim`; a slice that is -inf throughout gives 0, and masks of finfo.min may not overflow."""
    scores = wide(scores if dtype is None else scores.to(dtype))
    lowest = torch.finfo(scores.dtype).min
    alive = scores.amax(dim, keepdim=True) > -math.inf
    return torch.softmax(cooled(scores, tau).clamp(lowest, -lowest), dim) * alive


def softmax(scores: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.softmax(scores, dim, dtype=dtype)


def nothing(v: Tensor, *tensors: Tensor, **args: Any) -> None:
    """Attention weights that are written out are constants: what they multiply gets the signal, the scores none."""


def mix(weights, soft_weights, value, form="weights @ values", swapped=False) -> Tensor:
    if form == "weights @ values":
        return weights @ value
    if form == "values @ weights":
        return value @ weights
    return torch.einsum(form, *((value, weights) if swapped else (weights, value)))


def mix_adjoint(v, weights, soft_weights, value, tau, form="weights @ values", swapped=False) -> Tensor:
    """Through the values by `soft_weights`; by `weights` themselves where None, a row that was masked throughout giving 0.

    `form` is one of the two products or the equation of an einsum, whose second operand is the weights where `swapped`.
    """
    soft = torch.nan_to_num(weights, nan=0.0) if soft_weights is None else soft_weights
    v = v.to(soft.dtype)
    if form == "weights @ values":
        received = soft.mT @ v
    elif form == "values @ weights":
        received = v @ soft.mT
    else:
        terms, out = form.split("->")
        mixing, mixed = reversed(terms.split(",")) if swapped else terms.split(",")
        received = torch.einsum(f"{mixing},{out}->{mixed}", soft, v)
    return received.sum_to_size(value.shape).to(value.dtype)


# -- what is not one call: gates written out, and gates by a factor -------------------------------------------------------


def written(z: Tensor, y: Tensor, row: str, args: tuple = ()) -> Tensor:
    """What the model computed itself, `y`, as gate `row` of `z`."""
    return y.view_as(y)


def written_adjoint(v: Tensor, z: Tensor, y: Tensor, tau: Tau, row: str, args: tuple = ()) -> Tensor | None:
    return TABLE[row].adjoint(v, z, tau=tau, **dict(args))


def glu_adjoint(v: Tensor, z: Tensor, tau: Tau, dim: int) -> Tensor:
    gate = wide(z).chunk(2, dim)[1].sigmoid()
    return torch.cat([v * gate, torch.zeros_like(gate)], dim).to(z.dtype)


# -- affine maps: exact, and here only to keep less for the way back than autograd does, which saves their inputs ---------
# ResNet-50 at batch 4 keeps 260 MiB so (564 without these rows, 425 the model itself); its pullback takes 0.83 of the time.


def linear_adjoint(v: Tensor, like: Tensor, weight: Tensor, bias: Tensor | None, tau: Tau) -> Tensor:
    weight = weight.to(v.dtype)
    return (v @ weight if weight.dim() > 1 else v.unsqueeze(-1) * weight).to(like.dtype)


def conv(x, weight, bias, stride, padding, dilation, groups) -> Tensor:
    return (F.conv1d, F.conv2d, F.conv3d)[len(stride) - 1](x, weight, bias, stride, padding, dilation, groups)


def conv_adjoint(v, like, weight, bias, tau, stride, padding, dilation, groups) -> Tensor:
    outer = [0] * len(stride)
    batched = like.dim() == weight.dim()
    v, shaped = (v, like) if batched else (v[None], like[None])
    grad, _, _ = torch.ops.aten.convolution_backward(
        v, shaped.to(v.dtype), weight.to(v.dtype), None, stride, padding, dilation, False, outer, groups, [True, False, False]
    )
    return (grad if batched else grad[0]).to(like.dtype)


def affine_norm(x, mean, variance, gamma, beta, eps) -> Tensor:
    return F.batch_norm(x, mean, variance, gamma, beta, False, 0.0, eps)


def affine_norm_adjoint(v, like, mean, variance, gamma, beta, tau, eps) -> Tensor:
    return (v * per_channel(gamma, torch.rsqrt(wide(variance) + eps).view(1, -1, *[1] * (v.dim() - 2)))).to(like.dtype)


# -- the table ----------------------------------------------------------------------------------------------------------

TABLE: dict[str, Row] = {
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
    "gelu": gain_row(lambda z, approximate: F.gelu(z, approximate=approximate), gelu_gain, 1.0),
    "silu": gain_row(lambda z, rate=1.0: F.silu(z) if rate == 1 else z * torch.sigmoid(rate * z), silu_gain, 1.6),
    "quick_gelu": gain_row(lambda z, rate: z * torch.sigmoid(rate * z), silu_gain, 1.0),
    "hardswish": gain_row(F.hardswish, lambda z, tau: F.hardsigmoid(cooled(z, tau)), 1.6),
    "mish": gain_row(F.mish, lambda z, tau: torch.tanh(F.softplus(cooled(z, tau))), 1.6),
    "max_pool": Row(max_pool, max_pool_adjoint, 1.0, sees_output=True, homogeneous=True),
    "amax": Row(amax, amax_adjoint, 1.0, sees_output=True, homogeneous=True, rule="max_pool"),
    "adaptive_max_pool": Row(
        adaptive_max_pool, adaptive_max_pool_adjoint, 1.0, sees_output=True, homogeneous=True, rule="max_pool"
    ),
    "fractional_max_pool": Row(
        fractional_max_pool, fractional_max_pool_adjoint, 1.0, tensors=2, sees_output=True, homogeneous=True, rule="max_pool"
    ),
    "layer_norm": gain_row(layer_norm, layer_norm_gain, FROZEN, tensors=3),
    "rms_norm": gain_row(rms_norm, rms_norm_gain, FROZEN, tensors=2),
    "group_norm": gain_row(group_norm, group_norm_gain, FROZEN, tensors=3),
    "instance_norm": gain_row(instance_norm, instance_norm_gain, FROZEN, tensors=3),
    "batch_norm": gain_row(batch_norm, batch_norm_gain, FROZEN, tensors=3),
    "local_response_norm": gain_row(F.local_response_norm, local_response_norm_gain, FROZEN),
    "normalize": gain_row(lambda x, p, dim, eps: F.normalize(x, p, dim, eps), normalize_gain, FROZEN),
    "attention": Row(attention, attention_adjoint, 1.0, receives=2, tensors=4),
    "softmax": Row(softmax, nothing, 1.0),
    "linear": Row(F.linear, linear_adjoint, FROZEN, tensors=3, forgets=True),
    "conv": Row(conv, conv_adjoint, FROZEN, tensors=3, forgets=True),
    "affine_norm": Row(affine_norm, affine_norm_adjoint, FROZEN, tensors=5, forgets=True),
    "mix": Row(mix, mix_adjoint, 1.0, receives=2, tensors=3),
    "written": Row(written, written_adjoint, FROZEN, tensors=2),
    "glu": Row(lambda z, dim: F.glu(z, dim), glu_adjoint, FROZEN, rule="product"),
}


def rule_of(row: str) -> str:
    """What `Rules` calls a row of the table."""
    return (TABLE[row].rule if row in TABLE else "") or row
