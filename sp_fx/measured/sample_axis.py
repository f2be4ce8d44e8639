"""The sample's axis: which axis of each tensor of a graph is the batch's, so that a gate's scale can be each sample's own.

It is measured. The graph is run twice on fake tensors, which have shapes and no numbers, at a batch and at twice that batch: the
axis whose size doubles is the sample's. A name says nothing: `x.T`, a GRU's last state and a user's own function are measured
alike.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from ..analysis.calls import name_of
from ..analysis.ops import POINTWISE, PRODUCT
from ..capture.arguments import ByName
from ..capture.capture import DATA_DEPENDENT
from ..capture.passed import lets_through, operands
from ..capture.tracing.answers import is_unknown
from ..capture.tracing.draws import note_on_draws
from ..containers import rebuilt, tensors_of
from ..gates.calls.autocast import under
from ..gates.dual_path import dual_path
from .shapes import on_shapes_alone

T = TypeVar("T")


@dataclass(frozen=True)
class Axis:
    """Where the sample is in a tensor of `rank` axes.

    It is on axis `index`; or folded into it with other things, or into the `span` axes from there on: read as one, these have
    `before` times all samples, each of them `after` times. The tokens of [B, T, C] after `reshape(-1, C)` have after = T; those
    of [T, B, C] have before = T.
    """

    index: int
    rank: int
    span: int = 1
    before: int = 1
    after: int = 1

    @property
    def alone(self) -> bool:
        """Whether the axis is the sample's alone."""
        return self.span == self.before == self.after == 1

    def numbers(self, shape: torch.Size, batch: int) -> Tensor:
        """A tensor of that shape with the number of its sample in each place."""
        samples = torch.arange(batch, dtype=torch.float32).repeat_interleave(self.after).repeat(self.before)
        group = shape[self.index : self.index + self.span]
        return samples.view(*group, *[1] * (self.rank - self.index - self.span)).expand(shape).clone()


def sample_axes(
    module: fx.GraphModule, arguments: Mapping[str, Any], wanted: Collection[fx.Node] = ()
) -> tuple[dict[fx.Node, Axis], str]:
    """Returns the sample's axis in the value of each node of `module`, where the value is a tensor and has one; and, where the
    module does not run at twice the batch, why. For nodes that are `wanted` and whose shapes do not tell, it is run on numbers.

    `arguments` are those of its forward, by name; the batch is axis 0 of the first floating tensor among them. Other tensors as
    long on axis 0 have the batch there too, unless the module only runs where they do not: a mask [L, L] for B = L.
    """
    floating = [t for t in tensors_of(arguments) if t.is_floating_point()]
    lead = (floating or tensors_of(arguments))[:1]
    if not lead or not lead[0].dim():
        return {}, "its inputs have no axis 0"
    draws = bool(note_on_draws(module.graph))
    axes, reason = in_its_own_thread(lambda: measured(module, arguments, lead[0], wanted), draws)
    unknown = [node for node in wanted if node not in axes and not sized_by_values(node)]
    if unknown and floating:
        whole = dict(arguments) if reason else with_each_twice(arguments, lead[0].shape[:1])
        size = lead[0].shape[0] * (1 if reason else 2)
        axes |= in_its_own_thread(lambda: by_influence(module, whole, size, unknown), draws)
    return axes, reason


def shapes_of(modules: nn.Module, graph: fx.Graph, arguments: Mapping[str, Any]) -> dict[fx.Node, Any]:
    """Returns what the nodes of `graph` are on such arguments: fake tensors, or other values; nothing of what does not run so."""
    own: dict[fx.Node, fx.Node] = {}
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, own))
    forms = rebuilt(dict(arguments), lambda t: Form(t, None) if isinstance(t, Tensor) else t)
    values = in_its_own_thread(lambda: Fakes(fx.GraphModule(modules, copy), forms), False).values
    known = {node: values.get(copied, Fakes.UNKNOWN) for node, copied in own.items()}
    return {node: value for node, value in known.items() if value is not Fakes.UNKNOWN}


def measured(
    module: fx.GraphModule, arguments: Mapping[str, Any], lead: Tensor, wanted: Collection[fx.Node]
) -> tuple[dict[fx.Node, Axis], str]:
    """`sample_axes`, where the batch is that of `lead`."""
    batch, outcomes = max(lead.shape[0], 2), []
    along = [i for i, t in enumerate(tensors_of(arguments)) if t.shape[:1] == lead.shape[:1]]
    lead_at = next(i for i, t in enumerate(tensors_of(arguments)) if t is lead)
    alike = [i for i in along if tensors_of(arguments)[i].shape == lead.shape]
    # All that are as long on axis 0 have the batch there; or one of them does not, a table of as many rows; or most do not.
    for chosen in (along, *([j for j in along if j != i] for i in along if i != lead_at), alike):
        once, twice = (Fakes(module, with_size(arguments, chosen, size)) for size in (batch, 2 * batch))
        error = twice.error or once.error
        reason = f"it does not run at {2 * batch} samples: {error}" if error else ""
        axes = compared(batch, once.values, twice.values)
        outcomes.append((axes, reason, sum(node in axes for node in wanted)))
        if not reason and outcomes[-1][2] == len(wanted):
            break
    axes, reason, _ = max(outcomes, key=lambda outcome: (not outcome[1], outcome[2]))
    return axes, reason


