"""`spike = Spike.apply`: an `autograd.Function` that is called by an `apply` which a model has kept, and no patch reaches."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch


def applies(value: Any) -> Any:
    """The `autograd.Function` whose `apply` a value is; None of any other."""
    kept = isinstance(value, types.BuiltinMethodType | types.MethodType) and value.__name__ == "apply"
    cls = value.__self__ if kept else None
    return cls if isinstance(cls, type) and issubclass(cls, torch.autograd.Function) else None


def by_class(value: Any) -> Any:
    """What calls the `apply` that the class has at the time, in place of one that was kept."""
    return functools.partial(apply_of, applies(value))


def apply_of(cls: Any, *args: Any, **kwargs: Any) -> Any:
    return cls.apply(*args, **kwargs)
