"""Affine maps: their exact adjoints, at no temperature.

    linear       v -> v W
    conv         v -> the transposed convolution of v with W
    affine_norm  v -> v gamma / sqrt(variance + eps)             a BatchNorm with running statistics

They are rows of the table only to keep less for the way back than autograd does, which saves their inputs: ResNet-50 at batch 4
keeps 260 MiB so (564 without these rows, 425 the model itself), and its pullback takes 0.83 of the time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .norms import per_channel
from .row import FROZEN, Row, Tau, wide


def linear_adjoint(v: Tensor, like: Tensor, weight: Tensor, bias: Tensor | None, tau: Tau) -> Tensor:
    """`v` [..., out] to [..., in]; of `like`, the forward's input, only shape and dtype count. A weight [in] makes no axis."""
    weight = weight.to(v.dtype)
    return (v @ weight if weight.dim() > 1 else v.unsqueeze(-1) * weight).to(like.dtype)


def conv(x, weight, bias, stride, padding, dilation, groups) -> Tensor:
    return (F.conv1d, F.conv2d, F.conv3d)[len(stride) - 1](x, weight, bias, stride, padding, dilation, groups)


def conv_adjoint(v, like, weight, bias, tau, stride, padding, dilation, groups) -> Tensor:
    """`v` [B, out, *spatial] to the shape of `like`, the forward's input; both may lack the batch axis."""
    output_padding = [0] * len(stride)
    batched = like.dim() == weight.dim()
    v, shaped = (v, like) if batched else (v[None], like[None])
    grad, _, _ = torch.ops.aten.convolution_backward(
        v, shaped.to(v.dtype), weight.to(v.dtype), None, stride, padding, dilation, False, output_padding, groups,
        [True, False, False],
    )  # fmt: skip
    return (grad if batched else grad[0]).to(like.dtype)


def affine_norm(x, mean, variance, gamma, beta, eps) -> Tensor:
    return F.batch_norm(x, mean, variance, gamma, beta, False, 0.0, eps)


def affine_norm_adjoint(v, like, mean, variance, gamma, beta, tau, eps) -> Tensor:
    return (v * per_channel(gamma, torch.rsqrt(wide(variance) + eps).view(1, -1, *[1] * (v.dim() - 2)))).to(like.dtype)


ROWS: dict[str, Row] = {
    "linear": Row(F.linear, linear_adjoint, FROZEN, tensors=3, forgets=True),
    "conv": Row(conv, conv_adjoint, FROZEN, tensors=3, forgets=True),
    "affine_norm": Row(affine_norm, affine_norm_adjoint, FROZEN, tensors=5, forgets=True),
}
