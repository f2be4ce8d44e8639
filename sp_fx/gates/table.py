"""The table of adjoints: for each kind of gate its exact forward and its soft adjoint, in plain torch.

It is the union of the families in `adjoints/`, and `written`: a gate that the model computes itself, differentiated by the row
of the gate that it is.
"""

from __future__ import annotations

from torch import Tensor

from .adjoints import affine, attention, norms, pooling, products, relu, smooth
from .adjoints.row import FROZEN, Row, Tau

# -- what is not one call: gates written out, and gates by a factor -------------------------------------------------------


def written(z: Tensor, y: Tensor, row: str, args: tuple = ()) -> Tensor:
    """What the model computed itself, `y`, as gate `row` of `z`."""
    return y.view_as(y)


def written_adjoint(v: Tensor, z: Tensor, y: Tensor, tau: Tau, row: str, args: tuple = ()) -> Tensor | None:
    return TABLE[row].adjoint(v, z, tau=tau, **dict(args))


# -- the table ----------------------------------------------------------------------------------------------------------

FAMILIES = (relu, smooth, pooling, norms, attention, products, affine)
TABLE: dict[str, Row] = {kind: row for family in FAMILIES for kind, row in family.ROWS.items()}
TABLE["written"] = Row(written, written_adjoint, FROZEN, tensors=2)


def rule_of(row: str) -> str:
    """What `Rules` calls a row of the table."""
    return (TABLE[row].rule if row in TABLE else "") or row
