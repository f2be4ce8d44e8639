"""`autograd.Function`s in an export, which would go into their forward and drop their backward.

One whose backward is the derivative of its forward is opened: it only saves memory that way, and the gates in it are found. Any
other stays whole: surrogate gradients of spikes, straight-through estimators, gradient reversal. In the exported program it is a
call of `sp_fx::applied`, which says only which `Call` it is.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ...containers import PLAIN, Slot, filled, rebuilt, slotted, tensors_of
from ..kept_functions import DIRTY, marks_dirty


class Call:
    """A call of the `autograd.Function` `cls`: its arguments with a slot for each tensor and, once it ran on fake tensors, its
    outputs likewise."""

    def __init__(self, cls: Any, arguments: Any) -> None:
        self.cls, self.arguments = cls, arguments
        self.outputs: Any = None

    def run(self, tensors: list[Tensor]) -> list[Tensor]:
        args, kwargs = filled(self.arguments, tensors)
        with torch.no_grad():
            outputs = self.cls.apply(*args, **kwargs)
        if any(y is x for y in tensors_of(outputs) for x in tensors):
            raise RuntimeError(
                f"{self.cls.__qualname__} writes over an argument, or returns one: torch.export cannot keep it whole"
            )
        number = itertools.count()
        self.outputs = rebuilt(outputs, lambda leaf: Slot(next(number)) if isinstance(leaf, Tensor) else leaf)
        return [torch.empty_like(y) for y in tensors_of(outputs)]


CALLS: WeakValueDictionary[int, Call] = WeakValueDictionary()  # of the exports that are under way


class ExportedFunctions:
    """Those of one export: `keep` is what `functions_kept` asks."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.opened: dict[Any, bool] = {}
        self.running = False

    def keep(self, cls: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        tensors = tensors_of((args, kwargs))
        if not tensors or self.running:
            return None
        leaves = slotted((args, kwargs))[1]
        if any(isinstance(leaf, torch._C.DispatchKeySet) for leaf in leaves):  # an operator's own backward, which it keeps
            return None
        key = (cls, *((*map(hint, v.shape), v.dtype) if isinstance(v, Tensor) else repr(v) for v in leaves))
        if key not in self.opened:
            self.opened[key] = has_derivative_of_forward(cls, args, kwargs)
        if self.opened[key]:
            return None
        if marks_dirty(cls):
            raise RuntimeError(DIRTY.format(cls.__qualname__))
        number = itertools.count()

        def place(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return Slot(next(number))
            if isinstance(leaf, (*PLAIN, torch.dtype, torch.device)):
                return leaf
            raise RuntimeError(f"torch.export cannot keep {cls.__qualname__} whole, which takes a {type(leaf).__name__}")

        self.calls.append(call := Call(cls, rebuilt((args, kwargs), place)))
        CALLS[new := max(CALLS, default=0) + 1] = call
        self.running = True
        try:
            outputs = torch.ops.sp_fx.applied(tensors, new)
        finally:
            self.running = False
        return filled(call.outputs, outputs)


@torch.library.custom_op("sp_fx::applied", mutates_args=(), schema="(Tensor[] tensors, int call) -> Tensor[]")
def applied_op(tensors: list[Tensor], call: int) -> list[Tensor]:
    raise NotImplementedError("stands in an exported program for a call that the graph has itself")


applied_op.register_fake(lambda tensors, call: CALLS[call].run(tensors))


def hint(size: Any) -> int:
    """A size, or the one that the example has for it; reading it makes no constant of it."""
    return size if isinstance(size, int) else int(size.node.hint or 2)


def has_derivative_of_forward(cls: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether the backward of an `autograd.Function` is the derivative of its forward, at random tensors like its arguments: of
    size 1, and of sizes from 1e-3 to 1e4, where a function that clips at 50 does so.

    Measured in a thread of its own, where nothing is traced. One that cannot run there has a backward of its own.
    """
    generator = torch.Generator().manual_seed(0)

    def like(leaf: Any) -> Callable[[bool], Any]:
        if not isinstance(leaf, Tensor):
            return lambda spread: leaf
        shape, dtype, device = tuple(map(hint, leaf.shape)), leaf.dtype, leaf.device
        if not dtype.is_floating_point:
            return lambda spread: torch.zeros(shape, dtype=dtype, device=device)

        def draw(spread: bool) -> Tensor:
            drawn = torch.randn(shape, generator=generator)
            return (drawn * 10 ** (7 * torch.rand(shape, generator=generator) - 3) if spread else drawn).to(device, dtype)

        return draw

    makers = rebuilt((args, kwargs), like)
    same: list[bool] = []

    def compare(spread: bool) -> None:
        arguments = rebuilt(makers, lambda make: make(spread))
        own, plain = gradients(cls.apply, arguments), gradients(forward_of(cls, args), arguments)
        pairs = [(a, b) for a, b in zip(own, plain) if a is not None or b is not None]
        same.append(all(a is not None and b is not None and agree(a, b, spread) for a, b in pairs))

    def run() -> None:
        with contextlib.suppress(Exception):  # whatever the function does with what it was not made for
            compare(False)
            compare(True)

    worker = threading.Thread(target=run)
    worker.start()
    worker.join()
    return same == [True, True]


def agree(a: Tensor, b: Tensor, spread: bool) -> bool:
    """Whether two gradients are one, to a thousandth; of large numbers, where both are finite and to a hundredth of their norm,
    since one of the two ways may overflow or cancel there."""
    if not spread:
        return torch.allclose(a, b, 1e-3, 1e-5)
    finite = a.isfinite() & b.isfinite()
    a, b = a[finite].double(), b[finite].double()
    return bool((a - b).norm() <= 1e-2 * b.norm())


def gradients(call: Callable[..., Any], arguments: tuple[tuple, dict[str, Any]]) -> list[Tensor | None]:
    """The gradient, by each floating tensor among the arguments, of a sum over all that `call` returns."""
    floats = [t for t in tensors_of(arguments) if t.is_floating_point()]
    leaves = iter([t.clone().requires_grad_() for t in floats])
    own: list[Tensor] = []

    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        own.append(next(leaves))
        return own[-1].view_as(own[-1])  # a function may write over it

    args, kwargs = rebuilt(arguments, leaf)
    outputs = [y for y in tensors_of(call(*args, **kwargs)) if y.requires_grad]
    if not outputs:
        return [None] * len(own)
    total = torch.stack([(y * torch.arange(1.0, y.numel() + 1).sin().to(y).view_as(y)).sum().float() for y in outputs]).sum()
    return list(torch.autograd.grad(total, own, allow_unused=True))


def forward_of(cls: Any, args: tuple) -> Callable[..., Any]:
    """The forward of an `autograd.Function` as plain code, which autograd differentiates."""
    if cls.setup_context is not torch.autograd.Function.setup_context:
        return cls.forward

    class Context:
        needs_input_grad = (True,) * len(args)

        def save_for_backward(self, *tensors: Any) -> None:
            self.saved_tensors = tensors

        save_for_forward = mark_dirty = mark_non_differentiable = set_materialize_grads = save_for_backward

    return functools.partial(cls.forward, Context())
