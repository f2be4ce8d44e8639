"""Figures of several cells: explanations, ascents before and after, grids of sources and targets, the path of an ascent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from .drawing import (
    CHANGE,
    LINES,
    PART,
    SLOPE,
    Cell,
    Unit,
    blurred,
    overlay,
    picture,
    product,
    reading,
    robust_limit,
    signed,
    signed_map,
    table,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALIKE, LARGE = 0.8, 0.5  # a "change" is the picture itself above this cosine and this part of the picture's norm


def explanation(
    pixels: Tensor,
    maps: Sequence[Tensor] | Tensor,
    titles: Sequence[str],
    unit: Unit | Sequence[Unit] = SLOPE,
    caption: str = "",
    times_input: bool = False,
    blur: float = 0.0,
) -> Figure:
    """Picture, signed map and overlay, a row for each of `maps`; `titles` name them, `caption` the picture.

    With `times_input` each row has the `product` of map and pixels too, often the clearest picture of the object. `unit` is of
    every map, or a sequence has one for each: `SLOPE`, `PART`, `ACTIVATION`, `CHANGE`, other words, or None, for numbers alone.
    `blur` smooths what is shown, by a Gaussian of that standard deviation in pixels of the map.

    Raises:
        ValueError: another number of titles or units than of maps, or what the cells cannot show.
    """
    units = [unit] * len(maps) if unit is None or isinstance(unit, str) else unit
    for what, got in (("titles", titles), ("units", units)):
        if len(got) != len(maps):
            raise ValueError(f"each map has a row, with its own title and unit: got {len(maps)} maps and {len(got)} {what}")
    rows = [explained(pixels, m, title, u, caption, times_input, blur) for m, title, u in zip(maps, titles, units)]
    return table(rows, note=reading(shown_units(units, times_input)))


def shown_units(units: Sequence[Unit], times_input: bool) -> list[Unit]:
    """Returns the units of rows of `explanation`, with that of their products."""
    return [*units, PART] if times_input and SLOPE in units else list(units)


def explained(
    pixels: Tensor, map: Tensor, title: str, unit: Unit, caption: str = "", times_input: bool = False, blur: float = 0.0
) -> list[Cell]:
    """Returns a row of `explanation`, for one map."""
    unit, smooth = unit or "", blurred(map, blur)
    times = [product(pixels, map, unit=unit, blur=blur)] if times_input else []
    return [picture(pixels, caption), signed_map(smooth, title, unit, size=pixels.shape[-2:]), *times, overlay(pixels, smooth)]


def ascent(
    before: Sequence[Tensor] | Tensor,
    after: None = None,
    titles: Sequence[tuple[str, str]] | None = None,
    *,
    change: Sequence[Tensor] | Tensor | None = None,
) -> Figure:
    """Before, after and the change of ascents, one a row: `plot.ascent(x, change=explainer.ascend(x, target))`.

    `before` are pictures, [B, C, H, W] or a sequence of [C, H, W]; `change` is what `explainer.ascend` returns for them, shaped
    like them, to be added to them. `titles` has a pair (before, after) for each row, or is None for these two words.

    Raises:
        TypeError: `after` is given, which is an argument only to say that the figure takes the change.
        ValueError: a change or titles that do not fit, what is not finite, or a change that is nearly the picture itself.
    """
    if after is not None:
        raise TypeError("ascent draws the change that `ascend` returns: plot.ascent(before, change=after - before)")
    if change is None:
        raise ValueError("change is missing, what `ascend` returns: plot.ascent(before, change=explainer.ascend(before))")
    shapes, got = [[list(x.shape) for x in tensors] for tensors in (before, change)]
    if shapes != got or any(len(shape) != 3 for shape in shapes):
        what = [list(x.shape) if isinstance(x, Tensor) else shape for x, shape in ((before, shapes), (change, got))]
        raise ValueError(f"before and change are batches [B, C, H, W] of one shape; got {what[0]} and {what[1]}")
    titles = [("before", "after")] * len(shapes) if titles is None else titles
    if len(titles) != len(shapes):
        raise ValueError(f"each row has a pair of titles: got {len(shapes)} pictures and {len(titles)} pairs")
    rows = []
    for x, delta, (title, title_after) in zip(before, change, titles):
        x, delta = x.detach().cpu().float(), delta.detach().cpu().float()
        signed(delta)  # refuses what is not finite
        _refuse_picture(x, delta)
        rows.append([picture(x, title), picture(x + delta, title_after), signed_map(delta, "change", CHANGE)])
    return table(rows, note=reading([CHANGE]))


def _refuse_picture(before: Tensor, change: Tensor) -> None:
    """Raises a ValueError where the change of a picture is the picture itself, or the picture after the change."""
    x, delta = before.double().flatten(), change.double().flatten()
    norms = x.norm().item(), delta.norm().item()
    cosine = (x @ delta).item() / (norms[0] * norms[1] or 1.0)
    if cosine > ALIKE and norms[1] > LARGE * norms[0]:
        raise ValueError(
            f"the change looks like the picture itself (cosine {cosine:.2f}). `ascend` returns the change already; of a picture "
            "`after` pass change=after - before"
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
    return table(rows, note=reading([unit]))


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
    figure = table([pictures, [None, *maps], []], title=title, note=reading([CHANGE]))
    axes = figure.axes
    columns = len(iterates)
    cell = axes[2 * columns].get_subplotspec()
    assert cell is not None
    curve = figure.add_subplot(cell.get_gridspec()[2, :])
    values = probabilities.detach().float().cpu().numpy()
    for class_values, colour, marker in zip(values.T, LINES, "osD^vPX"):
        curve.plot(class_values, color=colour, marker=marker, markersize=4)
    curve.set_xlabel("step", fontsize=8)
    curve.set_ylabel("probability", fontsize=8)
    curve.set_ylim(-0.02, 1.02)
    curve.set_xlim(-0.5, columns - 0.5)  # each step under its picture
    curve.set_xticks(range(columns))
    curve.tick_params(labelsize=7)
    curve.spines[["top", "right"]].set_visible(False)
    # A line whose name begins with "_" would have no entry, and a dollar would begin a formula.
    legend = curve.legend(
        curve.lines, [" "] * len(names), fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5)
    )
    for text, name in zip(legend.get_texts(), names):
        text.set_parse_math(False)
        text.set_text(name)
    return figure
