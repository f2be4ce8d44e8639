"""The path of an example: what a forward is told where it asks for the values of what it computes.

`if mask.all():`, `int(lengths.max())` and `x[mask]` have no answer while `torch.export` follows a forward, which is for all
values. There the example is run once, and what it was told is told again. The graph asks too, at each run, and refuses the call
where it is told something else (`admission.answered`). A number that floats is no path, but another one at each call: such a
question stays without an answer. A forward that asks whether it is being exported is told that it is not.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...containers import filled, slotted, tensors_of
from ..capture import asks_for_values, line_of_caller

Key = tuple[Any, ...]  # where a call is: the code that calls, the place in it, and what it calls
TORCH = Path(torch.__file__).parent


@dataclass(frozen=True)
class Asked:
    """A question of a forward: what was asked of which tensors, the answer, and the line that asks.

    `name` is a method of tensors or a function of torch, called with the tensors and then with what is `rest`; "" asks for the
    sizes of the only tensor, where the answer has None for those that are known.
    """

    tensors: list[Tensor]
    name: str
    rest: tuple[Any, ...]
    answer: Any
    line: str


class Sizes(list[tuple[int, ...]]):
    """Those of the tensors that a call returned."""


class Told(TorchFunctionMode):
    """While it lasts, what a forward is told is noted: `answers` has, by place, what each call there returned that is no tensor,
    and the sizes of what is one."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: dict[Key, list[Any]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        key = place(sys._getframe(1), func)
        output = func(*args, **(kwargs or {}))
        self.answers.setdefault(key, []).append(Sizes(tuple(t.shape) for t in tensors_of(output)) or output)
        if numbers := {i: n.item() for i, n in enumerate(slotted((args, kwargs or {}))[1]) if is_number(n)}:
            self.answers.setdefault((*key, "numbers"), []).append(numbers)
        return output


class Tells(TorchFunctionMode):
    """While it lasts, an export is told what `answers` has, where it would have no answer; `asked` has each time that it was.
    `sizes`: that includes all sizes that depend on values, as of `x[mask]`; else they stay any, until a call needs them."""

    def __init__(self, answers: dict[Key, list[Any]], sizes: bool) -> None:
        super().__init__()
        self.answers, self.sizes, self.counts = answers, sizes, dict[Key, int]()
        self.asked: list[Asked] = []
        self.open: dict[Any, Callable[[], None]] = {}  # by the symbol of a size that is any: what makes it the example's

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        key = place(sys._getframe(1), func)
        number = self.counts[key] = self.counts.get(key, -1) + 1
        told = self.answers.get(key, ())
        answer = told[number] if number < len(told) else None
        try:
            output = func(*args, **(kwargs or {}))
        except Exception as error:  # of torch.export, whose class is its own
            if not asks_for_values(error):
                raise
            if is_path(answer):
                return self.told(func, args, kwargs, answer)
            if numbers := self.answers.get((*key, "numbers"), [])[number : number + 1]:
                args, kwargs = self.with_numbers((args, kwargs or {}), numbers[0])
            elif not self.closed(tensors_of((args, kwargs or {}))):
                raise
            output = func(*args, **(kwargs or {}))
        tensors = tensors_of(output)
        if not tensors:
            stays = not is_path(answer) or not is_unknown(output) or self.is_open(output)
            return output if stays else self.told(func, args, kwargs, answer)
        for t, sizes in zip(tensors, answer if isinstance(answer, Sizes) else ()):
            if any(map(is_unknown, t.shape)):
                self.sized(t, sizes)
        return output

    def sized(self, t: Tensor, sizes: tuple[int, ...]) -> None:
        """Makes the sizes of a tensor that are not known those of the example: now, or once a call needs them."""
        known = tuple(m if is_unknown(n) else None for n, m in zip(t.shape, sizes))
        symbols = {symbol for n in t.shape for symbol in symbols_of(n)}
        line = line_of_caller()

        def close() -> None:
            for n, m in zip(t.shape, sizes):
                torch._check(n == m)
            self.asked.append(Asked([t], "", (), known, line))
            for symbol in symbols:
                self.open.pop(symbol, None)

        self.open.update(dict.fromkeys(symbols - self.open.keys(), close))
        if self.sizes:
            close()

    def is_open(self, value: Any) -> bool:
        """Whether numbers are made of sizes that may be any, as the shape of a tensor is that has such."""
        numbers = value if isinstance(value, list | tuple) else (value,)
        return all(symbols_of(n) <= self.open.keys() for n in numbers)

    def closed(self, tensors: list[Tensor]) -> bool:
        """Makes the sizes of these tensors that are any those of the example; says whether there were such."""
        waiting = {
            symbol: close for t in tensors for n in t.shape for symbol in symbols_of(n) if (close := self.open.get(symbol))
        }
        for close in dict.fromkeys(waiting.values()):
            close()
        return bool(waiting)

    def with_numbers(self, args: Any, numbers: dict[int, int]) -> Any:
        """Returns the arguments with whole numbers in place of the tensors that are one: sizes, as in `torch.zeros(n, 4)`."""
        skeleton, leaves = slotted(args)
        for i, answer in numbers.items():
            if isinstance(leaves[i], Tensor):
                self.asked.append(Asked([leaves[i]], "item", (), answer, line_of_caller()))
                leaves[i] = answer
        return filled(skeleton, leaves)

    def told(self, func: Any, args: Any, kwargs: Any, answer: Any) -> Any:
        tensors = [a for a in args if isinstance(a, Tensor)]
        rest = tuple(args[len(tensors) :])
        if kwargs or tensors_of(rest) or not tensors:
            raise RuntimeError(f"data-dependent: {name_of(func)} is asked with more than tensors")
        self.asked.append(Asked(tensors, name_of(func), rest, answer, line_of_caller()))
        return answer


