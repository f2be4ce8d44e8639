"""What a reader makes of a call, a `Gate`, and the table of readers, one for every call form of an op.

Modules need no entry of their own: capture traces into `torch.nn`'s gating modules, so that they appear as the functions
they call, and a subclass is read by what it computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


@dataclass(frozen=True)
class Gate:
    """A call that is a gate: its row of the table, the tensors and the arguments in the table's form.

    `first` says that the call returns the gate's output as the first of several things. `fixed`: no gate where the input varies
    tensors other than the one that the signal comes through.
    """

    kind: str
    tensors: tuple[Any, ...]
    args: dict[str, Any] = field(default_factory=dict)
    first: bool = False
    fixed: bool = False


@dataclass(frozen=True)
class Unread:
    """A call that gates, or may, and has no rule: why. One that is `kept` is known to be no gate."""

    reason: str
    kept: bool = False


READERS: dict[Any, Callable[..., Gate | Unread | None]] = {}


def reads(*targets: Any) -> Callable:
    """Register a reader with the signature of the ops it reads. A name stands for the method, and for its in-place twin."""

    def register(reader: Callable) -> Callable:
        for target in targets:
            READERS[target] = reader
            if isinstance(target, str):
                READERS[target + "_"] = reader
        return reader

    return register


def is_tensor(value: Any) -> bool:
    """Whether a node is known to be a tensor: one of the module's, or one that an export has seen."""
    return isinstance(value, fx.Node) and (value.op == "get_attr" or isinstance(value.meta.get("val"), torch.Tensor))


def per_axis(value: Any, axes: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values
