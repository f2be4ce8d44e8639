"""Capture: a model becomes a `torch.fx` graph over an eval clone of its modules, by symbolic tracing or by `torch.export`."""

from __future__ import annotations

import collections
import dataclasses
import inspect
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .arguments import rebuilt, settings
from .clone import CaptureError, EvalClone, adopt_forward
from .register import registered, seen
from .vocabulary import APPLIED, applied

tracing = threading.RLock()  # held by whatever traces: torch patches itself meanwhile, for all threads

OPENED_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Hardtanh, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Mish, nn.GLU, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softmax, nn.Softmin, nn.Softmax2d),
    *(nn.LogSoftmax, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Softsign, nn.Threshold, nn.LogSigmoid),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.Identity, nn.Sequential, nn.ModuleList),
)


@dataclass(frozen=True)
class Capture:
    """The eval clone of a model, the graph of its forward, how it was captured, and what a reader of the report should know."""

    modules: nn.Module
    graph: fx.Graph
    tracer: str
    notes: tuple[str, ...] = ()


def capture(model: nn.Module, example: Mapping[str, Any] | None = None) -> Capture:
    """Symbolic tracing by `torch.fx`, of any shape. Arguments that are tensors in `example`, or have no default, are inputs.

    Modules of `torch.nn` that gate are traced into, down to the function they call; others of `torch.nn` and
    `nn.MultiheadAttention` stay leaves. Every module that was traced into appears in the graph as an identity under its own
    name, through which its output passes: so `layer4` can still be hooked, and each node knows its place.

    Raises:
        TypeError: `model` is not an `nn.Module`, or one that has no Python source to trace.
        CaptureError: control flow that depends on values, and whatever else symbolic tracing refuses.
    """
    try:
        return traced(model, example, PlaceTracer(buffers=True))
    except CaptureError:  # perhaps since the forward reads a setting from a buffer
        return traced(model, example, PlaceTracer(buffers=False))


def traced(model: nn.Module, example: Mapping[str, Any] | None, tracer: PlaceTracer) -> Capture:
    clones = EvalClone()
    clone = clones(model)
    hooks = clones.hooks_left(model)
    adopt_forward(clone)
    before = {path: (dict(m.__dict__), dict(m._buffers)) for path, m in clone.named_modules()}
    beside = [(held, dict(vars(held))) for m in clone.modules() for held in m.__dict__.values() if is_plain_object(held)]
    if not tracer.proxy_buffer_attributes:  # what the forward writes over them, it writes as it is traced
        for module in clone.modules():
            module.__dict__["_buffers"] = {n: b if b is None else b.clone() for n, b in module._buffers.items()}
    versions = {n: (b, b._version) for n, b in clone.named_buffers()}
    try:
        fixed = settings(clone, example)
        with seen(clone), functions_recorded(tracer):
            graph = tracer.trace(clone, concrete_args=fixed)
        for node, name in zip(graph.find_nodes(op="placeholder"), inspect.signature(clone.forward).parameters):
            if name in fixed:
                node.target = name  # fx numbers the arguments that it fixes
        for node in graph.find_nodes(op="call_function", target=torch._assert):
            if isinstance(node.args[1], str) and "has been specialized to have value" in node.args[1]:
                node.args = (node.args[0], f"{node.args[1]}: transform the model with example_inputs that have it")
        inline_wrapped(graph)
        written = [n for n, (b, version) in versions.items() if b._version != version]
        if written:
            raise RuntimeError(f"the forward writes over {', '.join(written)} and reads it as a constant")
    except Exception as error:
        raise CaptureError(
            f"torch.fx cannot trace {type(clone).__name__}: {error} ({blame(error)}). Its trace stands for all inputs, so the "
            "forward may not branch on the values or shapes of tensors"
        ) from error
    replaced = restored(clone, before)
    for held, attributes in beside:  # which the model shares
        for name in [name for name, value in vars(held).items() if isinstance(value, fx.Proxy)]:
            vars(held).pop(name)
            vars(held).update({name: attributes[name]} if name in attributes else {})
    for name in tracer.passed:
        clone.get_submodule(name).__dict__["forward"] = passes
    note = "the forward replaces {}: each call starts from its present value, and the model's own stays"
    return Capture(clone, graph, "torch.fx", (*hooks, *map(note.format, replaced)))


def restored(clone: nn.Module, before: Mapping[str, tuple[dict, dict]]) -> list[str]:
    """Take the proxies that a traced forward has set on the modules off again; the names of the buffers among them."""
    names = []
    for path, module in clone.named_modules():
        attributes, buffers = before[path]
        names += [f"{path}.{n}".lstrip(".") for n, value in module._buffers.items() if isinstance(value, fx.Proxy)]
        module.__dict__["_buffers"] = buffers
        for name in [n for n, value in module.__dict__.items() if isinstance(value, fx.Proxy)]:
            module.__dict__.pop(name)
            module.__dict__.update({name: attributes[name]} if name in attributes else {})
        for value in module.__dict__.values():
            without_proxies(value, set())
    return names


