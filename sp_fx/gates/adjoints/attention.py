"""Attention: the signal goes back through the values only. Queries, keys and the weights that they make are constants.

    attention  v -> softmax((q k^T scale + mask) / tau)^T v                 arXiv:2507.22832

Of attention that a model writes out the weights are constants (`dual_path.frozen`), and the product of the weights with the
values is the row `mix`, `v -> softmax(scores / tau)^T v`. Frozen is tau = 1.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .row import FROZEN, Row, Tau, cooled, wide


def attention(q, k, value, mask, is_causal=False, score_scale=None, enable_gqa=False) -> Tensor:
    # The mask goes in as it came: detached, another CPU kernel would be chosen and the last bits would differ.
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


def is_tempered(tau: Tau) -> bool:
    """Whether the weights of attention at this temperature are others than the forward's."""
    return tau not in (1, FROZEN)


def tempered_softmax(scores: Tensor, tau: Tau, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    """`softmax(scores / tau)` over `dim`; a slice that is -inf throughout gives 0, and masks of finfo.min may not overflow."""
    scores = scores if dtype is None else scores.to(dtype)
    return torch.softmax(tempered(scores, tau), dim) * alive(scores, dim)


def alive(scores: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Whether a slice over `dim` is not masked throughout, by -inf; `dim` stays with size 1."""
    return (wide(scores) > -math.inf).any(dim, keepdim=True)


def tempered(scores: Tensor, tau: Tau) -> Tensor:
    """`scores / tau`, finite."""
    scores = wide(scores)
    lowest = torch.finfo(scores.dtype).min
    return cooled(scores, tau).clamp(lowest, -lowest)


def tempered_below(scores: Tensor, tau: Tau, dim: int | tuple[int, ...], sign: int) -> Tensor:
    """`scores / tau` less its largest over `dim`, or its smallest where the softmax is of the negative, `sign` -1: the softmax is
    the same, and no exponential overflows."""
    cool = tempered(scores, tau)
    if not cool.numel():
        return cool
    return cool - (cool.amax(dim, keepdim=True) if sign > 0 else cool.amin(dim, keepdim=True))


def tempered_groups(scores: Tensor, tau: Tau, sign: int) -> Tensor:
    """`scores / tau` for a softmax over groups, lowered until no exponential overflows: by one number for all, as the groups are
    known to the model alone."""
    cool = tempered(scores, tau)
    if not cool.numel():
        return cool
    return cool - (cool.amax().clamp_min(0) if sign > 0 else cool.amin().clamp_max(0))


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


ROWS: dict[str, Row] = {
    "attention": Row(attention, attention_adjoint, 1.0, receives=2, tensors=4),
    "mix": Row(mix, mix_adjoint, 1.0, receives=2, tensors=3),
}
