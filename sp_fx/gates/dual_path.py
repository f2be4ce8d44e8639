"""Dual-path ops: the forward of a gate exactly, its backward by the table of adjoints.

One function, `dual_path(kind, *tensors, tau=..., **args)`, for every kind and every way that PyTorch differentiates:

- eager autograd, `torch.func` and `torch.compile` go through one `autograd.Function` in the form that all three take
  (`setup_context`, a generated vmap rule, and a forward of plain aten ops, which Inductor fuses with its neighbours);
- `torch.fx` records a call of `dual_path` itself, since a traced `Function` leaves only its forward behind;
- `torch.export` records the op `sp_fx::dual_path`, which keeps its adjoint in an exported graph for the same reason.
"""

from __future__ import annotations

import ast
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ..containers import decoded, encoded
from .adjoints.row import Temperature, at_once, wide
from .calls.autocast import Region, under
from .kernels import by_kernel
from .scale import by_batch_norm, deviation, distance_by_channel
from .table import TABLE

OPTIONS = ("tau", "scale", "margin", "autocast")  # of a call of `dual_path`; its other keywords are arguments of the row
GateSpec = tuple[str, Temperature, str, float, tuple[tuple[str, Any], ...]]  # kind, temperature, scale, margin, arguments


def dual_path(
    kind: str,
    *tensors: Tensor | None,
    tau: Temperature,
    scale: str = "absolute",
    margin: float = 0.0,
    autocast: Region = (),
    **args: Any,
) -> Tensor:
    """The forward of gate `kind` on `tensors`, differentiated by its adjoint at temperature `tau`.

    `kind` is a key of `table.TABLE`; `args` are that row's arguments (numbers, strings and tuples of them). `scale` says what the
    temperature is in units of: with "sample" each sample's standard deviation, with "channel" its and each channel's distance
    from the kink, measured on the way back; with "batch_norm" what `scale.moments_of_norm` says of its channels, one tensor more
    behind those of the row. `margin` is that of `Soft`. The forward is made under the `autocast` of the model's
    own region, if it is in one.
    """
    if has_torch_function(tensors):
        options = {**args, **({"autocast": autocast} if autocast else {}), **({"margin": margin} if margin else {})}
        return handle_torch_function(dual_path, tensors, kind, *tensors, tau=tau, scale=scale, **options)
    if autocast:
        return under(autocast, dual_path, kind, *tensors, tau=tau, scale=scale, margin=margin, **args)
    modulus = tensors[0] is not None and tensors[0].is_complex()  # is no gate, and keeps its derivative
    if modulus or is_plain():
        return TABLE[kind].forward(*tensors[: TABLE[kind].tensors], **args)
    gate = (kind, tau, scale, margin, tuple(args.items()))
    if torch.compiler._is_exporting_flag:  # is_exporting() itself is true of every compilation in torch 2.11's Dynamo
        padded = (*tensors, None, None, None, None)[:5]
        return torch.ops.sp_fx.dual_path(*padded, repr(encoded(gate)))
    return DualPath.apply(gate, *distinct(tensors))


class _Mode(threading.local):
    plain = False


_mode = _Mode()


def is_plain() -> bool:
    """Whether this thread is inside `plain_derivatives`."""
    return not torch.compiler.is_compiling() and _mode.plain


@contextmanager
def plain_derivatives() -> Iterator[None]:
    """While it lasts, dual-path calls of this thread keep their ops' plain derivatives, and `frozen` operands are no constants:
    a rewritten graph then has the gradient of the model that it was made from."""
    before, _mode.plain = _mode.plain, True
    try:
        yield
    finally:
        _mode.plain = before


def frozen(x: Tensor) -> Tensor:
    """`x` as a constant, by a rule: of a norm's statistics, say. Plain derivatives go through it."""
    if has_torch_function((x,)):
        return handle_torch_function(frozen, (x,), x)
    return x if is_plain() else x.detach()


