"""What a node of a graph calls: the op's plain name, however the model spells it.

`F.relu(x)`, `torch.relu_(x)`, `x.relu_()` and `aten.relu_.default(x)` are all called `relu`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils.parametrize import is_parametrized

from ..capture.kept_functions import applied
from ..gates.registry import call_registered
from .ops import CHOICES, FACTORS, ITSELF, having

# Leaves of torch.nn that are affine in eval mode. Any other leaf may hide a gate.
AFFINE_MODULES = (
    *(nn.Linear, nn.Identity, nn.Flatten, nn.Unflatten, nn.Embedding, nn.EmbeddingBag, nn.Fold, nn.Unfold, nn.Upsample),
    *(nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase),
    *(nn.modules.dropout._DropoutNd, nn.modules.padding._ConstantPadNd, nn.modules.padding._ReflectionPadNd),
    *(nn.modules.padding._ReplicationPadNd, nn.modules.padding._CircularPadNd, nn.modules.pooling._AvgPoolNd),
    *(nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._MaxUnpoolNd),
)

CONV = ("conv", ("weight", "bias"), ("stride", "padding", "dilation", "groups"))
NORM = ("affine_norm", ("running_mean", "running_var", "weight", "bias"), ("eps",))

AFFINE_ROWS: dict[type[nn.Module], tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), CONV),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), NORM),
    nn.Linear: ("linear", ("weight", "bias"), ()),
}

ONLY_IN_PLACE, OF_AXES_OR_TWO = having("in_place"), having("either")

# The operators of `h += 1` and its like, by their plain names: `iadd`.
AUGMENTED = frozenset(name[2:-2] for name in dir(operator) if name.startswith("__i") and hasattr(operator, f"__{name[3:]}"))


def op_of(node: fx.Node) -> Any:
    """What a node calls; of an ATen op, whatever its overload."""
    return node.target.overloadpacket if isinstance(node.target, torch._ops.OpOverload) else node.target


def name_of(node: fx.Node) -> str:
    """An op's plain name: `relu` for `F.relu`, `torch.relu_`, `Tensor.relu_` and `aten.relu_.default`."""
    if node.target is call_registered:
        return str(node.args[0])
    if node.target is applied:
        return str(node.args[0]).partition("#")[0].rpartition(".")[2].rpartition(":")[2]
    target = op_of(node)
    target = getattr(target, "stands_for", target)
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    if isinstance(target, type(F.max_pool2d)) and name == "fn":  # how F wraps the pools that may return indices
        name = next((n for n in dir(F) if getattr(F, n) is target), name)
    if name in OF_AXES_OR_TWO and isinstance(node.kwargs.get("other", (*node.args, None, None)[1]), fx.Node):
        return f"{name}imum"  # of two tensors, by another name
    if name == "einsum" and len(operands_of_einsum(node)) == 1:  # a view of its operand, as "ij->ji" is
        return "diagonal"
    return name.strip("_")


def operands_of_einsum(node: fx.Node) -> Sequence[Any]:
    """Returns the tensors that an einsum multiplies, which may come one by one or in a list."""
    operands = node.args[1:]
    return operands[0] if len(operands) == 1 and isinstance(operands[0], tuple | list) else operands


def operands_of(node: fx.Node) -> Sequence[Any]:
    """Returns the positional operands of a call; of an einsum, the tensors that it multiplies."""
    return operands_of_einsum(node) if name_of(node) == "einsum" else node.args


def written(node: fx.Node) -> list[fx.Node]:
    """Returns the tensors that a call writes over: `h` of `h.add_(1)`, `F.relu(h, inplace=True)`, `torch.mul(a, b, out=h)`."""
    if node.op not in ("call_function", "call_method"):
        return []
    if isinstance(node.target, torch._ops.OpOverload):
        arguments = node.target._schema.arguments
        values = [node.args[i] if i < len(node.args) else node.kwargs.get(a.name) for i, a in enumerate(arguments)]
        over = [value for a, value in zip(arguments, values) if a.alias_info is not None and a.alias_info.is_write]
    elif "out" in node.kwargs:
        over = [node.kwargs["out"]]
    elif is_in_place(node):
        over = [node.args[0] if node.args else node.kwargs.get("input")]
    else:
        return []
    if name_of(node) in ITSELF and not draws(node):
        return []
    return [n for value in over for n in (value if isinstance(value, tuple | list) else [value]) if isinstance(n, fx.Node)]


def is_in_place(node: fx.Node) -> bool:
    """Whether the call writes over its first argument, by its name or by an argument `inplace`."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    dunder = name.startswith("__") and name.endswith("__")
    if dunder or getattr(node.target, "__module__", None) == "_operator":
        return name.strip("_") in AUGMENTED or name.strip("_") == "setitem"
    return name.endswith("_") or argument(node, "inplace") is True


def argument(node: fx.Node, name: str) -> Any:
    """Returns the argument `name` of a call, wherever it stands, or its default; None where the function has none."""
    if name in node.kwargs:
        return node.kwargs[name]
    parameters = parameters_of(node.target) if node.op == "call_function" else {}
    if name not in parameters:
        return None
    index = list(parameters).index(name)
    return node.args[index] if index < len(node.args) else parameters[name].default


@functools.cache
def parameters_of(function: Any) -> Mapping[str, inspect.Parameter]:
    """Returns the parameters of a function by name; none of a builtin that does not say."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}


