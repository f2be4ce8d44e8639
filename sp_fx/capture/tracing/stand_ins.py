"""What a symbolic trace passes through a forward in place of tensors, and what it answers when the forward asks.

A stand-in records what is done to it: `h += 1` as the in-place call that it is. Asked what it is (`isinstance(h, Tensor)`,
`hasattr(h, "tensors")`), it answers as the thing in its place would, where the call that made it says what that is. Asked what it
is worth (`if self.flag:`, `range(self.size)`), it answers where no input had a part in it: a buffer is a setting then, which the
graph has as it was at the trace. Everything else is refused, and stays refused where the forward catches the error.
"""

from __future__ import annotations

import functools
import operator
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...containers import items
from ..capture import CaptureError, line_of_caller
from .schemas import IN_PLACE, is_seeded, leaf_returns, name_of, of_arithmetic, of_attribute, returned, writes

IMMUTABLE = (bool, int, float, complex, str, tuple, type(None), torch.dtype, torch.device)


class StandIn(fx.Proxy):
    """Stands in a trace for a tensor, or for what the forward makes of one: a size, a tuple."""

    tracer: Any

    def __getattr__(self, name: str) -> Any:
        known = self.tracer.known
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        if name == "register_hook":
            raise known.refused("the forward hooks the gradient of an activation, as `h.register_hook` does", CaptureError)
        cls = known.class_of(self)
        named = cls is None or cls is tuple or hasattr(cls, name)  # the tuples of `torch.max` and its like have names
        if not named and not known.has(self, name):
            raise AttributeError(f"'{cls.__name__}' object has no attribute '{name}'")
        return Attribute(self, name)

    @classmethod
    def __torch_function__(cls, orig_method: Any, types: Any, args: Any = None, kwargs: Any = None) -> Any:
        if orig_method is Tensor.__setitem__:  # of a tensor that is there, as one that is not has it: an item set
            tracer = next(a.tracer for a in flat((args, kwargs or {})) if isinstance(a, StandIn))
            return tracer.create_proxy("call_function", operator.setitem, args, kwargs or {})
        return super().__torch_function__(orig_method, types, args, kwargs)

    def __setitem__(self, key: Any, value: Any) -> None:
        raise self.tracer.known.refused("the forward sets items of a tensor in place, as `h[...] = v` does", CaptureError)

    def __len__(self) -> int:
        known = self.tracer.known
        of_tensor = issubclass(known.class_of(self) or type(None), Tensor)  # whose length is in its shape
        return known.worth(self.shape, "asks for")[0] if of_tensor else len(known.worth(self, "asks for the length of"))

    def __int__(self) -> int:
        return int(self.tracer.known.worth(self, "makes a number of"))

    def __float__(self) -> float:
        return float(self.tracer.known.worth(self, "makes a number of"))

    def __index__(self) -> int:  # PyTorch's own calls ask everything for it: no trace is refused for that
        try:
            return operator.index(self.tracer.known.constant(self.node))
        except LookupError:
            text = "the forward uses what it computes of its inputs, such as h.shape[1], as a plain number: in range(), say"
            raise TypeError(text) from None


class Attribute(StandIn, fx.proxy.Attribute):
    """An attribute of a stand-in, such as `h.shape` or the method `h.view`. It is a call of the graph once it is used."""


def _in_place(function: Any) -> Any:
    plain = getattr(operator, f"__{function.__name__[1:]}__")

    def impl(self: StandIn, other: Any) -> Any:
        cls = self.tracer.known.class_of(self)
        rebinds = cls is not None and issubclass(cls, IMMUTABLE)  # `n += 1` of a size makes another number
        return self.tracer.create_proxy("call_function", plain if rebinds else function, (self, other), {})

    return impl


for _function in IN_PLACE - {operator.setitem}:  # there is no `@=` in place: tensors fall back on `h = h @ w`
    setattr(StandIn, f"__{_function.__name__}__", _in_place(_function))


