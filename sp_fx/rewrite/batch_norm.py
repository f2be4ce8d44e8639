"""The batch norm right before a gate, whose statistics say how the gate's pre-activation is scaled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..analysis.calls import name_of
from ..gates.dual_path import dual_path


@dataclass(frozen=True)
class Behind:
    """What a pre-activation is: `factor` times the output of the batch norm `norm`, plus `shift`."""

    norm: fx.Node
    factor: float = 1.0
    shift: float = 0.0


def number_of(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def norm_before(node: Any, passes: Callable[[fx.Node], bool], number: Callable[[Any], float | None] = number_of) -> Behind | None:
    """Returns the call of a batch norm with running statistics that made what `node` is; None where there is none.

    Args:
        node: in a rewritten graph, or one that is being rewritten.
        passes: whether a call gives the numbers that it got, so that what is before it is looked at.
        number: the one number that an argument of a sum or product is, None where it is none.
    """
    factor, shift = 1.0, 0.0
    while isinstance(node, fx.Node) and node.op != "placeholder" and node.all_input_nodes:
        if node.target is dual_path:
            if node.args[0] != "affine_norm":
                return None
            computed = any(n is not None and n.op != "get_attr" for n in node.args[3:])  # type: ignore[union-attr]
            return None if computed else Behind(node, factor, shift)
        times, plus, inner = (1.0, 0.0, node.all_input_nodes[0]) if passes(node) else line(node, number)
        node, factor, shift = inner, factor * times, shift + factor * plus
    return None


def line(node: fx.Node, number: Callable[[Any], float | None]) -> tuple[float, float, fx.Node | None]:
    """Returns a, b and x of a call that gives `a x + b` with numbers a and b; x is None of others."""
    name = name_of(node) if node.op in ("call_function", "call_method") and not node.kwargs else ""
    if name in ("neg", "negative"):
        return -1.0, 0.0, node.all_input_nodes[0]
    if len(node.args) != 2 or name not in LINES:
        return 1.0, 0.0, None
    (a, b), (first, second) = map(number, node.args), node.args
    if isinstance(first, fx.Node) and b is not None:
        return *LINES[name](b, True), first
    if isinstance(second, fx.Node) and a is not None and name not in QUOTIENTS:
        return *LINES[name](a, False), second
    return 1.0, 0.0, None


QUOTIENTS = ("div", "divide", "true_divide", "truediv")
LINES: dict[str, Callable[[float, bool], tuple[float, float]]] = {  # of a number, and whether it comes second: a and b
    "add": lambda c, second: (1.0, c),
    **dict.fromkeys(("sub", "subtract"), lambda c, second: (1.0, -c) if second else (-1.0, c)),
    "rsub": lambda c, second: (-1.0, c) if second else (1.0, -c),
    **dict.fromkeys(("mul", "multiply"), lambda c, second: (c, 0.0)),
    **dict.fromkeys(QUOTIENTS, lambda c, second: (1 / c if c else 0.0, 0.0)),
}
