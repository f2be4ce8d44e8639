"""What a forward changes while it is traced, and how it is put back: the model stays as it was.

While it is traced, a forward may store where it likes: `self.last = h`, `self.helper.step += 1`, `self.cache.append(h)`, and
`FEATURES["h"] = h` in a dictionary of its file. What can be reached from the model and its clone, from their classes and from
what their code names in its file is remembered before the trace, and is the same after it, whether it succeeded or not.
"""

from __future__ import annotations

import array
import collections
import functools
import pickle
import random
import sys
import sysconfig
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from .reached import attributes, held, is_a_programs, is_open

CHANGES = "the forward changes"  # how the note on what it stores begins


class Untouched:
    """What can be reached from a model and its clone, as it was before a trace.

    Attributes:
        replaced: after the trace, the buffers in whose place the forward has put another tensor.
        stored: after a run, where else the forward has put something: `block.step`, `FEATURES`.
        draws: after a run, what drew random numbers that are not PyTorch's: "random", "numpy.random".
        draws_own: after a run, the generators of the model's own that it drew from: `block.rng`.
    """

    def __init__(self, model: nn.Module, clone: nn.Module) -> None:
        self.clone = clone
        self.replaced: list[str] = []
        self.stored: dict[str, None] = {}
        self.draws: dict[str, None] = {}
        self.draws_own: dict[str, None] = {}
        reached = holders(model, clone)
        names = set().union(*(holder.names for holder in reached if isinstance(holder, File)))
        self._generators = generators() if "random" in names else {}  # which other threads use, too
        self._saved = [(holder, contents(holder)) for holder in reached]

    @contextmanager
    def restored(self) -> Iterator[Untouched]:
        """Puts everything back when it ends, by an error too."""
        states = {name: get() for name, (get, *_) in self._generators.items()}
        try:
            yield self
        finally:
            for path, module in self.clone.named_modules():
                self.replaced += [f"{path}.{name}".lstrip(".") for name, b in module._buffers.items() if isinstance(b, fx.Proxy)]
            changed = [(holder, before) for holder, before in self._saved if not is_as(holder, before)]
            changed.sort(key=lambda pair: not isinstance(pair[0], dict))  # the model's own attributes first
            for holder, before in changed:
                is_generator = state_of(holder) is not None and hasattr(holder, "shuffle")  # an array has none
                names = self.draws_own if is_generator else self.stored
                names |= dict.fromkeys(self.names(holder, before))
            for name, (get, put, _) in self._generators.items():
                if not same_state(get(), states[name]):
                    self.draws[name] = None
                    put(states[name])
            for holder, before in changed:
                put_back(holder, before)

    def names(self, holder: Any, before: list[Any]) -> list[str]:
        """What a reader calls the things in `holder` that are not as they were `before`; none of what the model keeps inside."""
        if isinstance(holder, Cached | types.CellType):  # a cache is none of the model's business
            return []
        if isinstance(holder, File | type):
            of = f"{holder.__name__}." if isinstance(holder, type) else ""
            return [f"{of}{name}" for name in changed_keys(contents(holder), before)]
        for path, module in self.clone.named_modules():
            if vars(module) is holder:
                changed = [name for name in changed_keys(contents(holder), before) if not name.startswith("_")]
                return [f"{path}.{name}".lstrip(".") for name in changed]
        owners = [(f"{path}.".lstrip("."), vars(module)) for path, module in self.clone.named_modules()]
        owners += [("", {name: own.space.get(name) for name in own.names}) for own, _ in self._saved if isinstance(own, File)]
        return [
            f"{owner}{name}"
            for owner, space in owners
            for name, value in space.items()
            if not name.startswith("_") and (value is holder or getattr(value, "__dict__", None) is holder)
        ]

    def tensors(self) -> list[Tensor]:
        """The tensors that were reached, but for parameters and buffers."""
        values = (
            value[1] if isinstance(value, tuple) and len(value) == 2 else value for _, items in self._saved for value in items
        )
        registered = {id(t) for t in (*self.clone.parameters(), *self.clone.buffers())}
        return [v for v in values if isinstance(v, Tensor) and id(v) not in registered]

    def notes(self) -> list[str]:
        """What a reader of the report should know of the changes."""
        note = "the forward replaces {}: each call starts from its present value, and the model's own stays"
        notes = [note.format(name) for name in self.replaced]
        if self.stored:
            names = ", ".join(list(self.stored)[:5]) + (", ..." if len(self.stored) > 5 else "")
            notes.append(
                f"the forward changes {names}: each call starts from what was there at transform, and the model's own stays"
            )
        if drawn := [*self.draws, *self.draws_own]:
            notes.append(f"the forward draws from {' and '.join(drawn)}: what it drew at transform is a constant here")
        return notes


