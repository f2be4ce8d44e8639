"""From a captured module to a program: trace a method as one graph, compile it, and compare the result with the eager method."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, fx

from ..capture.arguments import Given
from ..capture.capture import asks_for_values, tracing
from ..capture.sizes import Axes
from ..containers import slotted
from ..measured.runs import first_line
from ..methods.ascent import Ascent
from ..methods.captured import CapturedModule, noted
from ..methods.subgraphs import find
from ..rewrite.report import Report
from ..targets import Direction, primary
from .comparing import bounds_tried, compare, example_target, tolerated
from .example import Choice, Example, chosen
from .formula import Texts, formula
from .graphs.folding import folded, passed_through
from .graphs.graph import FixedSize, bounds_of, one_graph, rows_of
from .inductor import by_sizes, compiled, packs
from .program import Program, ProgramError
from .signature import Run, Shape, Signature

VALUES = "the forward goes by values that it computes, and a program is one path for all"

METHODS: dict[str, dict[str, Any]] = {
    "pullback": {},
    "double_pullback": {"step": 2.0},
    "ascend": {**{field.name: field.default for field in fields(Ascent)}, "unrolled": False},
    "tokens": {"embedding": None},
}


def build(
    module: CapturedModule,
    method: str,
    inputs: Any,
    /,
    *,
    dynamic_batch: bool = True,
    dynamic_lengths: bool = True,
    inductor: bool = True,
    target: str | Choice = "class",
    **arguments: Any,
) -> Program:
    """Returns `method` of `module` as a program for inputs like `inputs`. `Explainer.compile` has the arguments and errors."""
    started = time.perf_counter()
    arguments = with_defaults(method, arguments)
    if isinstance(target, Direction):
        raise TypeError(
            f"a {type(target).__name__} is a direction of its own for each output: compile with target='direction', and call the "
            "program with it"
        )
    if target not in ("class", "direction") and not callable(target):
        kinds = "'class', 'direction', or a callable that takes scores from the output"
        raise ValueError(f"the target of a program is {kinds}, got {target!r}")
    ascent = Ascent(**{k: v for k, v in arguments.items() if k != "unrolled"}) if method == "ascend" else None
    report = module.report()
    with torch.inference_mode(False), torch.no_grad():
        choice = primary if isinstance(target, str) else target
        example = Example.of(module, inputs, method, choice, arguments.get("embedding"))
        if torch.is_autocast_enabled(example.tensors[0].device.type):
            raise ValueError("compile outside autocast: a program computes in the dtypes of its weights and inputs")
        if ascent is not None:
            ascent.check([x for x in example.tensors if x.is_floating_point()])
        signature = signature_of(example, method, arguments, ascent, target, dynamic_batch, report)
        lengths = example.lengths(signature.target == "direction") if dynamic_lengths else []
        while True:  # until no length is a symbol that cannot be one
            try:
                named = with_names(signature, example, lengths)
                graph = traced(named, example)
                placeholders = graph.graph.find_nodes(op="placeholder")[: len(named.shapes)]
                bounds = bounds_of(graph, named.layouts)
                named = replace(named, rows=[rows_of(node, graph) for node in placeholders], bounds=bounds)
                tensors = graph_tensors(named, example)
                run = engine(graph, tensors, named, example) if inductor else graph
                error = compare(Program(named, run), example, [other for _, _, other in lengths])
                named = replace(named, bounds=bounds_tried(Program(named, run), example, lengths))
                break
            except FixedSize as reason:
                if "batch" in reason.names:
                    raise ValueError(
                        f"the model fixes its batch at {named.batch}, by a shape that is written out or by mixing samples: "
                        "compile it with dynamic_batch=False"
                    ) from None
                lengths = [length for length in lengths if length[0] not in reason.names]
            except Exception as reason:  # whatever a decomposition, Inductor or the comparison says of symbols
                if not lengths:
                    if asks_for_values(reason):
                        raise ProgramError(f"{VALUES}: {first_line(reason)}") from reason
                    raise
                shapes = ", ".join(str(list(x.shape)) for x in example.tensors)
                report = noted(report, [f"its program is for the lengths of {shapes} alone: {first_line(reason)}"])
                lengths = []
    seconds = time.perf_counter() - started
    return Program(named, run, graph=graph, example=tensors, report=report, error=error, seconds=seconds)


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


def signature_of(
    example: Example,
    method: str,
    arguments: dict[str, Any],
    ascent: Ascent | None,
    target: str | Choice,
    dynamic_batch: bool,
    report: Report,
) -> Signature:
    """Returns the signature of a program for calls of the sizes of the example.

    Raises:
        ValueError: classes are asked for, and the output has no axis of them; an ascent to a class of chosen scores in a loop.
    """
    tensors, y = example.tensors, example.y
    if not isinstance(target, str):
        target = "direction" if y.dim() == 1 else "class"
        if target == "class" and method == "ascend" and not arguments["unrolled"]:
            raise ValueError("an ascent to a class of scores that target= chooses is one graph: compile it with unrolled=True")
    if target == "class" and y.dim() < 2:
        raise ValueError(f"an output of shape {list(y.shape)} has no class axis: compile with target='direction'")
    explained = [i for i, x in enumerate(tensors) if x.is_floating_point()]
    dtype = tensors[explained[0]].dtype if explained else y.dtype
    if (embedded := example.embedded) is not None:
        arguments = {"embedding": embedded.name}
        explained = [number_of(embedded.ids, tensors)]
    skeleton, leaves = slotted(example.outputs)
    return Signature(
        method=method,
        arguments=arguments,
        target=target,
        target_dtype=y.dtype if target == "direction" else torch.long,
        output_dtype=y.dtype,
        ascent=ascent,
        tolerance=tolerated(dtype, report, ascends=ascent is not None),
        single=example.single,
        names=example.names,
        shapes=[tuple(x.shape[1:]) for x in tensors],
        dtypes=[x.dtype for x in tensors],
        rows=[None] * len(tensors),
        explained=explained,
        device=tensors[0].device,
        batch=tensors[0].shape[0],
        dynamic_batch=dynamic_batch,
        skeleton=skeleton,
        constants=[None if isinstance(leaf, Tensor) else leaf for leaf in leaves],
        slots=[i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)],
        output_shape=tuple(y.shape[1:]),
        probabilities="none" if example.ends_in_sigmoid else "softmax",
        chosen=example.choice is not primary,
    )


def number_of(tensor: Tensor | None, tensors: Sequence[Tensor]) -> int:
    """Returns the number of a tensor among others."""
    return next(i for i, other in enumerate(tensors) if other is tensor)


def with_names(signature: Signature, example: Example, lengths: Sequence[tuple[str, Axes, Given]]) -> Signature:
    """Returns the signature with the names of `lengths` in place of their sizes, in the inputs and in what is explained."""
    shapes: list[list[int | str]] = [list(shape) for shape in signature.shapes]
    output: list[int | str] = list(signature.output_shape)
    for name, axes, other in lengths:
        for i, axis in axes:
            shapes[i][axis - 1] = name
        after = chosen(example.module(*other.args, **other.kwargs), example.choice).shape[1:]
        output = [name if isinstance(n, int) and n != m else n for n, m in zip(output, after)]
    return replace(signature, shapes=[tuple(shape) for shape in shapes], output_shape=tuple(output))


def traced(signature: Signature, example: Example) -> fx.GraphModule:
    """Returns the graph of a program; FixedSize where the model fixes a size that has a name."""
    module = folded(example.module)
    call = Given(*slotted(tuple(example.call))[0]).by_name(example.module.forward)
    texts = None
    if example.embedded is not None:
        source = passed_through(example.module, find(example.module.graph, example.embedded.name, "embedding"))
        [node] = [node for node in module.graph.nodes if node.name == source.name]
        [end] = module.graph.find_nodes(op="output")
        end.args = ((end.args[0], node),)
        mask = example.embedded.mask
        number = None if mask is None else number_of(mask, example.tensors)
        texts = Texts(node, example.embedded.length_first, number, example.real)
    tensors = graph_tensors(signature, example)
    with tracing:
        return one_graph(formula(signature, call, example.choice, texts), module, tensors, signature.layouts)


def graph_tensors(signature: Signature, example: Example) -> list[Tensor]:
    """Returns tensors that the graph takes: the inputs of the example, the starts of a looped ascent, a target."""
    starts = [example.tensors[i] for i in signature.explained] if signature.looped else []
    return [*example.tensors, *starts, example_target(signature, example.y)]


def engine(graph: fx.GraphModule, tensors: list[Tensor], signature: Signature, example: Example) -> Run:
    """Returns `graph` as Inductor compiles it, and where that is faster, one of the sizes of the example beside it."""
    run = compiled(graph, tensors)
    if not (signature.dynamic_batch and packs(graph)):
        return run
    shapes: list[Shape] = [tuple(x.shape[1:]) for x in example.tensors]
    fixed = replace(signature, dynamic_batch=False, shapes=shapes, output_shape=tuple(example.y.shape[1:]))
    return by_sizes([x.shape for x in example.tensors], compiled(traced(fixed, example), tensors), run)
