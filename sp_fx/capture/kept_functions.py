"""Functions that a trace keeps as one call: an `autograd.Function`, whose backward would be lost if the trace went into its
forward, and the gates that users have registered.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import itertools
import operator
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import rnn
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils.checkpoint import CheckpointFunction

from ..containers import decoded, rebuilt
from ..gates.registry import FUNCTIONS, STAND_INS, call_registered, calls_pass_on, marked, named, registered, twin
from .capture import CaptureError
from .clones.untouched import names_in
from .tracing.applies import applies, by_class

APPLIED: dict[str, type[torch.autograd.Function]] = {}  # those that a trace has met, by module and name


def applied(name: str, *args: Any, **kwargs: Any) -> Any:
    """`Function.apply`, as a graph has it.

    Raises:
        LookupError: no such class in this process, which has unpickled the graph.
    """
    if has_torch_function(args):  # in a trace of a model that it is a part of
        return handle_torch_function(applied, args, name, *args, **kwargs)
    if name not in APPLIED:
        module, _, path = name.partition("#")[0].partition(":")
        try:
            APPLIED[name] = operator.attrgetter(path)(importlib.import_module(module))
        except (ImportError, AttributeError) as error:
            raise LookupError(f"the autograd.Function {name} of an unpickled graph is not found here: {error}") from error
    return APPLIED[name].apply(*args, **kwargs)


@contextmanager
def functions_kept(keep: Callable[[Any, tuple, dict], Any]) -> Iterator[None]:
    """While it lasts an `autograd.Function` is what `keep(class, args, kwargs)` returns in this thread, where that is not None: a
    trace would go into its forward and lose its backward without a word. A checkpoint is the function that it is to call."""
    thread, inherited = threading.get_ident(), torch.autograd.Function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == thread:
            if cls is CheckpointFunction:
                return args[0](*args[2:])
            if cls.__module__ == CheckpointFunction.__module__:  # which holds the arguments of the other kind of checkpoint
                return torch.empty(0)
            if (kept := keep(cls, args, kwargs)) is not None:
                return kept
        return inherited.__get__(None, cls)(*args, **kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.autograd.Function.apply = inherited


def marks_dirty(cls: Any) -> bool:
    """Whether an `autograd.Function` writes over an argument, which it then has to say by `ctx.mark_dirty`."""
    return any("mark_dirty" in names_in(code) for f in (cls.forward, cls.setup_context) if (code := getattr(f, "__code__", None)))


DIRTY = "{} writes over its argument (`ctx.mark_dirty`), and no trace can follow that: let it return a new tensor"


def recorded_by(tracer: Any) -> Callable[[Any, tuple, dict], Any]:
    """What keeps a function in a symbolic trace: one call of the trace, of a function with a stand-in among its arguments."""

    def keep(cls: Any, args: tuple, kwargs: dict) -> Any:
        leaves: list[Any] = []
        rebuilt((args, kwargs), leaves.append)
        if not any(isinstance(leaf, fx.Proxy) for leaf in leaves):
            return None
        if marks_dirty(cls):
            raise tracer.known.refused(DIRTY.format(cls.__qualname__), CaptureError)
        return tracer.create_proxy("call_function", applied, (name_of_class(cls), *args), kwargs)

    return keep


def name_of_class(cls: Any) -> str:
    """The name of an `autograd.Function` in `APPLIED`, where it is from now on; classes of one name, as a function makes them
    that is called twice, are numbered."""
    plain = f"{cls.__module__}:{cls.__qualname__}"
    names = itertools.chain([plain], (f"{plain}#{number}" for number in itertools.count(2)))
    name = next(name for name in names if APPLIED.get(name, cls) is cls)
    APPLIED[name] = cls
    return name


def whole(function: Any) -> Callable:
    """`function`, as a symbolic trace records it in one call."""
    own = twin(function)  # `function` itself calls this one in a trace

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())[:1]
        return handle_torch_function(call, given, *args, **kwargs) if has_torch_function(given) else own(*args, **kwargs)

    return call


# Sequences are packed by their lengths, whose values nothing can follow; what is packed is what recurrent networks take.
PACKING: dict[Any, Callable] = {f: whole(f) for f in (rnn.pack_padded_sequence, rnn.pad_packed_sequence)}


@contextmanager
def calling_stand_ins(clone: nn.Module, exporting: bool = False) -> Iterator[None]:
    """While it lasts the modules of `clone` call the stand-in of every registered function, and functions of `autograd` by their
    classes; and while `exporting`, modules of a registered class mark their output, since an export goes into them."""
    changed: list[tuple[dict[str, Any], str, Any]] = []
    spaces = {id(space): space for m in clone.modules() for space in namespaces(m)}
    try:
        for space in spaces.values():
            for key, value in list(space.items()):
                if isinstance(value, types.BuiltinFunctionType) and value in STAND_INS:  # which has no code to exchange
                    changed.append((space, key, value))
                    space[key] = STAND_INS[value]
                elif applies(value) is not None:
                    changed.append((space, key, value))
                    space[key] = by_class(value)
        for m in clone.modules() if exporting else ():
            if (name := registered(m)) is not None and "forward" not in m.__dict__:
                inner = type(m).forward
                m.__dict__["forward"] = functools.partial(marked_forward, inner, m, name)
        with calls_pass_on(PACKING):
            yield
    finally:
        for space, key, value in changed:
            space[key] = value


def namespaces(module: nn.Module) -> list[dict[str, Any]]:
    """Returns the dictionaries in which the calls of `module` are looked up: its own attributes, and the globals of the files
    that its classes are from."""
    own = [cls.__module__ for cls in type(module).__mro__ if not cls.__module__.startswith(("torch.", "builtins"))]
    files = map(sys.modules.get, own)
    return [module.__dict__, *(file.__dict__ for file in files if file is not None)]


def marked_forward(inner: Callable, module: nn.Module, name: str, z: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The forward `inner` of a module whose class is registered as `name`, its output marked."""
    return marked(name, z, inner(module, z, *args, **kwargs), named(inner, (module, z, *args), kwargs) if args or kwargs else {})


