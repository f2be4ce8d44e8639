"""What both engines of packages need: a program's graph as torch.export has it, and the layer that an engine refuses."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.export import Dim

from ..program.program import Program


def export_graph(program: Program, graph: torch.fx.GraphModule, example: Sequence[Tensor]) -> torch.export.ExportedProgram:
    """Returns `graph`, a form of the program's, exported for the sizes that vary; `example` is what it takes."""
    # Copies, since a looped ascent's example starts at its inputs, and export takes one tensor in two places for one argument.
    layouts = program.signature.layouts
    names = dict.fromkeys(n for layout in layouts for n in layout if isinstance(n, str))
    if not names:
        return torch.export.export(graph, tuple(x.clone() for x in example))
    # Lengths are hints: torch 2.11 cannot prove that min(8 n, 16 n) == 8 n, and refuses a named size that asks for it.
    bounds = program.signature.bounds
    symbols = {n: Dim(n, min=1) if n == "batch" else Dim.DYNAMIC(min=1, max=bounds[n][1]) for n in names}
    several = [x.clone() for x in example]
    for i, layout in enumerate(layouts):
        for axis, name in enumerate(layout):
            if isinstance(name, str) and several[i].shape[axis] == 1:  # a size of one would be taken for a constant
                several[i] = torch.cat([several[i]] * 2, axis)
    axes = [{axis: symbols[name] for axis, name in enumerate(layout) if isinstance(name, str)} for layout in layouts]
    return torch.export.export(graph, tuple(several), dynamic_shapes=axes)


def blamed(error: BaseException, program: Program) -> str:
    """Returns the reason of an engine's `error`, its innermost cause, after the op that it names and the layers that have it:
    `aten.special_i0e.default in odd (OddOp): No decomposition ...`."""
    while error.__cause__ is not None:
        error = error.__cause__
    reason = str(error).strip()
    try:
        layers = layers_of(program.graph.graph, reason) or layers_of(decomposed(program), reason)
    except Exception:  # a graph that cannot be exported at all
        layers = ""
    return f"{layers}{': ' if layers else ''}{reason[:400]}"


def layers_of(graph: torch.fx.Graph, reason: str) -> str:
    """Returns the ops of `graph` that are named in `reason`, each with its layers, as `program.graph.layer` writes them."""
    words = {word.strip(".") for word in re.split(r"[^\w.]+", reason.replace("::", "."))}
    layers_by_op: dict[str, dict[str, None]] = {}  # the inner one is an ordered set
    for node in graph.nodes:
        op = str(node.target)
        if node.op == "call_function" and {op, op.rpartition(".")[0]} & words and "custom" in node.meta:
            layers_by_op.setdefault(op, {})[node.meta["custom"]["layer"]] = None
    return "; ".join(
        f"{op} in {', '.join([*layers][:5])}{', ...' if len(layers) > 5 else ''}" for op, layers in layers_by_op.items()
    )


def decomposed(program: Program) -> torch.fx.Graph:
    """Returns the program's graph in the smallest ops that torch has: an exporter may refuse a part of a larger one."""
    from torch._decomp import decomposition_table
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.traceback import preserve_node_meta

    run, table = torch.fx.Interpreter(program.graph).run, cast(Any, decomposition_table)
    with torch.inference_mode(False), torch.no_grad(), preserve_node_meta():
        return make_fx(run, decomposition_table=table, tracing_mode="real")(*program.example).graph
