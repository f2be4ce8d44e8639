"""Which nodes of a graph are gates: every call form of an op, read into one `Gate`.

Modules need no entry of their own: capture traces into `torch.nn`'s gating modules, so that they appear as the functions
they call, and a subclass is read by what it computes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

aten = torch.ops.aten


@dataclass(frozen=True)
class Gate:
    """A call that is a gate: its row of the table, the tensors and the arguments in the table's form.

    `first` says that the call returns the gate's output as the first of several things. `fixed`: no gate where the input varies
    tensors other than the one that the signal comes through.
    """

    kind: str
    tensors: tuple[Any, ...]
    args: dict[str, Any] = field(default_factory=dict)
    first: bool = False
    fixed: bool = False


@dataclass(frozen=True)
class Unread:
    """A call that gates, or may, and has no rule: why."""

    reason: str


READERS: dict[Any, Callable[..., Gate | Unread]] = {}


def reads(*targets: Any) -> Callable:
    """Register a reader with the signature of the ops it reads. A name stands for the method, and for its in-place twin."""

    def register(reader: Callable) -> Callable:
        for target in targets:
            READERS[target] = reader
            if isinstance(target, str):
                READERS[target + "_"] = reader
        return reader

    return register


# -- pointwise ----------------------------------------------------------------------------------------------------------


@reads(F.relu, F.relu_, torch.relu, torch.relu_, "relu", aten.relu, aten.relu_)
def relu(input, inplace=False):
    return Gate("relu", (input,))


@reads(F.leaky_relu, F.leaky_relu_, aten.leaky_relu, aten.leaky_relu_)
def leaky_relu(input, negative_slope=0.01, inplace=False):
    return Gate("leaky_relu", (input,), {"negative_slope": negative_slope})


@reads(F.rrelu, F.rrelu_, torch.rrelu, torch.rrelu_, aten.rrelu, aten.rrelu_)
def rrelu(input, lower=1 / 8, upper=1 / 3, training=False, inplace=False):
    if training:
        return Unread("rrelu draws random slopes: training=True in the call")
    return Gate("leaky_relu", (input,), {"negative_slope": (lower + upper) / 2})


@reads(F.prelu, torch.prelu, "prelu", aten.prelu)
def prelu(input, weight):
    return Gate("prelu", (input, weight))


@reads(F.relu6, aten.relu6, aten.relu6_)
def relu6(input, inplace=False):
    return Gate("hardtanh", (input,), {"low": 0.0, "high": 6.0})


@reads(F.hardtanh, F.hardtanh_, aten.hardtanh, aten.hardtanh_)
def hardtanh(input, min_val=-1.0, max_val=1.0, inplace=False):
    return Gate("hardtanh", (input,), {"low": min_val, "high": max_val})


@reads(torch.clamp, torch.clamp_, torch.clip, torch.clip_, "clamp", "clip", aten.clamp, aten.clamp_)
def clamp(input, min=None, max=None):
    bounds = [bound for bound in (min, max) if bound is not None]
    if all(isinstance(bound, int | float) for bound in bounds):
        return Gate("hardtanh", (input,), {"low": min, "high": max})
    if not all(is_tensor(bound) for bound in bounds):
        return Unread("clamp with computed bounds")
    return maximum(input, min) if max is None else minimum(input, max) if min is None else between(input, min, max)


def between(input, low, high):
    return Gate("between", (input, low, high), fixed=True)


def is_tensor(value: Any) -> bool:
    """Whether a node is known to be a tensor: one of the module's, or one that an export has seen."""
    return isinstance(value, fx.Node) and (value.op == "get_attr" or isinstance(value.meta.get("val"), torch.Tensor))


@reads("clamp_min", torch.clamp_min, torch.clamp_min_, aten.clamp_min, aten.clamp_min_)
def clamp_min(input, min):
    return clamp(input, min)


@reads("clamp_max", torch.clamp_max, torch.clamp_max_, aten.clamp_max, aten.clamp_max_)
def clamp_max(input, max):
    return clamp(input, None, max)


@reads(torch.maximum, "maximum", torch.fmax, aten.maximum, aten.fmax)
def maximum(input, other):
    return Gate("maximum", (input, other), fixed=True)


@reads(torch.minimum, "minimum", torch.fmin, aten.minimum, aten.fmin)
def minimum(input, other):
    return Gate("minimum", (input, other), fixed=True)


@reads(F.threshold, F.threshold_, torch.threshold, aten.threshold, aten.threshold_)  # type: ignore[attr-defined]
def threshold(input, threshold, value, inplace=False):
    return Gate("threshold", (input,), {"threshold": threshold, "value": value})


@reads(F.hardshrink, torch.hardshrink, "hardshrink", aten.hardshrink)
def hardshrink(input, lambd=0.5):
    return Gate("hardshrink", (input,), {"width": lambd})


@reads(F.softshrink, aten.softshrink)
def softshrink(input, lambd=0.5):
    return Gate("softshrink", (input,), {"width": lambd})


