"""A row of the table of adjoints, and the temperatures that its formulas take.

A gate is a map `z -> A(z) z + b(z)` whose `A` the input chooses. Its *pullback* is `v -> A(z)^T v`, with nothing differentiated
through the choice. Its *soft* pullback replaces a hard `A` by the average of `A(z + tau eps)` over Gaussian `eps`, or, where the
gate is smooth already, by its own gain at temperature `tau`: Satkiewicz, Corizzo, Pietron, "Pulling Back the Curtain on Deep
Networks", arXiv:2507.22832. Kinds that the paper does not list follow the same two principles.

The families write `v` for the cotangent of a gate's output, `z` for its pre-activation, `tau` for the temperature. A temperature
is a number above 0, or a tensor of one number a sample that broadcasts (the soft adjoint), or `FROZEN`: the gate of the forward
pass itself, hard where it is hard, with which the network is an affine map of its input. Gates are computed in float32 at least.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

FROZEN: Literal["frozen"] = "frozen"
SMOOTH: Literal["smooth"] = "smooth"
Temperature = float | Literal["frozen", "smooth"]
Tau = float | Tensor | Literal["frozen", "smooth"]  # what a formula takes: one for all, or for each sample, or for its channels


@dataclass(frozen=True)
class Soft:
    """A temperature that says more than a number does: `Rules(relu=Soft(1.7, margin=0.4, scale="channel"))`.

    The gate is averaged over Gaussian noise of width `tau` round `-margin tau`, not round 0: of a ReLU it is
    `Phi(z / tau - margin)`. Evidence that is only just there then counts for little, as where a part of it is taken away.

    Attributes:
        tau: the temperature, above 0.
        margin: how far the noise lies below zero, in temperatures; 0 for the paper's gates.
        scale: what the temperature is in units of, "absolute", "sample", "channel" or "batch_norm": what the batch norm right
            before the gate says, from its running variance, weight and bias, of each channel. None is the `scale` of the rules.
        otherwise: with "batch_norm", the temperature of gates that no batch norm is right before; None is the same `tau` and
            margin in the `scale` of the rules.
    """

    tau: float
    margin: float = 0.0
    scale: Literal["absolute", "sample", "channel", "batch_norm"] | None = None
    otherwise: float | Soft | None = None


def first_tensor(z: Tensor, *steering: Tensor | None, **args: Any) -> Tensor:
    return z


@dataclass(frozen=True)
class Row:
    """One kind of gate.

    `forward(*tensors, **args)` is the model's own computation. `adjoint(v, *tensors, tau=..., **args)` maps the cotangent of its
    output to the cotangent of the one tensor that carries the signal, number `receives`. The other tensors (slopes, scales,
    queries, keys) steer the gate and receive nothing: of PReLU's `(z, slope)`, `z` does.
    """

    forward: Callable[..., Tensor]
    adjoint: Callable[..., Tensor | None]
    default: Temperature | Soft | None  # the temperature in `Rules()`, by a test; None is the op's plain derivative
    receives: int = 0
    tensors: int = 1
    sees_output: bool = False  # the adjoint takes the forward's output too, after the tensors
    homogeneous: bool = False  # its hard gate ignores the scale of `distance`, so its temperature may follow it
    distance: Callable[..., Tensor] = first_tensor  # of the pre-activation from the kink that opens the gate
    opens: int = 0  # 1 where it opens above that kink, -1 below: such a gate may have a margin
    forgets: bool = False  # the adjoint needs the shape of the first tensor, not its values
    rule: str = ""  # the kind in `Rules` that sets its temperature, where that has another name: "max_pool" for "amax"
    registered: bool = False  # by a user


def gain_row(forward: Callable[..., Tensor], gain: Callable[..., Tensor], default: Temperature | Soft, **facts: Any) -> Row:
    """A gate that multiplies: `v -> v * gain(z)`. `gain` takes the first tensor (wide), the others, the temperature and the
    arguments; `facts` are further fields of the row."""

    def adjoint(v: Tensor, z: Tensor, *steering: Tensor | None, tau: Tau, **args: Any) -> Tensor:
        return (v * gain(wide(z), *steering, tau=tau, **args)).to(z.dtype)

    return Row(forward, adjoint, default, **facts)


def wide(x: Tensor) -> Tensor:
    """At least float32: a gain with the 8 bits of bfloat16 would be coarser than the softening it stands for."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def cooled(z: Tensor, tau: Tau) -> Tensor:
    """The argument `z / tau` of a gain that is smooth already; its frozen gate is the one at tau = 1."""
    return z if isinstance(tau, str) else z / tau


def at_once() -> bool:
    """Whether calls only run here: nothing compiles, traces, batches or differentiates them. Only then may a shortcut look at
    values or write in place."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return not (torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack())
