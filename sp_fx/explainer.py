"""The explainer: a model's outputs with a soft way back."""

from __future__ import annotations

import copy
import inspect
import math
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from .containers import rebuilt
from .methods.ascent import Ascent, Bounds, Clip
from .methods.calibration import by_norms, calibrated, measure, measured
from .methods.calls import Call, usable
from .methods.subgraphs import ending_at, place, places, starting_at, within
from .rewrite.report import Report
from .targets import Target, only_output, resolve, seed

if TYPE_CHECKING:
    from .program.program import Program


INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


Inputs = Tensor | tuple[Tensor, ...] | Mapping[str, Any]


Batches = Tensor | Iterable[Inputs]


class Explainer(fx.GraphModule):
    """A module equal to the model it was made from, whose autograd is the soft adjoint. Made by `transform`.

    Submodules keep the model's names and can be hooked: leaves as they are, containers and gates as identities through which
    their outputs pass.

    Every method takes `inputs`, a tensor, a tuple of tensors, or a mapping of keyword arguments, with the batch on axis 0 (any
    rank, at least one floating), and returns maps of their shapes and dtypes: a tensor for a tensor, a tuple for a tuple, a
    dictionary for a mapping, with None for integer tensors, which are passed on but not explained. They work under `no_grad`
    and `inference_mode`, and keep no graph alive. Common arguments:

        target: None for the predicted class; an int; an integer tensor [B]; an integer tensor [B, T] for T maps of each sample,
            [B, T, ...]; a tuple of indices into an output with several axes; a floating tensor shaped like the output, the
            direction itself; a callable from the output to what is to be explained. Axes of the output that an index leaves
            over are summed.
        forward_kwargs: keyword arguments of the model.
        wrt: the name of an inner activation to explain in place of the inputs (`"bert.embeddings.word_embeddings"`); the result
            is one map, shaped like it. `split` says which names there are.
        batch_size: the most samples to run at once; inputs, targets, bounds and keyword tensors with the batch on axis 0 are cut;
            a keyword tensor whose axis 0 is as long as the batch counts as one.

    and common errors:

        TypeError: an input that is no tensor; nothing floating to explain; a target of an unknown form.
        ValueError: no input; NaN in an input; an input on another device than the model; a target that does not fit.
        IndexError: a target index that the output does not have.
    """

    def __init__(self, modules: nn.Module, graph: fx.Graph, report: Report) -> None:
        super().__init__(modules, graph, "Explainer")
        self._report = report
        self._splits: dict[str, tuple[Explainer, Explainer]] = {}
        self._splitting = threading.Lock()
        self.training = False

    @property
    def origin(self) -> nn.Module | None:
        """The model that it was made from; None of a copy, after unpickling, and where it ends at an inner output."""
        return self.__dict__.get("_origin")

    # -- explanations

    def pullback(
        self,
        inputs: Inputs,
        target: Target = None,
        *,
        forward_kwargs: Mapping[str, Any] | None = None,
        wrt: str | None = None,
        batch_size: int | None = None,
        chunk: int | None = None,
    ) -> Any:
        """The soft pullback of the target direction: one forward and one backward, also for targets [B, T].

        `chunk` is the most of the T targets to pull back at once.
        """

        def run(explainer: Explainer, call: Call) -> list[Tensor]:
            return explainer._pull(call, call.explained, chunk)

        return self._explain(run, inputs, target, forward_kwargs, wrt, batch_size, many=True)

    def double_pullback(
        self,
        inputs: Inputs,
        target: Target = None,
        *,
        step: float = 2.0,
        forward_kwargs: Mapping[str, Any] | None = None,
        wrt: str | None = None,
        batch_size: int | None = None,
    ) -> Any:
        """The pullback at `x + step * pullback(x)`; with target None, of the class predicted at `x`."""

        if not math.isfinite(step):
            raise ValueError(f"step is a finite multiple of the first pullback, got {step!r}")

        def run(explainer: Explainer, call: Call) -> list[Tensor]:
            first = explainer._pull(call, call.explained)
            return explainer._pull(call, [x.detach() + step * v for x, v in zip(call.explained, first)])

        return self._explain(run, inputs, target, forward_kwargs, wrt, batch_size)

    def ascend(
        self,
        inputs: Inputs,
        target: Target = None,
        *,
        steps: int = 5,
        step_size: float | None = None,
        bounds: Bounds | None = None,
        radius: float | None = None,
        clip: Clip = "every",
        return_path: bool = False,
        forward_kwargs: Mapping[str, Any] | None = None,
        wrt: str | None = None,
        batch_size: int | None = None,
    ) -> Any:
        """Pullback ascent: where `steps` normalised steps along the pullback lead, minus where they started.

        With target None the class predicted at the start is kept; another class makes it a counterfactual.

        Args:
            steps: at least 1.
            step_size: L2 length of a step over a whole sample; None is 20 * sqrt(numel / 150528), for inputs in [-1, 1].
            bounds: (low, high), numbers or tensors that broadcast to an input: the box to stay in.
            radius: the radius of the L2 ball round the input to stay in.
            clip: when `bounds` apply: after "every" step, after the "last", or "never".
            return_path: return (map, path), where path has all iterates, [steps + 1, B, ...], the input first.
        """
        rule = Ascent(steps, step_size, bounds, radius, clip)
        along = () if bounds is None else tuple(bounds)

        def run(explainer: Explainer, call: Call) -> list[Tensor]:
            here = replace(rule, bounds=call.along or None)  # type: ignore[arg-type]
            path = here.path([x.detach() for x in call.explained], lambda x: explainer._pull(call, x))
            if return_path:
                return [torch.stack(iterates) for iterates in zip(*path)]
            return [end - start for start, end in zip(path[0], path[-1])]

        if not return_path:
            return self._explain(run, inputs, target, forward_kwargs, wrt, batch_size, along=along)
        path = self._explain(run, inputs, target, forward_kwargs, wrt, batch_size, batch_axis=1, along=along)
        return rebuilt(path, lambda p: None if p is None else p[-1] - p[0]), path

    def attribute(self, inputs: Inputs, target: Target = None, additional_forward_args: Any = None) -> Any:
        """The soft pullback under the calling convention of Captum's attribution methods.

        Raises:
            AssertionError: `target` is None and the model has more than one output for each sample.
        """
        extra = additional_forward_args if isinstance(additional_forward_args, tuple) else (additional_forward_args,)
        if isinstance(target, Tensor) and target.numel() == 1 and target.dtype in INTEGERS:
            target = int(target)
        return self._explain(
            lambda explainer, call: explainer._pull(call, call.explained),
            inputs,
            only_output if target is None else target,
            extra=() if additional_forward_args is None else extra,
            many=True,
        )

    def split(self, name: str) -> tuple[Explainer, Explainer]:
        """This explainer in two at the inner activation `name`: `stem(*inputs)` returns it, `tail(activation, **inputs)` goes on
        from it; `tail` takes those of the inputs, by name, that it needs. Both share the modules, and can be compiled.

        Names are those of modules and the places of the report's gates, `#2` for a second call there.

        Raises:
            ValueError: no activation has this name; the message has the nearest that do.
        """
        with self._splitting:
            if name not in self._splits:
                graphs = ending_at(self, self.graph, name, "wrt"), starting_at(self, self.graph, name)
                self._splits[name] = tuple(Explainer(self, g, within(self._report, g)) for g in graphs)  # type: ignore[assignment]
            return self._splits[name]

    def compile(  # type: ignore[override]  # in place of nn.Module.compile, on purpose
        self, method: str = "pullback", *, example_inputs: Inputs | None = None, dynamic_batch: bool = True, **method_args: Any
    ) -> Program:
        """`method` as one compiled inference graph, `program(inputs, target) -> (outputs, map)`: the model's own outputs and
        the explanation, by one pass.

        The program is held against this explainer on the example, to 1e-4 in relative L2 for float32 (`program.TOLERANCE`), and
        refused where it differs. It keeps the weights of this moment: later changes of the model do not reach it.

        Args:
            method: "pullback", "double_pullback" or "ascend".
            example_inputs: inputs of the shapes, dtypes and device that the program is for, any values. Required.
            dynamic_batch: whether it takes any batch size, or the example's alone. Convolutional networks on a CPU are compiled
                twice for it, since they run faster at a batch size that is known: that of the example, which should be the
                usual one.
            method_args: the method's own arguments (`step`; `steps`, `step_size`, `bounds`, `radius`, `clip`), and
                `target`: "class" (the default), for programs called with class numbers [B], -1 being the predicted class; or
                "direction", for programs called with a tensor shaped like the output;
                `unrolled`: an ascent as one graph of all its steps, instead of a loop round a graph of one step.

        Raises:
            TypeError, ValueError: an argument that the method does not take, or inputs that a program cannot have.
            ProgramError: the compiled program differs from this explainer.
            ModuleNotFoundError: the inputs are on a GPU, and Triton is not installed.
        """
        from .program.program import Program

        if example_inputs is None:
            raise ValueError("a program is made for the shape and dtype of its inputs: pass example_inputs")
        return Program(self, method, example_inputs, dynamic_batch=dynamic_batch, **method_args)

    def report(self, batches: Batches | None = None, *, forward_kwargs: Mapping[str, Any] | None = None) -> Report:
        """Each gating call of the model, its place and temperature, and what was left as it is and why. Printable.

        With `batches` (as `calibrate` takes them) also the standard deviation of each pre-activation over them and the
        temperature in units of it, with a warning beside gates that are effectively hard or effectively open.
        """
        return self._report if batches is None else measured(self._report, measure(self, batches, forward_kwargs or {}))

    def calibrate(self, batches: Batches | None = None, *, forward_kwargs: Mapping[str, Any] | None = None) -> Explainer:
        """A new explainer whose temperatures are in units of the scale that each pre-activation has over `batches`.

        One forward over the data, which needs no labels. The scale of a gate is the standard deviation of its pre-activation over
        all numbers of all samples, a constant from then on: it costs nothing when explaining, does not depend on how the data was
        cut into batches or where the sample's axis is, and is saved with the rules: `transform(model, rules=new.report().rules)`
        needs no data. This explainer stays as it is.

        Without `batches`, the gates that a BatchNorm feeds get the deviation that its own parameters and statistics say their
        pre-activation has, over the data that it was trained on; the others keep the scale they had, as the report shows.

        Args:
            batches: a tensor, or an iterable of batches: tensors, or tuples or mappings of several inputs.
            forward_kwargs: keyword arguments of the model, the same for every batch.

        Raises:
            ValueError: no sample; a batch that the model cannot take; only constant inputs; pre-activations that are not finite;
                without `batches`, no gate is fed by a BatchNorm.
            TypeError: a batch that is neither a tensor nor a tuple or a mapping.

        Warns:
            UserWarning: gates that are constant over the data, which stay hard, and gates that are never active on it.
        """
        other = copy.copy(self)
        if batches is None:
            other._report = by_norms(self._report, self, other.graph)
        else:
            other._report = calibrated(self._report, other.graph, measure(self, batches, forward_kwargs or {}))
        other.recompile()
        return other

    # -- how they run

    def _explain(
        self,
        run: Callable[[Explainer, Call], list[Tensor]],
        inputs: Inputs,
        target: Target,
        forward_kwargs: Mapping[str, Any] | None = None,
        wrt: str | None = None,
        batch_size: int | None = None,
        *,
        extra: tuple[Any, ...] = (),
        many: bool = False,
        batch_axis: int = 0,
        along: tuple[Any, ...] = (),
    ) -> Any:
        """Check the inputs, `run` a piece at a time, and put the maps together. `many`: whether `run` takes targets [B, T]."""
        kwargs, names = dict(forward_kwargs or {}), tuple[str, ...]()
        positional: tuple[Any, ...] = inputs if isinstance(inputs, tuple) else (inputs,)
        if isinstance(inputs, Mapping):
            names = tuple(name for name, value in inputs.items() if isinstance(value, Tensor))
            positional = tuple(inputs[name] for name in names)
            kwargs |= {name: value for name, value in inputs.items() if name not in names}
        with torch.inference_mode(False), torch.enable_grad():
            call = Call([*map(usable, positional), *extra], len(positional), kwargs, target, names, along)
            call.check({t.device for t in (*self.parameters(), *self.buffers())}, explains=wrt is None)
            if wrt is not None:
                tail, activation, needed = self._reached(wrt, call, batch_size)
                if activation.shape[:1] != (call.batch,) and not (many and batch_size is None):
                    told = f"{wrt} has the shape {list(activation.shape)}, without the batch on axis 0"
                    raise ValueError(f"{told}: only pullback(), without batch_size, can explain with respect to it")
                return tail._explain(
                    run, activation, target, needed, None, batch_size, many=many, batch_axis=batch_axis, along=along
                )
            times = None if many else call.targets_each
            if times is not None:
                call = call.repeated(times)
            pieces = [run(self, piece) for piece in call.pieces(batch_size)]
            maps = [torch.cat(parts, batch_axis) for parts in zip(*pieces)]
        if times is not None:
            maps = [m.unflatten(batch_axis, (m.shape[batch_axis] // times, times)) for m in maps]
        found = iter(maps)
        each = [next(found) if x.is_floating_point() else None for x in positional]
        if isinstance(inputs, Mapping):
            return dict(zip(names, each))
        return tuple(each) if isinstance(inputs, tuple) else each[0]

    def _reached(self, name: str, call: Call, batch_size: int | None) -> tuple[Explainer, Tensor, dict[str, Any]]:
        """What comes after the activation `name`, the activation of `call`, and what else of the inputs comes after it."""
        stem, tail = self.split(name)
        with torch.no_grad():
            activation = torch.cat([piece.of(stem, piece.explained) for piece in call.pieces(batch_size)])
        given = call.of(inspect.signature(self.forward).bind, call.explained).arguments
        needed = [str(node.target) for node in tail.graph.find_nodes(op="placeholder")][1:]
        if any(n.startswith("*") for n in needed):
            raise ValueError(f"what comes after {name} takes {', '.join(needed)}, which have no names of their own")
        return tail, activation, {n: given[n] for n in needed if n in given}

    def _pull(self, call: Call, points: list[Tensor], chunk: int | None = None) -> list[Tensor]:
        """The pullbacks at `points`, which stand in for the explained inputs; fixes the call's target if it was open."""
        leaves = [x.detach().requires_grad_() for x in points]
        try:
            output = call.of(self, leaves)
        except RuntimeError as error:
            dtypes = {x.dtype for x in leaves} - {t.dtype for t in self.parameters()}
            if dtypes and "dtype" in str(error):
                error.add_note(f"the inputs are {', '.join(map(str, dtypes))}, which no weight of the model is")
            raise
        if call.target is None:
            call.target = resolve(output, None)
        y, u = seed(output, call.target)
        if not y.requires_grad:
            raise ValueError("the explained output does not depend on the inputs: no gradient reaches them")
        if u.dim() == y.dim():
            grads = torch.autograd.grad(y, leaves, u, allow_unused=True)
            return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads)]

        def back(one: Tensor) -> tuple[Tensor, ...]:
            grads = torch.autograd.grad(y, leaves, one, retain_graph=True, allow_unused=True)
            return tuple(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads))

        return list(torch.func.vmap(back, out_dims=1, chunk_size=chunk)(u))

    # -- what a module is asked to do

    def _apply(self, fn: Any, recurse: bool = True) -> Explainer:
        self._splits.clear()  # they hold the tensors that are replaced
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> Explainer:
        """Changes nothing: the explainer was captured in eval mode. Warns where `mode` is True."""
        if mode:
            warnings.warn("an Explainer was captured in eval mode and stays in it: train() changes nothing", stacklevel=2)
        return self

    def __reduce__(self) -> tuple:
        return Explainer._restored, (fx.GraphModule(self, self.graph), self._report, places(self.graph))

    def __deepcopy__(self, memo: dict) -> Explainer:
        return Explainer._restored(copy.deepcopy(fx.GraphModule(self, self.graph), memo), self._report)

    def __copy__(self) -> Explainer:
        return Explainer._restored(fx.GraphModule(self, copy.deepcopy(self.graph)), self._report)

    @staticmethod
    def _restored(module: fx.GraphModule, report: Report, known: list[str | None] | None = None) -> Explainer:
        if known is not None:
            place(module.graph, known)
        return Explainer(module, module.graph, report)
