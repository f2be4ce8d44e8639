"""The captured module: a rewritten graph as a module, with its report. The methods run it; it is cut, copied and pickled."""

from __future__ import annotations

import builtins
import copy
import gc
import inspect
import re
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor, fx, nn

from ..capture.admission import Admission
from ..capture.arguments import ByName, Given
from ..capture.clones.clone import EvalClone
from ..capture.clones.untouched import CHANGES
from ..containers import cloned, tensors_of
from ..measured.by_index import taken_apart
from ..measured.forms import Form, described, form_of, inside_a_transform, obstacle_to_comparing
from ..measured.sample_axis import in_its_own_thread, sample_axes
from ..measured.scales import follows_sample, placed, scaled_sites, unknown
from ..measured.verification import forgotten_axis
from ..rewrite.report import Report
from .pickled import graph_of, rows
from .requests import BatchAxisError, InputError, naming_inputs, spread
from .subgraphs import ending_at, starting_at, within

FORMS = 32  # the most forms of a call that are kept, each with the module that runs it; and the most other captures
AXES_WAIT = (
    "not measured yet: at the first call the sample's axis is measured at each gate; torch.compile and torch.export, where they "
    "come first, take axis 0"
)
WAITS = f"not verified yet: at the first call the graph is compared with the model; {AXES_WAIT}"

NOT_VERIFIED = "not verified: the graph was not compared with the model"
ANOTHER = "another form of call was captured:"


class Comparison(Protocol):
    """What knows the model that a captured module was made from, and compares the two at the first call of each form, unless it
    was asked not to."""

    @property
    def compares(self) -> bool: ...

    def __call__(self, module: CapturedModule, call: Given) -> Verified:
        """Raises CaptureError where `module` is another function of the `call` than the model, and no capture is right."""

    def another(self, module: CapturedModule, call: Given) -> Makings:
        """Captures the model for calls that the graph of `module` is not for. Raises CaptureError where no capture is right."""


class Verified(Protocol):
    """The outcome of a comparison: notes for the report; and, if another capture is right, what makes a module of it."""

    @property
    def notes(self) -> list[str]: ...

    @property
    def instead(self) -> Makings | None: ...


Makings = tuple[nn.Module, fx.Graph, Report, Comparison | None]


