"""An explainer's graph made ready to be traced as one inference graph.

BatchNorms are folded into the convolutions that feed them, identities go, and global average pooling becomes a mean.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd

from ..capture.clone import EvalClone, lets_through
from ..gates.dual import dual_path


def folded(explainer: fx.GraphModule) -> fx.GraphModule:
    """The explainer's graph with every BatchNorm that a convolution feeds folded into it.

    Before capture, because Inductor's own folding does not see through the adjoint, which would scale by it once more on the
    way back. The modules are clones of the explainer's: a trace puts stand-ins for the weights into them, and the explainer may
    be running in another thread.
    """
    module = fx.GraphModule(EvalClone()(explainer), copy.deepcopy(explainer.graph))
    for node in list(module.graph.nodes):
        if node.op == "call_module" and lets_through(module.get_submodule(node.target)):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    for i, node in enumerate(list(module.graph.nodes)):
        conv: Any = node.args[1] if is_row(node, "affine_norm") else None
        fits = is_row(conv, "conv") and len(conv.users) == 1
        if fits and all(n is None or n.op == "get_attr" for n in (*conv.args[2:4], *node.args[2:6])):  # not computed in the pass
            fold(module, conv, node, f"folded_{i}")
    for node in list(module.graph.nodes):
        average_by_mean(module, node)
    module.graph.lint()
    module.recompile()
    return module


def average_by_mean(module: fx.GraphModule, node: fx.Node) -> None:
    """Global average pooling as a mean: PyTorch's own restrides channels-last results in place, whose adjoint is a scatter."""
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
    return isinstance(node, fx.Node) and node.target is dual_path and bool(node.args[0] == kind)


def fold(module: fx.GraphModule, conv: fx.Node, norm: fx.Node, name: str) -> None:
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
        held = [module.graph.get_attr(f"{name}_{part}") for part in ("weight", "bias")]
    conv.args = (*conv.args[:2], *held)
    norm.replace_all_uses_with(conv)
    module.graph.erase_node(norm)
