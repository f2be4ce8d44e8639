"""A published network, and what the publishers have in common: names that are nearly right."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from torch import nn

from ..images import Preprocessing


@dataclass(frozen=True)
class Published:
    """A network of normalised pixels, with the preprocessing and the class names of its published weights."""

    net: nn.Module
    preprocessing: Preprocessing
    labels: tuple[str, ...] | None
    multi_label: bool = False


def nearest(name: str, known: list[str], prefix: str = "") -> str:
    """Returns the end of an error message: the names in `known` that are closest to `name`, each behind `prefix`."""
    close = difflib.get_close_matches(name, known, 3, 0.5)
    return f"the nearest: {', '.join(prefix + c for c in close)}" if close else f"it has {len(known)}, such as {prefix}{known[0]}"
