"""Triton kernels where an eager call runs on a GPU: one launch or two in place of a chain of passes over memory.

Every function here that computes returns None where no kernel does what it is asked; the caller then goes by the plain formulas.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .adjoints.row import at_once

POINTWISE = ("relu", "leaky_relu", "prelu", "hardtanh", "elu", "gelu", "silu", "hardswish", "mish")  # as in the kernels' GATES


@functools.cache
def triton_kernels() -> Any:
    """The Triton kernels, or None where triton is not installed."""
    try:
        import sp_fx_kernels
    except ImportError:
        return None
    return sp_fx_kernels


def reached(t: Tensor) -> bool:
    """Whether kernels take a tensor: on a GPU, in a dtype that they compute."""
    return t.is_cuda and t.dtype in (torch.float32, torch.float16, torch.bfloat16) and triton_kernels() is not None


def by_kernel(kind: str, v: Tensor, saved: Sequence[Tensor | None], tau: Any, args: dict[str, Any]) -> Tensor | None:
    """What the table's adjoint of `kind` returns, of the same arguments; `args` is used up."""
    if not (reached(v) and at_once()):
        return None
    z: Any = saved[0]
    if isinstance(tau, Tensor) and not tau.numel() == tau.shape[0] == z.shape[0]:  # a number for each channel, not each sample
        return None
    if kind in POINTWISE and v.shape == z.shape and z.dtype != torch.float64:
        if args.pop("rate", 1.0) != 1.0 or (kind == "prelu" and z.dim() < 2):
            return None
        return triton_kernels().gate_adjoint(kind, v, z, *saved[1:], tau=tau, **args)
    if kind == "max_pool" and z.dim() == 4:
        args.pop("ceil_mode")
        return triton_kernels().max_pool_adjoint(v, z, saved[1], tau=tau, **args)
    if kind in ("layer_norm", "rms_norm") and v.shape == z.shape:
        eps = torch.finfo(z.dtype).eps if args["eps"] is None else args["eps"]
        return triton_kernels().norm_adjoint(v, z, saved[1], args["normalized_shape"], eps=eps, centred=kind == "layer_norm")
    if kind == "attention":
        return attention_by_kernel(v, *saved[:4], tau, **args)  # type: ignore[call-arg]
    return None


def attention_by_kernel(v, q, k, value, mask, tau, is_causal=False, score_scale=None, enable_gqa=False) -> Tensor | None:
    """Where q, k, value and v agree in dtype and axes, heads are at most 128 wide, and no mask comes with `is_causal`."""
    one_kind = q.dtype == k.dtype == v.dtype == value.dtype and not (is_causal and mask is not None)
    heads = q.shape[:-3] == k.shape[:-3] if enable_gqa else q.shape[:-2] == k.shape[:-2]
    fits = q.dim() == k.dim() == v.dim() and heads and k.shape[:-1] == value.shape[:-1] and q.shape[:-1] == v.shape[:-1]
    if not (one_kind and fits and max(q.shape[-1], v.shape[-1]) <= 128):
        return None
    return triton_kernels().attention_adjoint(v, q, k, mask, tau=tau, is_causal=is_causal, scale=score_scale)


def ascent_step(x: Tensor, v: Tensor, start: Tensor, step: float, radius: float | None, bounds: Any) -> Tensor | None:
    """`x` moved by `step` along `v`, into the ball of `radius` round `start` and the bounds, which are numbers."""
    low, high = bounds or (None, None)
    if not (reached(x) and at_once() and v.dtype == x.dtype) or isinstance(low, Tensor) or isinstance(high, Tensor):
        return None
    return triton_kernels().ascent_step(x, v, start, step=step, radius=radius, low=low, high=high)
