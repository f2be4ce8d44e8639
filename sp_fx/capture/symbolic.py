"""Capture by symbolic tracing: `torch.fx` follows the forward with stand-ins for tensors, for inputs of every size."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..containers import rebuilt, slotted
from ..gates.registry import registered
from .arguments import Given, fixed_arguments
from .capture import Capture, CaptureError, blame, frame_of_caller, said
from .clones.clone import EvalClone, adopt_forward, adopt_wrapped
from .clones.hooks import TABLES
from .clones.untouched import Untouched
from .kept_functions import call_by_name, calling_stand_ins, functions_kept, recorded_by
from .passed import shown, taken_apart, with_marks
from .tracing.draws import RealCalls, note_on_draws
from .tracing.names import rename_keywords
from .tracing.regions import Regions, carries, detach, some
from .tracing.schemas import name_of, writes
from .tracing.stand_ins import Known, StandIn, questions_answered

OPENED_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Hardtanh, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Mish, nn.GLU, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softmax, nn.Softmin, nn.Softmax2d),
    *(nn.LogSoftmax, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Softsign, nn.Threshold, nn.LogSigmoid),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.Identity, nn.Sequential, nn.ModuleList),
)


def trace(model: nn.Module, call: Given | None = None) -> Capture:
    """Symbolic tracing by `torch.fx`, of any shape. Arguments that are tensors in the example, or have no default, are inputs.

    Modules of `torch.nn` that gate are traced into, down to the function they call; others of `torch.nn` and
    `nn.MultiheadAttention` stay leaves. Every module that was traced into appears in the graph as a mark under its own name
    (`passed.Passed`), through which its output passes: so `layer4` can still be hooked, and each node knows its place.

    Raises:
        TypeError: `model` is not an `nn.Module`, or one that has no Python source to trace.
        CaptureError: control flow that depends on values, and whatever else symbolic tracing refuses.
    """
    clones = EvalClone()
    clone = clones(model)
    hooks = clones.hooks_left(model)
    adopt_forward(clone)
    reference = EvalClone()(clone)
    adopt_wrapped(clone)
    signature = inspect.signature(clone.forward)
    parameters = signature.parameters
    example = None if call is None else call.by_name(signature, defaults=True)
    regions = Regions()
    tracer = PlaceTracer(Known(clone, example, {name: p.annotation for name, p in parameters.items()}), regions)
    before = Untouched(model, clone)
    try:
        fixed = fixed_arguments(clone, example)
        with contextlib.ExitStack() as patches:
            patches.enter_context(before.restored())
            patches.enter_context(calling_stand_ins(clone))
            patches.enter_context(functions_kept(recorded_by(tracer)))
            patches.enter_context(questions_answered(tracer.known, clone))
            patches.enter_context(regions.followed())
            patches.enter_context(RealCalls(tracer, before.tensors()))
            graph = tracer.trace(clone, concrete_args=fixed)
        clone.__dict__.update({name: t for t, name in tracer.tensor_attrs.items() if "." not in name})  # the trace's constants
        named_as_in(signature, graph, fixed)
        for node in graph.find_nodes(op="call_function", target=torch._assert):
            if isinstance(node.args[1], str) and "has been specialized to have value" in node.args[1]:
                node.args = (node.args[0], f"{node.args[1]}: transform the model with example_inputs that have it")
        inline_wrapped(graph, clone, example)
        call_by_name(graph)
        for node in graph.nodes:
            if isinstance(node.target, torch._ops.OpOverloadPacket) and len(node.target.overloads()) == 1:
                node.target = getattr(node.target, node.target.overloads()[0])  # whose schema says what it writes over
        if tracer.known.refusals:  # which the forward has caught, and taken another path
            raise tracer.known.refusals[0]
    except Exception as error:
        raise refusal(type(clone).__name__, next(iter(tracer.known.refusals), error)) from error
    for leaf in tracer.leaves_with_hooks:  # they are calls of the graph now
        leaf.__dict__.update({table: type(getattr(leaf, table))() for table in TABLES})
    notes = [*hooks, *before.notes(), *regions.notes(), *note_on_draws(graph)]
    if baked := ", ".join(tracer.known.baked):
        notes.append(f"the forward asks for the value of {baked}, a constant here: after an update, transform again")
    modules = with_marks(clone, tracer.passed)
    notes += rename_keywords(modules, graph)
    return Capture(modules, reference, graph, "torch.fx", tuple(notes), some(regions.asked))


def named_as_in(signature: inspect.Signature, graph: fx.Graph, fixed: Collection[str]) -> None:
    """Give the inputs of a graph the names and the order of a signature: fx numbers the arguments that are `fixed`, and puts
    `*args` behind those that come by keyword alone."""
    parameters = signature.parameters
    starred = {name: p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for name, p in parameters.items()}
    inputs = dict(zip(sorted(parameters, key=starred.__getitem__), graph.find_nodes(op="placeholder")))
    for name, node in inputs.items():
        if name in fixed:
            node.target = name
    for name, after in itertools.pairwise(name for name in parameters if name in inputs):
        inputs[name].append(inputs[after])


def refusal(model: str, error: Exception) -> CaptureError:
    """What to say of an error that a symbolic trace ended in, or would have without the forward."""
    said_by_fx = OF_OTHERS.get(str(error))
    own = said_by_fx or isinstance(error, CaptureError | fx.proxy.TraceError)
    raises = "" if own else "called with stand-ins for tensors, the forward raises "
    text = f"torch.fx cannot trace {model}: {raises}{said_by_fx or said(error)} ({blame(error)})"
    stands = ". Its trace stands for all inputs, so the forward may not ask for the values or shapes of tensors"
    return CaptureError(f"{text}{stands if isinstance(error, fx.proxy.TraceError) else ''}")


# What torch.fx says of modules and parameters that it does not find in the model.
REGISTER = "make it an attribute of one of the model's modules, or put it into a ModuleList or a ParameterList"
OF_OTHERS = {
    "module is not installed as a submodule": f"the forward calls a module that is none of the model's: {REGISTER}",
    "parameter is not a member of this module": f"the forward uses a parameter that is none of the model's: {REGISTER}",
}


class PlaceTracer(fx.Tracer):
    """Symbolic tracing that opens gating modules and marks every module that it went through."""

    def __init__(self, known: Known, regions: Regions) -> None:
        super().__init__()
        self.known, self.regions = known, regions
        self.proxy_buffer_attributes = True
        self.passed: dict[str, None] = {}
        self.leaves_with_hooks: list[nn.Module] = []
        self.record_stack_traces = False  # a third of the time of a trace; one line is enough
        self.thread = threading.get_ident()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if registered(m) is not None:
            return True
        opened = isinstance(m, OPENED_MODULES) or written_out(m) is not None or "forward" in m.__dict__
        return not opened and super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> StandIn:
        return StandIn(node, self)

    def create_node(self, kind: str, target: Any, args: tuple, kwargs: dict, *more: Any, **options: Any) -> fx.Node:
        node = super().create_node(kind, target, args, kwargs, *more, **options)
        node.meta["autocast"] = self.regions.autocast
        if (frame := frame_of_caller(until=trace.__code__)) is not None:
            code = frame.f_code
            node.stack_trace = f'  File "{code.co_filename}", line {frame.f_lineno}, in {code.co_name}'
        return node

    def create_proxy(self, kind: str, target: Any, args: tuple, kwargs: dict, *more: Any, **options: Any) -> Any:
        """A call made under `torch.no_grad()` gives what carries no derivative.

        Raises:
            TraceError: it writes over what carries one: the derivative would be that of what was there before.
        """
        proxy = super().create_proxy(kind, target, args, kwargs, *more, **options)
        node = proxy.node
        called = kind in ("call_function", "call_method", "call_module") and target is not getattr
        if torch.is_grad_enabled() or not called or name_of(target) == "detach":
            return proxy
        if writes(target, kwargs) and node.all_input_nodes:
            if carries(node.all_input_nodes[0]):
                raise self.known.refused(
                    f"under torch.no_grad(), {name_of(target)} writes over what carries a derivative", CaptureError
                )
        elif any(carries(n, self.root) for n in node.all_input_nodes) and self.known.class_of(node) not in PLAIN_CLASSES:
            self.regions.stop(node)
            stop = "detach" if self.known.class_of(node) is Tensor else detach
            proxy = super().create_proxy("call_function" if stop is detach else "call_method", stop, (proxy,), {})
        return proxy

    def to_bool(self, obj: Any) -> bool:
        return bool(self.known.worth(obj, "branches on"))

    def iter(self, obj: Any) -> Iterator[Any]:
        """The items of a constant: those of a tensor as stand-ins, since what is made of them is a call of the graph."""
        value = self.known.worth(obj, "iterates over")
        return iter([obj[i] for i in range(len(value))] if isinstance(value, Tensor) else value)

    def create_arg(self, a: Any) -> Any:
        """Outputs that are mappings of a kind stay of that kind: torch.fx makes plain dictionaries of them."""
        if isinstance(a, fx.Proxy):
            return a.node
        if type(a).__module__ == "numpy" and getattr(a, "shape", None) == ():
            return a.item()
        if dataclasses.is_dataclass(a) and not isinstance(a, type) and isinstance(a, Mapping):
            values = {f.name: getattr(a, f.name) for f in dataclasses.fields(a)}
            fields = {name: self.create_arg(value) for name, value in values.items() if value is not None}
            return self.create_node("call_function", type(a), (), fields)
        if isinstance(a, Mapping) and type(a) is not dict and not isinstance(a, fx.immutable_collections.immutable_dict):
            return self.create_node("call_function", type(a), (self.create_arg(dict(a)),), {})
        return super().create_arg(a)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:  # fx patches the class nn.Module, and other models may be running
            return forward(*args, **kwargs)
        name = self.path_of_module(m)
        if not name:  # the model itself, by its own `__call__`
            return forward(*args, **kwargs)
        inputs, options = rebuilt((args, kwargs), shown)  # now, since the forward may put other items into a list
        for leaf in filter(is_proxy, slotted((inputs, options))[1]):
            leaf.node  # noqa: B018  # `x.mT` becomes a node where it is first asked for: before the module is entered
        if self.is_leaf_module(m, name) and any(getattr(m, table) for table in TABLES):
            return self.hooked(m, name, forward, args, kwargs)
        entered = next(iter(reversed(self.graph.nodes)))
        result = super().call_module(m, written_out(m) or forward, args, kwargs)
        if self.is_leaf_module(m, name) or not any(map(is_proxy, slotted(result)[1])):
            return result
        self.passed[name] = None
        mark = self.create_proxy("call_module", name, (result, *inputs), options)
        mark.node.meta["entered"] = entered

        def item(container: Any, key: Any, form: str) -> Any:
            return container[key] if form == "items" else self.create_proxy("call_function", getattr, (container, key), {})

        return taken_apart(mark, result, is_proxy, item)

    def hooked(self, m: nn.Module, name: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What a leaf with hooks returns: a call of it without them in the graph, and whatever they call round it."""
        m.__dict__["forward"] = lambda *args, **kwargs: self.create_proxy("call_module", name, args, kwargs)
        self.leaves_with_hooks.append(m)
        try:
            return forward(*args, **kwargs)
        finally:
            del m.__dict__["forward"]


