"""Pictures of maps. Needs matplotlib (extras `vision` and `demo`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIVERGING = "RdBu_r"  # told apart under every common colour blindness; white is zero


def signed(map: Tensor) -> np.ndarray:
    """A map [C, H, W] as one signed number a pixel [H, W]: its sum over the channels."""
    return map.detach().float().sum(0).cpu().numpy()


def limit(values: np.ndarray, percentile: float = 99.5) -> float:
    """The symmetric limit of a colour scale: a percentile of the magnitudes, since a few pixels dwarf the rest."""
    top = float(np.percentile(np.abs(values), percentile))
    return top or float(np.abs(values).max()) or 1.0


def picture(pixels: Tensor) -> np.ndarray:
    """Pixels [3, H, W] in [-1, 1] as an image [H, W, 3] in [0, 1]; one channel is shown grey."""
    shown = ((pixels.detach().float().cpu() + 1) / 2).clamp(0, 1)
    return shown.expand(3, -1, -1).permute(1, 2, 0).numpy()


def explanation(pixels: Tensor, maps: Sequence[Tensor], titles: Sequence[str], caption: str = "", scale: str = "") -> Figure:
    """One row for each of `maps` [C, H, W] of the picture `pixels` [C, H, W] in [-1, 1]: picture, signed map, overlay.

    `titles` name the rows, `caption` the picture; `scale` is the unit at the colour bar.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.3 * len(maps)), layout="constrained", dpi=110)
    axes = figure.subplots(len(maps), 3, squeeze=False)
    image = picture(pixels)
    grey = image.mean(-1, keepdims=True).repeat(3, -1)
    for row, map, title in zip(axes, maps, titles):
        values = signed(map)
        top = limit(values)
        row[0].imshow(image)
        row[0].set_title(caption, fontsize=9)
        drawn = row[1].imshow(values, cmap=DIVERGING, vmin=-top, vmax=top, interpolation="nearest")
        row[1].set_title(title, fontsize=9)
        row[2].imshow(0.35 + 0.65 * grey)
        strength = np.clip(np.abs(values) / top, 0, 1) ** 0.7
        row[2].imshow(values, cmap=DIVERGING, vmin=-top, vmax=top, alpha=strength, interpolation="nearest")
        row[2].set_title("overlay", fontsize=9)
        figure.colorbar(drawn, ax=list(row), shrink=0.8, label=scale or "signed map, summed over channels")
    for axis in axes.flat:
        axis.set_axis_off()
    return figure
