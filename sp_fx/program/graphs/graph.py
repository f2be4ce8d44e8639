"""One graph: a function that differentiates a captured module, traced as an inference graph of aten ops with no autograd left.

Requires: a function of tensors whose first axis is the batch.
Ensures: a `fx.GraphModule` over the same tensors that returns a flat list.
- Every parameter, and whatever depends on parameters alone, is a buffer of it; no node or attribute is shared with the model.
- No op writes in place; no `convolution_backward`, no scatter.
- A size is a symbol where it was asked to be one: the batch, the length of a text.
- `node.meta["custom"]["layer"]` says where in the model a call comes from: `layer1.0.conv1 (Conv2d)`.
"""

from __future__ import annotations

import math
import operator
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

from ...capture.arguments import ByName
from ...capture.tracing.schemas import frame_of
from ..signature import Bounds
from .decompositions import TABLE

aten = torch.ops.aten
Layout = Sequence[int | str]  # the sizes of a tensor: numbers, and names of those that vary


class FixedSize(ValueError):
    """Sizes that were to be symbols are fixed by the model; `names` says which."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(f"the model fixes {', '.join(names)}")
        self.names = tuple(names)


def one_graph(
    function: Callable[..., Any], module: fx.GraphModule, examples: Sequence[Tensor], layouts: Sequence[Layout]
) -> fx.GraphModule:
    """Returns `function(model, *examples)`, a list of tensors, as a graph of `examples`, whose sizes are `layouts`: numbers, and
    names of those that become symbols. `model` is `run_by_name` of the module, which is changed: pass a copy.

    Raises:
        FixedSize: something in the model fixes a size that was to be a symbol.
    """
    first: dict[int, tuple[str, Tensor]] = {}  # a weight that two modules share is one, under its first name
    for name, t in (*module.named_parameters(), *module.named_buffers()):
        first.setdefault(id(t), (name, t))
    weights_of = dict(first.values())
    mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False), allow_non_fake_inputs=True)
    named = {n: m for x, layout in zip(examples, layouts) for n, m in zip(layout, x.shape) if isinstance(n, str)}
    symbols: dict[int | str, Any] = {}
    for name, size in named.items():
        # Sizes 0 and 1 are special to torch, which would fix them: a batch of one is traced as two.
        context = StatelessSymbolicContext([DimDynamic.DYNAMIC])  # type: ignore[var-annotated]
        symbols[name] = mode.from_tensor(torch.empty(max(size, 2)), symbolic_context=context).shape[0]
    with mode:
        sizes = [[symbols.get(n, n) for n in layout] for layout in layouts]
        stand_ins = [torch.empty(of, dtype=x.dtype, device=x.device) for x, of in zip(examples, sizes)]
    weights = {name: mode.from_tensor(t.detach(), static_shapes=True) for name, t in weights_of.items()}
    for node in module.graph.nodes:
        node.meta = {"custom": {"layer": layer(node)}} if node.op.startswith("call") else {}
    module.__dict__["forward"] = ByName(module).run_by_name  # node by node, so that what each becomes knows its layer

    def run(weights: dict[str, Tensor], *inputs: Tensor) -> list[Tensor]:
        return function(lambda *args: torch.func.functional_call(module, weights, args), *inputs)

    with torch.inference_mode(False), torch.no_grad(), mode, enable_python_dispatcher(), preserve_node_meta():
        # The dispatcher in Python, since some of C++ read a symbol as a number.
        graph = make_fx(run, tracing_mode="real", decomposition_table=TABLE)(weights, *stand_ins)
        # A second trace, since functionalize has no rule for an autograd.Function. What `function` brings along, such as the
        # embedding that a target compares with, comes in as weights do: functionalize knows what it was given alone.
        brought = {node: getattr(graph, str(node.target)) for node in graph.graph.find_nodes(op="get_attr")}
        weights_of |= {f"brought_{i}": t for i, t in enumerate(brought.values())}
        given = {name: mode.from_tensor(t.detach(), static_shapes=True) for name, t in weights_of.items()}
        traced = fx.Interpreter(graph)

        def again(given: dict[str, Tensor], *inputs: Tensor) -> list[Tensor]:
            known = {node: given[f"brought_{i}"] for i, node in enumerate(brought)}
            return traced.run(*[given[name] for name in weights], *inputs, initial_env=known)

        graph = make_fx(torch.func.functionalize(again), tracing_mode="real")(given, *stand_ins)
    if fixed := [str(name) for name, symbol in symbols.items() if symbol.node.maybe_as_int() is not None]:
        raise FixedSize(fixed)
    for node in graph.graph.find_nodes(op="call_function", target=aten.view.default):
        node.target = aten.reshape.default  # an engine may have its inputs lie otherwise in memory, where no view can be
    spread_layers(graph, len(weights_of))
    freeze(graph, list(weights_of.values()))
    fold_constants(graph)
    return graph


def layer(node: fx.Node) -> str:
    """Returns where in the model a node is: the name and class of its module, `layer1.0.conv1 (Conv2d)`; for a call in the
    model's own forward the line, `the model itself (net.py:12)`."""
    path, kind = next(reversed((node.meta.get("nn_module_stack") or {"": ("", None)}).values()))
    if path:
        return f"{path} ({kind.rpartition('.')[2] if isinstance(kind, str) else kind.__name__})"
    frame = frame_of(node)
    return "the model itself" + (f" ({Path(frame[0]).name}:{frame[1]})" if frame else "")


