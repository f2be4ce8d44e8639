"""Figures: what is drawn is what was given, on axes that are as large as each other, with units and titles."""

import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sp_fx
from sp_fx import plot, zoo
from sp_fx.figures.map_png import map_png

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


def test_each_row_has_its_unit():
    units = [plot.PART, None, plot.ACTIVATION]
    figure = plot.explanation(X[0], MAPS[:3], ["IG", "no unit", "Grad-CAM"], units, times_input=True)
    bars = [child for axis in drawn(figure) for child in axis.child_axes]
    times = [f"{plot.PART}, times pixel value", "", f"{plot.ACTIVATION}, times pixel value"]
    assert [bar.get_xlabel() for bar in bars] == [text for pair in zip([plot.PART, "", plot.ACTIVATION], times) for text in pair]
    assert all(len(bar.get_xticklabels()) == 3 for bar in bars)  # a bar without a unit has its numbers
    for wrong in ([plot.PART], [plot.PART] * 4, []):
        with pytest.raises(ValueError, match=f"3 maps and {len(wrong)} units"):
            plot.explanation(X[0], MAPS[:3], ["a", "b", "c"], wrong)
    with pytest.raises(ValueError, match="3 maps and 1 titles"):  # a map [3, H, W] in place of a list of maps
        plot.explanation(X[0], MAPS[0], ["pullback"])
    plot.explanation(X[0], MAPS[:1], ["a"], None)


def by_loops(map, sigma):
    """A blur by its definition: each pixel is the weighted mean of those around it, the nearest of the map for those beyond."""
    radius = math.ceil(3 * sigma)
    steps = range(-radius, radius + 1)
    weights = {(p, q): math.exp(-(p * p + q * q) / (2 * sigma * sigma)) for p in steps for q in steps}
    total = sum(weights.values())
    channels, height, width = map.shape
    out = np.zeros(map.shape)
    values = map.double().tolist()
    for c in range(channels):
        for i in range(height):
            for j in range(width):
                for (p, q), weight in weights.items():
                    near = values[c][min(max(i + p, 0), height - 1)][min(max(j + q, 0), width - 1)]
                    out[c, i, j] += near * weight / total
    return out


@pytest.mark.parametrize("sigma", [0.3, 0.8, 1.0, 2.4])
@pytest.mark.parametrize("shape", [(3, 7, 5), (1, 1, 1), (2, 1, 6), (1, 4, 4)])
def test_blur_is_its_definition(shape, sigma):
    map = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    blurred = plot.blurred(map, sigma)
    assert blurred.shape == map.shape and blurred.dtype == torch.float32
    assert np.allclose(blurred.numpy(), by_loops(map, sigma), atol=1e-6)


def test_blur_of_constants_of_zeros_and_of_a_point():
    for value in (0.0, 0.1, -3.7e-5, 12345.678):
        constant = torch.full((3, 9, 6), value)
        assert torch.equal(plot.blurred(constant, 1.7), constant)
    point = torch.zeros(1, 41, 41)
    point[0, 20, 20] = 1
    for sigma in (1.5, 3.0):
        spread = plot.blurred(point, sigma)[0].double()
        places = torch.arange(41).double() - 20
        assert spread.sum().item() == pytest.approx(1, abs=1e-6)
        for axis in (0, 1):  # cut at 3 sigma, a Gaussian's deviation is some 1 % less than its own
            deviation = (spread.sum(axis) * places**2).sum().sqrt().item()
            assert deviation == pytest.approx(sigma, rel=0.03)
        radius = math.ceil(3 * sigma)
        assert spread[20, 20 + radius] > 0 and spread[20, 20 + radius + 1] == 0


def test_blur_takes_a_map_without_channels_and_any_number_type():
    map, whole = torch.randn(6, 7, generator=torch.Generator().manual_seed(5)), MAPS[0]
    assert torch.equal(plot.blurred(map, 1.0), plot.blurred(map[None], 1.0))
    assert plot.blurred(whole, 0) is whole and torch.equal(plot.blurred(map, 0.0), map[None])
    assert plot.blurred(map.bfloat16(), 1.0).dtype == plot.blurred(map.double(), 0).dtype == torch.float32
    assert not plot.blurred(MAPS[0].clone().requires_grad_(), 1.0).requires_grad
    for sigma in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match="finite number of pixels from 0 up, got"):
            plot.blurred(map, sigma)
    map[2, 3] = math.nan
    with pytest.raises(ValueError, match="1 of the map's 42 pixels are not finite"):
        plot.blurred(map, 1.0)


