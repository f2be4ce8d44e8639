"""The scale of a pre-activation, which temperatures may follow: by sample, by sample and channel, or by a batch norm."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .adjoints.row import at_once, wide


def deviation(z: Tensor) -> Tensor:
    """The standard deviation of each sample over its own axes, [B, 1, ...]: the scale of a pre-activation.

    Biased (over n, not n - 1), within 1e-5 of its value in float32, also 1e5 deviations from zero and beside outliers; at least
    1e-30, so that a constant sample has a hard gate; 1 where it is not finite.
    """
    z, axes = wide(z), tuple(range(1, z.dim()))
    if not axes or 0 in z.shape[1:]:
        return z.new_full((*z.shape[:1], *[1] * len(axes)), 1e-30)
    if z.device.type == "cpu" and at_once():
        spread = from_moments(z).view(-1, *[1] * len(axes))
    else:
        # Two passes: the mean, then both moments about it, since it is off by a rounding of the offset. About anything else than
        # the mean, one value or one row, an outlier there costs 2 % of the deviation. Over the axes, not flattened: Inductor
        # follows any layout so, 0.1 against 5.3 ms for [4, 64, 56, 56]. Not by torch.var: 21 against 6 ms in eager mode, and
        # 3e-3 off where Inductor compiles it, 1e5 deviations from zero.
        centred = z - z.mean(axes, keepdim=True)
        mean, square = centred.mean(axes, keepdim=True), centred.square().mean(axes, keepdim=True)
        spread = (square - mean * mean).clamp_min(0).sqrt()
    return torch.where(spread.isfinite(), spread, 1.0).clamp_min(1e-30)


def distance_by_channel(away: Tensor) -> Tensor:
    """How far a pre-activation is from the kink in a sample and, beside it, in each of its channels, [B, C, 1, ...]: the root of
    the mean of the two mean squares of `away` [B, C, *places]; in the sample alone, [B, 1], where there are no places.

    At least 1e-30, so that a sample that is all at the kink has a hard gate; 1 where it is not finite.

    Of the sample alone, weak channels are all but linear and strong ones hard; of the channel alone, a channel that says nothing
    is as steep as one that does.
    """
    square = wide(away).square()
    places = tuple(range(2, square.dim()))
    if square.dim() < 2 or 0 in square.shape[1:]:
        return deviation(away)
    channel = square.mean(places, keepdim=True) if places else square.mean(1, keepdim=True)
    mean = (channel + channel.mean(1, keepdim=True)) / 2
    return torch.where(mean.isfinite(), mean, 1.0).sqrt().clamp_min(1e-30)


def by_batch_norm(away: Tensor, variance: Tensor) -> Tensor:
    """How far a pre-activation is from the kink by what the batch norm before the gate says: the root of the mean of two mean
    squares, that of its channel, `away`^2 + `variance`, and that of all channels. `away` is the distance of the channels' means;
    it and the variances broadcast with the pre-activation. At least 1e-30; 1 where it is not finite.
    """
    square = wide(away).square() + wide(variance)
    mean = (square + square.mean(tuple(range(1, square.dim())), keepdim=True)) / 2
    return torch.where(mean.isfinite(), mean, 1.0).sqrt().clamp_min(1e-30)


def moments_of_norm(
    variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, factor: float = 1.0, shift: float = 0.0
) -> Tensor:
    """The mean and the variance of each channel of `factor` times the output of a batch norm plus `shift`, [2, C], over data of
    its running `variance` v [C]: of the output itself the bias b, and g^2 v / (v + eps) with the weight g.

    In float32 at least, since half types hold no square of a weight above 255.
    """
    if has_torch_function((variance,)):
        return handle_torch_function(moments_of_norm, (variance,), variance, weight, bias, eps, factor=factor, shift=shift)
    variance = wide(variance)
    gain = factor * (1.0 if weight is None else wide(weight))
    within = variance / (variance + eps) * gain * gain
    mean = torch.zeros_like(within) if bias is None else wide(bias).to(within.dtype)
    return torch.stack((factor * mean + shift, within))


def from_moments(z: Tensor) -> Tensor:
    """The standard deviation of each sample [B]: from the moments about zero where their difference does not cancel, else from
    those of the centred sample, divided by its largest magnitude.

    For CPU alone, since to ask whether it cancels would stall a GPU. [4, 64, 112, 112] takes 1.2 ms, and the centred values 7.
    """
    flat = z.permute(0, *sorted(range(1, z.dim()), key=z.stride, reverse=True)).flatten(1)  # as it lies in memory: a view
    mean, square = moments(flat)
    variance = square - mean * mean
    if bool(((variance > 0.1 * square) & (square > 1e-20)).all()):  # neither cancelled, nor infinite, nor lost in denormals
        return variance.sqrt()
    centred = flat - mean[:, None]
    peak = torch.linalg.vector_norm(centred, math.inf, dim=1)
    peak = torch.where(peak > 0, peak, 1)
    mean, square = moments(centred / peak[:, None])
    return peak * (square - mean * mean).clamp_min(0).sqrt()


BLOCK = 4096  # numbers that are summed in one row


def moments(flat: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the mean square of each row of `flat` [B, N]. PyTorch's norm adds up a row from left to right, and is 1e-5 off
    for 800,000 numbers: the norm of the norms of blocks is not."""
    whole = flat.shape[1] // BLOCK * BLOCK
    blocks = torch.linalg.vector_norm(flat[:, :whole].unflatten(1, (-1, BLOCK)), dim=2)
    rest = torch.linalg.vector_norm(flat[:, whole:], dim=1, keepdim=True)
    norm = torch.linalg.vector_norm(torch.cat([blocks, rest], 1), dim=1) / math.sqrt(flat.shape[1])
    return flat.mean(1), norm * norm
