"""Targets: which direction of the output is pulled back.

Beside the plain forms (`FORMS`) there are directions that depend on the output: `score`, `margin`, `log_probability`,
`fisher_rao`, `neuron`, `channel`, `free`. Each returns a `Direction`, to be passed as the target of any method. At an output `y`
[B, C], or [B, C, ...] with the classes on axis 1, it is a tensor `u`, shaped like `y`, which is pulled back as a constant.
Directions add, subtract and scale: `log_probability(3) - 0.5 * log_probability(5)`, `sum(directions) / 3`. Their class is an int,
a tensor [B], or None for the predicted one; an ascent predicts anew at every step, so name the class there. What does more with
a direction is a callable: `lambda out: weights * margin(3)(out)`.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..containers import is_array, primary

Class = int | Tensor | Sequence[int] | None
Target = int | Sequence | Tensor | Callable[[Any], Tensor] | None

FORMS = (
    "None (the predicted class), an int, an integer tensor [B] or [B, T] or lists or an array of such, a tuple of indices, a "
    "floating tensor shaped like the output (a direction), or a callable of the output"
)


def as_target(target: Any) -> Target:
    """Returns a target in the forms that this file reads: arrays of NumPy, and lists of T classes for each sample, are
    tensors.

    Raises:
        TypeError: lists or arrays of what is no number.
        ValueError: lists of different lengths.
    """
    if is_array(target):
        target = torch.as_tensor(target) if target.ndim else target.item()
    elif isinstance(target, list) and target and all(isinstance(row, list) for row in target):
        if len({len(row) for row in target}) > 1:
            raise ValueError(f"got lists of {sorted({len(row) for row in target})} classes: expected as many for each sample")
        target = torch.tensor([[_int(t) for t in row] for row in target], dtype=torch.long)
    return target


def looks_one_hot(target: Any) -> bool:
    """Whether each row of integers [B, T] is a 1 among zeros: of three and more, since [0, 1] may be the two classes 0 and 1."""
    if not isinstance(target, Tensor) or target.is_floating_point() or target.is_complex():
        return False
    if target.dim() != 2 or target.shape[1] < 3 or not len(target):
        return False
    return bool(((target == 1).sum(1) == 1).all() and ((target != 0).sum(1) == 1).all())


def refuse_one_hot(target: Any, y: Tensor) -> None:
    """Raises ValueError for one-hot rows of integers, as many as `y` has classes: whole numbers are class numbers here. Rows of
    another length are classes, as [0, 1, 0] is where somebody asks for two by name and for the predicted one."""
    if looks_one_hot(target) and y.dim() == 2 and target.shape[1] == y.shape[1]:
        raise ValueError(
            f"got the one-hot target {_shape(target)} of {target.dtype}, and whole numbers are class numbers: pass the classes, "
            "target.argmax(1), or the direction, target.float()"
        )


def seed(output: Any, target: Target) -> tuple[Tensor, Tensor]:
    """Returns the tensor to differentiate, and the cotangent `u` to start from: shaped like it, or [T, *its shape] for targets
    [B, T].

    Integer targets index the axes after the batch axis; an axis that is left over is summed, as Captum does.

    Raises:
        ValueError, IndexError, TypeError: a target that does not fit the output; the message names both.
    """
    if callable(target):
        return _scored(target(output))
    y = primary(output)
    if not y.is_floating_point():
        raise TypeError(f"the output is {y.dtype}: only floating outputs have a direction to pull back")
    target = resolve(y, target)
    if isinstance(target, Tensor) and (target.is_floating_point() or target.is_complex()):
        if target.shape != y.shape or target.is_complex():
            raise ValueError(
                f"a floating target is a direction of the output and has its shape and kind: expected {_shape(y)}, "
                f"got {_shape(target)} of {target.dtype}"
            )
        if bool(target.isnan().any()):
            raise ValueError(f"the direction of shape {_shape(target)} has NaN in it")
        return y, target.to(y)
    indices = indices_of(target, y)  # [T or 1, B, axes]
    u = torch.zeros((indices.shape[0], *y.shape), dtype=y.dtype, device=y.device)
    which, sample = torch.meshgrid(*(torch.arange(n, device=y.device) for n in indices.shape[:2]), indexing="ij")
    u[(which, sample, *indices.to(y.device).unbind(-1))] = 1
    return y, u if isinstance(target, Tensor) and target.dim() == 2 else u[0]


def resolve(output: Any, target: Target, one_each: bool = False) -> Target:
    """Returns the target, or the predicted class where it is None: later forwards keep the class of the first. `one_each`:
    whether an output of one axis is known to have one number for each sample, which then is what is explained."""
    if target is not None:
        return target
    y = primary(output)
    if y.dim() == 1 and one_each:
        return ()
    if y.dim() != 2:
        forgotten = "was the input's batch axis forgotten? Else " if y.dim() == 1 else ""
        raise ValueError(f"no target given, and an output of shape {_shape(y)} has no single class axis: {forgotten}pass {FORMS}")
    predicted = y.detach().argmax(1)
    if bool(y.detach().gather(1, predicted[:, None]).isnan().any()):  # argmax takes NaN for the largest
        raise ValueError(f"no target given, and no class is predicted: the output of shape {_shape(y)} has NaN in it")
    return predicted


def only_output(output: Any) -> Tensor:
    """Returns the model's one number for each sample, which is what Captum explains where no target is passed.

    Raises:
        AssertionError: it has more than one, in Captum's words.
    """
    y = primary(output)
    assert y[:1].numel() <= 1, "Target not provided when necessary, cannot take gradient with respect to multiple outputs."
    return y


def indices_of(target: Any, y: Tensor) -> Tensor:
    """Returns integer targets as indices into `y`, [T or 1, B, axes]; an error says which of them the output does not have."""
    batch = y.shape[0] if y.dim() else 0
    refuse_one_hot(target, y)
    if isinstance(target, list) and target and all(isinstance(t, tuple) for t in target):
        index = torch.tensor([[_int(i) for i in t] for t in target])[None]
    elif isinstance(target, list):
        target = torch.tensor([_int(t) for t in target], dtype=torch.long)
    if isinstance(target, tuple):
        index = torch.tensor([_int(i) for i in target]).expand(1, batch, len(target))
    elif isinstance(target, Tensor):
        if target.dtype == torch.bool or target.is_floating_point() or target.is_complex():
            raise TypeError(f"got a tensor of {target.dtype} as the target; expected {FORMS}")
        if target.dim() == 0:
            index = target.expand(1, batch, 1)
        elif target.dim() in (1, 2) and target.shape[0] == batch:
            index = (target[None] if target.dim() == 1 else target.T)[..., None]
        else:
            row = "; several classes of one sample are a row, as in [[1, 2, 3]]" if target.dim() == 1 else ""
            raise ValueError(f"a target tensor has shape [{batch}] or [{batch}, T] for this batch, got {_shape(target)}{row}")
    elif not isinstance(target, list):
        index = torch.tensor([[[_int(target)]]]).expand(1, batch, 1)
    index = index.long()
    if index.shape[1] != batch:
        raise ValueError(f"{index.shape[1]} targets for a batch of {batch}")
    if index.shape[-1] > y.dim() - 1:
        if y.dim() == 1:
            one_each = "where it is one number for each sample, it takes no target; or was the input's batch axis forgotten?"
            raise ValueError(f"an output of shape {_shape(y)} has no class axis: {one_each}")
        raise ValueError(f"the target has {index.shape[-1]} indices: too many for an output of shape {_shape(y)}, batch first")
    for axis, size in enumerate(y.shape[1 : 1 + index.shape[-1]]):
        wrong = index[..., axis][(index[..., axis] < 0) | (index[..., axis] >= size)]
        if wrong.numel():
            raise IndexError(f"target {wrong[0].item()} is outside 0 to {size - 1}, axis {axis + 1} of the output {_shape(y)}")
    return index


def _scored(score: Any) -> tuple[Tensor, Tensor]:
    """Returns what a target callable returned, checked, and the cotangent of its sum."""
    if not isinstance(score, Tensor) or not score.is_floating_point():
        got = f"{score.dtype} tensor" if isinstance(score, Tensor) else type(score).__name__
        raise TypeError(f"the target callable returned a {got}; expected a floating tensor computed from the output")
    if not score.requires_grad:
        raise ValueError("what the target callable returned does not depend on the output")
    return score, torch.ones_like(score)


def _int(value: Any) -> int:
    """A class number or an index."""
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"got the target {value!r}; expected {FORMS}")


def _shape(t: Tensor) -> str:
    return str(list(t.shape))


# -- directions that depend on the output -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Direction:
    """A target: `of(y)` is the direction at the output `y`, and what is explained is its inner product with `y`.

    `part` makes the direction for a part of the batch: `part(change)`, where `change` takes that part of a tensor [B, ...], such
    as the classes of `score(classes)`. None where the direction is the same for every sample.
    """

    of: Callable[[Tensor], Tensor] = field(repr=False)
    part: Callable[[Callable[[Any], Any]], Direction] | None = field(default=None, repr=False)

    __array_ufunc__ = None  # an array of NumPy would multiply each of its numbers with the direction

    def mapped(self, change: Callable[[Any], Any]) -> Direction:
        return self if self.part is None else self.part(change)

    def __call__(self, output: Any) -> Tensor:
        y = primary(output)
        return (self.of(y.detach()).detach() * y).flatten(1).sum(1)

    def __add__(self, other: Direction) -> Direction:
        if isinstance(other, int) and other == 0:  # with which `sum(directions)` begins
            return self
        if not isinstance(other, Direction):
            raise _no_arithmetic("and", other)
        return Direction(lambda y: self.of(y) + other.of(y), lambda change: self.mapped(change) + other.mapped(change))

    __radd__ = __add__

    def __sub__(self, other: Direction) -> Direction:
        return self + (-other if isinstance(other, Direction) else other)

    def __rsub__(self, other: Any) -> Direction:
        return -self + other

    def __mul__(self, factor: float) -> Direction:
        number = _number("times", factor)
        return Direction(lambda y: number * self.of(y), lambda change: number * self.mapped(change))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Direction:
        if (number := _number("divided by", divisor)) == 0:
            raise _no_arithmetic("divided by", divisor)
        return self * (1.0 / number)

    def __neg__(self) -> Direction:
        return -1.0 * self


def _number(operation: str, value: Any) -> float:
    """A number that a direction is multiplied or divided by; it may be a tensor without axes."""
    number = value.item() if isinstance(value, Tensor) and value.dim() == 0 else value
    if not isinstance(number, numbers.Real) or not math.isfinite(number):
        raise _no_arithmetic(operation, value)
    return float(number)


def _no_arithmetic(operation: str, value: Any) -> TypeError:
    """The error of "a direction times a function", say."""
    got = repr(value) if isinstance(value, numbers.Number) else f"a {type(value).__name__}"
    return TypeError(
        f"got a direction {operation} {got}; directions add and subtract, have a negative, and are multiplied and divided by "
        "finite numbers. Whatever else goes into a callable of the output, such as lambda out: weights * direction(out)"
    )


def score(target: Class = None) -> Direction:
    """The score of a class: `e_c`. What an integer target means."""
    target = classes_of(target)
    return Direction(lambda y: chosen(y, target), lambda change: score(change(target)))


def margin(target: Class = None, rivals: int | None = None) -> Direction:
    """A class's score less those of its current rivals, each weighed by its probability among them: `e_c - sum_j w_j e_j`.

    The gradient of `y_c - logsumexp_{j != c} y_j`, which is the log-odds of the class, log p_c / (1 - p_c). `rivals` keeps only
    that many of the likeliest: 1 is the plain margin to the runner-up (Crammer and Singer, JMLR 2, 2001).
    """
    target = classes_of(target)

    def of(y: Tensor) -> Tensor:
        own = chosen(y, target)
        if y.shape[1] < 2:
            raise ValueError(f"a margin needs a rival: the output {list(y.shape)} has one class")
        others = y.masked_fill(own > 0, -torch.inf)
        if rivals is not None:
            if isinstance(rivals, bool) or not isinstance(rivals, int) or not 1 <= rivals < y.shape[1]:
                raise ValueError(f"rivals is None or from 1 to {y.shape[1] - 1} for {y.shape[1]} classes, got {rivals!r}")
            others = others.masked_fill(others < others.topk(rivals, 1).values.amin(1, keepdim=True), -torch.inf)
        return own - others.softmax(1)

    return Direction(of, lambda change: margin(change(target), rivals))


def log_probability(target: Class = None) -> Direction:
    """The log-probability of a class: `e_c - p`, the gradient of `log softmax(y)_c`."""
    target = classes_of(target)
    return Direction(lambda y: chosen(y, target) - y.softmax(1), lambda change: log_probability(change(target)))


def fisher_rao(target: Class = None, damping: float = 1e-3) -> Direction:
    """The steepest way to a class in the Fisher-Rao metric of the output distribution, damped and centred.

    The natural gradient `(F + d I)^-1 (e_c - p)` of `log p_c`, with the Fisher matrix `F = diag(p) - p p^T` of the logits (Amari,
    "Natural gradient works efficiently in learning", Neural Computation 10, 1998). `F` ignores a constant added to all logits, so
    the mean over classes is taken out. Large `damping` gives the direction of `log_probability`, small one `e_c / p_c`, centred.
    """
    if not isinstance(damping, int | float) or not damping > 0:
        raise ValueError(f"damping is above 0, got {damping!r}: the Fisher matrix is singular")
    target = classes_of(target)

    def of(y: Tensor) -> Tensor:
        p = y.double().softmax(1)
        diagonal = p + damping
        solved = (chosen(y, target).double() - p) / diagonal
        # Sherman and Morrison; 1 - sum p^2 / (p + d) is written so that it does not cancel.
        left = (p * solved).sum(1, keepdim=True) / (damping * p / diagonal).sum(1, keepdim=True)
        u = solved + p / diagonal * left
        return (u - u.mean(1, keepdim=True)).to(y.dtype)

    return Direction(of, lambda change: fisher_rao(change(target), damping))


def neuron(*index: int) -> Direction:
    """One number of the output at `index`, all axes after the batch: a neuron of the layer that `transform(output=...)` names."""
    return Direction(lambda y: at(y, index, full=True))


def channel(index: int) -> Direction:
    """The mean over places of channel `index`, axis 1: of a layer's output, what feature visualisation calls a channel."""

    return Direction(lambda y: at(y, (index,), full=False) / max(math.prod(y.shape[2:]), 1))


