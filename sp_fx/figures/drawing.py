"""Pictures of maps. Needs matplotlib (extras `vision` and `demo`).

A figure is a table of cells; a cell is a function that draws on the axes it is given. `picture`, `signed_map`, `product` and
`overlay` make cells, `table` lays them out, and `layouts` has figures that are made so. Pictures are tensors [C, H, W] with one
or three channels in [-1, 1]. A map is [C, H, W] or, of one channel, [H, W]; it is shown as its sum over the channels, red above
and blue below zero. It may have another height and width than its picture, as those of Grad-CAM do.
"""

from __future__ import annotations

import functools
import io
import json
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage


Cell = Callable[["Axes"], None]

DIVERGING = "RdBu_r"  # told apart under every common colour blindness; white is zero
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's
SLOPE = "score per unit of pixel value"  # of pullbacks and gradients
PART = "part of the score"  # of either, times the input; of integrated gradients, DeepLift, relevance (LRP), Shapley values
ACTIVATION = "weighted activation"  # of class activation maps: CAM, Grad-CAM and their like
CHANGE = "change of pixel value"  # of ascents
Unit = str | None
READINGS = {  # what is red and what is blue in a map of that unit
    SLOPE: ("a brighter pixel there raises the class's score", "a darker pixel does"),
    PART: ("the pixel adds to the class's score", "it takes from it"),
    ACTIVATION: ("the place speaks for the class", "it speaks against it"),
    CHANGE: ("the pixel is made brighter", "it is made darker"),
}
ABOUT = {".png": "Comment", ".pdf": "Subject", ".svg": "Description"}  # the metadata field of each format for `about`
CELL, MARGIN = 2.3, 0.7  # inches: the side of a picture, and what its title and colour bar take
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
LINE = 0.14  # inches: each further line of a title


# -- tensors as arrays


def signed(map: Tensor) -> np.ndarray:
    """Returns a map [C, H, W] or [H, W] as one signed number a pixel, float32 [H, W]: its sum over the channels.

    Raises:
        ValueError: another number of axes, or values that are not finite, which would be drawn as nothing.
    """
    values = _channels(map).detach().float().sum(0).cpu().numpy()
    broken = int((~np.isfinite(values)).sum())
    if broken:
        raise ValueError(f"{broken} of the map's {values.size} pixels are not finite")
    return values


def blurred(map: Tensor, sigma: float) -> Tensor:
    """Returns a map [C, H, W] or [H, W] smoothed by a Gaussian of standard deviation `sigma` in pixels, float32 [C, H, W].

    The kernel ends at ceil(3 sigma) pixels and sums to 1; beyond its edges the map goes on with the values there, so that a
    constant map stays what it is. With sigma 0 the map is returned.

    Raises:
        ValueError: a sigma below zero or not finite, or a map that `signed` does not take.
    """
    if not (math.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"the standard deviation of a blur is a finite number of pixels from 0 up, got {sigma}")
    map = _channels(map)
    if sigma == 0:
        return map.float()
    signed(map)  # refuses what is not finite, which the sums below would smear over the map
    down, across = (_gaussian(size, sigma) for size in map.shape[1:])
    return (down @ map.detach().cpu().double() @ across.T).float()


def _gaussian(size: int, sigma: float) -> Tensor:
    """Returns the weights by which each of `size` pixels in a line takes from each, float64 [size, size]; rows sum to 1."""
    radius = math.ceil(3 * sigma)
    offsets = torch.arange(-radius, radius + 1)
    weights = torch.exp(-((offsets.double() / sigma) ** 2) / 2)
    sources = (torch.arange(size)[:, None] + offsets).clamp(0, size - 1)  # edges stand for what is beyond them
    return torch.zeros(size, size, dtype=torch.float64).scatter_add_(1, sources, (weights / weights.sum()).expand(size, -1))


def _channels(map: Tensor) -> Tensor:
    """Returns a map [C, H, W], or [H, W] with its one channel in front."""
    if map.dim() not in (2, 3):
        raise ValueError(f"a map to draw has shape [C, H, W] or [H, W], got {list(map.shape)}")
    return map if map.dim() == 3 else map[None]


