"""How Inductor compiles a program's graph, and the forms of the graph that its code for a CPU is fastest in."""

from __future__ import annotations

import copy
import importlib.util
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from .replay import Replayed
from .signature import Run

aten = torch.ops.aten
COMPILING = threading.Lock()  # Inductor's config is global to the process


def compiled(graph: fx.GraphModule, example: Sequence[Tensor]) -> Run:
    """Returns `graph` as Inductor compiles it.

    Raises:
        ModuleNotFoundError: a program for a GPU, and no Triton.
    """
    if example[0].is_cuda and importlib.util.find_spec("triton") is None:
        raise ModuleNotFoundError(
            "a program for a GPU is compiled by Triton, which is not installed: `pip install triton`, use the explainer as it is "
            "(eager), or compile for the CPU"
        )
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    stand_ins = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    with COMPILING, config.patch(config_for(graph)), tracing(TracingContext(stand_ins[0].fake_mode)):
        run: Any = compile_fx(suited(graph), stand_ins)
    if not example[0].is_cuda or any(not isinstance(n, int) for x in stand_ins for n in x.shape[1:]):
        return run  # a CUDA graph is of one length
    return Replayed(run, dynamic=not isinstance(stand_ins[0].shape[0], int))


def config_for(graph: fx.GraphModule) -> dict[str, Any]:
    """Returns Inductor's config for `graph`: weights are frozen into the code, but not in float64, for which oneDNN has no
    convolution and Inductor packs weights all the same (torch 2.15)."""
    freezing = all(t.dtype != torch.float64 for t in graph.buffers())
    long_loops = on_cpu(graph) and not any(map(concatenates_channels, graph.graph.nodes))
    return {"freezing": freezing} | ({"realize_opcount_threshold": LOOP_OPERATIONS} if long_loops else {})


def by_sizes(sizes: Sequence[torch.Size], of_these: Run, of_any: Run) -> Run:
    """Returns a function that calls `of_these` where the first tensors are of these `sizes`, and `of_any` where they are not."""
    return lambda *tensors: (of_these if all(t.shape == s for t, s in zip(tensors, sizes)) else of_any)(*tensors)


def packs(graph: fx.GraphModule) -> bool:
    """Whether Inductor would pack most of the weights if it knew the batch size: those of convolutions on a CPU.

    Where the batch is a symbol it packs them anew in every call, and leaves transposed convolutions as they are: ResNet-18 takes
    1.13 times as long at batch 4, ResNet-50 1.17.
    """
    weights = {n: getattr(graph, n.target) for n in graph.graph.find_nodes(op="get_attr")}
    packed = {n.args[1] for n in graph.graph.nodes if n.target is aten.convolution.default}
    numel = sum(weights[n].numel() for n in packed if n in weights)
    return all(t.device.type == "cpu" for t in weights.values()) and numel > sum(t.numel() for t in weights.values()) / 2


# -- what a CPU's code is faster in -------------------------------------------------------------------------------------

# The most operations of one loop before Inductor materialises its result. A soft gate is eighty operations: by Inductor's own
# bound of fifty it is written to memory and read again where a loop of another shape follows; by this one ConvNeXt-T's pullback
# takes 0.87 of the time. But not where channels are concatenated, whose cotangents are sums of slices that grow instead:
# DenseNet-121 is no faster by a bound of 100, and takes 195 s to compile, not 119.
LOOP_OPERATIONS = 200


def concatenates_channels(node: fx.Node) -> bool:
    return node.target is aten.cat.default and node.meta["val"].dim() == 4


def suited(graph: fx.GraphModule) -> fx.GraphModule:
    """Returns the same function, sharing its buffers, in the forms that Inductor's code for a CPU is fastest in."""
    if not on_cpu(graph):
        return graph
    graph = fx.GraphModule(graph, copy.deepcopy(graph.graph))
    for node in list(graph.graph.nodes):
        if node.target is aten.stack.default:
            replace_by_function(graph, node, stacked_channels_last)
        elif node.target in CHEAPER and node.meta["val"].dtype == torch.float32 and torch.__version__ >= "2.15":
            replace_by_function(graph, node, CHEAPER[node.target])  # 2.11 compiles these wrongly: a map 0.8 off
        elif node.target is aten.linalg_vector_norm.default:
            materialise_normed(graph, node)
        elif node.target is aten.mean.dim and one_a_sample(node) and node.meta["val"].dtype == torch.float32:
            replace_by_function(graph, node, mean_in_doubles)
        else:
            materialise_scale(graph, node)
    graph.recompile()
    return graph


def on_cpu(graph: fx.GraphModule) -> bool:
    return all(node.meta["val"].device.type == "cpu" for node in graph.graph.find_nodes(op="placeholder"))


def replace_by_function(graph: fx.GraphModule, node: fx.Node, function: Callable[..., Any]) -> None:
    """Replaces `node` by the calls that `function` makes of its arguments."""
    with graph.graph.inserting_before(node):
        tracer = fx.proxy.GraphAppendingTracer(graph.graph)
        args, kwargs = pytree.tree_map_only(fx.Node, lambda n: fx.Proxy(n, tracer), (tuple(node.args), dict(node.kwargs)))
        new = function(*args, **kwargs).node
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    graph.graph.erase_node(node)


