"""Verification: is a rewritten graph the model's function, and under plain derivatives its gradient the model's own?

Both run once on the same call, forward and back. The graph runs with its rules switched off (`plain_derivatives`), so that
what it loses on the way back, such as the backward of an `autograd.Function`, is seen as a difference of gradients.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from ..capture.admission import FormError
from ..capture.arguments import ByName, Given
from ..capture.capture import Capture, CaptureError, blame, said
from ..capture.clones.apart import Apart, apart
from ..capture.clones.clone import EvalClone, call_signature
from ..capture.tracing.draws import DRAWS
from ..capture.tracing.schemas import frame_of, line_of
from ..containers import rebuilt, tensors_of
from ..gates.dual_path import plain_derivatives
from .runs import (
    GRADIENT,
    OUTPUT,
    Coarsest,
    Run,
    Runnable,
    Seen,
    beyond,
    distance,
    distances,
    first_line,
    gradients_of,
    leaves_of,
    one_seed,
    perturbed,
    ran,
    weights_of,
)

Verify = Literal[True, False, "forward"]

# Where outputs are not bitwise, a ReLU may open that the model's keeps shut: gradients may then differ by a gate.
GATE = 2e-2


def verified(capture: Capture, modules: nn.Module, graph: fx.Graph, call: Given, verify: Verify) -> list[str]:
    """Compares `graph`, rewritten over `modules`, with the model that was captured; returns notes for the reader of a report.

    `call` is what the model is called with; `verify` is True, or "forward" for the outputs alone. Models that draw random numbers
    are compared under one seed; the caller's random numbers go on where they were.

    Raises:
        CaptureError: they differ by more than rounding; the message names the first module whose output, or gradient, differs.
    """
    if not verify:
        return []
    subject = Subject(EvalClone(own_buffers=True)(modules), graph)
    back = verify is True
    return apart(capture.reference, lambda reference: verified_against(reference, subject, capture, call, back))


@dataclass(frozen=True)
class Subject:
    """What is compared with a model: a graph over modules, interpreted: to compile it for one run takes as long as the run."""

    modules: nn.Module
    graph: fx.Graph


def verified_against(model: Apart, subject: Subject, capture: Capture, call: Given, back: bool) -> list[str]:
    """`verified`, of the `subject` and a clone of the model."""
    signature = call_signature(model.module)
    of_model_weights, of_graph_weights = weights_of(model.module, subject.modules)

    def run_model(values: Given) -> Any:
        return model(*values.args, **values.kwargs)

    def run_graph(values: Given) -> Any:
        with model.before.restored(), plain_derivatives():
            return ByName(subject.modules, subject.graph).run_by_name(values.by_name(signature))

    of_model, of_graph = Runnable(run_model, of_model_weights), Runnable(run_graph, of_graph_weights)

    @functools.cache
    def coarsest(draws: bool) -> list[torch.dtype]:
        run = Coarsest(subject.modules, subject.graph)
        with model.before.restored(), one_seed(draws), torch.no_grad():
            run.run_by_name(leaves_of(call, ())[0].by_name(signature))
        return run.of_outputs

    def notes_of(draws: bool) -> list[str]:
        return compared(of_model, of_graph, model.module, subject, call, coarsest, capture.tracer, back, draws)

    draws = [note for note in capture.notes if note.startswith(DRAWS)]
    try:
        notes = notes_of(bool(draws))
    except CaptureError as error:  # perhaps of what it draws where no trace sees it
        if draws:
            raise CaptureError("; ".join([str(error), *draws])) from error
        notes = notes_of(True)
    changes = model.before.notes()
    if model.before.draws_own:  # whose numbers were the same in the trace, since it starts from the same state
        raise CaptureError(f"{changes[-1]}. Draw them from torch")
    if capture.asks:
        same_without_gradients(of_model, model.module, call, capture.asks)
    return [*notes, *changes]


def same_without_gradients(of_model: Runnable, reference: nn.Module, call: Given, asks: str) -> None:
    """Checks a model that asks whether gradients are on, at the lines `asks`.

    Raises:
        CaptureError: it computes other outputs where they are off.
    """
    on, off = (ran(of_model, call, False, True, grad).outputs for grad in (True, False))
    if any(beyond(apart, y.dtype, OUTPUT) for apart, y in zip(distances(off, on), on)):
        raise CaptureError(
            f"{type(reference).__name__} computes other outputs where gradients are off, and asks at {asks}: an explainer "
            "computes those of where they are on. Pass verify=False if these are the ones to explain"
        )


def own_error(model: nn.Module, call: Given) -> str:
    """What the model itself raises when it is called so, and where; "" where it runs."""

    def own(leaf: Any) -> Any:
        """A copy, but of what overlaps itself, as `expand` makes it: a write into that is an error of its own."""
        return leaf.clone() if isinstance(leaf, Tensor) and 0 not in leaf.stride() else leaf

    def error_of(clone: Apart) -> str:
        args, kwargs = rebuilt(call, own)
        with one_seed(True), torch.set_grad_enabled(True):  # as `verified` runs it
            try:
                clone(*args, **kwargs)
            except Exception as error:  # whatever it is
                return f"{said(error)} ({blame(error)})"
        return ""

    return apart(model, error_of)


def forgotten_axis(model: nn.Module, call: Given) -> str:
    """Says that the batch axis was forgotten, where the model fails on a call and runs once its tensors have one; or else ""."""
    tensors = tensors_of(call)
    if not any(t.is_floating_point() for t in tensors) or not all(t.dim() for t in tensors):
        return ""
    # A plain graph: an explainer's own call would ask this again.
    plain = fx.GraphModule(model, model.graph) if isinstance(model, fx.GraphModule) else model
    # In memory of their own, or an error of how they lie there, as of a write into an expanded tensor, would be taken for one.
    apart = rebuilt(call, lambda leaf: leaf.contiguous() if isinstance(leaf, Tensor) else leaf)
    # A batch of two: what is written for one row may run where there is one, as `h[:1].add_(h)` does.
    with_axis = rebuilt(call, lambda leaf: torch.stack([leaf, leaf]) if isinstance(leaf, Tensor) else leaf)
    try:
        if not own_error(plain, apart) or own_error(plain, with_axis):
            return ""
    except Exception:  # what cannot be run apart
        return ""
    got = ", ".join(str(list(t.shape)) for t in tensors)
    wanted = ", ".join(str([1, *t.shape]) for t in tensors)
    return f"the batch axis was forgotten: got {got}, where the model takes {wanted}; pass x[None], a batch of one"


def compared(
    of_model: Runnable, of_graph: Runnable, reference: nn.Module, subject: Subject,
    call: Given, coarsest: Callable[[bool], list[torch.dtype]], tracer: str, back: bool, draws: bool,
) -> list[str]:  # fmt: skip
    """`verified`, of the model and the graph as functions of the call.

    `coarsest(draws)` gives, for each output, the coarsest dtype that the graph computes it in, and runs it once more for that;
    `draws`: whether all are to draw the same random numbers.
    """
    graph, notes = f"the graph of {type(reference).__name__} by {tracer}", []
    own = None
    try:
        own = ran(of_model, call, back, draws)
    except RuntimeError as error:  # `torch.mul(a, b, out=c)` runs where nothing requires grad alone
        back = False
        notes.append(f"the model runs without gradients alone, so that gradients were not compared: {first_line(error)}")
    if own is None:
        own = ran(of_model, call, back, draws, grad=False)
    try:
        other = ran(of_graph, call, back, draws, grad=not notes)
    except (FormError, AssertionError):  # a call that the graph is not for, and says so
        raise
    except Exception as error:  # whatever the graph raises where the model does not
        raise CaptureError(f"{graph} raises where the model does not: {first_line(error)}") from error
    if own.drew:
        notes.append("the forward draws random numbers: the same call twice gives two outputs, and two maps")
    apart = distances(other.outputs, own.outputs)
    dtypes = [y.dtype for y in own.outputs]
    if any(beyond(a, dtype, OUTPUT) for a, dtype in zip(apart, dtypes)):
        dtypes = coarsest(draws)
    if len(apart) != len(own.outputs) or any(beyond(a, dtype, OUTPUT) for a, dtype in zip(apart, dtypes)):
        where = first_difference(of_model, of_graph, reference, subject, call)
        how_far = f"off by {max(apart, default=math.inf):.1e}"
        raise CaptureError(f"{graph} computes other outputs than the model, {how_far}; {where}. verify=False explains the graph")
    if any(apart):
        notes.append(f"outputs are the model's to {max(apart):.0e} (relative L2), not to the bit")
    if back and own.gradients is None:
        notes.append(f"the model's own backward fails, so that gradients were not compared: {own.reason}")
    elif back:
        if own.gradients and not any(map(torch.any, own.gradients)):
            notes.append("the model's own gradient is 0 on these inputs, so that the gradients say nothing")

        def bar_of(dtypes: Sequence[torch.dtype]) -> float:
            directed = [(dtype, a) for dtype, a, is_on in zip(dtypes, apart, own.directed) if is_on]
            bars = [GRADIENT.get(dtype, GRADIENT[torch.float32]) for dtype, _ in directed]
            return max(bars + [GATE for _, a in directed if a], default=0.0)

        bar, slope = bar_of(dtypes), slope_apart(other, own)
        if not slope <= bar:
            bar = bar_of(coarsest(draws))
        if not slope <= bar and other.gradients is not None:  # perhaps for a tie, whose winner is a matter of taste
            near = perturbed(call)
            slope = slope_apart(ran(of_graph, near, True, draws), ran(of_model, near, True, draws))
        if not slope <= bar:
            where = first_difference(of_model, of_graph, reference, subject, call, back=True)
            how_far = f"off by {slope:.1e}" if other.gradients is not None else f"which fails: {other.reason}"
            raise CaptureError(
                f"{graph} has another gradient than the model, {how_far}; {where}. verify='forward' explains the graph, "
                "with the maps that this gradient gives"
            )
    return notes


def slope_apart(found: Run, expected: Run) -> float:
    """Returns how far apart the gradients of two runs are; 0 where the difference, over all of the inputs, would not show in the
    float32 outputs that the gradients are of."""
    if found.gradients is None or expected.gradients is None:
        return 0.0 if found.gradients is expected.gradients else math.inf
    apart = distance(found.gradients, expected.gradients)
    if math.isfinite(apart):
        over = sum(float((a - b).double().norm()) for a, b in zip(found.gradients, expected.gradients)) * expected.reach
        sizes = (math.sqrt(y.numel()) for y, is_on in zip(expected.outputs, expected.directed) if is_on)
        if over <= 1e-7 * sum(sizes):  # gradients are of outputs of one size
            return 0.0
    return apart


def first_difference(
    of_model: Runnable, of_graph: Runnable, reference: nn.Module, subject: Subject, call: Given,
    back: bool = False,
) -> str:  # fmt: skip
    """Says at which module the graph first goes another way than the model: the first whose output differs; with `back`, the last
    whose output has another gradient, which is the first on the way back."""
    signature = call_signature(reference)
    calls: list[tuple[str, list[Tensor]]] = []
    handles = [
        module.register_forward_hook(lambda m, a, y, path=path: calls.append((path, tensors_of(y))))
        for path, module in reference.named_modules()
        if path
    ]
    seen = Seen(subject.modules, subject.graph)
    try:
        with one_seed(True), torch.set_grad_enabled(True):
            outputs = tensors_of(of_model.call(leaves_of(call, of_model.weights)[0]))
        with one_seed(True), torch.set_grad_enabled(True), plain_derivatives():
            others = tensors_of(seen.run_by_name(leaves_of(call, of_graph.weights)[0].by_name(signature)))
    except Exception as error:
        return f"it raises where the model does not: {first_line(error)}"
    finally:
        for handle in handles:
            handle.remove()
    numbers: dict[str, int] = {}
    pairs = []
    for path, values in calls:
        numbers[path] = numbers.get(path, 0) + 1
        if (path, numbers[path]) in seen.values:
            name = path if numbers[path] == 1 else f"{path}#{numbers[path]}"
            pairs.append((name, seen.values[path, numbers[path]], values))
    for name, found, expected in reversed(pairs) if back else pairs:
        if back:
            both = [(a, b) for a, b in zip(found, expected) if a.requires_grad and b.requires_grad]
            if len(both) < sum(b.requires_grad for b in expected):
                return f"at the output of {name} the graph has none"
            found = gradients_of(others, [a for a, _ in both], keep=True)
            expected = gradients_of(outputs, [b for _, b in both], keep=True)
        bars = GRADIENT if back else OUTPUT
        if len(found) != len(expected) or any(beyond(a, t.dtype, bars) for a, t in zip(distances(found, expected), expected)):
            at = called_at(subject.graph, name.partition("#")[0])
            return f"the first module that differs is {name}{at}{', by the gradient at its output' if back else ''}"
    return f"all of its modules agree: the difference is in the forward of {written_at(reference)} itself"


def called_at(graph: fx.Graph, path: str) -> str:
    """The line of the model that calls the module at `path`; "" where none is known."""
    calls = (node for node in graph.find_nodes(op="call_module", target=path) if frame_of(node) is not None)
    return next((f" ({line_of(node)})" for node in calls), "")


def written_at(module: nn.Module) -> str:
    """The class of a module, and where its forward is written."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return type(module).__name__ + (f" ({code.co_filename}:{code.co_firstlineno})" if code is not None else "")
