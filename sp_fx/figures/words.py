"""Texts, drawn: each word on its colour of a diverging scale, red for the target and blue against it."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..texts.tokens import Tokens
from .drawing import as_png, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, LINE, GAP = 6.4, 0.26, 0.05  # of the figure, a line and a space, in inches
TITLE = 110  # letters of a line of small print
NOTE = "red: for the target; blue: against it"


class Words:
    """The words of texts, drawn: the last line of a notebook's cell shows them, `print` has them with their parts in per cent."""

    def __init__(self, tokens: Tokens, titles: Sequence[str] = ()) -> None:
        """`titles` say of each text what is explained."""
        self.tokens, self.titles = tokens, titles

    def __repr__(self) -> str:
        return str(self.tokens)

    def _repr_html_(self) -> str:
        return self.tokens.html(self.titles)

    @functools.cached_property
    def figure(self) -> Figure:
        """matplotlib's Figure of them."""
        return words(self.tokens, self.titles)

    def save(self, file: str | PathLike[str], about: Mapping[str, Any] | None = None) -> None:
        """Write them: as a page where the name of `file` ends on .html, else as a picture, in the format that it ends on."""
        if Path(file).suffix.lower() in (".html", ".htm"):
            Path(fspath(file)).write_text(f'<!doctype html><meta charset="utf-8">{self._repr_html_()}\n', encoding="utf-8")
        else:
            save(self.figure, file, about)


def words(tokens: Tokens, titles: Sequence[str] = ()) -> Figure:
    """Returns a figure of the texts, line by line, each word on its colour, under the `titles` where there are any."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, LINE), dpi=120)
    renderer = FigureCanvasAgg(figure).get_renderer()
    placed: list[tuple[float, int, str, tuple[float, ...] | None]] = []  # of each word: where it starts, its line, its colour
    line = 0
    for sample in range(len(tokens)):
        x = GAP
        for piece in textwrap.wrap(titles[sample], TITLE) if titles else []:
            placed.append((x, line, piece, None))
            line += 1
        for word, colour in tokens.coloured(sample):
            text = figure.text(0, 0, word, fontsize=8, parse_math=False)
            width = text.get_window_extent(renderer).width / figure.dpi + 2 * GAP
            text.remove()
            if x > GAP and x + width > WIDTH:
                x, line = GAP, line + 1
            placed.append((x, line, word, tuple(c / 255 for c in colour)))
            x += width + GAP
        line += 1
    height = LINE * (line + 1)
    figure.set_figheight(height)
    for x, at, word, face in placed:
        box = None if face is None else {"facecolor": face, "edgecolor": "none", "boxstyle": "round,pad=0.2"}
        y, color = 1 - LINE * (at + 0.5) / height, "0.3" if face is None else "black"
        figure.text(x / WIDTH, y, word, fontsize=8, va="center", color=color, bbox=box, parse_math=False)
    figure.text(GAP / WIDTH, LINE * 0.4 / height, NOTE, fontsize=6.5, va="center", color="0.3")
    setattr(figure, "_repr_png_", functools.partial(as_png, figure))  # noqa: B010  # a notebook asks for this
    return figure
