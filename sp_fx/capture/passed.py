"""The marks of modules that a capture went through: identities under the modules' names, which hooks, names and cuts go by.

The inside of such a module lies open in the graph. `h = self.layer4(x)` is there as the calls inside `layer4` and, after them,
the call `h = layer4(h, x)`: it returns `h`, and whoever has hooked `layer4` sees the input `x` and the output `h`.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_modules
from torch.utils.hooks import BackwardHook

from ..containers import PLAIN, Slot, items, rebuilt, refilled, slotted, tensors_of


class Passed(nn.Module):
    """Stands for a module whose inside lies open in the graph, with that module's children, parameters and buffers.

    It can be indexed and iterated over as `nn.Sequential` and `nn.ModuleDict` can. Called with what the module has returned and
    what it was called with, it runs the hooks and returns the former. Backward hooks are on the cotangent of the output, before
    and after: what is inside is not behind them.

    Raises:
        RuntimeError: when called, where a forward pre-hook replaces an input, which the inside has read already.
    """

    def __init__(self, module: nn.Module) -> None:
        """Of `module`, whose own dictionaries of parameters and buffers it shares; children are added by `with_marks`."""
        nn.Module.__init__(self)
        self.name = getattr(module, "name", "") if isinstance(module, Passed) else type(module).__name__
        self.training = False
        for table in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[table] = module.__dict__[table]
        self.__dict__.update({key: value for key, value in module.__dict__.items() if isinstance(value, Tensor)})

    def __call__(self, output: Any, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(leaf, fx.Proxy) for leaf in slotted(output)[1]):  # in a trace of a model that it is a part of
            return super().__call__(output, *args, **kwargs)
        if not hooked(self):
            return output
        for number, hook in [*torch_modules._global_forward_pre_hooks.items(), *self._forward_pre_hooks.items()]:
            takes_kwargs = number in self._forward_pre_hooks_with_kwargs
            replaced = hook(self, args, kwargs) if takes_kwargs else hook(self, args)
            if replaced is not None and not same(replaced if takes_kwargs else (replaced, {}), (args, kwargs)):
                raise RuntimeError(
                    f"a forward pre-hook replaces an input of the {self.name}, whose inside lies open in the explainer and has "
                    "read it already: hook the module that makes this input, or split the explainer there"
                )
        full, plain = self._get_backward_hooks()
        pre = self._get_backward_pre_hooks()
        backward = BackwardHook(self, full, pre) if full or pre else None
        if backward is not None:
            (output,) = backward.setup_input_hook((output,))
        for number, hook in [*torch_modules._global_forward_hooks.items(), *self._forward_hooks.items()]:
            takes_kwargs = number in self._forward_hooks_with_kwargs
            replaced = hook(self, args, kwargs, output) if takes_kwargs else hook(self, args, output)
            output = output if replaced is None else replaced
        if backward is not None:
            output = backward.setup_output_hook(output)
        for hook in plain:
            for tensor in tensors_of(output)[:1]:
                if tensor.grad_fn is not None:
                    tensor.grad_fn.register_hook(lambda before, after, hook=hook: hook(self, before, after))
        return output

    def forward(self, input: Any, *args: Any, **kwargs: Any) -> Any:
        return input

    def __getitem__(self, key: int | slice | str) -> Any:
        return self._modules[key] if isinstance(key, str) else list(self._modules.values())[key]

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[nn.Module | None]:
        return iter(list(self._modules.values()))

    def __bool__(self) -> bool:
        return True

    def _get_name(self) -> str:
        return self.name


class PassedReLU(Passed, nn.ReLU):
    """That of a ReLU, for those who look for ReLUs by class: Captum's guided backpropagation hooks every `nn.ReLU`."""

    inplace = False