class CapturedModule(fx.GraphModule):
    """A module equal to the model it was captured from, whose autograd is the soft adjoint.

    Cuts, copies and unpickled ones are of its own class: those of an `Explainer` are Explainers.

    What a graph does not say is measured at the first call of each form: whether it is the model's function, and which axis of a
    pre-activation is the sample's. Where the axes of another form are other ones, that form has a module of its own. So have
    calls that the graph says it is not for, such as those of another height and width after an export: the model is captured
    again.
    """

    def __init__(self, modules: nn.Module, graph: fx.Graph, report: Report, compare: Comparison | None = None) -> None:
        """`compare` is asked at the first call of each form; a module without one is not compared, and takes no other forms than
        its graph."""
        super().__init__(modules, graph, declared_class(self).__name__)
        self._report = report
        self._compare = compare
        self._unplaced: tuple[fx.Graph, Report] | None = (self.graph, report) if follows_sample(report) else None
        self._forms: dict[Form, tuple[Self, bool]] = {}  # the module that runs calls of a form, and whether it was compared
        self._others: list[Self] = []  # captures of calls that this one is not for
        self._measuring = threading.RLock()
        self._splits: dict[str, tuple[Self, Self]] = {}
        self._splitting = threading.Lock()
        self.training = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and not isinstance(args[0], Tensor):
            args, kwargs = spread(self, args[0])
        if torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)
        with naming_inputs(self.forward, args, kwargs), naming_axis(self, Given(args, kwargs)):
            module = self.for_call(*args, **kwargs)
            return super().__call__(*args, **kwargs) if module is self else module(*args, **kwargs)

    def for_call(self, *args: Any, **kwargs: Any) -> Self:
        """The module that runs calls with such arguments, most often this one; the first of each form is measured.

        Raises:
            CaptureError: the graph is not the model's function on these arguments.
        """
        if torch.compiler.is_compiling() or (self._unplaced is None and self._compare is None):
            return self
        call = Given(args, kwargs)
        try:
            arguments = call.by_name(self._admission.signature)
        except TypeError:  # which the call itself is to raise
            return self
        if self._admission.checks and not inside_a_transform() and self._admission.refusal(arguments):
            return captured_for(self, call, arguments)
        form = form_of(arguments, self._admission.exported)
        module, compared = self._forms.get(form, (self, False))
        obstacle = "" if compared else obstacle_to_comparing((args, kwargs))
        if compared or (obstacle and form in self._forms):
            return module
        with self._measuring, naming_inputs(self.forward, args, kwargs), naming_axis(self, call):
            if form not in self._forms or not (obstacle or self._forms[form][1]):
                self._measure(form, call, arguments, obstacle)
            return self._forms.get(form, (self, False))[0]

    def measured(self, call: Given) -> None:
        """Takes the axes from the example it was made with, whose form was compared with the model then."""
        arguments = call.by_name(self._admission.signature)
        compare, self._compare = self._compare, None
        try:
            self._measure(form_of(arguments, self._admission.exported), call, arguments, "")
        finally:
            self._compare = compare

    def _measure(self, form: Form, call: Given, arguments: Mapping[str, Any], obstacle: str) -> None:
        """Compares the graph with the model on a call, unless there is an obstacle, and measures the sample's axes."""
        if not all(isinstance(n, int) for t in tensors_of(call) for n in t.shape):
            return  # symbols, in somebody's trace
        module: Any = self
        notes, first = [], not any(own is self for own, _ in self._forms.values())
        compares = self._compare is not None and self._compare.compares
        if obstacle and compares:
            notes = [f"{NOT_VERIFIED} {obstacle}"]
        elif self._compare is not None and not obstacle:
            verified = self._compare(self, call)
            notes = verified.notes
            if verified.instead is not None:
                module = self._become(*verified.instead) if first else declared_class(self)(*verified.instead)
        graph, report, reason = module._placed(arguments)
        if reason and not compares and not obstacle:  # raises what the model does not take, before anything is settled
            in_its_own_thread(lambda: ByName(EvalClone()(module)).run_by_name(cloned(dict(arguments))), True)
        if module is not self or first:
            module._settle(graph, noted(report, notes))
            unknown(report, reason)
        elif self._unplaced is not None and not (self._report.sites == report.sites and same_code(self, graph)):
            module = declared_class(self)(self, graph, noted(report, notes), self._compare)
            module._unplaced = None
            unknown(report, reason)
        else:
            self._report = noted(self._report, notes)
        if len(self._forms) >= FORMS:
            self._forms.pop(next(iter(self._forms)))
        self._forms[form] = module, not obstacle

    def _placed(self, arguments: Mapping[str, Any]) -> tuple[fx.Graph, Report, str]:
        """Returns its graph and report with the sample's axes measured on the arguments, and why they could not be."""
        if self._unplaced is None:
            return self.graph, self._report, ""
        graph, report = self._unplaced
        clone = fx.GraphModule(EvalClone()(self), graph)  # which has no hooks to run
        axes, reason = sample_axes(clone, arguments, [node.all_input_nodes[0] for _, node in scaled_sites(report, graph)])
        if apart := taken_apart(clone, arguments, axes):
            axes, reason = {}, apart
        return *placed(graph, report, axes), reason

    def _settle(self, graph: fx.Graph, report: Report) -> None:
        """Takes `graph` and `report` for its own, together."""
        self._report = report
        self._splits.clear()
        if graph is not self.graph:
            self.graph = graph

    def _become(self, modules: nn.Module, graph: fx.Graph, report: Report, compare: Comparison | None) -> Self:
        """Takes another capture in place of this one; returns itself."""
        plain, before = fx.GraphModule(modules, graph), dict(self.named_modules(remove_duplicate=False))
        for path, module in plain.named_modules(remove_duplicate=False):
            hooks = {k: v for k, v in vars(before[path]).items() if "_hooks" in k} if path and path in before else {}
            module.__dict__.update(hooks)  # the very dictionaries: their handles go on removing from them
        for table in ("_modules", "_parameters", "_buffers"):
            self.__dict__[table] = plain.__dict__[table]
        self._compare, self._unplaced = compare, (graph, report) if follows_sample(report) else None
        self._settle(graph, report)
        return self

    @property
    def origin(self) -> nn.Module | None:
        """The model that it was made from; None of a copy, after unpickling, and where it ends at an inner output."""
        return self.__dict__.get("_origin")

    def report(self) -> Report:
        """Each gating call of the model, its place and temperature, and what was left as it is and why."""
        return self._report

    def split(self, name: str) -> tuple[Self, Self]:
        """The module up to the activation `name`, and the module from there on; made once, and kept."""
        with self._splitting:
            if name not in self._splits:
                graphs = ending_at(self.graph, name, "wrt"), starting_at(self, self.graph, name)
                report = noted(self._report, [f"{NOT_VERIFIED} before it was split"]) if waits(self) else self._report
                stem, tail = (declared_class(self)(self, graph, within(report, graph)) for graph in graphs)
                if self._forms:  # the axes are placed
                    stem._unplaced = tail._unplaced = None
                self._splits[name] = stem, tail
            return self._splits[name]

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._splits.clear()  # they hold the tensors that are replaced
        self._others.clear()
        self._forms = {form: (self, compared) for form, (own, compared) in self._forms.items() if own is self}
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> Self:
        """Changes nothing: the module was captured in eval mode. Warns where `mode` is True."""
        if mode:
            warnings.warn("an Explainer was captured in eval mode and stays in it: train() changes nothing", stacklevel=2)
        return self

    def recompile(self) -> Any:
        self._graph.on_generate_code(lambda _: unshadowed)
        code = super().recompile()
        if "__call__" in vars(type(self)):  # it prints a page of generated code at every error of a caller
            del type(self).__call__
        self._admission = Admission(inspect.signature(self.forward), self._graph)
        return code

    def __reduce__(self) -> tuple:
        modules, plain = nn.Module(), fx.GraphModule(self, self.graph)  # which has what the graph uses alone
        for table in ("_modules", "_parameters", "_buffers"):
            setattr(modules, table, getattr(plain, table))
        report = noted(self._report, [f"{NOT_VERIFIED} before it was pickled"]) if waits(self) else self._report
        is_placed = self._unplaced is None or bool(self._forms)
        return unpickled, (declared_class(self), modules, rows(self.graph), report, is_placed)

    def __deepcopy__(self, memo: dict) -> Self:
        plain = copy.deepcopy(fx.GraphModule(self, self.graph), memo)
        return self._copied(plain, plain.graph)

    def __copy__(self) -> Self:
        return self._copied(self, copy.deepcopy(self.graph))

    def copied_apart(self) -> Self:
        """A copy that shares no tensor with this module, made as clones of models are: modules that refuse deep copies do not."""
        return self._copied(EvalClone(own_tensors=True)(self), copy.deepcopy(self.graph))

    def edited(self, report: Report, compare: bool = True) -> None:
        """Takes the temperatures that were written into its graph, and the report of them. `compare`: whether it is still to be
        compared with its model."""
        unplaced = self._unplaced is not None and not self._forms and follows_sample(report)
        self._report, self._unplaced = report, (self.graph, report) if unplaced else None
        self._compare = self._compare if compare else None
        self._others = []
        self.recompile()

    def _copied(self, modules: nn.Module, graph: fx.Graph) -> Self:
        own = declared_class(self)(modules, graph, self._report, self._compare)
        if self._forms or self._unplaced is None:
            own._unplaced = None if self._unplaced is None else (copy.deepcopy(self._unplaced[0]), self._unplaced[1])
        own._forms = {form: (own, compared) for form, (module, compared) in self._forms.items() if module is self}
        return own


