"""Animations of ascents, read back: frames, times, sizes, and the pixels in them."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

import sp_fx
from sp_fx import plot, zoo

QUARTERS = torch.tensor([[1.0, -1.0, -1.0], [-1.0, 1.0, -1.0], [-1.0, -1.0, 1.0], [1.0, 1.0, -1.0]])  # red, green, blue, yellow


def quarters():
    """A picture [3, 20, 20] of four colours: red and green above, blue and yellow below."""
    x = torch.empty(3, 20, 20)
    for k, colour in enumerate(QUARTERS):
        x[:, 10 * (k // 2) :, 10 * (k % 2) :] = colour[:, None, None]
    return x


def walk(steps=3):
    """A path [K + 1, 3, 20, 20] that brightens a patch of the upper left quarter, more at each step."""
    path = quarters().repeat(steps + 1, 1, 1, 1)
    for k in range(steps + 1):
        path[k, 1, 2:8, 2:8] += 0.5 * k
    return path


def read(file):
    """The frames of a file, as arrays [H, W, 3], and their times in milliseconds."""
    image = Image.open(file)
    frames, times = [], []
    for k in range(image.n_frames):
        image.seek(k)
        image.load()
        frames.append(np.array(image.convert("RGB")).astype(int))
        times.append(image.info["duration"])
    assert image.info["loop"] == 0
    return frames, times


def regions(frame, colour):
    """Where a frame has a colour: the box (top, bottom, left, right) of its pixels, and how many there are."""
    found = np.abs(frame - (np.array(colour) + 1) * 127.5).max(-1) < 24
    rows, columns = np.nonzero(found.any(1))[0], np.nonzero(found.any(0))[0]
    return (rows[0], rows[-1], columns[0], columns[-1]), int(found.sum())


@pytest.mark.parametrize("suffix", ["gif", "webp", "GIF"])
def test_frames_and_times(tmp_path, suffix):
    file = tmp_path / f"it.{suffix}"
    plot.animate(walk(), file, seconds=0.3)
    frames, times = read(file)
    assert Image.open(file).format == suffix.upper()
    assert times == [300, 300, 300, 900]
    assert len({frame.shape for frame in frames}) == 1
    height, width, _ = frames[0].shape
    assert 150 < height < 500 and 300 < width < 800


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_the_first_frame_has_the_picture_and_no_change(tmp_path, suffix):
    plot.animate(walk(), tmp_path / f"it.{suffix}")
    frames, _ = read(tmp_path / f"it.{suffix}")
    boxes, counts = zip(*(regions(frames[0], colour) for colour in QUARTERS.tolist()))
    red, green, blue, yellow = boxes
    assert red[1] <= blue[0] + 3 and green[1] <= yellow[0] + 3 and red[3] <= green[2] + 3 and blue[3] <= yellow[2] + 3
    side = red[1] - red[0]
    assert side > 60 and all(abs(count / side**2 - 1) < 0.15 for count in counts)
    # Right of it the map, all of it the colour of zero.
    left, top = green[3] + side, red[0]
    middle = frames[0][top + 10 : top + 2 * side - 10, left : left + side // 2]
    assert np.abs(middle - 247).max() < 6


def test_the_change_grows_on_one_scale(tmp_path):
    plot.animate(walk(), tmp_path / "it.webp")
    frames, _ = read(tmp_path / "it.webp")
    (top, bottom, left, right), _ = regions(frames[0], QUARTERS[0].tolist())
    (_, _, _, end), _ = regions(frames[0], QUARTERS[1].tolist())
    side = right - left  # of a quarter
    begin = end + side // 10  # of the map, past the gap that parts it from the picture
    patch = tuple(slice(start + int(0.4 * side), start + int(0.6 * side)) for start in (top, begin))
    paleness = [frame[patch][..., 2].mean() for frame in frames]  # red is zero's white without its blue
    assert paleness[0] > 240 and all(a > b + 20 for a, b in pairwise(paleness))
    under = slice(bottom + side + 8, None)  # the colour bar and its numbers
    for frame in frames[1:]:
        assert np.abs(frame[under] - frames[0][under]).mean() < 1


def test_titles_move_nothing(tmp_path):
    long = "seen as great white shark, white shark, man-eater, man-eating shark, Carcharodon carcharias"
    plot.animate(walk(1), tmp_path / "it.webp", titles=["start", long])
    frames, _ = read(tmp_path / "it.webp")
    boxes = [regions(frame, QUARTERS[3].tolist())[0] for frame in frames]
    assert frames[0].shape == frames[1].shape and np.abs(np.subtract(*boxes)).max() <= 1
    assert (frames[1][:20] < 128).any() and not (frames[0][:20] < 128).any()  # the lines of the long one


def test_ascents_as_they_are_returned(tmp_path):
    x = zoo.draw(5, 2).pixels
    explainer = sp_fx.transform(zoo.load("residual_cnn"))
    _, path = explainer.ascend(x, 3, steps=2, bounds=(-1.0, 1.0), return_path=True)
    plot.animate(path[:, 1], tmp_path / "one.gif")
    plot.animate(path[:, 1:], tmp_path / "too.gif")
    assert (tmp_path / "one.gif").read_bytes() == (tmp_path / "too.gif").read_bytes()
    with pytest.raises(ValueError, match=r"\[K \+ 1, 1, C, H, W\].*got \[3, 2, 3, 96, 96\]"):
        plot.animate(path, tmp_path / "it.gif")


@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (2, 1, 7, 5), (3, 1, 31, 9), (2, 3, 9, 31)])
@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_odd_sizes(tmp_path, shape, suffix):
    path = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    plot.animate(path.requires_grad_(), str(tmp_path / f"it.{suffix}"), titles=["", "it", "on"][: shape[0]])
    frames, _ = read(tmp_path / f"it.{suffix}")
    assert len(frames) == shape[0] and all((frame < 200).any() for frame in frames)


def test_a_path_that_stands_still(tmp_path):
    plot.animate(torch.zeros(3, 3, 8, 8), tmp_path / "it.gif", seconds=0.1)
    frames, times = read(tmp_path / "it.gif")
    assert len(frames) == 3 and sum(times) == 500


def test_what_is_refused(tmp_path):
    path = walk()
    for name in ("it.png", "it", "it.mp4"):
        with pytest.raises(ValueError, match=r"\.gif or \.webp"):
            plot.animate(path, tmp_path / name)
    for shape in ((3, 20, 20), (1, 3, 20, 20), (0, 3, 20, 20), (4, 2, 3, 20, 20)):
        with pytest.raises(ValueError, match=r"\[K \+ 1, C, H, W\].*got \[" + str(shape[0])):
            plot.animate(torch.zeros(shape), tmp_path / "it.gif")
    with pytest.raises(ValueError, match=r"\[3, H, W\] or \[1, H, W\], got \[2, 20, 20\]"):
        plot.animate(torch.zeros(4, 2, 20, 20), tmp_path / "it.gif")
    with pytest.raises(ValueError, match="got tuple"):
        plot.animate((path[0], path), tmp_path / "it.gif")
    for titles in (["a"], "abcd", ["a"] * 5):
        with pytest.raises(ValueError, match="each of the 4 iterates has a title"):
            plot.animate(path, tmp_path / "it.gif", titles=titles)
    for seconds in (0, -1, 0.001, math.nan, math.inf, 1e4):
        with pytest.raises(ValueError, match="seconds, got"):
            plot.animate(path, tmp_path / "it.gif", seconds=seconds)
    path[2, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        plot.animate(path, tmp_path / "it.gif")
    assert not list(tmp_path.iterdir())  # nothing is begun that is not finished
