"""Zennit's calling convention: an `Attributor`, called as `output, relevance = attributor(x, attr_output)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..explainer import Explainer
from ..targets import primary


class Attributor:
    """An explainer as Zennit's attributors are called: `output, relevance = attributor(x, attr_output)`, also as a context.

    `attr_output` is the direction of the output to pull back: a tensor shaped like it, or a callable from the output to one; by
    default that of the constructor, or the output itself, as in Zennit. `relevance` is the soft pullback.

    Raises:
        TypeError: `explainer` is no Explainer.
    """

    def __init__(self, explainer: Explainer, attr_output: Tensor | Callable[[Tensor], Tensor] | None = None) -> None:
        if not isinstance(explainer, Explainer):
            raise TypeError(f"expected what transform() returns, got a {type(explainer).__name__}")
        self.explainer, self.attr_output = explainer, attr_output

    def __call__(self, x: Tensor, attr_output: Tensor | Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
        direction = self.attr_output if attr_output is None else attr_output
        with torch.inference_mode(False), torch.enable_grad():
            leaf = x.detach().clone().requires_grad_()
            output = primary(self.explainer(leaf))
            u = output.detach() if direction is None else direction(output.detach()) if callable(direction) else direction
            (relevance,) = torch.autograd.grad(output, leaf, u)
        return output.detach(), relevance

    def __enter__(self) -> Attributor:
        return self

    def __exit__(self, *exception: Any) -> None:
        """Nothing was hooked, nothing is undone."""
