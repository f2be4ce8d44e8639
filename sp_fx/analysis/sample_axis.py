"""The sample's axis: which axis of each tensor of a graph is the batch's, so that a gate's scale can be each sample's own.

Inputs have the batch on axis 0. `x.transpose(0, 1)` has it on axis 1, known from the call's arguments alone, since a symbolic
trace knows no shapes. An axis is an int, `ROWS` or None. `ROWS`: times and samples are folded into axis 0, in whatever order, so
that each row belongs to one sample, and so does a scale taken over it, until something unfolds them. None: not known.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import fx, nn

from .calls import name_of
from .ops import BROADCAST, MOVEMENTS, RANKS, SEVERAL

ROWS: Literal["rows"] = "rows"
Axis = int | Literal["rows"] | None
SPATIAL = re.compile(r"([123])d$")  # `max_pool2d` and `Conv2d` have two axes besides those of batch and channels

SEQUENCE_MODULES = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.MultiheadAttention, nn.RNNBase, nn.Identity,
                    nn.modules.dropout._DropoutNd)  # fmt: skip


def sample_axis(
    node: fx.Node,
    axes: dict[fx.Node, Axis],
    leaf: Callable[[fx.Node], nn.Module | None],
    shape_of: Callable[[fx.Node], torch.Size | None],
) -> Axis:
    """The sample's axis in the output of `node`, given those of its inputs.

    `axes` has every node that varies with the model's input, `leaf` gives the module that a node calls, unless that is an
    identity, `shape_of` the shape of a constant, where that is known.
    """
    if node.op == "placeholder":
        return 0
    if MOVEMENTS.get(name_of(node)) == "written" and len(node.args) > 1:
        return written(node, axes)
    inputs = [axes[n] for n in node.all_input_nodes if n in axes]
    axis = inputs[0] if inputs and all(a == inputs[0] for a in inputs) else None
    module = leaf(node)
    name, args, kwargs = name_of(node), node.args[1:], {k: v for k, v in node.kwargs.items() if k != "input"}
    if node.target is getattr:  # x.T
        name, args = str(node.args[1]), ()
    if axis is None or (module is not None and axis not in (0, ROWS) and not isinstance(module, SEQUENCE_MODULES)):
        return None
    if node.op == "call_module" and module is None:  # an identity, whatever it is called
        return axis
    moves = MOVEMENTS.get(name)
    if moves == "item" and isinstance(node.args[0], fx.Node):
        several = node.args[0].op == "call_module" or name_of(node.args[0]) in SEVERAL
        return axis if several else item(axis, node.args[1])
    if moves == "reshaped":
        return reshaped(axis, node)
    if moves == "contracted":
        return contracted(axis, node, axes)
    if module is None and name in MOVES:
        try:
            return MOVES[name](axis, *args, **kwargs)
        except TypeError:  # arguments that are computed at run time
            return None
    if moves == "expanded":
        return expanded(axis, rank_of(node.args[0], axes, leaf), *args)
    if name in BROADCAST:
        shapes = [shape for n in node.all_input_nodes if n not in axes and (shape := shape_of(n)) is not None]
        ranks = [rank_of(n, axes, leaf) for n in node.all_input_nodes if n in axes]
        return broadcast(axis, max(ranks, key=lambda r: r or 99), max(shapes, key=len, default=torch.Size()))
    return axis


# -- ops that move axes: (the sample's axis before, the op's own arguments) -> the sample's axis after -------------------


def index_of(axis: Axis) -> int:
    """The axis that the sample leads or is: `ROWS` lead axis 0."""
    return axis if isinstance(axis, int) else 0


def permute(axis: Axis, *dims: Any) -> Axis:
    order = dims[0] if isinstance(dims[0], tuple | list) else dims
    at = [d % len(order) for d in order].index(index_of(axis))
    return at if isinstance(axis, int) else ROWS if at == 0 else None


def transpose(axis: Axis, dim0: int, dim1: int) -> Axis:
    first, second = sorted((dim0, dim1), key=lambda d: d < 0)
    if first < 0:  # of the matrices in a batch
        return axis if index_of(axis) == 0 else None
    if second < 0:
        return axis if index_of(axis) == 0 and first > 0 else None
    if index_of(axis) not in (first, second):
        return axis
    return (second if axis == first else first) if isinstance(axis, int) else None


def matrix_transpose(axis: Axis) -> Axis:
    return 1 - axis if axis in (0, 1) else None  # type: ignore[operator]


def movedim(axis: Axis, source: int, destination: int) -> Axis:
    if not isinstance(axis, int) or source < 0 or destination < 0:
        return axis if index_of(axis) == 0 and source != 0 and destination != 0 else None
    if source == axis:
        return destination
    return axis - (source < axis) + (destination <= axis - (source < axis))


def flatten(axis: Axis, start_dim: int = 0, end_dim: int = -1) -> Axis:
    at = index_of(axis)
    if at == 0 or start_dim > at:
        return axis
    if end_dim >= 0 and end_dim < at:
        return at - (end_dim - start_dim)
    return ROWS if start_dim == 0 else None


def unflatten(axis: Axis, dim: int, sizes: Any) -> Axis:
    at = index_of(axis)
    if dim < 0 or dim > at:
        return axis
    return (at + len(sizes) - 1 if dim < at else axis if at == 0 else None) if isinstance(axis, int) else None


def unsqueeze(axis: Axis, dim: int = 0) -> Axis:
    if dim < 0 or dim > index_of(axis):
        return axis
    return axis + 1 if isinstance(axis, int) else None


def squeeze(axis: Axis, dim: Any = None) -> Axis:
    if isinstance(dim, int) and (dim < 0 or dim > index_of(axis)):
        return axis
    return axis if dim is None and axis == 0 else None


def removed(axis: Axis, dim: Any, *_: Any) -> Axis:
    """Of ops that take axis `dim` away: `select`, `unbind`."""
    if dim < 0 or dim > index_of(axis):
        return axis
    return axis - 1 if isinstance(axis, int) and dim < axis else None


def reduced(axis: Axis, dim: Any = None, keepdim: bool = False, **_: Any) -> Axis:
    if isinstance(dim, fx.Node):  # `max` of two tensors
        return axis
    dims = (dim,) if isinstance(dim, int) else dim
    if not isinstance(dims, tuple | list) or index_of(axis) in dims:
        return None
    return axis - sum(0 <= d < axis for d in dims) if isinstance(axis, int) and not keepdim else axis


def joined(axis: Axis, dim: int = 0) -> Axis:
    return axis if dim != index_of(axis) else ROWS if dim == 0 else None


def repeated(axis: Axis, *times: Any) -> Axis:
    first = times[0][0] if isinstance(times[0], tuple | list) else times[0]
    return axis if first == 1 else ROWS if index_of(axis) == 0 else None


def expanded(axis: Axis, rank: int | None, *sizes: Any) -> Axis:
    sizes = tuple(sizes[0]) if sizes and isinstance(sizes[0], tuple | list) else sizes
    if not isinstance(axis, int):
        return None
    axis += 0 if rank is None else len(sizes) - rank
    size = sizes[axis] if axis < len(sizes) else 1
    return axis if isinstance(size, fx.Node) or size == -1 else None  # a number: the sample's axis may be further on


def broadcast(axis: Axis, rank: int | None, constant: torch.Size) -> Axis:
    """Of a tensor of `rank` axes with a constant of shape `constant`: one of more axes puts its own before the sample's.

    [B, 5] + [4, 1, 5] is [4, B, 5], so that axis 0 becomes 1. Where the rank is not known, a constant of three axes or more whose
    first is no 1 is taken to be the longer, and the axis is not known, but for [C, 1, 1], by which channels are scaled and images
    normalised.
    """
    if rank is None:
        return axis if len(constant) < 3 or constant[0] == 1 or set(constant[1:]) == {1} else None
    if len(constant) <= rank:
        return axis
    return axis + len(constant) - rank if isinstance(axis, int) else None


def rank_of(node: Any, axes: dict[fx.Node, Axis], leaf: Callable) -> int | None:
    """The number of axes of a node's value, where the calls that made it tell: 4 after `conv2d`; None where they do not."""
    while isinstance(node, fx.Node) and node in axes:
        if "val" in node.meta:
            return node.meta["val"].dim()
        module, args = leaf(node), node.args[1:]
        name = "" if node.op == "call_module" else name_of(node)
        flat = args[0] if len(args) == 1 and isinstance(args[0], tuple | list) else args
        spatial = SPATIAL.search(name if module is None else type(module).__name__)
        if spatial is not None and not isinstance(module, nn.BatchNorm1d):  # which takes two axes too
            return int(spatial[1]) + 2
        known = RANKS.get(name)
        if known == "sizes":
            return len(flat)
        if known == "flat" and tuple(flat) == (1,):
            return 2
        if known in ("less", "more"):
            source, index = node.args[0], node.args[1] if len(node.args) > 1 else 0
            several = name == "getitem" and isinstance(source, fx.Node) and name_of(source) in SEVERAL
            rank = rank_of(source, axes, leaf)
            if rank is None or (name == "getitem" and not several and not isinstance(index, int)):
                return None
            return rank + (0 if several else 1 if known == "more" else -1)  # an item of a tuple: `unbind` took its axis away
        if not isinstance(module, SEQUENCE_MODULES) and name and known != "same":
            return None
        node = next((n for n in node.all_input_nodes if n in axes), None)
    return None


