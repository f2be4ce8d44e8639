"""How many gating ATen ops a model runs on its input, counted below its Python code, against what a report lists."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from ..containers import rebuilt
from ..rewrite.report import Report

# Families of ops that PyTorch reaches in more than one way: F.relu6 dispatches hardtanh, attention a softmax or a fused kernel.
ATEN = {
    **dict.fromkeys(("relu", "leaky_relu", "elu", "gelu", "silu", "hardswish", "mish", "abs", "hardshrink", "softshrink")),
    **dict.fromkeys(("hardtanh", "relu6", "clamp", "clamp_min", "clamp_max", "threshold", "maximum", "minimum"), "clamp"),
    **dict.fromkeys(("prelu", "prelu_kernel"), "prelu"),
    **dict.fromkeys(("max_pool1d", "max_pool2d_with_indices", "max_pool3d_with_indices", "amax", "max"), "max_pool"),
    **dict.fromkeys(("mkldnn_max_pool2d", "adaptive_max_pool2d", "adaptive_max_pool3d"), "max_pool"),
    **dict.fromkeys(("fractional_max_pool2d", "fractional_max_pool3d"), "max_pool"),
    **dict.fromkeys(("softmax", "safe_softmax", "scaled_dot_product_attention_math"), "softmax"),
    **dict.fromkeys((f"scaled_dot_product_{how}_attention" for how in ("flash", "efficient", "cudnn", "fused")), "softmax"),
    "scaled_dot_product_flash_attention_for_cpu": "softmax",
    **dict.fromkeys(("selu", "celu"), "elu"),
    **dict.fromkeys("sign sgn heaviside round floor ceil trunc frac fmod remainder".split()),
    "native_layer_norm": "layer_norm",
    "native_group_norm": "group_norm",
}


CALLS = {
    **{name: family for name, family in ATEN.items() if "native" not in name},
    **dict.fromkeys(("rrelu",), "leaky_relu"),
    **dict.fromkeys(("clip", "normalize", "fmax", "fmin"), "clamp"),  # F.normalize clamps its denominator
    **dict.fromkeys((f"{how}max_pool{n}d{also}" for how in ("", "adaptive_", "fractional_") for n in "123"
                     for also in ("", "_with_indices")), "max_pool"),
    **dict.fromkeys(("scaled_dot_product_attention", "MultiheadAttention"), "softmax"),
    **dict.fromkeys(("absolute",), "abs"),
    "layer_norm": "layer_norm",
    "group_norm": "group_norm",
}  # fmt: skip


class Dispatched(TorchDispatchMode):
    """Counts the gating ops that get what came from `inputs`; ops on parameters alone are none of the input's gates."""

    def __init__(self, inputs: Any) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.varying = WeakIdKeyDictionary()
        self.mark(inputs)

    def mark(self, value: Any) -> None:
        rebuilt(value, lambda t: self.varying.__setitem__(t, True) if isinstance(t, Tensor) else None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given: list[bool] = []
        rebuilt((args, kwargs or {}), lambda t: given.append(t in self.varying) if isinstance(t, Tensor) else None)
        result = func(*args, **(kwargs or {}))
        if any(given):
            name = func.overloadpacket.__name__.strip("_")
            if name in ATEN and isinstance(first := next((a for a in args if isinstance(a, Tensor)), None), Tensor):
                # Integers are clamped to make indices of, as in relative positions.
                self.counts[ATEN[name] or name] += first.is_floating_point()
            self.mark(result)
        return result


def dispatched(model: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]) -> Counter[str]:
    """The families of gating ops that `model` runs on copies of the arguments, and how often."""

    def copied(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        # With gradients PyTorch does not fuse transformer layers into one op; a leaf could not be written over.
        return t.detach().clone().requires_grad_() * 1 if t.is_floating_point() else t.clone()

    given = rebuilt((args, dict(kwargs)), copied)
    with torch.enable_grad(), Dispatched(given) as mode:
        model(*given[0], **given[1])
    return +mode.counts


def listed(report: Report) -> Counter[str]:
    """The families of the calls that a report lists, whatever became of them."""
    found: Counter[str] = Counter()
    for site in report.sites:
        if site.op in CALLS:
            found[CALLS[site.op] or site.op] += 1
    return found