def test_a_blur_is_of_what_is_shown():
    kept = MAPS[0].clone()
    axes = drawn(plot.explanation(X[0], [MAPS[0]], ["a"], times_input=True, blur=1.2))
    assert torch.equal(MAPS[0], kept)
    smooth = by_loops(MAPS[0], 1.2).sum(0)
    assert np.allclose(axes[1].images[0].get_array(), smooth, atol=1e-5)
    assert np.allclose(axes[3].images[1].get_array(), smooth, atol=1e-5)
    assert np.allclose(axes[2].images[0].get_array(), by_loops(MAPS[0] * X[0], 1.2).sum(0), atol=1e-5)  # not of the map alone


@pytest.mark.parametrize("shape", [(1, 5, 4), (5, 4), (3, 5, 4), (1, 7, 7), (1, 1, 1), (1, 40, 48)])
def test_maps_of_another_size_lie_on_the_picture(shape):
    map = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    axes = drawn(plot.explanation(X[0], [map], ["Grad-CAM"], plot.ACTIVATION, times_input=True))
    whole = axes[0].images[0].get_extent()
    assert list(whole) == [-0.5, 23.5, 19.5, -0.5]
    for axis in axes:
        assert all(list(image.get_extent()) == list(whole) for image in axis.images)
        assert axis.get_xlim() == (-0.5, 23.5) and axis.get_ylim() == (19.5, -0.5)
    boxes = [axis.get_window_extent() for axis in axes]
    assert np.ptp([box.width for box in boxes]) < 0.01 and np.ptp([box.height for box in boxes]) < 0.01
    flat = map.sum(0) if map.dim() == 3 else map
    assert np.allclose(axes[1].images[0].get_array(), flat, atol=1e-6)
    height, width = flat.shape
    nearest = np.zeros((20, 24))
    full = map if map.dim() == 3 else map[None]
    for i in range(20):
        for j in range(24):  # the cell in which the pixel's centre lies
            cell = full[:, int((i + 0.5) * height / 20), int((j + 0.5) * width / 24)]
            nearest[i, j] = (cell * X[0, :, i, j]).sum()
    assert np.allclose(axes[2].images[0].get_array(), nearest, atol=1e-5)


def test_grey_pictures_and_maps_that_cannot_be_multiplied():
    plot.table([[plot.product(X[0, :1], MAPS[0]), plot.product(X[0, :1], MAPS[0, 0]), plot.overlay(X[0, :1], MAPS[0, :, :4])]])
    with pytest.raises(ValueError, match="a map of 5 channels cannot be multiplied by a picture of 3"):
        plot.product(X[0], torch.zeros(5, 20, 24))
    plot.table([[plot.signed_map(torch.randn(5, 20, 24)), plot.overlay(X[0], torch.randn(5, 20, 24))]])


@pytest.mark.parametrize(
    "end, numbers, unit",
    [
        (0.00012, "1.2", "10⁻⁴ score per unit of pixel value"),
        (0.0012, "0.0012", plot.SLOPE),
        (0.25, "0.25", plot.SLOPE),
        (99.96, "100", plot.SLOPE),
        (1234.0, "1200", plot.SLOPE),
        (99999.0, "1", "10⁵ score per unit of pixel value"),
        (3.4e-39, "3.4", "10⁻³⁹ score per unit of pixel value"),
    ],
)
def test_numbers_at_a_colour_bar_have_room(end, numbers, unit):
    for height, width in ((20, 24), (90, 10), (10, 90)):  # narrow cells too
        map = torch.full((1, height, width), end)
        (axis,) = drawn(plot.table([[plot.signed_map(map)]]))
        (bar,) = axis.child_axes
        assert bar.get_xlabel() == unit
        assert [label.get_text() for label in bar.get_xticklabels()] == [f"-{numbers}", "0", numbers]
        boxes = [label.get_window_extent() for label in bar.get_xticklabels()]
        assert boxes[0].x1 + 2 < boxes[1].x0 and boxes[1].x1 + 2 < boxes[2].x0
        assert all(label.get_fontsize() == 6 for label in bar.get_xticklabels())


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_long_names_do_not_shrink_pictures_nor_touch_each_other(rows):
    name = "great white shark, white shark, man-eater, man-eating shark, Carcharodon carcharias (0.97)"
    figure = plot.explanation(X[0], [MAPS[0]] * rows, [f"pullback: {name}"] * rows, caption="tench", times_input=True)
    axes = drawn(figure)
    figure_of_short_names = plot.explanation(X[0], [MAPS[0]] * rows, ["pullback"] * rows, times_input=True)
    width, width_of_short = axes[0].get_window_extent().width, drawn(figure_of_short_names)[0].get_window_extent().width
    assert width > 0.97 * width_of_short
    longer = drawn(plot.explanation(X[0], [MAPS[0]] * rows, [f"{name}, {name}, {name}"] * rows))  # of ten lines
    assert longer[0].get_window_extent().width > 0.97 * width_of_short
    texts = [axis.title for axis in axes] + [bar.xaxis.label for axis in axes for bar in axis.child_axes]
    boxes = [text.get_window_extent() for text in texts] + [axis.get_window_extent() for axis in axes]
    frame = figure.bbox
    for k, box in enumerate(boxes):
        assert box.x0 >= frame.x0 and box.x1 <= frame.x1 and box.y0 >= frame.y0 and box.y1 <= frame.y1
        assert not any(box.overlaps(other) for other in boxes[k + 1 :])


