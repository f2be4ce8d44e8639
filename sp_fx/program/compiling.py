"""From a captured module to a program: trace a method as one graph, compile it, and compare the result with the eager method."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..analysis.calls import name_of
from ..analysis.ops import CELLS
from ..capture.admission import asked_of_inputs
from ..capture.arguments import Given
from ..capture.capture import tracing
from ..capture.tracing.draws import DRAWS
from ..containers import slotted, tensors_of
from ..gates.adjoints.row import FROZEN
from ..gates.modules.recurrent import recurrent
from ..gates.table import THRESHOLDLESS
from ..measured.runs import distance
from ..measured.sample_axis import shapes_of
from ..measured.sigmoids import Sigmoids
from ..methods.ascent import Ascent
from ..methods.captured import CapturedModule
from ..methods.pullbacks import ascend, double_pullback, pullback
from ..methods.requests import Request
from ..rewrite.report import Report
from ..targets import primary
from .folding import folded
from .graph import one_graph, rows_of
from .inductor import by_batch, compiled, packs
from .program import Program, ProgramError
from .signature import Signature, described, positional, with_predicted

# The largest relative L2 distance of a program's maps from the eager explainer's; ten times that for an ascent, each of whose
# steps amplifies it. Another order of sums, and BatchNorms folded in float64 and rounded, make 1e-6 to 3e-5 in float32.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}

# With hard gates (frozen rules, plain derivatives) one pre-activation that rounding carries over its threshold moves the map by a
# whole gate: ResNet-18 on noise, 2e-3. This much is always allowed for their maps.
HARD_TOLERANCE = 0.02

MOST_STEPS = 64  # of a recurrent network in a program: a step takes Inductor 5 s on two cores

METHODS: dict[str, dict[str, Any]] = {
    "pullback": {},
    "double_pullback": {"step": 2.0},
    "ascend": {**{field.name: field.default for field in fields(Ascent)}, "unrolled": False},
}


def build(
    module: CapturedModule,
    method: str,
    inputs: Any,
    /,
    *,
    dynamic_batch: bool = True,
    inductor: bool = True,
    target: str = "class",
    **arguments: Any,
) -> Program:
    """Returns `method` of `module` as a program for inputs like `inputs`. `Explainer.compile` has the arguments and errors."""
    started = time.perf_counter()
    arguments = with_defaults(method, arguments)
    if target not in ("class", "direction"):
        raise ValueError(f"the target of a program is 'class' or 'direction', got {target!r}")
    example = positional(inputs)
    check_example(example)
    ascent = Ascent(**{k: v for k, v in arguments.items() if k != "unrolled"}) if method == "ascend" else None
    report = module.report()
    dtype = next(x.dtype for x in example if x.is_floating_point())
    tolerance = tolerated(dtype, report, ascends=ascent is not None)
    if torch.is_autocast_enabled(example[0].device.type):
        raise ValueError("compile outside autocast: a program computes in the dtypes of its weights and inputs")
    with torch.inference_mode(False), torch.no_grad():
        example = [x.detach().clone() for x in example]
        if ascent is not None:
            ascent.check([x for x in example if x.is_floating_point()])
        module = module.for_call(*example)
        if lines := asked_of_inputs(module.graph):
            raise ProgramError(
                f"the forward goes by values of its inputs, at {lines[0]}, and a program is one path for all: choose between two "
                "results by torch.where, or give the forward what it asks for as a constant"
            )
        check_lengths(module, example)
        with Sigmoids() as sigmoids:
            outputs = module(*example)
        check_repeats(module, example, outputs)
        y = explained_output(outputs, target)
        skeleton, leaves = slotted(outputs)
        signature = Signature(
            method=method,
            arguments=arguments,
            target=target,
            target_dtype=y.dtype if target == "direction" else torch.long,
            output_dtype=y.dtype,
            ascent=ascent,
            tolerance=tolerance,
            single=not isinstance(inputs, tuple),
            shapes=[x.shape[1:] for x in example],
            dtypes=[x.dtype for x in example],
            rows=[None] * len(example),
            device=example[0].device,
            batch=example[0].shape[0],
            dynamic_batch=dynamic_batch,
            skeleton=skeleton,
            constants=[None if isinstance(leaf, Tensor) else leaf for leaf in leaves],
            slots=[i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)],
            output_shape=y.shape[1:],
            probabilities="none" if sigmoids.gave(y) else "softmax",
        )
        starts = [example[i] for i in signature.explained] if signature.looped else []
        tensors = [*example, *starts, example_target(signature, y)]
        with tracing:
            graph = one_graph(formula(signature), folded(module), tensors, dynamic_batch)
        placeholders = graph.graph.find_nodes(op="placeholder")
        signature = replace(signature, rows=[rows_of(node, graph) for node in placeholders[: len(example)]])
        run = compiled(graph, tensors) if inductor else graph
        if inductor and dynamic_batch and packs(graph):
            with tracing:
                fixed = one_graph(formula(signature), folded(module), tensors, dynamic=False)
            run = by_batch(signature.batch, compiled(fixed, tensors), run)
        error = compare(Program(signature, run), module, tensors)
    seconds = time.perf_counter() - started
    return Program(signature, run, graph=graph, example=tensors, report=report, error=error, seconds=seconds)


def with_defaults(method: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns all arguments of the method: `arguments`, and its defaults for the others.

    Raises:
        ValueError: an unknown method.
        TypeError: an argument that it does not take.
    """
    if method not in METHODS:
        raise ValueError(f"the methods are {', '.join(METHODS)}; got {method!r}")
    if unknown := sorted(arguments.keys() - METHODS[method].keys()):
        raise TypeError(f"a {method} program takes {', '.join(METHODS[method]) or 'no arguments'}; got {', '.join(unknown)}")
    return {**METHODS[method], **arguments}


