"""What an object holds: its items, attributes and closures; and whether something of a model is among them."""

from __future__ import annotations

import collections
import functools
import sys
import types
import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


class Reached:
    """Which objects hold modules, parameters or buffers of a model, however deep.

    Objects of Python's own classes, optimisers, and objects with a finaliser are taken to hold none, since they are not copied.
    """

    def __init__(self, model: nn.Module) -> None:
        tensors = (t for m in model.modules() for t in (*m._parameters.values(), *m._buffers.values()) if t is not None)
        self.members = {id(model), *map(id, model.modules()), *map(id, tensors)}
        self.free: dict[int, Any] = {}  # objects that hold none

    def __call__(self, value: Any) -> bool:
        seen, queue = {id(value): value}, [value]
        while queue:
            at = queue.pop()
            if id(at) in self.members or isinstance(at, nn.Module):
                if id(at) in self.members:
                    return True
                continue
            for item in () if hasattr(type(at), "__del__") else held(at):
                if id(item) not in seen and id(item) not in self.free:
                    seen[id(item)] = item
                    queue.append(item)
        self.free |= seen
        return False


def storage(t: Tensor) -> int | None:
    """What says which storage a tensor has; None of one that has none, such as a sparse one."""
    try:
        return t.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None


def held(value: Any) -> Iterable[Any]:
    """What an object holds: the items of a container, the attributes of an object, the closure of a function."""
    match value:
        case str() | int() | float() | Tensor() | type() | types.ModuleType() | None:
            return ()
        case dict() | types.MappingProxyType():
            own = dict.values(value) if isinstance(value, dict) else value.values()  # no code of a class of its own runs
            return [*own, *attributes(value).values()]
        case list() | tuple() | set() | frozenset() | collections.deque():
            return [*value, *attributes(value).values()]
        case types.MethodType():
            return (value.__self__, value.__func__)
        case functools.partial():
            return (value.func, *value.args, *value.keywords.values(), *value.__dict__.values())
        case weakref.ref():
            return (value(),)
        case types.FunctionType():
            cells = [cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType()]
            return (*cells, value.__defaults__, value.__kwdefaults__, *value.__dict__.values())
    return attributes(value).values()


def is_open(value: Any) -> bool:
    """Whether an object's attributes are looked at: it is of a class that a program has written."""
    return is_a_programs(type(value).__module__) or isinstance(value, PLAIN_HOLDERS)


@functools.cache
def is_a_programs(module: str) -> bool:
    """Whether the classes of a file are a program's own: none of Python's, of NumPy's, or of the optimisers."""
    return module.partition(".")[0] not in PYTHONS and not module.startswith(("torch.optim", "numpy"))


PLAIN_HOLDERS = (types.SimpleNamespace, collections.UserDict, collections.UserList)
PYTHONS = sys.stdlib_module_names - {"__main__"}


SLOT = types.MemberDescriptorType


def slots_of(cls: type) -> list[str]:
    """The names under which the slots of a class are attributes: `__x` in a class `A` is `_A__x`."""
    slots = cls.__dict__.get("__slots__") or ()
    names = [name for name in ((slots,) if isinstance(slots, str) else slots) if isinstance(name, str)]
    private = [name.startswith("__") and not name.endswith("__") for name in names]
    return [f"_{cls.__name__.lstrip('_')}{name}" if mangled else name for name, mangled in zip(names, private)]


def attributes(value: Any) -> dict[str, Any]:
    """The attributes of an object that is open, in its `__dict__` or its slots."""
    if not is_open(value):
        return {}
    cls = type(value)
    slots = [slot for base in cls.__mro__ for slot in slots_of(base) if isinstance(getattr(cls, slot, None), SLOT)]
    own = {name: getattr(value, name) for name in slots if name not in ("__dict__", "__weakref__") and hasattr(value, name)}
    return {**own, **getattr(value, "__dict__", {})}