def flat(value: Any) -> list[Any]:
    """The leaves of the plain containers in the arguments of a call."""
    match value:
        case list() | tuple():
            return [leaf for item in value for leaf in flat(item)]
        case dict():
            return flat(list(value.values()))
        case slice():
            return [value.start, value.stop, value.step]
    return [value]


class Known:
    """What is known, while a forward is traced, of the things that stand-ins are there for.

    Attributes:
        baked: the names of the parameters and buffers whose values the forward has asked for.
        refusals: the errors that were raised where it asked for what is not known; the forward may have caught them.
    """

    def __init__(self, root: nn.Module, example: Mapping[str, Any] | None, annotations: Mapping[str, Any]) -> None:
        self.root, self.example = root, example
        self.annotated = {name for name, a in annotations.items() if a in (Tensor, "Tensor", "torch.Tensor")}
        self.tensors = {**dict(root.named_parameters(remove_duplicate=False)), **dict(root.named_buffers(remove_duplicate=False))}
        self.baked: dict[str, None] = {}
        self.refusals: list[Exception] = []
        self._classes: dict[fx.Node, type | None] = {}
        self._values: dict[fx.Node, Any] = {}

    # -- what it is

    def class_of(self, thing: Any) -> type | None:
        """The class of what a stand-in or a node stands for; None where that is not known."""
        if isinstance(thing, Attribute) and thing._node is None:
            return self._of_attribute(self.class_of(thing.root), thing.attr)
        node = thing.node if isinstance(thing, fx.Proxy) else thing
        if not isinstance(node, fx.Node):
            return type(node)
        if node not in self._classes:
            self._classes[node] = self._made_by(node)
        return self._classes[node]

    def _made_by(self, node: fx.Node) -> type | None:
        if node.op == "placeholder":
            if self.example is not None and str(node.target).lstrip("*") in self.example:
                return type(self._example(node))
            return Tensor if node.target in self.annotated else None
        if node.op == "get_attr":
            return type(self._stored(node))
        if node.op == "call_module":
            leaf = self.root.get_submodule(str(node.target))
            opened = len(node.args) == 1 and not node.kwargs and leaf_returns(leaf) is None
            return self.class_of(node.args[0]) if opened else leaf_returns(leaf)
        if node.target is getattr:
            of_example = self._example(node)
            return self._of_attribute(self.class_of(node.args[0]), str(node.args[1])) if of_example is None else type(of_example)
        if node.target is operator.getitem:
            return self._of_item(node)
        if getattr(node.target, "__module__", "") == "_operator":
            classes = [self.class_of(arg) for arg in node.args]
            if Tensor in classes or any(c is not None and issubclass(c, Tensor) for c in classes):
                return Tensor
            return of_arithmetic(node.target, classes)
        if node.op == "call_method" and not self._is_method_of_tensors(node):
            return None
        if name_of(node.target) == "detach" and not isinstance(node.target, str):
            return self.class_of(node.args[0])
        return returned(node.target, node.args, node.kwargs)

    def _is_method_of_tensors(self, node: fx.Node) -> bool:
        cls, name = self.class_of(node.args[0]), str(node.target)
        if cls is None:  # an input that may be anything: `flatten` is a method of tensors alone, `split` also of a str
            return hasattr(Tensor, name) and not any(hasattr(other, name) for other in (dict, list, tuple, str))
        return issubclass(cls, Tensor)

    def _of_attribute(self, cls: type | None, name: str) -> type | None:
        if cls is None or not issubclass(cls, Tensor):  # an input that may be anything has a shape as tensors have it, if any
            return of_attribute(name) if cls is None else None
        return of_attribute(name)

    def _of_item(self, node: fx.Node) -> type | None:
        whole, index = node.args
        if (value := self._example(node)) is not None:
            return type(value)
        cls = self.class_of(whole)
        if cls is torch.Size:
            return torch.Size if isinstance(index, slice) else int
        if cls is tuple and isinstance(whole, fx.Node) and not isinstance(index, slice):  # tensors, as far as ops return them
            return None if whole.op == "call_module" else Tensor
        return Tensor if cls is not None and issubclass(cls, Tensor) else None

    def _example(self, node: Any) -> Any:
        """What the example has for an input, or for a part of one that is a container; None of everything else."""
        if not isinstance(node, fx.Node) or self.example is None:
            return None
        if node.op == "placeholder":
            return self.example.get(str(node.target).lstrip("*"))
        if node.target in (getattr, operator.getitem) and not isinstance(whole := self._example(node.args[0]), Tensor):
            parts = None if whole is None else items(whole)
            return None if parts is None else parts[1].get(node.args[1])
        return None

    def has(self, thing: StandIn, name: str) -> bool:
        """Whether a parameter or buffer has an attribute that tensors have not."""
        node = None if isinstance(thing, Attribute) else thing.node
        return node is not None and node.op == "get_attr" and hasattr(self._stored(node), name)

    def required_class(self, thing: StandIn, question: str) -> type:
        """The class of what a stand-in stands for.

        Raises:
            TraceError: it is not known.
        """
        if (cls := self.class_of(thing)) is None:
            raise self.refused(f"{question} {described(thing)}, which is not known from how it was made")
        return cls

    # -- what it is worth

    def worth(self, thing: StandIn, asks: str) -> Any:
        """The value of what a stand-in stands for, if no input has a part in it.

        Raises:
            TraceError: an input has.
        """
        try:
            return self.constant(thing.node)
        except LookupError as error:
            raise self.refused(f"the forward {asks} {described(thing)}{error.args[0] if error.args else ''}") from None

    def constant(self, node: fx.Node) -> Any:
        """The value of a node that depends on parameters and buffers alone.

        Raises:
            LookupError: it does not, or cannot be computed; the message has a reason, if there is more than that.
        """
        makers = self._makers(node, lambda n: n.all_input_nodes)
        for n in makers:
            over = [user for user in n.users if user.op in ("call_function", "call_method") and writes(user.target, user.kwargs)]
            if any(user.args and user.args[0] is n for user in over):
                raise LookupError(f", writes over {n.target if n.op == 'get_attr' else n.name} and reads it as a constant")
            drawn = n.op in ("call_function", "call_method") and is_seeded(n.target, n.args, n.kwargs)
            if drawn or n.op in ("placeholder", "call_module"):
                raise LookupError
        for n in sorted(makers):
            if n not in self._values:
                self._values[n] = self._computed(n)
        about = self._makers(node, lambda n: [] if self.is_about_shape(n) else n.all_input_nodes)
        self.baked |= {str(n.target): None for n in about if n.op == "get_attr"}
        return self._values[node]

    def _makers(self, node: fx.Node, inputs: Callable[[fx.Node], list[fx.Node]]) -> list[fx.Node]:
        """Returns `node` and all that it was made of."""
        makers = {node: None}
        queue = [node]
        while queue:
            new = [n for n in inputs(queue.pop()) if n not in makers]
            makers |= dict.fromkeys(new)
            queue += new
        return list(makers)

    def _stored(self, node: fx.Node) -> Any:
        """What the model has where a node reads an attribute; not by `getattr`, for which modules give stand-ins now."""
        path, _, name = str(node.target).rpartition(".")
        owner = self.root.get_submodule(path)
        return self.tensors.get(str(node.target), {**owner._modules, **owner.__dict__}.get(name))

    def is_about_shape(self, node: fx.Node) -> bool:
        """Whether a node has a shape, dtype or device of a tensor, which says nothing of the tensor's values."""
        of_tensor = bool(node.all_input_nodes) and issubclass(self.class_of(node.all_input_nodes[0]) or Tensor, Tensor)
        return of_tensor and self.class_of(node) in (int, torch.Size, torch.dtype, torch.device)

    def _computed(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return self._stored(node)
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._values.__getitem__)
        try:
            with torch.no_grad():
                if isinstance(node.target, str):
                    return getattr(args[0], node.target)(*args[1:], **kwargs)
                return node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception as error:  # whatever the model's own call raises: it would do so when the model runs
            raise LookupError(f": {error}") from error

    def refused(self, reason: str, kind: type[Exception] = fx.proxy.TraceError) -> Exception:
        """The error of a question that has no answer, or of a call that no graph may have (a `CaptureError`). It stays in
        `refusals`, whatever the forward does with it."""
        error = kind(reason)
        error.line = line_of_caller()  # type: ignore[attr-defined]  # which no traceback has, where the forward catches it
        self.refusals.append(error)
        return error