def check_example(example: list[Tensor]) -> None:
    """Raises TypeError or ValueError for an example without a floating input, or without one batch on axis 0."""
    if not any(x.is_floating_point() for x in example):
        raise TypeError(f"nothing to explain: the inputs are {', '.join(str(x.dtype) for x in example)}")
    batches = {x.shape[0] if x.dim() else None for x in example}
    if len(batches) > 1 or not batches - {None, 0}:
        raise ValueError(f"every input of a program has the batch on axis 0, of at least one sample: got {described(example)}")


def check_lengths(module: CapturedModule, example: list[Tensor]) -> None:
    """Raises ProgramError for a recurrent network of more than `MOST_STEPS` steps, each of which is a part of the graph."""
    arguments = Given(tuple(example), {}).by_name(module.forward)
    networks = [node for node in module.graph.nodes if node.target is recurrent or is_recurrent(node, module)]
    shapes = shapes_of(module, module.graph, arguments) if networks else {}
    for node in networks:
        first = shapes.get(node.args[1 if node.target is recurrent else 0])  # type: ignore[call-overload]
        leaf = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        batch_first = node.kwargs.get("batch_first", getattr(leaf, "batch_first", node.args[-1:] == (True,)))
        if isinstance(first, Tensor) and first.dim() == 3 and (steps := first.shape[1 if batch_first else 0]) > MOST_STEPS:
            raise ProgramError(
                f"{node.meta.get('place', node.name)} runs {steps} steps, and a program, whose graph has each of them, at most "
                f"{MOST_STEPS}: use the explainer itself, which loops over them, or shorter inputs"
            )


def is_recurrent(node: fx.Node, module: CapturedModule) -> bool:
    if node.op == "call_module":
        return isinstance(module.get_submodule(str(node.target)), nn.RNNBase)
    return node.op == "call_function" and name_of(node) in CELLS


def check_repeats(module: CapturedModule, example: list[Tensor], outputs: Any) -> None:
    """Raises ProgramError for a model that draws random numbers and so returns something other than `outputs` when asked again:
    there is nothing that its program could be compared with."""
    drawn = [note for note in module.report().notes if note.startswith(DRAWS)]
    if drawn and distance(tensors_of(module(*example)), tensors_of(outputs)) > 0:
        raise ProgramError(
            f"the model's outputs are others at each call, and no program could be compared with it: {'; '.join(drawn)}. "
            "Let it draw where it trains alone, as nn.Dropout and F.dropout(x, p, self.training) do"
        )


def tolerated(dtype: torch.dtype, report: Report, ascends: bool) -> float:
    """Returns the relative L2 distance from the eager method that is allowed for a model with the gates of `report`."""
    hard = any(site.kind and site.kind not in THRESHOLDLESS and site.temperature in (None, FROZEN) for site in report.sites)
    tolerance = TOLERANCE[dtype] * (10 if ascends else 1)
    return max(tolerance, HARD_TOLERANCE) if hard and dtype != torch.float64 else tolerance


def explained_output(outputs: Any, target: str) -> Tensor:
    """Returns the tensor of the model's output that is explained.

    Raises:
        TypeError: there are several, and none is called `logits`.
        ValueError: classes are asked for, and it has no axis of them.
    """
    try:
        y = primary(outputs)
    except TypeError as error:
        reason = str(error).split(":")[0]
        raise TypeError(f"{reason}: a program explains one of them. Wrap the model to return it alone, or as `logits`") from None
    if target == "class" and y.dim() < 2:
        raise ValueError(f"an output of shape {list(y.shape)} has no class axis: compile with target='direction'")
    return y


