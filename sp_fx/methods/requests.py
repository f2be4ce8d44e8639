"""One call of a method: what its caller asks, and the inputs that follow from it, cut along the batch."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor, fx

from ..capture.admission import checked
from ..capture.arguments import are_named, is_call
from ..containers import Slot, filled, is_array, leaves_by_path, rebuilt, refuse_nested, tensors_of, type_of
from ..measured.runs import first_line
from ..targets import Direction, Target, as_target

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any] | list[Any]
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
Key = int | str  # of an argument: its number among the values of a call, or its keyword


@dataclass(frozen=True)
class Request:
    """The arguments that all methods have in common; `Explainer` says what each may be.

    `extra` are positional arguments of the model after the inputs, which are not explained. `bounds` are an ascent's.
    `samplewise` are the keyword arguments that go with the samples, where that is known.
    """

    inputs: Inputs
    target: Target = None
    forward_kwargs: Mapping[str, Any] | None = None
    wrt: str | Sequence[str] | None = None
    batch_size: int | None = None
    extra: tuple[Any, ...] = ()
    bounds: tuple[Any, ...] = ()
    samplewise: frozenset[Key] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.forward_kwargs, Mapping | None):
            raise TypeError(f"forward_kwargs is a mapping of keyword arguments, got a {type(self.forward_kwargs).__name__}")

    def arguments(self, forward: Callable[..., Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """All arguments, positional and by keyword, of a call of a module with that forward."""
        positional, keyword = arguments_of(forward, self.inputs)
        others = self.forward_kwargs or {}
        if twice := ", ".join(map(str, keyword.keys() & others.keys())):
            raise InputError(f"{twice} is among the inputs and in forward_kwargs too: pass it once")
        return (*positional, *self.extra), {**keyword, **others}

    def call(self, forward: Callable[..., Any]) -> Call:
        """The call that the request stands for, of a module with that forward.

        Raises:
            TypeError, ValueError: inputs that autograd cannot use, none, or of different batch sizes.
        """
        positional, keyword = arguments_of(forward, self.inputs)
        refuse_nested((positional, keyword))
        leaves: list[Tensor] = []

        def slot(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            leaves.append(usable(leaf))
            return Slot(len(leaves) - 1)

        if not (positional or keyword):
            raise ValueError(f"expected at least one input, got an empty {type(self.inputs).__name__}")
        if reason := misfit(forward, *self.arguments(forward)):
            raise InputError(reason)
        for value in positional or [keyword]:
            left_out = value is None and bool(tensors_of(positional))  # as in `(x, None)`
            if not tensors_of(value) and not left_out:
                expected = "a tensor, a container of tensors, a tuple of such, or a mapping of them, as inputs"
                hint = "; sp_fx.read_picture(path, size) makes one of a picture file" if isinstance(value, str | PathLike) else ""
                raise InputError(f"expected {expected}; got {type_of(value)}{hint}")
        skeleton = rebuilt((positional, keyword), slot)
        kwargs = {name: outside_inference(value) for name, value in dict(self.forward_kwargs or {}).items()}
        values = [*leaves, *map(outside_inference, self.extra)]
        target = as_target(self.target)
        return Call(values, len(leaves), kwargs, target, skeleton, self.bounds, self.samplewise or frozenset())

    def contained(self, forward: Callable[..., Any], maps: list[Tensor]) -> Any:
        """The maps of the floating inputs, in order, in the containers that the inputs came in, with None for the other leaves;
        of a mapping of arguments, those arguments alone that have tensors."""
        remaining = iter(maps)

        def map_of(leaf: Any) -> Any:
            return next(remaining) if isinstance(leaf, Tensor) and leaf.is_floating_point() else None

        positional, keyword = arguments_of(forward, self.inputs)
        if not positional:
            return {name: rebuilt(value, map_of) for name, value in keyword.items() if tensors_of(value)}
        by_input = rebuilt(positional, map_of)
        return by_input if isinstance(self.inputs, tuple) else by_input[0]


def arguments_of(forward: Callable[..., Any], inputs: Inputs) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Returns the inputs as positional and keyword arguments: a tuple is the former, a mapping from names of parameters the
    latter; whatever else, another mapping or a list, is one argument."""
    if is_call(inputs):
        return tuple(inputs), {}
    if isinstance(inputs, Mapping) and are_named(inspect.signature(forward), inputs):
        return (), inputs
    return (inputs,), {}


