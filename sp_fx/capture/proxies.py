"""Taking off what a symbolic trace leaves behind: proxies that the forward has stored on modules and in containers."""

from __future__ import annotations

import collections
import dataclasses
import types
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn


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
