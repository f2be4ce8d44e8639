"""What a program's graph computes: a method as a function of a model and of tensors, which `one_graph` traces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..containers import filled, tensors_of
from ..texts.tokens import shares_of
from .signature import Signature, with_predicted

Choice = Callable[[Any], Tensor]  # from a model's output to what of it is explained


@dataclass(frozen=True)
class Texts:
    """Where in a graph its tokens are: the node of their embedding, whether that is [L, B, width], and the number of the input
    that has the mask, with the value of it that is no padding."""

    embedding: fx.Node
    length_first: bool
    mask: int | None
    real: float


def formula(signature: Signature, call: Any, choice: Choice, texts: Texts | None = None) -> Callable[..., list[Tensor]]:
    """Returns the function that `one_graph` traces: from the model and the graph's tensors to the graph's results.

    Args:
        call: the arguments of the model by name, with a `Slot` for each input.
        choice: takes what is explained from the model's output.
        texts: of a method of tokens, whose model returns their embedding beside its output.
    """

    def results(model: Callable[..., Any], *tensors: Tensor) -> list[Tensor]:
        count, explained = len(signature.shapes), signature.explained
        inputs, starts, aim = list(tensors[:count]), list(tensors[count:-1]), tensors[-1]
        outputs: list[Tensor] = []  # those of the first forward

        def pull(points: list[Tensor], run: Callable[[list[Tensor]], Any]) -> list[Tensor]:
            nonlocal aim

            def forward(*points: Tensor) -> tuple[Tensor, list[Tensor]]:
                result = run(list(points))
                return choice(result), tensors_of(result)

            y, back, values = torch.func.vjp(forward, *points, has_aux=True)  # type: ignore[misc]
            outputs.extend(values if not outputs else [])
            if signature.target == "direction":
                return list(back(aim.to(y.dtype)))
            aim = with_predicted(y, aim)  # and stays, for an ascent, the class predicted at the start
            return list(back(one_hot(y, aim)))

        def from_inputs(points: list[Tensor]) -> Any:
            remaining = iter(points)
            return model(filled(call, [next(remaining) if i in explained else x for i, x in enumerate(inputs)]))

        if texts is not None:
            arguments = filled(call, inputs)
            _, embedded = model(arguments)
            [back] = pull([embedded], lambda points: model(arguments, {texts.embedding: points[0]})[0])
            if texts.length_first:
                back, embedded = back.transpose(0, 1), embedded.transpose(0, 1)
            real = None if texts.mask is None else inputs[texts.mask] == texts.real
            return [*outputs, shares_of(back, embedded, real)]
        points = [inputs[i] for i in explained]
        if signature.ascent is None:
            maps = pull(points, from_inputs)
            if signature.method == "double_pullback":
                maps = pull([x + signature.arguments["step"] * v for x, v in zip(points, maps)], from_inputs)
        elif signature.looped:
            clamps = signature.ascent.clip == "every"
            maps = signature.ascent.step(starts, points, lambda at: pull(at, from_inputs), clamp=clamps)
        else:
            *_, ends = signature.ascent.iterates(points, lambda at: pull(at, from_inputs))
            maps = [end - start for start, end in zip(points, ends)]
        return [*outputs, *maps]

    return results


def one_hot(y: Tensor, classes: Tensor) -> Tensor:
    """Returns 1 at the class of each sample, shaped like `y` [B, C, ...]; by comparison, since a scatter is slow to run and hard
    to export."""
    rest = [1] * (y.dim() - 2)
    numbers = torch.arange(y.shape[1], device=y.device).view(1, -1, *rest)
    return (numbers == classes.view(-1, 1, *rest)).to(y.dtype).expand(y.shape)
