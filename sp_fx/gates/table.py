"""The table of adjoints: the exact forward and the soft adjoint of every kind of gate, in plain torch.

It is the union of the families in `adjoints/`, and one row more: `written`, a gate that the model computes itself.
"""

from __future__ import annotations

from torch import Tensor

from .adjoints import affine, attention, norms, pooling, products, relu, smooth
from .adjoints.row import FROZEN, Row, Tau


def written(z: Tensor, y: Tensor, row: str, args: tuple = ()) -> Tensor:
    """What the model computed itself, `y`, as gate `row` of `z`: `x * sigmoid(x)` is `written(x, x * sigmoid(x), "silu")`."""
    return y.view_as(y)


def written_adjoint(v: Tensor, z: Tensor, y: Tensor, tau: Tau, row: str, args: tuple = ()) -> Tensor | None:
    return TABLE[row].adjoint(v, z, tau=tau, **dict(args))


FAMILIES = (relu, smooth, pooling, norms, attention, products, affine)
TABLE: dict[str, Row] = {kind: row for family in FAMILIES for kind, row in family.ROWS.items()}
TABLE["written"] = Row(written, written_adjoint, FROZEN, tensors=2)


def rule_of(row: str) -> str:
    """The kind in `Rules` that sets the temperature of a row of the table: "max_pool" for "amax"."""
    return (TABLE[row].rule if row in TABLE else "") or row


# Kinds whose hard form is piecewise linear: the gradient is the limit of their soft adjoint as tau -> 0.
KINKED = frozenset(rule_of(kind) for kind in (*relu.ROWS, *pooling.ROWS))
THRESHOLDLESS = frozenset((*smooth.ROWS, *norms.ROWS, "attention"))  # rounding moves these little, frozen or not
