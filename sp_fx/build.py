"""From a model to its explainer: `transform`, which takes the capture that sees the most of it."""

from __future__ import annotations

import contextlib
import functools
import keyword
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import fx, nn

from .capture.admission import FormError, checks, refusal
from .capture.arguments import Given, given
from .capture.capture import Capture, CaptureError, tracing
from .capture.clones.clone import NOT_RUN, EvalClone, call_signature, traceable
from .capture.exported import export
from .capture.sizes import freedoms, of_other_sizes
from .capture.symbolic import trace
from .explainer import Explainer
from .gates.rules import Rules
from .measured.sample_axis import shapes_of
from .measured.scales import follows_sample
from .measured.verification import Verify, forgotten_axis, own_error, verified
from .methods.captured import AXES_WAIT, WAITS, CapturedModule, noted
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
    verify: Verify = True,
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
        verify: compare the rewritten graph with the model, and under plain derivatives its gradient with the model's own: on the
            example, or without one at the first call of each form (containers, dtypes, ranks, devices). Where they differ by more
            than rounding, "auto" takes the other tracer; a `CaptureError` names the first module that differs where none is
            right. "forward" compares the outputs alone, False nothing.

    Raises:
        ValueError: another `verify`.
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
    if verify not in (True, False, "forward"):
        raise ValueError(f"verify is True, 'forward' or False, got {verify!r}")
    if tracer == "export" and example_inputs is None:
        raise ValueError("tracer='export' follows the forward on an example: pass example_inputs")
    with tracing, torch.inference_mode(False):
        rules = Rules() if rules is None else rules
        inner = traceable(model)
        example = None if example_inputs is None else given(inner, example_inputs)
        try:
            made = rewritten(model, rules, tracer, example, verify)
            if (resolved := rules.resolved(made.report.sites)) != rules:
                rules = resolved
                made = rewritten(model, rules, tracer, example, verify)
        except Exception as error:
            if example is not None and (own := own_error(inner, example)):
                hint = forgotten_axis(inner, example)
                raise CaptureError(
                    f"{type(inner).__name__} itself fails on the example_inputs: {hint or own}{f' ({own})' if hint else ''}"
                ) from error
            raise
        rules.check_places(made.report.sites)
        modules, graph, report, compare = finished(made, tracer, output, verify)
        rules.check_scales(report.sites)
        if unrun := [note for note in report.notes if note.endswith(NOT_RUN)]:
            warnings.warn("; ".join(unrun[:3]) + ("; ..." if len(unrun) > 3 else ""), stacklevel=2)
        left = report.of("NOT REWRITTEN")
        if left and strict:
            heading = f"{len(left)} of the calls that gate, or may, have no rule; sp_fx.register_gate gives one to your own:"
            raise NotRewrittenError("\n".join([heading, *(site.sentence for site in left), *report.notes]))
        if left:
            listed = "; ".join(f"{site.op} at {site.place} ({site.reason})" for site in left[:3])
            notes = "".join(f". {note}" for note in report.notes)
            warnings.warn(
                f"{len(left)} calls of {report.model} were NOT REWRITTEN and keep their plain derivative: {listed}"
                f"{'; ...' if len(left) > 3 else ''}{notes}. report() lists them all",
                stacklevel=2,
            )
        elif not report.of("rewritten"):
            why = ", since the rules keep them all" if any(s.kind not in ("", "product") for s in report.of("kept")) else ""
            text = f"{report.model} has no gate to rewrite{why}: its pullback will be the plain gradient"
            warnings.warn(text, stacklevel=2)
        waiting = [WAITS] if verify else [AXES_WAIT] if follows_sample(report) else []
        unverified = [] if verify is True else [UNVERIFIED[verify]]
        report = replace(report, notes=(*report.notes, *unverified, *(waiting if example is None else [])))
        explainer = Explainer(modules, graph, report, compare)
        explainer.__dict__["_origin"] = model if output is None else None  # no submodule of it; the weights are shared anyway
        if example is not None:
            explainer.measured(example)
        return explainer


UNDECIDED = (
    "not decided yet: at the first call shapes say which softmaxes are attention; a copy by pickle, a split, torch.compile and "
    "torch.export, where they come first, take what names say, as this report does"
)
UNVERIFIED = {
    False: "verify=False: the graph was not compared with the model",
    "forward": "verify='forward': no gradient was compared",
}


@dataclass(frozen=True)
class Attempt:
    """A capture of a model, rewritten: the graph, the modules that it uses, and what the report says."""

    capture: Capture
    modules: nn.Module
    report: Report
    pristine: fx.Graph | None = None  # before it was rewritten, where shapes are to decide at the first call what attention is

    @property
    def opaque(self) -> int:
        return sum(site.opaque for site in self.report.sites)


