"""`sp_fx.check`: is an explainer's forward the model's, is its pullback an adjoint, does its report list every gate."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..capture.arguments import Given
from ..capture.capture import Capture, CaptureError
from ..capture.clones.apart import Apart, apart
from ..capture.clones.clone import EvalClone, traceable
from ..containers import cloned, filled, rebuilt, tensors_of
from ..explainer import Explainer
from ..gates.adjoints.row import FROZEN
from ..gates.dual_path import plain_derivatives
from ..gates.table import KINKED
from ..measured.runs import OUTPUT, distance, first_line, one_seed
from ..measured.verification import verified
from ..methods.keyword_tensors import measured
from ..methods.requests import InputError, Request, misfit, naming_inputs
from ..targets import Target, as_target
from .coverage import dispatched, listed
from .frozen_network import FrozenTangents
from .question import Question, as_real, asked, draws, finite, mixes

Verdict = Literal["ok", "FAILED", "not applicable"]

ASKS = {  # what each check asks, as it prints
    "forward": "the outputs are the model's",
    "capture": "the plain gradient is the model's",
    "affine identity": "with frozen gates, the map is the transpose of the network",
    "tau -> 0": "as its gates harden, the map becomes the gradient",
    "samples": "the map of a sample does not depend on the others",
    "coverage": "each gating op that the model runs for its outputs is in the report",
}


@dataclass(frozen=True)
class Line:
    """One check, such as `Line("forward", "ok", 0.0, 0.0, "to the bit")`: `found` is the error, `bar` what it may be at most."""

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
        rows: list[tuple[str, ...]] = [("check", "verdict", "error", "at most", "what is asked")]
        for line in self.lines:
            numbers = ("" if n is None else f"{n:.2g}" for n in (line.found, line.bar))
            rows.append((line.name, line.verdict, *numbers, ASKS.get(line.name, "") + (f" ({line.note})" if line.note else "")))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        aligned = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths)), row[4]]).rstrip() for row in rows]
        return "\n".join([f"{self.model}: {'every check holds' if self else 'a check FAILED'}", *aligned])


def check(
    explainer: Explainer,
    inputs: Any,
    target: Target = None,
    *,
    model: nn.Module | None = None,
    forward_kwargs: Mapping[str, Any] | None = None,
    wrt: str | None = None,
) -> Checks:
    """Check `explainer` on `inputs`, a tensor, a tuple of them, or a mapping of arguments, as its methods take them.

    - forward: its outputs are the model's, bit for bit; 1e-5 relative where PyTorch fuses attention.
    - capture: under plain derivatives its gradient is the model's own, to rounding.
    - affine identity: with every gate frozen the network is a linear map W(x) plus a constant, and its pullback nu of a direction
      u the transpose: <nu, x> = <u, W(x) x>. The right side is computed forwards, by another derivation of each gate.
    - tau -> 0: where only gates are rewritten whose hard form is piecewise linear, the map at 1e-9 of a gate's own
      deviation is the gradient. At inputs that are moved a little, so that no ReLU is at 0 and no two numbers of a window are
      equal: there each hard gate is right.
    - samples: the map of a sample alone is its map in the batch, where its outputs are.
    - coverage: the gating ATen ops that the model dispatches on the way to its outputs are those that the report lists, family
      by family.

    All but the first two run in float64, on a copy of the weights that is dropped afterwards; in the model's own dtype, with a
    bar that fits it, where the graph has dtypes of its own.

    Args:
        target: what is explained, as for `Explainer.pullback`; of T targets for each sample, [B, T], their sum. None for a
            direction of all floating outputs.
        model: what the explainer was made from, by default the very object.
        forward_kwargs: keyword arguments of the model.
        wrt: the activation that maps are with respect to, in place of the inputs; where none of these floats, by default the
            embedding of the token ids.

    Raises:
        TypeError: `explainer` is no Explainer; inputs that the model does not take; a target of an unknown form.
        ValueError: a copy, an unpickled explainer, or one that ends at an inner output does not know its model: pass one; a `wrt`
            that names no activation; a target that does not fit.
    """
    if not isinstance(explainer, Explainer):
        raise TypeError(f"expected what transform() returns, got a {type(explainer).__name__}")
    source = explainer.origin if model is None else model
    if source is None:
        raise ValueError("a copy of an explainer, or one cut at an output, does not know the model it should equal: pass model=")
    args, kwargs = Request(inputs, forward_kwargs=forward_kwargs).arguments(explainer.forward)
    if reason := misfit(explainer.forward, args, kwargs):
        raise InputError(reason)
    target = as_target(target)
    with torch.inference_mode(False):
        explainer = explainer.for_call(*cloned(args), **cloned(kwargs))

        def lines(clone: Apart) -> list[Line]:
            found = [check_forward(explainer, clone, args, kwargs), check_capture(explainer, source, args, kwargs)]
            call = inspect.signature(explainer.forward).bind(*args, **kwargs)
            question = asked(explainer, call.args, call.kwargs, target, wrt)
            doubled = question.in_double() if question is not None else None
            for name, run in MAPS.items():
                if doubled is None:
                    found.append(Line(name, "not applicable", note="nothing floats: pass wrt= the name of an activation"))
                else:
                    line = where_it_runs(name, run, doubled)
                    at = f"with respect to {doubled.wrt}" if doubled.wrt else ""
                    found.append(replace(line, note="; ".join(filter(None, (line.note, at)))))
            return [*found, check_coverage(explainer, clone, args, kwargs)]

        with one_seed(draws(explainer)):  # the caller's random numbers go on where they were
            found = apart(source, lines, lambda clones: clones.with_hooks(source))
    return Checks(explainer.report().model, tuple(found))


def where_it_runs(name: str, run: Callable[[str, Question], Line], question: Question) -> Line:
    """Returns the line of a check; a "not applicable" one where an op of the graph has no forward-mode formula, or the model's
    own backward fails."""
    try:
        return run(name, question)
    except RuntimeError as error:  # NotImplementedError is one
        message = str(error)
        if "modified by an inplace operation" in message:
            return Line(name, "not applicable", note="the model's own backward fails")
        known = any(words in message for words in ("forward AD", "not implemented", "require derivatives"))
        if isinstance(error, NotImplementedError) or known:
            return Line(name, "not applicable", note=f"PyTorch cannot run it: {message.splitlines()[0][:120]}")
        raise


def check_forward(explainer: Explainer, clone: Callable[..., Any], args: tuple, kwargs: dict) -> Line:
    """The outputs of the explainer against those of `clone`, an eval clone of its model."""
    with torch.enable_grad():  # where nothing requires grad, PyTorch fuses transformer layers
        with one_seed(draws(explainer)), naming_inputs(explainer.forward, args, kwargs):
            expected = [t.detach() for t in tensors_of(clone(*cloned(args), **cloned(kwargs)))]
        with one_seed(draws(explainer)):
            outputs = [t.detach() for t in tensors_of(explainer(*cloned(args), **cloned(kwargs)))]
    if [t.shape for t in outputs] != [t.shape for t in expected]:
        return Line("forward", "FAILED", note=f"shapes {[list(t.shape) for t in outputs]}, {[list(t.shape) for t in expected]}")
    error = distance(outputs, expected)
    if error == 0:
        return Line("forward", "ok", 0.0, 0.0, "to the bit")
    fused = any(site.op == "MultiheadAttention" for site in explainer.report().sites)
    bar = 1e-5 if fused else 0.0
    note = "PyTorch runs the model's attention by a fused path" if fused else ""
    return Line("forward", "ok" if error <= bar else "FAILED", error, bar, note)


def check_capture(explainer: Explainer, source: nn.Module, args: tuple, kwargs: dict) -> Line:
    """The gradient of the graph under plain derivatives against that of the model."""
    reference = EvalClone()(traceable(source))
    report = explainer.report()
    capture = Capture(explainer, reference, explainer.graph, report.tracer, report.notes)
    try:
        notes = verified(capture, explainer, explainer.graph, Given(args, kwargs), True)
    except CaptureError as error:
        return Line("capture", "FAILED", note=str(error))
    return Line("capture", "ok", note="; ".join(notes))


def check_affine_identity(name: str, question: Question) -> Line:
    """<nu, x> = <u, W(x) x> on the frozen network: nu by its pullback, W(x) x by `FrozenTangents` with x as the tangent."""
    frozen = question.at_temperature(FROZEN)
    bar = question.bar()
    with warnings.catch_warnings(), torch.no_grad(), forward_ad.dual_level():
        warnings.filterwarnings("ignore", r".*torch\.jit\.script", FutureWarning)  # PyTorch's own, at its first dual number

        def dual(t: Any) -> Any:
            return forward_ad.make_dual(t, t.clone()) if isinstance(t, Tensor) and t.is_floating_point() else t

        by_name = replace(frozen, args=rebuilt(cloned(question.args), dual)).arguments
        with one_seed(frozen.draws):
            output = FrozenTangents(frozen.explainer).run_by_name(by_name)
        parts = [y for y in tensors_of(output) if y.is_floating_point()]
        if parts and not any(bool(forward_ad.unpack_dual(y).primal.isfinite().any()) for y in parts):
            return Line(name, "FAILED", note="nothing of the model's output is finite")
        tangent = forward_ad.unpack_dual(frozen.score(output)).tangent
        forwards = 0.0 if tangent is None else float(tangent)
    pairs = list(zip(frozen.maps(), question.explained))
    backwards = sum(float((m * t).sum()) for m, t in pairs)
    size = abs(forwards) + sum(float((m * t).abs().sum()) for m, t in pairs)
    error = abs(forwards - backwards) / max(size, 1e-30)
    kept = any(site.status != "rewritten" for site in question.explainer.report().sites)
    note = "calls that are not rewritten count with their own derivative" if kept else ""
    return Line(name, "ok" if error <= bar else "FAILED", error, bar, note)


def check_hard_limit(name: str, question: Question) -> Line:
    """The map at tau = 1e-9 against the gradient; only where every rewritten gate is of a `KINKED` kind."""
    signals = [site for site in question.explainer.report().of("rewritten") if "no signal passes" not in site.reason]
    others = sorted({site.kind for site in signals} - KINKED - {"stride"})
    if others:
        return Line(name, "not applicable", note=f"only of gates with a kink, as ReLU has; here there is {', '.join(others)}")
    near = question.nudged()
    with plain_derivatives():
        expected = near.maps()
    found = near.at_hard_limit().maps()
    bar = max(question.bar(), 1e-6)
    error = distance(found, expected)
    return Line(name, "ok" if error <= bar else "FAILED", error, bar, "at inputs moved a little, off every kink and tie")


def check_samples(name: str, question: Question) -> Line:
    """The maps of a batch against those of its samples one at a time."""
    explained, kwargs = question.explained, dict(question.kwargs)
    batch = explained[0].shape[0] if explained[0].dim() else 0
    if batch < 2 or question.target is not None or question.draws:
        why = (
            "one sample" if batch < 2 else "it draws random numbers" if question.draws else "asked only where no target is passed"
        )
        return Line(name, "not applicable", note=why)
    args = question.args if len(question.args) != 1 else question.args[0]
    request = Request(args, None, kwargs, batch_size=1)
    try:
        call = measured(question.explainer, request.call(question.explainer.forward), 1)
        pieces = [piece.apply(question.explainer, piece.explained) for piece in call.pieces(1)]
    except (ValueError, RuntimeError, TypeError, IndexError, AssertionError) as refusal:
        return Line(name, "not applicable", note=f"it does not run one sample at a time: {first_line(refusal)[:100]}")
    whole = tensors_of(call.apply(question.explainer, call.explained))
    parts = [torch.cat(ts) if all(t.dim() for t in ts) else None for ts in zip(*map(tensors_of, pieces))]
    bar, outputs_bar = max(question.bar(), 1e-7), max(question.bar(OUTPUT), 1e-7)
    along = [(as_real(a), as_real(b)) for a, b in zip(parts, whole) if a is not None and a.shape == b.shape]
    if len(along) < len(parts) or distance([a for a, _ in along], [b for _, b in along]) > outputs_bar:
        return Line(name, "not applicable", note="the model itself mixes the samples of a batch")
    maps = question.maps()
    drawn = torch.Generator().manual_seed(0)
    us = [torch.randn(y.shape, generator=drawn).to(y) for y in map(as_real, whole) if y.is_floating_point()]

    def score(i: int) -> Callable[[Any], Tensor]:
        def of(output: Any) -> Tensor:
            ys = [finite(y) for y in map(as_real, tensors_of(output)) if y.is_floating_point()]
            return sum((y * u[i : i + 1]).sum() for y, u in zip(ys, us))  # type: ignore[return-value]

        return of

    try:
        ones = [replace(question, args=filled(piece.skeleton, piece.values)[0], kwargs=piece.kwargs, target=score(i))
                for i, piece in enumerate(call.pieces(1))]  # fmt: skip
        alone = [one.maps() for one in ones]
    except (ValueError, RuntimeError, TypeError, IndexError) as refusal:
        return Line(name, "not applicable", note=f"it does not run one sample at a time: {first_line(refusal)[:100]}")
    error = distance([torch.cat(ms) for ms in zip(*alone)], maps)
    if error > bar and mixes(question, ones[0], batch, outputs_bar):
        return Line(name, "not applicable", error, bar, "values inside the model mix the samples of a batch")
    if error > bar and distance(question.rounded().maps(), maps) > error / 10:
        return Line(name, "not applicable", error, bar, "rounding the inputs changes the map as much: it is ill-conditioned here")
    return Line(name, "ok" if error <= bar else "FAILED", error, bar, f"{batch} samples, each alone and all together")


MAPS: dict[str, Callable[[str, Question], Line]] = {
    "affine identity": check_affine_identity,
    "tau -> 0": check_hard_limit,
    "samples": check_samples,
}


def check_coverage(explainer: Explainer, clone: Callable[..., Any], args: tuple, kwargs: dict) -> Line:
    """The gating ops that `clone` dispatches against those that the report lists, family by family."""
    report = explainer.report()
    whole = {site.op for site in report.sites if site.opaque}
    (runs, every), (fewest, rows) = dispatched(clone, args, kwargs, whole), listed(report)
    families = sorted({*every, *rows})
    # A gate whose result is dropped may be listed, and need not be.
    off = [family for family in families if fewest[family] > every[family] or runs[family] > rows[family]]
    wrong = {family: (runs[family] if runs[family] > rows[family] else every[family], rows[family]) for family in off}
    if not wrong:
        left = len(report.of("NOT REWRITTEN"))
        note = f"{sum(runs.values()) or 'none'} run" + (f", {left} NOT REWRITTEN" if left else "")
        return Line("coverage", "ok", 0.0, 0.0, note)
    notes = [f"{family}: {a} run, {b} in the report" for family, (a, b) in wrong.items()]
    notes += [f"the trace did not see into {site.op} at {site.place}: {site.remedy}" for site in report.sites if site.opaque]
    return Line("coverage", "FAILED", float(len(wrong)), 0.0, "; ".join(notes))
