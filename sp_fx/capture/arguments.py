"""The arguments that a model is traced with, and what a traced graph checks of those it is called with.

A *form* says what an argument looked like: `("tensor", shape)` with None for an axis of any size, `("is", constant)`,
`("items", {key: form})` of a mapping, a tuple or a list, `("fields", {name: form})` of a dataclass.
"""

from __future__ import annotations

import collections
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx, nn
from torch.overrides import handle_torch_function, has_torch_function

from ..containers import PLAIN, items
from .clones.clone import call_signature

VARIADIC: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


def bound(module: nn.Module, example_inputs: Any) -> dict[str, Any]:
    """The example arguments by parameter of the forward, defaults included; `example_inputs` is a tensor, a tuple of positional
    arguments, or a mapping of keyword arguments.

    Raises:
        TypeError: arguments that the forward does not take.
    """
    signature = call_signature(module)
    if isinstance(example_inputs, PLAIN):
        expected = "a tensor, a tuple of positional arguments, or a mapping of keyword arguments"
        raise TypeError(f"example_inputs is {expected}, got {example_inputs!r}")
    try:
        parameters = signature.parameters.values()
        any_name = any(p.kind is p.VAR_KEYWORD for p in parameters)
        if isinstance(example_inputs, Mapping) and (any_name or all(name in signature.parameters for name in example_inputs)):
            arguments = signature.bind(**example_inputs)
        else:
            arguments = signature.bind(*(example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)))
    except TypeError as error:
        raise TypeError(
            f"example_inputs do not fit {type(module).__name__}.forward{signature}: {error}. Pass a tensor, a tuple of "
            "positional arguments, or a mapping of keyword arguments"
        ) from None
    arguments.apply_defaults()
    return arguments.arguments


def fixed_arguments(module: nn.Module, example: Mapping[str, Any] | None) -> dict[str, Any]:
    """The arguments of a forward that a symbolic trace fixes, since `if mask is not None` is true of every proxy: those that are
    plain in the example, or else have plain defaults. Another value is refused when the graph runs."""
    if example is not None:
        return {name: value for name, value in example.items() if isinstance(value, PLAIN)}
    parameters = inspect.signature(module.forward).parameters.values()
    return {p.name: p.default for p in parameters if isinstance(p.default, PLAIN) and p.default is not p.empty}


def call_of(module: nn.Module, arguments: Mapping[str, Any]) -> inspect.BoundArguments:
    """The call of a module's forward with arguments that are given by name: positional ones in `args`, the others in `kwargs`."""
    return inspect.BoundArguments(inspect.signature(module.forward), collections.OrderedDict(arguments))


class ByName(fx.Interpreter):
    """Runs a graph on the arguments of its forward, by name: the graph of `module`, or another one over its submodules."""

    arguments: Mapping[str, Any] = {}

    def __init__(self, module: nn.Module, graph: fx.Graph | None = None) -> None:
        super().__init__(module, graph=graph)
        self.extra_traceback = False  # pages of it, in the message of an error

    def run_by_name(self, arguments: Mapping[str, Any]) -> Any:
        """Runs the graph; arguments that are left out have their defaults."""
        self.arguments = arguments
        return self.run()

    def placeholder(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = str(target).lstrip("*")
        if name in self.arguments:
            return self.arguments[name]
        if args:
            return args[0]  # the default
        if (stars := len(str(target)) - len(name)) == 0:
            raise TypeError(f"the argument {name} is missing")
        return () if stars == 1 else {}


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
        wanted = f"a tensor [{', '.join('*' if n is None else str(n) for n in content)}]"
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