def spread_layers(graph: fx.GraphModule, weights: int) -> None:
    """Labels the calls that autograd added, which the trace leaves without a layer, so that an engine's refusal can name one.

    Such a call gets the layer of one of its inputs, the one that comes first in the model: the adjoint of a ReLU reads the
    cotangent, from a later layer, and the pre-activation of `conv1`, and is labelled `conv1`. A weight (they are the first
    `weights` placeholders) gets the layer of its first user, and so does a call without labelled inputs.
    """
    sizes = (int, torch.SymInt)  # not labelled: a size is read from any tensor that has it
    calls = [n for n in graph.graph.nodes if n.op == "call_function" and not isinstance(n.meta.get("val"), sizes)]
    position = {node: i for i, node in enumerate(calls) if "custom" in node.meta}  # in the model, of the labelled nodes

    def label(node: fx.Node, neighbours: Iterable[fx.Node]) -> None:
        labelled = [n for n in neighbours if n in position]
        if labelled and node not in position:
            first = min(labelled, key=position.__getitem__)
            node.meta["custom"], position[node] = first.meta["custom"], position[first]

    for node in graph.graph.find_nodes(op="placeholder")[:weights]:
        label(node, node.users)
    for node in calls:
        label(node, node.all_input_nodes)
    for node in reversed(calls):
        label(node, node.users)


def freeze(graph: fx.GraphModule, weights: list[Tensor]) -> None:
    """Replaces the first placeholders by buffers with the values `weights`."""
    for i, (node, weight) in enumerate(zip(graph.graph.find_nodes(op="placeholder"), weights)):
        replace_by_buffer(graph, node, f"weight_{i}", weight.detach())
    without_dead_code(graph)
    graph.graph.set_codegen(fx.graph.CodeGen())  # make_fx's own would still ask for the weights
    graph.recompile()


def replace_by_buffer(graph: fx.GraphModule, node: fx.Node, name: str, value: Tensor) -> None:
    graph.register_buffer(name, value)
    with graph.graph.inserting_before(node):
        new = graph.graph.get_attr(name)
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    graph.graph.erase_node(node)


def without_dead_code(graph: fx.GraphModule) -> None:
    """Erases what nobody reads: attention too, which fx takes for random, as it may have dropout."""
    graph.graph.eliminate_dead_code(lambda node: node.is_impure(impure_random=False))