def unshadowed(body: list[str]) -> list[str]:
    """The body of a generated forward, in which `device`, `inf` and what else it names itself are not the arguments of these
    names: first the arguments get the names of their nodes, as fx writes it, `device_1 = device`; then the names are imported."""
    given = [line for line in body if (match := RENAMED.fullmatch(line)) and match[1] in OF_GENERATED_CODE]
    imports = [OF_GENERATED_CODE[line.split(" = ")[1].strip()] + "\n" for line in given]
    return [*given, *imports, *(line for line in body if line not in given)] if given else body


RENAMED = re.compile(r"\w+ = (\w+)\n")
OF_GENERATED_CODE = {
    **{name: f"from builtins import {name}" for name in vars(builtins) if name.isidentifier()},
    **{"inf": "from math import inf", "nan": "from math import nan", "NoneType": "NoneType = type(None)"},
    **{"torch": "import torch", "device": "from torch import device"},
    **{"fx_pytree": "import torch.fx._pytree as fx_pytree", "pytree": "import torch.utils._pytree as pytree"},
}


AnyCaptured = TypeVar("AnyCaptured", bound=CapturedModule)


def captured_for(whole: AnyCaptured, call: Given, arguments: Mapping[str, Any]) -> AnyCaptured:
    """The module that runs a call that the graph of `whole` is not for: one that was captured before, or now; `whole` itself,
    whose run is to say why, where the model cannot be captured now.

    Raises:
        CaptureError: the model cannot be captured on such a call.
    """
    with whole._measuring:
        if (module := next((own for own in whole._others if not own._admission.refusal(arguments)), None)) is None:
            unable = torch.is_inference_mode_enabled() and "inside inference mode"
            if whole._compare is None or obstacle_to_comparing(call) not in ("", unable):
                return whole
            with torch.inference_mode(False), naming_inputs(whole.forward, *call), naming_axis(whole, call):
                example = cloned(call)
                module = declared_class(whole)(*whole._compare.another(whole, example))
                module.__dict__["_origin"] = whole.origin
                module.measured(example)
            whole._others = [*whole._others[1 - FORMS :], module]
            report = module.report()
            forms = report.inputs or ", ".join(f"{name} {described(value)}" for name, value in arguments.items())
            whole._report = noted(whole._report, [f"{ANOTHER} {forms}, by {report.tracer}"])
    return module.for_call(*call.args, **call.kwargs)


