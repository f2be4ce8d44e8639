"""What a symbolic trace leaves behind, and how it is taken off again.

While it is traced, a forward may store proxies where it stores tensors otherwise: `self.last = h`, `self.cache.append(h)`,
`self.state["h"] = h`. A `Snapshot` of the clone, taken before the trace, knows what stood there.
"""

from __future__ import annotations

import collections
import dataclasses
import types
from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx, nn

Holder = dict | list | collections.deque  # what may have received a proxy: attributes, items


class Snapshot:
    """What the modules of `clone`, and the containers and plain objects that they hold, contain before a trace."""

    def __init__(self, clone: nn.Module) -> None:
        self.clone = clone
        self.buffers = {path: dict(module._buffers) for path, module in clone.named_modules()}
        # By id, which is good while its object lives. Of lists nothing is kept: a proxy in one is dropped, not undone.
        dictionaries = [holder for holder in holders(clone) if isinstance(holder, dict)]
        self.before = {id(holder): (holder, dict(holder)) for holder in dictionaries}

    def take_off(self) -> list[str]:
        """Puts back what proxies have replaced in attributes, buffers and dictionaries, and drops those in lists and deques;
        returns the names of the buffers that were replaced.

        For example `self.last = h` in the forward of `net.encoder`: `net.encoder.last` is what it was before the trace, or gone
        if there was none.
        """
        replaced = []
        for path, module in self.clone.named_modules():
            replaced += [f"{path}.{name}".lstrip(".") for name, b in module._buffers.items() if isinstance(b, fx.Proxy)]
            module.__dict__["_buffers"] = self.buffers[path]
        for holder in list(holders(self.clone)):
            if isinstance(holder, dict):
                before = self.before.get(id(holder), (None, {}))[1]
                for key in [key for key, value in holder.items() if isinstance(value, fx.Proxy)]:
                    del holder[key]
                    holder.update({key: before[key]} if key in before else {})
            elif any(isinstance(item, fx.Proxy) for item in holder):
                kept = [item for item in holder if not isinstance(item, fx.Proxy)]
                holder.clear()
                holder.extend(kept)
        return replaced


def holders(clone: nn.Module) -> Iterator[Holder]:
    """The dictionaries, lists and deques in which the modules of `clone` keep things: their own attributes, containers among
    these, however deep, and the attributes of plain objects among these, which the model shares."""
    seen: set[int] = set()
    for module in clone.modules():
        yield module.__dict__
        for value in list(module.__dict__.values()):
            yield from inside(value, seen)
            if is_plain_object(value) and id(vars(value)) not in seen:
                seen.add(id(vars(value)))
                yield vars(value)


def inside(value: Any, seen: set[int]) -> Iterator[Holder]:
    """The containers in `value`, itself the first."""
    match value:
        case dict() | list() | collections.deque():
            holder = value
        case types.SimpleNamespace():
            holder = vars(value)
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type) and hasattr(value, "__dict__"):
            holder = vars(value)
        case _:
            return
    if id(holder) in seen:
        return
    seen.add(id(holder))
    yield holder
    for item in list(holder.values() if isinstance(holder, dict) else holder):
        yield from inside(item, seen)


def is_plain_object(value: Any) -> bool:
    """Whether `value` has attributes of its own and is neither module, tensor, function nor class."""
    return hasattr(value, "__dict__") and not isinstance(value, nn.Module | Tensor | type | types.FunctionType | types.ModuleType)
