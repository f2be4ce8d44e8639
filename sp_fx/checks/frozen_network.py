"""The frozen network, run forwards: what it makes of a tangent, each gate derived otherwise than in the table of adjoints.

Freezing makes every gate the linear map that it is at its own input, such as multiplication by `z > 0` for a ReLU, or by the
forward's weights for attention. `check` compares these tangents with the explainer's pullback, its transpose.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.autograd import forward_ad

from ..capture.arguments import ByName
from ..containers import rebuilt, tensors_of
from ..gates.adjoints import smooth
from ..gates.adjoints.row import FROZEN
from ..gates.calls.autocast import under
from ..gates.dual_path import OPTIONS, dual_path
from ..gates.modules.multihead import multihead_attention
from ..gates.modules.recurrent import recurrent, steps
from ..gates.table import KINKED, TABLE, rule_of

SHARE = frozenset(smooth.ROWS)  # gates f(z) = z share(z): the share is f(z) / z


class FrozenTangents(ByName):
    """Runs a frozen explainer on dual numbers: PyTorch's forward mode for plain calls, `frozen_tangent` for gates."""

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple, dict]:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        if any(user.target is recurrent and user.args[0] is n for user in n.users):  # for its values alone
            args, kwargs = rebuilt((args, kwargs), lambda t: forward_ad.unpack_dual(t).primal if isinstance(t, Tensor) else t)
        return args, kwargs

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
        if target is recurrent:
            options = {k: v for k, v in kwargs.items() if k not in OPTIONS}
            soft = iter(tensors_of(steps(*args[1:], **options)))

            def dual(leaf: Any) -> Any:
                if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                    return leaf
                tangent = forward_ad.unpack_dual(next(soft)).tangent
                return leaf if tangent is None else forward_ad.make_dual(leaf, tangent)

            return rebuilt(args[0], dual)
        if target is dual_path:
            kind, operands = args[0], args[1 : 1 + TABLE[args[0]].tensors]
            options = {k: v for k, v in kwargs.items() if k not in OPTIONS}
            signal = operands[TABLE[kind].receives]
            primals = [None if t is None else forward_ad.unpack_dual(t).primal for t in operands]
            tangent = forward_ad.unpack_dual(signal).tangent
            y = under(kwargs.get("autocast", ()), TABLE[kind].forward, *primals, **options)
            t = None if tangent is None else frozen_tangent(kind, primals, y, tangent, options)
            return y if t is None else forward_ad.make_dual(y, t.to(y.dtype).expand(y.shape).clone())
        if target is multihead_attention:
            q, k, v = (forward_ad.unpack_dual(t) for t in args[:3])
            y, weights = multihead_attention(q.primal, k.primal, v.primal, *args[3:], **kwargs)
            if v.tangent is None:
                return y, weights
            # Affine in the values where the weights are frozen: a difference takes the biases off.
            ends = [multihead_attention(q.primal.clone(), k.primal.clone(), t, *args[3:], **kwargs)[0]
                    for t in (v.tangent, torch.zeros_like(v.tangent))]  # fmt: skip
            return forward_ad.make_dual(y, (ends[0] - ends[1]).clone()), weights
        if isinstance(target, torch._ops.OpOverload) and target.namespace not in OWN_FORMULAS:
            return by_differences(target, args, kwargs)
        return super().call_function(target, args, kwargs)


OWN_FORMULAS = ("aten", "prims")  # namespaces of ops that have a forward-mode formula, or raise where they have none