def declared_class(module: AnyCaptured) -> type[AnyCaptured]:
    """The class of `module` as it is written: fx gives every instance a subclass of its own, `GraphModuleImpl`."""
    return next(cls for cls in type(module).__mro__ if not cls.__qualname__.endswith("GraphModuleImpl"))


def unpickled(
    cls: type[AnyCaptured], modules: nn.Module, saved: list[tuple[Any, ...]], report: Report, is_placed: bool
) -> AnyCaptured:
    """The captured module that was pickled as its modules, the rows of its graph, and its report."""
    module = cls(modules, graph_of(saved), report)
    if is_placed:
        module._unplaced = None
    return module


def waits(module: CapturedModule) -> bool:
    """Whether it is still to be compared with its model."""
    compares = module._compare is not None and module._compare.compares
    return compares and not any(compared for _, compared in module._forms.values())


def runs(module: CapturedModule, call: Given) -> bool:
    """Whether the graph of `module` is for a call too, and then is the model's function on it."""
    try:
        if module._admission.refusal(call.by_name(module._admission.signature)):
            return False
        with torch.no_grad():
            module(*call.args, **call.kwargs)
            return module.for_call(*call.args, **call.kwargs) is module
    except Exception:  # whatever the model says of sizes that it does not take
        return False


def noted(report: Report, notes: Sequence[str]) -> Report:
    """Returns the report with these notes, in place of what it says of a comparison to come, and of the changes that the trace
    saw where the notes have those that the model makes."""
    changes = any(note.startswith(CHANGES) for note in notes)
    kept = [note for note in report.notes if note not in (WAITS, AXES_WAIT) and not note.startswith(NOT_VERIFIED)]
    kept = [note for note in kept if not (changes and note.startswith(CHANGES))]
    return replace(report, notes=(*kept, *(note for note in notes if note not in kept)))


def same_code(module: fx.GraphModule, graph: fx.Graph) -> bool:
    return module.code == fx.GraphModule(module, graph).code


@contextmanager
def naming_axis(module: CapturedModule, call: Given) -> Iterator[None]:
    """While it lasts an error of a module that would run if its arguments had a batch axis is a `BatchAxisError`. It is not asked
    where calls of this form have run before."""
    try:
        yield
    except (InputError, BatchAxisError):
        raise
    except (TypeError, AttributeError, KeyError, RuntimeError, ValueError, IndexError) as error:
        if form_of(call.by_name(module._admission.signature), module._admission.exported) not in module._forms:
            reason = forgotten_axis(module, call)
            gc.collect()  # the clone that was tried is a cycle, and nothing that failed is to wait for the collector
            if reason:
                raise BatchAxisError(reason) from error
        raise