def place(frame: Any, func: Any) -> Key:
    """Where a forward calls a function of torch: in the innermost frame that is none of torch's own wrappers of functions."""
    while Path(frame.f_code.co_filename).parent == TORCH and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code, frame.f_lasti, name_of(func)


def name_of(func: Any) -> str:
    return str(getattr(func, "__name__", func))


def is_number(value: Any) -> bool:
    """Whether a tensor is one whole number."""
    return isinstance(value, Tensor) and value.dim() == 0 and not value.is_floating_point() and not value.is_complex()


def is_path(answer: Any) -> bool:
    """Whether an answer is one that a forward chooses its path by: whole numbers and truths, and lists of them."""
    if isinstance(answer, list | tuple):
        return not isinstance(answer, Sizes) and all(map(is_path, answer))
    return isinstance(answer, bool | int)


def is_unknown(value: Any) -> bool:
    """Whether torch.export has a symbol of a number, or of one in a list, that it knows no value of."""
    if isinstance(value, list | tuple):
        return any(map(is_unknown, value))
    return bool(symbols_of(value))


def symbols_of(value: Any) -> set[Any]:
    """The symbols of numbers that torch.export knows no value of, in one that is made of them."""
    if not isinstance(value, torch.SymInt | torch.SymBool | torch.SymFloat):
        return set()
    return set(torch.fx.experimental.symbolic_shapes.free_unbacked_symbols(value))


@contextlib.contextmanager
def unaware() -> Iterator[list[bool]]:
    """While it lasts, a model that asks whether it is being exported hears that it is not, and goes the way that it goes when it
    is called: some go another one, which is equal but for rounding. Whether it is being compiled is answered truly: where it is,
    libraries keep tensors out of caches that outlive the trace. Yields a list that is not empty once the model has asked."""
    question, code = torch.compiler.is_exporting, torch.compiler.is_exporting.__code__
    asked: list[bool] = []
    question.__code__ = answer.__code__  # libraries keep the function by names of their own: kornia's `_torch_is_exporting`
    question.__defaults__ = (asked, lambda: torch.compiler._is_exporting_flag, sys._getframe)
    try:
        yield asked
    finally:
        question.__code__, question.__defaults__ = code, None


def answer(asked: list[bool], truth: Callable[[], bool], frame: Callable[[int], types.FrameType]) -> bool:
    """The truth, where PyTorch itself asks: the code of `torch.compiler.is_exporting`, with its arguments for defaults."""
    if frame(1).f_globals.get("__name__", "").partition(".")[0] == "torch":
        return truth()
    asked.append(True)
    return False


@contextlib.contextmanager
def unlogged() -> Iterator[None]:
    """While it lasts torch.export does not log that a forward asks for values, which an error says better."""
    log = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    before = log.disabled
    try:
        log.disabled = True
        yield
    finally:
        log.disabled = before
