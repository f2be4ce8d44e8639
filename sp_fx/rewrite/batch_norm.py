"""The batch norm right before a gate, whose statistics say how the gate's pre-activation is scaled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..analysis.calls import name_of
from ..analysis.ops import MULTIPLES
from ..analysis.written.graph import made
from ..gates.dual_path import dual_path


@dataclass(frozen=True)
class Behind:
    """What a pre-activation is: `factor` times the output of the batch norm `norm`, plus `shift`."""

    norm: fx.Node
    factor: float = 1.0
    shift: float = 0.0


def norm_before(node: Any, passes: Callable[[fx.Node], bool], number: Callable[[Any], float | None]) -> Behind | None:
    """Returns the call of a batch norm with running statistics that made what `node` is; None where there is none.

    Args:
        node: in a rewritten graph, or one that is being rewritten.
        passes: whether a call gives the numbers that it got, so that what is before it is looked at.
        number: the one number that a node is, None where it is none.
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
    """Returns a, b and x of a call that gives `a x + b` with numbers a and b, by calling it; x is None of others."""
    varying = [n for n in node.all_input_nodes if number(n) is None] if name_of(node) in MULTIPLES else []
    if len(varying) != 1:
        return 1.0, 0.0, None
    points = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64)
    try:
        at = made(
            node, fx.map_arg((node.args, node.kwargs), lambda n: points if n is varying[0] else points.new_tensor(number(n)))
        )
        b, a = float(at[0]), float(at[1] - at[0])
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):  # what does not run on three numbers
        return 1.0, 0.0, None
    return (a, b, varying[0]) if torch.allclose(at, a * points + b) else (1.0, 0.0, None)