def distinct(tensors: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """A view for every tensor that comes again: Dynamo refuses one tensor in two places of a `Function`, and self-attention
    without projections has it in three."""
    views: list[Tensor | None] = []
    for t in tensors:
        views.append(t.view_as(t) if t is not None and any(t is other for other in views) else t)
    return views


class DualPath(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(gate: GateSpec, *tensors: Tensor | None) -> Tensor:  # type: ignore[override]
        return exact(gate, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.gate, *tensors = inputs
        ctx.save_for_backward(*kept(ctx.gate, tensors, output))

    @staticmethod
    def backward(ctx: Any, v: Tensor):  # type: ignore[override]
        return None, *pullback(ctx.gate, v, ctx.saved_tensors)


def exact(gate: GateSpec, tensors: Sequence[Tensor | None]) -> Tensor:
    """The model's own forward."""
    kind, *_, args = gate
    output = TABLE[kind].forward(*tensors[: TABLE[kind].tensors], **dict(args))
    if at_once() and output._is_view():  # also of a result of its own: what a `Function` returns so, nobody may write over
        return torch.ops.aten._unsafe_view(output, output.shape)
    return output.view_as(output) if output is tensors[0] else output  # some ops return an empty input itself


def kept(gate: GateSpec, tensors: Sequence[Tensor | None], output: Tensor) -> list[Tensor | None]:
    """What the adjoint needs of the forward: its tensors, the first as a bare shape where the row forgets it, and its output."""
    row, saved = TABLE[gate[0]], list(tensors)
    if row.forgets and saved[0] is not None:
        saved[0] = saved[0].new_empty(()).expand(saved[0].shape)
    return [*saved, output] if row.sees_output else saved


def pullback(gate: GateSpec, v: Tensor, saved: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The cotangent of each tensor of a gate, from `v`, that of its output, and what `kept` saved."""
    row = TABLE[gate[0]]
    grads: list[Tensor | None] = [None] * (len(saved) - row.sees_output)
    cotangent = adjoint(gate, v, saved)
    if cotangent is not None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        cotangent = Once.apply(cotangent)
    grads[row.receives] = cotangent
    return grads


class Once(torch.autograd.Function):
    """A cotangent that cannot be differentiated. Autograd would go on from it through the soft adjoints a second time, where the
    derivative of a map has the model's own: for `create_graph=True` alone there is no right answer."""

    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor) -> Tensor:  # type: ignore[override]
        return v.view_as(v)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None: ...

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Tensor:  # type: ignore[override]
        raise RuntimeError(
            "a map cannot be differentiated: autograd has no second derivative of an explainer. Take differences of maps, or "
            "differentiate the model itself"
        )


def adjoint(gate: GateSpec, v: Tensor, saved: Sequence[Tensor | None]) -> Tensor | None:
    """The cotangent of the tensor that receives one, by a kernel where there is one, else by the table."""
    kind, tau, scale, margin, args = gate
    options, dtype = dict(args), saved[0].dtype  # type: ignore[union-attr]
    fitted: Any = tau
    if scale != "absolute" and not isinstance(tau, str):
        # Below 1e-7 of the scale a gate is hard in float32, and the reciprocal of a denormal is infinite.
        fitted = max(tau, 1e-7) * unit(kind, scale, saved, options)
    if scale == "batch_norm":
        saved = saved[: TABLE[kind].tensors]
    row = TABLE[options.get("row", kind)]
    if margin and row.opens and not isinstance(tau, str):
        saved = [wide(saved[0]) - row.opens * margin * fitted, *saved[1:]]  # type: ignore[arg-type]
    cotangent = by_kernel(kind, v, saved, fitted, dict(args))
    if cotangent is None:
        cotangent = TABLE[kind].adjoint(v, *saved, tau=fitted, **options)
    return cotangent if cotangent is None or not margin else cotangent.to(dtype)


def unit(kind: str, scale: str, saved: Sequence[Tensor | None], args: dict[str, Any]) -> Tensor:
    """What the temperature of a gate is in units of, by sample, by sample and channel, or by channel."""
    if scale == "batch_norm":
        places = [1] * (saved[0].dim() - 2)  # type: ignore[union-attr]
        mean, variance = (moment.view(1, -1, *places) for moment in saved[TABLE[kind].tensors])  # type: ignore[union-attr]
        return by_batch_norm(distance(kind, (mean, *saved[1:]), args), variance)
    away = distance(kind, saved, args)
    return deviation(away) if scale == "sample" else distance_by_channel(away)


def distance(kind: str, tensors: Sequence[Tensor | None], args: dict[str, Any]) -> Tensor:
    """How far the pre-activation of a gate is from the kink that opens it, like the first of its `tensors`."""
    if kind == "written":
        kind, tensors, args = args["row"], tensors[:1], dict(args.get("args", ()))
    row = TABLE[kind]
    return row.distance(*tensors[: row.tensors], **args)


def operands(gate: GateSpec) -> int:
    """The number of tensors that a gate takes."""
    return TABLE[gate[0]].tensors + (gate[2] == "batch_norm")


# Five tensors by name, since an optional tensor in a list gets no gradient.
@torch.library.custom_op(
    "sp_fx::dual_path", mutates_args=(), schema="(Tensor a, Tensor? b, Tensor? c, Tensor? d, Tensor? e, str gate) -> Tensor"
)
def exported(a: Tensor, b: Tensor | None, c: Tensor | None, d: Tensor | None, e: Tensor | None, gate: str) -> Tensor:
    spec = decoded(ast.literal_eval(gate))
    output = exact(spec, (a, b, c, d, e)[: operands(spec)])
    return output.clone() if spec[0] in ("written", "surrogate") else output  # an op may not return its input


def _exported_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *padded, gate = inputs
    ctx.gate = decoded(ast.literal_eval(gate))
    ctx.save_for_backward(*kept(ctx.gate, padded[: operands(ctx.gate)], output))


def _exported_backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
    grads = pullback(ctx.gate, v, ctx.saved_tensors)
    return (*grads, None, None, None, None)[:5] + (None,)


exported.register_fake(exported._init_fn)
exported.register_autograd(_exported_backward, setup_context=_exported_context)
