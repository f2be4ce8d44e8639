"""What a row of the table of adjoints is, and the temperatures that its formulas are given.

A gate is a map `z -> A(z) z + b(z)` whose `A` the input chooses. Its *pullback* is `v -> A(z)^T v`, with nothing
differentiated through the choice. Its *soft* pullback replaces a hard `A` by the average of `A(z + tau eps)` over
Gaussian `eps`, or, where the gate is smooth already, by its own gain at temperature `tau`.
Formulas: Satkiewicz, Corizzo, Pietron, "Pulling Back the Curtain on Deep Networks", arXiv:2507.22832, and the same two
principles carried over to the kinds that the paper does not list.

A temperature is a positive number, or a tensor of them, one for each sample, that broadcasts (the soft adjoint), or `FROZEN` (the
gate of the forward pass itself, hard where it is hard, which makes the network an affine map of its input).
Gates are computed in float32 at least.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

FROZEN: Literal["frozen"] = "frozen"


Temperature = float | Literal["frozen"]


Tau = float | Tensor | Literal["frozen"]  # what a formula gets: a temperature, or one for each sample


def wide(x: Tensor) -> Tensor:
    """At least float32: a gain with the 8 bits of bfloat16 would be coarser than the softening it stands for."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def at_once() -> bool:
    """Whether what is computed now only runs: nothing traces, batches or differentiates it. Shortcuts are taken then."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return not (torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack())


@dataclass(frozen=True)
class Row:
    """One kind of gate.

    `forward(*tensors, **args)` is the model's own computation. `adjoint(v, *tensors, tau=..., **args)` maps the cotangent of
    its output to the cotangent of the one tensor that the signal came through, number `receives`; the other tensors
    (slopes, scales, queries, keys) steer the gate and receive nothing. `default` is the temperature in `Rules()`, which has it
    under the row's own name or that of `rule`.
    """

    forward: Callable[..., Tensor]
    adjoint: Callable[..., Tensor | None]
    default: Temperature
    receives: int = 0
    tensors: int = 1
    sees_output: bool = False  # the adjoint takes the forward's output too, after the tensors
    homogeneous: bool = False  # positively: its hard gate ignores the scale of the input, so its temperature may follow it
    forgets: bool = False  # the adjoint needs the shape of the first tensor, not its values
    rule: str = ""
    registered: bool = False  # by a user


def gain_row(forward: Callable[..., Tensor], gain: Callable[..., Tensor], default: Temperature, **facts: Any) -> Row:
    """A gate that multiplies: `v -> v * gain(z)`. `gain` takes the tensors (wide), the temperature and the arguments."""

    def adjoint(v: Tensor, z: Tensor, *steering: Tensor | None, tau: Tau, **args: Any) -> Tensor:
        return (v * gain(wide(z), *steering, tau=tau, **args)).to(z.dtype)

    return Row(forward, adjoint, default, **facts)


def cooled(z: Tensor, tau: Tau) -> Tensor:
    """The argument of a gain that is smooth already: frozen is tau = 1."""
    return z if isinstance(tau, str) else z / tau