def robust_limit(*maps: Tensor, percentile: float = 99.5) -> float:
    """Returns the symmetric limit of a colour scale that `maps` share: a percentile of their magnitudes, since a few pixels dwarf
    the rest; 1 where all is zero."""
    values = np.concatenate([np.abs(signed(map)).ravel() for map in maps])
    return float(np.percentile(values, percentile)) or float(values.max()) or 1.0


def as_image(pixels: Tensor) -> np.ndarray:
    """Returns pixels [C, H, W] in [-1, 1] as an image [H, W, 3] in [0, 1]; one channel is shown grey.

    Raises:
        ValueError: another shape, or pixels that are not finite.
    """
    if pixels.dim() != 3 or pixels.shape[0] not in (1, 3):
        raise ValueError(f"a picture to draw has shape [3, H, W] or [1, H, W], got {list(pixels.shape)}")
    pixels = pixels.detach().float().cpu()
    if not bool(pixels.isfinite().all()):
        raise ValueError(f"{int((~pixels.isfinite()).sum())} of the picture's {pixels.numel()} values are not finite")
    image = ((pixels + 1) / 2).clamp(0, 1)
    return image.expand(3, -1, -1).permute(1, 2, 0).numpy()


# -- cells


def picture(pixels: Tensor, title: str = "") -> Cell:
    """A cell that shows pixels [C, H, W] in [-1, 1]."""

    def draw(axis: Axes) -> None:
        axis.imshow(as_image(pixels))
        _finish(axis, title)

    return draw


def signed_map(
    map: Tensor, title: str = "", unit: Unit = SLOPE, limit: float | None = None, size: Sequence[int] | None = None
) -> Cell:
    """A cell that shows the signed map on a scale that ends at `limit` (the map's own robust one where None); `unit` stands at
    its colour bar, None leaves the bar out, for maps that share another's. `size`, (height, width), is that of the picture whose
    place a map of another size takes, its own where None."""

    def draw(axis: Axes) -> None:
        end = limit or robust_limit(map)
        image = axis.imshow(
            signed(map), cmap=DIVERGING, vmin=-end, vmax=end, interpolation="nearest", extent=_extent(size or map.shape[-2:])
        )
        if unit is not None:
            _bar(axis, image, unit, end)
        _finish(axis, title)

    return draw


def product(pixels: Tensor, map: Tensor, title: str = "times the input", unit: Unit = SLOPE, blur: float = 0.0) -> Cell:
    """A cell that shows the map times the pixels. Of a map in `SLOPE` it is each pixel's part of the score against mid-grey, as
    far as the score is linear; `unit` is the map's own, None leaves the bar out.

    Of a map of another size each pixel takes the nearest value, that of the cell in which its centre lies, and none that the map
    does not have; cells stand where `signed_map` draws them. A map of one channel goes for all of the picture's. `blur`, in
    pixels of the map, is of the product, not of the map: parts of the score are averaged, and add up to about the same.

    Raises:
        ValueError: a map whose channels are neither one nor the picture's.
    """
    map = _channels(map)
    if 1 not in (len(map), len(pixels)) and len(map) != len(pixels):
        raise ValueError(f"a map of {len(map)} channels cannot be multiplied by a picture of {len(pixels)}")
    coarse = pixels.shape[-2] / map.shape[-2]
    if map.shape[-2:] != pixels.shape[-2:]:
        map = F.interpolate(map[None].float(), pixels.shape[-2:], mode="nearest-exact")[0]
    values = blurred(map.to(pixels.device) * pixels, blur * coarse)
    return signed_map(values, title, PART if unit == SLOPE else unit and f"{unit}, times pixel value")


def overlay(pixels: Tensor, map: Tensor, title: str = "overlay", limit: float | None = None) -> Cell:
    """A cell that shows the map over the picture in pale grey, as opaque as it is strong; a map of another size is spread over
    the whole picture."""

    def draw(axis: Axes) -> None:
        values, end, extent = signed(map), limit or robust_limit(map), _extent(pixels.shape[-2:])
        axis.imshow(0.35 + 0.65 * as_image(pixels).mean(-1), cmap="gray", vmin=0, vmax=1, extent=extent)
        strength = np.clip(np.abs(values) / end, 0, 1) ** 0.7
        axis.imshow(values, cmap=DIVERGING, vmin=-end, vmax=end, alpha=strength, interpolation="nearest", extent=extent)
        _finish(axis, title)

    return draw