def is_plain_object(value: Any) -> bool:
    """Whether it is one that has attributes and is neither module, tensor, function nor class."""
    return hasattr(value, "__dict__") and not isinstance(value, nn.Module | Tensor | type | types.FunctionType | types.ModuleType)


def without_proxies(value: Any, seen: set[int]) -> None:
    """Take what a traced forward has put into a container, in place."""
    if id(value) in seen:
        return
    seen.add(id(value))
    match value:
        case dict():
            inside = value
        case types.SimpleNamespace():
            inside = vars(value)
        case list() | collections.deque():
            kept = [item for item in value if not isinstance(item, fx.Proxy)]
            value.clear()
            value.extend(kept)
            inside = dict(enumerate(kept))
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            inside = getattr(value, "__dict__", {})
        case _:
            return
    for key in [key for key, item in inside.items() if isinstance(item, fx.Proxy)]:
        inside[key] = None
    for item in list(inside.values()):
        without_proxies(item, seen)


def passes(x: Any) -> Any:
    """The forward of a module whose inside lies open in the graph."""
    return x


def lets_through(module: nn.Module) -> bool:
    """Whether a module is there to be named and hooked alone."""
    return module.__dict__.get("forward") is passes


def blame(error: BaseException) -> str:
    """The innermost line outside torch that `error` came through."""
    place, step = "no Python line", error.__traceback__
    while step is not None:
        file = step.tb_frame.f_code.co_filename
        if "/torch/" not in file and file != __file__:
            place = f"{file}:{step.tb_lineno}, in {step.tb_frame.f_code.co_name}"
        step = step.tb_next
    return place


class PlaceTracer(fx.Tracer):
    """Symbolic tracing that opens gating modules and marks every module that it went through."""

    def __init__(self, buffers: bool = True) -> None:
        super().__init__()
        self.proxy_buffer_attributes = buffers
        self.passed: dict[str, None] = {}
        self.record_stack_traces = True
        self.thread = threading.get_ident()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if registered(m) is not None:
            return True
        opened = isinstance(m, OPENED_MODULES) or written_out(m) is not None or "forward" in m.__dict__
        return not opened and super().is_leaf_module(m, module_qualified_name)

    def create_arg(self, a: Any) -> Any:
        """Outputs that are mappings of a kind stay of that kind: torch.fx makes plain dictionaries of them."""
        if dataclasses.is_dataclass(a) and not isinstance(a, type) and isinstance(a, Mapping):
            given = {f.name: self.create_arg(value) for f in dataclasses.fields(a) if (value := getattr(a, f.name)) is not None}
            return self.create_node("call_function", type(a), (), given)
        if isinstance(a, Mapping) and type(a) is not dict and not isinstance(a, fx.immutable_collections.immutable_dict):
            return self.create_node("call_function", type(a), (self.create_arg(dict(a)),), {})
        return super().create_arg(a)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:  # fx patches the class nn.Module, and other models may be running
            return forward(*args, **kwargs)
        name = self.path_of_module(m)
        result = super().call_module(m, written_out(m) or forward, args, kwargs)
        if isinstance(result, fx.Proxy) and not self.is_leaf_module(m, name):
            self.passed[name] = None
            result = self.create_proxy("call_module", name, (result,), {})
        return result


@contextmanager
def functions_recorded(tracer: PlaceTracer) -> Iterator[None]:
    """While it lasts an `autograd.Function` is one call of the trace, which would otherwise go into its forward and lose its
    backward without a word."""
    inherited = torch.autograd.Function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        given: list[Any] = []
        if threading.get_ident() == tracer.thread:
            rebuilt((args, kwargs), given.append)
        if any(isinstance(a, fx.Proxy) for a in given):
            name = f"{cls.__module__}:{cls.__qualname__}"
            APPLIED[name] = cls
            return tracer.create_proxy("call_function", applied, (name, *args), kwargs)
        return inherited.__get__(None, cls)(*args, **kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.autograd.Function.apply = inherited


def inline_wrapped(graph: fx.Graph) -> None:
    """Open the functions that `torch.fx.wrap` made opaque, where they can be traced; the others stay as they are."""
    for node in list(graph.nodes):
        if not node.meta.get("is_wrapped") or (node.target.__module__ or "").startswith("torch."):
            continue
        before = set(graph.nodes)
        tracer = fx.proxy.GraphAppendingTracer(graph)
        with graph.inserting_before(node):
            proxies: Any = lambda n, tracer=tracer: fx.Proxy(n, tracer)  # noqa: E731
            args, kwargs = fx.map_arg((node.args, node.kwargs), proxies)
            try:
                result = node.target(*args, **kwargs)
                inlined = fx.node.map_aggregate(result, lambda r: r.node if isinstance(r, fx.Proxy) else r)
            except Exception:  # whatever the function does with what is not a tensor; rewrite lists it as opaque
                inlined = None
        added = [n for n in graph.nodes if n not in before]
        if isinstance(inlined, fx.Node):
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


INSTANCE_NORMS = {nn.InstanceNorm1d: 3, nn.InstanceNorm2d: 4, nn.InstanceNorm3d: 5}
