"""The methods: functions of a captured module and a request, which return maps in the container of the inputs.

All of them go through `explain`, which checks the inputs, cuts the batch into pieces, and puts the maps together; what they do
with one piece is a `Method`.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from ..capture.arguments import ByName
from ..containers import is_array, rebuilt
from ..targets import Target, looks_one_hot, only_output, primary, refuse_one_hot, resolve, seed
from .ascent import Ascent
from .captured import CapturedModule
from .keyword_tensors import has_one_each, measured, undivided
from .requests import INTEGERS, Call, Inputs, Key, Request, naming_inputs
from .subgraphs import find, needed_after

Method = Callable[[CapturedModule, Call], list[Tensor]]  # one map for each explained input of the call


def pullback(module: CapturedModule, request: Request, chunk: int | None = None) -> Any:
    """The soft pullback of the target direction: one forward and one backward, also for targets [B, T], `chunk` at a time; with
    respect to several activations a dictionary of maps."""
    if request.wrt is not None and not isinstance(request.wrt, str):
        return at_places(module, request, tuple(request.wrt), chunk)
    return explain(module, request, lambda module, call: pull(module, call, call.explained, chunk), many=True)


def double_pullback(module: CapturedModule, request: Request, step: float) -> Any:
    """The pullback at `x + step * pullback(x)`; with target None, of the class predicted at `x`."""
    if not math.isfinite(step):
        raise ValueError(f"step is a finite multiple of the first pullback, got {step!r}")

    def method(module: CapturedModule, call: Call) -> list[Tensor]:
        first = pull(module, call, call.explained)
        return pull(module, call, [x.detach() + step * v for x, v in zip(call.explained, first)])

    return explain(module, request, method)


def ascend(module: CapturedModule, request: Request, ascent: Ascent, return_path: bool = False) -> Any:
    """The change of the inputs by `ascent`; with `return_path` also all iterates, [steps + 1, B, ...]."""

    def iterates(module: CapturedModule, call: Call) -> Iterator[list[Tensor]]:
        bounds: Any = call.bounds or None  # those of the piece
        rule = replace(ascent, bounds=bounds, joint=bool(undivided(module, call)))
        return rule.iterates([x.detach() for x in call.explained], lambda x: pull(module, call, x))

    def change(module: CapturedModule, call: Call) -> list[Tensor]:
        (end,) = deque(iterates(module, call), maxlen=1)
        return [b - a.detach() for a, b in zip(call.explained, end)]

    def whole_path(module: CapturedModule, call: Call) -> list[Tensor]:
        path = [x.new_empty((ascent.steps + 1, *x.shape)) for x in call.explained]
        starts = [x.detach() for x in call.explained]
        for number, iterate in enumerate(itertools.chain([starts], iterates(module, call))):
            for steps, x in zip(path, iterate):
                steps[number] = x
        return path

    bounds: tuple[Any, ...] = ascent.bounds or ()
    request = replace(request, bounds=tuple(torch.as_tensor(b) if is_array(b) else b for b in bounds))
    if not return_path:
        return explain(module, request, change)
    path = explain(module, request, whole_path, batch_axis=1)
    return rebuilt(path, lambda p: None if p is None else p[-1] - p[0]), path


def attribute(module: CapturedModule, inputs: Inputs, target: Target = None, additional_forward_args: Any = None) -> Any:
    """The soft pullback under the calling convention of Captum's attribution methods.

    Raises:
        AssertionError: `target` is None and the model has more than one output for each sample.
    """
    extra = additional_forward_args if isinstance(additional_forward_args, tuple) else (additional_forward_args,)
    if isinstance(target, Tensor) and target.numel() == 1 and target.dtype in INTEGERS:
        target = int(target)
    target = only_output if target is None else target
    return pullback(module, Request(inputs, target, extra=() if additional_forward_args is None else extra))


# -- how they run


def explain(module: CapturedModule, request: Request, method: Method, *, many: bool = False, batch_axis: int = 0) -> Any:
    """Check the inputs, run `method` a piece at a time, and put the maps together.

    `many`: whether the method takes targets [B, T]; else it runs once for each of them, so that nothing has to be repeated.
    `batch_axis`: of its maps.
    """
    forward = module.forward
    with torch.inference_mode(False), torch.enable_grad():
        call = request.call(module.forward)
        call.check({t.device for t in (*module.parameters(), *module.buffers())}, explains=request.wrt is None)
        module = of(module, call)
        if request.samplewise is None and request.batch_size is not None and 1 <= request.batch_size < call.batch:
            call = measured(module, call, request.batch_size)
        if request.wrt is not None:
            if not isinstance(request.wrt, str):
                raise ValueError(f"only pullback() explains with respect to several activations, got wrt={request.wrt!r}")
            tail, activation, extra, kwargs, samplewise = at_activation(module, request.wrt, call, request.batch_size)
            if activation.shape[:1] != (call.batch,) and not (many and request.batch_size is None):
                raise ValueError(
                    f"{request.wrt} has the shape {list(activation.shape)}, without the batch on axis 0: "
                    "only pullback(), without batch_size, can explain with respect to it"
                )
            inner = replace(request, inputs=activation, forward_kwargs=kwargs, wrt=None, extra=extra, samplewise=samplewise)
            return explain(tail, inner, method, many=many, batch_axis=batch_axis)
        if not many and looks_one_hot(call.target):
            with torch.no_grad():  # of one target after the other it could not be seen
                refuse_one_hot(call.target, primary(call.apply(module, call.explained)))
        calls = [call] if many else call.one_target_each()
        of_pieces = [(method(of(module, p), p) for p in one.pieces(request.batch_size)) for one in calls]
        by_call = [joined(parts, call.batch, batch_axis) for parts in of_pieces]
        maps = by_call[0] if calls[0] is call else [torch.stack(parts, batch_axis + 1) for parts in zip(*by_call)]
    return request.contained(forward, maps)


def at_places(module: CapturedModule, request: Request, names: Sequence[str], chunk: int | None) -> dict[str, Tensor]:
    """The pullback at each of several activations, by name, from one forward and one backward.

    Raises:
        ValueError: no names; one that names no activation, or one without the batch on axis 0 where the batch is cut.
    """
    if not names:
        raise ValueError("wrt is the name of an activation, or several; got none")
    with torch.inference_mode(False), torch.enable_grad():
        call = request.call(module.forward)
        call.check({t.device for t in (*module.parameters(), *module.buffers())}, explains=False)
        module = of(module, call)
        if request.batch_size is not None and 1 <= request.batch_size < call.batch:
            call = measured(module, call, request.batch_size)
        places = {find(module.graph, name, "wrt"): name for name in names}

        def maps_of(piece: Call) -> list[Tensor]:
            leaves = [x.detach().requires_grad_() for x in piece.explained]
            run = Tapped(module, places)
            with naming_inputs(module.forward, *request.arguments(module.forward)):
                output = run.run_by_name(piece.apply(inspect.signature(module.forward).bind, leaves).arguments)
            return pulled_back(module, piece, output, [run.values[name] for name in names], chunk)

        maps = joined(map(maps_of, call.pieces(request.batch_size)), call.batch, 0)
    return dict(zip(names, maps))


class Tapped(ByName):
    """Runs a graph and keeps the values of some nodes, by the names that `places` has, for a gradient by them."""

    def __init__(self, module: CapturedModule, places: Mapping[fx.Node, str]) -> None:
        super().__init__(module, module.graph)
        self.places = places
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n not in self.places:
            return value
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise ValueError(f"wrt={self.places[n]!r} names a {type(value).__name__}: expected a floating tensor")
        self.values[self.places[n]] = value if value.requires_grad else value.detach().requires_grad_()
        return self.values[self.places[n]]


def joined(pieces: Iterator[list[Tensor]], batch: int, axis: int) -> list[Tensor]:
    """The maps of a whole batch from those of its pieces, each of which is let go once it is copied."""
    whole: list[Tensor] = []
    start = 0
    for parts in pieces:
        if parts[0].shape[axis] == batch:
            return parts
        whole = whole or [part.new_empty((*part.shape[:axis], batch, *part.shape[axis + 1 :])) for part in parts]
        for maps, part in zip(whole, parts):
            maps.narrow(axis, start, part.shape[axis]).copy_(part)
        start += parts[0].shape[axis]
    return whole


def at_activation(
    module: CapturedModule, name: str, call: Call, batch_size: int | None
) -> tuple[CapturedModule, Tensor, tuple[Any, ...], dict[str, Any], frozenset[Key]]:
    """What comes after the activation `name`, the activation of `call`, those of the inputs that are needed after it, by position
    and by name, and which of these go with the samples.

    Raises:
        ValueError: there is no such activation.
    """
    stem, tail = module.split(name)
    with torch.no_grad():
        activation = torch.cat([piece.apply(stem, piece.explained) for piece in call.pieces(batch_size)])
    arguments = call.apply(inspect.signature(module.forward).bind, call.explained).arguments
    inputs = {*range(call.count), *call.samplewise}
    samplewise = frozenset(parameter for key, parameter in call.parameters(module.forward).items() if key in inputs)
    return tail, activation, *needed_after(tail.graph, arguments), samplewise


def of(module: CapturedModule, call: Call) -> CapturedModule:
    """The module that runs such calls."""
    return call.apply(module.for_call, call.explained)


def pull(module: CapturedModule, call: Call, points: list[Tensor], chunk: int | None = None) -> list[Tensor]:
    """The pullbacks at `points`, which stand in for the explained inputs; fixes the call's target if it was open."""
    leaves = [x.detach().requires_grad_() for x in points]
    try:
        output = call.apply(module, leaves)
    except RuntimeError as error:
        dtypes = {x.dtype for x in leaves} - {t.dtype for t in module.parameters()}
        if dtypes and "dtype" in str(error):
            error.add_note(f"the inputs are {', '.join(map(str, dtypes))}, which no weight of the model is")
        if call.is_uneven:
            error.add_note(f"the inputs have different numbers of places on axis 0: {call.sizes}")
        raise
    return pulled_back(module, call, output, leaves, chunk)


def pulled_back(module: CapturedModule, call: Call, output: Any, leaves: list[Tensor], chunk: int | None) -> list[Tensor]:
    """The pullbacks of the call's target, at its `output`, to the `leaves`; fixes the target if it was open."""
    if call.target is None:
        call.target = resolve(output, None, has_one_each(module, call, output))
    y, u = seed(output, call.target)
    if not y.requires_grad:
        raise ValueError("the explained output does not depend on the inputs: no gradient reaches them")

    def back(cotangent: Tensor, retain_graph: bool = True) -> tuple[Tensor, ...]:
        grads = torch.autograd.grad(y, leaves, cotangent, retain_graph=retain_graph, allow_unused=True)
        return tuple(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads))

    odd = bool((~y.isfinite() & (u != 0)).any())
    if u.dim() == y.dim():
        maps = list(back(u, retain_graph=False))
    else:
        maps = list(torch.func.vmap(back, out_dims=1, chunk_size=chunk)(u))
    if odd and not all(bool(m.isfinite().all()) for m in maps):
        shape = list(y.shape)
        raise ValueError(f"what is explained, of an output of shape {shape}, is NaN or infinite, and so is its map: it has none")
    return maps
