"""Figures: what is drawn is what was given, on axes that are as large as each other, with units and titles."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from sp_fx import plot

X = torch.rand(4, 3, 20, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
MAPS = torch.randn(4, 3, 20, 24, generator=torch.Generator().manual_seed(1))


def drawn(figure):
    """The axes that show an image, after a layout."""
    figure.draw_without_rendering()
    return [axis for axis in figure.axes if axis.images]


def test_signed_is_the_sum_over_channels_and_centred_at_zero():
    figure = plot.table([[plot.signed_map(MAPS[0], "a map")]])
    (axis,) = drawn(figure)
    image = axis.images[0]
    assert np.allclose(image.get_array(), MAPS[0].sum(0).numpy(), atol=1e-6)
    low, high = image.get_clim()
    assert low == -high and axis.get_title() == "a map"
    white = image.cmap(image.norm(0.0))
    assert min(white[:3]) > 0.95
    red, blue = image.cmap(image.norm(high)), image.cmap(image.norm(low))
    assert red[0] > red[2] and blue[2] > blue[0]


def test_the_scale_is_robust_and_never_empty():
    spike = torch.zeros(1, 50, 50)
    spike[0, 0, 0], spike[0, 1:] = 1e6, 1.0
    assert plot.robust_limit(spike) == pytest.approx(1.0)
    lone = torch.zeros(1, 50, 50)
    lone[0, 3, 3] = -2.0
    assert plot.robust_limit(lone) == 2.0 and plot.robust_limit(torch.zeros(3, 4, 4)) == 1.0
    assert plot.robust_limit(MAPS[0], 5 * MAPS[1]) == pytest.approx(
        np.percentile(np.abs(torch.cat([MAPS[0].sum(0), 5 * MAPS[1].sum(0)]).numpy()), 99.5)
    )


def test_pictures_are_their_pixels():
    assert np.allclose(plot.as_image(X[0]), (X[0].permute(1, 2, 0).numpy() + 1) / 2, atol=1e-6)
    grey = plot.as_image(X[0, :1])
    assert grey.shape == (20, 24, 3) and (grey[..., 0] == grey[..., 2]).all()
    assert plot.as_image(X[0] * 9).max() == 1.0
    assert plot.as_image(X[0].bfloat16()).dtype == np.float32


def test_maps_are_as_large_as_the_picture_beside_them_and_have_units():
    figure = plot.explanation(X[0], list(MAPS[:2]), ["first", "second"], caption="predicted: cat")
    axes = drawn(figure)
    assert [axis.get_title() for axis in axes] == ["predicted: cat", "first", "overlay", "predicted: cat", "second", "overlay"]
    boxes = [axis.get_window_extent() for axis in axes]
    assert np.ptp([box.width for box in boxes]) < 0.01 and np.ptp([box.height for box in boxes]) < 0.01
    assert boxes[0].y0 == pytest.approx(boxes[1].y0) == pytest.approx(boxes[2].y0)
    bars = [child for axis in axes for child in axis.child_axes]
    assert [bar.get_xlabel() for bar in bars] == [plot.SLOPE] * 2


@pytest.mark.parametrize(
    "unit, times", [(plot.SLOPE, "part of the score"), (plot.CHANGE, "change of pixel value, times pixel value")]
)
def test_maps_times_the_input(unit, times):
    figure = plot.explanation(X[0], [MAPS[0]], ["first"], unit, times_input=True)
    axes = drawn(figure)
    assert [axis.get_title() for axis in axes] == ["", "first", "times the input", "overlay"]
    assert np.allclose(axes[2].images[0].get_array(), (X[0] * MAPS[0]).sum(0).numpy(), atol=1e-5)
    assert [child.get_xlabel() for axis in axes for child in axis.child_axes] == [unit, times]


def test_ascent_shows_the_difference():
    figure = plot.ascent(X[:1], X[1:2], [("before", "after")])
    before, after, difference = drawn(figure)
    assert np.allclose(difference.images[0].get_array(), (X[1] - X[0]).sum(0).numpy(), atol=1e-5)
    assert before.get_title() == "before" and after.get_title() == "after"
    assert difference.child_axes[0].get_xlabel() == plot.CHANGE


def test_grid_of_pictures_and_of_maps():
    names = [["a", "b", "c"], ["d", "e", "f"]]
    pictures = plot.grid(X[:2], X[:, None].expand(4, 3, 3, 20, 24)[:2], ["one", "two"], names)
    assert [axis.get_title() for axis in drawn(pictures)] == ["one", "a", "b", "c", "two", "d", "e", "f"]
    shown = torch.stack([MAPS[:3], 10 * MAPS[1:]])
    axes = drawn(plot.grid(X[:2], shown, ["one", "two"], names, unit=plot.SLOPE))
    limits = [axis.images[0].get_clim()[1] for axis in axes]
    assert len(set(limits[1:4])) == 1 and len(set(limits[5:])) == 1 and limits[5] > 5 * limits[1]  # one scale a row
    assert sum(len(axis.child_axes) for axis in axes) == 2


def test_path_has_its_iterates_and_its_probabilities():
    chances = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8], [0.1, 0.9]])
    figure = plot.path(X, chances, ["cat", "dog"], "from cat to dog")
    axes = drawn(figure)
    assert [axis.get_title() for axis in axes[:4]] == ["start", "step 1", "step 2", "step 3"]
    assert np.allclose(axes[-1].images[0].get_array(), (X[3] - X[0]).sum(0).numpy(), atol=1e-5)
    curve = next(axis for axis in figure.axes if axis.lines)
    assert [line.get_label() for line in curve.lines] == ["cat", "dog"]
    assert np.allclose(curve.lines[1].get_ydata(), chances[:, 1])
    for k in range(4):  # each step stands under its picture
        under = curve.transData.transform((k, 0))[0]
        box = axes[k].get_window_extent()
        assert box.x0 < under < box.x1
    with pytest.raises(ValueError, match=r"expected probabilities \[4, N\] of N = 1 names"):
        plot.path(X, chances, ["cat"])


def test_what_cannot_be_drawn():
    broken = MAPS[0].clone()
    broken[1, 2, 3] = float("nan")
    with pytest.raises(ValueError, match="1 of the map's 480 pixels are not finite"):
        plot.table([[plot.signed_map(broken)]])
    with pytest.raises(ValueError, match=r"a map to draw has shape \[C, H, W\], got \[4, 3, 20, 24\]"):
        plot.table([[plot.signed_map(MAPS)]])
    with pytest.raises(ValueError, match=r"\[3, H, W\] or \[1, H, W\], got \[2, 20, 24\]"):
        plot.table([[plot.picture(X[0, :2])]])


@pytest.mark.parametrize("suffix", ["png", "jpg", "pdf", "svg"])
def test_written_without_borders(tmp_path, suffix):
    figure = plot.table([[plot.picture(X[0], "a title that is far too long to stand on one line above it")]], title="whole")
    plot.save(figure, tmp_path / f"it.{suffix}", {"seed": 7})
    assert (tmp_path / f"it.{suffix}").stat().st_size > 1000
    if suffix in ("png", "jpg"):
        told = Image.open(tmp_path / f"it.{suffix}").info
        assert json.loads(told["Comment" if suffix == "png" else "comment"]) == {"seed": 7}
    else:
        assert b"seed" in (tmp_path / f"it.{suffix}").read_bytes()
    if suffix == "png":
        seen = np.array(Image.open(tmp_path / "it.png").convert("L"))
        assert (seen[:12] < 255).any() and (seen[-12:] < 255).any() and (seen[:, :12] < 255).any() and (seen[:, -12:] < 255).any()