def holders(model: nn.Module, clone: nn.Module) -> list[Any]:
    """The dictionaries, lists, sets, cells, classes, caches and objects with slots in which a forward of `model` or `clone` keeps
    things, however deep; a module's or an object's attributes are a dictionary."""
    found: dict[int, Any] = {}
    seen: dict[int, Any] = {}
    queue: collections.deque[tuple[Any, int]] = collections.deque()  # what is to be looked into, and how deep
    named = Named()
    queue += [(vars(m), DEEP) for m in (*model.modules(), *clone.modules())]
    for cls in {cls for m in model.modules() for cls in type(m).__mro__ if not is_pytorchs(cls)}:
        named.follow(cls)
        queue.append((cls, NEAR))
    while queue or (new := named.values()):
        queue = queue or collections.deque(new)
        at, depth = queue.popleft()
        if id(at) in seen or (depth <= 0 and type(at) not in CONTAINERS):
            continue
        seen[id(at)] = at
        if type(at) in CONTAINERS:  # `STORE["k"]["v"]` is as near as `STORE`
            found |= {} if isinstance(at, tuple | frozenset) else {id(at): at}
            items = at.values() if isinstance(at, dict) else at
            queue += [(item, depth) for item in items if type(item) not in HOLD_NOTHING]
            continue
        if isinstance(at, nn.Module | Tensor | fx.Proxy):
            continue
        match at:
            case dict() | list() | collections.deque() | set():
                found[id(at)] = at
            case Cached():
                found[id(at)] = at
                queue.append((at.__wrapped__, depth))
            case _ if state_of(at) is not None:
                found[id(at)] = at
            case types.FunctionType():
                found |= {id(cell): cell for cell in at.__closure__ or ()}
                found[id(vars(at))] = vars(at)
                named.follow(at)
            case type():
                found[id(at)] = at
                values = [getattr(v, "__func__", v) for v in vars(at).values()]  # of a `staticmethod` the function
                queue += [(v, NEAR) for v in values if keeps(v)]
        if is_open(at) and not isinstance(at, types.FunctionType | type):
            space = getattr(at, "__dict__", None)
            found |= {} if space is None else {id(space): space}
            found |= {id(at): at} if any(vars(base).get("__slots__") for base in type(at).__mro__) else {}
        queue += [(item, depth - 1) for item in held(at) if type(item) not in HOLD_NOTHING]
    return [*found.values(), *named.files.values()]


class File:
    """The names of a file that some code asks for: what other code keeps there is not looked at."""

    def __init__(self, space: dict[str, Any]) -> None:
        self.space, self.names = space, set[str]()


