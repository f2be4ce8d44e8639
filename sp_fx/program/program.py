"""Programs: an explanation as one inference graph, compiled. `program(inputs, target) -> (outputs, map)`.

For whoever exports one: `program.graph` is the `fx.GraphModule` that was compiled. It is in aten ops, functional, weights as
buffers, no autograd and no custom op in it, its batch a symbol where `program.dynamic_batch`, and so is each size that has a name
in `program.shapes`, as the length of a text has: `[("length",), ("length",)]` of token ids and their mask.

- It takes `(*inputs, target)`. The target is a LongTensor [B] (-1: the predicted class) or, where `program.target ==
  "direction"`, a tensor shaped like the output that is explained.
- It returns a flat list: the tensors of the model's output in pytree order, then one tensor for each floating input, the maps; of
  the method "tokens" one tensor, the share of each token.
- Where `program.looped` (an ascent that is not unrolled) it is one step instead: it takes `(*inputs, *starts, target)`, the
  starts being those of the floating inputs, and returns where the step leads. Whoever loops, `program.ascent.steps` times,
  resolves -1 after the first step and subtracts the starts at the end, as `Program._climb` does.

`program.example` has tensors that the graph takes, `program.tolerance` the distance from the eager explainer that is allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .signature import Run, Signature


class ProgramError(RuntimeError):
    """A program could not be made, or is not equal to the explainer it was made from."""


class Program:
    """One compiled graph. `program(inputs, target) -> (outputs, map)`. Made by `Explainer.compile` and by `sp_fx.load`.

    The weights are those of the moment it was made: later changes of the model do not reach it. Threads may share one.

    Attributes:
        method, arguments, target, dynamic_batch: what `Explainer.compile` was asked for.
        signature: all that a caller of the graph must know; shapes, dtypes, device and more are attributes here too.
        run: calls the compiled graph.
        tolerance, error: the relative L2 distance from the eager explainer that was allowed, and that was found on the example.
        graph, example: what was compiled, and tensors that it takes; the module's docstring says how to read it.
        report: the explainer's.
        seconds: how long tracing and compiling took.
        manifest: of the package that it was loaded from; such a program has None for graph, example, report, error and seconds.
    """

    def __init__(
        self,
        signature: Signature,
        run: Run,
        *,
        graph: Any = None,  # a fx.GraphModule; these three are None of a program that was loaded
        example: Any = None,  # a list of tensors
        report: Any = None,  # a Report
        manifest: dict[str, Any] | None = None,
        error: float | None = None,
        seconds: float | None = None,
    ) -> None:
        self.signature, self.run = signature, run
        self.graph, self.example, self.report, self.manifest = graph, example, report, manifest
        self.error, self.seconds = error, seconds
        self.method, self.arguments, self.ascent = signature.method, signature.arguments, signature.ascent
        self.target, self.tolerance, self.looped = signature.target, signature.tolerance, signature.looped
        self.single, self.shapes, self.dtypes, self.rows = signature.single, signature.shapes, signature.dtypes, signature.rows
        self.device, self.batch, self.dynamic_batch = signature.device, signature.batch, signature.dynamic_batch
        self.explained, self.tensors, self.output_shape = signature.explained, signature.slots, signature.output_shape
        self.names, self.lengths = signature.names, signature.lengths

    def __call__(self, inputs: Any, target: Any = None) -> tuple[Any, Any]:
        """The model's outputs and the maps, for `inputs` of the shapes and dtypes the program was made for.

        Args:
            inputs: a tensor, or a tuple or a mapping where the example was one.
            target: None for the predicted class, an int, or an integer tensor [B] in which -1 is the predicted class; for a
                program made with target="direction", a floating tensor shaped like the output, which may be left out where that
                is one number a sample. Class numbers on a GPU are not
                checked, which would wait for it: one that the output does not have gives a zero map.

        Raises:
            TypeError, ValueError, IndexError: inputs or a target that the program was not made for; the message names both.
        """
        with torch.inference_mode(False), torch.no_grad():
            tensors = self.signature.ordered(inputs)
            self.signature.check(tensors)
            aim = self.signature.target_tensor(target, tensors)
            tensors = [x.clone() if x.is_inference() else x.contiguous() for x in tensors]
            results = self._climb(tensors, aim) if self.looped else list(self.run(*tensors, aim))
        return self.signature.outputs(results), self.signature.maps(results)

    def _climb(self, points: list[Tensor], aim: Tensor) -> list[Tensor]:
        """Returns what an unrolled ascent would, by a loop round the graph of one step; nothing waits for the device."""
        ascent, explained, count = self.signature.ascent, self.signature.explained, len(self.signature.slots)
        assert ascent is not None
        starts = [points[i] for i in explained]
        outputs: list[Tensor] | None = None
        for number in range(1, ascent.steps + 1):
            results = list(self.run(*points, *starts, aim))
            if outputs is None:
                outputs = results[:count]
                aim = self.signature.resolved(outputs, aim)
            ends = results[count:]
            if ascent.clip != "every" and ascent.clamps(number):  # what every step does is in its graph
                ends = ascent.clamped(ends)
            for i, value in zip(explained, ends):
                points[i] = value
        ends = [points[i] for i in explained]
        return [*(outputs or []), *(end - start for start, end in zip(starts, ends))]

    def save(
        self,
        path: str | PathLike[str],
        *,
        class_names: Sequence[str] | None = None,
        input_space: str | None = None,
        preprocessing: Any = None,
        multi_label: bool = False,
    ) -> Path:
        """Write the program to `path` as a package that `sp_fx.load` reads: `.pt2` or `.onnx`. See `package.save`."""
        assert _save is not None  # registered when sp_fx is imported
        said = {"class_names": class_names, "input_space": input_space, "preprocessing": preprocessing}
        return _save(self, path, **said, multi_label=multi_label)


Save = TypeVar("Save", bound=Callable[..., Path])
_save: Callable[..., Path] | None = None


def saves_programs(function: Save) -> Save:
    """Decorates the function that `Program.save` calls: `package.save`, which is in a folder above and not imported from here."""
    global _save
    _save = function
    return function
