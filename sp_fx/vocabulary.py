"""What a call of a graph is called, and what is known of each name: the words in which the pass reads a model.

Ensures: a name means the same however a model spells it, as a function, a method, or an ATen op.
"""

from __future__ import annotations

import dataclasses
import importlib
import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.overrides import handle_torch_function, has_torch_function

from .register import call_registered

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
# What chooses by value, and has no rule: reported as not rewritten.
PIECEWISE = frozenset(
    """max min amax amin maximum minimum aminmax topk kthvalue sort msort median nanmedian quantile nanquantile mode cummax cummin
    logcumsumexp sign sgn heaviside round floor ceil trunc frac fmod remainder mod argmax argmin lp_pool1d lp_pool2d lp_pool3d
    gumbel_softmax""".split()
)
INDICES = frozenset(("argmax", "argmin"))  # of token ids, which are the caller's, they say where a text ends
# What is no gate, and keeps its derivative, as products and quotients of two things that vary do.
SMOOTH = frozenset(
    """sigmoid tanh softplus softsign logsigmoid hardsigmoid tanhshrink exp expm1 log log1p sin cos erf atan log_softmax
    logsumexp softmin""".split()
)
PRODUCT = frozenset("mul imul multiply matmul bmm mm einsum baddbmm addcmul addbmm bilinear".split())
QUOTIENT = frozenset("truediv div divide true_divide itruediv".split())
SHARES = frozenset("sigmoid hardsigmoid softmax tanh".split())  # what gates a product, before
ACTIVATIONS = frozenset("silu gelu relu relu6 hardtanh".split())
COMPLEX = ("stft", "fft_", "rfft", "ifft", "complex", "polar", "view_as_complex")  # what gives complex numbers
COMPARISONS = frozenset("gt ge lt le greater less greater_equal less_equal".split())
CHOICES = frozenset("where masked_fill".split())
LOGICAL = frozenset("logical_not logical_and logical_or logical_xor invert bitwise_not and or xor bool half double type".split())
CELLS = frozenset("lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell".split())
RECURRENT = "a recurrent cell, whose gates keep their derivative"
# torch's own, with gates inside
FUSED = frozenset("transformer_encoder_layer_fwd native_multi_head_attention multi_head_attention_forward".split())
# What may share the storage of its first input.
VIEW = frozenset(
    """view reshape view_as reshape_as flatten unflatten permute transpose swapaxes t T mT H movedim moveaxis squeeze unsqueeze
    expand expand_as split chunk unbind tensor_split narrow select getitem diagonal contiguous detach to float type_as getattr
    slice alias adjoint mH unfold real view_as_real unsafe_view checked
    dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout""".split()
)
IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem, operator.ipow, operator.imatmul}


def op_of(node: fx.Node) -> Any:
    """What a node calls; of an ATen op, whatever its overload."""
    return node.target.overloadpacket if isinstance(node.target, torch._ops.OpOverload) else node.target


APPLIED: dict[str, type[torch.autograd.Function]] = {}  # those that a trace has met, by module and name


def applied(name: str, *args: Any, **kwargs: Any) -> Any:
    """`Function.apply`, as a graph has it.

    Raises:
        LookupError: no such class in this process, which has unpickled the graph.
    """
    if has_torch_function(args):  # where an unpickled graph is traced again
        return handle_torch_function(applied, args, name, *args, **kwargs)
    if name not in APPLIED:
        module, _, path = name.partition(":")
        try:
            APPLIED[name] = operator.attrgetter(path)(importlib.import_module(module))
        except (ImportError, AttributeError) as error:
            raise LookupError(f"the autograd.Function {name} of an unpickled graph is not found here: {error}") from error
    return APPLIED[name].apply(*args, **kwargs)


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


# What depends on the shape of its input alone.
SHAPES = frozenset(
    """shape dtype device ndim size sym_size dim numel sym_numel stride len is_floating_point get_device zeros_like ones_like
    full_like empty_like new_zeros new_ones new_full new_empty new_tensor""".split()
)


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
