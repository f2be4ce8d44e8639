"""Ascents as moving pictures. Needs matplotlib and Pillow (extras `vision` and `demo`)."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from .drawing import CHANGE, DIVERGING, as_image, picture, robust_limit, signed, signed_map, table, wrapped

if TYPE_CHECKING:
    from PIL.Image import Image

# How Pillow writes each format: for ever, and WebP at a quality at which the edges of letters have no blots.
ENDINGS: dict[str, dict[str, Any]] = {".gif": {"loop": 0}, ".webp": {"loop": 0, "quality": 90}}
DPI, BORDER = 100, 6  # of the frames; pixels of white round them
SHADES, GREYS = 63, 9  # of the colours of a GIF: odd numbers, so that white is among the first
LAST = 3  # times as long as the others
SHORTEST, LONGEST = 0.02, 100.0  # seconds: browsers slow down what is faster, and a GIF holds a frame for 655 at most


def animate(iterates: Tensor, file: str | PathLike[str], *, titles: Sequence[str] | None = None, seconds: float = 0.5) -> None:
    """Write the path of an ascent as a GIF or WebP that moves, by the ending of `file`; it starts again at its end.

    A frame shows the picture at a step and, beside it, its change since the start, on one colour scale for all frames. A GIF has
    256 colours in each frame; a WebP has them all, and is smaller.

    Args:
        iterates: the picture at the start and after each of K steps, [K + 1, C, H, W] or [K + 1, 1, C, H, W], in [-1, 1]: of
            `_, path = explainer.ascend(x, return_path=True)` that of sample i is `path[:, i]`.
        titles: of the K + 1 frames; None is "start", "step 1", "step 2", ...
        seconds: how long a frame stands, from 0.02 to 100; the last stands three times as long.

    Raises:
        ValueError: another ending, another shape of `iterates`, another number of titles, or values that are not finite.
    """
    suffix = Path(file).suffix.lower()
    if suffix not in ENDINGS:
        raise ValueError(f"an animation is written as {' or '.join(ENDINGS)}, by the ending of its file; got {str(file)!r}")
    if not SHORTEST <= seconds <= LONGEST:
        raise ValueError(f"a frame stands for {SHORTEST} to {LONGEST:g} seconds, got {seconds}")
    if not isinstance(iterates, Tensor):
        raise ValueError(f"iterates are a tensor [K + 1, C, H, W], got {type(iterates).__name__}")
    shape = list(iterates.shape)
    if iterates.dim() == 5 and shape[1] == 1:
        iterates = iterates[:, 0]
    if iterates.dim() != 4 or len(iterates) < 2:
        raise ValueError(
            "iterates are the start and at least one step of one sample, [K + 1, C, H, W] or [K + 1, 1, C, H, W] (`path[:, i]` "
            f"of a batch's path); got {shape}"
        )
    titles = [f"step {k}" if k else "start" for k in range(len(iterates))] if titles is None else titles
    if isinstance(titles, str) or len(titles) != len(iterates):
        raise ValueError(f"each of the {len(iterates)} iterates has a title; got {titles!r}")
    iterates = iterates.detach().cpu().float()
    drawn = frames(iterates, titles)
    if suffix == ".gif":
        colours = palette(iterates)
        drawn = [frame.quantize(palette=colours) for frame in drawn]
    first, *others = drawn
    milliseconds = round(1000 * seconds)
    times = [milliseconds] * len(others) + [LAST * milliseconds]
    first.save(file, save_all=True, append_images=others, duration=times, **ENDINGS[suffix])


def palette(iterates: Tensor) -> Image:
    """Returns an image that holds the 256 colours of a GIF of `iterates`: those of maps and of letters are among them, which are
    too few in a frame to be chosen by their number, and one palette for all frames keeps the picture from flickering."""
    from matplotlib import colormaps
    from PIL import Image

    shades = colormaps[DIVERGING](np.linspace(0, 1, SHADES))[:, :3]
    greys = np.linspace(0, 1, GREYS)[:, None].repeat(3, 1)
    fixed = (255 * np.concatenate([shades, greys])).round().astype(np.uint8)
    pixels = np.concatenate([as_image(x) for x in iterates])
    seen = Image.fromarray((255 * pixels).round().astype(np.uint8))
    # Spread over the colours that there are, rare ones too: dithering mixes what lies between them, and nothing beyond them.
    found = seen.quantize(256 - len(fixed), method=Image.Quantize.MAXCOVERAGE).getpalette() or []
    image = Image.new("P", (1, 1))
    image.putpalette([*fixed.ravel().tolist(), *found[: 3 * (256 - len(fixed))]])
    return image


def frames(iterates: Tensor, titles: Sequence[str]) -> list[Image]:
    """Returns a picture of each of `iterates` [K + 1, C, H, W] beside its change since the first, under its title; all of one
    size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox
    from PIL import Image

    changes = iterates - iterates[0]
    pictures, maps = [as_image(x) for x in iterates], [signed(change) for change in changes]
    # Laid out once, under the title of the most lines, so that nothing moves but what changes.
    tallest = max(titles, key=lambda title: wrapped(title).count("\n"))
    cells = [picture(iterates[0], tallest), signed_map(changes[0], "change since the start", CHANGE, robust_limit(*changes))]
    figure = table([cells], dpi=DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    figure.set_layout_engine("none")
    seen, mapped = figure.axes[:2]
    drawn, boxes = [], []
    for image, values, title in zip(pictures, maps, titles):
        seen.images[0].set_data(image)
        mapped.images[0].set_data(values)
        seen.title.set_text(wrapped(title))
        canvas.draw()
        drawn.append(np.asarray(canvas.buffer_rgba())[..., :3].copy())
        boxes.append(figure.get_tightbbox())
    box = Bbox.union(boxes)  # inches from the lower left corner; without it a narrow picture stands in an empty field
    height, width = drawn[0].shape[:2]
    left, right = max(0, int(box.x0 * DPI) - BORDER), min(width, int(box.x1 * DPI) + BORDER)
    top, bottom = max(0, height - int(box.y1 * DPI) - BORDER), min(height, height - int(box.y0 * DPI) + BORDER)
    return [Image.fromarray(np.ascontiguousarray(frame[top:bottom, left:right])) for frame in drawn]
