"""The signature of a program: everything that a caller of its graph must know, and the checks and conversions that need no more.

A program that was compiled here has it from the explainer, one that was loaded has it from the package's manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..containers import filled, refuse_nested, type_of
from ..methods.ascent import Ascent
from ..targets import as_target, primary

Run = Callable[..., Sequence[Tensor]]  # a compiled graph: from its tensors to its results
Bounds = tuple[int, int | None]  # the least number that a length may be, and the largest where there is one
Shape = Sequence[int | str]  # of one sample: sizes, and the names of lengths that may be any


@dataclass(frozen=True, eq=False)
class Signature:
    """How a program is called, and what it returns.

    Attributes:
        method, arguments: "pullback", "double_pullback", "ascend" or "tokens", and all its arguments with their defaults.
        target: "class", for programs called with class numbers [B], or "direction", with a tensor shaped like the output.
        target_dtype: of the tensor that the graph takes as its target.
        output_dtype: of the output that is explained; None of a package of before, which does not say.
        ascent: the rule of an ascent, else None.
        tolerance: the relative L2 distance from the eager explainer that is allowed.
        single: whether the program is called with one tensor, not with a tuple or a mapping.
        names: of the inputs, where the program is called with a mapping of them; else None.
        shapes, dtypes: of one sample of each input. A size that varies is a name, such as "length"; it is one number for all that
            have it.
        explained: the positions of the inputs that have a map.
        rows: for each input, how many rows the embedding has that it is an index into; None for an input that is no index.
        device: of the inputs.
        batch, dynamic_batch: the batch size of the example, and whether others will do.
        skeleton, constants, slots: the model's output, with a numbered `Slot` in place of each leaf; the leaves that are no
            tensors; and the numbers of those that are.
        output_shape: of one sample of what is explained, as `shapes`.
        chosen: whether a callable takes what is explained from the output; else that is its only tensor, or its `logits`.
        bounds: the least number that a length may be, and the largest or None, by its name.
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
    names: list[str] | None
    shapes: list[Shape]
    dtypes: list[torch.dtype]
    rows: list[int | None]
    explained: list[int]
    device: torch.device
    batch: int
    dynamic_batch: bool
    skeleton: Any
    constants: list[Any]
    slots: list[int]
    output_shape: Shape
    probabilities: str = "softmax"
    bounds: dict[str, Bounds] = field(default_factory=dict)
    chosen: bool = False

    @property
    def looped(self) -> bool:
        """Whether the graph is one step of an ascent, round which the program loops."""
        return self.ascent is not None and not self.arguments["unrolled"]

    @property
    def classes(self) -> int:
        """How many classes there are to choose from."""
        return int(self.output_shape[0])

    # -- what comes in

    def ordered(self, inputs: Any) -> list[Tensor]:
        """Returns the inputs of a call in order; TypeError where they are none of a tensor, a tuple, and a mapping of `names`."""
        if self.names is not None and isinstance(inputs, Mapping):
            if set(inputs) != set(self.names):
                raise TypeError(
                    f"this program takes the inputs {', '.join(self.names)}; got {', '.join(map(str, inputs)) or 'none'}"
                )
            inputs = tuple(inputs[name] for name in self.names)
        return positional(inputs)

    @property
    def lengths(self) -> list[str]:
        """The names of the sizes that vary, beside the batch's."""
        return list(dict.fromkeys(n for shape in self.shapes for n in shape if isinstance(n, str)))

    @property
    def layouts(self) -> list[Shape]:
        """The sizes of the tensors that the graph takes, of all samples: the inputs, the starts of an ascent, the target."""
        batch: int | str = "batch" if self.dynamic_batch else self.batch
        starts = [self.shapes[i] for i in self.explained] if self.looped else []
        aim = self.output_shape if self.target == "direction" else ()
        return [(batch, *shape) for shape in (*self.shapes, *starts, aim)]

    def sizes(self, inputs: Sequence[Tensor]) -> dict[str, int]:
        """Returns the numbers that inputs have where `shapes` have names; those that disagree are left to `check`."""
        pairs = zip(self.shapes, inputs)
        return {name: size for shape, x in pairs for name, size in zip(shape, x.shape[1:]) if isinstance(name, str)}

    def filled(self, shape: Shape, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Returns a shape with numbers in place of its names."""
        return tuple(sizes.get(n, -1) if isinstance(n, str) else n for n in shape)

    def check(self, inputs: list[Tensor]) -> None:
        """Raises ValueError or IndexError for inputs that the program was not made for; the message says what it was made for."""
        sizes = self.sizes(inputs)
        layout = [(tuple(x.shape[1:]), x.dtype, x.device) for x in inputs]
        if layout != [(self.filled(shape, sizes), dtype, self.device) for shape, dtype in zip(self.shapes, self.dtypes)]:
            made = ", ".join(f"{dtype} {['B', *shape]}" for shape, dtype in zip(self.shapes, self.dtypes)).replace("'", "")
            remedy = "compile another for these"
            if [x.dtype for x in inputs] != self.dtypes:
                remedy = "the dtypes are to be those"
            elif len(inputs) == len(self.shapes) and all(fits(x.shape, shape) for x, shape in zip(inputs, self.shapes)):
                remedy = "the batch axis was forgotten: pass x[None], a batch of one"
            elif len(inputs) == len(self.shapes) and all(fits(x.shape[1:], shape) for x, shape in zip(inputs, self.shapes)):
                remedy = "sizes of one name are one number"
            raise ValueError(
                f"this program was made for {made} on {self.device}; got {described(inputs)} on {inputs[0].device}: {remedy}"
            )
        for name, size in sizes.items():
            least, most = self.bounds.get(name, (1, None))
            if size < least or (most is not None and size > most):
                to = " or more" if most is None else f" to {most}"
                raise ValueError(f"this program was made for {name} {least}{to}; got {described(inputs)}")
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

    def target_tensor(self, target: Any, inputs: Sequence[Tensor]) -> Tensor:
        """Returns the graph's target for what a caller passed: class numbers [batch], or a direction [batch, *output_shape]. None
        is the predicted class, and 1 for each sample where the output is one number a sample.

        Raises:
            ValueError, IndexError: another kind of target, or a class that the output does not have.
        """
        target, batch = as_target(target), inputs[0].shape[0]
        if self.target == "direction":
            expected = (batch, *self.filled(self.output_shape, self.sizes(inputs)))
            if target is None and not self.output_shape:
                return torch.ones(expected, dtype=self.target_dtype, device=self.device)
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
            count = self.classes
            if min(classes) < lowest or max(classes) >= count:
                note = " (-1: the predicted class)" if lowest else ""
                raise IndexError(f"targets are {lowest} to {count - 1}{note}, got {classes}")
        return target.to(self.device, self.target_dtype).contiguous()

    # -- what goes out

    def outputs(self, results: Sequence[Tensor]) -> Any:
        """Returns the model's output, in its containers, from the first results of the graph."""
        leaves = list(self.constants)
        for slot, value in zip(self.slots, results):
            leaves[slot] = value
        return filled(self.skeleton, leaves)

    def maps(self, results: Sequence[Tensor]) -> Any:
        """Returns the maps, in the form of the inputs, from the last results of the graph; None for an integer input of a tuple.
        Shares of tokens are one tensor."""
        values = results[len(self.slots) :]
        if self.method == "tokens":
            return values[0]
        if self.names is not None:
            return {self.names[i]: value for i, value in zip(self.explained, values)}
        maps: list[Tensor | None] = [None] * len(self.shapes)
        for i, value in zip(self.explained, values):
            maps[i] = value
        return maps[0] if self.single else tuple(maps)

    def resolved(self, results: Sequence[Tensor], target: Tensor) -> Tensor:
        """Returns `target` with the class that `results` predict in place of -1; a direction as it is."""
        return target if self.target == "direction" else with_predicted(primary(self.outputs(results)), target)


def fits(sizes: Sequence[int], shape: Shape) -> bool:
    """Whether `sizes` are those of `shape`, whose names are of any number."""
    return len(sizes) == len(shape) and all(isinstance(n, str) or n == m for n, m in zip(shape, sizes))


def with_predicted(y: Tensor, classes: Tensor) -> Tensor:
    """Returns `classes` [B] with the predicted class of `y` [B, C] in place of -1; as they are for outputs with further axes."""
    return torch.where(classes < 0, y.argmax(1), classes) if y.dim() == 2 else classes


def positional(inputs: Any) -> list[Tensor]:
    """Returns the inputs as a list; TypeError where they are neither a tensor nor a tuple of tensors."""
    tensors = list(inputs) if isinstance(inputs, tuple) else [inputs]
    refuse_nested(tensors)
    for x in tensors:
        if not isinstance(x, Tensor):
            raise TypeError(f"expected a tensor, a tuple of tensors, or a mapping of them, as inputs; got {type_of(x)}")
    return tensors


def described(tensors: Sequence[Tensor]) -> str:
    """Returns dtypes and shapes as text, such as `torch.float32 [3, 3, 32, 32], torch.int64 [3]`."""
    return ", ".join(f"{x.dtype} {list(x.shape)}" for x in tensors)