def described(thing: StandIn) -> str:
    """What a stand-in is, for a message: "`x`, an input", "a size", "what `relu` returned"."""
    known = thing.tracer.known
    node = thing.node
    if node.op == "placeholder":
        return f"the input {node.target}"
    root = node
    while not known.is_about_shape(root) and root.all_input_nodes and getattr(root.target, "__module__", "") == "_operator":
        root = root.all_input_nodes[0]
    if known.is_about_shape(root):
        return f"the {root.args[1] if root.target is getattr else root.target} of a tensor"
    if root.op == "placeholder":
        return f"the values of the input {root.target}"
    if root.target is getattr:
        return f"the attribute {root.args[1]}"
    return f"what {name_of(root.target).strip('_')} returns" if root.op.startswith("call_") else f"the values of {root.target}"


# -- questions that Python answers from the object itself


@contextmanager
def questions_answered(known: Known, clone: nn.Module) -> Iterator[None]:
    """While it lasts `isinstance`, `hasattr` and `callable` have the answers of `known` for stand-ins, in every file that is
    loaded but Python's, PyTorch's and this package's; and `type` in the files of the model's own classes.

    A stand-in with a `__class__` of its own would be simpler, and PyTorch's C++ would take it for a tensor: a crash.
    """

    def is_instance(thing: Any, classes: Any) -> bool:
        if type(thing) not in (StandIn, Attribute) or isinstance(thing, classes):
            return isinstance(thing, classes)
        return issubclass(known.required_class(thing, "the forward asks for the class of"), classes)

    def has_attribute(thing: Any, name: str) -> bool:
        if type(thing) not in (StandIn, Attribute):
            return hasattr(thing, name)
        cls = known.required_class(thing, question := f"the forward asks for an attribute {name!r} of")
        if cls is tuple and not hasattr(tuple, name):
            raise known.refused(f"{question} {described(thing)}, a tuple")
        return hasattr(cls, name) or known.has(thing, name)

    def is_callable(thing: Any) -> bool:
        if type(thing) not in (StandIn, Attribute):
            return callable(thing)
        if isinstance(thing, Attribute) and thing._node is None:
            return of_attribute(thing.attr) is None
        cls = known.required_class(thing, "the forward asks whether one can call")
        return any("__call__" in vars(base) for base in cls.__mro__)

    class TypeOf(type):
        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            if len(args) == 1 and type(args[0]) in (StandIn, Attribute):
                return known.required_class(args[0], "the forward asks for the class of")
            return type(*args, **kwargs)

        def __instancecheck__(cls, thing: Any) -> bool:
            return isinstance(thing, type)

    type_of = TypeOf("type", (), {})
    asked = [("isinstance", is_instance), ("hasattr", has_attribute), ("callable", is_callable)]
    of_own = [*asked, ("type", type_of)]
    own = {id(vars(file)) for m in clone.modules() for c in type(m).__mro__ if (file := sys.modules.get(c.__module__))}
    changed: list[tuple[dict[str, Any], str]] = []
    try:
        for name, file in list(sys.modules.items()):  # thousands, so that every step counts
            if is_closed(name) or not isinstance(file, types.ModuleType):
                continue
            space = file.__dict__
            for key, answer in of_own if id(space) in own else asked:
                if key not in space:
                    space[key] = answer
                    changed.append((space, key))
        yield
    finally:
        for space, key in changed:
            del space[key]


@functools.cache
def is_closed(name: str) -> bool:
    """Whether the file of that name is Python's, PyTorch's or this package's."""
    return name.partition(".")[0] in CLOSED and name not in OPEN


CLOSED = frozenset(sys.stdlib_module_names - {"__main__"}) | {"torch", "numpy", Path(__file__).parents[2].name}
OPEN = ("torch", "torch._jit_internal")  # the files of `torch.is_tensor` and `torch.jit.isinstance`