def rewritten(model: nn.Module, rules: Rules, tracer: str, example: Given | None, verify: Verify) -> Attempt:
    """The capture of `model`, rewritten, by the tracer that sees the most of it; compared with the model on the example.

    Raises:
        CaptureError: no tracer has one that is the model's function.
    """
    if tracer == "export":
        return by_export(model, example, rules, verify)  # type: ignore[arg-type]

    @functools.cache
    def exported() -> Attempt | CaptureError:
        assert example is not None
        try:
            return by_export(model, example, rules, verify)
        except CaptureError as error:
            return error

    try:
        traced = attempt(model, trace(model, example), rules, example)
        sees_more = tracer == "auto" and traced.opaque > 0  # perhaps an export, which is compared with the model then
        if sees_more and example is not None and isinstance(found := exported(), Attempt) and found.opaque < traced.opaque:
            return found
        traced = compared(traced, example, verify)
    except CaptureError as error:
        if tracer == "fx":
            raise
        if example is None:
            raise CaptureError(f"{error}. With example_inputs, torch.export is tried, which follows one path") from error
        if isinstance(found := exported(), CaptureError):
            raise CaptureError(f"{error}\n{found}") from found
        return found
    if sees_more and example is None:
        return noting(traced, "what is opaque here, torch.export may see through: pass example_inputs")
    if sees_more and isinstance(found := exported(), CaptureError):
        return noting(traced, str(found))
    return traced


def noting(attempt: Attempt, *notes: str) -> Attempt:
    return replace(attempt, report=noted(attempt.report, notes))


def by_export(model: nn.Module, example: Given, rules: Rules, verify: Verify) -> Attempt:
    """By `torch.export`: for inputs of as many sizes as the forward has one path for. Where the axes that vary are wrong for what
    the capture says of them, as a second example of other sizes shows, or cannot vary at all, fewer do.

    Raises:
        CaptureError: `torch.export` refuses the model, or the rewritten graph does not compute what the model does.
    """
    refusals: list[CaptureError] = []
    for free in freedoms(example):
        try:
            capture = export(model, example, free)
            notes = [f"fewer sizes vary, since {str(refusal).splitlines()[0]}" for refusal in refusals]
            capture = replace(capture, notes=(*capture.notes, *notes))
            made = compared(attempt(model, capture, rules, example), example, verify)
            if verify and (other := of_other_sizes(example, capture.varies, functools.partial(accepts, capture))) is not None:
                if not own_error(capture.reference, other):
                    with contextlib.suppress(FormError):  # the path of other values
                        compared(made, other, verify)
            return made
        except CaptureError as error:
            refusals.append(error)
        except FormError as error:  # of a batch of one, which was exported as two
            refusals.append(CaptureError(str(error)))
    raise refusals[-1]


def accepts(capture: Capture, call: Given) -> bool:
    """Whether a capture is for calls of such a form."""
    return not refusal(checks(capture.graph), call.by_name(call_signature(capture.reference)))


def attempt(model: nn.Module, capture: Capture, rules: Rules, example: Given | None) -> Attempt:
    """Rewrites a capture of the model; shapes are those that the nodes have on the example."""
    pristine = copied(capture.graph) if example is None else None

    def measure(modules: nn.Module, graph: fx.Graph) -> dict[fx.Node, Any]:
        return shapes_of(modules, graph, example.by_name(call_signature(capture.reference)))  # type: ignore[union-attr]

    made = rewrite(type(model).__name__, capture, rules, None if example is None else measure)
    if made.undecided and example is None:
        return Attempt(capture, made.modules, noted(made.report, [UNDECIDED]), pristine)
    return Attempt(capture, made.modules, made.report)


def copied(graph: fx.Graph) -> fx.Graph:
    own = fx.Graph()
    own.output(own.graph_copy(graph, {}))
    return own


def compared(made: Attempt, example: Given | None, verify: Verify) -> Attempt:
    """The attempt with the notes of its comparison with the model, if there is an example.

    Raises:
        CaptureError: it is not the model's function.
    """
    if example is None:
        return made
    return noting(made, *verified(made.capture, made.modules, made.capture.graph, example, verify))


