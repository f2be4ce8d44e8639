"""Normalisations: their statistics are constants, and the way back multiplies by the gain that they leave.

    layer_norm, group_norm, instance_norm, batch_norm  v gamma / sqrt(var(z) + eps)     arXiv:2507.22832
    rms_norm                                           v gamma / sqrt(mean(z^2) + eps)  arXiv:2507.22832
    local_response_norm                                v (k + alpha mean(z^2))^-beta    mean over near channels; same principle
    normalize                                          v / max(|z|_p, eps)              same principle
    cosine_similarity                                  of x and y: v y / (|x| |y|), v x / (|x| |y|)    same principle

No temperature: frozen, or the plain derivative. `batch_norm` is the one by the batch's own statistics; with running ones it is
affine. `gamma` is 1 where a norm has none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .row import FROZEN, Row, gain_row, wide


def layer_norm(x, gamma, beta, normalized_shape, eps):
    return F.layer_norm(x, normalized_shape, gamma, beta, eps)


def layer_norm_gain(x, gamma, beta, tau, normalized_shape, eps):
    rstd = rstd_over(x, last_axes(normalized_shape), eps)
    return rstd if gamma is None else rstd * wide(gamma)


def rms_norm(x, gamma, normalized_shape, eps):
    return F.rms_norm(x, normalized_shape, gamma, eps)


def rms_norm_gain(x, gamma, tau, normalized_shape, eps):
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    rrms = torch.rsqrt(x.square().mean(last_axes(normalized_shape), keepdim=True) + eps)
    return rrms if gamma is None else rrms * wide(gamma)


def group_norm(x, gamma, beta, num_groups, eps):
    return F.group_norm(x, num_groups, gamma, beta, eps)


def group_norm_gain(x, gamma, beta, tau, num_groups, eps):
    grouped = x.reshape(x.shape[0], num_groups, x.shape[1] // num_groups, *x.shape[2:]).flatten(2)
    rstd = rstd_over(grouped, [-1], eps).repeat_interleave(x.shape[1] // num_groups, 1)  # [B, C, 1]
    return per_channel(gamma, rstd.reshape(*x.shape[:2], *[1] * (x.dim() - 2)))


def instance_norm(x, gamma, beta, eps):
    return F.instance_norm(x, None, None, gamma, beta, True, 0.1, eps)


def instance_norm_gain(x, gamma, beta, tau, eps):
    return per_channel(gamma, rstd_over(x, range(2, x.dim()), eps))


def batch_norm(x, gamma, beta, eps):
    return F.batch_norm(x, None, None, gamma, beta, True, 0.1, eps)


def batch_norm_gain(x, gamma, beta, tau, eps):
    return per_channel(gamma, rstd_over(x, [0, *range(2, x.dim())], eps))


def local_response_norm_gain(x, tau, size, alpha, beta, k):
    squares = F.pad(x.square().movedim(1, -1), (size // 2, (size - 1) // 2))
    return (k + alpha * squares.unfold(-1, size, 1).mean(-1).movedim(-1, 1)) ** -beta


def normalize_gain(x, tau, p, dim, eps):
    return 1 / torch.linalg.vector_norm(x, p, dim, keepdim=True).clamp_min(eps)


def frozen_cosine(x: Tensor, y: Tensor, dim: int, eps: float) -> Tensor:
    """`sum(x y) / (max(|x|, eps) max(|y|, eps))` over `dim`, the norms constants."""
    lengths = [torch.linalg.vector_norm(t, dim=dim).clamp_min(eps).detach() for t in (x, y)]
    return (x * y).sum(dim) / (lengths[0] * lengths[1])


def rstd_over(x: Tensor, axes: Sequence[int], eps: float) -> Tensor:
    """`1 / sqrt(var(x) + eps)` over `axes`, which stay with size 1."""
    axes = tuple(axes)
    return torch.rsqrt((x - x.mean(axes, keepdim=True)).square().mean(axes, keepdim=True) + eps)  # torch.var is slow on CPU


def last_axes(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(range(-len(shape), 0))


def per_channel(gamma: Tensor | None, rstd: Tensor) -> Tensor:
    """`rstd` [B, C, 1, ...] times `gamma` [C]."""
    return rstd if gamma is None else rstd * wide(gamma).view(-1, *[1] * (rstd.dim() - 2))


ROWS: dict[str, Row] = {
    "layer_norm": gain_row(layer_norm, layer_norm_gain, FROZEN, tensors=3),
    "rms_norm": gain_row(rms_norm, rms_norm_gain, FROZEN, tensors=2),
    "group_norm": gain_row(group_norm, group_norm_gain, FROZEN, tensors=3),
    "instance_norm": gain_row(instance_norm, instance_norm_gain, FROZEN, tensors=3),
    "batch_norm": gain_row(batch_norm, batch_norm_gain, FROZEN, tensors=3),
    "local_response_norm": gain_row(F.local_response_norm, local_response_norm_gain, FROZEN),
    "normalize": gain_row(lambda x, p, dim, eps: F.normalize(x, p, dim, eps), normalize_gain, FROZEN),
}
