"""Affine maps: their exact adjoints, at no temperature, and a smooth one of convolutions that step over places.

    linear       v -> v W
    conv         v -> the transposed convolution of v with W; SMOOTH, the mean of those of all grids of its stride
    affine_norm  v -> v gamma / sqrt(variance + eps)             a BatchNorm with running statistics

They are rows of the table only to keep less for the way back than autograd does, which saves their inputs: ResNet-50 at batch 4
keeps 260 MiB so (564 without these rows, 425 the model itself), and its pullback takes 0.83 of the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .norms import per_channel
from .row import FROZEN, SMOOTH, Row, Tau, wide


def linear_adjoint(v: Tensor, like: Tensor, weight: Tensor, bias: Tensor | None, tau: Tau) -> Tensor:
    """`v` [..., out] to [..., in]; of `like`, the forward's input, only shape and dtype count. A weight [in] makes no axis."""
    weight = weight.to(v.dtype)
    return (v @ weight if weight.dim() > 1 else v.unsqueeze(-1) * weight).to(like.dtype)


def conv(x, weight, bias, stride, padding, dilation, groups) -> Tensor:
    return (F.conv1d, F.conv2d, F.conv3d)[len(stride) - 1](x, weight, bias, stride, padding, dilation, groups)


def conv_adjoint(v, like, weight, bias, tau, stride, padding, dilation, groups) -> Tensor:
    """`v` [B, out, *spatial] to the shape of `like`, the forward's input; both may lack the batch axis."""
    exact = exact_conv_adjoint(v, like, weight, stride, padding, dilation, groups)
    return over_grids(exact, steps(weight.shape[2:], stride)) if tau == SMOOTH else exact


def leaves_checkerboard(weight: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether the adjoint of a convolution with weights of that shape, [out, in / groups, *kernel], reaches every second place
    more than the others, and nothing evens that out: where kernels overlap (patches do not), and see few channels each, as those
    of a depthwise convolution and the first one's. Of convolutions of many channels, and of larger steps, the mean over grids
    blurs more than it smooths: the zoo's CNN and its transformer, whose first step is 4, had less faithful maps by it."""
    return weight[1] <= FEW and max(steps(weight[2:], stride)) == 2


FEW = 4  # channels of a picture


def steps(kernel: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """The stride of each axis on which kernels overlap, 1 of the others."""
    return tuple(s if k > s else 1 for k, s in zip(kernel, stride))


def over_grids(grad: Tensor, stride: Sequence[int]) -> Tensor:
    """The cotangent `grad` [..., *spatial] of what a convolution of that stride reads, averaged over the grids it might have.

    A stride of s reads every s-th place, and its adjoint leaves a checkerboard of that period. The convolution of the input
    moved by -(s - 1), ..., s - 1 places would do as well; the mean of these adjoints, the cotangent being interpolated between
    them, is the filter (s - |i|) / s^2 of the adjoint. At a border the mean is over what there is.
    """
    pool: Any = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(stride) - 1]
    if max(stride) == 1:
        return grad
    first, second = [s // 2 for s in stride], [(s - 1) // 2 for s in stride]  # two boxes of s are the filter
    once = pool(grad, stride, 1, first, count_include_pad=False)
    return pool(once, stride, 1, second, count_include_pad=False)


def exact_conv_adjoint(v, like, weight, stride, padding, dilation, groups) -> Tensor:
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
    "conv": Row(conv, conv_adjoint, FROZEN, tensors=3, forgets=True),  # at tau = SMOOTH by the rule "stride"
    "affine_norm": Row(affine_norm, affine_norm_adjoint, FROZEN, tensors=5, forgets=True),
}
