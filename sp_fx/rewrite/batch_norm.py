"""The batch norm right before a gate, whose statistics say how the gate's pre-activation is scaled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from ..gates.dual_path import dual_path


def norm_before(node: Any, passes: Callable[[fx.Node], bool]) -> fx.Node | None:
    """Returns the call of a batch norm with running statistics that made what `node` is; None where there is none.

    Args:
        node: in a rewritten graph, or one that is being rewritten.
        passes: whether a call gives the numbers that it got, so that what is before it is looked at.
    """
    while isinstance(node, fx.Node) and passes(node):
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.target is not dual_path or node.args[0] != "affine_norm":
        return None
    computed = any(n is not None and n.op != "get_attr" for n in node.args[3:])  # type: ignore[union-attr]
    return None if computed else node