def test_a_note_says_what_red_and_blue_are():
    x, map = torch.zeros(3, 8, 8), torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))

    def note(*arguments, **options):
        figure = plot.explanation(x, *arguments, **options)
        return "" if figure._supxlabel is None else figure._supxlabel.get_text()

    slope = "red: a brighter pixel there raises the class's score; blue: a darker pixel does"
    assert note([map], ["a"]) == slope and note([map, map], ["a", "b"]) == slope
    lines = note([map, map], ["a", "b"], unit=[plot.SLOPE, plot.CHANGE], times_input=True).splitlines()
    assert lines[0] == f"{plot.SLOPE}: {slope}" and [line.split(":")[0] for line in lines] == [plot.SLOPE, plot.CHANGE, plot.PART]
    assert note([map], ["a"], unit=None) == note([map], ["a"], unit="volts") == ""
    assert plot.ascent([x], change=[map])._supxlabel.get_text() == "red: the pixel is made brighter; blue: it is made darker"
    few = plot.table([[plot.signed_map(map)]], note=slope)  # one picture wide: in lines of its own
    assert len(few._supxlabel.get_text().splitlines()) == 2
    few.draw_without_rendering()
    pictures = [plot.table([[plot.signed_map(map)] * 3], note=text) for text in ("", slope)]
    sizes = []
    for figure in pictures:
        figure.draw_without_rendering()
        sizes.append(figure.axes[0].get_window_extent().width)
        bar = figure.axes[0].child_axes[0].get_tightbbox()
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)
    assert pictures[1]._supxlabel.get_window_extent().y1 < bar.y0  # below the units of the colour bars


def test_maps_as_files_have_the_colours_of_figures():
    """A service's PNG and the page's scale, which have no matplotlib to ask."""
    import matplotlib

    values = np.linspace(-1, 1, 255)
    shown = np.array(Image.open(io.BytesIO(map_png(np.tile(values, (1, 300, 1))))).convert("RGB"))[0] / 255
    limit = np.quantile(np.abs(np.tile(values, 300)), 0.995)
    colours = matplotlib.colormaps[plot.DIVERGING](np.clip(values / limit, -1, 1) / 2 + 0.5)[:, :3]
    assert np.abs(shown - colours).max() < 0.02  # of 256 steps, rounded twice
    style = (Path(sp_fx.__file__).parent / "viewer" / "viewer.css").read_text()
    (stops,) = re.findall(r"linear-gradient\(\s*90deg,\s*((?:#[0-9a-f]{6}[,\s]*){11})\)", style)
    wanted = matplotlib.colormaps[plot.DIVERGING](np.linspace(0, 1, 11))[:, :3]
    got = np.array([list(bytes.fromhex(stop[1:])) for stop in stops.replace(",", " ").split()]) / 255
    assert np.abs(got - wanted).max() < 0.02


def test_ascent_shows_before_after_and_the_change():
    change = 0.3 * MAPS[:2]
    figure = plot.ascent(X[:2], change=change, titles=[("a", "b"), ("c", "d")])
    axes = drawn(figure)
    assert [axis.get_title() for axis in axes] == ["a", "b", "change", "c", "d", "change"]
    for i in range(2):
        before, after, map = (axis.images[0].get_array() for axis in axes[3 * i : 3 * i + 3])
        assert np.allclose(before, (X[i].permute(1, 2, 0) + 1) / 2, atol=1e-6)
        assert np.allclose(after, ((X[i] + change[i]).permute(1, 2, 0).clamp(-1, 1) + 1) / 2, atol=1e-6)
        assert np.allclose(map, change[i].sum(0), atol=1e-5)
    assert [axis.child_axes[0].get_xlabel() for axis in axes[2::3]] == [plot.CHANGE] * 2
    axes = drawn(plot.ascent(list(X[:2]), change=[torch.zeros(3, 20, 24), change[1].half()]))
    assert [axis.get_title() for axis in axes] == ["before", "after", "change"] * 2
    small = X[:1, :1, :1, :1]
    drawn(plot.ascent(small, change=0.1 * small))
    drawn(plot.ascent(torch.zeros(1, 3, 4, 4), change=torch.ones(1, 3, 4, 4)))  # from mid-grey, which has no direction