def draws(node: fx.Node) -> bool:
    """Whether a dropout is one that drops, also in eval mode, as `F.dropout(x)` does."""
    if name_of(node) not in ITSELF or "dropout" not in name_of(node):
        return False
    training = argument(node, "training")
    if training is None:  # torch.dropout(x, p, train), and the same in ATen
        training = node.kwargs.get("train", node.args[2] if len(node.args) > 2 else True)
    return training is not False


def recurrent_name(module: nn.Module) -> str:
    """Returns the name of the op that a recurrent network or cell of torch.nn calls."""
    if isinstance(module, nn.RNNBase):
        return module.mode.lower()
    kind = type(module).__name__.removesuffix("Cell").lower()
    return f"{kind}_{module.nonlinearity}_cell" if isinstance(module, nn.RNNCell) else f"{kind}_cell"


def writes(node: fx.Node) -> bool:
    """Whether the call writes over one of its arguments."""
    return bool(written(node))


def out_of_place(node: fx.Node) -> tuple[Any, tuple, dict[str, Any]] | None:
    """Returns the call that gives what a call in place writes, as target, arguments and keyword arguments; None where there is
    none.

    Of `h.add_(1)` it is `h.add(1)`, of `F.relu(h, inplace=True)` and of `F.relu_(h)` `F.relu(h)`, of `h += 1` `h + 1`.
    """
    target, args, kwargs = node.target, node.args, dict(node.kwargs)
    if name_of(node) in ONLY_IN_PLACE or name_of(node) == "setitem" or draws(node):
        return None
    if argument(node, "inplace") is True:
        index = list(parameters_of(target)).index("inplace") if "inplace" not in kwargs else len(args)
        if index < len(args):
            return target, (*args[:index], False, *args[index + 1 :]), kwargs
        return target, args, {**kwargs, "inplace": False}
    if "out" in kwargs:
        del kwargs["out"]
        return target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target, args, kwargs
    plain = plain_target(target)
    return None if plain is None else (plain, args, kwargs)


def plain_target(target: Any) -> Any:
    """Returns the function or method that computes what the in-place `target` writes; None where there is none."""
    if isinstance(target, torch._ops.OpOverload):
        packet = plain_target(target.overloadpacket)
        if packet is None:
            return None
        # The overload of that name, or else another: `pow_.Scalar` is `pow.Tensor_Scalar`, and `pow.Scalar` a number to a tensor.
        names = sorted(packet.overloads(), key=lambda name: name != target._overloadname)
        taken = [str(a.type) for a in target._schema.arguments]
        fits = [overload for overload in (getattr(packet, name) for name in names) if not overload._schema.is_mutable]
        return next((o for o in fits if [str(a.type) for a in o._schema.arguments] == taken), None)
    if isinstance(target, torch._ops.OpOverloadPacket):
        library, _, name = target._qualified_op_name.partition("::")
        return getattr(getattr(torch.ops, library), name.removesuffix("_"), None) if name.endswith("_") else None
    if isinstance(target, str):
        name = f"__{target[3:]}" if target.startswith("__i") else target.removesuffix("_")
        return name if hasattr(torch.Tensor, name) else None
    name = getattr(target, "__name__", "")
    if getattr(target, "__module__", None) == "_operator":
        return next((getattr(operator, name[1:] + end) for end in ("", "_") if hasattr(operator, name[1:] + end)), None)
    for space in (F, torch):
        if name.endswith("_") and getattr(space, name, None) is target:
            return getattr(space, name.removesuffix("_"), None)
    return None


def known(target: Any) -> bool:
    """Whether a function is one of torch's or Python's own, whose derivative torch knows."""
    if target is applied:
        return False
    if isinstance(target, torch._ops.OpOverloadPacket):  # anyone's ops live under torch.ops
        return target._qualified_op_name.split("::")[0] in ("aten", "prims", "sp_fx")
    if isinstance(target, torch._ops.HigherOrderOperator):
        return False
    if isinstance(target, type) and (dataclasses.is_dataclass(target) or issubclass(target, tuple | Mapping)):
        return True  # makes a container of the output
    module = getattr(target, "__module__", None) or type(target).__module__
    return module.split(".")[0] in ("torch", "_operator", "operator", "builtins", "math", "sp_fx", "_VariableFunctionsClass")


def keywords(node: fx.Node) -> dict[str, Any]:
    """The keyword arguments of a gating call in PyTorch's own names: it takes NumPy's too."""
    names = {"axis": "dim", "keepdims": "keepdim"}
    return {names.get(key, key): value for key, value in node.kwargs.items() if key != "_stacklevel"}


def is_affine_row(leaf: Any) -> bool:
    """Whether a leaf computes, by its own tensors, what its row of the table does."""
    if type(leaf) not in AFFINE_ROWS or is_parametrized(leaf) or leaf._buffers.get("running_mean", 0) is None:
        return False
    return AFFINE_ROWS[type(leaf)][0] != "conv" or (leaf.padding_mode == "zeros" and leaf.padding != "same")


def is_multiplication(node: fx.Node) -> bool:
    return name_of(node) in FACTORS


def masks_of(node: fx.Node) -> list[Any]:
    """Returns the arguments of a call that may choose between others: `mask` of `torch.where(mask, a, b)`, both factors of a
    product."""
    name = name_of(node)
    if name in CHOICES:
        return [node.args[0 if name == "where" and node.op == "call_function" else 1]] if len(node.args) > 1 else []
    return list(node.args[:2]) if name in FACTORS else []
