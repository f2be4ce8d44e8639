"""Random numbers that a forward draws: each call of the graph draws anew, as the model's own does, and the report says where.

A symbolic trace sees only what is done to stand-ins: `torch.rand(3)` would be drawn once, and be a constant. Here it is a call.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property

from .schemas import is_seeded, line_of, name_of, writes
from .stand_ins import StandIn, flat


class RealCalls(TorchFunctionMode):
    """Looks, while a forward is traced, at PyTorch's calls on what is no stand-in: those that draw random numbers are recorded,
    and those that write over tensors of the model are refused.

    Args:
        tracer: of the symbolic trace.
        tensors: those of the model that no stand-in stands for: plain attributes, items of its lists.
    """

    def __init__(self, tracer: Any, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.tracer = tracer
        self.storages = {t.untyped_storage().data_ptr() for t in tensors if not t.is_meta and t.layout is torch.strided}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(isinstance(leaf, StandIn) for leaf in flat((args, kwargs))):
            if is_seeded(func, args, kwargs):
                if is_tensor_method_or_property(func):
                    return self.tracer.create_proxy("call_method", func.__name__, args, kwargs)
                return self.tracer.create_proxy("call_function", func, args, kwargs)
            if writes(name_of(func), kwargs) and args and self.is_the_models(args[0]):
                raise self.tracer.known.refused("the forward writes over a tensor of the model that is no buffer: register it")
        return func(*args, **kwargs)

    def is_the_models(self, t: Any) -> bool:
        plain = isinstance(t, Tensor) and not t.is_meta and t.layout is torch.strided
        return plain and t.untyped_storage().data_ptr() in self.storages


def note_on_draws(graph: fx.Graph) -> list[str]:
    """A note for the report on the calls of a graph that draw random numbers."""
    calls = (node for node in graph.nodes if node.op in ("call_function", "call_method"))
    drawn = [f"{name_of(node.target)} ({line_of(node)})" for node in calls if is_seeded(node.target, node.args, node.kwargs)]
    shown = "; ".join(dict.fromkeys(drawn[:3])) + ("; ..." if len(drawn) > 3 else "")
    return [f"{DRAWS[0]}: {shown}"] if drawn else []


DRAWS = ("each call draws anew", "the forward draws from")  # how notes begin on what draws from PyTorch, and from others
