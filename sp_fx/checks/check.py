"""Checks that a user can run on an explainer: is it the model, is its adjoint one, is every gate accounted for."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..capture.clone import EvalClone
from ..containers import cloned, tensors_of
from ..explainer import Explainer
from ..gates.adjoints.row import FROZEN
from ..gates.dual import dual_path
from ..gates.multihead import multihead_attention
from ..targets import primary
from .coverage import dispatched, listed
from .frozen import HARD, Forwards

Verdict = Literal["ok", "FAILED", "not applicable"]


@dataclass(frozen=True)
class Line:
    """One check: what was found, what it may be at most, and what to know of it."""

    name: str
    verdict: Verdict
    found: float | None = None
    bar: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Checks:
    """The lines of a check; true where none failed. Printable."""

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
        told: list[tuple[str, ...]] = [("check", "verdict", "found", "at most", "")]
        for line in self.lines:
            numbers = ("" if n is None else f"{n:.2g}" for n in (line.found, line.bar))
            told.append((line.name, line.verdict, *numbers, line.note))
        widths = [max(len(row[i]) for row in told) for i in range(4)]
        rows = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths)), row[4]]).rstrip() for row in told]
        return "\n".join([f"{self.model}: {'every check holds' if self else 'a check FAILED'}", *rows])


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
        clone = EvalClone().with_hooks(source)

        def in_double() -> Any:
            return EvalClone().with_hooks(source).double()(*cloned(args, torch.float64), **cloned(kwargs, torch.float64))

        lines = [
            forward(explainer, clone, args, kwargs),
            guarded("affine identity", in_double, affine, explainer, args, kwargs),
            guarded("tau -> 0", in_double, limit, explainer, clone, args, kwargs),
            coverage(explainer, clone, args, kwargs),
        ]
    return Checks(explainer.report().model, tuple(lines))


def guarded(name: str, in_double: Callable[[], Any], run: Callable[..., Line], *given: Any) -> Line:
    """`run`, or a line that says that this model cannot be checked so: it does not run `in_double`, or an op of it has no
    forward-mode formula."""
    try:
        return run(name, *given)
    except RuntimeError as error:  # NotImplementedError is one
        told = str(error)
        if not isinstance(error, NotImplementedError) and "forward AD" not in told and "not implemented for" not in told:
            try:
                in_double()
            except RuntimeError:
                pass
            else:
                raise
        return Line(name, "not applicable", note=told.splitlines()[0][:120])


def forward(explainer: Explainer, clone: nn.Module, args: tuple, kwargs: dict) -> Line:
    with torch.enable_grad():  # where nothing requires grad, PyTorch fuses transformer layers
        expected = [t.detach() for t in tensors_of(clone(*cloned(args), **cloned(kwargs)))]
        found = [t.detach() for t in tensors_of(explainer(*cloned(args), **cloned(kwargs)))]
    if [t.shape for t in found] != [t.shape for t in expected]:
        return Line("forward", "FAILED", note=f"shapes {[list(t.shape) for t in found]}, {[list(t.shape) for t in expected]}")
    if all(torch.equal(a, b) or ((a.isnan() == b.isnan()).all() and torch.equal(a.nan_to_num(), b.nan_to_num()))
           for a, b in zip(found, expected)):  # fmt: skip
        return Line("forward", "ok", 0.0, 0.0, "bitwise")
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected) if b.numel()]
    error = max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs)
    fused = any(site.op == "MultiheadAttention" for site in explainer.report().sites)
    bar = 1e-5 if fused else 0.0
    return Line("forward", "ok" if error <= bar else "FAILED", error, bar, "PyTorch fuses attention" if fused else "")


def retempered(explainer: Explainer, tau: Any) -> Explainer:
    """A float64 copy whose gates are at `tau`; tempered weights of attention give way to the forward's."""
    other = copy.deepcopy(explainer).double()
    for node in other.graph.nodes:
        if node.target in (dual_path, multihead_attention):
            node.kwargs = {**{k: v for k, v in node.kwargs.items() if k != "scale"}, "tau": tau}
            if node.args[0] == "mix":
                node.args = (*node.args[:2], None, *node.args[3:])
    other.graph.eliminate_dead_code()
    other.recompile()
    return other


def direction(y: Tensor) -> Tensor:
    return torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(0)).to(y.device)


def affine(name: str, explainer: Explainer, args: tuple, kwargs: dict) -> Line:
    frozen, x, kw = retempered(explainer, FROZEN), cloned(args, torch.float64), cloned(kwargs, torch.float64)
    with torch.no_grad(), forward_ad.dual_level():
        inputs = tuple(forward_ad.make_dual(t, t.clone()) if t.is_floating_point() else t for t in x)
        y, moved = forward_ad.unpack_dual(primary(Forwards(frozen, kw).run(*inputs)))
        y = y.clone()
        moved = torch.zeros_like(y) if moved is None else moved.clone()
    u = direction(y)
    maps = frozen.pullback(x if len(x) > 1 else x[0], u, forward_kwargs=kw)
    pairs = [(m, t) for m, t in zip(maps if isinstance(maps, tuple) else (maps,), x) if m is not None]
    ahead, back = float((u * moved).sum()), sum(float((m * t).sum()) for m, t in pairs)
    size = float((u * moved).abs().sum()) + sum(float((m * t).abs().sum()) for m, t in pairs)
    error = abs(ahead - back) / max(size, 1e-30)
    kept = any(site.status != "rewritten" for site in explainer.report().sites)
    note = "what keeps its derivative by its tangent" if kept else ""
    return Line(name, "ok" if error <= 1e-9 else "FAILED", error, 1e-9, note)


def limit(name: str, explainer: Explainer, clone: nn.Module, args: tuple, kwargs: dict) -> Line:
    signals = [site for site in explainer.report().of("rewritten") if not site.reason.startswith("steers")]
    others = sorted({site.kind for site in signals} - HARD)
    if others:
        return Line(name, "not applicable", note=f"{', '.join(others)}: no such limit")
    x, kw = cloned(args, torch.float64), cloned(kwargs, torch.float64)
    reference = copy.deepcopy(clone).double()
    points = [t.requires_grad_() if t.is_floating_point() else t for t in cloned(x)]
    y = primary(reference(*[t * 1 if t.is_floating_point() else t for t in points], **cloned(kw)))
    u, explained = direction(y), [t for t in points if t.is_floating_point()]
    expected = torch.autograd.grad(y, explained, u, allow_unused=True)
    maps = retempered(explainer, 1e-9).pullback(x if len(x) > 1 else x[0], u, forward_kwargs=kw)
    found = [m for m in (maps if isinstance(maps, tuple) else (maps,)) if m is not None]
    pairs = [(a, torch.zeros_like(a) if b is None else b) for a, b in zip(found, expected)]
    error = max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs)
    return Line(name, "ok" if error <= 1e-6 else "FAILED", error, 1e-6, "no pre-activation may be within 1e-8 of a kink")


def coverage(explainer: Explainer, clone: nn.Module, args: tuple, kwargs: dict) -> Line:
    ran, told = dispatched(clone, args, kwargs), listed(explainer.report())
    wrong = {family: (ran[family], told[family]) for family in sorted({*ran, *told}) if ran[family] != told[family]}
    note = "; ".join(f"{family}: {a} dispatched, {b} listed" for family, (a, b) in wrong.items())
    left = len(explainer.report().of("NOT REWRITTEN"))
    note = note or f"{sum(ran.values())} gating ops, each listed" + (f", {left} NOT REWRITTEN" if left else "")
    return Line("coverage", "FAILED" if wrong else "ok", float(len(wrong)), 0.0, note)
