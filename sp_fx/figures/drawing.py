"""Pictures of maps. Needs matplotlib (extras `vision` and `demo`).

A figure is a table of cells; a cell is a function that draws on the axes it is given. `picture`, `signed_map`, `product` and
`overlay` make cells, `table` lays them out, and the figures below them are tables. Pictures and maps are tensors [C, H, W] with
one or three channels, pictures in [-1, 1]; a map is shown as its sum over the channels, red above and blue below zero.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Cell = Callable[["Axes"], None]

DIVERGING = "RdBu_r"  # told apart under every common colour blindness; white is zero
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's
SLOPE = "score per unit of pixel value"  # of pullbacks and gradients
PART = "part of the score"  # of either, times the input
CHANGE = "change of pixel value"  # of ascents
ABOUT = {".png": "Comment", ".pdf": "Subject", ".svg": "Description"}  # the metadata field of each format for `about`
CELL, MARGIN = 2.3, 0.7  # inches: the side of a picture, and what its title and colour bar take


# -- tensors as arrays


def signed(map: Tensor) -> np.ndarray:
    """Returns a map [C, H, W] as one signed number a pixel, float32 [H, W]: its sum over the channels.

    Raises:
        ValueError: another number of axes, or values that are not finite, which would be drawn as nothing.
    """
    if map.dim() != 3:
        raise ValueError(f"a map to draw has shape [C, H, W], got {list(map.shape)}")
    values = map.detach().float().sum(0).cpu().numpy()
    broken = int((~np.isfinite(values)).sum())
    if broken:
        raise ValueError(f"{broken} of the map's {values.size} pixels are not finite")
    return values


def robust_limit(*maps: Tensor, percentile: float = 99.5) -> float:
    """Returns the symmetric limit of a colour scale that `maps` share: a percentile of their magnitudes, since a few pixels dwarf
    the rest; 1 where all is zero."""
    values = np.concatenate([np.abs(signed(map)).ravel() for map in maps])
    return float(np.percentile(values, percentile)) or float(values.max()) or 1.0


def as_image(pixels: Tensor) -> np.ndarray:
    """Returns pixels [C, H, W] in [-1, 1] as an image [H, W, 3] in [0, 1]; one channel is shown grey.

    Raises:
        ValueError: another shape.
    """
    if pixels.dim() != 3 or pixels.shape[0] not in (1, 3):
        raise ValueError(f"a picture to draw has shape [3, H, W] or [1, H, W], got {list(pixels.shape)}")
    image = ((pixels.detach().float().cpu() + 1) / 2).clamp(0, 1)
    return image.expand(3, -1, -1).permute(1, 2, 0).numpy()


# -- cells


def picture(pixels: Tensor, title: str = "") -> Cell:
    """A cell that shows pixels [C, H, W] in [-1, 1]."""

    def draw(axis: Axes) -> None:
        axis.imshow(as_image(pixels))
        _finish(axis, title)

    return draw


def signed_map(map: Tensor, title: str = "", unit: str | None = SLOPE, limit: float | None = None) -> Cell:
    """A cell that shows the signed map on a scale that ends at `limit` (the map's own robust one where None); `unit` stands at
    its colour bar, None leaves the bar out, for maps that share another's."""

    def draw(axis: Axes) -> None:
        end = limit or robust_limit(map)
        image = axis.imshow(signed(map), cmap=DIVERGING, vmin=-end, vmax=end, interpolation="nearest")
        if unit is not None:
            # Inside the axes' own box, so that a map is as large as the picture beside it.
            bar = axis.figure.colorbar(
                image, cax=axis.inset_axes((0.08, -0.075, 0.84, 0.035)), orientation="horizontal", extend="both"
            )
            bar.set_ticks([-end, 0.0, end], labels=[f"{-end:.2g}", "0", f"{end:.2g}"])
            bar.ax.tick_params(labelsize=6, length=2, pad=1)
            bar.set_label(unit, fontsize=6, labelpad=1)
        _finish(axis, title)

    return draw


def product(pixels: Tensor, map: Tensor, title: str = "times the input", unit: str | None = SLOPE) -> Cell:
    """A cell that shows the map times the pixels. Of a map in `SLOPE` it is each pixel's part of the score against mid-grey, as
    far as the score is linear; `unit` is the map's own, None leaves the bar out."""
    return signed_map(map * pixels, title, PART if unit == SLOPE else unit and f"{unit}, times pixel value")


def overlay(pixels: Tensor, map: Tensor, title: str = "overlay", limit: float | None = None) -> Cell:
    """A cell that shows the map over the picture in pale grey, as opaque as it is strong."""

    def draw(axis: Axes) -> None:
        values, end = signed(map), limit or robust_limit(map)
        axis.imshow(0.35 + 0.65 * as_image(pixels).mean(-1), cmap="gray", vmin=0, vmax=1)
        strength = np.clip(np.abs(values) / end, 0, 1) ** 0.7
        axis.imshow(values, cmap=DIVERGING, vmin=-end, vmax=end, alpha=strength, interpolation="nearest")
        _finish(axis, title)

    return draw


def _finish(axis: Axes, title: str) -> None:
    axis.set_title("\n".join(textwrap.fill(line, 30) for line in title.splitlines()), fontsize=8)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)