def test_ascent_takes_the_change_alone():
    for call in (lambda: plot.ascent(X[:1], X[1:2]), lambda: plot.ascent(X[:1], after=X[1:2], titles=[("a", "b")])):
        with pytest.raises(TypeError, match=r"plot\.ascent\(before, change=after - before\)"):
            call()
    with pytest.raises(ValueError, match="change is missing"):
        plot.ascent(X[:1])
    for before, change, told in (
        (X[:2], MAPS[:1], r"\[2, 3, 20, 24\] and \[1, 3, 20, 24\]"),
        (X[:2], MAPS[:2, None], r"\[2, 3, 20, 24\] and \[2, 1, 3, 20, 24\]"),
        (X[:2], MAPS[:2, :1], r"\[2, 3, 20, 24\] and \[2, 1, 20, 24\]"),
        (X[0], MAPS[0], r"batches \[B, C, H, W\] of one shape; got \[3, 20, 24\] and \[3, 20, 24\]"),
        (list(X[:1]), MAPS[:2], r"\[\[3, 20, 24\]\] and \[2, 3, 20, 24\]"),
    ):
        with pytest.raises(ValueError, match=told):
            plot.ascent(before, change=change)
    broken = MAPS[:1].clone()
    broken[0, 0, 1, 1] = math.inf
    with pytest.raises(ValueError, match="1 of the map's 480 pixels are not finite"):
        plot.ascent(X[:1], change=broken)
    with pytest.raises(ValueError, match="2 pictures and 1 pairs"):
        plot.ascent(X[:2], change=MAPS[:2], titles=[("a", "b")])


@pytest.mark.parametrize("name", ["residual_cnn", "pyramid_transformer"])
def test_ascents_are_told_from_pictures(name):
    x = zoo.draw(5, 4).pixels
    explainer = sp_fx.transform(zoo.load(name))
    for steps in (1, 5):
        change = explainer.ascend(x, 3, steps=steps, bounds=(-1.0, 1.0))
        plot.ascent(x, change=change)
        for i in range(len(x)):
            for picture in (x, x + change, 0.7 * x):
                with pytest.raises(ValueError, match=r"cosine (0\.[89]|1\.0).*change already.*change=after - before"):
                    plot.ascent(x[i : i + 1], change=picture[i : i + 1])
    plot.ascent(x, change=0.3 * x)  # more contrast is a change


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
    assert [text.get_text() for text in curve.get_legend().get_texts()] == ["cat", "dog"]
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
    with pytest.raises(ValueError, match=r"a map to draw has shape \[C, H, W\] or \[H, W\], got \[4, 3, 20, 24\]"):
        plot.table([[plot.signed_map(MAPS)]])
    with pytest.raises(ValueError, match=r"\[3, H, W\] or \[1, H, W\], got \[2, 20, 24\]"):
        plot.table([[plot.picture(X[0, :2])]])
    with pytest.raises(ValueError, match="1 of the picture's 1440 values are not finite"):
        plot.table([[plot.picture(broken)]])


def test_constants_zeros_and_single_pixels():
    for shape in ((3, 1, 1), (1, 1, 1), (3, 7, 5), (1, 1, 9)):
        for value in (0.0, 1.0, -2e-6):
            map = torch.full(shape, value)
            axes = drawn(plot.explanation(torch.zeros(shape), [map, map[0]], ["a", "b"], times_input=True, blur=0.7))
            low, high = axes[1].images[0].get_clim()
            assert low == -high and high == pytest.approx(abs(value) * shape[0] or 1.0, rel=1e-6)


def test_names_are_not_formulas(tmp_path):
    name = r"$x^2 and _$ of \frac{1}, a $5 note or a $10 one"
    figure = plot.explanation(X[0], [MAPS[0]], [name], f"cost in {name}", name)
    assert drawn(figure)[1].get_title().replace("\n", " ") == name
    plot.save(figure, tmp_path / "it.pdf")
    plot.save(plot.table([[plot.picture(X[0])]], title=name), tmp_path / "it.png")
    plot.animate(X, tmp_path / "it.gif", titles=[name] * 4)


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