def _extent(size: Sequence[int]) -> tuple[float, float, float, float]:
    """Returns the left, right, bottom and top of a picture of `size` (height, width), in its pixels, whose centres are whole."""
    return -0.5, size[1] - 0.5, size[0] - 0.5, -0.5


def _bar(axis: Axes, image: AxesImage, unit: str, end: float) -> None:
    """Put a colour bar from -`end` to `end` under the picture on `axis`."""
    left, right, bottom, top = image.get_extent()
    wide = (right - left) / (bottom - top)
    # Of the axes' own box, so that a map is as large as the picture beside it; wider than a narrow picture, or the numbers would
    # run into each other, and no thinner for a low one.
    width, height = 0.84 * max(1.0, 0.6 / wide), max(1.0, wide)
    place = axis.inset_axes((0.5 - width / 2, -0.075 * height, width, 0.035 * height))
    bar = axis.figure.colorbar(image, cax=place, orientation="horizontal", extend="both")
    rounded = float(f"{end:.1e}")
    power = math.floor(math.log10(rounded))
    power = 0 if -4 < power < 4 else power
    if power:  # stands at the unit, since a sign and seven digits at each end leave the zero no room
        unit = f"10{str(power).translate(RAISED)} {unit}".rstrip()
    number = f"{rounded / 10.0**power:g}"
    bar.set_ticks([-end, 0.0, end], labels=[f"-{number}", "0", number])
    bar.ax.tick_params(labelsize=6, length=2, pad=1)
    bar.set_label(textwrap.fill(unit, 42), fontsize=6, labelpad=1, parse_math=False)


def wrapped(title: str) -> str:
    """Returns a title in lines that are no longer than a picture is wide."""
    return "\n".join(textwrap.fill(line, 30, break_on_hyphens=False) for line in title.splitlines())


def _finish(axis: Axes, title: str) -> None:
    axis.set_title(wrapped(title), fontsize=8, parse_math=False)  # a dollar in a name is a dollar
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)


# -- figures


def reading(units: Iterable[Unit]) -> str:
    """Returns the note under maps of these units that says what red and blue are in each; "" where none is known."""
    units = dict.fromkeys(units)
    lines = {unit: "red: {}; blue: {}".format(*READINGS[unit]) for unit in units if unit in READINGS}
    return "\n".join(line if len(units) == 1 else f"{unit}: {line}" for unit, line in lines.items())


def table(rows: Sequence[Sequence[Cell | None]], title: str = "", note: str = "", dpi: int = 120) -> Figure:
    """Returns a figure of rows of cells; None leaves a place empty. `title` stands above them, `note` below. `save` writes
    it, and a notebook draws it."""
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
    note = "\n".join(textwrap.fill(line, 44 * columns) for line in note.splitlines())
    # Long names of classes and the note take lines; the figure grows by them, so that the pictures do not shrink.
    further = [max(axis.get_title().count("\n") for axis in row) for row in axes]
    figure.set_figheight((CELL + MARGIN) * len(rows) + LINE * (sum(further) + len(note.splitlines())))
    if title:
        figure.suptitle(title, fontsize=10, parse_math=False)
    if note:
        figure.supxlabel(note, fontsize=6.5, parse_math=False)
    # A notebook asks for this, and draws figures without it only once pyplot has been imported.
    setattr(figure, "_repr_png_", functools.partial(as_png, figure))  # noqa: B010
    return figure


def as_png(figure: Figure) -> bytes:
    """Returns the figure without its empty borders as a PNG."""
    out = io.BytesIO()
    figure.savefig(out, format="png", bbox_inches="tight", pad_inches=0.05)
    return out.getvalue()


def save(figure: Figure, file: str | PathLike[str], about: Mapping[str, Any] | None = None) -> None:
    """Write `figure` without its empty borders, in the format that the name of `file` ends on.

    `about` says where it comes from: JSON in the comment of a PNG or JPEG, the subject of a PDF, the description of an SVG.
    """
    comment, suffix = json.dumps(about), Path(file).suffix.lower()
    options: dict[str, Any] = {"metadata": {ABOUT[suffix]: comment}} if about and suffix in ABOUT else {}
    if about and suffix in (".jpg", ".jpeg"):
        options = {"pil_kwargs": {"comment": comment}}
    figure.savefig(file, bbox_inches="tight", pad_inches=0.05, **options)
