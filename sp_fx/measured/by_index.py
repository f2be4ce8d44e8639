"""Whether axis 0 of the inputs is taken apart by an index that comes with them: the nodes of graphs are, which edges name and a
vector of batches puts into graphs. Then the places on axis 0 are no samples.

It is measured. Each call that reads whole numbers of the caller's is run with random ones in their place, on tensors that are 1
for one sample and 0 for all others: where two samples reach one place, the index carries one to the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ..analysis.calls import name_of
from ..analysis.ops import INDICES, PIECEWISE, POINTWISE, PRODUCT
from ..analysis.signals import Signals
from ..capture.passed import lets_through
from ..capture.tracing.draws import note_on_draws
from .sample_axis import Axis, Kept, called_with, in_its_own_thread, place

DRAWS = 8  # of random indices: that two samples never meet has a chance of 2 ** -7
WHOLE = (torch.int32, torch.int64)


def taken_apart(module: fx.GraphModule, arguments: Mapping[str, Any], axes: Mapping[fx.Node, Axis]) -> str:
    """Says where an index among the inputs carries one place of axis 0 to another; "" where none does. `axes` are where these
    places are in the nodes of `module`."""
    signals = Signals(module, module.graph, lambda n: n.op == "call_module" and lets_through(module.get_submodule(str(n.target))))
    indices = (signals.whole & signals.varying) - signals.choosing - ordered(module.graph)
    readers = [
        node
        for node in module.graph.nodes
        if node.op in ("call_function", "call_method")
        and name_of(node) not in POINTWISE | PRODUCT  # which calculate with whole numbers, as with lengths
        and node in signals.signals
        and any(n in indices for n in node.all_input_nodes)
        and any(n in axes and n in signals.signals for n in node.all_input_nodes)
    ]
    if not readers:
        return ""
    read = {n for node in readers for n in node.all_input_nodes}
    try:
        values = in_its_own_thread(lambda: Kept(module, read, dict(arguments)).values, bool(note_on_draws(module.graph)))
    except Exception:  # the model itself says what is wrong with such arguments
        return ""

    def first() -> fx.Node | None:
        for node in readers:
            known = {n: axes[n] for n in node.all_input_nodes if n in axes and n in signals.signals}
            own = [n for n in node.all_input_nodes if n in indices and is_index(values.get(n))]
            if own and carries_over(node, known, own, values):
                return node
        return None

    node = in_its_own_thread(first, False)
    if node is None:
        return ""
    return f"an index among the inputs takes its places apart ({place(node).rstrip(': ')}), so that they are no samples"


def ordered(graph: fx.Graph) -> set[fx.Node]:
    """Returns what is made by sorting, or of that: the order that sequences are packed in takes them along, and back."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        called = node.op in ("call_function", "call_method")
        if (called and name_of(node) in PIECEWISE | INDICES) or any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def is_index(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in WHOLE and value.dim() > 0


def carries_over(node: fx.Node, axes: Mapping[fx.Node, Axis], indices: list[fx.Node], values: Mapping[fx.Node, Any]) -> bool:
    """Whether two samples reach one place of what a call gives, by indices of 0 and 1."""
    reached = []
    for sample in (0, 1):
        generator, mask = torch.Generator().manual_seed(0), None
        for _ in range(DRAWS):
            given = {n: torch.randint(2, values[n].shape, generator=generator).to(values[n]) for n in indices}
            result = on_one(node, sample, axes, given, values)
            if not isinstance(result, Tensor):
                return False
            mask = result != 0 if mask is None or mask.shape != result.shape else mask | (result != 0)
        reached.append(mask)
    first, second = reached
    return first is not None and second is not None and first.shape == second.shape and bool((first & second).any())


def on_one(
    node: fx.Node, sample: int, axes: Mapping[fx.Node, Axis], given: Mapping[fx.Node, Tensor], values: Mapping[fx.Node, Any]
) -> Any:
    """Returns what a call makes of 1 for one sample and 0 for all others, by the indices that are `given`; None where it does
    not run so."""

    def operand(n: fx.Node) -> Any:
        value = values[n]
        if n in given:
            return given[n]
        if n in axes and isinstance(value, Tensor) and value.dim() == axes[n].rank:
            axis = axes[n]
            group = value.shape[axis.index : axis.index + axis.span].numel()
            return (axis.numbers(value.shape, group // (axis.before * axis.after)) == sample).to(value)
        return torch.zeros_like(value) if isinstance(value, Tensor) and value.is_floating_point() else value

    return called_with(node, operand)
