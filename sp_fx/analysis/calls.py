"""What a node of a graph calls: the op's plain name, however the model spells it.

`F.relu(x)`, `torch.relu_(x)`, `x.relu_()` and `aten.relu_.default(x)` are all called `relu`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils.parametrize import is_parametrized

from ..capture.kept_functions import applied
from ..capture.tracing.schemas import IN_PLACE
from ..gates.registry import call_registered
from .ops import CHOICES, FACTORS

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
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), NORM),
    nn.Linear: ("linear", ("weight", "bias"), ()),
}


def op_of(node: fx.Node) -> Any:
    """What a node calls; of an ATen op, whatever its overload."""
    return node.target.overloadpacket if isinstance(node.target, torch._ops.OpOverload) else node.target


def name_of(node: fx.Node) -> str:
    """An op's plain name: `relu` for `F.relu`, `torch.relu_`, `Tensor.relu_` and `aten.relu_.default`."""
    if node.target is call_registered:
        return str(node.args[0])
    if node.target is applied:
        return str(node.args[0]).rpartition(".")[2].rpartition(":")[2]
    target = op_of(node)
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    if isinstance(target, type(F.max_pool2d)) and name == "fn":  # how F wraps the pools that may return indices
        name = next((n for n in dir(F) if getattr(F, n) is target), name)
    return name.strip("_")


def writes(node: fx.Node) -> bool:
    """Whether the call writes over its first argument."""
    if node.op not in ("call_function", "call_method"):
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.target in IN_PLACE or (name.endswith("_") and not name.endswith("__")) or node.kwargs.get("inplace") is True


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
    return AFFINE_ROWS[type(leaf)][0] != "conv" or (leaf.padding_mode == "zeros" and not isinstance(leaf.padding, str))


def is_multiplication(node: fx.Node) -> bool:
    return name_of(node) in FACTORS


def masks_of(node: fx.Node) -> list[Any]:
    """Returns the arguments of a call that may choose between others: `mask` of `torch.where(mask, a, b)`, both factors of a
    product."""
    name = name_of(node)
    if name in CHOICES:
        return [node.args[0 if name == "where" and node.op == "call_function" else 1]] if len(node.args) > 1 else []
    return list(node.args[:2]) if name in FACTORS else []
