"""Programs: an explanation as one inference graph, compiled. Made by `Explainer.compile`.

`program(inputs, target) -> (outputs, map)`: one pass, so the prediction comes with its explanation.

For whoever exports one: `program.graph` is the `fx.GraphModule` that was compiled, in aten ops, functional, weights as buffers,
no autograd and no custom op in it, its batch a symbol where `program.dynamic_batch`. It takes `(*inputs, target)`, where the
target is a LongTensor [B] (-1: the predicted class) or, where `program.target == "direction"`, a tensor shaped like the output
that is explained; and returns a flat list: the tensors of the model's output in pytree order (`program.output_spec`), then one
tensor for each floating input. These are the maps; but where `program.looped` (an ascent that is not unrolled) the graph is one
step, takes `(*inputs, *starts, target)`, the starts being those of the floating inputs, and returns where the step leads:
`program.ascent` has the number of steps, and whoever loops resolves -1 after the first step and subtracts the starts at the
end, as `Program._climb` does. `program.example` has tensors that the graph takes, `program.tolerance` what it was held to.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..capture.capture import tracing
from ..containers import filled, slotted, tensors_of
from ..gates.adjoints.row import FROZEN
from ..gates.rules import NORMS
from ..methods.ascent import Ascent
from ..targets import primary
from .folding import folded
from .graph import one_graph, rows_of
from .inductor import by_batch, compiled, packs

if TYPE_CHECKING:
    from ..explainer import Explainer


# The largest relative L2 distance of a program's maps from the eager explainer's; ten times that for an ascent, each of whose
# steps amplifies it. Another order of sums, and BatchNorms folded in float64 and rounded, make 1e-6 to 3e-5 in float32.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


# With hard gates (frozen rules, plain derivatives) one pre-activation that rounding carries over its threshold moves the map by a
# whole gate: ResNet-18 on noise, 2e-3. Their maps are held to this at least.
HARD_TOLERANCE = 0.02


SMOOTH = ("gelu", "silu", "hardswish", "mish", "attention", *NORMS)  # no threshold in these, frozen or not


METHODS: dict[str, dict[str, Any]] = {
    "pullback": {},
    "double_pullback": {"step": 2.0},
    "ascend": {"steps": 5, "step_size": None, "bounds": None, "radius": None, "clip": "every", "unrolled": False},
}


class ProgramError(RuntimeError):
    """A program could not be made, or is not equal to the explainer it was made from."""


class Program:
    """One compiled graph. `program(inputs, target) -> (outputs, map)`.

    The weights are those of the moment it was made: later changes of the model do not reach it. Threads may share one.

    Attributes:
        graph: what was compiled; the module's docstring says how to read it.
        method, arguments, target, dynamic_batch: what `Explainer.compile` was asked for.
        report: the explainer's.
        tolerance, error: the relative L2 distance from the eager explainer that was allowed, and that was found on the example.
        seconds: how long tracing and compiling took.

    A program that was loaded from a package has a `manifest`, and None for graph, report, error and seconds.
    """

    manifest: dict[str, Any] | None = None  # of the package that it was loaded from; such a program knows none of these:
    graph: Any = None  # a fx.GraphModule
    report: Any = None
    error: float | None = None
    seconds: float | None = None

    def __init__(
        self,
        explainer: Explainer,
        method: str,
        inputs: Any,
        *,
        dynamic_batch: bool = True,
        target: str = "class",
        **arguments: Any,
    ) -> None:
        started = time.perf_counter()
        self.method, self.target, self.dynamic_batch = method, target, dynamic_batch
        self.arguments = checked(method, arguments)
        if target not in ("class", "direction"):
            raise ValueError(f"the target of a program is 'class' or 'direction', got {target!r}")
        self.report = explainer.report()
        self.single = not isinstance(inputs, tuple)
        given = positional(inputs)
        self.explained = [i for i, x in enumerate(given) if x.is_floating_point()]
        if not self.explained:
            raise TypeError(f"nothing to explain: the inputs are {', '.join(str(x.dtype) for x in given)}")
        batches = {x.shape[0] if x.dim() else None for x in given}
        if len(batches) > 1 or not batches - {None, 0}:
            raise ValueError(f"every input of a program has the batch on axis 0, of at least one sample: got {shapes(given)}")
        self.batch = given[0].shape[0]
        self.shapes, self.dtypes, self.device = [x.shape[1:] for x in given], [x.dtype for x in given], given[0].device
        self.ascent = Ascent(**{k: v for k, v in self.arguments.items() if k != "unrolled"}) if method == "ascend" else None
        self.looped = self.ascent is not None and not self.arguments["unrolled"]
        dtype = given[self.explained[0]].dtype
        self.tolerance = TOLERANCE[dtype] * (10 if self.ascent else 1)
        hard = any(site.kind and site.kind not in SMOOTH and site.temperature in (None, FROZEN) for site in self.report.sites)
        if hard and dtype != torch.float64:
            self.tolerance = max(self.tolerance, HARD_TOLERANCE)

        if torch.is_autocast_enabled(self.device.type):
            raise ValueError("compile outside autocast: a program computes in the dtypes of its weights and inputs")
        with torch.inference_mode(False), torch.no_grad():
            given = [x.detach().clone() for x in given]
            if self.ascent is not None:
                self.ascent.check([given[i] for i in self.explained])
            outputs = explainer(*given)
            self.skeleton, leaves = slotted(outputs)
            self.constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            self.tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
            try:
                y = primary(outputs)
            except TypeError as error:
                told = f"{str(error).split(':')[0]}: a program explains one of them"
                raise TypeError(f"{told}. Wrap the model to return it alone, or as `logits`") from None
            self.output_shape = y.shape[1:]
            if target == "class" and y.dim() < 2:
                raise ValueError(f"an output of shape {list(y.shape)} has no class axis: compile with target='direction'")
            self.aim = torch.ones_like(y) if target == "direction" else torch.zeros(len(y), dtype=torch.long, device=y.device)
            if target == "class" and y.dim() == 2:
                self.aim = y.argmax(1)
            starts = [given[i] for i in self.explained] if self.looped else []
            self.example = [*given, *starts, self.aim]
            with tracing:
                self.graph = one_graph(self._formula(len(given)), folded(explainer), self.example, dynamic_batch)
            self.rows = [rows_of(node, self.graph) for node in self.graph.graph.find_nodes(op="placeholder")][: len(given)]
            self.run = compiled(self.graph, self.example)
            if dynamic_batch and packs(self.graph):
                with tracing:
                    fixed = one_graph(self._formula(len(given)), folded(explainer), self.example, dynamic=False)
                self.run = by_batch(self.batch, compiled(fixed, self.example), self.run)
            self.error = self._compare(explainer, given)
        self.seconds = time.perf_counter() - started

    # -- what the graph computes

    def _formula(self, inputs: int) -> Callable[..., list[Tensor]]:
        def formula(model: Callable[..., Any], *tensors: Tensor) -> list[Tensor]:
            given, starts, aim = list(tensors[:inputs]), list(tensors[inputs:-1]), tensors[-1]
            first: list[Tensor] = []

            def pull(points: list[Tensor]) -> list[Tensor]:
                nonlocal aim

                def at(*points: Tensor) -> tuple[Tensor, list[Tensor]]:
                    rest = iter(points)
                    outputs = model(*[next(rest) if i in self.explained else x for i, x in enumerate(given)])
                    return primary(outputs), tensors_of(outputs)

                y, back, outputs = torch.func.vjp(at, *points, has_aux=True)  # type: ignore[misc]
                first.extend(outputs if not first else [])
                if self.target == "class":
                    aim = resolved(y, aim)
                return list(back(one_hot(y, aim) if self.target == "class" else aim.to(y.dtype)))

            points = [given[i] for i in self.explained]
            if self.ascent is None:
                maps = pull(points)
                if self.method == "double_pullback":
                    maps = pull([x + self.arguments["step"] * v for x, v in zip(points, maps)])
            elif self.looped:
                maps = self.ascent.step(starts, points, pull, clamp=self.ascent.clip == "every")
            else:
                path = self.ascent.path(points, pull)
                maps = [end - start for start, end in zip(path[0], path[-1])]
            return [*first, *maps]

        return formula

    # -- calling it

    def __call__(self, inputs: Any, target: Any = None) -> tuple[Any, Any]:
        """The model's outputs and the maps, for `inputs` of the shapes and dtypes the program was made for.

        Args:
            inputs: a tensor, or a tuple where the example was one.
            target: None for the predicted class, an int, or an integer tensor [B] in which -1 is the predicted class; for a
                program made with target="direction", a floating tensor shaped like the output. Class numbers on a GPU are not
                checked, which would wait for it: one that the output does not have gives a zero map.

        Raises:
            TypeError, ValueError, IndexError: inputs or a target that the program was not made for; the message names both.
        """
        with torch.inference_mode(False), torch.no_grad():
            given = positional(inputs)
            self._check(given)
            aim = self._aim(target, given[0].shape[0])
            given = [x.clone() if x.is_inference() else x.contiguous() for x in given]
            results = self._climb(given, aim) if self.looped else list(self.run(*given, aim))
        leaves = list(self.constants)
        for place, value in zip(self.tensors, results):
            leaves[place] = value
        maps: list[Tensor | None] = [None] * len(given)
        for place, value in zip(self.explained, results[len(self.tensors) :]):
            maps[place] = value
        return filled(self.skeleton, leaves), maps[0] if self.single else tuple(maps)

    def _climb(self, given: list[Tensor], aim: Tensor) -> list[Tensor]:
        """The steps of an ascent; nothing waits for the device."""
        assert self.ascent is not None
        starts = [given[i] for i in self.explained]
        outputs: list[Tensor] = []
        for _ in range(self.ascent.steps):
            results = list(self.run(*given, *starts, aim))
            if not outputs:
                outputs = results[: len(self.tensors)]
                if self.target == "class":
                    aim = resolved(self._primary(outputs), aim)
            for place, value in zip(self.explained, results[len(self.tensors) :]):
                given[place] = value
        ends = [given[i] for i in self.explained]
        if self.ascent.clip == "last":
            ends = self.ascent.clamped(ends)
        return [*outputs, *(end - start for start, end in zip(starts, ends))]

    def _primary(self, values: list[Tensor]) -> Tensor:
        leaves = list(self.constants)
        for place, value in zip(self.tensors, values):
            leaves[place] = value
        return primary(filled(self.skeleton, leaves))

    def _check(self, given: list[Tensor]) -> None:
        found = [(x.shape[1:], x.dtype, x.device) for x in given]
        if found != [(shape, dtype, self.device) for shape, dtype in zip(self.shapes, self.dtypes)]:
            made = ", ".join(f"{dtype} {['B', *shape]}" for shape, dtype in zip(self.shapes, self.dtypes)).replace("'", "")
            raise ValueError(
                f"this program was made for {made} on {self.device}; got {shapes(given)} on {given[0].device}. "
                "Compile another for these inputs"
            )
        batches = {x.shape[0] for x in given}
        if len(batches) > 1 or 0 in batches:
            raise ValueError(f"the inputs have one batch size, of at least 1: got {shapes(given)}")
        for x, rows in zip(given, self.rows):
            # Compiled code ends the process at a wrong index. Not on a GPU, which would be waited for.
            if rows is not None and x.device.type == "cpu" and not 0 <= int(x.min()) <= int(x.max()) < rows:
                raise IndexError(f"the indices of an input are 0 to {rows - 1}, got {int(x.min())} to {int(x.max())}")
        if not self.dynamic_batch and batches != {self.batch}:
            raise ValueError(
                f"this program was made for a batch of {self.batch} alone (dynamic_batch=False); got {shapes(given)}"
            )

    def _aim(self, target: Any, batch: int) -> Tensor:
        if self.target == "direction":
            expected = (batch, *self.output_shape)
            if not isinstance(target, Tensor) or not target.is_floating_point() or target.shape != expected:
                got = f"{target.dtype} {list(target.shape)}" if isinstance(target, Tensor) else repr(target)
                raise ValueError(f"this program takes a direction, a floating tensor of shape {list(expected)}; got {got}")
            return target.detach().to(self.device, self.aim.dtype).contiguous()
        target = -1 if target is None else target
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
            asked = target.tolist()
            if min(asked) < lowest or max(asked) >= self.output_shape[0]:
                note = " (-1: the predicted class)" if lowest else ""
                raise IndexError(f"targets are {lowest} to {self.output_shape[0] - 1}{note}, got {asked}")
        return target.to(self.device, torch.long).contiguous()

    def save(
        self, path: str | PathLike[str], *, class_names: Sequence[str] | None = None, input_space: str | None = None
    ) -> Path:
        """Write the program to `path` as a package that `sp_fx.load` reads: `.pt2` or `.onnx`. See `package.save`."""
        from ..packages.package import save

        return save(self, path, class_names=class_names, input_space=input_space)

    # -- whether it is right

    def _compare(self, explainer: Explainer, given: list[Tensor]) -> float:
        """The distance from the eager explainer on the example, and on another batch where any will do."""
        worst = 0.0
        method, arguments = getattr(explainer, self.method), {k: v for k, v in self.arguments.items() if k != "unrolled"}
        for count in (self.batch, 1 if self.batch > 1 else 2) if self.dynamic_batch else (self.batch,):
            few, aim = tuple(torch.cat([x, x])[:count] for x in given), torch.cat([self.aim, self.aim])[:count]
            outputs, maps = self(few[0] if self.single else few, aim)
            wanted = slotted(explainer(*few))[1], method(few, aim, **arguments)
            pairs = [*zip(slotted(outputs)[1], wanted[0], strict=True), *zip([maps] if self.single else maps, wanted[1])]
            for got, want in pairs:
                if not isinstance(want, Tensor) and want != got:
                    told = f"the model returns {want!r} for {shapes(few)}, where its program would return {got!r}"
                    raise ProgramError(f"{told}: what varies has to be a tensor. Return it as one, or leave it out")
                if isinstance(want, Tensor) and want.is_floating_point():
                    error = float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))
                    if not error <= self.tolerance:
                        raise ProgramError(
                            f"the program is not equal to the explainer on {shapes(few)}: relative L2 distance {error:.1e} where "
                            f"{self.tolerance:.0e} is allowed; it is refused"
                        )
                    worst = max(worst, error)
        return worst


def resolved(y: Tensor, aim: Tensor) -> Tensor:
    """The predicted class in place of -1."""
    return torch.where(aim < 0, y.argmax(1), aim) if y.dim() == 2 else aim


def one_hot(y: Tensor, aim: Tensor) -> Tensor:
    """By comparison, since a scatter is slow to run and hard to export."""
    rest = [1] * (y.dim() - 2)
    classes = torch.arange(y.shape[1], device=y.device).view(1, -1, *rest)
    return (classes == aim.view(-1, 1, *rest)).to(y.dtype).expand(y.shape)


def checked(method: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The method's arguments, with its defaults.

    Raises:
        ValueError: an unknown method.
        TypeError: an argument that it does not take.
    """
    if method not in METHODS:
        raise ValueError(f"the methods are {', '.join(METHODS)}; got {method!r}")
    if unknown := sorted(arguments.keys() - METHODS[method].keys()):
        raise TypeError(f"a {method} program takes {', '.join(METHODS[method]) or 'no arguments'}; got {', '.join(unknown)}")
    return {**METHODS[method], **arguments}


def positional(inputs: Any) -> list[Tensor]:
    given = list(inputs) if isinstance(inputs, tuple) else [inputs]
    for x in given:
        if not isinstance(x, Tensor):
            raise TypeError(f"expected a tensor, or a tuple of tensors, as inputs; got {type(x).__name__}")
    return given


def shapes(tensors: Sequence[Tensor]) -> str:
    return ", ".join(f"{x.dtype} {list(x.shape)}" for x in tensors)
