"""Maps in a notebook: `show`. Needs matplotlib (extras `vision` and `demo`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from torch import Tensor

from ..texts.tokens import Tokens
from .drawing import ACTIVATION, SLOPE, Unit, as_png, reading, save, table
from .layouts import explained, shown_units
from .words import Words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = Tensor | np.ndarray
Maps = Array | Mapping[str, Array]
Units = Unit | Sequence[Unit] | Mapping[str, Unit]

ROWS = 32  # of a figure: some 25 times as high as a screen's picture
SLACK = 1e-3  # by which pixels may leave [-1, 1], as those of half precision and of ascents do


class Shown:
    """Maps of pictures, drawn: the last line of a notebook's cell shows them. `figure` is matplotlib's Figure of them."""

    def __init__(self, figure: Figure, maps: int, pictures: int) -> None:
        self.figure = figure
        self._counts = f"{maps} map{'s' * (maps != 1)} of {pictures} picture{'s' * (pictures != 1)}"

    def __repr__(self) -> str:
        return f"{self._counts}; in a notebook it is drawn, .save('map.png') writes it"

    def _repr_png_(self) -> bytes:
        """Returns the figure as a PNG, by which every notebook shows it."""
        return as_png(self.figure)

    def save(self, file: str | PathLike[str], about: Mapping[str, Any] | None = None) -> None:
        """Write the figure, in the format that the name of `file` ends on, such as png, jpg, pdf or svg; `about` says where it
        comes from, in the file's comment."""
        save(self.figure, file, about)


@overload
def show(x: Tokens) -> Words: ...


@overload
def show(
    x: Array,
    maps: Maps,
    titles: str | Sequence[str] | None = None,
    *,
    captions: str | Sequence[str] | None = None,
    unit: Units = SLOPE,
    times_input: bool = False,
    blur: float = 0.0,
) -> Shown: ...


def show(
    x: Array | Tokens,
    maps: Maps | None = None,
    titles: str | Sequence[str] | None = None,
    *,
    captions: str | Sequence[str] | None = None,
    unit: Units = SLOPE,
    times_input: bool = False,
    blur: float = 0.0,
) -> Shown | Words:
    """Pictures and their maps, drawn: picture, signed map and overlay, a row for each map of each picture. Of what
    `explainer.tokens` returns, the words of its texts, red for the target and blue against it.

    Red in a map: a brighter pixel there raises the score; blue: a darker one does.

    Args:
        x: pictures [C, H, W] or [B, C, H, W] in [-1, 1], of one or three channels, floating point; or a `Tokens`, alone.
        maps: of each picture one, [C, H, W] or [B, C, H, W], or T, [B, T, C, H, W]; or several by their titles,
            `{"pullback": a, "Grad-CAM": b}`. C is the picture's, or 1, or left out ([B, H, W]); height and width may be others
            than the picture's. Where there is one picture, it and its maps may have the axis B or not.
        titles: one for each of the T maps, or for each row; not for maps that have theirs.
        captions: one for each picture.
        unit: what a map's numbers are, such as those of `sp_fx.plot`: `SLOPE` of pullbacks and gradients, `PART` of integrated
            gradients and what else adds up to the score, `ACTIVATION` of class activation maps, `CHANGE` of what `ascend`
            returns; None for none. One for all, one for each of a picture's maps, or by their titles, `SLOPE` for the others. A
            map of another height and width than its picture's is no slope.
        times_input: show the map times the pixels too, often the clearest picture of the object.
        blur: the standard deviation, in pixels of the map, of a Gaussian by which maps are smoothed, to be shown only.

    Returns a `Shown`: `.figure`, `.save(file)`, and the picture in a notebook, without `%matplotlib`.

    Raises:
        ValueError: something that does not fit the above, is not finite, or has more than 32 rows; it says what.
    """
    if isinstance(x, Tokens):
        return Words(x)
    pictures = _pictures(x)
    count = len(pictures)
    if isinstance(maps, Mapping):
        if titles is not None:
            raise ValueError("maps in a mapping have its keys as titles; leave titles out")
        columns = []
        for title, map in maps.items():
            of_each = _maps(map, pictures, f"the maps {title!r}")
            if of_each[0].shape[0] != 1:
                raise ValueError(f"a title names one map of each picture; {title!r} has {of_each[0].shape[0]}")
            columns.append(of_each)
        rows = [[of_each[i][0] for of_each in columns] for i in range(count)]
        titles = [str(title) for title in maps]
    else:
        rows = [list(of_picture) for of_picture in _maps(maps, pictures, "maps")]
    each = len(rows[0])
    total = count * each
    if not total:
        raise ValueError(f"there is nothing to show: {count} pictures with {each} maps each")
    if total > ROWS:
        raise ValueError(
            f"{count} pictures with {each} map{'s' * (each != 1)} each are {total} rows, and a figure has {ROWS} at most: choose "
            + ("some, x[:8] and maps[:8]" if count > 1 else "some of the maps, maps[:, :8]")
        )
    row_titles = _titles(titles, each, count)
    given = _per("captions", [captions] if isinstance(captions, str) else captions, count, "picture") or [""] * count
    names = ["" if caption is None else str(caption) for caption in given]
    units = _units(unit, row_titles, each)
    cells, shown = [], list[Unit]()
    for k, title in enumerate(row_titles):
        i, j = divmod(k, each)
        try:
            # Of another height and width it is no gradient, but a class activation map or the like.
            own = units[k] if units[k] != SLOPE or rows[i][j].shape[-2:] == pictures[i].shape[-2:] else None
            shown.append(own)
            cells.append(explained(pictures[i], rows[i][j], title, own, names[i], times_input and own != ACTIVATION, blur))
        except ValueError as error:
            raise ValueError(f"map {j} of picture {i}: {error}") from None
    return Shown(table(cells, note=reading(shown_units(shown, times_input))), total, count)


