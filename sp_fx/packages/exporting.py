"""What both engines of packages need: a program's graph as torch.export has it, and whose layer an engine's refusal is about."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..program.program import Program


def export_graph(program: Program, graph: torch.fx.GraphModule, example: Sequence[Tensor]) -> torch.export.ExportedProgram:
    # Copies, since a looped ascent's example starts at its inputs, and export takes one tensor in two places for one argument.
    if not program.dynamic_batch:
        return torch.export.export(graph, tuple(x.clone() for x in example))
    batch = torch.export.Dim("batch", min=1)
    # A batch of one would be taken for a constant.
    several = tuple(x.clone() if len(x) > 1 else torch.cat([x, x]) for x in example)
    return torch.export.export(graph, several, dynamic_shapes=[{0: batch} for _ in several])


def blamed(error: BaseException, program: Program) -> str:
    """The op that the innermost reason of `error` names, the layers of the model that have it, and the reason."""
    while error.__cause__ is not None:
        error = error.__cause__
    reason = str(error).strip()
    try:
        found = layers_of(program.graph.graph, reason) or layers_of(written_out(program), reason)
    except Exception:  # what cannot be exported at all
        found = ""
    return f"{found}{': ' if found else ''}{reason[:400]}"


def layers_of(graph: torch.fx.Graph, reason: str) -> str:
    """The ops of `graph` that are named in `reason`, each with its layers, as `onegraph.layer` writes them."""
    said = {word.strip(".") for word in re.split(r"[^\w.]+", reason.replace("::", "."))}
    found: dict[str, dict[str, None]] = {}
    for node in graph.nodes:
        op = str(node.target)
        if node.op == "call_function" and {op, op.rpartition(".")[0]} & said and "custom" in node.meta:
            found.setdefault(op, {})[node.meta["custom"]["layer"]] = None
    return "; ".join(f"{op} in {', '.join([*layers][:5])}{', ...' if len(layers) > 5 else ''}" for op, layers in found.items())


def written_out(program: Program) -> torch.fx.Graph:
    """The program in the smallest ops that torch has: an engine may be asked for those of a larger one."""
    from torch._decomp import decomposition_table
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.traceback import preserve_node_meta

    read, table = torch.fx.Interpreter(program.graph).run, cast(Any, decomposition_table)
    with torch.inference_mode(False), torch.no_grad(), preserve_node_meta():
        return make_fx(read, decomposition_table=table, tracing_mode="real")(*program.example).graph
