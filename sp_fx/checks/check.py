"""`sp_fx.check`: is an explainer's forward the model's, is its pullback an adjoint, does its report list every gate."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..capture.clones.apart import Apart, apart
from ..containers import cloned, tensors_of
from ..explainer import Explainer
from ..gates.adjoints.row import FROZEN
from ..gates.dual_path import dual_path
from ..gates.multihead import multihead_attention
from ..gates.table import KINKED
from ..targets import primary
from .coverage import dispatched, listed
from .frozen_network import FrozenTangents

Verdict = Literal["ok", "FAILED", "not applicable"]


@dataclass(frozen=True)
class Line:
    """One check, such as `Line("forward", "ok", 0.0, 0.0, "bitwise")`: `found` is the error, `bar` what it may be at most."""

    name: str
    verdict: Verdict
    found: float | None = None
    bar: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Checks:
    """What `check` returns, a line for each check; true where none failed. Printable."""

    model: str
    lines: tuple[Line, ...]

    @property
    def ok(self) -> bool:
        return all(line.verdict != "FAILED" for line in self.lines)

    def __bool__(self) -> bool:
        return self.ok

    def __getitem__(self, name: str) -> Line:
        return {line.name: line for line in self.lines}[name]

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("check", "verdict", "found", "at most", "")]
        for line in self.lines:
            numbers = ("" if n is None else f"{n:.2g}" for n in (line.found, line.bar))
            rows.append((line.name, line.verdict, *numbers, line.note))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        aligned = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths)), row[4]]).rstrip() for row in rows]
        return "\n".join([f"{self.model}: {'every check holds' if self else 'a check FAILED'}", *aligned])


def check(
    explainer: Explainer,
    inputs: Any,
    *,
    model: nn.Module | None = None,
    forward_kwargs: Mapping[str, Any] | None = None,
) -> Checks:
    """Check `explainer` on `inputs`, a tensor, a tuple of them, or a mapping of arguments, as its methods take them.

    - forward: its outputs are the model's, bit for bit; 1e-5 relative where PyTorch fuses attention.
    - affine identity: with every gate frozen the network is a linear map W(x) plus a constant, and its pullback nu of a direction
      u the transpose: <nu, x> = <u, W(x) x>. The right side is computed forwards, by another derivation of each gate.
    - tau -> 0: where only gates are rewritten whose hard form is piecewise linear, the map at tau = 1e-9 is the gradient.
    - coverage: the gating ATen ops that the model dispatches are those that the report lists, family by family.

    The second and the third run in float64 on a copy of the weights, which is dropped afterwards. `model` is what the explainer
    was made from, by default the very object.

    Raises:
        TypeError: `explainer` is no Explainer.
        ValueError: a copy, an unpickled explainer, or one that ends at an inner output does not know its model: pass one.
    """
    if not isinstance(explainer, Explainer):
        raise TypeError(f"expected what transform() returns, got a {type(explainer).__name__}")
    source = explainer.origin if model is None else model
    if source is None:
        raise ValueError("a copy of an explainer, or one cut at an output, does not know the model it should equal: pass model=")
    kwargs = dict(forward_kwargs or {})
    if isinstance(inputs, Mapping):
        call = inspect.signature(explainer.forward).bind(**inputs, **kwargs)
        inputs, kwargs = call.args, call.kwargs
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    with torch.inference_mode(False):

        def lines(clone: Apart) -> list[Line]:
            def in_double() -> Any:
                return clone.double()(*cloned(args, torch.float64), **cloned(kwargs, torch.float64))

            return [
                check_forward(explainer, clone, args, kwargs),
                where_it_runs("affine identity", in_double, check_affine_identity, explainer, args, kwargs),
                where_it_runs("tau -> 0", in_double, check_hard_limit, explainer, clone, args, kwargs),
                check_coverage(explainer, clone, args, kwargs),
            ]

        found = apart(source, lines, lambda clones: clones.with_hooks(source))
    return Checks(explainer.report().model, tuple(found))


def where_it_runs(name: str, in_double: Callable[[], Any], run: Callable[..., Line], *arguments: Any) -> Line:
    """Returns the line of `run(name, *arguments)`, or a "not applicable" one for a model that cannot be checked so: it does not
    run `in_double`, or an op of it has no forward-mode formula."""
    try:
        return run(name, *arguments)
    except RuntimeError as error:  # NotImplementedError is one
        message = str(error)
        if "modified by an inplace operation" in message:
            return Line(name, "not applicable", note="the model's own backward fails")
        if not isinstance(error, NotImplementedError) and "forward AD" not in message and "not implemented for" not in message:
            try:
                in_double()
            except RuntimeError:
                pass
            else:
                raise
        return Line(name, "not applicable", note=message.splitlines()[0][:120])


def check_forward(explainer: Explainer, clone: Callable[..., Any], args: tuple, kwargs: dict) -> Line:
    """The outputs of the explainer against those of `clone`, an eval clone of its model."""
    with torch.enable_grad():  # where nothing requires grad, PyTorch fuses transformer layers
        expected = [t.detach() for t in tensors_of(clone(*cloned(args), **cloned(kwargs)))]
        outputs = [t.detach() for t in tensors_of(explainer(*cloned(args), **cloned(kwargs)))]
    if [t.shape for t in outputs] != [t.shape for t in expected]:
        return Line("forward", "FAILED", note=f"shapes {[list(t.shape) for t in outputs]}, {[list(t.shape) for t in expected]}")
    if all(torch.equal(a, b) or ((a.isnan() == b.isnan()).all() and torch.equal(a.nan_to_num(), b.nan_to_num()))
           for a, b in zip(outputs, expected)):  # fmt: skip
        return Line("forward", "ok", 0.0, 0.0, "bitwise")
    pairs = [(a.double(), b.double()) for a, b in zip(outputs, expected) if b.numel()]
    error = max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs)
    fused = any(site.op == "MultiheadAttention" for site in explainer.report().sites)
    bar = 1e-5 if fused else 0.0
    return Line("forward", "ok" if error <= bar else "FAILED", error, bar, "PyTorch fuses attention" if fused else "")


def at_temperature(explainer: Explainer, tau: Any) -> Explainer:
    """Returns a float64 copy with every gate at `tau`; its attention uses the forward's weights, not tempered ones."""
    copied = copy.deepcopy(explainer).double()
    for node in copied.graph.nodes:
        if node.target in (dual_path, multihead_attention):
            node.kwargs = {**{k: v for k, v in node.kwargs.items() if k != "scale"}, "tau": tau}
            if node.args[0] == "mix":
                node.args = (*node.args[:2], None, *node.args[3:])
    copied.graph.eliminate_dead_code()
    copied.edited(copied.report(), compare=False)
    return copied


