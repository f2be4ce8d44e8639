"""The table of adjoints: the exact forward and the soft adjoint of every kind of gate, in plain torch.

It is the union of the families in `adjoints/`, and two rows more: `written`, a gate that the model computes itself, and
`surrogate`, a call whose cotangent goes back through another one.
"""

from __future__ import annotations

from torch import Tensor

from .adjoints import affine, attention, norms, pooling, products, relu, smooth
from .adjoints.row import FROZEN, Row, Tau


def written(z: Tensor, y: Tensor, row: str, args: tuple = (), times: float = 1.0, through: float = 0.0) -> Tensor:
    """What the model computed itself, `y`, as `times` gate `row` of `z`, plus `through z`: `x * sigmoid(x)` is
    `written(x, x * sigmoid(x), "silu")`."""
    return y.view_as(y)


def written_adjoint(
    v: Tensor, z: Tensor, y: Tensor, tau: Tau, row: str, args: tuple = (), times: float = 1.0, through: float = 0.0
) -> Tensor | None:
    if (times, through) == (1.0, 0.0):
        return TABLE[row].adjoint(v, z, tau=tau, **dict(args))
    cotangent = TABLE[row].adjoint(times * v, z, tau=tau, **dict(args))
    return cotangent if cotangent is None or not through else cotangent + (through * v).to(cotangent.dtype)


def surrogate(y: Tensor, soft: Tensor) -> Tensor:
    """What the model computed itself, `y`; `soft` is what the way back is through, in as many places as that is made of."""
    return y.view_as(y)


def surrogate_adjoint(v: Tensor, y: Tensor, soft: Tensor, tau: Tau) -> Tensor:
    return v.to(soft.dtype)


FAMILIES = (relu, smooth, pooling, norms, attention, products, affine)
TABLE: dict[str, Row] = {kind: row for family in FAMILIES for kind, row in family.ROWS.items()}
TABLE["written"] = Row(written, written_adjoint, FROZEN, tensors=2)
TABLE["surrogate"] = Row(surrogate, surrogate_adjoint, FROZEN, receives=1, tensors=2, forgets=True)


def rule_of(row: str) -> str:
    """The kind in `Rules` that sets the temperature of a row of the table: "max_pool" for "amax"."""
    return (TABLE[row].rule if row in TABLE else "") or row


# Kinds whose hard form is piecewise linear: the gradient is the limit of their soft adjoint as tau -> 0.
KINKED = frozenset(rule_of(kind) for kind in (*relu.ROWS, *pooling.ROWS))
THRESHOLDLESS = frozenset((*smooth.ROWS, *norms.ROWS, "attention", "stride"))  # rounding moves these little, frozen or not
