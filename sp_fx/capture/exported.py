"""Capture by `torch.export`: the ATen graph of one example, before decompositions, in the form that symbolic tracing gives.

The graph has the model's own parameters for placeholders, checks what it is called with against the example, calls `aten` ops on
the tensors of an eval clone, passes the output of each module through an identity under the module's name, and returns what the
model returns. Export follows one path through the Python code of the forward, which is the right one for every input of the same
form: of the example's sizes those vary that `sizes.freedoms` names and the model allows to.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import keyword
import operator
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..containers import PLAIN, Slot, filled, items, rebuilt, tensors_of
from ..gates.calls.autocast import Region
from .admission import answered, checked, form, listed, sizes_checked
from .arguments import VARIADIC, Given, distinct
from .capture import Capture, CaptureError, asks_for_values, blame, said
from .clones.apart import Apart, apart, tensors_in, written_back
from .clones.clone import EvalClone, adopt_forward
from .clones.untouched import Untouched
from .kept_functions import applied, calling_stand_ins, functions_kept, name_of_class
from .passed import in_graph, marking, take_marks, with_marks
from .sizes import Free, batch_sizes, conditions, lead, with_batch
from .tracing.answers import Asked, Key, Tells, Told, unaware, unlogged
from .tracing.draws import note_on_draws
from .tracing.exported_functions import CALLS, Call, ExportedFunctions
from .tracing.regions import Regions, data_detached, some

aten = torch.ops.aten


def export(model: nn.Module, call: Given, free: Free) -> Capture:
    """Returns the capture of `model` on an example call, for every size of the axes that are `free`, where its forward takes one
    path for all of them; of the others, and of those that it makes constants of, for the sizes of the example.

    Raises:
        CaptureError: `torch.export` refuses it, for whatever reason, or a batch of one is a path of its own.
    """
    sizes = batch_sizes(call)
    if not tensors_of(call):
        raise CaptureError("torch.export needs a tensor among the example_inputs")
    of_one = sizes == (1,) and 0 in free[lead(call)]
    if of_one:  # torch.export takes an axis of size 1 for a constant
        call = with_batch(call, 2)
    exported = followed(model, call, free)
    if of_one and 0 not in exported.varies[lead(call)]:
        raise CaptureError("its forward makes a constant of the size of the batch")
    if sizes and 0 not in exported.varies[lead(call)]:
        exported.notes.append(f"the batch is fixed at {sizes[0]}, of which its forward makes a constant")
    notes = (*exported.notes, *exported.regions.notes(), *note_on_draws(exported.graph))
    modules, asks = with_marks(exported.clone, exported.paths), some(exported.regions.asked)
    made = (modules, exported.reference, exported.graph)
    return Capture(*made, "torch.export", notes, asks, exported.varies, ", ".join(exported.inputs))


def followed(model: nn.Module, call: Given, free: Free) -> Exported:
    """Returns the export of the way that the forward goes when it is called; where that fails, of the one that it goes when it is
    exported, where it asks; or else, where it asks for values, of the path that the example takes.

    Raises:
        CaptureError: all fail.
    """
    with unaware() as asked:
        try:
            return Exported(model, call, free)
        except Exception as error:  # whatever PyTorch or the forward raises
            failed = [error]
    if asked:
        try:
            exported = Exported(model, call, free)
            exported.notes.append(f"the forward takes its path for torch.export, since the other fails: {said(failed[0])}")
            return exported
        except Exception as error:
            failed.append(error)
    for sizes in (False, True) if any(map(asks_for_values, failed)) else ():
        try:
            with unaware():
                return Exported(model, call, free, answers_on(model, call), sizes)
        except Exception as error:
            failed.append(error)
    last = failed[-1]
    text = f"torch.export cannot capture {type(model).__name__}: {said(last)} ({blame(last)})"
    hint = OF_VALUES if asks_for_values(last) else OF_ITS_OWN if asked else OPAQUE
    hint = "" if isinstance(last, CaptureError) else hint
    raise CaptureError(f"{text}{hint}") from last


def answers_on(model: nn.Module, call: Given) -> dict[Key, list[Any]]:
    """Returns what the model is told on the example where it asks for values."""

    def answers(clone: Apart) -> dict[Key, list[Any]]:
        with all_require_grad(clone.module), torch.enable_grad(), Told() as told:
            clone(*call.args, **call.kwargs)
        return told.answers

    return apart(model, answers)


class Exported:
    """One export of a call, made into a graph over a clone.

    Attributes:
        tensors: those of the call.
        varies: the axes of each whose size does not matter: those of the `free` ones that the forward does not make constants of.
        inputs: the names and sizes of the tensors, as text: "x [*, 3]".
    """

    def __init__(
        self, model: nn.Module, call: Given, free: Free, answers: dict[Key, list[Any]] | None = None, sizes: bool = False
    ) -> None:
        """`answers`: what the forward is told where it asks for values; `sizes`: also where sizes depend on them."""
        clones = EvalClone()
        self.clone = clones(model)
        hooks = clones.hooks_left(model)
        adopt_forward(self.clone)
        if names := [n for n, _ in (*self.clone.named_modules(), *self.clone.named_parameters()) if set(n.split(".")) & WORDS]:
            raise CaptureError(f"{names[0]} has a word of Python's own for a name, which torch.export cannot write: rename it")
        self.reference = EvalClone()(self.clone)
        self.signature = inspect.signature(self.clone.forward)
        self.call, self.notes, self.inputs = distinct(call), hooks, list[str]()
        self.arguments = self.call.by_name(self.signature)
        self.tensors = tensors = tensors_of(self.call)
        self.answers, self.fixes_sizes, self.asked = answers, sizes, list[Asked]()
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
            silent = (warnings.catch_warnings(), quiet, unlogged())
            for patch in (all_require_grad(self.clone), marked, kept, data_detached(), regions, *silent):
                patches.enter_context(patch)
            warnings.simplefilter("ignore")  # about attributes that the forward sets on the clone
            dynamic = tuple(dict.fromkeys(axes, torch.export.Dim.AUTO) or None for axes in free)
            program = torch.export.export(flat, tuple(tensors), dynamic_shapes=(dynamic,), strict=False)
        before.stored.clear()  # an export copies lists and dictionaries in the attributes: a run shows what the forward changes
        self.notes += before.notes()
        self.source = program.module(check_guards=False)
        if any(getattr(node.target, "__module__", "") == "torch._functorch.predispatch" for node in self.source.graph.nodes):
            raise CaptureError("torch.export leaves a part of it under vmap, as of an associative scan")
        self.placeholders = self.source.graph.find_nodes(op="placeholder")
        shapes = [node.meta["val"].shape for node in self.placeholders]
        self.varies = tuple(frozenset(axis for axis, n in enumerate(of) if is_open(n)) for of in shapes)
        self.conditions = conditions(program)
        self.graph = fx.Graph()
        self.build(skeleton[0])
        self.graph.lint()

    def flattened(self) -> tuple[nn.Module, list[Any]]:
        """Returns the clone with a forward from the example's tensors to the output's, and a list that receives the containers of
        the output, with a slot in place of each tensor, when that forward runs."""
        forward, call = type(self.clone).forward, self.call
        skeleton: list[Any] = []

        def flat(module: nn.Module, *tensors: Tensor) -> tuple[Any, ...]:
            rest = iter(tensors)
            args, kwargs = rebuilt(call, lambda x: next(rest) if isinstance(x, Tensor) else x)
            leaves: list[Any] = []

            def slot(value: Any) -> Any:
                if isinstance(value, Tensor | torch.SymInt):
                    leaves.append(value)
                    return Slot(len(leaves) - 1)
                if not isinstance(value, (*PLAIN, torch.dtype, torch.device)):
                    self.notes.append(f"a {type(value).__name__} in its output is left out")
                    return None
                return value

            with contextlib.nullcontext() if self.answers is None else Tells(self.answers, self.fixes_sizes) as tells:
                output = forward(module, *args, **kwargs)
            skeleton[:] = [rebuilt(output, slot)]
            self.asked = [] if tells is None else tells.asked
            return (*leaves, *(t for asked in self.asked for t in asked.tensors))

        kind = type(self.clone)
        self.clone.__class__ = type(kind.__name__, (kind,), {"forward": flat, "__module__": kind.__module__})
        return self.clone, skeleton

    # -- the graph

    def build(self, skeleton: Any) -> None:
        """Make the graph: the model's own parameters, the exported calls, the containers of the output (`skeleton`)."""
        inputs = {id(t): node for name in self.signature.parameters for t, node in self.parameter(name)}
        env = {node: inputs[id(t)] for node, t in zip(self.placeholders, self.tensors)}
        for placeholder, tensor in env.items():
            tensor.meta["val"] = placeholder.meta["val"]
        if self.conditions:
            self.graph.call_function(sizes_checked, ([*env.values()], self.conditions))
        outputs = self.inline(self.source, env)
        self.ask(outputs)
        self.graph.output(in_graph(self.graph, skeleton, outputs))
        self.paths = take_marks(self.graph, self.entries)
        self.graph.eliminate_dead_code(lambda node: node.op != "call_module" and node.is_impure())

    def ask(self, outputs: Sequence[fx.Node]) -> None:
        """Add the questions that the forward asks, each after the tensors that it is about, which are the last of the outputs."""
        tensors = iter(outputs[len(outputs) - sum(len(asked.tensors) for asked in self.asked) :])
        order = {node: i for i, node in enumerate(self.graph.nodes)}
        for asked in self.asked:
            nodes = [next(tensors) for _ in asked.tensors]
            with self.graph.inserting_after(max(nodes, key=order.__getitem__)):
                self.graph.call_function(answered, (nodes, asked.name, asked.rest, asked.answer, asked.line))
        if lines := list(dict.fromkeys(asked.line for asked in self.asked)):
            more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
            self.notes.append(f"{PATH}, which is checked at each call: it asks for values at {', '.join(lines[:3])}{more}")

    def parameter(self, name: str) -> list[tuple[Tensor, fx.Node]]:
        """Add the placeholder of a parameter and the check of its form; returns the tensors in it, each with its node: of a
        parameter that is a dictionary of two tensors, two. One that the call leaves out has its default; None where a graph
        cannot hold that."""
        parameter = self.signature.parameters[name]
        stars = VARIADIC.get(parameter.kind, "")
        optional = parameter.default is not parameter.empty or parameter.kind is parameter.KEYWORD_ONLY
        default = parameter.default if isinstance(parameter.default, PLAIN) else None
        node = self.graph.create_node("placeholder", stars + name, (default,) if optional else (), {}, name)
        value = self.arguments.get(name, {"": default, "*": (), "**": {}}[stars])
        axes = {id(t): varies for t, varies in zip(self.tensors, self.varies)}
        fixed = form(value, lambda t, axis: axis in axes[id(t)])
        self.inputs += listed(fixed, name)
        node = self.graph.call_function(checked, (node, stars + name, fixed))
        tensors: list[tuple[Tensor, fx.Node]] = []

        def descend(value: Any, node: fx.Node) -> None:
            kind, members = items(value) or ("", {})
            if isinstance(value, Tensor):
                tensors.append((value, node))
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


# What to do where `torch.export` fails.
OPAQUE = ". A function that it cannot follow stays whole as an op of torch.library"
OF_ITS_OWN = (
    ". The forward asks whether it is being exported, and may go a way then that it does not go when it is called: give it "
    "arguments by which it goes the same way, such as a mask, or transform the part of the model that does not ask"
)
OF_VALUES = ". Choose between two results by torch.where, or give torch.export one path: a constant in place of the value"

PATH = "the graph is the path that the forward takes on its example"

WORDS = frozenset(keyword.kwlist)

# Regions of a forward, and which operand is their body.
REGIONS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}
NO_OPS = (aten.lift_fresh_copy.default, aten.lift_fresh.default, aten.alias.default)

ASSERTIONS = (
    *(aten._assert_scalar.default, aten._assert_tensor_metadata.default, aten._assert_async.msg, aten._assert_async.default),
    *(aten.sym_constrain_range.default, aten.sym_constrain_range_for_size.default),
)


def is_open(size: Any) -> bool:
    """Whether a size of an exported program is any, and no constant."""
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


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