def free(u: Tensor) -> Direction:
    """The direction `u`, a tensor shaped like one sample's output, for every sample."""

    u = torch.as_tensor(u) if is_array(u) else u
    if not isinstance(u, Tensor):
        raise TypeError(f"a free direction is a tensor shaped like one sample's output, got a {type(u).__name__}")
    if bool(u.isnan().any()):
        raise ValueError(f"the free direction of shape {list(u.shape)} has NaN in it")

    def of(y: Tensor) -> Tensor:
        if u.shape != y.shape[1:]:
            raise ValueError(f"a free direction is shaped like one sample's output {list(y.shape[1:])}, got {list(u.shape)}")
        return u.to(y).expand_as(y)

    return Direction(of)


def classes_of(target: Any) -> Any:
    """Returns the classes of a direction: None, an int, or a tensor [B], of a list or an array too."""
    target = as_target(target)
    return torch.tensor([_int(t) for t in target]) if isinstance(target, list) else target


def chosen(y: Tensor, target: Class) -> Tensor:
    """Returns `e_c` for the class of each sample, shaped like `y` [B, C, ...]."""
    if y.dim() < 2 or not y.is_floating_point():
        hint = "; one number for each sample takes no target, or a callable such as lambda y: -y" if y.dim() == 1 else ""
        raise ValueError(f"a class direction needs floating outputs [B, C, ...], got {y.dtype} {list(y.shape)}{hint}")
    if target is None:
        if y.dim() != 2:
            raise ValueError(f"an output of shape {list(y.shape)} has no single predicted class: name one")
        return torch.zeros_like(y).scatter_(1, y.argmax(1, keepdim=True), 1)
    index = indices_of(target, y)
    if index.shape[0] != 1:
        raise ValueError(f"a direction has one class a sample, got {index.shape[0]}: call once for each")
    u = torch.zeros_like(y)
    u[torch.arange(len(y), device=y.device), index[0, :, 0].to(y.device)] = 1
    return u


def at(y: Tensor, index: tuple[int, ...], full: bool) -> Tensor:
    """Returns 1 at `index` of each sample's output and 0 elsewhere, shaped like `y`; `full`: the index must have all its axes."""
    if full and len(index) != y.dim() - 1:
        raise ValueError(f"a neuron of an output {list(y.shape)} has {y.dim() - 1} indices, got {len(index)}")
    where = indices_of(index, y)[0, 0].tolist()
    u = torch.zeros_like(y)
    u[(slice(None), *where)] = 1
    return u
