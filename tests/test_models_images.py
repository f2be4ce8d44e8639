"""Picture files of every kind become the eight-bit RGB that one sees, or are refused with the reason."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as T

import sp_fx
from sp_fx.models.images import Preprocessing, pictures_in, read_rgb

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (31, 40, 3), dtype=np.uint8)
AS_IT_IS = Preprocessing(31, 31, "bilinear", (0.5,) * 3, (0.5,) * 3)


@pytest.fixture
def saved(tmp_path):
    def save(image, name="it.png", **how):
        image.save(tmp_path / name, **how)
        return tmp_path / name

    return save


@pytest.mark.parametrize("size", [(160, 120), (101, 300), (96, 96), (333, 257), (40, 31)])
@pytest.mark.parametrize(("resize", "crop", "how"), [(256, 224, "bilinear"), (232, 224, "bicubic"), (97, 64, "lanczos")])
def test_resized_and_cropped_as_torchvision_does(saved, size, resize, crop, how):
    path = saved(Image.fromarray(RNG.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)))
    expected = T.to_tensor(T.center_crop(T.resize(Image.open(path), resize, InterpolationMode(how)), crop)) * 2 - 1
    found = Preprocessing(resize, crop, how, (0,) * 3, (1,) * 3)(path)
    assert torch.equal(found.pixels, expected) and found.size == size and found.conversions == ()


def test_grey(saved):
    image, mode, done = read_rgb(saved(Image.fromarray(COLOUR[..., 0])))
    assert mode == "L" and done == ("L to RGB",)
    assert np.array_equal(np.array(image), np.repeat(COLOUR[..., :1], 3, -1))


def test_black_and_white(saved):
    image, mode, _ = read_rgb(saved(Image.fromarray(COLOUR[..., 0] > 127)))
    assert mode == "1" and np.array_equal(np.array(image)[..., 0], np.where(COLOUR[..., 0] > 127, 255, 0))


@pytest.mark.parametrize("channels", [2, 4])
def test_transparency_shows_white(saved, channels):
    pixels = np.concatenate([COLOUR[..., : channels - 1], np.zeros((31, 40, 1), np.uint8)], -1)
    pixels[:5, :, -1] = 255
    pixels[5, :, -1] = 100
    image, _, done = read_rgb(saved(Image.fromarray(pixels)))
    seen = np.array(image)
    assert done == ("transparency over white",) and (seen[6:] == 255).all()
    assert np.array_equal(seen[:5], np.broadcast_to(pixels[:5, :, :-1], (5, 40, 3)))
    blended = 255 + (pixels[5, :, :-1].astype(float) - 255) * 100 / 255
    assert np.abs(seen[5] - blended).max() <= 1  # pillow rounds twice


def test_palette_with_and_without_transparency(saved):
    palette = Image.fromarray(COLOUR).quantize(16)
    image, mode, done = read_rgb(saved(palette))
    assert mode == "P" and done == ("P to RGB",) and np.array_equal(np.array(image), np.array(palette.convert("RGB")))
    path = saved(palette, "clear.png", transparency=3)
    image, mode, done = read_rgb(path)
    assert mode == "P" and done == ("transparency over white",)
    clear = np.array(palette) == 3
    assert clear.any() and (np.array(image)[clear] == 255).all()
    assert np.array_equal(np.array(image)[~clear], np.array(palette.convert("RGB"))[~clear])


def test_a_transparent_colour_of_an_rgb_picture(saved):
    pixels = COLOUR.copy()
    pixels[:4] = (1, 2, 3)
    image, mode, done = read_rgb(saved(Image.fromarray(pixels), transparency=(1, 2, 3)))
    assert mode == "RGB" and done == ("transparency over white",) and (np.array(image)[:4] == 255).all()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_grey_is_scaled_not_clipped(saved, suffix):
    wide = RNG.integers(0, 65536, (31, 40)).astype(np.uint16)
    image, mode, done = read_rgb(saved(Image.fromarray(wide), f"wide.{suffix}"))
    assert mode.startswith("I;16") and done == ("16-bit grey to 8 bits",)
    assert np.abs(np.array(image)[..., 0] - wide / 257).max() <= 0.5 + 1e-9


def test_sixteen_bit_colour(tmp_path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    wide = RNG.integers(0, 65536, (5, 7, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in wide)
    header = struct.pack(">IIBBBBB", 7, 5, 16, 2, 0, 0, 0)
    path = tmp_path / "wide.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    image, mode, _ = read_rgb(path)
    assert mode == "RGB" and np.abs(np.array(image) - wide.astype(float) / 257).max() <= 1


def test_cmyk(saved):
    ink = Image.fromarray(np.full((31, 40, 4), (0, 255, 0, 0), np.uint8), "CMYK")
    image, mode, done = read_rgb(saved(ink, "ink.jpg", quality=100))
    assert mode == "CMYK" and done == ("CMYK to RGB",)
    assert np.abs(np.array(image, float) - (255, 0, 255)).max() <= 3  # full magenta, to JPEG's precision


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(saved, orientation):
    upright = np.array(Image.fromarray(COLOUR).resize((16, 24), Image.Resampling.BOX))
    turned = upright.transpose(1, 0, 2)
    # How the rows and columns lie in the file for each value of the tag (Exif 2.3, 4.6.4).
    stored = [
        upright,
        upright[:, ::-1],
        upright[::-1, ::-1],
        upright[::-1],
        turned,
        turned[::-1],  # to be turned a quarter clockwise
        turned[::-1, ::-1],
        turned[:, ::-1],  # to be turned a quarter counterclockwise
    ]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image, _, done = read_rgb(saved(Image.fromarray(np.ascontiguousarray(stored[orientation - 1])), exif=exif))
    assert np.array_equal(np.array(image), upright)
    assert done == (() if orientation == 1 else ("rotated as its EXIF says",))


def test_the_first_of_several_frames(saved):
    frames = [Image.fromarray(np.full((31, 40, 3), value, np.uint8)) for value in (200, 10)]
    image, _, done = read_rgb(saved(frames[0], "moving.gif", save_all=True, append_images=frames[1:]))
    assert done[0] == "the first of 2 frames" and (np.array(image) == 200).all()


def test_one_pixel(saved):
    found = AS_IT_IS(saved(Image.new("RGB", (1, 1), (255, 0, 0))))
    assert torch.equal(found.pixels.flatten(1).unique(dim=1)[:, 0], torch.tensor([1.0, -1.0, -1.0]))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_a_range_that_is_not_known(saved, mode):
    with pytest.raises(ValueError, match=f"32-bit pixels .mode {mode}., whose range is not known"):
        read_rgb(saved(Image.new(mode, (9, 9)), "wide.tif"))


@pytest.mark.parametrize("shrink", [2, 5])  # pillow warns above its limit, and raises above twice as much
def test_a_decompression_bomb(saved, monkeypatch, shrink):
    path = saved(Image.fromarray(COLOUR))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 31 * 40 // shrink + 1)
    with pytest.raises(ValueError, match=r"more than \d+ pixels, the most that are read"):
        AS_IT_IS(path)


def test_a_ribbon_that_would_be_huge_once_resized(saved):
    with pytest.raises(ValueError, match="a picture of 20000 x 2 would be resized to 2560000 x 256, by way of 655360000 pixels"):
        Preprocessing(256, 224, "bilinear", (0,) * 3, (1,) * 3)(saved(Image.new("RGB", (20_000, 2))))


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "tif", "bmp"])
def test_truncated(saved, suffix):
    path = saved(Image.fromarray(COLOUR), f"cut.{suffix}")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises((OSError, ValueError)) as refused:
        read_rgb(path)
    assert str(refused.value)


def test_random_damage_never_escapes(saved):
    """Flipped bytes give a picture or one of the two errors, nothing else."""
    path = saved(Image.fromarray(COLOUR))
    whole, rng = bytearray(path.read_bytes()), np.random.default_rng(1)
    for _ in range(200):
        hurt = bytearray(whole)
        for place in rng.integers(8, len(whole), 3):
            hurt[place] = rng.integers(256)
        path.write_bytes(hurt)
        try:
            read_rgb(path)
        except (OSError, ValueError):
            pass


def test_not_a_picture(tmp_path):
    for content in (b"", b"hello", bytes(200)):
        (tmp_path / "it.jpg").write_bytes(content)
        with pytest.raises(OSError, match="not a picture"):
            read_rgb(tmp_path / "it.jpg")
    for path in (tmp_path / "gone.png", tmp_path):
        with pytest.raises(OSError):
            read_rgb(path)


def test_pictures_made_square_whatever_their_proportion(saved):
    """As `torchvision.transforms.Resize((64, 64))` makes them."""
    path = saved(Image.fromarray(COLOUR), "a.png")
    for how, filter in (("bilinear", InterpolationMode.BILINEAR), ("bicubic", InterpolationMode.BICUBIC)):
        wanted = T.pil_to_tensor(T.resize(Image.open(path), (64, 64), filter)).float() / 255 * 2 - 1
        assert torch.equal(sp_fx.read_picture(path, 64, squash=True, interpolation=how)[0], wanted)


def test_a_crop_that_is_not_covered(saved):
    """It would get black borders."""
    path = saved(Image.fromarray(COLOUR), "a.png")
    for resize, crop in ((20, 32), ((32, 20), 32), ((40, 31), (40, 32)), (24, (32, 24))):
        with pytest.raises(ValueError, match=r"does not cover the crop of .*: resize is at least that"):
            sp_fx.read_picture(path, crop, resize=resize)
    padded = Preprocessing(16, 32, "bilinear", (0.5,) * 3, (0.5,) * 3)(path)  # who says it gets it: torchvision does the same
    assert bool((padded.pixels[:, :8] == -1).all()) and not bool((padded.pixels[:, 8:24] == -1).all())


def test_folders_behind_links(saved, tmp_path):
    """Each once, also where a link leads back."""
    (tmp_path / "far").mkdir()
    (tmp_path / "near" / "in").mkdir(parents=True)
    for place in ("far/a.png", "near/b.png", "near/in/c.png"):
        Image.fromarray(COLOUR).save(tmp_path / place)
    (tmp_path / "near" / "link").symlink_to(tmp_path / "far")
    (tmp_path / "near" / "twice").symlink_to(tmp_path / "far")
    (tmp_path / "near" / "in" / "back").symlink_to(tmp_path / "near")
    (tmp_path / "near" / "gone").symlink_to(tmp_path / "nowhere")
    found = pictures_in(tmp_path / "near")
    assert [path.relative_to(tmp_path / "near").as_posix() for path in found] == ["b.png", "in/c.png", "link/a.png"]
