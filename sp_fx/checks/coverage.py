"""How many gating ATen ops a model runs on its input, counted below its Python code, against what a report lists.

Both count by families, since PyTorch reaches an op in more than one way: `F.relu6` dispatches hardtanh, attention a softmax or a
fused kernel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from ..analysis.ops import CELLS, COMPARISONS, DISPATCHED, GUARDS, LISTED
from ..capture.capture import tracing
from ..capture.kept_functions import calling_stand_ins, functions_kept
from ..containers import rebuilt, tensors_of
from ..rewrite.report import WRITTEN_OUT, Report


@dataclass(frozen=True)
class Ran:
    """An op that was called: its family, "" where it counts for none, and the earlier ones that its operands are from."""

    family: str
    after: frozenset[int]


class Dispatched(TorchDispatchMode):
    """Follows the ops that are called on tensors computed from `inputs`, not those on parameters alone.

    A buffer that is filled in place is computed from what is written into it, and so are its views.
    """

    def __init__(self, inputs: Any) -> None:
        super().__init__()
        self.ran: list[Ran] = []
        self.asked: set[int] = set()  # what is read as a number, which Python may go by
        self.counts = True
        self.makers = WeakIdKeyDictionary()  # of a tensor, the ops that it is from: none of an input
        self.writers = WeakIdKeyDictionary()  # of a storage
        rebuilt(inputs, lambda t: self.makers.__setitem__(t, frozenset()) if isinstance(t, Tensor) else None)

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """While it lasts, ops are followed and count for nothing."""
        before, self.counts = self.counts, False
        try:
            yield
        finally:
            self.counts = before

    def varies(self, t: Tensor) -> bool:
        return t in self.makers or (has_storage(t) and t.untyped_storage() in self.writers)

    def sources(self, t: Tensor) -> frozenset[int]:
        """The ops that a tensor is from: what made it, and what wrote into its storage, which it may be a view of."""
        written = self.writers.get(t.untyped_storage(), frozenset()) if has_storage(t) else frozenset()
        return self.makers.get(t, frozenset()) | written

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands: list[Tensor] = []
        rebuilt((args, kwargs or {}), lambda t: operands.append(t) if isinstance(t, Tensor) and self.varies(t) else None)
        result = func(*args, **(kwargs or {}))
        if operands:
            name = func.overloadpacket.__name__.strip("_")
            after, number = frozenset().union(*map(self.sources, operands)), len(self.ran)
            # Integers are clamped to make indices of, as in relative positions.
            first = next((a for a in args if isinstance(a, Tensor)), None)
            gates = name in DISPATCHED and first is not None and (first.is_floating_point() or first.is_complex())
            self.ran.append(Ran(DISPATCHED[name] if gates and self.counts else "", after))
            written = func._schema.is_mutable
            tensors: list[Tensor] = []
            rebuilt(result, lambda t: tensors.append(t) if isinstance(t, Tensor) else None)
            for t in tensors:
                self.makers[t] = frozenset((number,))
                if written and has_storage(t):
                    self.writers[t.untyped_storage()] = self.writers.get(t.untyped_storage(), frozenset()) | {number}
            if not tensors:
                self.asked.add(number)
        return result

    def families(self, output: Any) -> tuple[Counter[str], Counter[str]]:
        """The families of the gating ops and how often: of those that the tensors of `output` are made of, or that a number was
        read of; and of all."""
        waiting, used = [*self.asked], set[int]()
        for t in tensors_of(output):
            waiting += self.sources(t)
        while waiting:
            if (number := waiting.pop()) not in used:
                used.add(number)
                waiting += self.ran[number].after
        every = Counter(op.family for op in self.ran if op.family)
        return Counter(op.family for number, op in enumerate(self.ran) if op.family and number in used), every


class Guarded(TorchFunctionMode):
    """Counts nothing inside calls that only ask about numbers, as `isfinite` takes magnitudes to do so, and nothing inside
    recurrent networks, which are one line of the report: PyTorch dispatches their steps."""

    def __init__(self, mode: Dispatched) -> None:
        super().__init__()
        self.mode = mode

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") not in GUARDS | COMPARISONS | CELLS:
            return func(*args, **(kwargs or {}))
        with self.mode.uncounted():
            return func(*args, **(kwargs or {}))


def has_storage(t: Any) -> bool:
    return isinstance(t, Tensor) and t.layout == torch.strided


def dispatched(
    model: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any], whole: Collection[str] = ()
) -> tuple[Counter[str], Counter[str]]:
    """The families of gating ops that `model` runs on copies of the arguments, and how often: of those that its outputs are made
    of, and of all, with those whose result it drops, as a head that serves the loss alone. Inside an `autograd.Function` whose
    class has a name among `whole` none counts: it is a line of the report itself."""

    def copied(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        # With gradients PyTorch does not fuse transformer layers into one op; a leaf could not be written over.
        return t.detach().clone().requires_grad_() * 1 if t.is_floating_point() else t.clone()

    apply = torch.autograd.Function.__dict__["apply"]

    def uncounted(cls: Any, args: tuple, kwargs: dict) -> Any:
        if cls.__name__ not in whole:
            return None
        with mode.uncounted():
            return apply.__get__(None, cls)(*args, **kwargs)

    copies, module = rebuilt((args, dict(kwargs)), copied), getattr(model, "module", model)
    with ExitStack() as patches:
        if whole and isinstance(module, nn.Module):
            patches.enter_context(tracing)
            patches.enter_context(calling_stand_ins(module))
            patches.enter_context(functions_kept(uncounted))
        patches.enter_context(torch.enable_grad())
        mode = patches.enter_context(Dispatched(copies))
        patches.enter_context(Guarded(mode))
        return mode.families(model(*copies[0], **copies[1]))


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
