"""Alias analysis: which nodes of a graph are one tensor, and which share its storage.

For example, after `y = x.view(-1)`, what is written over `y` is written over `x`, and a module's mark is the tensor it marks.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from ..capture.passed import lets_through
from .calls import draws, name_of, writes
from .ops import ITSELF, SEVERAL, SHAPES, VIEW, having

NUMBERS = having("number")
RETURN_THEIR_INPUT = (nn.Identity, nn.modules.dropout._DropoutNd)
VIEWING_MODULES = (nn.Flatten, nn.Unflatten)


class Aliasing:
    """Of the nodes of `graph` as it is when this is made; `position` has their order."""

    def __init__(self, modules: nn.Module, graph: fx.Graph) -> None:
        self.modules = modules
        self.position = {node: i for i, node in enumerate(graph.nodes)}

    def is_view(self, node: fx.Node) -> bool:
        """Whether the output of `node` may share the storage of its first input."""
        if node.op == "call_module":
            return isinstance(self.leaf(node), (*RETURN_THEIR_INPUT, *VIEWING_MODULES)) or lets_through(self.leaf(node))
        return node.op in ("call_function", "call_method") and (name_of(node) in VIEW or writes(node))

    def leaf(self, node: fx.Node) -> nn.Module:
        return self.modules.get_submodule(str(node.target))

    def itself(self, node: fx.Node) -> Any:
        """Returns what a call returns as it is: the result that a module's mark is called with, the input of a dropout; None of
        any other call. The result of a module may be a container of nodes."""
        if node.op == "call_module":
            returned = lets_through(self.leaf(node)) or isinstance(self.leaf(node), RETURN_THEIR_INPUT)
            return first(node) if returned else None
        if node.op not in ("call_function", "call_method") or name_of(node) not in ITSELF or draws(node):
            return None
        return first(node)

    def viewed(self, node: fx.Node) -> fx.Node | None:
        """Returns the node whose storage the output of `node` may share, which writes over nothing: `x` of `x.view(-1)`."""
        if node.op == "call_module":
            views = isinstance(self.leaf(node), VIEWING_MODULES)
        elif node.op not in ("call_function", "call_method") or is_number(node):
            return None
        elif isinstance(node.target, torch._ops.OpOverload):
            views = returns_alias(node.target) or name_of(node) in VIEW
        else:
            views = gives_view(name_of(node))
        source = first(node) if views and not draws(node) else None
        return source if isinstance(source, fx.Node) else None


def first(node: fx.Node) -> Any:
    """Returns the first argument of a call, by whatever name."""
    return node.args[0] if node.args else next(iter(node.kwargs.values()), None)


def is_number(node: fx.Node) -> bool:
    """Whether `node` is a number or a plain object made of sizes and their like, as `x.shape[0] + 1` is."""
    if node.op not in ("call_function", "call_method"):
        return False
    if isinstance(value := node.meta.get("val"), torch.Tensor) or value is not None:
        return not isinstance(value, torch.Tensor | tuple | list)
    if name_of(node) in NUMBERS or (node.target is getattr and node.args[1] in NUMBERS):
        return True
    python = getattr(node.target, "__module__", None) in ("_operator", "builtins", "math")
    return python and bool(node.all_input_nodes) and all(map(is_number, node.all_input_nodes))


def returns_alias(overload: torch._ops.OpOverload) -> bool:
    """Whether an op may return a view of its input."""
    return any(r.alias_info is not None and not r.alias_info.is_write for r in overload._schema.returns)


@functools.cache
def gives_view(name: str) -> bool:
    """Whether a call of that plain name may return a view of its input: by the table of ops, by ATen's own account, or as
    `h.double()` returns `h`, where it has that dtype."""
    casts = name == "type" or isinstance(getattr(torch, name, None), torch.dtype)
    return name in VIEW or casts or any(map(returns_alias, aten_ops(name)))


def aten_ops(name: str) -> list[torch._ops.OpOverload]:
    """Returns the ATen ops of a plain name that write over nothing."""
    packet = getattr(torch.ops.aten, name, None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return []
    return [op for overload in packet.overloads() if not (op := getattr(packet, overload))._schema.is_mutable]


def reads_form(node: fx.Node) -> bool:
    """Whether a call reads the shape or dtype of a tensor alone."""
    return node.op.startswith("call") and node.op != "call_module" and (
        name_of(node) in SHAPES or (node.target is getattr and node.args[1] in NUMBERS)
    )  # fmt: skip


def is_always_view(node: fx.Node) -> bool:
    """Whether a call that may return a view of its input, or an item of it, is known to do so: `select`, but not `reshape`."""
    if node.target is operator.getitem:
        parts = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        return not any(isinstance(part, fx.Node | list) for part in parts)
    if getattr(node.target, "__module__", None) == "torch.nn.functional" or node.op == "call_module":
        return False  # `F.unfold` is not what `unfold` is
    return has_view_kernel(name_of(node))


@functools.cache
def has_view_kernel(name: str) -> bool:
    """Whether PyTorch tracks the ATen ops of that name as views."""
    known = torch._C._dispatch_get_all_op_names()  # TorchScript has others
    qualified = [op.name() for op in aten_ops(name) if returns_alias(op) and op.name() in known]
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(op, "ADInplaceOrView") for op in qualified)


def nodes_in(value: Any) -> list[fx.Node]:
    """Returns the nodes in a container of them."""
    nodes: list[fx.Node] = []
    fx.map_arg(value, nodes.append)
    return nodes


def item_of(node: fx.Node) -> Any:
    """Returns the key of an item that is asked for, `1` of `halves[1]`; None of other calls."""
    key = node.args[1] if node.target is operator.getitem else None
    return key if isinstance(key, str | int) else None


def is_item(node: fx.Node, user: fx.Node) -> bool:
    """Whether `user` asks for an item of `node`, whose items share no storage."""
    return item_of(user) is not None and (isinstance(item_of(user), str) or has_items(node))


def has_items(node: fx.Node) -> bool:
    """Whether a node is known to be a tuple, whose items share no storage."""
    if "val" in node.meta:
        return isinstance(node.meta["val"], tuple | list)
    return node.op == "call_module" or (node.op.startswith("call") and name_of(node) in SEVERAL)


def returns_target(overload: torch._ops.OpOverload) -> bool:
    """Whether an op returns what it writes over."""
    return any(r.alias_info is not None and r.alias_info.is_write for r in overload._schema.returns)


@dataclass(eq=False)
class Member:
    """One tensor, or container of tensors, of the model.

    Attributes:
        value: the node that has its value now.
        parent: what it may be a view of; None where nothing else has its storage.
        view: the call that made it, of `parent`.
        home, key: the container that it is an item of, and which, where its items share no storage.
        names: the nodes of the captured graph that are it.
        items: of a container, those that the graph has asked for.
        fresh: whether nothing but views and writes has read its storage; of what has no parent.
        dense: whether it is known to have no gaps.
        written: whether a call has written over it.
    """

    value: fx.Node
    parent: Member | None = None
    view: fx.Node | None = None
    home: Member | None = None
    key: Any = None
    names: list[fx.Node] = field(default_factory=list)
    children: list[Member] = field(default_factory=list)
    items: dict[Any, Member] = field(default_factory=dict)
    fresh: bool = False
    dense: bool = False
    written: bool = False

    def __post_init__(self) -> None:
        if self.parent is not None:
            self.parent.children.append(self)
        if self.home is not None:
            self.home.items[self.key] = self

    def line(self) -> list[Member]:
        """Returns it, its parent, and so on."""
        return [self, *(self.parent.line() if self.parent is not None else [])]

    def all(self) -> Iterator[Member]:
        """It and what may be a view of it, parents first."""
        yield self
        for child in self.children:
            yield from child.all()

    def common(self, other: Member) -> Member:
        """Returns the nearest that both are views of."""
        others = other.line()
        return next(m for m in self.line() if m in others)

    def overlaps(self, other: Member) -> bool:
        """Whether both may have storage in common: not, where they are two items of one `chunk`."""
        common = self.common(other)
        if common in (self, other):
            return True
        one, two = (next(m for m in member.line() if m.parent is common) for member in (self, other))
        return one.home is not common or two.home is not common

    def leave(self) -> None:
        """Take it, with its views, out of the storage of its parent."""
        if self.parent is not None:
            self.parent.children.remove(self)
            self.parent = None