def is_proxy(leaf: Any) -> bool:
    return isinstance(leaf, fx.Proxy)


def inline_wrapped(graph: fx.Graph, clone: nn.Module, example: Mapping[str, Any] | None) -> None:
    """Open the functions that `torch.fx.wrap` made opaque, where they can be traced; the others stay as they are."""
    for node in list(graph.nodes):
        if not node.meta.get("is_wrapped") or (node.target.__module__ or "").startswith("torch."):
            continue
        before = set(graph.nodes)
        regions = Regions(node.meta.get("autocast", ()))
        tracer = PlaceTracer(Known(clone, example, {}), regions)
        tracer.graph, tracer.root, tracer.tensor_attrs = graph, clone, {}
        args, kwargs = fx.map_arg((node.args, node.kwargs), tracer.proxy)  # type: ignore[arg-type]
        try:
            with contextlib.ExitStack() as patches:
                patches.enter_context(graph.inserting_before(node))
                patches.enter_context(functions_kept(recorded_by(tracer)))
                patches.enter_context(questions_answered(tracer.known, clone))
                patches.enter_context(regions.followed())
                result = node.target(*args, **kwargs)
            inlined = fx.node.map_aggregate(result, lambda r: r.node if isinstance(r, fx.Proxy) else r)
        except Exception:  # whatever the function does with what is not a tensor; rewrite lists it as opaque
            inlined = None
        added = [n for n in graph.nodes if n not in before]
        if isinstance(inlined, fx.Node) and not tracer.known.refusals:
            for n in added:
                n.meta.update({key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta})
            node.replace_all_uses_with(inlined)
            graph.erase_node(node)
        else:
            for n in reversed(added):
                graph.erase_node(n)


def written_out(m: Any) -> Callable[..., Any] | None:
    """For norms of torch.nn that take their statistics from the input: their forward without its check of the input's
    rank, which a proxy cannot answer."""
    if getattr(m, "running_mean", None) is not None:
        return None
    if type(m).forward is nn.BatchNorm1d.forward:  # of every rank
        return lambda x: F.batch_norm(x, None, None, m.weight, m.bias, True, 0.0, m.eps)
    if type(m).forward is nn.InstanceNorm1d.forward:
        rank = next(rank for cls, rank in INSTANCE_NORMS.items() if isinstance(m, cls))

        def instance_norm(x: Tensor) -> Tensor:
            torch._assert(x.dim() == rank, f"{type(m).__name__} takes a batch when it is traced: {rank} axes")
            return F.instance_norm(x, None, None, m.weight, m.bias, True, 0.0, m.eps)

        return instance_norm
    return None


PLAIN_CLASSES = (int, bool, float, str, torch.Size, torch.dtype, torch.device)
INSTANCE_NORMS = {nn.InstanceNorm1d: 3, nn.InstanceNorm2d: 4, nn.InstanceNorm3d: 5}
