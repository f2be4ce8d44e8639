"""Capture: a model becomes a `torch.fx` graph over an eval clone of its modules.

The clone has the model's structure and its own dictionaries, flags and Parameter objects, no hooks, and shares the storage of
every parameter and buffer. So nothing done to the clone reaches the model, while a later in-place update of the model's
weights (an optimiser step, `load_state_dict`) reaches the clone.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

GATING_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Hardtanh, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Mish, nn.GLU, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softmax, nn.Softmin, nn.Softmax2d),
    *(nn.LogSoftmax, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Softsign, nn.Threshold, nn.LogSigmoid),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.Identity, nn.Sequential, nn.ModuleList),
)


class CaptureError(RuntimeError):
    """The model could not be turned into a graph; the message names the line and the reason."""


def capture(model: nn.Module) -> tuple[nn.Module, fx.Graph]:
    """The eval clone of `model` and the graph of its forward.

    Modules of `torch.nn` that gate are traced into, down to the function they call; others of `torch.nn` and
    `nn.MultiheadAttention` stay leaves. Every module that was traced into appears in the graph as an identity under its own
    name, through which its output passes: so `layer4` can still be hooked, and each node knows its place.

    Raises:
        TypeError: `model` is not an `nn.Module`, or one that has no Python source to trace.
        CaptureError: control flow that depends on values, and whatever else symbolic tracing refuses.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module to transform, got {type(model).__name__}")
    clone = EvalClone()(model)
    adopt_forward(clone)
    tracer = PlaceTracer()
    try:
        settings = defaults(clone)
        graph = tracer.trace(clone, concrete_args=settings)
        for node, name in zip(graph.find_nodes(op="placeholder"), inspect.signature(clone.forward).parameters):
            if name in settings:
                node.target = name  # fx numbers the arguments that it fixes
        inline_wrapped(graph)
    except Exception as error:
        raise CaptureError(
            f"torch.fx cannot trace {type(model).__name__}: {error} ({_blame(error)}). The forward may not branch on the values "
            "or shapes of tensors: wrap a function that does with torch.fx.wrap, or transform the part that traces"
        ) from error
    for name in tracer.passed:
        clone.get_submodule(name).__dict__["forward"] = passes
    return clone, graph


def adopt_forward(clone: nn.Module) -> None:
    """Make a forward that was set on the instance the class's, which is the one that torch.fx traces."""
    own = clone.__dict__.pop("forward", None)
    if own is None:
        return
    if not isinstance(own, types.MethodType) or own.__self__ is not clone:
        raise CaptureError(f"the model's forward was replaced by {own!r}, which is not a method of it: subclass it instead")
    clone.__class__ = type(type(clone).__name__, (type(clone),), {"forward": own.__func__, "__module__": type(clone).__module__})


def defaults(module: nn.Module) -> dict[str, Any]:
    """The arguments of a forward that are settings unless a caller says otherwise: the trace follows their defaults, since
    `if mask is not None` is true of every proxy. Another value is refused when the graph runs."""
    parameters = inspect.signature(module.forward).parameters.values()
    plain = (bool, int, float, str, type(None))
    return {p.name: p.default for p in parameters if isinstance(p.default, plain) and p.default is not p.empty}


def passes(x: Any) -> Any:
    """The forward of a module whose inside lies open in the graph."""
    return x


def _blame(error: BaseException) -> str:
    """The innermost line outside torch that `error` came through."""
    place, step = "no Python line", error.__traceback__
    while step is not None:
        file = step.tb_frame.f_code.co_filename
        if "/torch/" not in file and file != __file__:
            place = f"{file}:{step.tb_lineno}, in {step.tb_frame.f_code.co_name}"
        step = step.tb_next
    return place


class EvalClone:
    """Clones a module tree; calling it twice on one module gives one clone."""

    def __init__(self) -> None:
        self.clones: dict[int, Any] = {}
        self.kept: list[Any] = []  # an id is only good while its object lives

    def __call__(self, module: nn.Module) -> nn.Module:
        module = unwrapped(module)
        if isinstance(module, torch.jit.ScriptModule):
            kind = type(module).__name__
            raise TypeError(f"got a {kind}, which has no Python source to trace: pass the module it was scripted from")
        if id(module) not in self.clones:
            clone = type(module).__new__(type(module))
            self.clones[id(module)] = clone
            self.kept.append(module)
            state = {name: value for name, value in module.__dict__.items() if name not in REGISTRIES}
            clone.__dict__.update({**nn.Module().__dict__, **{name: self.rebind(value) for name, value in state.items()}})
            clone.__dict__["training"] = False
            clone.__dict__["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
            clone.__dict__["_parameters"] = {name: self.tensor(p) for name, p in module._parameters.items()}
            clone.__dict__["_buffers"] = {name: self.tensor(b) for name, b in module._buffers.items()}
            clone.__dict__["_modules"] = {name: None if m is None else self(m) for name, m in module._modules.items()}
        return self.clones[id(module)]

    def tensor(self, tensor: Tensor | None) -> Tensor | None:
        """The same storage in an object of its own; tied tensors stay tied."""
        if tensor is None:
            return None
        if isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer):
            raise TypeError("the model has uninitialised (lazy) parameters: run it once on an example before transforming it")
        if id(tensor) not in self.clones:
            alias = tensor.detach()
            # The flag goes along: PyTorch chooses attention kernels by it, and the forward should be bitwise the model's.
            self.clones[id(tensor)] = nn.Parameter(alias, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else alias
            self.kept.append(tensor)
        return self.clones[id(tensor)]

    def rebind(self, value: Any) -> Any:
        """A plain attribute; what refers to a module of the tree refers to its clone."""
        match value:
            case nn.Module():
                return self(value)
            case Tensor():
                return self.tensor(value)
            case types.MethodType() if isinstance(value.__self__, nn.Module):
                return types.MethodType(value.__func__, self(value.__self__))
            case functools.partial():
                return functools.partial(self.rebind(value.func), *map(self.rebind, value.args), **self.rebind(value.keywords))
            case list() | tuple() | set() if type(value) in (list, tuple, set):
                return type(value)(map(self.rebind, value))
            case dict() if type(value) is dict:
                return {key: self.rebind(item) for key, item in value.items()}
        return value


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside what `torch.compile` and the parallel wrappers return."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # seconds to import, and loaded wherever something was compiled
    while True:
        if dynamo is not None and isinstance(module, dynamo.OptimizedModule):
            module = module._orig_mod
        elif isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        else:
            return module


REGISTRIES = frozenset(nn.Module().__dict__) | {"_compiled_call_impl"}


class PlaceTracer(fx.Tracer):
    """Symbolic tracing that opens gating modules and marks every module that it went through."""

    def __init__(self) -> None:
        super().__init__()
        self.passed: dict[str, None] = {}
        self.record_stack_traces = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        opened = isinstance(m, GATING_MODULES) or written_out(m) is not None or "forward" in m.__dict__
        return not opened and super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = self.path_of_module(m)
        result = super().call_module(m, written_out(m) or forward, args, kwargs)
        if isinstance(result, fx.Proxy) and not self.is_leaf_module(m, name):
            self.passed[name] = None
            result = self.create_proxy("call_module", name, (result,), {})
        return result


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
