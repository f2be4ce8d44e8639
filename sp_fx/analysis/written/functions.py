"""The functions of one number that written forms are compared with: gates, by the rows of the table, and smooth functions.

A function is known by its values, in float64, at points chosen so that no other function of a model has the same: a fine grid
with odd steps, so that no kink lies between two points for long; random points; points far out; and points beside every number
that the form itself has, where it may have a threshold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# 1e-5: constants are written with eight digits or so, and casts to float32 may be inside; the two GELUs differ by 5e-4.
TOLERANCE = 1e-5
FAR = 200.0  # where exp(-z) is finite still
SATURATED = {"gelu", "silu", "quick_gelu", "hardswish", "mish"}
FARTHER = 1e6  # where bounds and slopes are read off, unless the form is infinite there

Form = tuple[str, dict[str, Any], Callable[[Tensor], Tensor]]  # the kind, its arguments, the function


def points(numbers: Iterable[float] = ()) -> Tensor:
    """Returns the points at which functions are compared that have these `numbers` in them."""
    grid = torch.linspace(-8, 8, 1223, dtype=torch.float64)
    random = torch.randn(512, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    beside = [n * factor for n in {abs(n) for n in numbers} if 0 < n < math.inf for factor in (0.5, 0.9, 0.999, 1.001, 1.1, 1.5)]
    far = [*torch.logspace(1, 2.3, 24).tolist(), FAR, FARTHER, *beside, 1.0, 1e-3, 1e-6]
    return torch.cat([grid, random, torch.tensor([sign * n for n in far for sign in (1, -1)] + [0.0], dtype=torch.float64)])


@dataclass(frozen=True)
class Fit:
    """A function of a number: `times` the gate, or smooth function, `kind`, plus `through` times the number."""

    kind: str
    args: dict[str, Any]
    times: float = 1.0
    through: float = 0.0


def gate_of(z: Tensor, y: Tensor) -> Fit | None:
    """Returns the gate whose values at the points `z` are `y`; None where no gate has them."""
    return match(z, y, gates(z, y))


def multiple_of(z: Tensor, y: Tensor) -> Fit | None:
    """Returns the gate of which `y` is a multiple, or a multiple plus one of `z`: of `z (1 + sigmoid(z))` SiLU, once, plus `z`.

    Far out a gate is 0 on one side, and `z` on the other: the slopes of `y` there are `through`, and `through + times`.
    """
    low, high = (float(y[z == end][0]) / end for end in (-FAR, FAR))
    if not (math.isfinite(low) and math.isfinite(high)) or abs(high - low) < 1e-6:
        return None
    slopes = {"abs"} if abs(low + high) < 1e-6 else {"relu", "leaky_relu"}
    for through, times, kinds in ((0.0, high, slopes), (0.0, low, {"negative_relu"}), (low, high - low, SATURATED)):
        if abs(times) > 1e-6 and (found := gate_of(z, (y - through * z) / times)) is not None and found.kind in kinds:
            return Fit(found.kind, found.args, round(times, 9), round(through, 9))
    return None


def smooth_of(z: Tensor, y: Tensor) -> Fit | None:
    """Returns the smooth function, which is no gate, whose values at the points `z` are `y`."""
    return match(z, y, [(name, {}, function) for name, function in SMOOTH.items()])


def match(z: Tensor, y: Tensor, forms: Iterable[Form]) -> Fit | None:
    y = y.double()
    for kind, args, function in forms:
        expected = function(z)
        close = (y - expected).abs() <= TOLERANCE * (1 + expected.abs())
        if bool((close | (~y.isfinite() & (z.abs() > FAR))).all()):  # a form by exp overflows far out
            return Fit(kind, args)
    return None


def gates(z: Tensor, y: Tensor) -> Iterable[Form]:
    """The gates that a function with the values `y` may be: those with parameters have the parameters that its values say."""

    def at(point: float) -> float:
        return float(y[z == point][0])

    far = FARTHER if math.isfinite(at(FARTHER)) and math.isfinite(at(-FARTHER)) else FAR
    low, high, one, minus, slope = at(-far), at(far), at(1.0), at(-1.0), at(far) / far
    yield "relu", {}, torch.relu
    yield "gelu", {"approximate": "none"}, F.gelu
    yield "gelu", {"approximate": "tanh"}, lambda z: F.gelu(z, approximate="tanh")
    yield "silu", {}, F.silu
    yield "hardswish", {}, F.hardswish
    yield "mish", {}, F.mish
    yield "relu_squared", {}, lambda z: z.relu().square()
    yield "negative_relu", {}, lambda z: z.clamp(max=0)
    yield "abs", {}, torch.abs
    yield "hardsigmoid", {}, F.hardsigmoid
    if 0 < one < 1:  # z sigmoid(rate z)
        rate = math.log(one / (1 - one))
        # 1.702 is the rate of QuickGELU, which has a rule of its own
        kind, args = ("quick_gelu", {"rate": rate}) if abs(rate - 1.702) < 1e-3 else ("silu", {"rate": rate})
        yield kind, args, lambda z: z * torch.sigmoid(rate * z)
    leak = low / -far
    if abs(leak - 1) > 1e-6 and abs(slope - 1) < 1e-6:
        yield "leaky_relu", {"negative_slope": leak}, lambda z: torch.where(z > 0, z, leak * z)
    if low < high and (low > -far or high < far):
        bounds = {**({"low": low} if low > -far else {}), **({"high": high} if high < far else {})}
        kind = "hardtanh" if len(bounds) == 2 else "floor" if "low" in bounds else "ceiling"
        yield kind, bounds, lambda z: z.clamp(bounds.get("low"), bounds.get("high"))
    if low < 0 and minus < 0 and -minus < -low:  # output_scale (z > 0 ? z : alpha (exp(input_scale z) - 1))
        rate = -math.log1p(-minus / low)
        args = {"alpha": -low / slope, "output_scale": slope, "input_scale": rate} if slope > 0 else {}
        if args:
            yield "elu", args, lambda z: torch.ops.aten.elu(z, **elu_arguments(args))
    if 0 < far - high < far:  # no thresholds at which a function jumps: what is chosen there has a rule by torch's name alone
        yield "softshrink", {"width": far - high}, lambda z: F.softshrink(z, far - high)


def elu_arguments(args: dict[str, Any]) -> dict[str, Any]:
    return {"alpha": args["alpha"], "scale": args["output_scale"], "input_scale": args["input_scale"]}


SMOOTH: dict[str, Callable[[Tensor], Tensor]] = {
    f.__name__: f for f in (torch.sigmoid, torch.tanh, F.softplus, F.softsign, F.logsigmoid, F.tanhshrink)
}