def call_by_name(graph: fx.Graph) -> None:
    """Make calls of a registered function's stand-in, which a trace has recorded, calls by the registered name, so that no later
    trace goes into the function; and those of `PACKING` calls of the function."""
    stand_ins, packing = set(STAND_INS.values()), {call: function for function, call in PACKING.items()}
    for node in graph.nodes:
        node.target = packing.get(node.target, node.target) if node.op == "call_function" else node.target
        if node.op == "call_function" and node.target in stand_ins:
            node.args = (FUNCTIONS[node.target], *node.args)
            node.target = call_registered


@dataclasses.dataclass(frozen=True)
class Marked:
    """What a marker in an exported graph says: `output` is the registered gate `name` of `source`, by the calls `inside`, with
    the plain arguments `arguments`."""

    name: str
    arguments: dict[str, Any]
    source: fx.Node
    output: fx.Node
    inside: tuple[fx.Node, ...]


def take_markers(graph: fx.Graph) -> list[Marked]:
    """Take the markers of registered gates out of an exported graph; returns what they say."""
    taken = []
    for node in graph.find_nodes(op="call_function", target=torch.ops.sp_fx.registered.default):
        source, output, name, arguments = node.args
        inside: dict[fx.Node, None] = {}
        queue: list[Any] = [output]
        while queue:
            at = queue.pop()
            if at is not source and at not in inside and at.op not in ("placeholder", "get_attr"):
                inside[at] = None
                queue.extend(at.all_input_nodes)
        node.replace_all_uses_with(output)
        graph.erase_node(node)
        plain = decoded(ast.literal_eval(arguments))
        taken.append(Marked(name, plain, source, output, tuple(reversed(inside))))
    return taken
