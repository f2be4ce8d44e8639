"""From a model to its explainer: `transform`, which takes the capture that sees the most of it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from .capture.arguments import bound
from .capture.capture import Capture, CaptureError, tracing
from .capture.clone import NOT_RUN, traceable
from .capture.exported import batch_sizes, export
from .capture.symbolic import trace
from .capture.untouched import Untouched
from .containers import cloned, tensors_of
from .explainer import Explainer
from .gates.rules import Rules
from .methods.subgraphs import ending_at, within
from .rewrite.report import Report
from .rewrite.rewrite import rewrite


def transform(
    model: nn.Module,
    *,
    rules: Rules | None = None,
    tracer: Literal["auto", "fx", "export"] = "auto",
    example_inputs: Any = None,
    output: str | None = None,
    strict: bool = False,
) -> Explainer:
    """An explainer of `model`. Neither this nor any use of the explainer changes the model, except that a write into the weights
    of one is seen by the other: they share their storage.

    The explainer is in eval mode. Updating the weights in place (an optimiser step, `load_state_dict`) updates it too, while
    replacing them (`model.half()`, `model.to(...)`) leaves it as it was. Compiled, DataParallel and DistributedDataParallel
    models are unwrapped. Explainers may be used by any number of threads, also while another one transforms or compiles, but for
    a transform by `torch.export`, which patches PyTorch for all of them.

    Args:
        model: any module that one of the tracers can capture.
        rules: the temperatures; `Rules()` where None.
        tracer: "fx" traces the forward symbolically, for inputs of every size; "export" follows it on the example by
            `torch.export`, which fixes all sizes but the batch and sees through functions that are opaque to a symbolic trace.
            "auto" takes the second where the first fails or leaves something opaque, if there is an example. The report says
            which it was.
        example_inputs: what the model may be called with: a tensor, a tuple of positional arguments, or a mapping of keyword
            arguments. Arguments that it leaves out keep their defaults.
        output: the name of an inner activation that is to be the explainer's output, so that a neuron, a channel or any direction
            of it can be the target: a module's (`"layer4.1.conv2"`, `"layer4"`) or a gate's place as the report prints it.
        strict: raise where a call that gates, or may, has no rule, instead of warning.

    Raises:
        TypeError: `model` is no `nn.Module`, has no Python source (TorchScript), or is an explainer already; its forward does
            not take the `example_inputs`.
        CaptureError: the model cannot be captured.
        NotRewrittenError: with `strict`, calls that gate have no rule.
        ValueError: `rules` has an override that fits no gate; an unknown tracer; "export" without an example; an `output` that
            names no activation, with the nearest names.

    Warns:
        UserWarning: calls that gate, or may, were not rewritten; there is nothing to rewrite at all; the model has forward hooks,
            which an explainer does not run.
    """
    if rules is not None and not isinstance(rules, Rules):
        raise TypeError(f"rules is a sp_fx.Rules, such as Rules.paper(), or None, got {rules!r}")
    if isinstance(model, Explainer):
        raise TypeError("got an Explainer: transform the model it was made from, with the rules you want")
    if tracer not in ("auto", "fx", "export"):
        raise ValueError(f"tracer is 'auto', 'fx' or 'export', got {tracer!r}")
    if tracer == "export" and example_inputs is None:
        raise ValueError("tracer='export' follows the forward on an example: pass example_inputs")
    with tracing, torch.inference_mode(False):
        rules = Rules() if rules is None else rules
        capture, report = rewritten(model, rules, tracer, example_inputs)
        graph = capture.graph
        rules.check_places(report.sites)
        if output is not None:
            graph = ending_at(capture.modules, graph, output)
            report = within(report, graph)
        rules.check_scales(report.sites)
        if unrun := [note for note in report.notes if note.endswith(NOT_RUN)]:
            warnings.warn("; ".join(unrun[:3]) + ("; ..." if len(unrun) > 3 else ""), stacklevel=2)
        left = report.of("NOT REWRITTEN")
        if left and strict:
            heading = f"{len(left)} calls that gate, or may, have no rule; sp_fx.register_gate gives one to your own:"
            raise NotRewrittenError("\n".join([heading, *map(str, left), *report.notes]))
        if left:
            listed = "; ".join(f"{site.op} at {site.place} ({site.reason})" for site in left[:3])
            notes = "".join(f". {note}" for note in report.notes)
            warnings.warn(
                f"{len(left)} calls of {report.model} were NOT REWRITTEN and keep their plain derivative: {listed}"
                f"{'; ...' if len(left) > 3 else ''}{notes}. report() lists them all",
                stacklevel=2,
            )
        elif not report.of("rewritten"):
            warnings.warn(f"{report.model} has no gate to rewrite: its pullback will be the plain gradient", stacklevel=2)
        report = replace(report, notes=(*report.notes, *own_names(capture.modules, graph, report)))
        explainer = Explainer(capture.modules, graph, report)
        explainer.__dict__["_origin"] = model if output is None else None  # no submodule of it; the weights are shared anyway
        return explainer


def rewritten(model: nn.Module, rules: Rules, tracer: str, example_inputs: Any) -> tuple[Capture, Report]:
    """The capture of `model`, rewritten, by the tracer that sees the most of it."""
    inner = traceable(model)
    example = None if example_inputs is None else bound(inner, example_inputs)
    if tracer == "export":
        return by_export(model, example, rules)  # type: ignore[arg-type]
    try:
        capture, report = by_symbolic_trace(model, example, rules)
    except CaptureError as error:
        if tracer == "fx":
            raise
        if example is None:
            raise CaptureError(f"{error}. With example_inputs, torch.export is tried, which follows one path") from error
        try:
            return by_export(model, example, rules)
        except CaptureError as second:
            raise CaptureError(f"{error}\n{second}") from second
    opaque = [site for site in report.sites if site.opaque]
    if tracer == "fx" or not opaque:
        return capture, report
    if example is None:
        note = "what is opaque here, torch.export may see through: pass example_inputs"
        return capture, replace(report, notes=(*report.notes, note))
    try:
        exported = by_export(model, example, rules)
    except CaptureError as error:
        return capture, replace(report, notes=(*report.notes, str(error)))
    return exported if sum(site.opaque for site in exported[1].sites) < len(opaque) else (capture, report)


def by_symbolic_trace(model: nn.Module, example: Mapping[str, Any] | None, rules: Rules) -> tuple[Capture, Report]:
    capture = trace(model, example)
    return capture, rewrite(type(model).__name__, capture, rules)


def by_export(model: nn.Module, example: Mapping[str, Any], rules: Rules) -> tuple[Capture, Report]:
    """By `torch.export`: for batches of any size, where the forward takes one path for all of them, else for the example's.

    Raises:
        CaptureError: `torch.export` refuses the model, or the rewritten graph does not compute what the model does.
    """
    refusals: list[CaptureError] = []
    sizes = batch_sizes(example)
    for any_batch in (True, False) if sizes else (False,):
        try:
            capture = export(model, example, any_batch)
            notes = [f"the batch is fixed at {sizes[0]}, since {str(refusal).splitlines()[0]}" for refusal in refusals]
            capture = replace(capture, notes=(*notes, *capture.notes))
            report = rewrite(type(model).__name__, capture, rules)
            verify(type(model).__name__, capture)
            return capture, report
        except CaptureError as error:
            refusals.append(error)
    raise refusals[-1]


def verify(model: str, capture: Capture) -> None:
    """Raise CaptureError where the graph does not give on its examples what its reference gives.

    To a hundredth of the largest output, for half precision and for attention by other kernels: a graph that is wrong is wrong
    by more.
    """
    assert capture.reference is not None
    graph = fx.GraphModule(capture.modules, capture.graph)
    parameters = list(inspect.signature(capture.reference.forward).parameters.values())
    try:
        for example in capture.examples:
            call = inspect.BoundArguments(inspect.Signature(parameters), dict(example))  # type: ignore[arg-type]
            # With gradients, as wherever a map is made: a forward may ask.
            with torch.enable_grad(), Untouched(capture.reference, capture.modules).restored():
                expected = [t.detach() for t in tensors_of(capture.reference(*cloned(call.args), **cloned(call.kwargs)))]
                outputs = [t.detach() for t in tensors_of(graph(*cloned(call.args), **cloned(call.kwargs)))]
            if len(outputs) != len(expected) or not all(map(alike, outputs, expected)):
                raise CaptureError("its graph does not give the model's outputs (does the forward draw random numbers?)")
    except Exception as error:  # whatever the graph raises where the model does not
        raise CaptureError(f"the graph of {model} by {capture.tracer} is wrong: {error}") from error


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether `a` is `b` to a hundredth of its largest number; exactly, where they are not floating."""
    if a.shape != b.shape or a.dtype != b.dtype or not (b.is_floating_point() or b.is_complex()):
        return torch.equal(a, b)
    a, b = (torch.view_as_real(t).double() if t.is_complex() else t.double() for t in (a, b))
    return torch.allclose(a, b, 1e-2, 1e-2 * float(b.abs().max()) if b.numel() else 0.0, equal_nan=True)


def own_names(modules: nn.Module, graph: fx.Graph, report: Report) -> list[str]:
    """Renames the attributes of the model whose names an explainer has of its own, such as a child called `split`; returns a
    note on each."""
    taken = {*dir(Explainer(nn.Module(), fx.Graph(), report)), "_origin"}  # of an explainer of nothing: no list to keep
    notes = []
    for table in (modules._modules, modules._parameters, modules._buffers):
        for name in [name for name in table if name in taken]:
            new = f"{name}_"
            while new in taken or hasattr(modules, new):
                new += "_"
            table[new] = table.pop(name)  # type: ignore[assignment]
            for node in graph.nodes:
                if node.op in ("call_module", "get_attr") and str(node.target).split(".")[0] == name:
                    node.target = new + str(node.target)[len(name) :]
            notes.append(f"the model's {name} is called {new} here, since an explainer has a {name} of its own")
    return notes


class NotRewrittenError(ValueError):
    """Strict mode found calls that gate, or may, and have no rule."""
