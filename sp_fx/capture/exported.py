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
import keyword
import operator
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..containers import PLAIN, Slot, filled, items, rebuilt, tensors_of
from ..gates.calls.autocast import Region
from .arguments import VARIADIC, checked, form
from .capture import Capture, CaptureError, blame, said
from .clones.apart import tensors_in, written_back
from .clones.clone import EvalClone, adopt_forward
from .clones.untouched import Untouched
from .kept_functions import applied, calling_stand_ins, functions_kept, name_of_class
from .passed import marking, take_marks, with_marks
from .tracing.draws import note_on_draws
from .tracing.exported_functions import CALLS, Call, ExportedFunctions
from .tracing.regions import Regions, data_detached, some

aten = torch.ops.aten


def batch_sizes(example: Mapping[str, Any]) -> torch.Size:
    """Returns the size of axis 0 of the example's first floating tensor, or else of its first tensor; `[]` for one of no axes.

    Raises:
        CaptureError: the example has no tensor.
    """
    tensors = tensors_of(example)
    if not tensors:
        raise CaptureError("torch.export needs a tensor among the example_inputs")
    return next((t for t in tensors if t.is_floating_point()), tensors[0]).shape[:1]


def export(model: nn.Module, example: Mapping[str, Any], any_batch: bool) -> Capture:
    """Returns the capture of `model` on `example`, its arguments by name: for `any_batch`, or for the example's batch alone.

    Raises:
        CaptureError: `torch.export` refuses it, for whatever reason, or its forward is another one for another batch.
    """
    sizes = batch_sizes(example)
    if any_batch:  # torch.export takes an axis of size 1 for a constant
        example = with_batch(example, sizes, max(*sizes, 2))
    try:
        with unaware() as asked:
            exported = Exported(model, example, sizes, any_batch)
    except Exception as first:  # whatever PyTorch or the forward raises: the model is asked once more, or it is refused
        try:
            if not asked:
                raise
            exported = Exported(model, example, sizes, any_batch)
        except Exception as error:
            text = f"torch.export cannot capture {type(model).__name__}: {said(error)} ({blame(error)})"
            hint = "" if isinstance(error, CaptureError) else OF_VALUES if "data-dependent" in str(error) else OPAQUE
            raise CaptureError(f"{text}{hint}") from error
        exported.notes.append(f"the forward takes its path for torch.export, since the other fails: {said(first)}")
    notes = (*exported.notes, *exported.regions.notes(), *note_on_draws(exported.graph))
    modules, asks = with_marks(exported.clone, exported.paths), some(exported.regions.asked)
    return Capture(modules, exported.reference, exported.graph, "torch.export", notes, asks)


@contextlib.contextmanager
def unaware() -> Iterator[list[bool]]:
    """While it lasts, a model that asks whether it is being exported hears that it is not, and goes the way that it goes when it
    is called: some go another one, which is equal but for rounding. Whether it is being compiled is answered truly: where it is,
    libraries keep tensors out of caches that outlive the trace. Yields a list that is not empty once the model has asked."""
    question, code = torch.compiler.is_exporting, torch.compiler.is_exporting.__code__
    asked: list[bool] = []
    question.__code__ = answer.__code__  # libraries keep the function by names of their own: kornia's `_torch_is_exporting`
    question.__defaults__ = (asked, lambda: torch.compiler._is_exporting_flag, sys._getframe)
    try:
        yield asked
    finally:
        question.__code__, question.__defaults__ = code, None


def answer(asked: list[bool], truth: Callable[[], bool], frame: Callable[[int], types.FrameType]) -> bool:
    """The truth, where PyTorch itself asks: the code of `torch.compiler.is_exporting`, with its arguments for defaults."""
    if frame(1).f_globals.get("__name__", "").partition(".")[0] == "torch":
        return truth()
    asked.append(True)
    return False