# -- figures


def table(rows: Sequence[Sequence[Cell | None]], title: str = "", dpi: int = 120) -> Figure:
    """Returns a figure of rows of cells; None leaves a place empty. `save` writes it."""
    from matplotlib.figure import Figure

    columns = max(map(len, rows))
    figure = Figure(figsize=(CELL * columns, (CELL + MARGIN) * len(rows)), layout="compressed", dpi=dpi)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for i, row in enumerate(rows):
        for axis, cell in zip(axes[i], [*row, *[None] * (columns - len(row))]):
            if cell is None:
                axis.set_axis_off()
            else:
                cell(axis)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def save(figure: Figure, file: str | PathLike[str], about: Mapping[str, Any] | None = None) -> None:
    """Write `figure` without its empty borders, in the format that the name of `file` ends on.

    `about` says where it comes from: JSON in the comment of a PNG or JPEG, the subject of a PDF, the description of an SVG.
    """
    comment, suffix = json.dumps(about), Path(file).suffix.lower()
    options: dict[str, Any] = {"metadata": {ABOUT[suffix]: comment}} if about and suffix in ABOUT else {}
    if about and suffix in (".jpg", ".jpeg"):
        options = {"pil_kwargs": {"comment": comment}}
    figure.savefig(file, bbox_inches="tight", pad_inches=0.05, **options)


def explanation(
    pixels: Tensor,
    maps: Sequence[Tensor],
    titles: Sequence[str],
    unit: str = SLOPE,
    caption: str = "",
    times_input: bool = False,
) -> Figure:
    """Picture, signed map and overlay, a row for each of `maps`; `titles` name them, `caption` the picture.

    With `times_input` each row has the `product` of map and pixels too, often the clearest picture of the object.
    """
    rows = []
    for map, title in zip(maps, titles):
        cells = [signed_map(map, title, unit), *([product(pixels, map, unit=unit)] if times_input else []), overlay(pixels, map)]
        rows.append([picture(pixels, caption), *cells])
    return table(rows)


def ascent(before: Sequence[Tensor] | Tensor, after: Sequence[Tensor] | Tensor, titles: Sequence[tuple[str, str]]) -> Figure:
    """Before, after and the difference of ascents, one a row; `titles` has a pair (before, after) for each."""
    return table(
        [
            [picture(x, title), picture(y, title_after), signed_map(y - x, "difference", CHANGE)]
            for x, y, (title, title_after) in zip(before, after, titles)
        ]
    )


def grid(
    sources: Tensor | Sequence[Tensor],
    shown: Tensor | Sequence[Sequence[Tensor]],
    source_titles: Sequence[str],
    titles: Sequence[Sequence[str]],
    unit: str | None = None,
) -> Figure:
    """Sources x target classes: a row for each of `sources` [S, C, H, W], a column for each target of `shown` [S, T, C, H, W].

    `shown` are pictures, such as counterfactuals, or, with a `unit`, maps, which share one colour scale in each row. `titles` are
    shaped [S][T].
    """
    rows = []
    for source, row, source_title, names in zip(sources, shown, source_titles, titles):
        limit = robust_limit(*row) if unit else None
        cells = [
            signed_map(cell, name, None if k else unit, limit) if unit else picture(cell, name)
            for k, (cell, name) in enumerate(zip(row, names))
        ]
        rows.append([picture(source, source_title), *cells])
    return table(rows)


def path(iterates: Tensor, probabilities: Tensor, names: Sequence[str], title: str = "") -> Figure:
    """The path of an ascent: its iterates [K + 1, C, H, W], the change of each since the first, and the class probabilities.

    `probabilities` [K + 1, N] are those of the N classes called `names` at each iterate; N is at most 7.

    Raises:
        ValueError: probabilities of another shape, or more classes than there are colours.
    """
    if probabilities.shape != (len(iterates), len(names)) or len(names) > len(LINES):
        raise ValueError(
            f"expected probabilities [{len(iterates)}, N] of N = {len(names)} names, at most {len(LINES)}; "
            f"got {list(probabilities.shape)}"
        )
    changes = iterates[1:] - iterates[0]
    limit = robust_limit(*changes)
    pictures = [picture(x, f"step {k}" if k else "start") for k, x in enumerate(iterates)]
    maps = [signed_map(c, "", None if k else f"{CHANGE} since the start", limit) for k, c in enumerate(changes)]
    figure = table([pictures, [None, *maps], []], title=title)
    axes = figure.axes
    columns = len(iterates)
    cell = axes[2 * columns].get_subplotspec()
    assert cell is not None
    curve = figure.add_subplot(cell.get_gridspec()[2, :])
    values = probabilities.detach().float().cpu().numpy()
    for class_values, name, colour, marker in zip(values.T, names, LINES, "osD^vPX"):
        curve.plot(class_values, color=colour, marker=marker, markersize=4, label=name)
    curve.set_xlabel("step", fontsize=8)
    curve.set_ylabel("probability", fontsize=8)
    curve.set_ylim(-0.02, 1.02)
    curve.set_xlim(-0.5, columns - 0.5)  # each step under its picture
    curve.set_xticks(range(columns))
    curve.tick_params(labelsize=7)
    curve.spines[["top", "right"]].set_visible(False)
    curve.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
