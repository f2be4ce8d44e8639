"""A copy of a captured module, made ready to be traced as one inference graph.

BatchNorms are folded into the convolutions that feed them, identities are removed, and global average pooling becomes a mean.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd

from ...capture.clones.clone import EvalClone
from ...capture.passed import lets_through
from ...gates.dual_path import dual_path


def folded(captured: fx.GraphModule) -> fx.GraphModule:
    """Returns a copy of the captured module in which every BatchNorm that a convolution feeds is folded into that convolution.

    Before the trace, because Inductor's own folding does not see through the adjoint, which would scale by the BatchNorm once
    more on the way back. The modules are clones: a trace puts stand-ins for the weights into them, and the captured module may
    be running in another thread.
    """
    module = fx.GraphModule(EvalClone()(captured), copy.deepcopy(captured.graph))
    for node in list(module.graph.nodes):
        if node.op == "call_module" and lets_through(module.get_submodule(node.target)):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    for i, node in enumerate(list(module.graph.nodes)):
        conv: Any = node.args[1] if is_row(node, "affine_norm") else None
        foldable = is_row(conv, "conv") and len(conv.users) == 1 and "autocast" not in {**conv.kwargs, **node.kwargs}
        # Weights that the forward computes (`weight - weight.mean()`) are not known yet.
        if foldable and all(n is None or n.op == "get_attr" for n in (*conv.args[2:4], *node.args[2:6])):
            fold(module, conv, node, f"folded_{i}")
    for node in list(module.graph.nodes):
        average_by_mean(module, node)
    module.graph.lint()
    module.recompile()
    return module


def passed_through(module: nn.Module, node: fx.Node) -> fx.Node:
    """Returns the node that `node` is the value of: that before identities and marks, which `folded` takes out."""
    while node.op == "call_module" and lets_through(module.get_submodule(str(node.target))):
        node = node.args[0]  # type: ignore[assignment]
    return node


def average_by_mean(module: fx.GraphModule, node: fx.Node) -> None:
    """Replaces `node`, where it is a global average pooling, by a mean: PyTorch's own restrides channels-last results in place,
    and the adjoint of that is a scatter."""
    size: Any
    size, axes = 0, 0
    if node.op == "call_module" and isinstance(leaf := module.get_submodule(str(node.target)), _AdaptiveAvgPoolNd):
        size, axes = leaf.output_size, int(type(leaf).__name__[-2])
    elif node.target in ADAPTIVE and len(node.args) == 2:
        size, axes = node.args[1], ADAPTIVE[node.target]
    if axes and set(size if isinstance(size, Sequence) else [size]) == {1}:
        with module.graph.inserting_before(node):
            mean = module.graph.call_method("mean", (node.args[0], tuple(range(-axes, 0)), True))
        node.replace_all_uses_with(mean)
        module.graph.erase_node(node)


ADAPTIVE: dict[Any, int] = {F.adaptive_avg_pool1d: 1, F.adaptive_avg_pool2d: 2, F.adaptive_avg_pool3d: 3}


def is_row(node: Any, kind: str) -> bool:
    """Whether `node` is a dual-path call of the row `kind` of the table of adjoints, such as "conv"."""
    return isinstance(node, fx.Node) and node.target is dual_path and bool(node.args[0] == kind)


def fold(module: fx.GraphModule, conv: fx.Node, norm: fx.Node, name: str) -> None:
    """Replaces `norm(conv(x))` by a convolution with the weights of both, computed in float64: two buffers called `name`_*."""

    def value(node: Any, default: float) -> Tensor:
        if node is None:
            return torch.full((), default, dtype=torch.float64)
        return operator.attrgetter(node.target)(module).detach().double()

    weight, bias = conv.args[2:4]
    mean, variance, gamma, beta = norm.args[2:6]
    eps: Any = norm.kwargs["eps"]
    dtype = operator.attrgetter(str(weight.target))(module).dtype  # type: ignore[union-attr]
    gain = torch.rsqrt(value(variance, 1.0) + eps) * value(gamma, 1.0)
    scaled = value(weight, 1.0)
    scaled = scaled * gain.view(-1, *[1] * (scaled.dim() - 1))
    shift = (value(bias, 0.0) - value(mean, 0.0)) * gain + value(beta, 0.0)
    module.register_buffer(f"{name}_weight", scaled.to(dtype))
    module.register_buffer(f"{name}_bias", shift.to(dtype))
    with module.graph.inserting_before(conv):
        parameters = [module.graph.get_attr(f"{name}_{part}") for part in ("weight", "bias")]
    conv.args = (*conv.args[:2], *parameters)
    norm.replace_all_uses_with(conv)
    module.graph.erase_node(norm)
