"""The eval clone of a model: its structure, flags and dictionaries, and the storage of its tensors, in objects of its own.

Nothing done to the clone reaches the model, while a later in-place update of the model's weights (an optimiser step,
`load_state_dict`) reaches the clone. Of the hooks it has the model's own (`hooks.py`): those of `torch.nn.utils` that compute a
weight have done so once, and `hooks_left` has a note on each of them and of those of others.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import functools
import inspect
import sys
import types
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..capture import CaptureError
from ..tracing.applies import applies, by_class
from .hooks import TABLES, WEIGHT_HOOKS, OwnHooks, weight_of
from .reached import Reached, attributes, storage


def adopt_forward(clone: nn.Module) -> None:
    """Make a forward that was set on the instance the class's, which is the one that torch.fx traces: a method, or what a library
    has put there, such as `functools.partial(new_forward, module)`.

    Raises:
        CaptureError: what was put there does not say what it takes.
    """
    own = clone.__dict__.pop("forward", None)
    if own is None:
        adopt_call(clone)
        return
    if isinstance(own, types.MethodType) and own.__self__ is clone:
        forward = own.__func__
    else:
        try:
            forward = calling(REPLACED, inspect.signature(own))
            clone.__dict__[REPLACED] = own  # an attribute, so that a clone of the clone has its own
        except (TypeError, ValueError) as error:
            kind = type(own).__name__
            raise CaptureError(f"the model's forward was replaced by a {kind} whose arguments are not known: {error}") from None
    clone.__class__ = type(type(clone).__name__, (type(clone),), {"forward": forward, "__module__": type(clone).__module__})


def adopt_wrapped(clone: nn.Module) -> None:
    """Make a forward that is wrapped, as by a decorator with `functools.wraps`, one that has in its own code the arguments that
    it says it takes: torch.fx reads those of what is inside, and gives them to the wrapper."""
    forward = type(clone).forward
    if hasattr(forward, "__wrapped__"):
        clone.__dict__[REPLACED] = types.MethodType(forward, clone)
        own = {"forward": calling(REPLACED, inspect.signature(clone.forward)), "__module__": type(clone).__module__}
        clone.__class__ = type(type(clone).__name__, (type(clone),), own)


def adopt_call(clone: nn.Module) -> None:
    """Make the model's own `__call__`, where its class has one or it has hooks of its own, the forward that is traced: what it
    does before and after the forward is a part of the function."""
    kind = type(clone)
    hooked = any(getattr(clone, name) for name in TABLES)
    if (kind.__call__ is nn.Module.__call__ and not hooked) or isinstance(clone, fx.GraphModule):
        return

    def called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        outside = {name: module.__dict__[name] for name in TABLES}
        module.__dict__["forward"] = types.MethodType(kind.forward, module)  # which `nn.Module.__call__` inside is to run
        module.__dict__.update(module.__dict__[INSIDE])
        try:
            return kind.__call__(module, *args, **kwargs)
        finally:
            module.__dict__.update(outside)
            del module.__dict__["forward"]

    clone.__dict__[INSIDE] = {name: clone.__dict__[name] for name in TABLES}
    clone.__dict__.update({name: type(table)() for name, table in clone.__dict__[INSIDE].items()})
    forward = calling(CALLED, call_signature(clone))
    own = {"forward": forward, CALLED: called, "__call__": nn.Module.__call__, "__module__": kind.__module__}
    clone.__class__ = type(kind.__name__, (kind,), own)


def call_signature(module: nn.Module) -> inspect.Signature:
    """What a module is called with: by its own `__call__`, where its class has one that says so, or its forward."""
    kind = type(module)
    if kind.__call__ is not nn.Module.__call__ and not isinstance(module, fx.GraphModule):
        signature = inspect.signature(types.MethodType(kind.__call__, module))
        if [p.kind for p in signature.parameters.values()] != [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]:
            return signature
    return inspect.signature(module.forward)


REPLACED = "_replaced_forward"
CALLED = "_called_as_a_whole"
INSIDE = "_hooks_inside"  # of a module that is called as a whole: the hooks that its own call is to run


def calling(attribute: str, signature: inspect.Signature) -> Callable:
    """A method that takes what `signature` says, in its code, where torch.fx reads it, and calls an attribute with it."""
    head, call, bare = ["self_"], [], False
    for name, p in signature.parameters.items():
        star = "*" if p.kind is p.VAR_POSITIONAL else "**" if p.kind is p.VAR_KEYWORD else ""
        bare |= p.kind is p.VAR_POSITIONAL
        if p.kind is p.KEYWORD_ONLY and not bare:
            head, bare = [*head, "*"], True
        default = "" if p.default is p.empty else f"=defaults_[{name!r}]"
        head.append(f"{star}{name}{default}")
        passed_on = f"{star}spread_({name})" if star else name
        call.append(f"{name}={name}" if p.kind is p.KEYWORD_ONLY else passed_on)
    space: dict[str, Any] = {"defaults_": {n: p.default for n, p in signature.parameters.items()}, "spread_": spread}
    exec(f"def forward({', '.join(head)}):\n    return self_.{attribute}({', '.join(call)})", space)
    space["forward"].__annotations__ = {n: p.annotation for n, p in signature.parameters.items() if p.annotation is not p.empty}
    return space["forward"]


def spread(further: Any) -> Any:
    """What is passed on of `*args` or `**kwargs`: where a trace has a stand-in for them, those that its example has, or none. A
    call with others is of another form, which is compared with the model when it comes."""
    if not isinstance(further, fx.Proxy):
        return further
    name = str(further.node.target)
    example = (further.tracer.known.example or {}).get(name.lstrip("*"), ())  # type: ignore[attr-defined]
    if name.startswith("**"):
        return {key: further[key] for key in example}  # type: ignore[index]
    return [further[i] for i in range(len(example))]  # type: ignore[index]


class EvalClone:
    """Clones a module tree; calling it twice on one module gives one clone."""

    def __init__(self, own_tensors: bool = False, own_buffers: bool = False) -> None:
        """`own_tensors`: tensors are copied, and share no storage with the model's; `own_buffers`: those that share storage with
        one of its buffers. What shares storage in the model does so in the clone."""
        self.own_tensors, self.own_buffers = own_tensors, own_buffers
        self.copied: dict[int, torch.UntypedStorage | None] = {}  # by the model's storage: the clone's, once it is needed
        self.clones: dict[int, Any] = {}
        self.kept: list[Any] = []  # an id is only good while its object lives
        self.reached: Reached | None = None
        self.attribute = ""  # the one that is rebound, for messages

    def __call__(self, module: nn.Module) -> nn.Module:
        module = traceable(module)
        if type(module).__module__.startswith(QUANTISED):
            raise CaptureError(f"a quantised {type(module).__name__} has no derivative: transform the model before quantisation")
        if self.reached is None:
            self.reached, self.own_hooks = Reached(module), OwnHooks(module)
            if self.own_buffers:
                self.copied = dict.fromkeys(key for b in module.buffers() if (key := storage(b)) is not None)
        if id(module) not in self.clones:
            clone = object.__new__(type(module))  # not by GraphModule.__new__, which makes a class without a forward
            self.clones[id(module)] = clone
            self.kept.append(module)
            state = {name: value for name, value in module.__dict__.items() if name not in REGISTRIES}
            clone.__dict__.update(nn.Module().__dict__)
            for name, value in state.items():
                self.attribute = f"{type(module).__name__}.{name}"
                clone.__dict__[name] = self.rebind(value)
            clone.__dict__["training"] = False
            clone.__dict__["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
            clone.__dict__["_parameters"] = {name: self.tensor(p) for name, p in module._parameters.items()}
            clone.__dict__["_buffers"] = {name: self.tensor(b) for name, b in module._buffers.items()}
            if getattr(module, "max_norm", None) is not None and (weight := clone._parameters.get("weight")) is not None:
                own = nn.Parameter(weight.detach().clone(), weight.requires_grad)  # an embedding's forward scales its rows
                clone.__dict__["_parameters"]["weight"] = own
            clone.__dict__.update(self.own_hooks.of(module, self.rebind))
            clone.__dict__["_modules"] = {name: None if m is None else self(m) for name, m in module._modules.items()}
        return self.clones[id(module)]

    def tensor(self, tensor: Tensor | None) -> Tensor | None:
        """The same storage, or a copy of it, in an object of its own; tied tensors stay tied."""
        if tensor is None:
            return None
        if isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer):
            raise TypeError("the model has uninitialised (lazy) parameters: run it once on an example before transforming it")
        if id(tensor) not in self.clones:
            alias = self.alias(tensor)
            # The flag goes along: PyTorch chooses attention kernels by it, and the forward should be bitwise the model's.
            self.clones[id(tensor)] = nn.Parameter(alias, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else alias
            self.clones[id(tensor)].__dict__.update(vars(tensor))  # what a library has noted on it
            self.kept.append(tensor)
        return self.clones[id(tensor)]

    def alias(self, tensor: Tensor) -> Tensor:
        """`tensor` in the clone's storage: the model's own, or a copy."""
        key = storage(tensor)
        odd = type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) or tensor.is_conj() or tensor.is_neg() or tensor.is_quantized
        if key is None or odd:
            return tensor.clone().detach() if self.own_tensors or self.own_buffers else tensor.detach()
        if not (self.own_tensors or key in self.copied or tensor.is_inference()):  # of one of inference nothing may be saved
            return tensor.detach()
        if (own_storage := self.copied.get(key)) is None:
            own_storage = self.copied[key] = tensor.untyped_storage().clone()
        own = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return own.set_(own_storage, tensor.storage_offset(), tensor.shape, tensor.stride())

    def rebind(self, value: Any) -> Any:
        """A plain attribute, in containers of its own; what refers to a module of the tree refers to its clone."""
        if id(value) in self.clones:
            return self.clones[id(value)]
        if applies(value) is not None:
            return by_class(value)
        match value:
            case nn.Module():
                return self(value)
            case Tensor():
                return self.tensor(value)
            case types.MethodType() if self.is_or_reaches(value.__self__):
                return types.MethodType(value.__func__, self.rebind(value.__self__))
            case functools.partial():
                own = functools.partial(self.rebind(value.func), *map(self.rebind, value.args), **self.rebind(value.keywords))
                own.__dict__.update({name: self.rebind(item) for name, item in value.__dict__.items()})
                return own
            case tuple() if hasattr(value, "_fields"):
                return type(value)(*map(self.rebind, value))
            case tuple() | set() | frozenset() if type(value) in (tuple, set, frozenset):
                return type(value)(map(self.rebind, value))
            case list() | collections.deque() if type(value) in (list, collections.deque):
                again: Any = [] if isinstance(value, list) else collections.deque(maxlen=value.maxlen)
                self.clones[id(value)] = again  # which may have itself inside
                self.kept.append(value)
                again.extend(map(self.rebind, value))
                return again
            case dict():
                return self.refilled(value, lambda own: own, value)
        fields = dataclasses.is_dataclass(value) and not isinstance(value, type) and hasattr(value, "__dict__")
        if fields or isinstance(value, types.SimpleNamespace):
            return self.refilled(value, vars, vars(value))
        return self.of_tree(value) if self.reached is not None and self.reached(value) else value

    def is_or_reaches(self, value: Any) -> bool:
        return isinstance(value, nn.Module) or (self.reached is not None and self.reached(value))

    def refilled(self, value: Any, inside: Callable[[Any], dict], members: dict) -> Any:
        """Returns a copy of a container of whatever kind, filled with its members' clones; a container may have itself inside.

        One that refuses to be copied or filled stays as it is, if no module of the model is in it.
        """
        try:
            self.clones[id(value)] = own = copy.copy(value)
            self.kept.append(value)
            inside(own).update({key: self.rebind(item) for key, item in members.items()})
        except CaptureError:
            raise
        except Exception as error:  # whatever a class of its own does with the methods of a dictionary
            if self.is_or_reaches(value):
                raise self.refusal(value, error) from error
            own = self.clones[id(value)] = value
        return own

    def of_tree(self, value: Any) -> Any:
        """Returns a copy of what holds modules of the model: a function in whose closure they are, an object of a plain class."""
        if isinstance(value, types.FunctionType):
            return self.function(value)
        if isinstance(value, weakref.ref):
            return weakref.ref(self.rebind(value()))
        if isinstance(value, types.MappingProxyType):
            return types.MappingProxyType(self.rebind(dict(value)))
        try:
            self.clones[id(value)] = own = object.__new__(type(value))  # no code of the class runs
            self.kept.append(value)
            for name, item in attributes(value).items():
                object.__setattr__(own, name, self.rebind(item))
        except (TypeError, AttributeError) as error:  # a class in C, or a subclass of one
            raise self.refusal(value, error) from error
        return own

    def function(self, function: types.FunctionType) -> Any:
        """Returns `function` with the clones of what is in its closure, its defaults and its attributes."""
        if (compiled := function.__dict__.get("_torchdynamo_orig_callable")) is not None:
            return self.rebind(compiled)
        cells = []
        for cell in function.__closure__ or ():
            if id(cell) not in self.clones:
                self.clones[id(cell)] = types.CellType()
                self.kept.append(cell)
            cells.append(self.clones[id(cell)])
        code, space, name = function.__code__, function.__globals__, function.__name__
        self.clones[id(function)] = own = types.FunctionType(code, space, name, None, tuple(cells) or None)
        self.kept.append(function)
        for cell, of_model in zip(cells, function.__closure__ or ()):
            with contextlib.suppress(ValueError):  # an empty cell
                cell.cell_contents = self.rebind(of_model.cell_contents)
        own.__defaults__, own.__kwdefaults__ = self.rebind(function.__defaults__), self.rebind(function.__kwdefaults__)
        own.__dict__.update({name: self.rebind(item) for name, item in function.__dict__.items()})
        own.__qualname__, own.__module__, own.__annotations__ = (
            function.__qualname__,
            function.__module__,
            function.__annotations__,
        )
        return own

    def refusal(self, value: Any, error: Exception) -> CaptureError:
        """The error where an object that holds modules of the model cannot be copied: a clone would use the model's own."""
        kind = type(value).__name__
        text = f"the model's {self.attribute} holds modules of the model in a {kind}, which cannot be copied ({error})"
        return CaptureError(f"{text}: hold them as attributes of the model, or pass them to the call")

    def hooks_left(self, model: nn.Module) -> list[str]:
        """Compute for the clone the weights that hooks of `model` compute; returns notes on these hooks, and on the others,
        which a clone does not run."""
        notes = []
        for path, module in model.named_modules():
            if (clone := self.clones.get(id(module))) is None:
                continue
            if getattr(module, "max_norm", None) is not None:
                notes.append(f"{path or 'the model'} scales its weight by max_norm: a copy, as it was at transform")
            where = f"the hook of {path}" if path else "the model's own hook"
            for hook in [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]:
                if isinstance(hook, WEIGHT_HOOKS):
                    with torch.no_grad():
                        hook(clone, ())
                    remedy = "as it was at transform: after an update, transform again"
                    notes.append(f"{where} computes its {weight_of(hook)}, {remedy}")
                elif not self.own_hooks(hook):
                    kind = getattr(hook, "__qualname__", type(hook).__name__)
                    notes.append(f"{where}, {kind}, {NOT_RUN}")
        return notes

    def with_hooks(self, model: nn.Module) -> nn.Module:
        """The clone of `model`, which runs the model's own forward hooks."""
        clone = self(model)
        for module in model.modules():
            if id(module) in self.clones:
                self.clones[id(module)].__dict__.update({name: copy.copy(getattr(module, name)) for name in TABLES})
        return clone


NOT_RUN = "does not run: if it changes anything, the outputs are not the model's"


def traceable(module: Any) -> nn.Module:
    """The module inside its wrappers.

    Raises:
        TypeError: it is no module, or one that has no Python source.
    """
    if not isinstance(module, nn.Module):
        inside = isinstance(getattr(module, "model", None), nn.Module)  # as in what sp_fx.models.load returns
        by_name = "; sp_fx.models.load(name).model is one by name" if isinstance(module, str) else ""
        hint = "; pass its .model" if inside else by_name
        if isinstance(module, Mapping):
            hint = "; a state dict is loaded into the network that it is of, net.load_state_dict(...), and that is transformed"
        raise TypeError(f"expected a torch.nn.Module to transform, got {type(module).__name__}{hint}")
    module = unwrapped(module)
    if isinstance(module, torch.jit.ScriptModule):
        kind = type(module).__name__
        raise TypeError(f"got a {kind}, which has no Python source to trace: pass the module it was scripted from")
    return module


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


QUANTISED = tuple(f"torch.{a}nn.{b}quantized" for a in ("", "ao.") for b in ("", "intrinsic."))
REGISTRIES = frozenset(nn.Module().__dict__) | {"_compiled_call_impl"}