def item(axis: Axis, index: Any) -> Axis:
    """Of `x[index]`: an int before the sample's axis takes an axis away, a None puts one there."""
    source, target = 0, index_of(axis)  # the axis of x that comes next, and where the sample's goes
    for part in index if isinstance(index, tuple) else (index,):
        if part is Ellipsis or source > index_of(axis):
            break
        if part is None:
            target += 1
            continue
        if source == index_of(axis) and part != slice(None):
            return None
        if source < index_of(axis) and not isinstance(part, slice | int):
            return None
        target -= isinstance(part, int)
        source += 1
    return target if isinstance(axis, int) else ROWS if target == 0 else None


def reshaped(axis: Axis, node: fx.Node) -> Axis:
    """Of `view` and `reshape`, by shapes where an export knows them, else by the sizes asked for.

    Samples on axis 0 stay there, unless the first size is a number: of [B, 6, 8], `reshape(-1, 8)` has rows of samples there,
    `reshape(3, -1, 8)` may have anything.
    """
    sizes = node.args[1] if isinstance(node.args[1], tuple | list) else node.args[1:]
    before, after = (n.meta["val"].shape if "val" in n.meta else None for n in (node.args[0], node))  # type: ignore[union-attr]
    at = index_of(axis)
    if before is not None and after is not None:
        if list(map(str, before[: at + 1])) == list(map(str, after[: at + 1])):
            return axis
        divides = isinstance(before[0], int) and len(after) > 0 and isinstance(after[0], int) and after[0] % before[0] == 0
        return axis if axis == 0 and divides else None
    if axis == 0:
        return 0 if sizes[0] == -1 or not isinstance(sizes[0], int) else None
    return ROWS if axis != ROWS and sizes[0] == -1 and len(sizes) == 2 else None


