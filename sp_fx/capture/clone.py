"""The eval clone of a model: its structure, flags and dictionaries, and the storage of its tensors, in objects of its own.

Nothing done to the clone reaches the model, while a later in-place update of the model's weights (an optimiser step,
`load_state_dict`) reaches the clone. It has no hooks: those of `torch.nn.utils` that compute a weight have done so once, and
`hooks_left` has a note on each of them and of the others.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .capture import CaptureError


def adopt_forward(clone: nn.Module) -> None:
    """Make a forward that was set on the instance the class's, which is the one that torch.fx traces."""
    own = clone.__dict__.pop("forward", None)
    if own is None:
        return
    if not isinstance(own, types.MethodType) or own.__self__ is not clone:
        raise CaptureError(f"the model's forward was replaced by {own!r}, which is not a method of it: subclass it instead")
    clone.__class__ = type(type(clone).__name__, (type(clone),), {"forward": own.__func__, "__module__": type(clone).__module__})


def give_own_buffers(clone: nn.Module) -> None:
    """Gives the modules of `clone` copies of the buffers that they share with the model, for a forward that writes over them."""
    for module in clone.modules():
        module.__dict__["_buffers"] = {n: b if b is None else b.clone() for n, b in module._buffers.items()}


class EvalClone:
    """Clones a module tree; calling it twice on one module gives one clone."""

    def __init__(self) -> None:
        self.clones: dict[int, Any] = {}
        self.kept: list[Any] = []  # an id is only good while its object lives

    def __call__(self, module: nn.Module) -> nn.Module:
        if not isinstance(module, nn.Module):
            raise TypeError(f"expected a torch.nn.Module to transform, got {type(module).__name__}")
        module = unwrapped(module)
        if isinstance(module, torch.jit.ScriptModule):
            kind = type(module).__name__
            raise TypeError(f"got a {kind}, which has no Python source to trace: pass the module it was scripted from")
        if type(module).__module__.startswith(QUANTISED):
            raise CaptureError(f"a quantised {type(module).__name__} has no derivative: transform the model before quantisation")
        if id(module) not in self.clones:
            clone = object.__new__(type(module))  # not by GraphModule.__new__, which makes a class without a forward
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
        """A plain attribute, in containers of its own; what refers to a module of the tree refers to its clone."""
        if id(value) in self.clones:
            return self.clones[id(value)]
        match value:
            case nn.Module():
                return self(value)
            case Tensor():
                return self.tensor(value)
            case types.MethodType() if isinstance(value.__self__, nn.Module):
                return types.MethodType(value.__func__, self(value.__self__))
            case functools.partial():
                return functools.partial(self.rebind(value.func), *map(self.rebind, value.args), **self.rebind(value.keywords))
            case tuple() if hasattr(value, "_fields"):
                return type(value)(*map(self.rebind, value))
            case list() | tuple() | set() if type(value) in (list, tuple, set):
                return type(value)(map(self.rebind, value))
            case collections.deque():
                return collections.deque(map(self.rebind, value), value.maxlen)
            case dict():
                return self.refilled(value, lambda own: own, value)
        fields = dataclasses.is_dataclass(value) and not isinstance(value, type) and hasattr(value, "__dict__")
        return self.refilled(value, vars, vars(value)) if fields or isinstance(value, types.SimpleNamespace) else value

    def refilled(self, value: Any, inside: Callable[[Any], dict], members: dict) -> Any:
        """Returns a copy of a container of whatever kind, filled with its members' clones; a container may have itself inside."""
        self.clones[id(value)] = own = copy.copy(value)
        self.kept.append(value)
        inside(own).update({key: self.rebind(item) for key, item in members.items()})
        return own

    def hooks_left(self, model: nn.Module) -> list[str]:
        """Compute for the clone the weights that hooks of `model` compute; returns notes on these hooks, and on the others,
        which a clone does not run."""
        notes = []
        for path, module in model.named_modules():
            if (clone := self.clones.get(id(module))) is None:
                continue
            where = f"the hook of {path}" if path else "the model's own hook"
            for hook in [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]:
                if isinstance(hook, WEIGHT_HOOKS):
                    with torch.no_grad():
                        hook(clone, ())
                    remedy = "as it was at transform: after an update, transform again"
                    notes.append(f"{where} computes its {weight_of(hook)}, {remedy}")
                else:
                    kind = getattr(hook, "__qualname__", type(hook).__name__)
                    notes.append(f"{where}, {kind}, {NOT_RUN}")
        return notes

    def with_hooks(self, model: nn.Module) -> nn.Module:
        """The clone of `model`, which runs the model's own forward hooks."""
        clone = self(model)
        for module in model.modules():
            if id(module) in self.clones:
                self.clones[id(module)].__dict__.update({name: copy.copy(getattr(module, name)) for name in FORWARD_HOOKS})
        return clone


NOT_RUN = "does not run: if it changes anything, the outputs are not the model's"
FORWARD_HOOKS = [name for name in nn.Module().__dict__ if name.startswith(("_forward_hooks", "_forward_pre_hooks"))]

# Hooks that set a plain attribute before every forward; parametrizations need none.
WEIGHT_HOOKS = (WeightNorm, SpectralNorm, BasePruningMethod)


def weight_of(hook: Any) -> str:
    return str(getattr(hook, "name", None) or hook._tensor_name)


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
