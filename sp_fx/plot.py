"""Pictures of maps: `drawing`, `layouts` and `animation` of `sp_fx.figures` under the name that users import."""

from .figures.animation import animate
from .figures.drawing import (
    ACTIVATION,
    CHANGE,
    DIVERGING,
    LINES,
    PART,
    SLOPE,
    Cell,
    as_image,
    blurred,
    overlay,
    picture,
    product,
    robust_limit,
    save,
    signed,
    signed_map,
    table,
)
from .figures.layouts import ascent, explanation, grid, path

__all__ = [
    "ACTIVATION",
    "CHANGE",
    "DIVERGING",
    "LINES",
    "PART",
    "SLOPE",
    "Cell",
    "animate",
    "as_image",
    "ascent",
    "blurred",
    "explanation",
    "grid",
    "overlay",
    "path",
    "picture",
    "product",
    "robust_limit",
    "save",
    "signed",
    "signed_map",
    "table",
]