@dataclass(frozen=True)
class AtFirstCall:
    """Compares an explainer with its model at the first call of each form, and decides by the shapes, then known, which of its
    softmaxes are attention.

    `made` is what the explainer was made of; where it ends at an inner output, that is compared, up to the model's own output.
    """

    made: Attempt
    tracer: str
    output: str | None
    verify: Verify
    renamed: Mapping[str, str]

    @property
    def compares(self) -> bool:
        return bool(self.verify)

    def __call__(self, module: CapturedModule, call: Given) -> Outcome:
        with tracing, torch.inference_mode(False):
            made = self.decided(module, call)
            capture, rules = replace(made.capture, reference=EvalClone()(made.capture.reference)), module.report().rules
            modules = EvalClone()(made.modules)
            for own in (capture.reference, modules):
                adopt(own, module, self.renamed)
            try:
                notes = verified(capture, modules, capture.graph, call, self.verify)
                if made is self.made:
                    return Outcome(notes)
                return Outcome(notes, finished(made, self.tracer, self.output, self.verify))
            except CaptureError as error:
                if self.tracer == "fx":
                    raise
                wrong = error
            again = capture.tracer == "torch.export"  # whose path may be another one at other sizes, as at a length of 1
            try:
                exported = by_export(capture.reference, call, rules, self.verify)
            except CaptureError as second:
                raise wrong if again else CaptureError(f"{wrong}\n{second}") from second
            notes = [f"by torch.export{' again' if again else ''}, since {str(wrong).splitlines()[0]}"]
            return Outcome(notes, finished(exported, self.tracer, self.output, self.verify))

    def another(self, module: CapturedModule, call: Given) -> tuple[nn.Module, fx.Graph, Report, AtFirstCall]:
        """Captures the model for calls of a form that the explainer's own graph is not for, as `transform` does for an example.

        Raises:
            CaptureError: no capture is right; the model itself fails on such a call.
        """
        with tracing, torch.inference_mode(False):
            reference, rules = EvalClone()(self.made.capture.reference), module.report().rules
            adopt(reference, module, self.renamed)
            try:
                made = rewritten(reference, rules, self.tracer, call, self.verify)
            except CaptureError as error:
                if own := own_error(reference, call):
                    raise CaptureError(f"{type(reference).__name__} itself fails on such inputs: {own}") from error
                raise
            return finished(made, self.tracer, self.output, self.verify)

    def decided(self, module: CapturedModule, call: Given) -> Attempt:
        """What the explainer is made of, or what it should be made of, by the shapes that a call gives its softmaxes."""
        if self.made.pristine is None:
            return self.made
        modules = EvalClone()(self.made.capture.modules)
        adopt(modules, module, self.renamed)
        capture = replace(self.made.capture, modules=modules, graph=copied(self.made.pristine))
        by_shapes = attempt(capture.reference, capture, module.report().rules, call)
        return replace(by_shapes, pristine=self.made.pristine)


@dataclass(frozen=True)
class Outcome:
    """Of a comparison: notes for the report, and another capture, where the one that was compared is wrong."""

    notes: list[str]
    instead: tuple[nn.Module, fx.Graph, Report, AtFirstCall] | None = None


def finished(made: Attempt, tracer: str, output: str | None, verify: Verify) -> tuple[nn.Module, fx.Graph, Report, AtFirstCall]:
    """What an explainer is made of: modules and a graph, up to the inner activation `output` where there is one, the report, and
    what compares it at the first call of each form."""
    graph, report = made.capture.graph, made.report
    if output is not None:
        graph = ending_at(graph, output)
        report = within(report, graph)
    renamed = own_names(made.modules, {made.capture.graph, graph}, report)
    notes = [f"the model's {old} is called {new} here, since {old} is an explainer's own" for new, old in renamed.items()]
    compare = AtFirstCall(made, tracer, output, verify, renamed)
    return made.modules, graph, replace(report, notes=(*report.notes, *notes)), compare


def adopt(clone: nn.Module, module: nn.Module, renamed: Mapping[str, str]) -> None:
    """Gives `clone` the tensors that `module` has now, which may have been moved or cast since. `renamed` has, by the name in
    `module`, those children's own names."""
    modules, replaced = dict(clone.named_modules(remove_duplicate=False)), dict[int, Any]()
    for path, owner in module.named_modules(remove_duplicate=False):
        head, dot, rest = path.partition(".")
        names = (renamed.get(head, head) + dot + rest).split(".")
        plain = [name[:-1] if keyword.iskeyword(name[:-1]) else name for name in names]  # `class_` where it had to be renamed
        own = modules.get(".".join(names), modules.get(".".join(plain)))
        for table in ("_parameters", "_buffers") if own is not None else ():
            now = getattr(owner, table)
            of_clone = getattr(own, table)
            replaced |= {id(of_clone[name]): (of_clone[name], now[name]) for name in of_clone if name in now}
    for tables in ((own._parameters, own._buffers) for own in clone.modules()):
        for of_clone in tables:  # also where a tensor has another name, since a module that was captured keeps one of them
            of_clone.update({name: replaced[id(t)][1] for name, t in of_clone.items() if t is not None and id(t) in replaced})


def own_names(modules: nn.Module, graphs: set[fx.Graph], report: Report) -> dict[str, str]:
    """Renames the attributes of the model whose names an explainer has of its own, such as a child called `split`; returns their
    own names by the new ones."""
    taken = {*dir(Explainer(nn.Module(), fx.Graph(), report)), "_origin"}  # of an explainer of nothing: no list to keep
    renamed = {}
    for table in (modules._modules, modules._parameters, modules._buffers):
        for name in [name for name in table if name in taken]:
            new = f"{name}_"
            while new in taken or hasattr(modules, new):
                new += "_"
            table[new] = table.pop(name)  # type: ignore[assignment]
            for node in (node for graph in graphs for node in graph.nodes):
                if node.op in ("call_module", "get_attr") and str(node.target).split(".")[0] == name:
                    node.target = new + str(node.target)[len(name) :]
            renamed[new] = name
    return renamed


class NotRewrittenError(ValueError):
    """Strict mode found calls that gate, or may, and have no rule."""