class Named:
    """What functions name in their files, by their code, and so on for the functions and classes that they name.

    What is deep inside an installed library is left alone: a trace changes what sympy keeps.

    Attributes:
        files: the files, by the identity of their dictionaries.
    """

    def __init__(self) -> None:
        self.files: dict[int, File] = {}
        self._met: list[tuple[Any, int]] = []  # functions and classes, since they were last asked for
        self._seen: set[int] = set()
        self._given: set[tuple[int, str]] = set()

    def follow(self, start: Any) -> None:
        """Looks into a function or a class, and what these name, `NEAR` times."""
        queue = [(start, 2 * NEAR)]
        while queue:
            at, depth = queue.pop()
            at = attribute(at, "__func__", at)
            if id(at) in self._seen or not depth or is_pytorchs(at):
                continue
            self._seen.add(id(at))
            if isinstance(at, type):
                queue += [(value, depth) for value in vars(at).values()]
                if is_own(at.__module__):
                    self._met.append((at, NEAR))
            elif isinstance(at, property):
                queue += [(function, depth) for function in (at.fget, at.fset)]
            elif (inside := attribute(at, "__wrapped__", None)) is not None:
                queue.append((inside, depth))
            if isinstance(at, types.FunctionType):
                if is_own(at.__module__):
                    self._met.append((at, NEAR))
                names = names_in(at.__code__)
                spaces = {id(at.__globals__): at.__globals__}
                pending = [at.__globals__]
                while pending:  # of what it names, files have names, too: `helpers.STORE`
                    space = pending.pop()
                    self.files.setdefault(id(space), File(space)).names |= names
                    values = [space[name] for name in names if name in space]
                    queue += [(value, depth - 1) for value in values]
                    files = [vars(v) for v in values if isinstance(v, types.ModuleType) and is_own(v.__name__)]
                    pending += [file for file in files if id(file) not in spaces]
                    spaces |= {id(file): file for file in files}

    def values(self) -> list[tuple[Any, int]]:
        """What was met, and what has the names, but for what was returned before; and how deep to look into it."""
        new, self._met = self._met, []
        for key, file in self.files.items():
            for name in file.names:
                if (key, name) not in self._given and name in file.space and keeps(file.space[name]):
                    new.append((file.space[name], NEAR))
                self._given.add((key, name))
        return new


def attribute(value: Any, name: str, default: Any) -> Any:
    """An attribute of an object, the default of one without; also of one that imports what it stands for when it is first asked,
    and fails."""
    try:
        return getattr(value, name, default)
    except Exception:
        return default


def is_pytorchs(value: Any) -> bool:
    """Whether a class or a function is PyTorch's, or Python's own."""
    return str(attribute(value, "__module__", "")).partition(".")[0] in ("torch", "builtins")


@functools.cache
def is_own(module: str) -> bool:
    """Whether a module may be the user's own: it is none of Python's, and does not lie where pip puts one."""
    root = str(module).partition(".")[0]
    file = getattr(sys.modules.get(root), "__file__", None) or ""
    installed = any(Path(file).is_relative_to(sysconfig.get_path(kind)) for kind in ("purelib", "platlib"))
    return is_a_programs(root) and root not in ("torch", "sp_fx") and not installed


def names_in(code: types.CodeType) -> set[str]:
    """The names that some code asks for, with the functions in it."""
    return {*code.co_names}.union(*(names_in(inner) for inner in code.co_consts if isinstance(inner, types.CodeType)))


# A file's own containers and objects are looked into, and theirs: all that it reaches may be half of the program, 90,000 objects
# for a file of tests, and a second.
DEEP, NEAR = sys.maxsize, 2
# Nine in ten of a module's attributes, which need not wait in the queue.
HOLD_NOTHING = frozenset((str, int, float, bool, type(None), torch.dtype, torch.device, Tensor, nn.Parameter))
# Python's own containers: all but a hundred of the 4,837 holders of a ResNet-50, most of them empty.
CONTAINERS = frozenset((dict, collections.OrderedDict, set, list, tuple, frozenset, collections.deque))
Cached = functools._lru_cache_wrapper  # a function with a cache, which nobody can look into


def keeps(value: Any) -> bool:
    """Whether something in a file or a class may keep what a forward stores."""
    if isinstance(value, dict | list | set | collections.deque | Cached):
        return True
    return not isinstance(value, types.FunctionType | types.ModuleType | type) and is_open(value)


def contents(holder: Any) -> Any:
    """What is in a holder, so that `put_back` can put it there again."""
    match holder:
        case File():
            return [(name, holder.space[name]) for name in sorted(holder.names) if name in holder.space]
        case dict():
            return list(dict.items(holder))
        case list() | set() | collections.deque():
            return list(holder)
        case types.CellType():
            return [holder.cell_contents] if holder != types.CellType() else []
        case type():
            return [(name, value) for name, value in vars(holder).items() if name not in OF_CLASSES]
        case Cached():
            return [str(holder.cache_info().misses)]
        case _ if (state := state_of(holder)) is not None:
            return [pickle.dumps(state[0]())]
    return list(attributes(holder).items())


