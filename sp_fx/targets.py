"""Targets: which direction of the output is pulled back."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Target = int | Sequence | Tensor | Callable[[Any], Tensor] | None
FORMS = (
    "None (the predicted class), an int, an integer tensor [B] or [B, T], a tuple of indices, a floating tensor shaped like the "
    "output (a direction), or a callable of the output"
)


def primary(output: Any) -> Tensor:
    """The tensor that is explained: the output itself, its only tensor, or its `logits`.

    Raises:
        TypeError: there are several tensors and none is called `logits`.
    """
    if isinstance(output, Tensor):
        return output
    named = dict(output) if isinstance(output, dict) else getattr(output, "__dict__", {})
    if not named and isinstance(output, Sequence):
        named = {str(i): value for i, value in enumerate(output)}
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    if "logits" in tensors:
        return tensors["logits"]
    if len(tensors) == 1:
        return next(iter(tensors.values()))
    raise TypeError(
        f"the model returns a {type(output).__name__} with {'the tensors ' + ', '.join(tensors) if tensors else 'no tensor'}: "
        "pass a callable as the target that picks one, such as lambda out: out[0][:, 3]"
    )


def seed(output: Any, target: Target) -> tuple[Tensor, Tensor]:
    """The tensor to differentiate and the cotangent `u` to start from, shaped like it, or [T, *its shape] for targets [B, T].

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
        return y, target.to(y)
    indices = indices_of(target, y)  # [T or 1, B, axes]
    u = torch.zeros((indices.shape[0], *y.shape), dtype=y.dtype, device=y.device)
    which, sample = torch.meshgrid(*(torch.arange(n, device=y.device) for n in indices.shape[:2]), indexing="ij")
    u[(which, sample, *indices.to(y.device).unbind(-1))] = 1
    return y, u if isinstance(target, Tensor) and target.dim() == 2 else u[0]


def resolve(output: Any, target: Target) -> Target:
    """The predicted class in place of None, so that what follows stays with the class of the first forward."""
    if target is not None:
        return target
    y = primary(output)
    if y.dim() != 2:
        raise ValueError(f"no target given, and an output of shape {_shape(y)} has no single class axis: pass {FORMS}")
    return y.detach().argmax(1)


def only_output(output: Any) -> Tensor:
    """Captum's meaning of no target: the model's one number for each sample.

    Raises:
        AssertionError: it has more than one, in Captum's words.
    """
    y = primary(output)
    assert y[:1].numel() <= 1, "Target not provided when necessary, cannot take gradient with respect to multiple outputs."
    return y


def indices_of(target: Any, y: Tensor) -> Tensor:
    """Integer targets as [T or 1, B, axes], checked against the output `y`."""
    batch = y.shape[0] if y.dim() else 0
    if isinstance(target, list) and target and all(isinstance(t, tuple) for t in target):
        index = torch.tensor([[_int(i) for i in t] for t in target])[None]
    elif isinstance(target, list):
        target = torch.tensor([_int(t) for t in target])
    if isinstance(target, tuple):
        index = torch.tensor([_int(i) for i in target]).expand(1, batch, len(target))
    elif isinstance(target, Tensor):
        if target.dtype == torch.bool:
            raise TypeError(f"got a bool target; expected {FORMS}")
        if target.dim() == 0:
            index = target.expand(1, batch, 1)
        elif target.dim() in (1, 2) and target.shape[0] == batch:
            index = target.reshape(batch, -1).T[..., None]
        else:
            raise ValueError(f"a target tensor has shape [{batch}] or [{batch}, T] for this batch, got {_shape(target)}")
    elif not isinstance(target, list):
        index = torch.tensor([[[_int(target)]]]).expand(1, batch, 1)
    index = index.long()
    if index.shape[1] != batch:
        raise ValueError(f"{index.shape[1]} targets for a batch of {batch}")
    if index.shape[-1] > y.dim() - 1:
        raise ValueError(f"the target has {index.shape[-1]} indices: too many for an output of shape {_shape(y)}, batch first")
    for axis, size in enumerate(y.shape[1 : 1 + index.shape[-1]]):
        wrong = index[..., axis][(index[..., axis] < 0) | (index[..., axis] >= size)]
        if wrong.numel():
            raise IndexError(f"target {wrong[0].item()} is outside 0 to {size - 1}, axis {axis + 1} of the output {_shape(y)}")
    return index


def _scored(score: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(score, Tensor) or not score.is_floating_point():
        got = f"{score.dtype} tensor" if isinstance(score, Tensor) else type(score).__name__
        raise TypeError(f"the target callable returned a {got}; expected a floating tensor computed from the output")
    if not score.requires_grad:
        raise ValueError("what the target callable returned does not depend on the output")
    return score, torch.ones_like(score)


def _int(value: Any) -> int:
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"got the target {value!r}; expected {FORMS}")


def _shape(t: Tensor) -> str:
    return str(list(t.shape))
