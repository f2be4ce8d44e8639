"""Which calls a graph is for: it checks what it is called with against the form that it was captured for.

A *form* says what an argument looked like: `("tensor", shape)` with None for an axis of any size, `("is", constant)`,
`("items", {key: form})` of a mapping, a tuple or a list, `("fields", {name: form})` of a dataclass.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import handle_torch_function, has_torch_function

from ..containers import PLAIN, items


def form(value: Any, any_size: Callable[[Tensor, int], bool]) -> tuple[str, Any]:
    """The form of `value`; `any_size(tensor, axis)` says where the size does not matter.

    Raises:
        TypeError: an object that is neither tensor, container nor plain.
    """
    if isinstance(value, Tensor):
        return "tensor", tuple(None if any_size(value, axis) else size for axis, size in enumerate(value.shape))
    container = items(value)
    if container is not None:
        return container[0], {key: form(item, any_size) for key, item in container[1].items()}
    if isinstance(value, PLAIN):
        return "is", value
    raise TypeError(f"an argument is a {type(value).__name__}: expected tensors, plain values, and containers of them")


def sizes(content: Sequence[int | None]) -> str:
    """The sizes of a form of a tensor, as text: "[*, 3]" where the first may be any."""
    return f"[{', '.join('*' if n is None else str(n) for n in content)}]"


def listed(form: tuple[str, Any], name: str) -> list[str]:
    """The tensors of a form, each with the name of the argument and its sizes: "x [*, 3]", "batch['mask'] [*, *]"."""
    kind, content = form
    if kind == "tensor":
        return [f"{name} {sizes(content)}"]
    inside = content.items() if kind in ("items", "fields") else ()
    return [line for key, f in inside for line in listed(f, f"{name}[{key!r}]" if kind == "items" else f"{name}.{key}")]


class FormError(ValueError):
    """An argument is of another form than the graph was captured for."""


def checked(value: Any, name: str, expected: tuple[str, Any]) -> Any:
    """`value`, if it has the form of the argument that the graph was traced with.

    Raises:
        FormError: it has not; the message says what is different.
    """
    if has_torch_function((value,)):
        return handle_torch_function(checked, (value,), value, name, expected)
    kind, content = expected
    remedy = "the graph was captured by torch.export for its example_inputs: transform the model with example_inputs like these"
    if kind == "tensor":
        wanted = f"a tensor {sizes(content)}"
        if not isinstance(value, Tensor):
            raise FormError(f"{name}: expected {wanted}, got {value!r}; {remedy}")
        if len(content) != value.dim() or any(n is not None and n != m for n, m in zip(content, value.shape)):
            raise FormError(f"{name}: expected {wanted}, got {list(value.shape)}; {remedy}")
    elif kind == "is":
        if isinstance(value, Tensor) or items(value) is not None or value != content:
            got = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise FormError(f"{name}: expected {content!r}, got {got}; {remedy}")
    else:
        container = items(value)
        if container is None or set(container[1]) != set(content):
            got = f"a {type(value).__name__}" + ("" if container is None else f" of {list(container[1])}")
            raise FormError(f"{name}: expected one of {list(content)}, got {got}; {remedy}")
        for key, item in container[1].items():
            checked(item, f"{name}[{key!r}]" if kind == "items" else f"{name}.{key}", content[key])
    return value


fx.node.has_side_effect(checked)


def sizes_checked(tensors: Sequence[Tensor], conditions: Sequence[str]) -> None:
    """Checks `conditions` on the sizes of the inputs of a graph.

    Raises:
        FormError: one does not hold.
    """
    if has_torch_function(tuple(tensors)):
        return handle_torch_function(sizes_checked, tuple(tensors), tensors, conditions)
    for condition in conditions:
        if not read(condition)(tensors):
            shapes = ", ".join(str(list(t.shape)) for t in tensors)
            raise FormError(f"the graph was captured by torch.export for inputs t where {condition}, got sizes {shapes}")
    return None


@functools.lru_cache(4096)
def read(condition: str) -> Callable[[Sequence[Tensor]], bool]:
    return eval(f"lambda t: {condition}", {"math": math, "torch": torch})


fx.node.has_side_effect(sizes_checked)


def answered(tensors: list[Tensor], name: str, rest: tuple[Any, ...], answer: Any, line: str) -> None:
    """Asks what the forward asks, and checks that the answer is what the example was told.

    Raises:
        FormError: it is not.
    """
    if any(isinstance(t, torch._subclasses.FakeTensor) for t in tensors):  # which have shapes alone
        return
    if name:
        ask: Callable[..., Any] = getattr(Tensor, name, None) or getattr(torch, name)
        got = ask(*tensors, *rest)
        fits = got == answer
    else:
        got = tuple(tensors[0].shape)
        fits = all(m is None or n == m for n, m in zip(got, answer))
    if not fits:
        what = name.strip("_") or "the sizes"
        raise FormError(
            f"the forward takes another path than on its example: it asks for {what} at {line}, which was {answer} and is {got} "
            "now. The graph is the path of the example: transform the model with an example that takes this one"
        )


fx.node.has_side_effect(answered)


class Admission:
    """Which calls a graph is for.

    Attributes:
        signature: what its forward takes.
        checks: the nodes by which it checks what it is called with.
        exported: whether it was captured by torch.export.
    """

    def __init__(self, signature: inspect.Signature, graph: fx.Graph) -> None:
        self.signature, self.checks = signature, checks(graph)
        self.exported = any(node.target is checked for node in self.checks)

    def refusal(self, arguments: Mapping[str, Any]) -> str:
        """Says why the graph is not for a call with such arguments, by name; "" where it is."""
        return refusal(self.checks, arguments)


def checks(graph: fx.Graph) -> list[fx.Node]:
    """Returns the nodes by which a graph checks what it is called with, each after those that it needs: the forms and sizes of an
    export, what it was told of its inputs, and the constants that a symbolic trace has made of plain arguments."""
    needed: set[fx.Node] = set()
    for node in graph.nodes:
        if node.target in (checked, sizes_checked, answered) or asserts_argument(node):
            needed |= at_entry(node)
    return [node for node in graph.nodes if node in needed]


FEW = 64  # nodes that a call may be asked about before it runs: a comparison of masks takes ten


def made_from(node: fx.Node) -> set[fx.Node]:
    """Returns a node with all that it is computed from."""
    found, queue = {node}, [node]
    while queue:
        for n in queue.pop().all_input_nodes:
            if n not in found:
                found.add(n)
                queue.append(n)
    return found


def asked_of_inputs(graph: fx.Graph) -> list[str]:
    """Returns the lines of a forward that ask for values which depend on the inputs: they choose the path that the graph is."""
    asks = graph.find_nodes(op="call_function", target=answered)
    return [str(node.args[-1]) for node in asks if any(n.op == "placeholder" for n in made_from(node))]


def at_entry(node: fx.Node) -> set[fx.Node]:
    """Returns a node with all that it is computed from, where these are a few functions of the inputs alone; else nothing."""
    found = made_from(node)
    few = len(found) <= FEW + 2 * len(node.all_input_nodes) and all(n.op in ("placeholder", "call_function") for n in found)
    return found if few else set()


def asserts_argument(node: fx.Node) -> bool:
    """Whether a node asserts that an argument is what it was when it was traced: `torch._assert(flag == True, ...)`."""
    if getattr(node.target, "__name__", "") == "_assert_is_none":
        return True
    compared = node.args[0] if node.target is torch._assert else None
    if not isinstance(compared, fx.Node) or compared.target is not operator.eq:
        return False
    return all(n.op == "placeholder" for n in compared.all_input_nodes)


def refusal(checks: Sequence[fx.Node], arguments: Mapping[str, Any]) -> str:
    """Says why a graph with these `checks` is not for a call, whose arguments it gets by name; "" where it is."""
    values: dict[fx.Node, Any] = {}
    try:
        for node in checks:
            if node.op == "placeholder":
                name = str(node.target).lstrip("*")
                left_out = node.args[0] if node.args else {"": None, "*": (), "**": {}}[str(node.target)[: -len(name)]]
                values[node] = arguments.get(name, left_out)
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception as error:  # or what an op says of a tensor in place of a flag, and of sizes that it does not take
        return str(error) or type(error).__name__
    return ""
