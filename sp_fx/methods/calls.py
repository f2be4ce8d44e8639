"""One call of an explainer: its inputs, which of them are explained, and how they are cut and repeated along the batch."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..targets import Direction, Target


def usable(x: Any) -> Tensor:
    """The input as autograd can use it."""
    if not isinstance(x, Tensor):
        raise TypeError(f"expected a tensor, or a tuple of tensors or a mapping of them, as inputs; got {type(x).__name__}")
    if x.is_complex():
        raise TypeError(f"cannot explain a complex input ({x.dtype}): pass its real and imaginary parts")
    if x.dim() == 0:
        raise ValueError("an input needs a batch axis, got a tensor of no axes")
    return x.clone() if x.is_inference() else x


@dataclass
class Call:
    """`values` are the positional arguments, of which the first `inputs` are inputs; floating inputs are explained.

    Inputs that have `names` are passed by them.
    """

    values: list[Any]
    inputs: int
    kwargs: dict[str, Any]
    target: Target
    names: tuple[str, ...] = ()
    along: tuple[Any, ...] = ()  # what broadcasts to an input, and may have the batch on its axis 0

    def __post_init__(self) -> None:
        given = self.values[: self.inputs]
        if not given:
            raise ValueError("expected at least one input, got an empty tuple")
        batches = {x.shape[0] for x in self.explained}
        if len(batches) > 1:
            raise ValueError(f"the inputs have different batch sizes: {sorted(batches)}")

    @property
    def explained(self) -> list[Tensor]:
        return [x for x in self.values[: self.inputs] if x.is_floating_point()]

    @property
    def batch(self) -> int:
        return (self.explained or self.values)[0].shape[0]

    def check(self, devices: set[torch.device], explains: bool) -> None:
        """Raise where the inputs are not fit for a model on `devices`, or, where it `explains` them, have nothing to explain."""
        given = self.values[: self.inputs]
        if explains and not self.explained:
            dtypes = ", ".join(str(x.dtype) for x in given)
            raise TypeError(
                f"nothing to explain: the inputs are {dtypes}; expected a floating one. Whole numbers have no gradient: make "
                "pictures floating, and explain token ids with respect to their embedding, wrt='its name'"
            )
        for x in given:
            if devices and x.device not in devices:
                raise ValueError(f"the input is on {x.device} and the model on {', '.join(map(str, devices))}: move one of them")
            if x.is_floating_point() and bool(torch.isnan(x).any()):
                raise ValueError(f"the input of shape {list(x.shape)} has NaN in it")

    @property
    def targets_each(self) -> int | None:
        """T for targets [B, T], else None."""
        t = self.target
        if isinstance(t, Tensor) and t.dim() == 2 and not t.is_floating_point() and t.shape[0] == self.batch:
            return t.shape[1]
        return None

    def of(self, module: Callable[..., Any], points: list[Tensor]) -> Any:
        """What `module` returns with `points` in place of the explained inputs."""
        rest = iter(points)
        values = [next(rest) if i < self.inputs and x.is_floating_point() else x for i, x in enumerate(self.values)]
        return module(*values[len(self.names) :], **dict(zip(self.names, values)), **self.kwargs)

    def pieces(self, batch_size: int | None) -> Iterator[Call]:
        """The call cut along the batch."""
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size is at least 1, or None, got {batch_size!r}")
        if batch_size is None or batch_size >= self.batch:
            yield self
            return
        for start in range(0, self.batch, batch_size):
            yield self.mapped(operator.itemgetter(slice(start, start + batch_size)))

    def repeated(self, times: int) -> Call:
        """Each sample `times` times in a row, one for each of its targets."""
        flat = replace(self, target=None).mapped(lambda t: t.repeat_interleave(times, 0))
        return replace(flat, target=self.target.reshape(-1))  # type: ignore[union-attr]

    def mapped(self, change: Callable[[Any], Any]) -> Call:
        """`change` applied to whatever has the batch on axis 0."""

        def each(value: Any) -> Any:
            has_batch = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == self.batch
            return change(value) if has_batch else value

        target = change(self.target) if isinstance(self.target, list) else each(self.target)
        target = target.mapped(each) if isinstance(target, Direction) else target
        kwargs = {name: each(value) for name, value in self.kwargs.items()}
        rank = max((x.dim() for x in self.explained), default=0)
        along = tuple(each(b) if isinstance(b, Tensor) and b.dim() == rank else b for b in self.along)
        return replace(self, values=[each(v) for v in self.values], kwargs=kwargs, target=target, along=along)