def example_target(signature: Signature, y: Tensor) -> Tensor:
    """Returns a target for the example whose output is `y`: the predicted classes, or a direction of ones."""
    if signature.target == "direction":
        return torch.ones_like(y)
    return y.argmax(1) if y.dim() == 2 else torch.zeros(len(y), dtype=torch.long, device=y.device)


# -- what the graph computes


def formula(signature: Signature) -> Callable[..., list[Tensor]]:
    """Returns the function that `one_graph` traces: from the model and the graph's tensors to the graph's results."""

    def results(model: Callable[..., Any], *tensors: Tensor) -> list[Tensor]:
        count, explained = len(signature.shapes), signature.explained
        inputs, starts, aim = list(tensors[:count]), list(tensors[count:-1]), tensors[-1]
        outputs: list[Tensor] = []  # those of the first forward

        def pull(points: list[Tensor]) -> list[Tensor]:
            nonlocal aim

            def forward(*points: Tensor) -> tuple[Tensor, list[Tensor]]:
                remaining = iter(points)
                result = model(*[next(remaining) if i in explained else x for i, x in enumerate(inputs)])
                return primary(result), tensors_of(result)

            y, back, values = torch.func.vjp(forward, *points, has_aux=True)  # type: ignore[misc]
            outputs.extend(values if not outputs else [])
            if signature.target == "direction":
                return list(back(aim.to(y.dtype)))
            aim = with_predicted(y, aim)  # and stays, for an ascent, the class predicted at the start
            return list(back(one_hot(y, aim)))

        points = [inputs[i] for i in explained]
        if signature.ascent is None:
            maps = pull(points)
            if signature.method == "double_pullback":
                maps = pull([x + signature.arguments["step"] * v for x, v in zip(points, maps)])
        elif signature.looped:
            maps = signature.ascent.step(starts, points, pull, clamp=signature.ascent.clip == "every")
        else:
            *_, ends = signature.ascent.iterates(points, pull)
            maps = [end - start for start, end in zip(points, ends)]
        return [*outputs, *maps]

    return results


def one_hot(y: Tensor, classes: Tensor) -> Tensor:
    """Returns 1 at the class of each sample, shaped like `y` [B, C, ...]; by comparison, since a scatter is slow to run and hard
    to export."""
    rest = [1] * (y.dim() - 2)
    numbers = torch.arange(y.shape[1], device=y.device).view(1, -1, *rest)
    return (numbers == classes.view(-1, 1, *rest)).to(y.dtype).expand(y.shape)


# -- whether it is right


def compare(program: Program, module: CapturedModule, tensors: list[Tensor]) -> float:
    """Returns the largest relative L2 distance of the program from the eager method, of outputs and maps alike: on the example,
    the first of the graph's `tensors`, and on another batch size where any will do.

    Raises:
        ProgramError: it is above the tolerance, or the model's output varies in something that is no tensor.
    """
    signature, worst = program.signature, 0.0
    sizes = (signature.batch, 1 if signature.batch > 1 else 2) if signature.dynamic_batch else (signature.batch,)
    for size in sizes:
        *samples, aim = (torch.cat([x, x])[:size] for x in (*tensors[: len(signature.shapes)], tensors[-1]))
        outputs, maps = program(samples[0] if signature.single else tuple(samples), aim)
        eager_leaves, eager_maps = slotted(module(*samples))[1], eager(module, signature, tuple(samples), aim)
        leaves = slotted(outputs)[1]
        for got, want in [*zip(leaves, eager_leaves, strict=True), *zip([maps] if signature.single else maps, eager_maps)]:
            if not isinstance(want, Tensor) and want != got:
                raise ProgramError(
                    f"the model returns {want!r} for {described(samples)}, where its program would return {got!r}: what varies "
                    "has to be a tensor. Return it as one, or leave it out"
                )
            if isinstance(want, Tensor) and want.is_floating_point():
                error = float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))
                if not error <= signature.tolerance:
                    raise ProgramError(
                        f"the program is not equal to the explainer on {described(samples)}: relative L2 distance {error:.1e} "
                        f"where {signature.tolerance:.0e} is allowed; it is refused"
                    )
                worst = max(worst, error)
    return worst


def eager(module: CapturedModule, signature: Signature, inputs: tuple[Tensor, ...], aim: Tensor) -> tuple[Tensor | None, ...]:
    """Returns the maps of `inputs` that the program is compared with."""
    request = Request(inputs, aim)
    if signature.ascent is not None:
        return ascend(module, request, signature.ascent)
    if signature.method == "double_pullback":
        return double_pullback(module, request, signature.arguments["step"])
    return pullback(module, request)
