"""Capture by `torch.export`: the ATen graph of one example, before decompositions, in the form that symbolic tracing gives.

The graph has the model's own parameters for placeholders, checks what it is called with against the example, calls `aten` ops on
the tensors of an eval clone, passes the output of each module through an identity under the module's name, and returns what the
model returns. Export follows one path through the Python code of the forward, which is the right one for every input of the same
form: the sizes of the example are fixed, the batch where the model allows it to vary.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import operator
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..containers import PLAIN, Slot, items, rebuilt, tensors_of
from .arguments import VARIADIC, checked, form
from .capture import Capture, CaptureError, blame
from .clone import EvalClone, adopt_forward, passes
from .functions import seen, take_markers

aten = torch.ops.aten


def batch_sizes(example: Mapping[str, Any]) -> torch.Size:
    """The size of axis 0 of the example's first floating tensor, or of its first tensor; empty for a tensor of no axes.

    Raises:
        CaptureError: the example has no tensor.
    """
    tensors = tensors_of(example)
    if not tensors:
        raise CaptureError("torch.export needs a tensor among the example_inputs")
    return next((t for t in tensors if t.is_floating_point()), tensors[0]).shape[:1]


def export(model: nn.Module, example: Mapping[str, Any], any_batch: bool) -> Capture:
    """The capture of `model` on `example`, its arguments by name; for `any_batch`, or for the batch of the example alone.

    Raises:
        TypeError: `model` is not an `nn.Module`, or one that has no Python source to trace.
        CaptureError: `torch.export` refuses it, or its forward is another one for another batch.
    """
    sizes = batch_sizes(example)
    try:  # torch.export takes an axis of size 1 for a constant
        exported = Exported(model, cut(example, sizes, max(*sizes, 2)) if any_batch else example, sizes, any_batch)
    except Exception as error:
        raise CaptureError(f"torch.export cannot capture {type(model).__name__}: {error} ({blame(error)})") from error
    examples = (example, cut(example, sizes, 1)) if any_batch else (example,)
    return Capture(
        exported.clone, exported.graph, "torch.export", tuple(exported.notes), exported.marked, exported.reference, examples
    )


def cut(example: Any, sizes: torch.Size, size: int) -> Any:
    """The example with another number of samples: the first ones, or all of them again."""

    def each(t: Any) -> Any:
        if not isinstance(t, Tensor) or t.shape[:1] != sizes:
            return t
        return t[:size] if size <= sizes[0] else torch.cat([t] * size)[:size]

    return rebuilt(example, each)


class Exported:
    """One export, made into a graph over a clone; with `varying`, for all sizes of axis 0 where the example has `sizes`."""

    def __init__(self, model: nn.Module, arguments: Mapping[str, Any], sizes: torch.Size, varying: bool) -> None:
        clones = EvalClone()
        self.clone = clones(model)
        hooks = clones.hooks_left(model)
        adopt_forward(self.clone)
        self.reference = EvalClone()(self.clone)  # the modules of the clone become identities
        for module in self.reference.modules():
            module.__dict__["_buffers"] = {n: b if b is None else b.clone() for n, b in module._buffers.items()}
        self.parameters = inspect.signature(self.clone.forward).parameters
        self.arguments, self.notes = dict(arguments), hooks
        self.tensors = tensors = tensors_of(self.arguments)
        batch = max(*sizes, 2) if varying else None
        self.varies = [t.dim() > 0 and t.shape[0] == batch for t in tensors]
        flat, skeleton = self.flattened()
        quiet = contextlib.redirect_stderr(io.StringIO())  # where torch.export prints as much of a graph as it got
        marked = seen(self.clone, exporting=True)
        with all_require_grad(self.clone), marked, torch.enable_grad(), warnings.catch_warnings(), quiet:
            warnings.simplefilter("ignore")  # about attributes that the forward sets on the clone
            dynamic = tuple({0: torch.export.Dim.AUTO} if free else None for free in self.varies)
            program = torch.export.export(flat, tuple(tensors), dynamic_shapes=(dynamic,), strict=False)
        if varying:
            self.require_any_batch(program)
        self.source = program.module(check_guards=False)
        self.graph = fx.Graph()
        self.build(skeleton[0])
        self.marked = tuple(take_markers(self.graph))
        self.graph.lint()

    def require_any_batch(self, program: torch.export.ExportedProgram) -> None:
        inputs = [n for n in program.graph.find_nodes(op="placeholder") if n.name in program.graph_signature.user_inputs]
        if any(free and isinstance(n.meta["val"].shape[0], int) for n, free in zip(inputs, self.varies)):
            raise CaptureError("its forward makes a constant of the size of the batch")
        branches = [guard for guard in program._guards_code if not SAME_BATCH.fullmatch(guard)]
        if branches:
            raise CaptureError(f"its forward branches on the size of the batch: {branches[0]}")

    def flattened(self) -> tuple[nn.Module, list[Any]]:
        """The clone with a forward from the example's tensors to the output's; the list receives the output's containers."""
        forward, parameters, arguments = type(self.clone).forward, self.parameters, self.arguments
        skeleton: list[Any] = []

        def flat(module: nn.Module, *tensors: Tensor) -> tuple[Any, ...]:
            rest = iter(tensors)
            values = {n: rebuilt(v, lambda x: next(rest) if isinstance(x, Tensor) else x) for n, v in arguments.items()}
            call = inspect.BoundArguments(inspect.Signature(list(parameters.values())), values)  # type: ignore[arg-type]
            leaves: list[Any] = []

            def slot(value: Any) -> Any:
                if isinstance(value, Tensor | torch.SymInt):
                    leaves.append(value)
                    return Slot(len(leaves) - 1)
                if not isinstance(value, (*PLAIN, torch.dtype, torch.device)):
                    self.notes.append(f"a {type(value).__name__} in its output is left out")
                    return None
                return value

            output = forward(module, *call.args, **call.kwargs)
            skeleton[:] = [rebuilt(output, slot)]
            return tuple(leaves)

        kind = type(self.clone)
        self.clone.__class__ = type(kind.__name__, (kind,), {"forward": flat, "__module__": kind.__module__})
        return self.clone, skeleton

    # -- the graph

    def build(self, skeleton: Any) -> None:
        leaves = [leaf for name in self.arguments for leaf in self.read(name)]
        env = dict(zip(self.source.graph.find_nodes(op="placeholder"), leaves))
        for given, leaf in env.items():
            leaf.meta["val"] = given.meta["val"]
        self.graph.output(self.container(skeleton, self.inline(self.source, env)))
        self.graph.eliminate_dead_code()
        self.mark_modules()

    def read(self, name: str) -> list[fx.Node]:
        """The placeholder of a parameter, checked, and its tensors."""
        parameter, value = self.parameters[name], self.arguments[name]
        stars = VARIADIC.get(parameter.kind, "")
        optional = parameter.default is not parameter.empty or parameter.kind is parameter.KEYWORD_ONLY
        default = (parameter.default if isinstance(parameter.default, PLAIN) else None,) if optional else ()
        node = self.graph.create_node("placeholder", stars + name, default, {}, name)
        fixed = form(value, lambda t, axis: axis == 0 and any(free and t is u for u, free in zip(self.tensors, self.varies)))
        node = self.graph.call_function(checked, (node, stars + name, fixed))
        found: list[fx.Node] = []

        def descend(value: Any, node: fx.Node) -> None:
            kind, held = items(value) or ("", {})
            if isinstance(value, Tensor):
                found.append(node)
            for key, item in held.items():
                if tensors_of(item):
                    get = operator.getitem if kind == "items" else getattr
                    descend(item, self.graph.call_function(get, (node, key)))

        descend(value, node)
        return found

    def inline(self, source: fx.GraphModule, env: dict[fx.Node, Any]) -> Any:
        """Copy the nodes of `source`, whose placeholders are in `env`, into the graph; returns its output."""
        for node in source.graph.nodes:
            if node.op == "output":
                return fx.map_arg(node.args[0], env.__getitem__)
            if node.op == "placeholder":
                continue
            if node.op == "get_attr":
                env[node] = self.attribute(source, node)
            elif opened(node):
                held = REGIONS[node.target.name()]
                body = getattr(source, node.args[held].target)
                inner = dict(zip(body.graph.find_nodes(op="placeholder"), fx.map_arg(node.args[held + 1 :], env.__getitem__)))
                result = self.inline(body, inner)
                if node.target.name() == "wrap_with_set_grad_enabled" and not node.args[0]:
                    result = fx.map_arg(result, lambda n: self.graph.call_function(aten.detach.default, (n,)))
                env[node] = result
            elif node.target is operator.getitem and not isinstance(env.get(node.args[0]), fx.Node):
                env[node] = env[node.args[0]][node.args[1]]  # of a region's outputs
            elif node.target in NO_OPS:
                env[node] = env[node.args[0]]
            elif node.target not in ASSERTIONS:
                env[node] = self.graph.node_copy(node, env.__getitem__)
                calls, kept = self.calls(node), ("val", "stack_trace")
                env[node].meta = {**{k: node.meta.get(k) for k in kept}, "calls": calls, "nn_module_stack": dict(calls)}
        return None

    def attribute(self, source: fx.GraphModule, node: fx.Node) -> fx.Node | None:
        """A tensor or a subgraph, which the clone is given where it has it not."""
        path, _, name = str(node.target).rpartition(".")
        held = operator.attrgetter(str(node.target))(source)
        if isinstance(held, fx.GraphModule) and all(map(opened, node.users)):
            return None
        try:
            operator.attrgetter(str(node.target))(self.clone)
        except AttributeError:
            owner = self.clone.get_submodule(path)
            owner.register_buffer(name, held, False) if isinstance(held, Tensor) else owner.add_module(name, held)
        return self.graph.get_attr(str(node.target))

    def calls(self, node: fx.Node) -> tuple[tuple[str, tuple[str, type]], ...]:
        """The module calls that `node` is inside, outermost first: a key for each call, the module's path and its class."""
        found = []
        for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
            if not key.startswith("_empty"):
                found.append((key, (path, type(self.module(path)))))
        return tuple(found)

    def module(self, path: str) -> nn.Module | None:
        try:
            return self.clone.get_submodule(path)
        except AttributeError:
            return None

    def mark_modules(self) -> None:
        """Pass what each module call returns through an identity under the module's name, where one tensor leaves it."""
        inside: dict[tuple, list[fx.Node]] = {}
        for node in self.graph.nodes:
            calls = node.meta.get("calls", ())
            for depth in range(1, len(calls) + 1):
                inside.setdefault(calls[:depth], []).append(node)
        for calls in sorted(inside, key=len, reverse=True):
            depth, (path, _) = len(calls), calls[-1][1]
            outside = [(n, u) for n in inside[calls] for u in n.users if u.meta.get("calls", ())[:depth] != calls]
            left = {n for n, _ in outside if isinstance(n.meta.get("val"), Tensor)}
            if len(left) != 1 or not path or self.module(path) is None:
                continue
            (node,) = left
            with self.graph.inserting_after(node):
                mark = self.graph.call_module(path, (node,))
            mark.meta = {**node.meta, "calls": calls[:-1]}
            for n, user in outside:
                if n is node:
                    user.replace_input_with(node, mark)
            for d in range(1, depth):
                inside[calls[:d]].append(mark)
            self.clone.get_submodule(path).__dict__["forward"] = passes

    def container(self, value: Any, outputs: Any) -> Any:
        """The output's containers round `outputs`; those that a graph cannot hold are made by a call of their class."""
        if isinstance(value, Slot):
            return outputs[value.index]
        kind, held = items(value) or ("", {})
        inner = {key: self.container(item, outputs) for key, item in held.items()}
        match value:
            case _ if not kind:
                return value
            case _ if kind == "fields" or hasattr(value, "to_tuple"):
                return self.graph.call_function(type(value), (), inner)
            case Mapping():
                return inner if type(value) is dict else self.graph.call_function(type(value), (inner,))
            case _ if hasattr(value, "_fields"):
                return self.graph.call_function(type(value), tuple(inner.values()))
        return list(inner.values()) if isinstance(value, list) else tuple(inner.values())


BATCH = r"L\['tensors'\]\[\d+\]\.size\(\)\[0\]"


SAME_BATCH = re.compile(f"{BATCH} == {BATCH}")


# Regions of a forward and where their body is among the operands. Inside the explainer's own autocast they are under it.
REGIONS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}


NO_OPS = (aten.lift_fresh_copy.default, aten.lift_fresh.default, aten.detach_.default, aten.alias.default)


ASSERTIONS = (
    *(aten._assert_scalar.default, aten._assert_tensor_metadata.default, aten._assert_async.msg, aten._assert_async.default),
    *(aten.sym_constrain_range.default, aten.sym_constrain_range_for_size.default),
)


def opened(node: fx.Node) -> bool:
    """Whether a node is a region that can be copied into the graph: autocast that is on changes what is computed."""
    if not isinstance(node.target, torch._ops.HigherOrderOperator) or node.target.name() not in REGIONS:
        return False
    return node.target.name() != "wrap_with_autocast" or not node.args[2]


@contextlib.contextmanager
def all_require_grad(module: nn.Module) -> Iterator[None]:
    """Otherwise PyTorch's transformer layers call a fused op, which hides their gates."""
    frozen = [p for p in module.parameters() if p.is_floating_point() and not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(True)
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)
