"""What is known of the ops of a graph, by their names: the table of `table_of_ops.py`, read, and the sets of names drawn from
it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from .table_of_ops import TABLE, TRAITS


@dataclass(frozen=True)
class Op:
    """What is known of the ops of one name: their traits."""

    traits: frozenset[str]


def parsed(table: str) -> dict[str, Op]:
    """The ops of a table in the form of `TABLE`, by name.

    Raises:
        ValueError: a name twice, a trait that `TRAITS` lacks, no colon, or no traits.
    """
    ops: dict[str, Op] = {}
    lines = "\n".join(line for line in table.splitlines() if line.strip() and not line.startswith("#"))
    for line in re.sub(r"\n\s+", " ", lines).splitlines():
        names, colon, after = (part.split() for part in line.partition(":"))
        unknown = {trait for trait in after if re.sub("=.+", "=", trait) not in TRAITS}
        if not colon or not after or unknown or len(set(names)) < len(names) or set(names) & set(ops):
            raise ValueError(f"expected new names, a colon and traits of the glossary; got {line!r}")
        ops |= dict.fromkeys(names, Op(frozenset(after)))
    return ops


OPS = parsed(TABLE)


def having(trait: str) -> frozenset[str]:
    """The names of the ops that have a trait: `having("view")`."""
    return frozenset(name for name, op in OPS.items() if trait in op.traits)


def values(trait: str) -> dict[str, str]:
    """The values of a trait, by the names of the ops that have it: `values("family")["relu6"]` is "clamp"."""
    words = ((name, *word.partition("=")) for name, op in OPS.items() for word in op.traits)
    return {name: name if value == "itself" else value for name, word, equals, value in words if equals and word == trait}


# Rewriting: what becomes of a call, and what reports say of it.
PIECEWISE = having("piecewise")  # NOT REWRITTEN: chooses by value
ORDERS = having("order")  # kept: the choice is held as the forward made it
INDICES = having("indices")  # unless these are the caller's
SMOOTH = having("smooth")  # kept: smooth, no gate
PRODUCT = having("product")  # kept: product rule
ADDENDS = having("addend")
MIXTURES = ADDENDS | having("between")  # no products, though a product is in them
QUOTIENT = having("quotient")  # kept: quotient rule
FACTORS = having("factor")  # products that a gate may be a factor of
SHARES = having("share")  # such gates
ACTIVATIONS = having("activation")  # such gates, where no factor is one of SHARES
BOUNDED = having("bounded")  # and only where there is no other activation
COMPLEX = having("complex")  # gives complex numbers, whose abs is no gate
COMPARISONS = having("comparison")  # what makes masks of values
CHOICES = having("chooser")  # what chooses by masks
CELLS = having("cell")  # recurrent networks: those with products for gates, and of these the ones with a state c beside h
GATED = having("gated")
STATEFUL = having("state")
RECURRENT = "a recurrent cell, whose gates keep their derivative"  # NOT REWRITTEN, of what has neither
FUSED = having("fused")  # NOT REWRITTEN: torch's own ops with gates inside
SCALES = having("scales")  # multiples of one thing that varies
SHIFTS = having("shifts")
MULTIPLES = SCALES | SHIFTS  # the same, and what differs from it by a constant: back through these a factor is followed

# What carries a derivative, and what does not.
WHOLE = having("whole")
AFFINE_LAYERS = having("layer")
GUARDS = having("guard")
FORM = having("form")
LOOKUPS = having("lookup")
INDEXED = having("index")
REAL = having("real")

# Attention: what a softmax's weights may meet on their way to the values.
MIXES = having("mixes")
JOINS = having("joins")
PASSED = having("renormalises")
LOGARITHMS = having("logarithm")
BY_INDEX = having("by_index")  # sums over groups that whole numbers say
AFFINE = having("affine")  # talking heads, dropout, a mask, a second normalisation

# Storage, values and shapes.
VIEW = having("view")  # may share the storage of the first input
SAME_VALUES = having("same_values")  # gives the numbers it got, so that a BatchNorm before it still says their scale
SHAPES = having("shape")  # does not vary with the values of the input
SIZES = having("number") - {"dtype", "device"}  # numbers, some of which sizes say
FRESH = having("fresh")
ITSELF = having("itself")
SEVERAL = having("several")  # returns a tuple

SAME_CHANNELS = SAME_VALUES & (having("pointwise") | ITSELF)  # and leaves them where they were

# Written gates and norms.
POINTWISE = having("pointwise")  # inside a written gate
CARRIES = having("carries")  # casts and views around a signal and its statistic
REDUCES = having("reduces")  # makes a statistic of a signal
CENTRES = having("centre")
NORMS = having("norm")
WINDOWS = having("window")
POWERS = having("power")
EXPONENTIALS = having("exponential")  # in a written softmax
BOUNDS = having("bounds")
SUMS = having("plus")
DEGREES = {name: Fraction(degree) for name, degree in values("degree").items()}
PARITIES = values("parity")

# Coverage: families of gates, by the names that PyTorch dispatches and by those that reports have.
DISPATCHED = values("family") | values("dispatched")
LISTED = values("family") | values("listed")
