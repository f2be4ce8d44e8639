"""One graph: a function that differentiates an explainer, as an inference graph of aten ops with no autograd left.

Requires: a function of tensors whose first axis is the batch. Ensures: a `fx.GraphModule` over the same tensors that returns a
flat list; every parameter, and whatever depends on parameters alone, is a buffer of it; no op of its own writes in place; no
`convolution_backward`, no scatter; the batch is a symbol where it was asked to be one; nothing in it is shared with the model;
`node.meta["custom"]["layer"]` says where in the model a call comes from.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.traceback import preserve_node_meta

from .decompositions import TABLE

aten = torch.ops.aten


def one_graph(function: Callable[..., Any], module: fx.GraphModule, examples: Sequence[Tensor], dynamic: bool) -> fx.GraphModule:
    """`function(module, *examples)`, which returns a list of tensors, as a graph of `examples`. `module` is this graph's alone.

    Raises:
        ValueError: the batch was to be dynamic, and something in the model fixes it.
    """
    held = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False), allow_non_fake_inputs=True)
    # Sizes 0 and 1 are special to torch, which would fix them: a batch of one is traced as two.
    batch: Any = examples[0].shape[0]
    if dynamic:
        batch = mode.from_tensor(
            torch.empty(max(batch, 2)), symbolic_context=StatelessSymbolicContext([DimDynamic.DYNAMIC])
        ).shape[0]
    with mode:
        stand_ins = [torch.empty((batch, *x.shape[1:]), dtype=x.dtype, device=x.device) for x in examples]
    weights = {name: mode.from_tensor(t.detach(), static_shapes=True) for name, t in held.items()}
    for node in module.graph.nodes:
        node.meta = {"custom": {"layer": layer(node)}} if node.op.startswith("call") else {}
    module.__dict__["forward"] = fx.Interpreter(module).run  # node by node, so that what each becomes knows its layer

    def run(weights: dict[str, Tensor], *inputs: Tensor) -> list[Tensor]:
        return function(lambda *args: torch.func.functional_call(module, weights, args), *inputs)

    with torch.inference_mode(False), torch.no_grad(), mode, enable_python_dispatcher(), preserve_node_meta():
        # The dispatcher in Python, since some of C++ read a symbol as a number.
        graph = make_fx(run, tracing_mode="real", decomposition_table=TABLE)(weights, *stand_ins)
        # A second trace, since functionalize has no rule for an autograd.Function.
        graph = make_fx(torch.func.functionalize(fx.Interpreter(graph).run), tracing_mode="real")(weights, *stand_ins)
    if dynamic and batch.node.maybe_as_int() is not None:
        raise ValueError(
            f"the model fixes its batch at {batch}, by a shape that is written out or by mixing samples: "
            "compile it with dynamic_batch=False"
        )
    spread_layers(graph, len(held))
    hold(graph, list(held.values()))
    fold_constants(graph)
    return graph


def layer(node: fx.Node) -> str:
    """Where a node of the explainer is: the module's name and class; of what the model's own forward calls, the line."""
    path, kind = next(reversed((node.meta.get("nn_module_stack") or {"": ("", None)}).values()))
    if path:
        return f"{path} ({kind.rpartition('.')[2] if isinstance(kind, str) else kind.__name__})"
    lines = [at for at in re.findall(r'File "(.*)", line (\d+)', node.stack_trace or "") if "/torch/" not in at[0]]
    return "the model itself" + (f" ({Path(lines[-1][0]).name}:{lines[-1][1]})" if lines else "")


def spread_layers(graph: fx.GraphModule, weights: int) -> None:
    """What autograd adds has no layer: it gets that of its input that comes first in the model, which for a gate is the layer
    that it gates. A weight, one of the first placeholders, is where it is used first."""
    sizes = (int, torch.SymInt)  # are read from whatever tensor was at hand
    calls = [n for n in graph.graph.nodes if n.op == "call_function" and not isinstance(n.meta.get("val"), sizes)]
    order = {node: i for i, node in enumerate(calls) if "custom" in node.meta}

    def spread(nodes: Iterable[fx.Node], node: fx.Node) -> None:
        near = [n for n in nodes if n in order]
        if near and node not in order:
            first = min(near, key=order.__getitem__)
            node.meta["custom"], order[node] = first.meta["custom"], order[first]

    for node in graph.graph.find_nodes(op="placeholder")[:weights]:
        spread(node.users, node)
    for node in calls:
        spread(node.all_input_nodes, node)
    for node in reversed(calls):  # of the graph's inputs and constants alone
        spread(node.users, node)


def hold(graph: fx.GraphModule, tensors: list[Tensor]) -> None:
    """Make the first placeholders buffers with the values `tensors`."""
    for i, (node, tensor) in enumerate(zip(graph.graph.find_nodes(op="placeholder"), tensors)):
        put(graph, node, f"weight_{i}", tensor.detach())
    graph.graph.eliminate_dead_code()
    graph.graph.set_codegen(fx.graph.CodeGen())  # make_fx's own would still ask for the weights
    graph.recompile()


def put(graph: fx.GraphModule, node: fx.Node, name: str, value: Tensor) -> None:
    """Replace `node` by a buffer."""
    graph.register_buffer(name, value)
    with graph.graph.inserting_before(node):
        new = graph.graph.get_attr(name)
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    graph.graph.erase_node(node)


def rows_of(node: fx.Node, graph: fx.GraphModule) -> int | None:
    """Of an input that is an index into an embedding: how many rows the least of them has."""
    queue, found = [node], []
    while queue:
        at = queue.pop()
        for user in at.users:
            if user.target is aten.embedding.default and user.args[1] is at:
                found.append(operator.attrgetter(str(user.args[0].target))(graph).shape[0])  # type: ignore[union-attr]
            elif user.target in PASSING and user.args[0] is at:
                queue.append(user)
    return min(found, default=None)


PASSING = {aten.view.default, aten.reshape.default, aten._to_copy.default, aten.clone.default, aten.unsqueeze.default,
           aten.slice.Tensor, aten.expand.default, aten.permute.default, aten.detach.default, aten.alias.default}  # fmt: skip


def fold_constants(graph: fx.GraphModule) -> None:
    """Compute what depends on buffers alone: flipped and folded weights, positions, causal masks."""
    known: dict[fx.Node, Any] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            known[node] = operator.attrgetter(node.target)(graph)
        elif node.op == "call_function" and node.all_input_nodes and all(n in known for n in node.all_input_nodes):
            args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = node.target(*args, **kwargs)
    for i, (node, value) in enumerate(known.items()):
        if node.op != "get_attr" and isinstance(value, Tensor) and not all(user in known for user in node.users):
            put(graph, node, f"folded_{i}", value.contiguous())
    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    kept = {node.target for node in graph.graph.find_nodes(op="get_attr")}
    for name in [name for name in graph._buffers if name not in kept]:
        del graph._buffers[name]
    graph.recompile()
