"""What the tables of `breadth_libraries.py` and `breadth_sequences.py` are made of."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ids(*shape: int, high: int = 60, seed: int = 0) -> Tensor:
    return torch.randint(3, high, shape, generator=torch.Generator().manual_seed(seed))


def of(module: str, name: str, *args: Any, x: tuple[int, ...] = (2, 3, 32, 32), **kwargs: Any) -> Callable[[], tuple]:
    """A function that builds the class `name` of `module`, for noise shaped `x`."""

    def build() -> tuple:
        return getattr(importlib.import_module(module), name)(*args, **kwargs).eval(), (noise(*x),)

    return build


class Part(nn.Module):
    """A model of which a forward is another function."""

    def __init__(self, model: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *args: Any) -> Any:
        return self.function(self.model, *args)