def spread(module: fx.GraphModule, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of a call with one argument, which may be the inputs as the methods take them: a mapping from names
    of parameters, or a tuple for a forward that wants more than one. What the model itself takes as one argument stays one."""
    parameters = inspect.signature(module.forward).parameters.values()
    needed = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if isinstance(inputs, tuple) and len(needed) > 1:
        return inputs, {}
    named = isinstance(inputs, Mapping) and bool(inputs) and are_named(inspect.signature(module.forward), inputs)
    of_mappings = named and all(isinstance(value, Mapping) for value in inputs.values())
    return ((), dict(inputs)) if named and (of_mappings or not takes_mapping(module.graph)) else ((inputs,), {})


def takes_mapping(graph: fx.Graph) -> bool:
    """Whether the first argument of a graph is a mapping: it reads items of it by name."""
    argument: Any = next(iter(graph.find_nodes(op="placeholder")), None)
    users = () if argument is None else argument.users
    read = [user.args[1] for user in users if user.target in (operator.getitem, "get")]
    forms = [user.args[2] for user in users if user.target is checked]
    return any(isinstance(key, str) for key in [*read, *(key for kind, form in forms if kind == "items" for key in form)])


class InputError(TypeError):
    """A forward cannot take its arguments; the message says which, what they are, and what is expected of them."""


class BatchAxisError(ValueError):
    """The inputs are one sample, without a batch axis; the message says how to make it a batch of one."""


@contextmanager
def naming_inputs(forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """While it lasts an error that a forward raises for what it is called with is an `InputError`, where that can be seen.

    Asked only once there is an error: what a forward does not read, such as the names in a batch, may be of any kind.
    """
    try:
        yield
    except InputError:
        raise
    except (TypeError, AttributeError, KeyError, RuntimeError) as error:
        if reason := fault(forward, args, kwargs, error):
            raise InputError(reason) from None  # what the forward's op says of an array fills a page
        raise


def fault(forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], error: Exception) -> str:
    """Says what is wrong with the arguments of a call that raised `error`: they do not fit the forward, one is an array of NumPy,
    a mapping lacks a key; "" where nothing is."""
    if reason := misfit(forward, args, kwargs):
        return reason
    arguments = inspect.signature(forward).bind(*args, **kwargs).arguments
    leaves = {path: leaf for name, value in arguments.items() for path, leaf in leaves_by_path(value, name).items()}
    arrays = [path for path, leaf in leaves.items() if is_array(leaf) and leaf.ndim]
    if arrays and (isinstance(error, TypeError | AttributeError) or "numpy" in str(error)):
        return f"the argument {arrays[0]} is a numpy.ndarray, expected a tensor: torch.from_numpy makes one ({first_line(error)})"
    key = f"[{error.args[0]!r}]" if isinstance(error, KeyError) and error.args else ""
    if key and any(isinstance(value, Mapping) for value in arguments.values()) and not any(key in path for path in leaves):
        inside = ", ".join(path for path in leaves if "[" in path) or "none"
        return f"the forward reads the key {key[1:-1]}, which is not among the inputs; these are {inside}"
    return ""


def misfit(forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Says how arguments do not fit the parameters of a forward; "" where they do."""
    signature = inspect.signature(forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        got = [f"{name} by name" for name in kwargs]
        if len(args) == 1 and isinstance(args[0], Mapping):
            others = [str(key) for key in args[0] if key not in signature.parameters]
            kind = f"a {type(args[0]).__name__} with the keys {', '.join(map(str, args[0])) or 'none'}"
            got.insert(0, f"{kind}, where no parameter is called {' or '.join(others)}" if others else kind)
        elif args:
            got.insert(0, f"{len(args)} by position")
        return f"the inputs do not fit the model's forward{signature}: {error}; got {', '.join(got) or 'none'}"
    return ""


def usable(x: Tensor) -> Tensor:
    """The input as autograd can use it."""
    if x.is_complex():
        raise TypeError(f"cannot explain a complex input ({x.dtype}): pass its real and imaginary parts")
    if x.dim() == 0:
        raise ValueError("an input needs a batch axis, got a tensor of no axes")
    return outside_inference(x)


def outside_inference(value: Any) -> Any:
    """`value` with copies of the tensors that were made under `torch.inference_mode()`, which autograd refuses."""
    if not any(t.is_inference() for t in tensors_of(value)):
        return value
    return rebuilt(value, lambda leaf: leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf)


@dataclass
class Call:
    """`values` are the positional arguments, of which the first `count` are inputs; floating inputs are explained.

    `skeleton` are the positional and the keyword arguments that the inputs are in, with numbered slots for these; other
    positional arguments come after them.
    """

    values: list[Any]
    count: int
    kwargs: dict[str, Any]
    target: Target
    skeleton: tuple[tuple[Any, ...], Mapping[str, Any]]
    bounds: tuple[Any, ...] = ()  # of an ascent: they broadcast to an input, and may have the batch on their axis 0
    samplewise: frozenset[Key] = frozenset()  # arguments beside the inputs that go with the samples

    def __post_init__(self) -> None:
        if self.is_uneven and 1 in self.sizes and not self.has_integers:  # it would be broadcast, and its map be of all samples
            raise ValueError(f"the inputs have different batch sizes: {self.sizes}")

    @property
    def is_uneven(self) -> bool:
        """Whether the inputs have several numbers of places on axis 0, as the nodes and the edges of a graph: no batch."""
        return len(self.sizes) > 1

    @property
    def sizes(self) -> list[int]:
        """The numbers of places that the explained inputs have on axis 0."""
        return sorted({x.shape[0] for x in self.explained})

    @property
    def has_integers(self) -> bool:
        """Whether there are whole numbers among the arguments, which may be an index."""
        return any(t.dtype in INTEGERS for t in tensors_of([self.values, self.kwargs]))

    @property
    def inputs(self) -> list[Tensor]:
        return self.values[: self.count]

    @property
    def explained(self) -> list[Tensor]:
        return [x for x in self.inputs if x.is_floating_point()]

    @property
    def batch(self) -> int:
        return (self.explained or self.values)[0].shape[0]

    def check(self, devices: set[torch.device], explains: bool) -> None:
        """Raise where the inputs are not fit for a model on `devices`, or, where it `explains` them, have nothing to explain."""
        if explains and not self.explained:
            dtypes = ", ".join(str(x.dtype) for x in self.inputs)
            raise TypeError(
                f"nothing to explain: the inputs are {dtypes}; expected a floating one. Whole numbers have no gradient: make "
                "pictures floating, and explain token ids with respect to their embedding, wrt='its name'"
            )
        for x in self.inputs:
            if devices and x.device not in devices:
                raise ValueError(f"the input is on {x.device} and the model on {', '.join(map(str, devices))}: move one of them")
            if x.is_floating_point() and bool(torch.isnan(x).any()):
                raise ValueError(f"the input of shape {list(x.shape)} has NaN in it")

    def one_target_each(self) -> list[Call]:
        """The call for each of the T targets of a sample, where the target is [B, T]; else itself alone."""
        t = self.target
        fits = isinstance(t, Tensor) and t.dim() == 2 and (t.shape[0] == self.batch or self.has_integers)  # one of each graph
        if isinstance(t, Tensor) and fits and not t.is_floating_point() and t.shape[1]:
            return [replace(self, target=column) for column in t.unbind(1)]
        return [self]

    def apply(self, function: Callable[..., Any], points: list[Tensor]) -> Any:
        """What `function` returns for the arguments of the call with `points` in place of the explained inputs."""
        remaining = iter(points)
        values = [next(remaining) if i < self.count and x.is_floating_point() else x for i, x in enumerate(self.values)]
        args, kwargs = filled(self.skeleton, values)
        return function(*args, *values[self.count :], **kwargs, **self.kwargs)

    def pieces(self, batch_size: int | None) -> Iterator[Call]:
        """The call cut along the batch, into calls of at most `batch_size` samples."""
        if batch_size is not None and not (isinstance(batch_size, int) and batch_size >= 1):
            raise ValueError(f"batch_size is a whole number of at least 1, or None, got {batch_size!r}")
        if batch_size is None or batch_size >= self.batch:
            yield self
            return
        for start in range(0, self.batch, batch_size):
            yield self.mapped(operator.itemgetter(slice(start, start + batch_size)))

    def mapped(self, change: Callable[[Any], Any]) -> Call:
        """The call with `change` applied to whatever goes with the samples: inputs, targets and bounds that have the batch on
        axis 0, and the tensors of arguments that are `samplewise`."""

        def changed(value: Any) -> Any:
            return change(value) if self.has_batch(value) else value

        def along(key: Key, value: Any) -> Any:
            return rebuilt(value, changed) if key in self.samplewise else value

        target = change(self.target) if isinstance(self.target, list) else changed(self.target)
        target = target.mapped(changed) if isinstance(target, Direction) else target
        values = [changed(value) if i < self.count else along(i, value) for i, value in enumerate(self.values)]
        kwargs = {name: along(name, value) for name, value in self.kwargs.items()}
        rank = max((x.dim() for x in self.explained), default=0)
        bounds = tuple(changed(b) if isinstance(b, Tensor) and b.dim() == rank else b for b in self.bounds)
        return replace(self, values=values, kwargs=kwargs, target=target, bounds=bounds)

    # -- arguments beside the inputs

    def has_batch(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == self.batch

    def argument(self, key: Key) -> Any:
        return self.kwargs[key] if isinstance(key, str) else self.values[key]

    def as_long_as_the_batch(self) -> list[Key]:
        """The keys of the arguments beside the inputs that have a tensor whose axis 0 is as long as the batch."""
        keys: list[Key] = [*range(self.count, len(self.values)), *self.kwargs]
        return [key for key in keys if any(map(self.has_batch, tensors_of(self.argument(key))))]

    def parameters(self, function: Callable[..., Any]) -> dict[Key, str]:
        """The parameter of `function` that each argument is passed for, or its name among `**kwargs`; `*args` are left out."""

        def first(value: Any) -> Any:
            slots: list[int] = []
            rebuilt(value, lambda leaf: slots.append(leaf.index) if isinstance(leaf, Slot) else None)
            return slots[0] if slots else None

        args, kwargs = self.skeleton
        keys = [*map(first, args), *range(self.count, len(self.values))]
        named = {**{name: first(value) for name, value in kwargs.items()}, **{name: name for name in self.kwargs}}
        bound = dict(inspect.signature(function).bind(*keys, **named).arguments)
        for values in [values for values in bound.values() if isinstance(values, dict)]:
            bound |= values
        return {key: parameter for parameter, key in bound.items() if isinstance(key, Key)}
