"""Which axis of each tensor of a graph is the sample: what a sample's own scale may be taken over.

Inputs have the batch on axis 0. Operations that move axes are followed by their arguments alone, since a symbolic trace knows
no shapes. `ROWS` is said of tensors whose rows along axis 0 each belong to one sample, in whatever order (times and samples
folded into one axis): harmless, until something unfolds them. None: not known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import fx, nn

ROWS: Literal["rows"] = "rows"
Axis = int | Literal["rows"] | None

SEVERAL = frozenset("chunk split unbind tensor_split split_with_sizes checked".split())  # these return a tuple
SEQUENCE_MODULES = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.MultiheadAttention, nn.RNNBase, nn.Identity,
                    nn.modules.dropout._DropoutNd)  # fmt: skip


def sample_axis(node: fx.Node, axes: dict[fx.Node, Axis], name_of: Callable[[fx.Node], str], module: nn.Module | None) -> Axis:
    """The sample's axis in the output of `node`, from those of its inputs.

    `axes` has every input that varies with the data, `name_of` gives an op's plain name, `module` is what the node calls if it
    calls a module.
    """
    if node.op == "placeholder":
        return 0
    found = [axes[n] for n in node.all_input_nodes if n in axes]
    axis = found[0] if found and all(a == found[0] for a in found) else None
    name, args, kwargs = name_of(node), node.args[1:], {k: v for k, v in node.kwargs.items() if k != "input"}
    if node.target is getattr:  # x.T
        name, args = str(node.args[1]), ()
    if axis is None or (module is not None and axis not in (0, ROWS) and not isinstance(module, SEQUENCE_MODULES)):
        return None
    if node.op == "call_module" and module is None:  # an identity, whatever it is called
        return axis
    if name == "getitem" and isinstance(node.args[0], fx.Node):
        several = node.args[0].op == "call_module" or name_of(node.args[0]) in SEVERAL
        return axis if several else item(axis, node.args[1])
    if name in ("view", "reshape", "_unsafe_view"):
        return reshaped(axis, node)
    if name == "einsum":
        return contracted(axis, node, axes)
    if module is None and name in MOVES:
        try:
            return MOVES[name](axis, *args, **kwargs)
        except TypeError:  # arguments that are computed at run time
            return None
    return axis


# -- what moves axes: (the sample's axis, the op's own arguments) -> the sample's axis ----------------------------------


def place(axis: Axis) -> int:
    return axis if isinstance(axis, int) else 0


def permute(axis: Axis, *dims: Any) -> Axis:
    order = dims[0] if isinstance(dims[0], tuple | list) else dims
    at = [d % len(order) for d in order].index(place(axis))
    return at if isinstance(axis, int) else ROWS if at == 0 else None


def transpose(axis: Axis, dim0: int, dim1: int) -> Axis:
    first, second = sorted((dim0, dim1), key=lambda d: d < 0)
    if first < 0:  # of the matrices in a batch
        return axis if place(axis) == 0 else None
    if second < 0:
        return axis if place(axis) == 0 and first > 0 else None
    if place(axis) not in (first, second):
        return axis
    return (second if axis == first else first) if isinstance(axis, int) else None


def matrix_transpose(axis: Axis) -> Axis:
    return 1 - axis if axis in (0, 1) else None  # type: ignore[operator]


def movedim(axis: Axis, source: int, destination: int) -> Axis:
    if not isinstance(axis, int) or source < 0 or destination < 0:
        return axis if place(axis) == 0 and source != 0 and destination != 0 else None
    if source == axis:
        return destination
    return axis - (source < axis) + (destination <= axis - (source < axis))


def flatten(axis: Axis, start_dim: int = 0, end_dim: int = -1) -> Axis:
    at = place(axis)
    if at == 0 or start_dim > at:
        return axis
    if end_dim >= 0 and end_dim < at:
        return at - (end_dim - start_dim)
    return ROWS if start_dim == 0 else None


def unflatten(axis: Axis, dim: int, sizes: Any) -> Axis:
    at = place(axis)
    if dim < 0 or dim > at:
        return axis
    return (at + len(sizes) - 1 if dim < at else axis if at == 0 else None) if isinstance(axis, int) else None


def unsqueeze(axis: Axis, dim: int = 0) -> Axis:
    if dim < 0 or dim > place(axis):
        return axis
    return axis + 1 if isinstance(axis, int) else None


def squeeze(axis: Axis, dim: Any = None) -> Axis:
    if isinstance(dim, int) and (dim < 0 or dim > place(axis)):
        return axis
    return axis if dim is None and axis == 0 else None


def removed(axis: Axis, dim: Any, *_: Any) -> Axis:
    """One axis goes: `select`, `unbind`."""
    if dim < 0 or dim > place(axis):
        return axis
    return axis - 1 if isinstance(axis, int) and dim < axis else None


def reduced(axis: Axis, dim: Any = None, keepdim: bool = False, **_: Any) -> Axis:
    if isinstance(dim, fx.Node):  # `max` of two tensors
        return axis
    dims = (dim,) if isinstance(dim, int) else dim
    if not isinstance(dims, tuple | list) or place(axis) in dims:
        return None
    return axis - sum(0 <= d < axis for d in dims) if isinstance(axis, int) and not keepdim else axis


def joined(axis: Axis, dim: int = 0) -> Axis:
    return axis if dim != place(axis) else ROWS if dim == 0 else None


def repeated(axis: Axis, *times: Any) -> Axis:
    first = times[0][0] if isinstance(times[0], tuple | list) else times[0]
    return axis if first == 1 else ROWS if place(axis) == 0 else None


def item(axis: Axis, index: Any) -> Axis:
    """Of `x[index]`."""
    read, out = 0, place(axis)
    for part in index if isinstance(index, tuple) else (index,):
        if part is Ellipsis or read > place(axis):
            break
        if part is None:
            out += 1
            continue
        if read == place(axis) and part != slice(None):
            return None
        if read < place(axis) and not isinstance(part, slice | int):
            return None
        out -= isinstance(part, int)
        read += 1
    return out if isinstance(axis, int) else ROWS if out == 0 else None


def reshaped(axis: Axis, node: fx.Node) -> Axis:
    """Samples that lead stay together, unless the new first size says otherwise. An exported graph knows the shapes."""
    sizes = node.args[1] if isinstance(node.args[1], tuple | list) else node.args[1:]
    before, after = (n.meta["val"].shape if "val" in n.meta else None for n in (node.args[0], node))  # type: ignore[union-attr]
    at = place(axis)
    if before is not None and after is not None:
        if list(map(str, before[: at + 1])) == list(map(str, after[: at + 1])):
            return axis
        divides = isinstance(before[0], int) and len(after) > 0 and isinstance(after[0], int) and after[0] % before[0] == 0
        return axis if axis == 0 and divides else None
    if axis == 0:
        return 0 if sizes[0] == -1 or not isinstance(sizes[0], int) else None
    return ROWS if axis != ROWS and sizes[0] == -1 and len(sizes) == 2 else None


def contracted(axis: Axis, node: fx.Node, axes: dict[fx.Node, Axis]) -> Axis:
    """Of `einsum`."""
    equation, operands = node.args[0], node.args[1] if isinstance(node.args[1], tuple | list) else node.args[1:]
    if not isinstance(axis, int) or not isinstance(equation, str) or "->" not in equation or "." in equation:
        return None
    left, right = equation.replace(" ", "").split("->")
    letters = {term[axis] for term, operand in zip(left.split(","), operands) if operand in axes}
    letter = letters.pop() if len(letters) == 1 else ""
    return right.index(letter) if letter and letter in right else None


REDUCTIONS = "mean sum amax amin max min prod std var norm logsumexp all any argmax argmin median".split()
MOVES: dict[str, Callable[..., Axis]] = {
    "permute": permute,
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), transpose),
    **dict.fromkeys(("T", "t", "numpy_T"), matrix_transpose),
    **dict.fromkeys(("movedim", "moveaxis"), movedim),
    "flatten": flatten,
    "unflatten": unflatten,
    **dict.fromkeys(("unsqueeze", "stack"), unsqueeze),
    "squeeze": squeeze,
    **dict.fromkeys(("select", "unbind"), removed),
    **dict.fromkeys(REDUCTIONS, reduced),
    **dict.fromkeys(("cat", "concat", "concatenate"), joined),
    **dict.fromkeys(("repeat", "tile"), repeated),
}
