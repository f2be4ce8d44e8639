"""The sample's axis: which axis of each tensor of a graph is the batch's, so that a gate's scale can be each sample's own.

It is measured. The graph is run twice on fake tensors, which have shapes and no numbers, at a batch and at twice that batch: the
axis whose size doubles is the sample's. A name says nothing: `x.T`, a GRU's last state and a user's own function are measured
alike.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode

from ..capture.arguments import ByName
from ..capture.passed import lets_through, operands
from ..containers import rebuilt, tensors_of
from .calls import name_of
from .ops import POINTWISE, PRODUCT

T = TypeVar("T")


@dataclass(frozen=True)
class Axis:
    """The axis of a tensor that the sample is, or is folded into.

    `fold` says how other things are folded into it: "" not at all; "outer": each sample's are next to each other, as the tokens
    of [B, T, C] after `reshape(-1, C)`; "inner": each of theirs has all samples next to each other, as those of [T, B, C].
    """

    index: int
    fold: Literal["", "outer", "inner"] = ""


def sample_axes(
    module: fx.GraphModule, arguments: Mapping[str, Any], wanted: Collection[fx.Node] = ()
) -> tuple[dict[fx.Node, Axis], str]:
    """Returns the sample's axis in the value of each node of `module`, where the value is a tensor and has one; and, where the
    module does not run at twice the batch, why. It is run on the arguments themselves then, for the nodes that are `wanted`.

    `arguments` are those of its forward, by name; the batch is axis 0 of the first floating tensor among them. Other tensors as
    long on axis 0 have the batch there too, unless the module only runs where they do not: a mask [L, L] for B = L.
    """
    floating = [t for t in tensors_of(arguments) if t.is_floating_point()]
    lead = (floating or tensors_of(arguments))[:1]
    if not lead or not lead[0].dim():
        return {}, "its inputs have no axis 0"
    axes, reason = in_its_own_thread(lambda: measured(module, arguments, lead[0]))
    if reason and floating and any(node not in axes for node in wanted):
        axes = {**in_its_own_thread(lambda: by_influence(module, arguments, lead[0].shape[0], wanted)), **axes}
    return axes, reason


def measured(module: fx.GraphModule, arguments: Mapping[str, Any], lead: Tensor) -> tuple[dict[fx.Node, Axis], str]:
    """`sample_axes`, where the batch is that of `lead`."""
    batch, outcomes = max(lead.shape[0], 2), []
    for axes in (1, None):  # those with the batch on axis 0 go along, or those of the first one's whole shape alone

        def at(size: int, axes: int | None = axes) -> Any:
            goes_along = lambda t: t.shape[:axes] == lead.shape[:axes]  # noqa: E731
            return rebuilt(arguments, lambda t: Form(t, size if goes_along(t) else None) if isinstance(t, Tensor) else t)

        once, twice = (Fakes(module, at(size)) for size in (batch, 2 * batch))
        error = twice.error or once.error
        reason = f"it does not run at {2 * batch} samples: {error}" if error else ""
        outcomes.append((compared(module, batch, once.values, twice.values), reason))
        if not reason:
            break
    return max(outcomes, key=lambda outcome: (not outcome[1], len(outcome[0])))


def by_influence(
    module: fx.GraphModule, arguments: Mapping[str, Any], batch: int, wanted: Collection[fx.Node]
) -> dict[fx.Node, Axis]:
    """Returns the axes of the nodes that are `wanted`, for a module that runs at the batch of the arguments alone: where a change
    of the first sample changes their values."""

    def changed(leaf: Any) -> Any:
        if not (isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.shape[:1] == (batch,)):
            return leaf
        leaf = leaf.detach().clone()
        leaf[0] += torch.linspace(-1, 1, leaf[0].numel(), device=leaf.device).to(leaf.dtype).view(leaf[0].shape)
        return leaf

    if not batch:
        return {}
    once, twice = (Kept(module, wanted, values) for values in (dict(arguments), rebuilt(dict(arguments), changed)))
    axes = {}
    for node, value in once.values.items():
        other = twice.values.get(node)
        if isinstance(value, Tensor) and isinstance(other, Tensor) and value.shape == other.shape:
            places = (value != other).nonzero()
            fits = [axis for axis in candidates(value.shape, batch) if within(places, axis, value.shape, batch)]
            if len(places) and len(fits) == 1:
                axes[node] = fits[0]
    return axes


def candidates(shape: torch.Size, batch: int) -> list[Axis]:
    whole = [Axis(i) for i, size in enumerate(shape) if size == batch]
    return whole + [Axis(i, fold) for i, n in enumerate(shape) if n > batch > 1 and n % batch == 0 for fold in ("outer", "inner")]


def within(places: Tensor, axis: Axis, shape: torch.Size, batch: int) -> bool:
    """Whether all the places [N, axes] are the first sample's, if `axis` is the sample's."""
    index = places[:, axis.index]
    return bool((index % batch == 0).all() if axis.fold == "inner" else (index < shape[axis.index] // batch).all())


class Kept(ByName):
    """Runs a module and keeps the values of some of its nodes."""

    def __init__(self, module: fx.GraphModule, nodes: Collection[fx.Node], arguments: Any) -> None:
        super().__init__(module)
        self.nodes, self.values = set(nodes), {}  # type: ignore[var-annotated]
        self.run_by_name(arguments)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.nodes:
            self.values[n] = value
        return value


def in_its_own_thread(function: Callable[[], T]) -> T:
    """Returns `function()`, run where no caller's mode is on: inference, autocast, `vmap`, another trace."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            with torch.no_grad():
                outcome.extend((function(), None))
        except BaseException as error:  # raised again below, in the caller's thread
            outcome.extend((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


@contextmanager
def silent(logger: logging.Logger) -> Iterator[None]:
    """While it lasts the logger says nothing: of shapes that do not fit, which is what is measured."""
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


class Form:
    """What a fake tensor is made from: what is known of a tensor without its numbers. No dataclass: those are containers."""

    def __init__(self, t: Tensor, size: int | None) -> None:
        """Of `t`, with `size` on axis 0 where that is not None."""
        self.shape = tuple(t.shape) if size is None else (size, *t.shape[1:])
        self.dtype, self.device = t.dtype, t.device

    def made(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)


class Fakes(ByName):
    """Runs a module on fake tensors. What cannot run so, for want of numbers, has no value, nor has what depends on it."""

    UNKNOWN = object()

    def __init__(self, module: fx.GraphModule, arguments: Any) -> None:
        """Runs the module; `values` has what each node is, and `error` why a first one does not run, where shapes are why."""
        super().__init__(module)
        self.values: dict[fx.Node, Any] = {}
        self.error: str | None = None
        with FakeTensorMode(allow_non_fake_inputs=True), silent(logging.getLogger("torch._subclasses.fake_tensor")):
            self.run_by_name(rebuilt(arguments, lambda leaf: leaf.made() if isinstance(leaf, Form) else leaf))

    def is_mark(self, node: fx.Node) -> bool:
        return node.op == "call_module" and lets_through(self.fetch_attr(str(node.target)))

    def run_node(self, n: fx.Node) -> Any:
        if any(self.env.get(m) is self.UNKNOWN for m in operands(n, self.is_mark)):
            value = self.UNKNOWN
        else:
            try:
                value = super().run_node(n)
            except DATA_DEPENDENT:
                value = self.UNKNOWN
            except Exception as error:  # whatever an op says of shapes that do not fit
                self.error = self.error or f"{place(n)}{type(error).__name__}: {error}".splitlines()[0]
                value = self.UNKNOWN
        self.values[n] = value
        return value


def place(node: fx.Node) -> str:
    """Names the call of a node for a message: "layer1.0.conv1: "."""
    where = node.meta.get("place") or (str(node.target) if node.op == "call_module" else name_of(node))
    return f"{where}: "


DATA_DEPENDENT = (
    torch._subclasses.fake_tensor.DataDependentOutputException,
    torch._subclasses.fake_tensor.DynamicOutputShapeException,
)


def compared(module: fx.GraphModule, batch: int, once: dict[fx.Node, Any], twice: dict[fx.Node, Any]) -> dict[fx.Node, Axis]:
    """Returns the axis of each node by its shapes at `batch` and at twice that."""
    axes: dict[fx.Node, Axis] = {}
    for node, value in once.items():
        other = twice[node]
        if not isinstance(value, Tensor) or not isinstance(other, Tensor) or value.dim() != other.dim():
            continue
        changed = [i for i, (n, m) in enumerate(zip(value.shape, other.shape)) if n != m]
        if len(changed) != 1 or other.shape[changed[0]] != 2 * value.shape[changed[0]]:
            continue
        (index,) = changed
        if value.shape[index] == batch:
            axes[node] = Axis(index)
        elif value.shape[index] % batch == 0 and (folded := fold(module, batch, node, once, axes, index)) is not None:
            axes[node] = folded
    return axes


def fold(
    module: fx.GraphModule, batch: int, node: fx.Node, values: dict[fx.Node, Any], axes: dict[fx.Node, Axis], index: int
) -> Axis | None:
    """Returns the axis of a node in which samples and other things are folded into axis `index`: measured on the numbers of the
    samples, where the node's call moves numbers and does not change them; else as in what it is made from."""
    if node.op in ("call_function", "call_method") and name_of(node) not in POINTWISE | PRODUCT and name_of(node) != "dual_path":
        numbers = moved(module, batch, node, values, axes)
        if numbers is not None and numbers.shape == values[node].shape:
            along = numbers.movedim(index, -1).flatten(0, -2) if numbers.dim() > 1 else numbers[None]
            samples = torch.arange(batch, dtype=along.dtype)
            times = along.shape[-1] // batch
            if bool((along == samples.repeat_interleave(times)).all()):
                return Axis(index, "outer")
            if bool((along == samples.repeat(times)).all()):
                return Axis(index, "inner")
    size = values[node].shape[index]
    before = [axes[n] for n in node.all_input_nodes if n in axes and values[n].shape[axes[n].index] == size]
    return Axis(index, before[0].fold) if before and len({axis.fold for axis in before}) == 1 else None


def moved(
    module: fx.GraphModule, batch: int, node: fx.Node, values: dict[fx.Node, Any], axes: dict[fx.Node, Axis]
) -> Tensor | None:
    """Returns what `node` makes of tensors that hold the number of their sample throughout; None where it does not run so."""

    def numbers(n: fx.Node) -> Any:
        value = values[n]
        if not isinstance(value, Tensor):
            return rebuilt(value, lambda leaf: torch.zeros(leaf.shape) if isinstance(leaf, Tensor) else leaf)
        if n not in axes:
            return torch.full(value.shape, -1.0)
        index, size = axes[n].index, value.shape[axes[n].index]
        samples = torch.arange(batch, dtype=torch.float32)
        samples = samples.repeat(size // batch) if axes[n].fold == "inner" else samples.repeat_interleave(size // batch)
        return samples.view(-1, *[1] * (value.dim() - index - 1)).expand(value.shape)

    try:
        args, kwargs = fx.map_arg((node.args, node.kwargs), numbers)
        if node.op == "call_method":
            result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            result = node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception:  # what takes other numbers than these
        return None
    return result if isinstance(result, Tensor) else None