def direction(y: Tensor) -> Tensor:
    """Returns a direction of the output `y`, the same at every call."""
    return torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(0)).to(y.device)


def check_affine_identity(name: str, explainer: Explainer, args: tuple, kwargs: dict) -> Line:
    """<nu, x> = <u, W(x) x> on the frozen network: nu by its pullback, W(x) x by `FrozenTangents` with x as the tangent."""
    frozen, x, kw = at_temperature(explainer, FROZEN), cloned(args, torch.float64), cloned(kwargs, torch.float64)
    with torch.no_grad(), forward_ad.dual_level():
        inputs = tuple(forward_ad.make_dual(t, t.clone()) if t.is_floating_point() else t for t in x)
        arguments = inspect.signature(frozen.forward).bind(*inputs, **kw).arguments
        y, tangent = forward_ad.unpack_dual(primary(FrozenTangents(frozen).run_by_name(arguments)))
        y = y.clone()
        tangent = torch.zeros_like(y) if tangent is None else tangent.clone()
    if y.isnan().any():
        return Line(name, "FAILED", note="the model's output has NaN in it")
    u = direction(y)
    maps = frozen.pullback(x if len(x) > 1 else x[0], u, forward_kwargs=kw)
    pairs = [(m, t) for m, t in zip(maps if isinstance(maps, tuple) else (maps,), x) if m is not None]
    forwards, backwards = float((u * tangent).sum()), sum(float((m * t).sum()) for m, t in pairs)
    size = float((u * tangent).abs().sum()) + sum(float((m * t).abs().sum()) for m, t in pairs)
    error = abs(forwards - backwards) / max(size, 1e-30)
    kept = any(site.status != "rewritten" for site in explainer.report().sites)
    note = "what keeps its derivative by its tangent" if kept else ""
    return Line(name, "ok" if error <= 1e-9 else "FAILED", error, 1e-9, note)


def check_hard_limit(name: str, explainer: Explainer, clone: Apart, args: tuple, kwargs: dict) -> Line:
    """The map at tau = 1e-9 against the model's own gradient; only where every rewritten gate is of a `KINKED` kind."""
    signals = [site for site in explainer.report().of("rewritten") if not site.reason.startswith("steers")]
    others = sorted({site.kind for site in signals} - KINKED)
    if others:
        return Line(name, "not applicable", note=f"{', '.join(others)}: no such limit")
    x, kw = cloned(args, torch.float64), cloned(kwargs, torch.float64)
    leaves = [t.requires_grad_() if t.is_floating_point() else t for t in cloned(x)]
    y = primary(clone.double()(*[t * 1 if t.is_floating_point() else t for t in leaves], **cloned(kw)))
    if y.isnan().any():
        return Line(name, "FAILED", note="the model's output has NaN in it")
    u, explained = direction(y), [t for t in leaves if t.is_floating_point()]
    torch.autograd.backward(y, u)  # a reentrant checkpoint refuses `autograd.grad`
    expected = [t.grad for t in explained]
    maps = at_temperature(explainer, 1e-9).pullback(x if len(x) > 1 else x[0], u, forward_kwargs=kw)
    explained_maps = [m for m in (maps if isinstance(maps, tuple) else (maps,)) if m is not None]
    pairs = [(a, torch.zeros_like(a) if b is None else b) for a, b in zip(explained_maps, expected)]
    error = max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs)
    return Line(name, "ok" if error <= 1e-6 else "FAILED", error, 1e-6, "no pre-activation may be within 1e-8 of a kink")


def check_coverage(explainer: Explainer, clone: Callable[..., Any], args: tuple, kwargs: dict) -> Line:
    """The gating ops that `clone` dispatches against those that the report lists, family by family."""
    runs, rows = dispatched(clone, args, kwargs), listed(explainer.report())
    wrong = {family: (runs[family], rows[family]) for family in sorted({*runs, *rows}) if runs[family] != rows[family]}
    note = "; ".join(f"{family}: {a} dispatched, {b} listed" for family, (a, b) in wrong.items())
    left = len(explainer.report().of("NOT REWRITTEN"))
    note = note or f"{sum(runs.values())} gating ops, each listed" + (f", {left} NOT REWRITTEN" if left else "")
    return Line("coverage", "FAILED" if wrong else "ok", float(len(wrong)), 0.0, note)