def with_size(arguments: Mapping[str, Any], chosen: Collection[int], size: int) -> Any:
    """Returns the arguments with forms in place of tensors: those whose numbers are `chosen` with `size` on axis 0."""
    count = itertools.count()
    change = lambda t: Form(t, size if next(count) in chosen else None) if isinstance(t, Tensor) else t  # noqa: E731
    return rebuilt(dict(arguments), change)


def with_each_twice(arguments: Mapping[str, Any], sizes: torch.Size) -> Any:
    """Returns the arguments with twice the samples, of those tensors that have `sizes` on axis 0."""
    twice = lambda t: torch.cat([t, t]) if isinstance(t, Tensor) and t.shape[:1] == sizes else t  # noqa: E731
    return rebuilt(dict(arguments), twice)


def by_influence(
    module: fx.GraphModule, arguments: Mapping[str, Any], batch: int, wanted: Collection[fx.Node]
) -> dict[fx.Node, Axis]:
    """Returns the axes of the nodes that are `wanted`, by numbers: where a change of the first of `batch` samples changes their
    values. For modules that run at the batch of the arguments alone, and for tensors whose shapes do not tell: an attention over
    the batch whose weights are all the same, as csatv2 of timm has it, mixes no samples."""

    def changed(leaf: Any) -> Any:
        if not (isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.shape[:1] == (batch,)):
            return leaf
        leaf = leaf.detach().clone()
        leaf[0] += torch.linspace(-1, 1, leaf[0].numel(), device=leaf.device).to(leaf.dtype).view(leaf[0].shape)
        return leaf

    if not batch:
        return {}
    try:
        once, twice = (Kept(module, wanted, values) for values in (dict(arguments), rebuilt(dict(arguments), changed)))
    except Exception:  # of whatever the module says of such arguments
        return {}
    axes = {}
    for node, value in once.values.items():
        other = twice.values.get(node)
        if isinstance(value, Tensor) and isinstance(other, Tensor) and value.shape == other.shape:
            places = (value != other).nonzero()
            fits = [axis for axis in candidates(value.shape, batch) if within(places, axis, batch)]
            if len(places) and len(fits) == 1:
                axes[node] = fits[0]
    return axes


