"""Calls of gates with a kink: ReLU and its like, clamps, thresholds, ELU."""

from __future__ import annotations

import math
import operator

import torch
import torch.nn.functional as F
from torch import fx

from .reader import Gate, Unread, aten, reads

COMPUTED = Unread("clamp with computed bounds")


@reads(F.relu, F.relu_, torch.relu, torch.relu_, "relu", aten.relu, aten.relu_)
def relu(input, inplace=False):
    return Gate("relu", (input,))


@reads(F.leaky_relu, F.leaky_relu_, aten.leaky_relu, aten.leaky_relu_)
def leaky_relu(input, negative_slope=0.01, inplace=False):
    if negative_slope == 0:  # by any name
        return relu(input)
    return Gate("leaky_relu", (input,), {"negative_slope": negative_slope})


@reads(F.rrelu, F.rrelu_, torch.rrelu, torch.rrelu_, aten.rrelu, aten.rrelu_)
def rrelu(input, lower=1 / 8, upper=1 / 3, training=False, inplace=False):
    if training:
        return Unread("rrelu draws random slopes: training=True in the call")
    return leaky_relu(input, (lower + upper) / 2)


@reads(F.prelu, torch.prelu, "prelu", aten.prelu)
def prelu(input, weight):
    return Gate("prelu", (input, weight))


@reads(F.relu6, aten.relu6, aten.relu6_)
def relu6(input, inplace=False):
    return Gate("hardtanh", (input,), {"low": 0.0, "high": 6.0})


@reads(F.hardtanh, F.hardtanh_, aten.hardtanh, aten.hardtanh_)
def hardtanh(input, min_val=-1.0, max_val=1.0, inplace=False):
    if min_val == 0 and max_val in (None, math.inf):
        return relu(input)
    if max_val == 0 and min_val in (None, -math.inf):
        return Gate("negative_relu", (input,))
    if max_val in (None, math.inf) and min_val not in (None, -math.inf):
        return Gate("floor", (input,), {"low": min_val})
    if min_val in (None, -math.inf) and max_val not in (None, math.inf):
        return Gate("ceiling", (input,), {"high": max_val})
    return Gate("hardtanh", (input,), {"low": min_val, "high": max_val})


@reads(F.hardsigmoid, aten.hardsigmoid, aten.hardsigmoid_)
def hardsigmoid(input, inplace=False):
    return Gate("hardsigmoid", (input,))


@reads(torch.clamp, torch.clamp_, torch.clip, torch.clip_, "clamp", "clip", aten.clamp, aten.clamp_, aten.clip, aten.clip_)
def clamp(input, min=None, max=None):
    bounds = [bound for bound in (min, max) if bound is not None]
    if all(isinstance(bound, int | float) for bound in bounds):
        return hardtanh(input, min, max)
    if not all(isinstance(bound, fx.Node) for bound in bounds):
        return COMPUTED
    return maximum(input, min) if max is None else minimum(input, max) if min is None else between(input, min, max)


def between(input, low, high):
    return Gate("between", (input, low, high), fixed=True)


def bounded(call: Gate, *bounds: float) -> Gate | Unread:
    """The gate of a call whose bounds are tensors, each of one number everywhere."""
    low, high = {"maximum": (*bounds, None), "minimum": (None, *bounds), "between": bounds}[call.kind]  # type: ignore[misc]
    return clamp(call.tensors[0], low, high)


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
    if threshold == value == 0:
        return relu(input)
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


@reads(F.elu, F.elu_)
def elu(input, alpha=1.0, inplace=False):
    return aten_elu(input, alpha)


@reads(aten.elu, aten.elu_)
def aten_elu(input, alpha=1.0, scale=1.0, input_scale=1.0):
    if alpha == 0 and scale == 1:
        return relu(input)
    return Gate("elu", (input,), {"alpha": alpha, "output_scale": scale, "input_scale": input_scale})


@reads(F.selu, F.selu_, torch.selu, torch.selu_, aten.selu, aten.selu_)
def selu(input, inplace=False):
    # The constants of Klambauer et al., "Self-Normalizing Neural Networks", arXiv:1706.02515, as PyTorch rounds them.
    return Gate("elu", (input,), {"alpha": 1.6732632423543772, "output_scale": 1.0507009873554805, "input_scale": 1.0})


@reads(F.celu, F.celu_, torch.celu, torch.celu_, aten.celu, aten.celu_)
def celu(input, alpha=1.0, inplace=False):
    return Gate("elu", (input,), {"alpha": alpha, "output_scale": 1.0, "input_scale": 1 / alpha})
