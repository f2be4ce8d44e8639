"""The sizes that a capture by `torch.export` is for: which axes of an example are to vary, and what then has to hold of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..containers import rebuilt, tensors_of
from .arguments import Given

Free = tuple[frozenset[int], ...]  # of each tensor of a call, in order: the axes that are to vary

PICTURE = 4  # axes of a tensor of pictures: their height and width are as in the example


def lead(call: Given) -> int:
    """Returns the number of the tensor of a call whose axis 0 is the batch: the first floating one, or else the first."""
    return next((i for i, t in enumerate(tensors_of(call)) if t.is_floating_point()), 0)


def batch_sizes(call: Given) -> torch.Size:
    """Returns the size of the batch; `[]` where the tensor that has it has no axes, and of no tensor."""
    tensors = tensors_of(call)
    return tensors[lead(call)].shape[:1] if tensors else torch.Size()


def freedoms(call: Given) -> list[Free]:
    """Returns what an export of a call may let vary, the most first: batch and lengths; the batch; the lengths, where a batch of
    one may be a path of its own; nothing.

    A length is an axis of token ids, of a mask, of a sequence or of points. Height and width are none: to follow how windows are
    cut out of pictures of every size takes torch.export minutes (torchvision's swin_t: 307 s, for 613 conditions).
    """
    tensors, sizes = tensors_of(call), batch_sizes(call)
    batch = [frozenset({0} if sizes and t.shape[:1] == sizes else ()) for t in tensors]
    simple = [not t.is_floating_point() or t.dim() < PICTURE for t in tensors]
    known = {n for t, is_simple in zip(tensors, simple) if is_simple for n in t.shape[1:]}
    lengths = [
        frozenset(axis for axis, n in enumerate(t.shape) if n > 1 and axis not in own and (is_simple or n in known))
        for t, own, is_simple in zip(tensors, batch, simple)
    ]
    both = tuple(a | b for a, b in zip(batch, lengths))
    nothing = (frozenset[int](),) * len(tensors)
    of_one = [tuple(lengths)] if sizes == (1,) else []
    return list(dict.fromkeys([both, tuple(batch), *of_one, nothing]))


def with_batch(call: Given, size: int) -> Given:
    """Returns the call with `size` samples: its first ones, or all of them again. Tensors that do not have the batch on axis 0
    stay."""
    sizes = batch_sizes(call)

    def change(t: Any) -> Any:
        if not isinstance(t, Tensor) or t.shape[:1] != sizes:
            return t
        return t[:size] if size <= sizes[0] else torch.cat([t] * size)[:size]

    return rebuilt(call, change)


def of_other_sizes(call: Given, varies: Free, fits: Callable[[Given], bool]) -> Given | None:
    """Returns a call of other sizes, cut out of this one, that a graph `fits` for whose inputs the axes `varies` vary; None where
    there is none: another batch, and lengths of a half or thereabouts."""
    tensors, sizes = tensors_of(call), batch_sizes(call)
    along = [[axis for axis in axes if axis or t.shape[:1] != sizes] for t, axes in zip(tensors, varies)]
    lengths = sorted({t.shape[axis] for t, axes in zip(tensors, along) for axis in axes})
    if any(0 in axes for t, axes in zip(tensors, varies) if t.shape[:1] == sizes):
        call = with_batch(call, 2 if sizes[0] == 1 else sizes[0] - 1)
    elif not lengths:
        return None

    def shorter(change: Callable[[int], int]) -> Given:
        axes_of = iter(along)

        def cut(t: Any) -> Any:
            if isinstance(t, Tensor):
                for axis in next(axes_of):
                    t = t.narrow(axis, 0, change(t.shape[axis]))
            return t

        return rebuilt(call, cut)

    ways: list[Callable[[int], int]] = [lambda n: max(n // 2, min(n, 2)), lambda n: max(n - 1, min(n, 2)), lambda n: n]
    for way in ways:
        if fits(other := shorter(way)):
            return other
    return None


Axes = frozenset[tuple[int, int]]  # each the number of a tensor of a call, and of its axis


def lengths(call: Given, works: Callable[[Given], bool]) -> list[tuple[Axes, Given]]:
    """Returns the lengths of a call that may be others, as `works` says of calls that are cut out of it, each with such a call:
    those of one tensor alone, and those that several have together, as token ids and their mask. The batch is none of them."""
    tensors, free = tensors_of(call), freedoms(call)[0]
    by_size: dict[int, list[tuple[int, int]]] = {}
    for i, axes in enumerate(free):
        for axis in sorted(axes - {0}):
            by_size.setdefault(tensors[i].shape[axis], []).append((i, axis))

    def cut(axes: Axes) -> list[tuple[Axes, Given]]:
        ways: list[Callable[[int], int]] = [lambda n: n // 2 if n > 3 else 2 * n, lambda n: n - 1 if n > 3 else n + 1]
        others = (with_lengths(call, axes, way) for way in ways)
        return [(axes, other) for other in others if works(other)][:1]

    found: list[tuple[Axes, Given]] = []
    for all_of_size in map(frozenset, by_size.values()):
        # A length of its own leaves the others theirs: ids may be cut where their mask may be longer, but not the mask alone.
        ones = [frozenset({axis}) for axis in sorted(all_of_size)] if len(all_of_size) > 1 else []
        alone = [own for one in ones if (own := cut(one)) and cut(all_of_size - one)]
        together = all_of_size.difference(*(axes for own in alone for axes, _ in own))
        found += [one for own in alone for one in own] + (cut(together) if together else [])
    return found


def with_lengths(call: Given, axes: Axes, change: Callable[[int], int]) -> Given:
    """Returns the call with `change(n)` entries along each of the `axes`, of n: its first ones, or all of them again."""
    number = iter(range(len(tensors_of(call))))

    def changed(t: Any) -> Any:
        i = next(number) if isinstance(t, Tensor) else None
        for of, axis in axes:
            if of == i:
                size = t.shape[axis]
                t = t if change(size) <= size else torch.cat([t] * -(-change(size) // size), axis)
                t = t.narrow(axis, 0, change(size))
        return t

    return rebuilt(call, changed)


SIZE = re.compile(r"L\['tensors'\]\[(\d+)\]")


def conditions(program: torch.export.ExportedProgram) -> tuple[str, ...]:
    """Returns what a program asks of the sizes of its inputs, in Python over a list `t` of them: "t[0].size()[1] <= 512". What it
    asks of how they lie in memory is left out: the path is that of the example's layout (docs/limits.md)."""
    asked = [SIZE.sub(r"t[\1]", guard) for guard in program._guards_code]
    return tuple(dict.fromkeys(c for c in asked if ".stride()" not in c and ".storage_offset()" not in c))
