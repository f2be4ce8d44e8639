"""The arguments of a call, as they were given and by parameter of the forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from ..containers import PLAIN, rebuilt, refuse_nested
from .clones.clone import call_signature

VARIADIC: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


class Given(NamedTuple):
    """The arguments of a call as they were given: positions stay positions, keywords keywords, and defaults are left out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def by_name(self, forward: Callable[..., Any] | inspect.Signature, defaults: bool = False) -> dict[str, Any]:
        """Returns the arguments by parameter of `forward`, in their order; with `defaults`, those too that were left out.

        Raises:
            TypeError: the forward does not take them.
        """
        signature = forward if isinstance(forward, inspect.Signature) else inspect.signature(forward)
        arguments = signature.bind(*self.args, **self.kwargs)
        if defaults:
            arguments.apply_defaults()
        return dict(arguments.arguments)


def given(module: nn.Module, example_inputs: Any) -> Given:
    """The call of `module` that the example stands for: a tensor, a tuple of positional arguments, or a mapping of keyword
    arguments.

    Raises:
        TypeError: arguments that the forward does not take.
    """
    signature = call_signature(module)
    refuse_nested(example_inputs)
    if isinstance(example_inputs, PLAIN):
        expected = "a tensor, a tuple of positional arguments, or a mapping of keyword arguments"
        raise TypeError(f"example_inputs is {expected}, got {example_inputs!r}")
    if isinstance(example_inputs, Mapping) and are_named(signature, example_inputs):
        call = Given((), dict(example_inputs))
    else:
        call = Given(example_inputs if is_call(example_inputs) else (example_inputs,), {})
    try:
        call.by_name(signature)
    except TypeError as error:
        raise TypeError(
            f"example_inputs do not fit {type(module).__name__}.forward{signature}: {error}. Pass a tensor, a tuple of "
            "positional arguments, or a mapping of keyword arguments"
        ) from None
    return call


def is_call(inputs: Any) -> bool:
    """Whether `inputs` are several positional arguments: a tuple, where a named tuple, such as a `PackedSequence`, is one."""
    return isinstance(inputs, tuple) and not hasattr(inputs, "_fields")


def are_named(signature: inspect.Signature, inputs: Mapping[Any, Any]) -> bool:
    """Whether the keys of `inputs` are parameters: else the mapping is itself an argument. Of `forward(batch, **options)` it is
    where none of its keys is `batch`."""
    parameters = signature.parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return all(name in parameters for name in inputs)
    needed = any(p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty for p in parameters.values())
    return not needed or not inputs or any(name in parameters for name in inputs)


def distinct(call: Given) -> Given:
    """Returns the call with a copy for every tensor that comes again: of `(x, x)`, torch.export makes one input, and takes
    `query is key` for a property of the model."""
    seen: list[Tensor] = []

    def one(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            leaf = leaf.detach().clone() if any(leaf is other for other in seen) else leaf
            seen.append(leaf)
        return leaf

    return rebuilt(call, one)


def fixed_arguments(module: nn.Module, example: Mapping[str, Any] | None) -> dict[str, Any]:
    """The arguments of a forward that a symbolic trace fixes, since `if mask is not None` is true of every proxy: those that are
    plain in the example, or else have plain defaults. Another value is refused when the graph runs."""
    if example is not None:
        return {name: value for name, value in example.items() if isinstance(value, PLAIN)}
    parameters = inspect.signature(module.forward).parameters.values()
    return {p.name: p.default for p in parameters if isinstance(p.default, PLAIN) and p.default is not p.empty}


class ByName(fx.Interpreter):
    """Runs a graph on the arguments of its forward, by name: the graph of `module`, or another one over its submodules."""

    arguments: Mapping[str, Any] = {}

    def __init__(self, module: nn.Module, graph: fx.Graph | None = None) -> None:
        super().__init__(module, graph=graph)
        self.extra_traceback = False  # pages of it, in the message of an error

    def run_by_name(self, arguments: Mapping[str, Any], known: Mapping[fx.Node, Any] | None = None) -> Any:
        """Runs the graph; arguments that are left out have their defaults. Nodes whose values are `known` are not run."""
        self.arguments = arguments
        return self.run(initial_env=dict(known) if known else None)

    def placeholder(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = str(target).lstrip("*")
        if name in self.arguments:
            return self.arguments[name]
        if args:
            return args[0]  # the default
        if (stars := len(str(target)) - len(name)) == 0:
            raise TypeError(f"the argument {name} is missing")
        return () if stars == 1 else {}