def with_batch(example: Any, sizes: torch.Size, size: int) -> Any:
    """Returns the example with `size` samples: its first ones, or all of them again. Tensors that do not have `sizes` on axis 0
    stay."""

    def change(t: Any) -> Any:
        if not isinstance(t, Tensor) or t.shape[:1] != sizes:
            return t
        return t[:size] if size <= sizes[0] else torch.cat([t] * size)[:size]

    return rebuilt(example, change)


def distinct(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments with a copy for every tensor that comes again: of `(x, x)`, torch.export makes one input, and takes
    `query is key` for a property of the model."""
    seen: list[Tensor] = []

    def one(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            leaf = leaf.detach().clone() if any(leaf is other for other in seen) else leaf
            seen.append(leaf)
        return leaf

    return {name: rebuilt(value, one) for name, value in arguments.items()}


class Exported:
    """One export, made into a graph over a clone.

    With `varying` it is for all sizes of axis 0 of those arguments whose axis 0 has `sizes`, the batch of the example.
    """

    def __init__(self, model: nn.Module, arguments: Mapping[str, Any], sizes: torch.Size, any_batch: bool) -> None:
        clones = EvalClone()
        self.clone = clones(model)
        hooks = clones.hooks_left(model)
        adopt_forward(self.clone)
        if names := [n for n, _ in (*self.clone.named_modules(), *self.clone.named_parameters()) if set(n.split(".")) & WORDS]:
            raise CaptureError(f"{names[0]} has a word of Python's own for a name, which torch.export cannot write: rename it")
        self.reference = EvalClone()(self.clone)
        self.parameters = inspect.signature(self.clone.forward).parameters
        self.arguments, self.notes = distinct(arguments), hooks
        self.tensors = tensors = tensors_of(self.arguments)
        batch = max(*sizes, 2) if any_batch else None
        self.free = [t.dim() > 0 and t.shape[0] == batch for t in tensors]
        flat, skeleton = self.flattened()
        quiet = contextlib.redirect_stderr(io.StringIO())  # where torch.export prints as much of a graph as it got
        marked = calling_stand_ins(self.clone, exporting=True)
        self.regions, self.functions = Regions(), ExportedFunctions()
        before = Untouched(model, self.clone)
        with contextlib.ExitStack() as patches:
            kept = functions_kept(self.functions.keep)
            regions = self.regions.followed()
            self.entries = patches.enter_context(marking(self.clone))
            patches.enter_context(before.restored())
            patches.enter_context(written_back((*tensors_in(self.clone), *before.tensors())))
            for patch in (all_require_grad(self.clone), marked, kept, data_detached(), regions, warnings.catch_warnings(), quiet):
                patches.enter_context(patch)
            warnings.simplefilter("ignore")  # about attributes that the forward sets on the clone
            dynamic = tuple({0: torch.export.Dim.AUTO} if free else None for free in self.free)
            program = torch.export.export(flat, tuple(tensors), dynamic_shapes=(dynamic,), strict=False)
        before.stored.clear()  # an export copies lists and dictionaries in the attributes: a run shows what the forward changes
        self.notes += before.notes()
        if any_batch:
            self.require_any_batch(program)
        self.source = program.module(check_guards=False)
        self.graph = fx.Graph()
        self.build(skeleton[0])
        self.graph.lint()

    def require_any_batch(self, program: torch.export.ExportedProgram) -> None:
        """Raise CaptureError where the program is for one batch alone: `x.view(4, -1)` makes a constant of it."""
        inputs = [n for n in program.graph.find_nodes(op="placeholder") if n.name in program.graph_signature.user_inputs]
        if any(free and isinstance(n.meta["val"].shape[0], int) for n, free in zip(inputs, self.free)):
            raise CaptureError("its forward makes a constant of the size of the batch")
        branches = [guard for guard in program._guards_code if not SAME_BATCH.fullmatch(guard)]
        if branches:
            raise CaptureError(f"its forward branches on the size of the batch: {branches[0]}")

    def flattened(self) -> tuple[nn.Module, list[Any]]:
        """Returns the clone with a forward from the example's tensors to the output's, and a list that receives the containers of
        the output, with a slot in place of each tensor, when that forward runs."""
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
        """Make the graph: the model's own parameters, the exported calls, the containers of the output (`skeleton`)."""
        tensors = [tensor for name in self.arguments for tensor in self.parameter(name)]
        env = dict(zip(self.source.graph.find_nodes(op="placeholder"), tensors))
        for placeholder, tensor in env.items():
            tensor.meta["val"] = placeholder.meta["val"]
        self.graph.output(self.container(skeleton, self.inline(self.source, env)))
        self.paths = take_marks(self.graph, self.entries)
        self.graph.eliminate_dead_code(lambda node: node.op != "call_module" and node.is_impure())

    def parameter(self, name: str) -> list[fx.Node]:
        """Add the placeholder of a parameter and the check of its form; returns the nodes of the tensors in it: of a parameter
        that is a dictionary of two tensors, two."""
        parameter, value = self.parameters[name], self.arguments[name]
        stars = VARIADIC.get(parameter.kind, "")
        optional = parameter.default is not parameter.empty or parameter.kind is parameter.KEYWORD_ONLY
        default = (parameter.default if isinstance(parameter.default, PLAIN) else None,) if optional else ()
        node = self.graph.create_node("placeholder", stars + name, default, {}, name)
        fixed = form(value, lambda t, axis: axis == 0 and any(free and t is u for u, free in zip(self.tensors, self.free)))
        node = self.graph.call_function(checked, (node, stars + name, fixed))
        tensors: list[fx.Node] = []

        def descend(value: Any, node: fx.Node) -> None:
            kind, members = items(value) or ("", {})
            if isinstance(value, Tensor):
                tensors.append(node)
            for key, item in members.items():
                if tensors_of(item):
                    get = operator.getitem if kind == "items" else getattr
                    descend(item, self.graph.call_function(get, (node, key)))

        descend(value, node)
        return tensors

    def inline(self, source: fx.GraphModule, env: dict[fx.Node, Any], autocast: Region = ()) -> Any:
        """Copy the nodes of `source`, whose placeholders are in `env`, into the graph; returns its output. Its nodes have the
        `autocast` that they are under in `meta`."""
        for node in source.graph.nodes:
            if node.op == "output":
                return fx.map_arg(node.args[0], env.__getitem__)
            if node.op == "placeholder":
                continue
            if node.op == "get_attr":
                env[node] = self.attribute(source, node)
            elif opened(node):
                at = REGIONS[node.target.name()]
                body = getattr(source, node.args[at].target)
                inner = dict(zip(body.graph.find_nodes(op="placeholder"), fx.map_arg(node.args[at + 1 :], env.__getitem__)))
                if node.target.name() == "wrap_with_autocast":
                    device, dtype, enabled = node.args[:3]
                    of_others = tuple(r for r in autocast if r[0] != device)
                    env[node] = self.inline(body, inner, (*of_others, (device, dtype, enabled)))
                else:
                    result = self.inline(body, inner, autocast)
                    env[node] = result if node.args[0] else fx.map_arg(result, self.stopped)
            elif node.target is operator.getitem and not isinstance(env.get(node.args[0]), fx.Node):
                env[node] = env[node.args[0]][node.args[1]]  # of a region's outputs
            elif node.target is aten.detach_.default:
                env[node] = env[node.args[0]] = self.stopped(env[node.args[0]])
            elif node.target in NO_OPS:
                env[node] = env[node.args[0]]
            elif node.target not in ASSERTIONS:
                calls, meta = self.calls(node), {key: node.meta.get(key) for key in ("val", "stack_trace")}
                meta = {**meta, "calls": calls, "nn_module_stack": dict(calls), "autocast": autocast}
                if node.target is torch.ops.sp_fx.applied.default:
                    env[node] = self.applied(CALLS[node.args[1]], fx.map_arg(node.args[0], env.__getitem__), meta)
                else:
                    env[node] = self.graph.node_copy(node, env.__getitem__)
                    env[node].meta = meta
        return None

    def applied(self, call: Call, tensors: Any, meta: dict[str, Any]) -> list[fx.Node]:
        """Adds a call of an `autograd.Function`; returns the nodes of the tensors that it returns."""
        args, kwargs = filled(call.arguments, tensors)
        node = self.graph.call_function(applied, (name_of_class(call.cls), *args), kwargs)
        node.meta = {**meta, "val": None}
        parts = [node]
        if not isinstance(call.outputs, Slot):
            at = [i for i, output in enumerate(call.outputs) if isinstance(output, Slot)]
            parts = [self.graph.call_function(operator.getitem, (node, i)) for i in at]
        for part, value in zip(parts, meta["val"]):
            part.meta = {**meta, "val": value}
        return parts

    def stopped(self, node: fx.Node) -> fx.Node:
        """Returns what `node` is without its gradient."""
        self.regions.stop(node)
        return self.graph.call_function(aten.detach.default, (node,))

    def attribute(self, source: fx.GraphModule, node: fx.Node) -> fx.Node | None:
        """Returns a node for a tensor or a subgraph of `source`, which is added to the clone where the clone has none of that
        name; None for the body of a region that is copied into the graph."""
        path, _, name = str(node.target).rpartition(".")
        attribute = operator.attrgetter(str(node.target))(source)
        if isinstance(attribute, fx.GraphModule) and all(map(opened, node.users)):
            return None
        try:
            operator.attrgetter(str(node.target))(self.clone)
        except AttributeError:
            owner = self.clone.get_submodule(path)
            if isinstance(attribute, Tensor):
                owner.register_buffer(name, attribute, False)
            else:
                owner.add_module(name, attribute)
        return self.graph.get_attr(str(node.target))

    def calls(self, node: fx.Node) -> tuple[tuple[str, tuple[str, type]], ...]:
        """Returns the module calls that `node` is inside, the outermost first: a key of the call, the module's path and class."""
        calls = []
        for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
            if not key.startswith("_empty"):
                calls.append((key, (path, type(self.module(path)))))
        return tuple(calls)

    def module(self, path: str) -> nn.Module | None:
        """Returns the module of the clone at `path`, if there is one."""
        try:
            return self.clone.get_submodule(path)
        except AttributeError:
            return None

    def container(self, value: Any, outputs: Any) -> Any:
        """Returns the output's containers round the nodes `outputs`; those that a graph cannot hold, such as dataclasses, are
        made by a call of their class."""
        if isinstance(value, Slot):
            return outputs[value.index]
        kind, members = items(value) or ("", {})
        inner = {key: self.container(item, outputs) for key, item in members.items()}
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


# What to do where `torch.export` fails.
OPAQUE = ". A function that it cannot follow stays whole as an op of torch.library"
OF_VALUES = ". Choose between two results by torch.where, or give torch.export one path: a constant in place of the value"

# A guard of the exported program that only says that two inputs have one batch.
BATCH = r"L\['tensors'\]\[\d+\]\.size\(\)\[0\]"
SAME_BATCH = re.compile(f"{BATCH} == {BATCH}")

WORDS = frozenset(keyword.kwlist)

# Regions of a forward, and which operand is their body.
REGIONS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}
NO_OPS = (aten.lift_fresh_copy.default, aten.lift_fresh.default, aten.alias.default)

ASSERTIONS = (
    *(aten._assert_scalar.default, aten._assert_tensor_metadata.default, aten._assert_async.msg, aten._assert_async.default),
    *(aten.sym_constrain_range.default, aten.sym_constrain_range_for_size.default),
)


def opened(node: fx.Node) -> bool:
    """Whether a node is a region, whose body is copied into the graph."""
    return isinstance(node.target, torch._ops.HigherOrderOperator) and node.target.name() in REGIONS


@contextlib.contextmanager
def all_require_grad(module: nn.Module) -> Iterator[None]:
    """While it lasts every parameter of `module` requires grad; else PyTorch's transformer layers call a fused op, which hides
    their gates."""
    frozen = [p for p in module.parameters() if p.is_floating_point() and not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(True)
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)
