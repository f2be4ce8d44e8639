"""How many gating ATen ops a model runs on its input, counted below its Python code, against what a report lists.

Both count by families, since PyTorch reaches an op in more than one way: `F.relu6` dispatches hardtanh, attention a softmax or a
fused kernel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from ..analysis.ops import CELLS, COMPARISONS, DISPATCHED, GUARDS, LISTED
from ..containers import rebuilt
from ..rewrite.report import WRITTEN_OUT, Report


class Dispatched(TorchDispatchMode):
    """Counts, by family, the gating ops that are called on tensors computed from `inputs`, not those on parameters alone.

    A buffer that is filled in place is computed from what is written into it, and so are its views.
    """

    def __init__(self, inputs: Any) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.varying = WeakIdKeyDictionary()
        self.written = WeakIdKeyDictionary()  # storages
        self.mark(inputs)

    def mark(self, value: Any) -> None:
        rebuilt(value, lambda t: self.varying.__setitem__(t, True) if isinstance(t, Tensor) else None)

    def mark_written(self, value: Any) -> None:
        rebuilt(value, lambda t: self.written.__setitem__(t.untyped_storage(), True) if has_storage(t) else None)

    def varies(self, t: Tensor) -> bool:
        return t in self.varying or (has_storage(t) and t.untyped_storage() in self.written)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        varies: list[bool] = []
        rebuilt((args, kwargs or {}), lambda t: varies.append(self.varies(t)) if isinstance(t, Tensor) else None)
        result = func(*args, **(kwargs or {}))
        if any(varies):
            name = func.overloadpacket.__name__.strip("_")
            if name in DISPATCHED and isinstance(first := next((a for a in args if isinstance(a, Tensor)), None), Tensor):
                # Integers are clamped to make indices of, as in relative positions.
                self.counts[DISPATCHED[name]] += first.is_floating_point() or first.is_complex()
            self.mark(result)
            if func._schema.is_mutable:
                self.mark_written(result)
        return result


class Guarded(TorchFunctionMode):
    """Counts nothing inside calls that only ask about numbers, as `isfinite` takes magnitudes to do so, and nothing inside
    recurrent networks, which are one line of the report: PyTorch dispatches their steps."""

    def __init__(self, mode: Dispatched) -> None:
        super().__init__()
        self.mode = mode

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") not in GUARDS | COMPARISONS | CELLS:
            return func(*args, **(kwargs or {}))
        before = self.mode.counts.copy()
        result = func(*args, **(kwargs or {}))
        self.mode.counts = before
        return result


def has_storage(t: Any) -> bool:
    return isinstance(t, Tensor) and t.layout == torch.strided


def dispatched(model: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]) -> Counter[str]:
    """The families of gating ops that `model` runs on copies of the arguments, and how often."""

    def copied(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        # With gradients PyTorch does not fuse transformer layers into one op; a leaf could not be written over.
        return t.detach().clone().requires_grad_() * 1 if t.is_floating_point() else t.clone()

    copies = rebuilt((args, dict(kwargs)), copied)
    with torch.enable_grad(), Dispatched(copies) as mode, Guarded(mode):
        model(*copies[0], **copies[1])
    return +mode.counts


def listed(report: Report) -> tuple[Counter[str], Counter[str]]:
    """The families of the calls that a report lists, rewritten or not, and how often at least and at most: a cosine similarity
    clamps each length that is computed from the input, one of which may be of a constant."""
    ops = [site.op.removesuffix(WRITTEN_OUT) for site in report.sites]
    fewest, most = Counter[str](), Counter[str]()
    for family in (family for op in ops if op in LISTED for family in LISTED[op].split("+")):
        name, _, times = family.partition("*")
        fewest[name] += 1
        most[name] += int(times or 1)
    return fewest, most