def put_back(holder: Any, before: list[Any]) -> None:
    """Puts into `holder` what `contents` found in it, in the same order."""
    match holder:
        case File():
            was = dict(before)
            for name in holder.names:
                if name in was:
                    holder.space[name] = was[name]
                elif not isinstance(holder.space.get(name), types.ModuleType):  # one that was imported meanwhile
                    holder.space.pop(name, None)
        case Cached():  # what it has kept since may be a trace's
            holder.cache_clear()
        case _ if (state := state_of(holder)) is not None:
            state[1](pickle.loads(before[0]))
        case dict():
            kind = collections.OrderedDict if isinstance(holder, collections.OrderedDict) else dict
            kind.clear(holder)
            for key, value in before:
                kind.__setitem__(holder, key, value)
        case list():
            list.__setitem__(holder, slice(None), before)
        case set() | collections.deque():
            holder.clear()
            (holder.update if isinstance(holder, set) else holder.extend)(before)
        case types.CellType():
            del holder.cell_contents
            if before:
                holder.cell_contents = before[0]
        case _:
            now, was = dict(contents(holder)), dict(before)
            owner = type if isinstance(holder, type) else object
            for name in now.keys() - was.keys():
                owner.__delattr__(holder, name)
            for name, value in was.items():
                if now.get(name, holder) is not value:
                    owner.__setattr__(holder, name, value)


def changed_keys(now: list[Any], before: list[Any]) -> list[str]:
    """The names, in two lists of pairs of a name and an object, that have another object, or none; equal numbers are one."""
    was, has = dict(before), dict(now)
    names = dict.fromkeys((*was, *has))
    return [str(name) for name in names if name not in was or name not in has or not same(was[name], has[name])]


def same(a: Any, b: Any) -> bool:
    """Whether two attributes are one: an export copies every tuple of numbers that it meets."""
    return a is b or (type(a) is type(b) and repr(a) == repr(b) and isinstance(a, int | float | str | tuple))


OF_CLASSES = frozenset(("__dict__", "__weakref__", "__abstractmethods__", "_abc_impl"))


def is_as(holder: Any, before: list[Any]) -> bool:
    """Whether in `holder` is what `contents` found in it."""
    if not before and type(holder) in CONTAINERS:
        return not holder
    now = contents(holder)
    return now == before if isinstance(holder, Cached) or state_of(holder) is not None else same_items(now, before)


def same_items(now: list[Any], before: list[Any]) -> bool:
    """Whether two lists have the same objects, or the same pairs of a name and an object."""
    if len(now) != len(before):
        return False
    pairs = zip(now, before)
    return all(
        a is b or (type(a) is type(b) is tuple and len(a) == len(b) == 2 and a[0] is b[0] and a[1] is b[1]) for a, b in pairs
    )


def state_of(value: Any) -> tuple[Callable[[], Any], Callable[[Any], Any]] | None:
    """How the state of a generator of random numbers, or the numbers of an array, are read and set; None of anything else."""
    numpy: Any = sys.modules.get("numpy")
    match value:
        case random.Random():
            return value.getstate, value.setstate
        case torch.Generator():
            return lambda: value.get_state().tolist(), lambda state: value.set_state(torch.tensor(state, dtype=torch.uint8))
        case bytearray() | array.array():
            return lambda: value[:], functools.partial(value.__setitem__, slice(None))
        case _ if numpy is None:
            return None
        case numpy.random.Generator():
            return lambda: value.bit_generator.state, functools.partial(setattr, value.bit_generator, "state")
        case numpy.random.RandomState():
            return value.get_state, value.set_state
        case numpy.ndarray():
            return lambda: value, functools.partial(value.__setitem__, ...)
    return None


def generators() -> dict[str, tuple[Any, Any, Any]]:
    """The generators of random numbers that are not PyTorch's: how each one's state is read, and set, and how it is seeded."""
    known = {"random": (random.getstate, random.setstate, random.seed)}
    if (numpy := sys.modules.get("numpy")) is not None:
        known["numpy.random"] = (numpy.random.get_state, numpy.random.set_state, numpy.random.seed)
    return known


def same_state(a: Iterable[Any], b: Iterable[Any]) -> bool:
    return all(x is y or (x == y if not hasattr(x, "shape") else (x == y).all()) for x, y in zip(a, b))