def bounds_of(graph: fx.GraphModule, layouts: Sequence[Layout]) -> dict[str, Bounds]:
    """Returns the least and the largest number that each length may be that has a name in `layouts`, as the trace took them for
    granted: 1 to 512, of a table of positions. That is tried of the numbers below and above the example's, one by one.

    Raises:
        FixedSize: it holds of the example's number alone, as of multiples of 4.
    """
    from torch.utils._sympy.printers import PythonPrinter

    values = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    named = [(n, name) for x, layout in zip(values, layouts) for n, name in zip(x.shape, layout)]
    symbols = {n.node.expr: (name, n) for n, name in named if isinstance(name, str)}
    bounds: dict[str, Bounds] = {name: (1, None) for name, _ in symbols.values() if name != "batch"}
    if not bounds:
        return {}
    env: Any = next(iter(symbols.values()))[1].node.shape_env
    hints = {name: int(n.node.hint) for name, n in symbols.values()}
    for guard in env.guards:
        found = {symbols[s][0] for s in guard.expr.free_symbols if s in symbols}
        if not (own := sorted(found & bounds.keys())):
            continue
        if len(own) > 1:
            raise FixedSize(own)
        plain = guard.expr.xreplace({s: type(s)(symbols[s][0], integer=True) for s in guard.expr.free_symbols if s in symbols})
        code = f"lambda {', '.join(sorted(found))}: {PythonPrinter().doprint(plain)}"
        holds = eval(code, {"math": math, "torch": torch})  # of the trace's own
        (name,), (least, most) = own, bounds[own[0]]
        low, high = granted(holds, name, "batch" in found, hints[name])
        bounds[name] = max(least, low), most if high is None else min(high, most or high)
        if bounds[name] == (hints[name], hints[name]):
            raise FixedSize(own)
    return bounds


def granted(holds: Callable[..., bool], name: str, with_batch: bool, now: int) -> Bounds:
    """Returns the least and the largest number round `now` that something `holds` for of the size `name`, for any batch."""

    def at(n: int) -> bool:
        return all(holds(**{name: n}, batch=batch) for batch in (1, 2, 7)) if with_batch else holds(**{name: n})

    least = interval_end(at, range(now, 0, -1)) or now
    low = interval_end(at, range(now, now + TRIED)) or now
    if low < now + TRIED - 1:
        return least, low
    high = next((now + (TRIED << k) for k in range(20) if not at(now + (TRIED << k))), 0)  # by doubling, and then between
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle) else (low, middle)
    return least, low if high else None


def interval_end(holds: Callable[[int], bool], numbers: Iterable[int]) -> int | None:
    """Returns the last of the first `numbers` for which something holds; None where not for the first."""
    last = None
    for n in numbers:
        if not holds(n):
            break
        last = n
    return last


TRIED = 2048  # sizes one by one


def rows_of(node: fx.Node, graph: fx.GraphModule) -> int | None:
    """Returns how many rows the embedding has that the input `node` is an index into: of several embeddings the fewest, None if
    there is none."""
    queue, rows = [node], []
    while queue:
        index = queue.pop()
        for user in index.users:
            if user.target is aten.embedding.default and user.args[1] is index:
                rows.append(operator.attrgetter(str(user.args[0].target))(graph).shape[0])  # type: ignore[union-attr]
            elif user.target in INDEX_PRESERVING and user.args[0] is index:
                queue.append(user)
    return min(rows, default=None)


INDEX_PRESERVING = {aten.view.default, aten.reshape.default, aten._to_copy.default, aten.clone.default, aten.unsqueeze.default,
               aten.slice.Tensor, aten.expand.default, aten.permute.default, aten.detach.default, aten.alias.default}  # fmt: skip


def fold_constants(graph: fx.GraphModule) -> None:
    """Computes now what depends on buffers alone: flipped and folded weights, positions, causal masks."""
    constants: dict[fx.Node, Any] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            constants[node] = operator.attrgetter(node.target)(graph)
        elif node.op == "call_function" and node.all_input_nodes and all(n in constants for n in node.all_input_nodes):
            args, kwargs = fx.map_arg((node.args, node.kwargs), constants.__getitem__)
            constants[node] = node.target(*args, **kwargs)
    for i, (node, value) in enumerate(constants.items()):
        if node.op != "get_attr" and isinstance(value, Tensor) and not all(user in constants for user in node.users):
            replace_by_buffer(graph, node, f"folded_{i}", value.contiguous())
    without_dead_code(graph)
    graph.graph.lint()
    used = {node.target for node in graph.graph.find_nodes(op="get_attr")}
    for name in [name for name in graph._buffers if name not in used]:
        del graph._buffers[name]
    graph.recompile()
