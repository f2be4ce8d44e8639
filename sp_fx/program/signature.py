"""The signature of a program: everything that a caller of its graph must know, and the checks and conversions that need no more.

A program that was compiled here has it from the explainer, one that was loaded has it from the package's manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..containers import filled, type_of
from ..methods.ascent import Ascent
from ..targets import as_target, primary

Run = Callable[..., Sequence[Tensor]]  # a compiled graph: from its tensors to its results


@dataclass(frozen=True, eq=False)
class Signature:
    """How a program is called, and what it returns.

    Attributes:
        method, arguments: "pullback", "double_pullback" or "ascend", and all its arguments with their defaults.
        target: "class", for programs called with class numbers [B], or "direction", with a tensor shaped like the output.
        target_dtype: of the tensor that the graph takes as its target.
        output_dtype: of the output that is explained; None of a package of before, which does not say.
        ascent: the rule of an ascent, else None.
        tolerance: the relative L2 distance from the eager explainer that is allowed.
        single: whether the program is called with one tensor, not with a tuple.
        shapes, dtypes: of one sample of each input.
        rows: for each input, how many rows the embedding has that it is an index into; None for an input that is no index.
        device: of the inputs.
        batch, dynamic_batch: the batch size of the example, and whether others will do.
        skeleton, constants, slots: the model's output, with a numbered `Slot` in place of each leaf; the leaves that are no
            tensors; and the numbers of those that are.
        output_shape: of one sample of the output that is explained.
        probabilities: what makes probabilities of it: "softmax", or "none" where the model ends with a sigmoid of its own; of a
            package also "sigmoid" (`models.classes.probabilities`).
    """

    method: str
    arguments: dict[str, Any]
    target: str
    target_dtype: torch.dtype
    output_dtype: torch.dtype | None
    ascent: Ascent | None
    tolerance: float
    single: bool
    shapes: list[torch.Size]
    dtypes: list[torch.dtype]
    rows: list[int | None]
    device: torch.device
    batch: int
    dynamic_batch: bool
    skeleton: Any
    constants: list[Any]
    slots: list[int]
    output_shape: torch.Size
    probabilities: str = "softmax"

    @property
    def explained(self) -> list[int]:
        """The positions of the floating inputs, each of which has a map."""
        return [i for i, dtype in enumerate(self.dtypes) if dtype.is_floating_point]

    @property
    def looped(self) -> bool:
        """Whether the graph is one step of an ascent, round which the program loops."""
        return self.ascent is not None and not self.arguments["unrolled"]

    # -- what comes in

    def check(self, inputs: list[Tensor]) -> None:
        """Raises ValueError or IndexError for inputs that the program was not made for; the message says what it was made for."""
        layout = [(x.shape[1:], x.dtype, x.device) for x in inputs]
        if layout != [(shape, dtype, self.device) for shape, dtype in zip(self.shapes, self.dtypes)]:
            made = ", ".join(f"{dtype} {['B', *shape]}" for shape, dtype in zip(self.shapes, self.dtypes)).replace("'", "")
            forgotten = [x.shape for x in inputs] == self.shapes
            remedy = "the batch axis was forgotten: pass x[None], a batch of one" if forgotten else "compile another for these"
            raise ValueError(
                f"this program was made for {made} on {self.device}; got {described(inputs)} on {inputs[0].device}: {remedy}"
            )
        batches = {x.shape[0] for x in inputs}
        if len(batches) > 1 or 0 in batches:
            raise ValueError(f"the inputs have one batch size, of at least 1: got {described(inputs)}")
        for x, rows in zip(inputs, self.rows):
            # Compiled code ends the process at a wrong index. Not on a GPU, which would be waited for.
            if rows is not None and x.device.type == "cpu" and not 0 <= int(x.min()) <= int(x.max()) < rows:
                raise IndexError(f"the indices of an input are 0 to {rows - 1}, got {int(x.min())} to {int(x.max())}")
        if not self.dynamic_batch and batches != {self.batch}:
            raise ValueError(
                f"this program was made for a batch of {self.batch} alone (dynamic_batch=False); got {described(inputs)}"
            )

    def target_tensor(self, target: Any, batch: int) -> Tensor:
        """Returns the graph's target for what a caller passed: class numbers [batch], or a direction [batch, *output_shape].

        Raises:
            ValueError, IndexError: another kind of target, or a class that the output does not have.
        """
        target = as_target(target)
        if self.target == "direction":
            expected = (batch, *self.output_shape)
            if not isinstance(target, Tensor) or not target.is_floating_point() or target.shape != expected:
                got = f"{target.dtype} {list(target.shape)}" if isinstance(target, Tensor) else repr(target)
                raise ValueError(f"this program takes a direction, a floating tensor of shape {list(expected)}; got {got}")
            return target.detach().to(self.device, self.target_dtype).contiguous()
        target = -1 if target is None else target
        if isinstance(target, list):
            target = torch.tensor([int(t) for t in target])
        if isinstance(target, int) and not isinstance(target, bool):
            target = torch.full((batch,), target)
        integer = isinstance(target, Tensor) and not (
            target.is_floating_point() or target.is_complex() or target.dtype == torch.bool
        )
        if not integer or target.shape != (batch,):
            got = f"{target.dtype} {list(target.shape)}" if isinstance(target, Tensor) else repr(target)
            raise ValueError(f"a program takes None, an int or an integer tensor [{batch}] as its target; got {got}")
        lowest = -1 if len(self.output_shape) == 1 else 0
        if target.device.type == "cpu":
            # Read as a list: each torch op lets another Python thread run first, which in a busy service takes a millisecond.
            classes = target.tolist()
            if min(classes) < lowest or max(classes) >= self.output_shape[0]:
                note = " (-1: the predicted class)" if lowest else ""
                raise IndexError(f"targets are {lowest} to {self.output_shape[0] - 1}{note}, got {classes}")
        return target.to(self.device, self.target_dtype).contiguous()

    # -- what goes out

    def outputs(self, results: Sequence[Tensor]) -> Any:
        """Returns the model's output, in its containers, from the first results of the graph."""
        leaves = list(self.constants)
        for slot, value in zip(self.slots, results):
            leaves[slot] = value
        return filled(self.skeleton, leaves)

    def maps(self, results: Sequence[Tensor]) -> Any:
        """Returns the maps, in the form of the inputs, from the last results of the graph; None for an integer input."""
        maps: list[Tensor | None] = [None] * len(self.shapes)
        for i, value in zip(self.explained, results[len(self.slots) :]):
            maps[i] = value
        return maps[0] if self.single else tuple(maps)

    def resolved(self, results: Sequence[Tensor], target: Tensor) -> Tensor:
        """Returns `target` with the class that `results` predict in place of -1; a direction as it is."""
        return target if self.target == "direction" else with_predicted(primary(self.outputs(results)), target)


def with_predicted(y: Tensor, classes: Tensor) -> Tensor:
    """Returns `classes` [B] with the predicted class of `y` [B, C] in place of -1; as they are for outputs with further axes."""
    return torch.where(classes < 0, y.argmax(1), classes) if y.dim() == 2 else classes


def positional(inputs: Any) -> list[Tensor]:
    """Returns the inputs as a list; TypeError where they are neither a tensor nor a tuple of tensors."""
    tensors = list(inputs) if isinstance(inputs, tuple) else [inputs]
    for x in tensors:
        if not isinstance(x, Tensor):
            raise TypeError(f"expected a tensor, or a tuple of tensors, as inputs; got {type_of(x)}")
    return tensors


def described(tensors: Sequence[Tensor]) -> str:
    """Returns dtypes and shapes as text, such as `torch.float32 [3, 3, 32, 32], torch.int64 [3]`."""
    return ", ".join(f"{x.dtype} {list(x.shape)}" for x in tensors)
