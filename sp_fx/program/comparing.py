"""Whether a program is right: it is held against the eager method, on its example and on calls of other sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..capture.arguments import Given
from ..capture.sizes import Axes, with_batch, with_lengths
from ..containers import slotted, tensors_of
from ..gates.adjoints.row import FROZEN
from ..gates.table import THRESHOLDLESS
from ..methods.captured import runs
from ..methods.pullbacks import ascend, double_pullback, pullback
from ..methods.requests import Request
from ..rewrite.report import Report
from ..targets import primary
from ..texts.tokens import tokens
from .example import Example, chosen
from .program import Program, ProgramError
from .signature import Bounds, Signature, described

# The largest relative L2 distance of a program's maps from the eager explainer's; ten times that for an ascent, each of whose
# steps amplifies it. Another order of sums, and BatchNorms folded in float64 and rounded, make 1e-6 to 3e-5 in float32.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}

# With hard gates (frozen rules, plain derivatives) one pre-activation that rounding carries over its threshold moves the map by a
# whole gate: ResNet-18 on noise, 2e-3. This much is always allowed for their maps.
HARD_TOLERANCE = 0.02


def tolerated(dtype: torch.dtype, report: Report, ascends: bool) -> float:
    """Returns the relative L2 distance from the eager method that is allowed for a model with the gates of `report`."""
    hard = any(site.kind and site.kind not in THRESHOLDLESS and site.temperature in (None, FROZEN) for site in report.sites)
    tolerance = TOLERANCE[dtype] * (10 if ascends else 1)
    return max(tolerance, HARD_TOLERANCE) if hard and dtype != torch.float64 else tolerance


def example_target(signature: Signature, y: Tensor) -> Tensor:
    """Returns a target for the example whose output is `y`: the predicted classes, or a direction of ones."""
    if signature.target == "direction":
        return torch.ones_like(y)
    return y.argmax(1) if y.dim() == 2 else torch.zeros(len(y), dtype=torch.long, device=y.device)


def compare(program: Program, example: Example, others: list[Given]) -> float:
    """Returns the largest relative L2 distance of the program from the eager method, of outputs and maps alike: on the example,
    on another batch size where any will do, and on `others`, calls of other lengths.

    Raises:
        ProgramError: it is above the tolerance, or the model's output varies in something that is no tensor.
    """
    signature = program.signature
    several = [with_batch(example.call, 1 if signature.batch > 1 else 2)] if signature.dynamic_batch else []
    return max(distance_on(program, example, call) for call in (example.call, *several, *others))


def distance_on(program: Program, example: Example, call: Given) -> float:
    """`compare`, on one call."""
    signature, worst = program.signature, 0.0
    outputs = example.module(*call.args, **call.kwargs)
    aim = example_target(signature, chosen(outputs, example.choice))
    inputs = tensors_of(call)
    got_outputs, got_maps = program(inputs[0] if signature.single else example.given(call), aim)
    pairs = [*zip(slotted(got_outputs)[1], slotted(outputs)[1], strict=True)]
    pairs += zip(tensors_of(got_maps), tensors_of(eager(example, signature, call, aim)), strict=True)
    for got, want in pairs:
        if not isinstance(want, Tensor) and want != got:
            raise ProgramError(
                f"the model returns {want!r} for {described(inputs)}, where its program would return {got!r}: what varies "
                "has to be a tensor. Return it as one, or leave it out"
            )
        if isinstance(want, Tensor) and want.is_floating_point():
            error = float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))
            if not error <= signature.tolerance:
                raise ProgramError(
                    f"the program is not equal to the explainer on {described(inputs)}: relative L2 distance {error:.1e} "
                    f"where {signature.tolerance:.0e} is allowed; it is refused"
                )
            worst = max(worst, error)
    return worst


def bounds_tried(program: Program, example: Example, lengths: Sequence[tuple[str, Axes, Given]]) -> dict[str, Bounds]:
    """Returns the bounds of the lengths of a program with what running it shows. A length of 1, which no trace tells from larger
    ones, is only there where the program is right on it. None is above the most that the model takes of its tables, such as one
    of positions: compiled code reads beyond them."""
    bounds = dict(program.signature.bounds)
    for name, axes, _ in lengths:
        least, most = bounds[name]
        if least == 1:
            one = with_lengths(example.call, axes, lambda n: 1)
            try:
                least = 1 if runs(example.module, one) and distance_on(program, example, one) >= 0 else 2
            except Exception:  # whatever the program says of it
                least = 2
        known = [n for n in (most, example.most(axes, program.rows)) if n is not None]
        bounds[name] = least, min(known, default=None)
    return bounds


def eager(example: Example, signature: Signature, call: Given, aim: Tensor) -> Any:
    """Returns the maps that the program is compared with."""

    def score(output: Any) -> Tensor:
        """What the cotangent `aim` is of: the direction times what is explained, or the chosen class."""
        y = example.choice(output)
        scores = y * aim if signature.target == "direction" else y[torch.arange(len(y)), aim]
        return scores.reshape(len(y), -1).sum(1)

    target: Any = aim if example.choice is primary else score
    inputs = example.given(call)
    if example.embedded is not None:
        options: dict[str, Any] = {"embedding": signature.arguments["embedding"], "tokenizer": None}
        return tokens(example.module, inputs, target, **options, forward_kwargs=None, batch_size=None).shares
    request = Request(inputs, target)
    if signature.ascent is not None:
        return ascend(example.module, request, signature.ascent)
    if signature.method == "double_pullback":
        return double_pullback(example.module, request, signature.arguments["step"])
    return pullback(example.module, request)