def contracted(axis: Axis, node: fx.Node, axes: dict[fx.Node, Axis]) -> Axis:
    """Of `einsum`: where the letter of the sample's axis is in the output. `einsum("btc,dc->tbd", x, w)` has it on axis 1."""
    equation, operands = node.args[0], node.args[1] if isinstance(node.args[1], tuple | list) else node.args[1:]
    if not isinstance(axis, int) or not isinstance(equation, str) or "->" not in equation or "." in equation:
        return None
    left, right = equation.replace(" ", "").split("->")
    letters = {term[axis] for term, operand in zip(left.split(","), operands) if operand in axes}
    letter = letters.pop() if len(letters) == 1 else ""
    return right.index(letter) if letter and letter in right else None


def written(node: fx.Node, axes: dict[fx.Node, Axis]) -> Axis:
    """Of a tensor that was written over: its own axis, or, of one that did not vary before, that of what was written, counted in
    the tensor that its place is a part of."""
    tensor, write = node.args[:2]
    if tensor in axes:
        return axes[tensor]  # type: ignore[index]
    place: Any = write
    axis = axes.get(place)
    while isinstance(place, fx.Node) and place is not tensor:
        args, moves = place.args, MOVEMENTS.get(name_of(place))
        if moves == "item" or name_of(place) == "setitem":
            axis = outside(axis, args[1])
        elif moves == "removed":
            axis = outside(axis, (*[slice(None)] * args[1], 0)) if args[1] >= 0 else None  # type: ignore[operator]
        elif moves not in (None, "written"):
            return None
        place = args[0] if args else None
    return axis if place is tensor else None


def outside(axis: Axis, index: Any) -> Axis:
    """The axis of `x` that is axis `axis` of `x[index]`: `x[:, 0]` has axes 0, 2 and so on of `x`."""
    if not isinstance(axis, int):
        return None
    at = 0
    for part in index if isinstance(index, tuple) else (index,):
        if part is Ellipsis or (isinstance(part, slice) and axis == 0):
            break
        if not isinstance(part, slice | int):
            return None
        axis -= isinstance(part, slice)
        at += 1
    return at + axis


BY_ARGUMENTS = (permute, transpose, matrix_transpose, movedim, flatten, unflatten, unsqueeze, squeeze, removed, reduced,
                joined, repeated)  # fmt: skip

MOVES: dict[str, Callable[..., Axis]] = {op: f for op, moves in MOVEMENTS.items() for f in BY_ARGUMENTS if f.__name__ == moves}