SAME_NUMBERS = (aten.alias.default, aten.clone.default, aten.reshape.default, aten._unsafe_view.default)


def materialise_normed(graph: fx.GraphModule, norm: fx.Node) -> None:
    """Materialises the tensor that `norm` is of, the node before views and copies of it.

    It is read twice, for the norm and for the division by it, and Inductor would compute it both times: at the end of ResNet-18's
    pullback that is a pixel shuffle, and 3.9 ms of a step of its ascent at batch 4 instead of 0.6.
    """
    source: Any = norm.args[0]
    while source.target in SAME_NUMBERS:
        source = source.args[0]
    if source.op == "call_function" and "val" in source.meta:
        materialise(graph, source, list(source.users))


def materialise_scale(graph: fx.GraphModule, node: fx.Node) -> None:
    """Materialises `node` if it has one number a sample and is read by calls that have more: the scale [B, 1, 1, 1] of a gate.

    Inductor would take the root and the reciprocal of a deviation anew for each sixteen values that it gates: 0.42 ms for a gate
    of ResNet-18's first layer at batch 4, instead of 0.28.
    """
    if node.op == "call_function" and one_a_sample(node) and node.target not in REDUCTIONS:
        if users := [user for user in node.users if not one_a_sample(user)]:
            materialise(graph, node, users)


def mean_in_doubles(x: Any, dim: Sequence[int], keepdim: bool = False) -> Any:
    """A mean over whole samples, such as a moment of a gate's pre-activation.

    Inductor's loops add up from left to right, sixteen sums side by side: in float32 3e-5 off where one value is 1e4 times the
    others. It costs 1 to 6 % of the gate.
    """
    return aten._to_copy.default(aten.mean.dim(x, dim, keepdim, dtype=torch.float64), dtype=torch.float32)


REDUCTIONS = (aten.mean.dim, aten.sum.dim_IntList)  # Inductor materialises their results anyway


def one_a_sample(node: fx.Node) -> bool:
    """Whether the value of `node` is floating and has one number for each sample, as [B, 1, 1, 1] has."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    return value.dim() > 1 and all(size == 1 for size in value.shape[1:])


def materialise(graph: fx.GraphModule, node: fx.Node, users: list[fx.Node]) -> None:
    """Has Inductor write the value of `node` to memory, contiguous, and `users` read it there instead of computing it again."""
    from torch._inductor.inductor_prims import force_stride_order

    value = node.meta["val"]
    order = list(torch.empty(value.shape[1:], device="meta").unsqueeze(0).stride())  # of any batch
    with graph.graph.inserting_after(node):
        copied = graph.graph.call_function(force_stride_order, (node, order))
    copied.meta = {**node.meta, "val": value.contiguous()}
    node.replace_all_uses_with(copied, delete_user_cb=users.__contains__)


def stacked_channels_last(parts: Sequence[Any], dim: int = 0) -> Any:
    """A stack of pictures [B, C, H, W] with their channels innermost in memory, as convolutions have them here: Inductor would
    write it in the order of its axes, and ResNet-18's max pooling take 17 ms on the way back, not 8, at batch 4."""
    if dim != 0 or any(part.node.meta["val"].dim() != 4 for part in parts):
        return aten.stack.default(parts, dim)
    return aten.permute.default(aten.stack.default([aten.permute.default(part, [0, 2, 3, 1]) for part in parts]), [0, 1, 4, 2, 3])


# erf(x) / x for |x| <= 4 as a quotient of polynomials in x^2, fitted for the least largest error of erf: 5e-7 in float32.
ERF_NUMERATOR, ERF_DENOMINATOR = (
    [1.12837898, 0.196246137, 0.0534669187, 0.00400344925, 0.000288024703, 1.9747082e-06],
    [1.0, 0.507249776, 0.116475077, 0.0154440706, 0.00121628723, 3.74786845e-05],
)


def erf_by_quotient(x: Any) -> Any:
    """Inductor's own erf takes 0.7 ns an element on one AVX-512 core, this 0.45."""
    x = x.clamp(-4, 4)
    square = x * x
    numerator, denominator = (polynomial(square, coefficients) for coefficients in (ERF_NUMERATOR, ERF_DENOMINATOR))
    return (x * (numerator / denominator)).clamp(-1, 1)


def polynomial(x: Any, coefficients: Sequence[float]) -> Any:
    value = coefficients[-1]
    for c in reversed(coefficients[:-1]):
        value = value * x + c
    return value


def exp_by_exp2(x: Any) -> Any:
    """Inductor materialises whatever has an `exp` in it instead of computing it twice: the nine weights of each window of a max
    pooling, 29 MB for ResNet-18 at batch 4. It does not materialise an `exp2`."""
    return torch.exp2(x * math.log2(math.e))


CHEAPER: dict[Any, Callable[[Any], Any]] = {aten.erf.default: erf_by_quotient, aten.exp.default: exp_by_exp2}