@reads(torch.abs, torch.abs_, torch.absolute, "abs", "absolute", operator.abs, aten.abs, aten.abs_, aten.absolute)
def absolute(input):
    return Gate("abs", (input,))


@reads(F.glu, aten.glu)
def glu(input, dim=-1):
    return Gate("glu", (input,), {"dim": dim})


@reads(F.elu, F.elu_)
def elu(input, alpha=1.0, inplace=False):
    return Gate("elu", (input,), {"alpha": alpha, "output_scale": 1.0, "input_scale": 1.0})


@reads(aten.elu, aten.elu_)
def aten_elu(input, alpha=1.0, scale=1.0, input_scale=1.0):
    return Gate("elu", (input,), {"alpha": alpha, "output_scale": scale, "input_scale": input_scale})


@reads(F.selu, F.selu_, torch.selu, torch.selu_, aten.selu, aten.selu_)
def selu(input, inplace=False):
    # The constants of Klambauer et al., "Self-Normalizing Neural Networks", arXiv:1706.02515, as PyTorch rounds them.
    return Gate("elu", (input,), {"alpha": 1.6732632423543772, "output_scale": 1.0507009873554805, "input_scale": 1.0})


@reads(F.celu, F.celu_, torch.celu, torch.celu_, aten.celu, aten.celu_)
def celu(input, alpha=1.0, inplace=False):
    return Gate("elu", (input,), {"alpha": alpha, "output_scale": 1.0, "input_scale": 1 / alpha})


@reads(F.gelu, aten.gelu, aten.gelu_)
def gelu(input, approximate="none"):
    return Gate("gelu", (input,), {"approximate": approximate})


@reads(F.silu, aten.silu, aten.silu_)
def silu(input, inplace=False):
    return Gate("silu", (input,))


@reads(F.hardswish, aten.hardswish, aten.hardswish_)
def hardswish(input, inplace=False):
    return Gate("hardswish", (input,))


@reads(F.mish, aten.mish, aten.mish_)
def mish(input, inplace=False):
    return Gate("mish", (input,))


# -- max pooling --------------------------------------------------------------------------------------------------------


