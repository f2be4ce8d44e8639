"""What the readers of written functions ask of a graph, and the values of its nodes on numbers of their choice."""

from __future__ import annotations

import functools
import math
import operator
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...capture.passed import operands
from ..ops import CARRIES, FORM, FRESH, JOINS, POINTWISE, REDUCES, SHAPES, SIZES, VIEW
from ..signals import called

LIMIT = 40  # calls of a function that is run on numbers, from the node it is of


@dataclass(frozen=True)
class Graph:
    """A captured graph over `modules`, with what its readers have to know of it: whether a node is a module that gives what it
    gets, and the nodes that vary with the input of the model, that are signals, that are complex (`signals.Signals`)."""

    modules: nn.Module
    passes: Callable[[fx.Node], bool]
    varying: Collection[fx.Node]
    signals: Collection[fx.Node]
    complex: Collection[fx.Node]

    def varies(self, node: fx.Node) -> bool:
        return node in self.varying

    def inputs(self, node: fx.Node) -> list[fx.Node]:
        """Returns the varying operands of a call whose values it reads: of `a.type_as(b)` `a` alone."""
        inputs = [n for n in operands(node, self.passes) if self.varies(n)]
        return inputs[:1] if self.called(node) in FORM else inputs

    def called(self, node: fx.Node) -> str:
        """Returns the plain name of the function or method that `node` calls, or of the attribute it reads; "" of other nodes."""
        return called(node)

    def carried(self, node: fx.Node) -> fx.Node:
        """Returns the node whose values `node` has, back through casts, views and module boundaries: x of
        `x.float()[:, None]`."""
        while (inputs := self.inputs(node)) and (self.passes(node) or self.called(node) in CARRIES or is_new_axis(node)):
            node = inputs[0]
        return node

    def weights_of(self, inside: Iterable[fx.Node]) -> tuple[str, ...]:
        """Returns the names of the weights that the calls `inside` are computed with."""
        inside, names = set(inside), dict[str, None]()
        queue = [a for n in inside for a in n.all_input_nodes if a not in inside]
        while queue:
            at = queue.pop()
            if at.op == "get_attr":
                names[str(at.target)] = None
            elif not self.varies(at):
                queue += at.all_input_nodes
        return tuple(names)

    def private(self, inside: Iterable[fx.Node], last: fx.Node) -> set[fx.Node]:
        """Returns those of the nodes `inside` a pattern, in the graph's order, whose values nothing but the pattern reads; its
        `last` is one of them."""
        own = {last}
        for node in reversed(list(inside)):
            if all(user in own for user in node.users if node in operands(user, self.passes)):
                own.add(node)
        return own

    def between(self, source: fx.Node, node: object, may_be: Callable[[fx.Node], bool]) -> tuple[fx.Node, ...] | None:
        """Returns the calls that make `node` of `source` alone, in the graph's order; None where something else has a part in it,
        or a call that may not be one of them, or they are more than `LIMIT`."""
        found, queue = dict[fx.Node, None](), [node]
        while queue:
            at = queue.pop()
            if at is source or at in found:
                continue
            if not isinstance(at, fx.Node) or not self.inputs(at) or not may_be(at) or len(found) > LIMIT:
                return None
            found[at] = None
            queue += self.inputs(at)
        return tuple(n for n in source.graph.nodes if n in found)

    # -- values

    def number(self, value: Any) -> float | None:
        """Returns the one number that a constant has everywhere, whatever its shape: 0 of `torch.zeros_like(x)`; None of
        others."""
        if isinstance(value, bool | int | float):
            return float(value)
        if not isinstance(value, fx.Node) or self.varies(value):
            return None
        try:
            return splat(self.constant(value))
        except Exception:  # what does not run on its own
            return None

    def fixed_number(self, value: Any) -> float | None:
        """As `number`, but None of a parameter, which may be trained on."""
        own = isinstance(value, fx.Node) and value.op == "get_attr" and isinstance(self.attribute(value), nn.Parameter)
        return None if own else self.number(value)

    def attribute(self, node: fx.Node) -> Any:
        """Returns the tensor that a node reads off the modules."""
        return operator.attrgetter(str(node.target))(self.modules)

    def constant(self, node: fx.Node) -> Any:
        """Returns the value of a node that does not vary, where it can be computed without an input; a tensor that is filled with
        one number has one element, whatever its shape."""
        name = self.called(node)
        if node.op == "get_attr":
            value = self.attribute(node)
            if value.numel() != 1 and not is_literal(node):  # weights that happen to be equal are weights
                raise ValueError("not one number")
            return value.detach()
        if (name in FRESH or name.endswith("tensor")) and (filled := filled_with(node, name)) is not None:
            return torch.full((), filled, dtype=torch.float64)
        if name in CARRIES:  # of one number: the shape does not matter
            value = self.constant(node.args[0])  # type: ignore[arg-type]
            return value if (number := splat(value)) is None else torch.full((), number, dtype=torch.float64)
        if name not in POINTWISE | VIEW | REDUCES | JOINS - SHAPES:  # what draws numbers may not run here
            raise ValueError("known at run time alone")
        return made(node, fx.map_arg((node.args, node.kwargs), self.constant))

    def computed(self, inside: Iterable[fx.Node], known: Mapping[fx.Node, Any]) -> Any:
        """Returns the value of the last of the calls `inside`, from those of the nodes that are `known`.

        Raises:
            Exception: whatever the calls raise on such values; ValueError for a constant that is not one number.
        """
        env = dict(known)

        def value(node: fx.Node) -> Any:
            if node not in env:
                env[node] = self.form_of(node, env) if self.varies(node) or self.called(node) in SHAPES else self.splat_of(node)
            return env[node]

        last = None
        with torch.no_grad():
            for node in inside:
                if node.op == "call_module":
                    last = env[node] = value(node.all_input_nodes[0])
                else:
                    last = env[node] = made(node, fx.map_arg((node.args, node.kwargs), value))
        return last

    def splat_of(self, node: fx.Node) -> Any:
        """Returns a constant operand as it goes into a computation on other shapes than the model's: numbers alone."""
        value = self.constant(node)
        if isinstance(value, Tensor):
            if (number := splat(value)) is None:
                raise ValueError("not one number")
            return torch.full((), number, dtype=torch.float64)
        return value

    def form_of(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
        """Returns what depends on the form of a varying tensor alone, taken to be that of the tensor the computation is on."""
        base = next(iter(env.values()))
        if self.called(node) not in SHAPES:
            raise ValueError("computed from something else that varies")
        filled = filled_with(node, self.called(node))
        if filled is not None:
            return torch.full_like(base, filled)
        if self.called(node) in SIZES:
            raise ValueError("sizes of the model's tensors are not known")
        if node.target is getattr:
            return getattr(base, str(node.args[1]))
        return made(node, fx.map_arg((node.args, node.kwargs), lambda n: env.get(n, base)))


def is_literal(node: fx.Node) -> bool:
    """Whether a tensor is one that the forward itself makes, as `torch.zeros(8)`, and a tracer keeps."""
    return str(node.target).rpartition(".")[2].startswith(("_tensor_constant", "lifted_tensor"))


def is_new_axis(node: fx.Node) -> bool:
    """Whether a call indexes by whole slices and new axes alone: `x[:, None]`."""
    if called(node) == "slice":  # ATen's, of one axis
        given = (*node.args[2:], *(None, None, 1)[len(node.args) - 2 :])
        return given[0] in (None, 0) and given[1] in (None, sys.maxsize) and given[2] in (None, 1)
    index = node.args[1] if node.target is operator.getitem else ()
    parts = index if isinstance(index, tuple) else (index,)
    return bool(parts) and all(part is None or part is Ellipsis or part == slice(None) for part in parts)


def made(node: fx.Node, arguments: Any) -> Any:
    """Returns what the call of `node` gives on these arguments."""
    args, kwargs = arguments
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def splat(value: Any) -> float | None:
    """Returns the one number that a tensor holds everywhere, None where it holds others."""
    if isinstance(value, bool | int | float):
        return float(value)
    if not isinstance(value, Tensor) or not value.numel() or value.is_complex():
        return None
    first = value.flatten()[:1]
    return float(first) if value.numel() == 1 or bool((value == first).all()) else None


@functools.cache
def _fills() -> Mapping[str, float]:
    return {f"{prefix}{name}{suffix}": number for name, number in (("zeros", 0.0), ("ones", 1.0))
            for prefix, suffix in (("", ""), ("new_", ""), ("", "_like"))}  # fmt: skip


def filled_with(node: fx.Node, name: str) -> float | None:
    """Returns the number that a call fills a new tensor with: 0 of `torch.zeros(shape)`, 0.3 of `torch.tensor(0.3)`."""
    if (number := _fills().get(name)) is not None:
        return number
    if not name.endswith(("full", "full_like", "tensor")):
        return None
    index = 2 if name == "new_full" else 0 if name.endswith("tensor") else 1
    value = node.kwargs.get("fill_value", node.args[index] if len(node.args) > index else None)
    return float(value) if isinstance(value, bool | int | float) and math.isfinite(value) else None
