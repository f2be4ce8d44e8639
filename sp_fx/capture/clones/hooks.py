"""The forward hooks of a model: those that are a part of its function, and those that somebody else has put there.

A hook is the model's own where its code is: a method of one of its modules, or a function of the library that its modules are
classes of, such as those by which transformers collects `hidden_states`. A clone runs these. Any other, such as a recorder of
activations, does not run: what it keeps would be kept of a trace.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ...containers import PLAIN

# The attributes of a module that have its hooks, by the number of each, and what is to be known of them.
TABLES = [name for name in nn.Module().__dict__ if name.startswith(("_forward_hooks", "_forward_pre_hooks"))]
OF_NOBODY = ("torch", "__main__")  # files whose code says nothing of whose it is

# Hooks that set a plain attribute before every forward; parametrizations need none.
WEIGHT_HOOKS = (WeightNorm, SpectralNorm, BasePruningMethod)


class OwnHooks:
    """Which hooks are a model's own."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self.members = {id(m) for m in modules}
        self.libraries = {library(type(m)) for m in modules}.difference(OF_NOBODY)

    def __call__(self, hook: Any) -> bool:
        if isinstance(hook, WEIGHT_HOOKS):
            return False
        while isinstance(hook, functools.partial):
            if not all(self.is_harmless(value) for value in (*hook.args, *hook.keywords.values())):
                return False
            hook = hook.func
        if isinstance(hook, types.MethodType):
            return id(hook.__self__) in self.members
        return isinstance(hook, types.FunctionType) and library(hook) in self.libraries and self.is_harmless(hook)

    def is_harmless(self, value: Any) -> bool:
        """Whether a function could keep nothing of a trace in a value: it is plain, a module of the model, or such a function."""
        if isinstance(value, types.FunctionType):
            cells = [cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType()]
            return all(map(self.is_harmless, cells))
        return isinstance(value, PLAIN) or id(value) in self.members

    def of(self, module: nn.Module, rebind: Callable[[Any], Any]) -> dict[str, Any]:
        """Returns, by table, those hooks of a module that are its model's own, each as `rebind` gives it."""
        own = {i for name in TABLES for i, hook in getattr(module, name).items() if callable(hook) and self(hook)}
        tables = {name: getattr(module, name) for name in TABLES}
        return {name: type(t)((i, rebind(v)) for i, v in t.items() if i in own) for name, t in tables.items()}


def library(written: Any) -> str:
    """The package that a class or a function is written in."""
    return str(written.__module__).partition(".")[0]


def weight_of(hook: Any) -> str:
    """The weight that one of the `WEIGHT_HOOKS` computes."""
    return str(getattr(hook, "name", None) or hook._tensor_name)
