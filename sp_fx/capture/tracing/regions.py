"""Regions of a forward: what it computes without gradients, and under an autocast of its own.

A graph has no regions. What leaves a call made under `torch.no_grad()` is detached there; and a node under the model's own
autocast has it in `meta["autocast"]`, until `close_regions` makes that the call's own, when the graph is rewritten.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from ...containers import rebuilt
from ...gates.calls.autocast import Region, put_under
from ...gates.dual_path import dual_path
from ...gates.modules.multihead import multihead_attention
from ..passed import lets_through
from .schemas import line_of, name_of, schemas, tags_of


class Regions:
    """The regions that a forward is in while it is traced.

    Args:
        outer: the autocast that it is called under by the model's own forward, if it is a function of it.

    Attributes:
        asked: where the forward asks whether gradients are on.
        stops: where it computes with what depends on the inputs while they are off.
    """

    def __init__(self, outer: Region = ()) -> None:
        self.thread = threading.get_ident()
        self.entered: list[Region] = [outer]
        self.asked: dict[str, None] = {}
        self.stops: dict[str, None] = {}

    def stop(self, node: fx.Node) -> None:
        """Remember that the result of a call is detached, since the forward makes it under `torch.no_grad()`."""
        if carries(node):
            self.stops[line_of(node)] = None

    @property
    def autocast(self) -> Region:
        """The innermost autocast of each device type."""
        devices = {device: (device, dtype, enabled) for region in self.entered for device, dtype, enabled in region}
        return tuple(devices.values())

    @contextmanager
    def followed(self) -> Iterator[None]:
        """While it lasts, what the forward enters is known here, and gradients are on at its start."""
        kind, is_on = torch.autocast, torch.is_grad_enabled
        enter, leave = kind.__enter__, kind.__exit__

        def entering(context: Any) -> Any:
            if threading.get_ident() == self.thread:
                self.entered.append(((context.device, context.fast_dtype, context._enabled),))
            return enter(context)

        def leaving(context: Any, *error: Any) -> Any:
            if threading.get_ident() == self.thread:
                self.entered.pop()
            return leave(context, *error)

        def asked() -> bool:
            frame = sys._getframe(1)
            code, on = frame.f_code, is_on()
            if on and threading.get_ident() == self.thread and not code.co_filename.startswith(NOT_THE_MODELS):
                self.asked[f"{code.co_filename}:{frame.f_lineno}, in {code.co_name}"] = None
            return on

        kind.__enter__, kind.__exit__ = entering, leaving  # type: ignore[method-assign, assignment]
        torch.is_grad_enabled = asked
        try:
            with torch.enable_grad():
                yield
        finally:
            kind.__enter__, kind.__exit__ = enter, leave  # type: ignore[method-assign]
            torch.is_grad_enabled = is_on

    def notes(self) -> list[str]:
        """What a reader of the report should know of them."""
        asks = "the forward asks whether gradients are on ({}): here they are, as wherever a map is made"
        stops = "no signal passes what the forward computes under torch.no_grad() ({})"
        return [text.format(some(lines)) for text, lines in ((asks, self.asked), (stops, self.stops)) if lines]


def some(lines: Iterable[str]) -> str:
    """The first of many lines, for a note; "" of none."""
    first, *rest = [*lines] or [""]
    return f"{first}, and {len(rest)} more" if rest else first


NOT_THE_MODELS = (f"{Path(torch.__file__).parent}/", f"{Path(__file__).parents[1]}/")


def detach(x: Any) -> Any:
    """`x` without its gradient: a tensor, or a container of tensors and of what else a call returns."""
    if torch.overrides.has_torch_function((x,)):
        return torch.overrides.handle_torch_function(detach, (x,), x)
    return rebuilt(x, lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf)


@contextmanager
def data_detached() -> Iterator[None]:
    """While it lasts `h.data` of what an export follows is `h.detach()`: an export sees no call in it, and fails."""
    own: Any = torch._C.TensorBase.data

    def read(t: Tensor) -> Tensor:
        return t.detach() if isinstance(t, FakeTensor) and not isinstance(t, nn.Parameter) else own.__get__(t)

    torch.Tensor.data = property(read, own.__set__)  # type: ignore[assignment]
    try:
        yield
    finally:
        del torch.Tensor.data


def carries(node: Any, modules: nn.Module | None = None) -> bool:
    """Whether a derivative may pass through a node: an input had a part in it, or a parameter of `modules`, and nothing was
    detached on the way."""
    seen, queue = {node}, [node]
    while queue:
        at = queue.pop()
        if at.op == "placeholder" and (not isinstance(v := at.meta.get("val"), Tensor) or v.is_floating_point()):
            return True
        if at.op == "get_attr" and modules is not None and isinstance(attribute(modules, str(at.target)), nn.Parameter):
            return True
        if at.op == "call_module" or name_of(at.target) != "detach":
            queue += [n for n in at.all_input_nodes if n not in seen]
            seen.update(at.all_input_nodes)
    return False


def attribute(modules: nn.Module, path: str) -> Any:
    """A tensor of a model, or a constant of a trace; not by `getattr`, for which modules give stand-ins in a trace."""
    owner, _, name = path.rpartition(".")
    module = modules.get_submodule(owner)
    return {**module.__dict__, **module._modules, **module._buffers, **module._parameters}.get(name)


def close_regions(modules: nn.Module, graph: fx.Graph) -> None:
    """Makes the autocast that captured nodes have in their `meta` the calls' own, where it makes a difference to them.

    A call that was inserted since has that of the next one that was captured.
    """
    region: Region = ()
    for node in reversed(list(graph.nodes)):
        region = node.meta.get("autocast", region)
        if not region or node.op not in ("call_function", "call_method", "call_module"):
            continue
        if node.target in (dual_path, multihead_attention):
            if node.target is multihead_attention or row_is_sensitive(str(node.args[0])):
                node.kwargs = {**node.kwargs, "autocast": region}
        elif node.op == "call_module":
            if not lets_through(modules.get_submodule(str(node.target))):
                put_under(node, region)
        elif is_sensitive(node.target):
            put_under(node, region)


def row_is_sensitive(kind: str) -> bool:
    """Whether an autocast changes what a row of the table computes: not where a written gate passes through, say."""
    return kind not in ("written", "affine_norm", "max_pool") and (not schemas(kind) or is_sensitive(kind))


def is_sensitive(target: Any) -> bool:
    """Whether an autocast may change what a call computes: the call itself has a rule of autocast, or is made of others."""
    name = name_of(target).strip("_")
    if ops := schemas(name):
        tags = [tag for of_overload in tags_of(name) for tag in of_overload]
        views = torch.Tag.maybe_aliasing_or_mutating in tags or any(
            a.alias_info for s in ops for a in s.arguments if not a.is_out
        )
        return not views and any(has_kernel(s) for s in ops if any("Tensor" in str(r.type) for r in s.returns))
    module = str(getattr(target, "__module__", ""))
    if module.startswith(f"{Path(__file__).parents[2].name}."):
        return name in ("applied", "call_registered", "tempered_softmax")
    return not isinstance(target, str | type) and module not in ("builtins", "_operator")


def has_kernel(schema: Any) -> bool:
    overload = f"{schema.name}.{schema.overload_name}".rstrip(".")
    keys = ("AutocastCPU", "AutocastCUDA", "CompositeImplicitAutograd")
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(overload, key) for key in keys)
