"""Maps in a notebook: what fits is drawn in its row, what does not is named."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from sp_fx import plot
from sp_fx.figures.showing import Shown, show

GENERATOR = torch.Generator().manual_seed(0)
X = torch.rand(4, 3, 20, 24, generator=GENERATOR) * 2 - 1
MAPS = torch.randn(4, 3, 20, 24, generator=GENERATOR)
MANY = torch.randn(4, 2, 3, 20, 24, generator=GENERATOR)
COARSE = torch.rand(4, 1, 5, 6, generator=GENERATOR)


def rows(shown, columns=3):
    """The rows of a figure, each of its axes with an image."""
    shown.figure.draw_without_rendering()
    axes = [axis for axis in shown.figure.axes if axis.images]
    assert len(axes) % columns == 0
    return [axes[i : i + columns] for i in range(0, len(axes), columns)]


def titles(shown):
    return [row[1].get_title() for row in rows(shown)]


def units(shown):
    return [row[1].child_axes[0].get_xlabel() for row in rows(shown)]


def is_row(row, pixels, map):
    """Whether a row has this picture, this map and this map over it."""
    seen, signed, over = ([np.asarray(image.get_array()) for image in axis.images] for axis in row)
    map = map.sum(0) if map.dim() == 3 else map
    assert np.allclose(seen[0], (pixels.permute(1, 2, 0) + 1) / 2, atol=1e-6)
    assert np.allclose(signed[0], map, atol=1e-5) and np.allclose(over[1], map, atol=1e-5)


@pytest.mark.parametrize("x, map", [(0, 0), (0, slice(1)), (slice(1), 0), (slice(1), slice(1))])
def test_one_picture_with_or_without_its_batch_axis(x, map):
    (row,) = rows(show(X[x], MAPS[map]))
    is_row(row, X[0], MAPS[0])
    assert [axis.get_title() for axis in row] == ["", "map", "overlay"] and row[1].child_axes[0].get_xlabel() == plot.SLOPE
    (row,) = rows(show(X[x], COARSE[map]))
    is_row(row, X[0], COARSE[0])
    (row,) = rows(show(X[x], COARSE[map][..., 0, :, :]))  # no channel axis
    is_row(row, X[0], COARSE[0])
    both = rows(show(X[x], MANY[:1]))
    assert len(both) == 2
    for row, map in zip(both, MANY[0]):
        is_row(row, X[0], map)


def test_batches():
    for maps, channels in ((MAPS, True), (COARSE, True), (COARSE[:, 0], False)):
        shown = show(X, maps, captions=list("abcd"))
        assert [row[0].get_title() for row in rows(shown)] == list("abcd")
        for row, pixels, map in zip(rows(shown), X, maps):
            is_row(row, pixels, map if channels else map[None])
    assert repr(show(X, MAPS)) == "4 maps of 4 pictures; in a notebook it is drawn, .save('map.png') writes it"
    # As many pictures as there are channels: [3, H, W] is a map of each, since it could not be one of all.
    for row, pixels, map in zip(rows(show(X[:3], MAPS[:3, 0])), X, MAPS[:3, 0]):
        is_row(row, pixels, map)


def test_several_maps_of_each_picture():
    shown = show(X, MANY, titles=["tench", "shark"], unit=[plot.PART, None])
    assert titles(shown) == ["tench", "shark"] * 4 and units(shown) == [plot.PART, ""] * 4
    for k, row in enumerate(rows(shown)):
        is_row(row, X[k // 2], MANY[k // 2, k % 2])
    assert titles(show(X, MANY)) == ["map 0", "map 1"] * 4
    assert titles(show(X, MANY, titles=list("abcdefgh"))) == list("abcdefgh")
    assert titles(show(X[0], MAPS[0], "pullback")) == ["pullback"]
    assert repr(show(X[0], MANY[:1])).startswith("2 maps of 1 picture;")


def test_maps_by_their_titles():
    shown = show(X, {"pullback": MAPS, "Grad-CAM": COARSE}, unit={"Grad-CAM": plot.ACTIVATION, "pullback": plot.SLOPE})
    assert titles(shown) == ["pullback", "Grad-CAM"] * 4 and units(shown) == [plot.SLOPE, plot.ACTIVATION] * 4
    for k, row in enumerate(rows(shown)):
        is_row(row, X[k // 2], (MAPS, COARSE)[k % 2][k // 2])
    shown = show(X[0], {"a": MAPS[:1], "b": COARSE[0], "c": COARSE[0, 0]}, unit=None, captions="a cat")
    assert titles(shown) == ["a", "b", "c"] and [row[0].get_title() for row in rows(shown)] == ["a cat"] * 3
    assert units(shown) == [""] * 3


def test_times_the_input_and_blur():
    shown = show(X[0], MAPS[0], times_input=True, blur=2.0)
    (row,) = rows(shown, 4)
    assert [axis.get_title() for axis in row] == ["", "map", "times the input", "overlay"]
    assert np.allclose(row[1].images[0].get_array(), plot.signed(plot.blurred(MAPS[0], 2.0)), atol=1e-5)
    with pytest.raises(ValueError, match="from 0 up, got -1"):
        show(X[0], MAPS[0], blur=-1)


def test_arrays_of_numpy_and_other_numbers():
    backwards = MAPS.numpy()[:, :, ::-1]
    frozen = X.numpy().astype(">f8")
    frozen.setflags(write=False)
    for row, pixels, map in zip(rows(show(frozen, backwards)), X, MAPS):
        is_row(row, pixels, map.flip(1))
    show(X.half(), {"a": MAPS.bfloat16().requires_grad_(), "b": MAPS.numpy().astype(np.float16)})
    show(X[:, :1], MAPS[:, :1])  # grey
    show(torch.zeros(3, 1, 1), torch.zeros(1, 1))
    show(X[0] * 1.0005 / X[0].abs().max(), MAPS[0])  # what half precision leaves


def test_shown_is_a_png_and_is_saved(tmp_path):
    shown = show(X[:2], MAPS[:2])
    assert isinstance(shown, Shown)
    seen = Image.open(io.BytesIO(shown._repr_png_()))
    assert seen.format == "PNG" and seen.width > 600 and seen.height > 500
    shown.save(tmp_path / "it.png", {"seed": 7})
    assert json.loads(Image.open(tmp_path / "it.png").info["Comment"]) == {"seed": 7}
    assert np.array_equal(np.array(Image.open(tmp_path / "it.png")), np.array(seen))
    shown.save(str(tmp_path / "it.pdf"))
    assert (tmp_path / "it.pdf").read_bytes().startswith(b"%PDF")


def test_no_window_and_no_pyplot():
    code = (
        "import sys, torch; from sp_fx.figures.showing import show; assert 'matplotlib' not in sys.modules;"
        "s = show(torch.zeros(3, 8, 8), torch.ones(3, 8, 8)); s._repr_png_(); print('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


WRONG = [  # pictures, maps, what is told
    (X * 2.64, MAPS, r"pictures are in \[-1, 1\], got values in \[-2\.64, 2\.64\].*A change"),
    (X + 0.002 + 1 - X.max(), MAPS, r"pictures are in \[-1, 1\]"),
    (((X + 1) * 127).byte(), MAPS, r"x: expected floating point numbers, got torch\.uint8"),
    (X.numpy().astype(np.int64), MAPS, "x: expected floating point numbers, got int64"),
    (X, np.array(["a"]), "maps: expected floating point numbers, got <U1"),
    (X, MAPS.long(), r"maps: expected floating point numbers, got torch\.int64"),
    (X, list(MAPS), "maps: expected a tensor or a NumPy array, got list"),
    (X, None, "maps: expected a tensor or a NumPy array, got NoneType"),
    ("photo.jpg", MAPS, "x: expected a tensor or a NumPy array, got str"),
    (X[0, 0], MAPS, r"x: expected pictures \[C, H, W\] or \[B, C, H, W\] of 1 or 3 channels, got \[20, 24\]"),
    (X[:, :2], MAPS[:, :2], r"of 1 or 3 channels, got \[4, 2, 20, 24\]"),
    (X[:, None], MAPS, r"got \[4, 1, 3, 20, 24\]"),
    (X, MAPS[:3], r"x has 4 pictures, got maps \[3, 3, 20, 24\] of 3"),
    (X, MAPS[0], r"x has 4 pictures, got maps \[3, 20, 24\] of 3"),
    (X, MAPS[0, 0], r"of 4 pictures expected \[4, C, H, W\], or \[4, T, C, H, W\].*got \[20, 24\]"),
    (X[0], MAPS, r"x has 1 picture, got maps \[4, 3, 20, 24\] of 4; 4 maps of one picture have shape \[1, 4, C, H, W\]"),
    (X[:1], MANY, r"x has 1 picture, got maps \[4, 2, 3, 20, 24\] of 4"),
    (X, {"a": MAPS, "b": MAPS[:1]}, r"the maps 'b': x has 4 pictures, got maps \[1, 3, 20, 24\] of 1"),
    (X, {"a": MANY}, "a title names one map of each picture; 'a' has 2"),
    (X, {"a": None}, "the maps 'a': expected a tensor"),
    (X, {}, "nothing to show"),
    (X, MANY[:, :0], "there are no values in shape"),
    (X[:0], MAPS[:0], "x: there are no values"),
    (X[:, :1], MAPS, r"expected maps of 1 channel, as x has, got 3"),
    (X[0], torch.zeros(1, 5, 20, 24), "expected maps of 1 or 3 channels, as x has, got 5"),
    (X, torch.full_like(MAPS, float("nan")), "maps: 5760 of 5760 values are not finite"),
    (X / 0, MAPS, "x: 5760 of 5760 values are not finite"),
    (X, MAPS[None, None], r"got \[1, 1, 4, 3, 20, 24\]"),
]


@pytest.mark.parametrize("k", range(len(WRONG)))
def test_what_does_not_fit_is_named(k):
    x, maps, told = WRONG[k]
    with pytest.raises(ValueError, match=told):
        show(x, maps)


@pytest.mark.parametrize(
    "maps, options, told",
    [
        (MANY, {"titles": ["a"]}, "titles: expected 2, one for each of a picture's maps, or 8, one for each row; got 1"),
        (MAPS, {"titles": ["a", "b"]}, "titles: expected 1, .* or 4, one for each row; got 2"),
        (MANY, {"titles": "a"}, "got 1"),
        ({"a": MAPS}, {"titles": ["b"]}, "leave titles out"),
        (MAPS, {"captions": ["a"]}, "captions: expected 4, one for each picture, got 1"),
        (MAPS, {"captions": "a cat"}, "captions: expected 4, one for each picture, got 1"),
        (MANY, {"unit": [plot.SLOPE]}, "unit: expected 2, one for each of a picture's maps, got 1"),
        ({"a": MAPS}, {"unit": {"b": None}}, r"unit: the titles are \['a'\], got a unit for \['b'\]"),
        ({"a": MAPS, "b": MAPS}, {"unit": {"c": None}}, r"unit: the titles are \['a', 'b'\], got a unit for \['c'\]"),
    ],
)
def test_titles_captions_and_units_that_do_not_fit(maps, options, told):
    with pytest.raises(ValueError, match=told):
        show(X, maps, **options)


def test_too_many_rows():
    with pytest.raises(
        ValueError, match=r"33 pictures with 1 map each are 33 rows, and a figure has 32 at most: choose.*x\[:8\]"
    ):
        show(torch.zeros(33, 1, 2, 2), torch.zeros(33, 1, 2, 2))
    with pytest.raises(ValueError, match=r"1 pictures? with 40 maps each are 40 rows.*maps\[:, :8\]"):
        show(torch.zeros(1, 2, 2), torch.zeros(1, 40, 1, 2, 2))


def test_titles_captions_and_units_of_any_kind():
    x, map = torch.zeros(1, 3, 8, 8), torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert show(x, map, titles=[3], captions=[None]).figure.axes[1].get_title() == "3"
    shown = show(x, {1: map, "b": map}, unit={1: plot.PART}).figure
    assert shown._supxlabel.get_text().startswith("part of the score: red: ")
    other = show(x, {"a": map, "b": map}, unit={"a": "activation"}).figure  # a unit that has no reading
    assert other._supxlabel.get_text().startswith("score per unit of pixel value: red")