def sized_by_values(node: fx.Node) -> bool:
    """Whether an export knows that a size of a node is one that values make, as of the tokens that go to an expert: how many of
    them there are on one example says nothing of samples."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and any(map(is_unknown, value.shape))


def candidates(shape: torch.Size, batch: int) -> list[Axis]:
    """Returns the axes that may be the sample's, by their sizes."""
    axes = [Axis(i, len(shape)) for i, size in enumerate(shape) if size == batch]
    for i, size in enumerate(shape):
        if size > batch > 1 and size % batch == 0:
            axes += [Axis(i, len(shape), before=size // batch), Axis(i, len(shape), after=size // batch)]
    return axes


def within(places: Tensor, axis: Axis, batch: int) -> bool:
    """Whether all the places [N, axes] are the first sample's, if `axis` is the sample's."""
    return bool((places[:, axis.index] // axis.after % batch == 0).all())


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


def in_its_own_thread(function: Callable[[], T], draws: bool) -> T:
    """Returns `function()`, run where no caller's mode is on: inference, autocast, `vmap`, another trace. One that `draws` random
    numbers draws none of the caller's."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            with torch.no_grad(), torch.random.fork_rng([], enabled=draws):
                outcome.extend((function(), None))
        except BaseException as error:  # raised again below, in the caller's thread
            outcome.extend((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


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
        with on_shapes_alone():
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


def compared(batch: int, once: dict[fx.Node, Any], twice: dict[fx.Node, Any]) -> dict[fx.Node, Axis]:
    """Returns the axis of each node by its values at `batch` and at twice that."""
    axes: dict[fx.Node, Axis] = {}
    mixed: set[fx.Node] = set()  # their shapes change with the batch, and no axis is the sample's
    for node, value in once.items():
        other = twice[node]
        if not isinstance(value, Tensor) or not isinstance(other, Tensor) or value.dim() != other.dim():
            continue
        changed = [i for i, (n, m) in enumerate(zip(value.shape, other.shape)) if n != m]
        if not changed:
            continue
        axis = None
        if not mixed.intersection(node.all_input_nodes):
            if (numbers := moved(batch, node, once, axes)) is not None:
                axis = read(numbers, batch, changed)
            elif len(changed) == 1 and other.shape[changed[0]] == 2 * value.shape[changed[0]]:
                axis = by_size(batch, node, once, axes, changed[0])
        if axis is None:
            mixed.add(node)
        else:
            axes[node] = axis
    return axes


def by_size(batch: int, node: fx.Node, values: dict[fx.Node, Any], axes: dict[fx.Node, Axis], index: int) -> Axis | None:
    """Returns the axis of a node whose axis `index` doubles with the batch: the sample's alone, or folded as in what the node is
    made from."""
    shape = values[node].shape
    if shape[index] == batch:
        return Axis(index, len(shape))
    known, queue = [], list(node.all_input_nodes)
    while queue:
        at = queue.pop()
        if at in axes:
            known.append(axes[at])
        elif not isinstance(values[at], Tensor) and tensors_of(values[at]):  # an LSTM's tuple
            queue += at.all_input_nodes
    folds = {(axis.before, axis.after) for axis in known if axis.before * batch * axis.after == shape[index]}
    return Axis(index, len(shape), 1, *folds.pop()) if len(folds) == 1 else None


def read(numbers: Tensor, batch: int, changed: list[int]) -> Axis | None:
    """Returns the axis by the number of the sample in each place, NaN where a constant is; None where it is on no axes in a row
    that hold the `changed` ones."""
    rank = numbers.dim()
    for span in range(1, rank + 1):
        for index in range(rank - span + 1):
            group = numbers.shape[index : index + span]
            if not set(changed) <= set(range(index, index + span)) or math.prod(group) % batch:
                continue
            rest = [i for i in range(rank) if not index <= i < index + span]
            along = numbers.permute(*rest, *range(index, index + span)).reshape(-1, math.prod(group))
            line = along.nan_to_num(-1).amax(0)
            after = int((line == line[0]).int().cumprod(0).sum())
            if line.min() < 0 or math.prod(group) % (batch * after):
                continue
            axis = Axis(index, rank, span, math.prod(group) // (batch * after), after)
            if bool((numbers.isnan() | (numbers == axis.numbers(numbers.shape, batch))).all()):
                return axis
    return None


def moved(batch: int, node: fx.Node, values: dict[fx.Node, Any], axes: dict[fx.Node, Axis]) -> Tensor | None:
    """Returns what a call makes of tensors that hold the number of their sample throughout, and NaN where constants are; None of
    one that does not move numbers but changes them: that adds up, multiplies, or has weights."""
    first, second = (on_numbers(batch, node, values, axes, shift) for shift in (0.0, 0.5))
    for result in (first, second):
        if not isinstance(result, Tensor) or result.shape != values[node].shape or not result.is_floating_point():
            return None
    first = first.masked_fill(first == second, math.nan)  # constants that the call puts in: zeros of a padding, or -inf
    if bool(first.isnan().all()):  # of constants alone, such as an index that is expanded to the batch
        return None
    return first if bool((first.isnan() | (first == second - 0.5)).all()) else None


def on_numbers(batch: int, node: fx.Node, values: dict[fx.Node, Any], axes: dict[fx.Node, Axis], shift: float) -> Any:
    """Returns what a call makes of the numbers of the samples, plus `shift`; None where it does not run so."""
    called = node.op in ("call_function", "call_method") and node.target not in (dual_path, under)
    if not called or name_of(node) in POINTWISE | PRODUCT or any(n.op == "get_attr" for n in node.all_input_nodes):
        return None

    def numbers(n: fx.Node) -> Any:
        value = values[n]
        if n in axes:
            return axes[n].numbers(value.shape, batch) + shift
        if isinstance(value, tuple | list) and tensors_of(value):  # of `chunk`, say, whose items these are
            return on_numbers(batch, n, values, axes, shift)
        return rebuilt(value, lambda leaf: torch.full(leaf.shape, math.nan) if isinstance(leaf, Tensor) else leaf)

    return called_with(node, numbers)


def called_with(node: fx.Node, operand: Callable[[fx.Node], Any]) -> Any:
    """Returns what the call of a node gives for other operands than its own; None where it does not take them."""
    try:
        args, kwargs = fx.map_arg((node.args, node.kwargs), operand)
        target: Any = getattr(args[0], str(node.target)) if node.op == "call_method" else node.target
        return target(*args[node.op == "call_method" :], **kwargs)
    except Exception:  # what takes other numbers than these
        return None
