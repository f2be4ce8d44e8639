"""Pictures of maps. Needs matplotlib (extras `vision` and `demo`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DIVERGING = "RdBu_r"  # told apart under every common colour blindness; white is zero


def signed(map: Tensor) -> np.ndarray:
    """A map [C, H, W] as one signed number a pixel [H, W]: its sum over the channels."""
    return map.detach().float().sum(0).cpu().numpy()


def robust_limit(map: Tensor, percentile: float = 99.5) -> float:
    """The symmetric limit of a map's colour scale: a percentile of its magnitudes, since a few pixels dwarf the rest."""
    values = np.abs(signed(map))
    return float(np.percentile(values, percentile)) or float(values.max()) or 1.0


def as_image(pixels: Tensor) -> np.ndarray:
    """Pixels [C, H, W] in [-1, 1] as an image [H, W, 3] in [0, 1]; one channel is shown grey."""
    shown = ((pixels.detach().float().cpu() + 1) / 2).clamp(0, 1)
    return shown.expand(3, -1, -1).permute(1, 2, 0).numpy()


def show_picture(axis: Axes, pixels: Tensor, title: str = "") -> None:
    axis.imshow(as_image(pixels))
    axis.set_title(title, fontsize=8)
    axis.set_axis_off()


def show_map(axis: Axes, map: Tensor, title: str, limit: float) -> Any:
    """The signed map, red above and blue below zero; returns what a colour bar needs."""
    drawn = axis.imshow(signed(map), cmap=DIVERGING, vmin=-limit, vmax=limit, interpolation="nearest")
    axis.set_title(title, fontsize=8)
    axis.set_axis_off()
    return drawn


def show_overlay(axis: Axes, pixels: Tensor, map: Tensor, limit: float) -> None:
    """The map over the picture in grey, as opaque as it is strong."""
    values = signed(map)
    axis.imshow(0.35 + 0.65 * as_image(pixels).mean(-1), cmap="gray", vmin=0, vmax=1)
    strength = np.clip(np.abs(values) / limit, 0, 1) ** 0.7
    axis.imshow(values, cmap=DIVERGING, vmin=-limit, vmax=limit, alpha=strength, interpolation="nearest")
    axis.set_title("overlay", fontsize=8)
    axis.set_axis_off()


def explanation(pixels: Tensor, maps: Sequence[Tensor], titles: Sequence[str], caption: str = "", scale: str = "") -> Figure:
    """One row for each of `maps` [C, H, W] of the picture `pixels` [C, H, W] in [-1, 1]: picture, signed map, overlay.

    `titles` name the rows, `caption` the picture; `scale` is the unit at the colour bar.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.3 * len(maps)), layout="constrained", dpi=110)
    axes = figure.subplots(len(maps), 3, squeeze=False)
    for row, map, title in zip(axes, maps, titles):
        limit = robust_limit(map)
        show_picture(row[0], pixels, caption)
        drawn = show_map(row[1], map, title, limit)
        show_overlay(row[2], pixels, map, limit)
        figure.colorbar(drawn, ax=list(row), shrink=0.8, label=scale or "signed map, summed over channels")
    return figure
