"""Calls in place, made calls out of place.

Requires: a captured graph, over modules in eval mode. Ensures: the same outputs, bit for bit, and errors at the same calls; what
depends on a call in place depends on it by data flow; a call that still writes does so over storage that nothing has read but
views and earlier writes: never over the caller's input, the model's buffers, or what the adjoint of another call has saved.

`h.relu_()` becomes `h.relu()`, and what reads `h` later reads the result. Where another tensor that shares the storage is read
later too, as `h` is after `h[:, :2].relu_()`, a copy of `h` is written over, and later calls read the copy and its views.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...analysis.aliasing import (
    Aliasing,
    Member,
    first,
    gives_view,
    has_items,
    is_always_view,
    is_item,
    is_number,
    item_of,
    nodes_in,
    reads_form,
    returns_target,
)
from ...analysis.calls import name_of, out_of_place, written
from ...analysis.ops import CHOICES, FACTORS, FRESH, PRODUCT, QUOTIENT, having
from ...analysis.readers import READERS
from ...gates.calls.in_place import after, copied, in_form_of, overwrite_, setitem_

SAME_FORM = having("same_form")


def normalise(modules: nn.Module, graph: fx.Graph) -> list[str]:
    """Rewrite the calls in place of `graph`; returns notes for the reader of a report."""
    walk = Walk(modules, graph)
    for node in list(graph.nodes):
        walk.visit(node)
        walk.enter(node)
    for node in reversed(walk.made):
        if not node.users:
            graph.erase_node(node)
    graph.lint()
    return walk.notes


class Walk:
    """Goes through a graph, in its order.

    Attributes:
        members: the tensor that a node is.
        now: for a node whose tensor was written over since, what has its value.
        holders: the marks of modules that returned a container, by the tensors in it.
        entering: the marks of modules, by the node after which they were entered.
        inputs: what the hooks of a module see, by its mark: the inputs as they were when it was entered.
    """

    def __init__(self, modules: nn.Module, graph: fx.Graph) -> None:
        self.graph, self.aliasing = graph, Aliasing(modules, graph)
        self.position = self.aliasing.position
        self.members: dict[fx.Node, Member] = {}
        self.now: dict[fx.Node, fx.Node] = {}
        self.holders: dict[Member, list[fx.Node]] = {}
        self.inputs: dict[fx.Node, tuple[Any, Any]] = {}
        self.entering: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.find_nodes(op="call_module"):
            if (entered := node.meta.pop("entered", None)) is not None:
                self.entering.setdefault(entered, []).append(node)
        self.notes: list[str] = []
        self.made: list[fx.Node] = []  # calls that go where nothing reads them
        tensors: dict[int, Member] = {}  # those of the model; tied ones are one
        for node in graph.find_nodes(op="get_attr"):
            tensor = operator.attrgetter(str(node.target))(modules)
            self.members[node] = tensors.setdefault(id(tensor), Member(node))
            self.members[node].names.append(node)

    def visit(self, node: fx.Node) -> None:
        marker = node.target is torch.ops.sp_fx.registered.default
        source = first(node) if marker else None  # what a registered gate got, as it was
        node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n if n is source else self.current(n))
        if node in self.inputs:
            inputs, node.kwargs = self.inputs[node]
            node.args = (node.args[0], *inputs)
        over = written(node)
        if any(map(is_number, over)):  # `size += 1` writes over nothing
            replace_call(node)
            over = []
        result = node.args[1] if marker else self.aliasing.itself(node)
        if item_of(node) is not None and isinstance(node.args[0], tuple | list | dict):
            result = node.args[0][node.args[1]]  # type: ignore[index, call-overload]
        if over:
            self.write(node, over)
        elif isinstance(result, fx.Node):
            self.join(node, self.members[result])
            if node.op == "call_module":  # its hooks see it
                self.read([node])
        elif result is not None:  # a container that a module returned
            self.members[node] = Member(node, names=[node])
            for n in nodes_in(result):
                self.holders.setdefault(self.members[n], []).append(node)
            self.read(nodes_in(result))
        elif (viewed := self.aliasing.viewed(node)) is not None:
            self.add_view(node, viewed)
        elif node.op != "get_attr":
            fresh = node.op in ("call_function", "call_method") and name_of(node) in FRESH
            self.members[node] = Member(node, names=[node], fresh=fresh, dense=node.op.startswith("call"))
            if not reads_form(node):
                self.read(node.all_input_nodes)

    def enter(self, node: fx.Node) -> None:
        """Note the inputs, as they are now, of the modules that are entered after `node`."""
        for mark in self.entering.get(node, ()):
            self.inputs[mark] = inputs = fx.map_arg((mark.args[1:], mark.kwargs), self.current)
            self.read(nodes_in(inputs))

    def current(self, node: fx.Node) -> Any:
        """Returns what has the value of `node` now; of a container that a module returned, the container round such nodes."""
        if node in self.now:
            return self.now[node]
        result = self.aliasing.itself(node) if node.op == "call_module" else None
        if isinstance(result, fx.Node | None):
            return node
        new = fx.map_arg(result, self.current)
        return node if new == result else new

    # -- which tensor a node is

    def join(self, node: fx.Node, member: Member) -> None:
        """Make `node` another name of a tensor, which has its value from now on."""
        self.members[node] = member
        member.names.append(node)
        member.value = node

    def add_view(self, node: fx.Node, source: fx.Node) -> None:
        key, home = item_of(node), None
        result = self.aliasing.itself(source) if source.op == "call_module" else None
        if key is not None and isinstance(result, tuple | list | dict) and isinstance(result[key], fx.Node):
            self.join(node, self.members[result[key]])  # an item of what a module returned
            return
        parent = self.members[source]
        if key is not None and (isinstance(key, str) or has_items(source)):
            home = parent
            if (same := home.items.get(key)) is not None:
                self.members[node] = same
                same.names.append(node)
                if same.written:
                    self.now[node] = same.value
                return
        self.members[node] = Member(node, parent, node, home, key, [node])

    def read(self, nodes: list[fx.Node]) -> None:
        """Note that a call reads the tensors `nodes`."""
        for n in nodes:
            self.members[n].line()[-1].fresh = False

    # -- what is read later

    def is_read(self, member: Member, node: fx.Node, target: Member) -> bool:
        """Whether a call after `node`, which writes over `target`, reads the tensor: itself, or through views made after `node`.

        An item of a container that `target` is in has storage of its own, or is `target`.
        """
        names = [*member.names, *self.holders.get(member, ())]
        users = [(n, user) for n in names for user in n.users]
        if member in target.line():
            users = [(n, user) for n, user in users if not is_item(n, user)]
        if member.home is not None:  # `x["a"]`, asked for once more
            again = [user for n in member.home.names for user in n.users if item_of(user) == member.key]
            users += [(view, user) for view in again if view not in member.names for user in view.users]
        return any(self.reads(n, user, node) for n, user in users)

    def reads(self, name: fx.Node, user: fx.Node, node: fx.Node) -> bool:
        """Whether the call `user` comes after `node` and reads `name`, itself or through what it returns."""
        if self.position.get(user, -1) <= self.position[node] or reads_form(user):
            return False
        result: Any = None
        if user.target is torch.ops.sp_fx.registered.default:
            result = user.args[1]
        elif not written(user):
            result = self.aliasing.itself(user)
            result = self.aliasing.viewed(user) if result is None else result
        if result is None:
            return True
        return name in nodes_in(result) and any(self.reads(user, other, node) for other in user.users)

    # -- what is written

    def write(self, node: fx.Node, over: list[fx.Node]) -> None:
        targets = [self.members[n] for n in over]
        plain = out_of_place(node) if len(over) == 1 else None
        if plain is not None and gives_view(name_of(node)):
            self.restride(node, targets[0])
            return
        for target in targets:
            self.note(target)
        root = targets[0].line()[-1]
        others = [m for m in root.all() if m is not targets[0] and m.overlaps(targets[0]) and self.is_read(m, node, targets[0])]
        if plain is not None and not others:
            self.replace_by_result(node, targets[0])
            return
        if plain is not None and root.fresh and not has_rule(node, plain[0]):
            plain = None  # it may go on writing
        self.write_over_copies(node, targets, plain is not None)

    def restride(self, node: fx.Node, member: Member) -> None:
        """`h.t_()` becomes `h.t()`, and stands for `h` from now on."""
        replace_call(node)
        moved = Member(node, member, node, names=[*member.names, node], written=True)
        for name in member.names:
            self.members[name], self.now[name] = moved, node
        self.members[node], member.names = moved, []

    def note(self, member: Member) -> None:
        """Note that a tensor of the model is written over, the first time."""
        names = member.line()[-1].names
        buffer = next((n for n in names if n.op == "get_attr"), None)
        if buffer is not None and not member.line()[-1].written:
            note = f"the forward writes over {buffer.target}: each call over a copy of it, the model's own stays"
            self.notes += [] if note in self.notes else [note]

    def replace_by_result(self, node: fx.Node, member: Member) -> None:
        """Let the result of the call out of place stand for the tensor that nothing else shares."""
        resized = "out" in node.kwargs
        replace_call(node)
        self.read(node.all_input_nodes)
        result = node
        if resized or not keeps_form(node, member):
            with self.graph.inserting_after(node):
                result = call(self.graph, in_form_of, (node, member.value, *([True] if resized else [])), member.value, node)
        member.leave()
        member.children, member.fresh = [], False
        member.names.append(node)
        self.set(member, result, node)

    def write_over_copies(self, node: fx.Node, targets: list[Member], plain: bool) -> None:
        """Let a call write over copies, and what is read later read the copies and their views."""
        if plain:
            self.read(node.all_input_nodes)
        renewed: dict[Member, fx.Node] = {}
        with self.graph.inserting_before(node):
            for target in targets:
                renewed |= self.renew(node, target, renewed)
        write = node
        if plain:
            replace_call(node)
            with self.graph.inserting_after(node):
                write = call(self.graph, overwrite_, (renewed[targets[0]], node), targets[0].value, node)
        else:
            args = fx.map_arg((node.args, node.kwargs), lambda n: renewed.get(self.members[n], n))
            node.args, node.kwargs = args
            if name_of(node) == "setitem":
                node.op, node.target = "call_function", setitem_
        self.members[node] = self.members[write] = Member(write)
        last = write
        for member, value in renewed.items():
            if any(member in target.line()[-1].all() and member.overlaps(target) for target in targets):
                with self.graph.inserting_after(last):
                    if member.parent in renewed and is_always_view(member.view):  # type: ignore[arg-type]
                        value = last = view_again(self.aliasing, member, member.parent.value)  # type: ignore[union-attr]
                    else:  # what is a copy, as `reshape` may be, was made before the write
                        value = last = call(self.graph, after, (value, write), value, node)
                self.made.append(value)
            self.set(member, value, node)
        if not isinstance(node.target, torch._ops.OpOverload) or plain or returns_target(node.target):
            self.members[node], self.now[node] = targets[0], targets[0].value
            targets[0].names.append(node)

    def renew(self, node: fx.Node, target: Member, renewed: dict[Member, fx.Node]) -> dict[Member, fx.Node]:
        """Returns nodes for the tensors that share the storage of `target` and are needed at the call or later, itself included,
        in storage that may be written over: in a copy, where theirs may not."""
        root = target.line()[-1]
        read_now = {self.members[n] for n in node.all_input_nodes}
        live = [m for m in root.all() if m is target or m in read_now or self.is_read(m, node, target)]
        base = root
        if not root.fresh:
            base = target
            for m in live:
                base = base.common(m) if m.overlaps(target) else base
            live = [m for m in live if base in m.line()]
        used = [m for m in base.all() if any(m in other.line() for other in live)]
        for m in used:
            m.children = [child for child in m.children if child in used]
        if root.fresh:
            return {m: renewed.get(m, m.value) for m in used}
        values = {base: call(self.graph, copied, (base.value,), base.value, node)}
        for m in used[1:]:
            values[m] = view_again(self.aliasing, m, values[m.parent])  # type: ignore[index]
        self.made += values.values()
        base.leave()
        base.fresh = True
        return values

    def set(self, member: Member, value: fx.Node, node: fx.Node) -> None:
        """Let `value` have the value of a tensor after the call `node`."""
        member.value, member.written = value, True
        self.members[value] = member
        self.now |= dict.fromkeys(member.names, value)
        if member not in self.holders:  # the others are not looked for any more
            later = self.position[node]
            member.names = [n for n in member.names if any(self.position.get(user, -1) > later for user in n.users)]
        member.names.append(value)


# -- calls that are made, and changed


def call(graph: fx.Graph, function: Any, args: tuple, like: fx.Node, at: fx.Node) -> fx.Node:
    """Returns a call that gives a tensor of the form of `like`, made for the call `at`."""
    new = graph.call_function(function, args)
    known = {"val": like.meta["val"]} if "val" in like.meta else {}  # none of a tensor of the model
    new.meta.update({key: value for key, value in at.meta.items() if key != "val"} | known)
    return new


def replace_call(node: fx.Node) -> None:
    """Make a call in place the one that computes what it writes."""
    node.target, node.args, node.kwargs = out_of_place(node)  # type: ignore[misc]


def view_again(aliasing: Aliasing, member: Member, of: fx.Node) -> fx.Node:
    """Returns the view that `member` is, of another tensor."""
    view, graph = member.view, of.graph
    assert view is not None
    if view.op == "call_module":  # no second call of the module, whose hooks would run twice
        leaf: Any = aliasing.leaf(view)
        options = (leaf.start_dim, leaf.end_dim) if isinstance(leaf, nn.Flatten) else (leaf.dim, leaf.unflattened_size)
        new = graph.call_method("flatten" if isinstance(leaf, nn.Flatten) else "unflatten", (of, *options))
    else:
        source = first(view)
        args, kwargs = fx.map_arg((view.args, view.kwargs), lambda n: of if n is source else n)
        new = graph.create_node(view.op, view.target, args, kwargs)
    new.meta.update(view.meta)
    return new


def has_rule(node: fx.Node, plain: Any) -> bool:
    """Whether a call, `plain` out of place, may get a rule, or be part of what gets one."""
    return getattr(plain, "overloadpacket", plain) in READERS or name_of(node) in PRODUCT | QUOTIENT | FACTORS | CHOICES


def form_of(t: Tensor) -> tuple[Any, ...]:
    """Returns dtype, shape and strides, as text, since comparing symbols may ask for their values."""
    return t.dtype, str(t.shape), str(t.stride())


def keeps_form(node: fx.Node, member: Member) -> bool:
    """Whether the result of a call is known to have the dtype, shape and strides of what it was to write over."""
    values = [n.meta.get("val") for n in (member.value, *node.all_input_nodes)]
    if isinstance(node.target, torch._ops.OpOverload) and all(isinstance(v, Tensor) for v in values):
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        with torch.no_grad():
            result, target = node.target(*args, **kwargs), member.value.meta["val"]
        return isinstance(result, Tensor) and form_of(result) == form_of(target)
    return node.all_input_nodes == [member.value] and name_of(node) in SAME_FORM and member.dense