def hooked(module: nn.Module) -> bool:
    """Whether anybody has hooked `module`, or all modules."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch_modules._global_forward_hooks
        or torch_modules._global_forward_pre_hooks
        or torch_modules._global_backward_hooks
        or torch_modules._global_backward_pre_hooks
    )


def same(replaced: Any, inputs: Any) -> bool:
    """Whether what a pre-hook returned for `inputs`, (args, kwargs), has their values; one tensor stands for a tuple of it."""
    after, before = tensors_of(replaced), tensors_of(inputs)
    return len(after) == len(before) and all(a is b or torch.equal(a, b) for a, b in zip(after, before))


def with_marks(root: nn.Module, through: Iterable[str]) -> nn.Module:
    """Returns the modules that a graph over `root` uses, by the same paths: a `Passed` for `root` itself, for the modules whose
    path is in `through`, and for all that have one of these inside; the others are those of `root`, which stays as it is."""
    paths = set(through)
    prefixes = {path[:at] for path in paths for at, letter in enumerate(path) if letter == "."} | paths
    copies: dict[int, nn.Module] = {}

    def copied(module: nn.Module, path: str) -> nn.Module:
        if path and path not in prefixes:
            return module
        if id(module) not in copies:
            copies[id(module)] = own = (PassedReLU if isinstance(module, nn.ReLU) else Passed)(module)
            for name, child in module._modules.items():
                own._modules[name] = None if child is None else copied(child, f"{path}.{name}" if path else name)
        return copies[id(module)]

    return copied(root, "")


def lets_through(module: nn.Module) -> bool:
    """Whether a module is there to be named and hooked alone."""
    return isinstance(module, Passed)


def operands(node: fx.Node, is_mark: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """Returns the nodes that the value of `node` is made from: all of its inputs, but of a mark only what passes through it."""
    return nodes_of(node.args[0]) if is_mark(node) else node.all_input_nodes


def sources(node: fx.Node, is_mark: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """Returns the same, but of an item of the container that a module has returned that item alone: of `out["points"]`, which
    reads the mark of a module, nothing of its other outputs."""
    if not is_mark(node) and is_item(node) and node.args[1] in (inside := contents(node.args[0], is_mark)):
        return nodes_of(inside[node.args[1]])  # type: ignore[index]
    return operands(node, is_mark)


def nodes_of(value: Any) -> list[fx.Node]:
    nodes: dict[fx.Node, None] = {}
    fx.map_arg(value, lambda n: nodes.setdefault(n))
    return list(nodes)


def is_item(node: fx.Node) -> bool:
    """Whether `node` reads an item or an attribute by a key that is no slice and no tensor."""
    return node.target in (operator.getitem, getattr) and isinstance(node.args[1], str | int)


def contents(value: Any, is_mark: Callable[[fx.Node], bool]) -> Mapping[Any, Any]:
    """Returns what is in a container that passes through marks, by key, as far as the graph says: it holds containers as they
    are, or makes them by a call of their class."""
    while isinstance(value, fx.Node):
        if is_mark(value):
            value = value.args[0]
        elif value.op == "call_function" and isinstance(value.target, type):
            if hasattr(value.target, "_fields"):
                return dict(enumerate(value.args))
            return value.kwargs or (value.args[0] if value.args and isinstance(value.args[0], Mapping) else {})
        elif is_item(value):
            value = contents(value.args[0], is_mark).get(value.args[1])
        else:
            return {}
    return (items(value) or ("", {}))[1]


# -- marks in a trace: both tracers put the call of a `Passed` behind what the module has returned


def shown(leaf: Any) -> Any:
    """What the hooks of a module see of an argument: the argument, or None for what a graph cannot hold."""
    return leaf if isinstance(leaf, (fx.Proxy, Tensor, torch.dtype, torch.device, *PLAIN)) else None


def taken_apart(mark: Any, result: Any, passes: Callable[[Any], bool], item: Callable[[Any, Any, str], Any]) -> Any:
    """Returns the containers of `result`, what a module has returned, with items of its `mark` in place of the leaves for which
    `passes` holds; `item(container, key, form)` makes an item. Of a lone leaf that is the mark itself."""
    parts = items(result)
    if parts is None:
        return mark if passes(result) else result
    form, contents = parts
    inner = {}
    for key, content in contents.items():
        through = any(map(passes, slotted(content)[1]))
        inner[key] = taken_apart(item(mark, key, form), content, passes, item) if through else content
    return refilled(result, form, inner)


@dataclass(frozen=True)
class Entry:
    """A call of the module at `path` during an export. `output` and `inputs`, (args, kwargs), have slots in place of tensors."""

    path: str
    output: Any
    inputs: Any


@contextmanager
def marking(clone: nn.Module) -> Iterator[list[Entry]]:
    """While it lasts, the modules inside `clone` pass their outputs through the op `sp_fx::passed`, which an export records.
    Yields the list that receives an entry for each call: the op names it by its number. The same op, without a number, is on
    each input, where the module is entered; the module itself is called with the inputs, which it may write over."""
    entries: list[Entry] = []
    entered: list[tuple[Any, list[Tensor]]] = []  # of the modules that are running

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        tensors: list[Tensor] = []
        inputs = rebuilt((args, kwargs), lambda leaf: slot(leaf, tensors))
        entered.append((inputs, [torch.ops.sp_fx.passed(t, [], "") for t in tensors]))

    def hook(path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        inputs, tensors = entered.pop()
        outputs: list[Tensor] = []
        skeleton = rebuilt(output, lambda leaf: slot(leaf, outputs))
        if not outputs:
            return output
        number = str(len(entries))
        entries.append(Entry(path, skeleton, inputs))
        marked = [torch.ops.sp_fx.passed(t, tensors, number) for t in outputs]
        return rebuilt(skeleton, lambda leaf: marked[leaf.index] if isinstance(leaf, Slot) else leaf)  # other leaves stay

    def slot(leaf: Any, tensors: list[Tensor]) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        tensors.append(leaf)
        return Slot(len(tensors) - 1)

    with ExitStack() as hooks:
        for path, module in clone.named_modules():
            if path:
                hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                marks = functools.partial(hook, path)  # before the model's own hooks, which may keep what is marked
                hooks.callback(module.register_forward_hook(marks, with_kwargs=True, prepend=True).remove)
        yield entries


def take_marks(graph: fx.Graph, entries: list[Entry]) -> set[str]:
    """Replaces the ops that `marking` has left in an exported graph by calls of marks; returns the paths of these."""
    by_number: dict[str, list[fx.Node]] = {}
    for node in graph.find_nodes(op="call_function", target=torch.ops.sp_fx.passed.default):
        by_number.setdefault(node.args[2], []).append(node)
    inputs = by_number.pop("", [])
    put_together: dict[fx.Node, fx.Node] = {}  # the last of the containers that a module got, by its mark
    for number, nodes in by_number.items():
        entry = entries[int(number)]
        entering: Any = nodes[0].args[1]
        behind = entering[-1].next if entering else nodes[-1].next  # what it takes is put together where it is entered
        with graph.inserting_before(behind):
            args, kwargs = in_graph(graph, entry.inputs, entering)
        entered = behind.prev
        with graph.inserting_before(nodes[-1].next):
            output = in_graph(graph, entry.output, [node.args[0] for node in nodes])
            mark = graph.call_module(entry.path, (output, *args), kwargs)
        if entering and entered is not entering[-1]:
            put_together[mark] = entered
        at = mark

        def item(container: fx.Node, key: Any, form: str) -> fx.Node:
            nonlocal at
            with graph.inserting_after(at):
                at = graph.call_function(operator.getitem if form == "items" else getattr, (container, key))
            return at

        # A dataclass has its fields in their own order, wherever they were set: each slot says which output it is.
        passed = slotted(taken_apart(mark, entry.output, lambda leaf: isinstance(leaf, Slot), item))[1]
        by_slot = {leaf.index: through for leaf, through in zip(slotted(entry.output)[1], passed) if isinstance(leaf, Slot)}
        for i, node in enumerate(nodes):
            through = by_slot[i]
            through.meta = {key: value for key, value in node.meta.items() if key != "calls"}
            node.replace_all_uses_with(through)
            graph.erase_node(node)
    for node in inputs:
        source = node.all_input_nodes[0]
        for mark in node.users:
            mark.meta["entered"] = node.prev
        node.replace_all_uses_with(source)
        graph.erase_node(node)
    for mark, entered in put_together.items():
        mark.meta["entered"] = entered
    return {entries[int(number)].path for number in by_number}


def in_graph(graph: fx.Graph, skeleton: Any, nodes: Any) -> Any:
    """Returns the containers of a skeleton round the `nodes` in its slots, and of the rest what a graph can hold; containers that
    it cannot, such as dataclasses, are made by a call of their class."""
    if isinstance(skeleton, Slot):
        return nodes[skeleton.index]
    kind, members = items(skeleton) or ("", {})
    inner = {key: in_graph(graph, item, nodes) for key, item in members.items()}
    match skeleton:
        case _ if not kind:
            return shown(skeleton)
        case _ if kind == "fields" or hasattr(skeleton, "to_tuple"):
            return graph.call_function(type(skeleton), (), inner)
        case Mapping():
            return inner if type(skeleton) is dict else graph.call_function(type(skeleton), (inner,))
        case _ if hasattr(skeleton, "_fields"):
            return graph.call_function(type(skeleton), tuple(inner.values()))
    return list(inner.values()) if isinstance(skeleton, list) else tuple(inner.values())


@torch.library.custom_op("sp_fx::passed", mutates_args=(), schema="(Tensor y, Tensor[] inputs, str number) -> Tensor")
def passed(y: Tensor, inputs: list[Tensor], number: str) -> Tensor:
    return y.clone()


passed.register_fake(lambda y, inputs, number: y.new_empty_strided(y.size(), y.stride()))  # laid out as what it stands for
passed.register_autograd(
    lambda ctx, v: (v, [None] * ctx.inputs, None),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "inputs", len(inputs[1])),
)
