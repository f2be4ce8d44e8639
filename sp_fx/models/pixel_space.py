"""The paper's input space: pixels in [-1, 1]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class PixelSpace(nn.Module):
    """`model` behind the normalisation `((x + 1) / 2 - mean) / std`, for inputs `x` [B, C, *spatial] in [-1, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float], axes: int = 2) -> None:
        super().__init__()
        parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        for name, values in (("mean", mean), ("std", std)):
            tensor = torch.tensor(values, dtype=torch.float64).to(parameter.device, parameter.dtype)
            self.register_buffer(name, tensor.view(-1, *[1] * axes), persistent=False)
        self.model = model
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        return self.model(((x + 1) / 2 - self.mean) / self.std)


def pixel_space(model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> nn.Module:
    """Returns `model`, which takes pixels in [0, 1] normalised by `mean` and `std` (one a channel), as a module of pixels in
    [-1, 1].

    Step sizes and bounds of `ascend` are then those of the paper: 20 in L2 at 3 x 224 x 224, bounds (-1, 1). The model is held,
    not changed or copied.

    Raises:
        ValueError: `mean` and `std` of different lengths, or a `std` that is not above 0.
    """
    if len(mean) != len(std) or not all(s > 0 for s in std):
        raise ValueError(f"expected one mean and one std above 0 for each channel, got mean={list(mean)}, std={list(std)}")
    return PixelSpace(model, mean, std)
