"""One call of a method: what its caller asks, and the inputs that follow from it, cut along the batch."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..containers import rebuilt, tensors_of
from ..targets import Direction, Target

Inputs = Tensor | tuple[Tensor, ...] | Mapping[str, Any]
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
    wrt: str | None = None
    batch_size: int | None = None
    extra: tuple[Any, ...] = ()
    bounds: tuple[Any, ...] = ()
    samplewise: frozenset[Key] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Of a mapping, the names of its tensors; of other inputs none."""
        inputs = self.inputs if isinstance(self.inputs, Mapping) else {}
        return tuple(name for name, value in inputs.items() if isinstance(value, Tensor))

    @property
    def tensors(self) -> tuple[Any, ...]:
        """The inputs without their container; of a mapping, its tensors."""
        if isinstance(self.inputs, Mapping):
            return tuple(self.inputs[name] for name in self.names)
        return self.inputs if isinstance(self.inputs, tuple) else (self.inputs,)

    def call(self) -> Call:
        """The call that the request stands for.

        Raises:
            TypeError, ValueError: inputs that autograd cannot use, none, or of different batch sizes.
        """
        kwargs, tensors = dict(self.forward_kwargs or {}), self.tensors
        if isinstance(self.inputs, Mapping):
            kwargs |= {name: value for name, value in self.inputs.items() if name not in self.names}
        kwargs = {name: outside_inference(value) for name, value in kwargs.items()}
        values = [*map(usable, tensors), *map(outside_inference, self.extra)]
        return Call(values, len(tensors), kwargs, self.target, self.names, self.bounds, self.samplewise or frozenset())

    def contained(self, maps: list[Tensor]) -> Any:
        """The maps of the floating inputs, in order, in the container that the inputs came in, with None for the others."""
        remaining = iter(maps)
        by_input = [next(remaining) if x.is_floating_point() else None for x in self.tensors]
        if isinstance(self.inputs, Mapping):
            return dict(zip(self.names, by_input))
        return tuple(by_input) if isinstance(self.inputs, tuple) else by_input[0]


def are_named(forward: Callable[..., Any], inputs: Mapping[str, Any]) -> bool:
    """Whether the keys of `inputs` are parameters of a forward: else the mapping itself is an argument."""
    parameters = inspect.signature(forward).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return takes_any or all(name in parameters for name in inputs)


def usable(x: Any) -> Tensor:
    """The input as autograd can use it."""
    if not isinstance(x, Tensor):
        raise TypeError(f"expected a tensor, or a tuple of tensors or a mapping of them, as inputs; got {type(x).__name__}")
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

    Inputs that have `names` are passed by them.
    """

    values: list[Any]
    count: int
    kwargs: dict[str, Any]
    target: Target
    names: tuple[str, ...] = ()
    bounds: tuple[Any, ...] = ()  # of an ascent: they broadcast to an input, and may have the batch on their axis 0
    samplewise: frozenset[Key] = frozenset()  # arguments beside the inputs that go with the samples

    def __post_init__(self) -> None:
        if not self.inputs:
            raise ValueError("expected at least one input, got an empty tuple")
        batches = {x.shape[0] for x in self.explained}
        if len(batches) > 1:
            raise ValueError(f"the inputs have different batch sizes: {sorted(batches)}")

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
        if isinstance(t, Tensor) and t.dim() == 2 and not t.is_floating_point() and t.shape[0] == self.batch and t.shape[1]:
            return [replace(self, target=column) for column in t.unbind(1)]
        return [self]

    def apply(self, function: Callable[..., Any], points: list[Tensor]) -> Any:
        """What `function` returns for the arguments of the call with `points` in place of the explained inputs."""
        remaining = iter(points)
        values = [next(remaining) if i < self.count and x.is_floating_point() else x for i, x in enumerate(self.values)]
        return function(*values[len(self.names) :], **dict(zip(self.names, values)), **self.kwargs)

    def pieces(self, batch_size: int | None) -> Iterator[Call]:
        """The call cut along the batch, into calls of at most `batch_size` samples."""
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size is at least 1, or None, got {batch_size!r}")
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
        """The parameter of `function` that each argument is passed for; `*args` and `**kwargs` are left out."""
        named: dict[str, Key] = {**dict(zip(self.names, range(len(self.names)))), **{name: name for name in self.kwargs}}
        bound = inspect.signature(function).bind(*range(len(self.names), len(self.values)), **named).arguments
        return {key: parameter for parameter, key in bound.items() if isinstance(key, Key)}
