"""A model, run so that it stays as it is: on a clone, which shares its weights and writes over none of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ...containers import tensors_of
from .clone import EvalClone
from .reached import storage
from .untouched import Untouched

T = TypeVar("T")


class Apart:
    """A clone of a model that is run apart from it: called, it leaves the model as it was, and starts from that each time.

    Attributes:
        module: the clone. It shares no buffers with the model, and all other tensors unless they are copies.
        before: what the forward may change of Python's objects, as it was.
        written: the tensors beside the model's that a run has written over, such as one of its file.
    """

    def __init__(self, model: nn.Module, clone: nn.Module) -> None:
        self.model, self.module, self.before, self.written = model, clone, Untouched(model, clone), Written()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module, shared = self.fresh(), {storage(t) for t in tensors_in(self.model)}

        def about_to_write(t: Tensor) -> None:
            if storage(t) in shared:
                raise WritesShared(f"a tensor of {type(self.model).__name__}")
            self.written.save(t)

        tensors = (*tensors_in(self.model), *tensors_in(module), *self.before.tensors())
        with self.before.restored(), Watched(tensors, about_to_write):
            return module(*args, **kwargs)

    def fresh(self) -> nn.Module:
        """The clone, with tensors as they were before any run. Those of the last run stay until then, for its backward."""
        self.written.put_back()
        return self.module


def apart(model: nn.Module, run: Callable[[Apart], T], make: Callable[[EvalClone], nn.Module] | None = None) -> T:
    """Returns `run(clone)`, of an eval clone of `model`, or of what `make(clones)` makes with `clones`.

    A forward that writes over a tensor of the model, as `self.weight.clamp_(min=0)` under `torch.no_grad()` does, is stopped
    before it does; `run` is called again then, with a clone that shares nothing.
    """
    make = make or (lambda clones: clones(model))
    clone = Apart(model, make(EvalClone(own_buffers=True)))
    try:
        return run(clone)
    except WritesShared:
        clone.fresh()
        clone = Apart(model, make(EvalClone(own_tensors=True)))
        return run(clone)
    finally:
        clone.fresh()


class WritesShared(BaseException):  # no Exception: a forward that tries one way and then another would catch it
    """A forward is about to write over a tensor of the model."""


class Watched(TorchDispatchMode):
    """While it lasts, `about_to_write(tensor)` is called before any call in this thread that writes over the storage of one of
    the `tensors`."""

    supports_higher_order_operators = True

    def __init__(self, tensors: Iterable[Tensor], about_to_write: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.storages = {storage(t) for t in tensors} - {None}
        self.about_to_write = about_to_write

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for i, name in written_arguments(func):
            for t in tensors_of(kwargs.get(name, args[i] if i < len(args) else None)):
                if storage(t) in self.storages:
                    self.about_to_write(t)
        return func(*args, **kwargs)


@functools.cache
def written_arguments(op: Any) -> list[tuple[int, str]]:
    """The places and the names of the arguments that an op writes over."""
    arguments = op._schema.arguments if isinstance(op, torch._ops.OpOverload) else ()
    return [(i, a.name) for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]


class Written:
    """What has been written over, as it was before."""

    def __init__(self) -> None:
        self.storages: dict[int | None, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def save(self, t: Tensor) -> None:
        """Keeps the numbers of `t`, which is about to be written over for the first time."""
        if storage(t) not in self.storages:
            with _disable_current_modes():  # where an export would make a fake of it
                self.storages[storage(t)] = t.untyped_storage(), t.untyped_storage().clone()

    def put_back(self) -> None:
        for now, before in self.storages.values():
            now.copy_(before)
        self.storages.clear()


@contextmanager
def written_back(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Puts the numbers of those `tensors` back, when it ends, that were written over meanwhile."""
    written = Written()
    try:
        with Watched(tensors, written.save):
            yield
    finally:
        written.put_back()


def tensors_in(model: nn.Module) -> Iterator[Tensor]:
    """The parameters and buffers of a model, and the plain tensors among the attributes of its modules."""
    yield from (*model.parameters(), *model.buffers())
    yield from (value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor))