def _tensor(array: Any, what: str) -> Tensor:
    """Returns a tensor or an array of floating point numbers, finite ones, as a tensor on the CPU."""
    if not isinstance(array, Tensor | np.ndarray):
        hint = "; sp_fx.read_picture(path, size) makes one of a picture file" if what == "x" else ""
        raise ValueError(f"{what}: expected a tensor or a NumPy array, got {type(array).__name__}{hint}")
    if not (array.is_floating_point() if isinstance(array, Tensor) else array.dtype.kind == "f"):
        raise ValueError(f"{what}: expected floating point numbers, got {array.dtype}")
    # Copied, since arrays may be read-only, upside down or of another machine's byte order.
    array = torch.from_numpy(np.array(array, np.float32)) if isinstance(array, np.ndarray) else array.detach().cpu().float()
    broken = int((~array.isfinite()).sum())
    if broken:
        raise ValueError(f"{what}: {broken} of {array.numel()} values are not finite")
    if 0 in array.shape:
        raise ValueError(f"{what}: there are no values in shape {list(array.shape)}")
    return array


def _pictures(x: Array) -> Tensor:
    """Returns pictures [B, C, H, W]."""
    pictures = _tensor(x, "x")
    shape = list(pictures.shape)
    if pictures.dim() not in (3, 4) or shape[-3] not in (1, 3):
        raise ValueError(f"x: expected pictures [C, H, W] or [B, C, H, W] of 1 or 3 channels, got {shape}")
    low, high = pictures.min().item(), pictures.max().item()
    if max(-low, high) > 1 + SLACK:
        raise ValueError(
            f"x: pictures are in [-1, 1], got values in [{low:.3g}, {high:.3g}]. A change, as `ascend` returns it, is a map: "
            "show it with the picture that it belongs to, show(x, change, unit=sp_fx.plot.CHANGE)"
        )
    return pictures if len(shape) == 4 else pictures[None]


def _maps(array: Any, pictures: Tensor, what: str) -> Tensor:
    """Returns maps as [B, T, C, H, W], of B `pictures`."""
    maps = _tensor(array, what)
    shape, count, channels = list(maps.shape), len(pictures), pictures.shape[1]
    one = count == 1
    if maps.dim() == 2 and one:
        maps = maps[None, None, None]
    elif maps.dim() == 3:  # of one picture [C, H, W]; of several, where that cannot be, [B, H, W]
        maps = maps[None, None] if one else maps[:, None, None]
    elif maps.dim() == 4:
        maps = maps[:, None]
    elif maps.dim() != 5:
        expected = f"[{count}, C, H, W], or [{count}, T, C, H, W] for T maps of each"
        raise ValueError(f"{what}: of {count} picture{'s' * (not one)} expected {expected}, got {shape}")
    if len(maps) != count:
        hint = f"; {len(maps)} maps of one picture have shape [1, {len(maps)}, C, H, W]: maps[None]" if one else ""
        raise ValueError(f"{what}: x has {count} picture{'s' * (not one)}, got maps {shape} of {len(maps)}{hint}")
    if maps.shape[2] not in (1, channels):
        allowed = "1 channel" if channels == 1 else f"1 or {channels} channels"
        raise ValueError(f"{what}: expected maps of {allowed}, as x has, got {maps.shape[2]}, in shape {shape}")
    return maps


def _per(what: str, given: Sequence[Any] | None, count: int, of: str) -> list[Any] | None:
    """Returns as many values as there are things `of` a kind, or None where none are given."""
    if given is None:
        return None
    if len(given) != count:
        raise ValueError(f"{what}: expected {count}, one for each {of}, got {len(given)}")
    return list(given)


def _titles(titles: str | Sequence[str] | None, each: int, count: int) -> list[str]:
    """Returns a title for each row of `count` pictures with `each` maps."""
    if titles is None:
        return [f"map {j}" if each > 1 else "map" for j in range(each)] * count
    given = [titles] if isinstance(titles, str) else list(map(str, titles))
    if len(given) == each * count:
        return given
    if len(given) != each:
        what = f"{each}, one for each of a picture's maps"
        raise ValueError(f"titles: expected {what}, or {each * count}, one for each row; got {len(given)}")
    return given * count


def _units(unit: Units, titles: Sequence[str], each: int) -> list[Unit]:
    """Returns a unit for each row."""
    if unit is None or isinstance(unit, str):
        return [unit] * len(titles)
    if isinstance(unit, Mapping):
        named = {str(title): own for title, own in unit.items()}
        if unknown := [title for title in named if title not in titles]:
            raise ValueError(f"unit: the titles are {list(dict.fromkeys(titles))}, got a unit for {unknown}")
        return [named.get(title, SLOPE) for title in titles]
    return (_per("unit", unit, each, "of a picture's maps") or []) * (len(titles) // each)
