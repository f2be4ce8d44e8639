"""Calls of affine maps that have a row of the table."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F

from .reader import Gate, aten, per_axis, reads


@reads(F.linear, aten.linear)
def linear(input, weight, bias=None):
    return Gate("linear", (input, weight, bias))


def conv(axes: int) -> Callable[..., Gate | None]:
    def read(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        if padding == "valid":
            padding = 0
        if isinstance(padding, str):
            return None
        sizes = {"stride": stride, "padding": padding, "dilation": dilation}
        return Gate("conv", (input, weight, bias), {**{k: per_axis(v, axes) for k, v in sizes.items()}, "groups": groups})

    return read


reads(F.conv1d, aten.conv1d)(conv(1))
reads(F.conv2d, aten.conv2d)(conv(2))
reads(F.conv3d, aten.conv3d)(conv(3))