def by_differences(op: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
    """Calls an op of `torch.library` on dual numbers. Such an op has no place for a forward-mode formula, and PyTorch drops the
    tangents of its operands without a word: its differences are taken instead, which are exact of an affine map, as a product of
    grouped matrices is.

    Raises:
        NotImplementedError: it is no affine map of the operands that have a tangent.
    """
    moving = False

    def ends(k: int) -> Any:
        def moved(t: Any) -> Any:
            nonlocal moving
            if not isinstance(t, Tensor):
                return t
            primal, tangent = forward_ad.unpack_dual(t)
            moving |= tangent is not None
            return primal.clone() if tangent is None else primal + k * tangent

        return op(*rebuilt(args, moved), **rebuilt(kwargs, moved))

    middle = ends(0)
    if not moving or not any(y.is_floating_point() or y.is_complex() for y in tensors_of(middle)):
        return middle
    above, below = iter(tensors_of(ends(1))), iter(tensors_of(ends(-1)))

    def dual(y: Any) -> Any:
        if not isinstance(y, Tensor):
            return y
        up, down = next(above), next(below)
        if not (y.is_floating_point() or y.is_complex()):
            return y
        bend, size = (up + down - 2 * y).norm(), up.norm() + down.norm() + y.norm()
        if not bend <= 100 * torch.finfo(y.dtype).eps * size:
            raise NotImplementedError(f"{op} has no forward-mode formula, and is no affine map of its operands")
        return forward_ad.make_dual(y, (up - down) / 2)

    return rebuilt(middle, dual)


def frozen_tangent(kind: str, tensors: list, y: Tensor, t: Tensor, args: dict[str, Any]) -> Tensor | None:
    """Returns what the gate `kind`, frozen at its operands `tensors`, of which it made `y`, makes of the tangent `t`."""
    z = tensors[TABLE[kind].receives]
    if kind == "attention":
        return TABLE[kind].forward(*tensors[:2], t, tensors[3], **args)
    if kind == "mix":
        return TABLE[kind].forward(tensors[0], None, t, **args)
    if kind == "glu":
        return t.chunk(2, args["dim"])[0] * z.chunk(2, args["dim"])[1].sigmoid()
    if kind == "surrogate":
        return t
    if kind == "hardsigmoid":  # torch's own derivative has a sixth in float32
        return ((z + 3).sign() - (z - 3).sign()) / 12 * t
    if kind == "written":
        times, through = args.get("times", 1.0), args.get("through", 0.0)
        gated = frozen_tangent(args["row"], [z], (y - through * z) / times, t, dict(args.get("args", ())))
        return None if gated is None else times * gated + through * t
    if kind in SHARE:
        step = 1e-6
        near = (TABLE[kind].forward(z + step, **args) - TABLE[kind].forward(z - step, **args)) / (2 * step)
        return torch.where(z.abs() < step, near, y / torch.where(z == 0, 1.0, z)) * t
    if kind in STATISTICS:
        gamma = tensors[1] if len(tensors) > 1 else None
        return STATISTICS[kind](z, t, gamma, **args)
    if kind not in KINKED and rule_of(kind) not in KINKED and kind not in ("linear", "conv", "affine_norm"):
        return TABLE[kind].adjoint(t, z, *tensors[1:], tau=FROZEN, **args)  # a registered gate multiplies, by its own word
    # What is left is piecewise linear, or linear: its derivative. `z` may be expanded, which a dual number must not be.
    duals = [forward_ad.make_dual(z.contiguous(), t.clone()) if operand is z else operand for operand in tensors]
    return forward_ad.unpack_dual(TABLE[kind].forward(*duals, **args)).tangent


# -- normalisations, with their statistics held constant: (z, tangent, gamma, **options of the op) -> tangent


def times_gamma(t: Tensor, gamma: Tensor | None, channels: bool) -> Tensor:
    """`t` times `gamma`, which is one a channel (axis 1) or shaped like the last axes."""
    return t if gamma is None else t * (gamma.view(-1, *[1] * (t.dim() - 2)) if channels else gamma)


def by_variance(axes: Callable[[Tensor], Any]) -> Callable[..., Tensor]:
    """Returns the tangent of a norm that divides by the standard deviation over `axes(z)`."""
    return lambda z, t, gamma, eps: times_gamma(t / (z.var(axes(z), unbiased=False, keepdim=True) + eps).sqrt(), gamma, True)


def layer_norm(z: Tensor, t: Tensor, gamma: Tensor | None, normalized_shape: Any, eps: float) -> Tensor:
    axes = tuple(range(-len(normalized_shape), 0))
    return times_gamma(t / (z.var(axes, unbiased=False, keepdim=True) + eps).sqrt(), gamma, False)


def rms_norm(z: Tensor, t: Tensor, gamma: Tensor | None, normalized_shape: Any, eps: float | None) -> Tensor:
    root = torch.linalg.vector_norm(z, dim=tuple(range(-len(normalized_shape), 0)), keepdim=True)
    mean = root.square() * (1 / torch.Size(normalized_shape).numel())
    return times_gamma(t / (mean + (torch.finfo(z.dtype).eps if eps is None else eps)).sqrt(), gamma, False)


def group_norm(z: Tensor, t: Tensor, gamma: Tensor | None, num_groups: int, eps: float) -> Tensor:
    rows = z.reshape(z.shape[0], num_groups, -1)
    scaled = t.reshape(rows.shape) / (rows.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
    return times_gamma(scaled.reshape(z.shape), gamma, True)


def local_response_norm(z: Tensor, t: Tensor, gamma: None, size: int, alpha: float, beta: float, k: float) -> Tensor:
    squares = F.pad((z * z).transpose(1, -1), (size // 2, (size - 1) // 2)).unfold(-1, size, 1).sum(-1).transpose(1, -1)
    return t / (k + alpha / size * squares) ** beta


STATISTICS: dict[str, Callable[..., Tensor]] = {
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "group_norm": group_norm,
    "instance_norm": by_variance(lambda z: tuple(range(2, z.dim()))),
    "batch_norm": by_variance(lambda z: (0, *range(2, z.dim()))),
    "local_response_norm": local_response_norm,
    "normalize": lambda z, t, gamma, p, dim, eps: t / z.norm(p, dim, keepdim=True).clamp_min(eps),
}