def per_axis(value: Any, axes: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values


def max_pool(axes: int, first: bool | None = None) -> Callable[..., Gate | Unread]:
    """`first`: whether the call returns indices too; None where it is asked to."""

    def read(input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
        return Gate(
            "max_pool",
            (input,),
            {
                "kernel": per_axis(kernel_size, axes),
                "stride": per_axis(kernel_size if stride in (None, []) else stride, axes),
                "padding": per_axis(padding, axes),
                "dilation": per_axis(dilation, axes),
                "ceil_mode": ceil_mode,
            },
            first=return_indices if first is None else first,
        )

    return read


def adaptive_max_pool(axes: int, first: bool | None = None) -> Callable[..., Gate | Unread]:
    def read(input, output_size, return_indices=False):
        several = return_indices if first is None else first
        size = per_axis(output_size, axes)
        if set(size) == {1}:
            return Gate("amax", (input,), {"dim": tuple(range(-axes, 0)), "keepdim": True}, several)
        return Gate("adaptive_max_pool", (input,), {"size": size}, several)

    return read


def fractional_max_pool(axes: int, first: bool | None = None) -> Callable[..., Gate | Unread]:
    def read(input, kernel_size, output_size=None, output_ratio=None, return_indices=False, _random_samples=None):
        if _random_samples is None:
            return Unread("fractional max pooling draws random windows at every call: fix them by _random_samples")
        several = return_indices if first is None else first
        size, ratio = (None if n is None else n if isinstance(n, tuple) else (n,) * axes for n in (output_size, output_ratio))
        args = {"kernel": per_axis(kernel_size, axes), "size": size, "ratio": ratio}
        return Gate("fractional_max_pool", (input, _random_samples), args, several)

    return read


def aten_fractional_max_pool(input, kernel_size, output_size, random_samples):
    return fractional_max_pool(len(kernel_size), True)(input, kernel_size, output_size, _random_samples=random_samples)


for _axes in (1, 2, 3):
    for _name, _reader in (("max_pool", max_pool), ("adaptive_max_pool", adaptive_max_pool)):
        _plain, _both = f"{_name}{_axes}d", f"{_name}{_axes}d_with_indices"
        # Of the adaptive ATen ops those without "with_indices" return both, too; so does torch's one-dimensional one.
        _aten_both = True if _name == "adaptive_max_pool" else False
        reads(getattr(F, _plain))(_reader(_axes))
        reads(getattr(F, _both))(_reader(_axes, True))
        reads(getattr(aten, _plain))(_reader(_axes, _aten_both))
        if hasattr(torch, _plain):
            reads(getattr(torch, _plain))(_reader(_axes, _aten_both))
        if hasattr(torch, _both):
            reads(getattr(torch, _both))(_reader(_axes, True))
        if hasattr(aten, _both):
            reads(getattr(aten, _both))(_reader(_axes, True))
    if _axes > 1:
        reads(getattr(F, f"fractional_max_pool{_axes}d"))(fractional_max_pool(_axes))
        reads(getattr(F, f"fractional_max_pool{_axes}d_with_indices"))(fractional_max_pool(_axes, True))
        reads(getattr(aten, f"fractional_max_pool{_axes}d"))(aten_fractional_max_pool)


@reads(torch.amax, "amax", aten.amax)
def amax(input, dim=(), keepdim=False):
    dim = (dim,) if isinstance(dim, int) else tuple(dim)
    return Gate("amax", (input,), {"dim": dim, "keepdim": keepdim})


@reads(torch.max, "max", aten.max)
def maximum_over(input, dim=None, keepdim=False, other=None):
    if other is not None or isinstance(dim, fx.Node):
        return maximum(input, dim if other is None else other)
    if dim is None:
        return amax(input)
    return Gate("amax", (input,), {"dim": (dim,), "keepdim": keepdim}, first=True)


@reads(torch.min, "min", aten.min)
def minimum_over(input, dim=None, keepdim=False, other=None):
    if other is not None or isinstance(dim, fx.Node):
        return minimum(input, dim if other is None else other)
    return Unread("min chooses by value and has no rule")


# -- normalisations -----------------------------------------------------------------------------------------------------


@reads(F.layer_norm, torch.layer_norm, aten.layer_norm)
def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True):
    return Gate("layer_norm", (input, weight, bias), {"normalized_shape": normalized_shape, "eps": eps})


@reads(F.rms_norm, torch.rms_norm, aten.rms_norm)
def rms_norm(input, normalized_shape, weight=None, eps=None):
    return Gate("rms_norm", (input, weight), {"normalized_shape": normalized_shape, "eps": eps})


@reads(F.group_norm)
def group_norm(input, num_groups, weight=None, bias=None, eps=1e-5):
    return Gate("group_norm", (input, weight, bias), {"num_groups": num_groups, "eps": eps})


@reads(torch.group_norm, aten.group_norm)
def aten_group_norm(input, num_groups, weight=None, bias=None, eps=1e-5, cudnn_enabled=True):
    return group_norm(input, num_groups, weight, bias, eps)


@reads(torch.instance_norm, aten.instance_norm)
def aten_instance_norm(input, weight, bias, running_mean, running_var, use_input_stats, momentum, eps, cudnn_enabled=True):
    return instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


@reads(F.instance_norm)
def instance_norm(
    input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5
):
    if not use_input_stats:
        return None  # affine
    if running_mean is not None:
        return Unread("instance_norm that updates its running statistics")
    return Gate("instance_norm", (input, weight, bias), {"eps": eps})


@reads(F.batch_norm)
def batch_norm(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    if not training:
        return Gate("affine_norm", (input, running_mean, running_var, weight, bias), {"eps": eps})
    if running_mean is not None:
        return Unread("batch_norm that updates its running statistics")
    return Gate("batch_norm", (input, weight, bias), {"eps": eps})


@reads(torch.batch_norm, aten.batch_norm)
def aten_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled=True):
    return batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


@reads(F.normalize)
def normalize(input, p=2.0, dim=1, eps=1e-12, out=None):
    return Gate("normalize", (input,), {"p": p, "dim": dim, "eps": eps})


@reads(F.local_response_norm)
def local_response_norm(input, size, alpha=1e-4, beta=0.75, k=1.0):
    return Gate("local_response_norm", (input,), {"size": size, "alpha": alpha, "beta": beta, "k": k})


# -- affine maps that have a row ------------------------------------------------------------------------------------------


@reads(F.linear, aten.linear)
def linear(input, weight, bias=None):
    return Gate("linear", (input, weight, bias))


def conv(axes: int) -> Callable[..., Gate | None]:
    def read(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        if isinstance(padding, str):
            return None
        sizes = {"stride": stride, "padding": padding, "dilation": dilation}
        return Gate("conv", (input, weight, bias), {**{k: per_axis(v, axes) for k, v in sizes.items()}, "groups": groups})

    return read


reads(F.conv1d, aten.conv1d)(conv(1))
reads(F.conv2d, aten.conv2d)(conv(2))
reads(F.conv3d, aten.conv3d)(conv(3))


# -- attention ----------------------------------------------------------------------------------------------------------


@reads(F.scaled_dot_product_attention, aten.scaled_dot_product_attention)
def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    if dropout_p != 0:
        return Unread(f"attention with dropout_p={dropout_p!r} in the call, also in eval mode")
    return Gate(
        "attention", (query, key, value, attn_mask), {"is_causal": is_causal, "score_scale": scale, "enable_gqa": enable_gqa}
    )


SOFTMAX: dict[Any, Callable[..., tuple]] = {
    **dict.fromkeys((F.softmax, "softmax"), lambda input, dim=None, _stacklevel=3, dtype=None: (input, dim, dtype)),
    **dict.fromkeys((torch.softmax, torch.special.softmax, aten.softmax, aten.special_softmax),
                    lambda input, dim, dtype=None: (input, dim, dtype)),
    aten._softmax: lambda input, dim, half_to_float=False: (input, dim, torch.float32 if half_to_float else None),
}  # fmt: skip
