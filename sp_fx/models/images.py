"""Picture files to tensors. Needs pillow (extras `vision` and `demo`).

Whatever a file holds becomes eight-bit RGB, as it is meant to be seen, and `Picture.conversions` says what that took:

- a rotation in its EXIF is applied; of several frames the first is taken;
- grey is repeated over the channels; a palette is looked up; transparency is laid over white;
- sixteen-bit grey is scaled to eight bits (pillow reads sixteen-bit colour as eight bits itself);
- CMYK, YCbCr, Lab and HSV are converted by pillow's formulas; colour profiles are ignored.

Refused, each with its reason: files that are no pictures, truncated ones, 32-bit integer and floating ones, whose range is not
known, and pictures of more than `Image.MAX_IMAGE_PIXELS` pixels as they are or once resized. A resized picture is cropped at its
centre (`Preprocessing`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")  # of the pictures that a folder stands for
FILTERS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")  # pillow's, by which a picture is resized
Side = int | tuple[int, int]  # of a square; or (height, width)


@dataclass(frozen=True)
class Picture:
    """A picture that was read: `pixels` float32 [C, H, W] in [-1, 1]; `size` (width, height) as seen, before resizing; `mode`,
    pillow's, such as "L" for grey, and `conversions` as the module lists them."""

    pixels: Tensor
    size: tuple[int, int]
    mode: str
    conversions: tuple[str, ...]


@dataclass(frozen=True)
class Preprocessing:
    """What a picture becomes for a network: resized until it just covers `resize`, and its centre cropped to `crop`. Both are the
    side of a square, in pixels, or (height, width): 256 and 224 make the shorter side 256. A crop that is larger than the resized
    picture has black borders, as torchvision's and some of transformers' have. The command line, Python, batch jobs
    and the service all prepare pictures by this class, and packages record it.

    Attributes:
        interpolation: one of `FILTERS`.
        mean, std: of each channel: the network behind it takes pixels in [0, 1], normalised by these (`sp_fx.pixel_space` does
            it). One number each is a network of grey pictures.
        squash: the picture is resized to `resize` itself, whatever its proportion.
    """

    resize: Side
    crop: Side
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    squash: bool = False

    def __post_init__(self) -> None:
        if self.interpolation not in FILTERS:
            raise ValueError(f"a picture is resized by one of {', '.join(FILTERS)}; got {self.interpolation!r}")
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3):
            raise ValueError(
                f"expected a mean and a std for each of 3 channels, or of 1 for grey; got {len(self.mean)} means and "
                f"{len(self.std)} stds"
            )
        _sides(self.resize), _sides(self.crop)

    @classmethod
    def recorded(cls, record: dict[str, Any]) -> Preprocessing:
        """Returns what `dataclasses.asdict` has made JSON of."""
        values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in record.items()}
        return cls(**values)

    @property
    def cropped(self) -> tuple[int, int]:
        """The (height, width) of what a picture becomes."""
        return _sides(self.crop)

    def __call__(self, path: str | PathLike[str]) -> Picture:
        """Returns the picture at `path`, resized and cropped as torchvision does it.

        Raises:
            OSError: the file cannot be opened, is no picture, or is truncated.
            ValueError: it is a picture that is refused (see the module), or damaged in some other way.
        """
        image, mode, conversions = read_rgb(path)
        return Picture(self.pixels(image), image.size, mode, conversions)

    def resized(self, size: tuple[int, int], most: int | None = None) -> tuple[int, int]:
        """Returns what a picture of `size` is resized to, both (width, height), before it is cropped.

        Raises:
            HugeError: more pixels than `most`, or `Image.MAX_IMAGE_PIXELS` where that is None, on the way: a ribbon of 20000 x 2
                would cover 224 x 224 as 2240000 x 224.
        """
        from PIL import Image

        rows, columns = _sides(self.resize)
        wide, high = (columns, rows) if self.squash else covering(size, (columns, rows))
        most = Image.MAX_IMAGE_PIXELS if most is None else most
        # Pillow makes a picture as wide as the result first, and as high as it was: of a squashed ribbon that is the larger one.
        way = wide * max(high, size[1])
        if most is not None and way > most:
            raise HugeError(
                f"a picture of {size[0]} x {size[1]} would be resized to {wide} x {high}, by way of {way} pixels; at most {most} "
                "are read"
            )
        return wide, high

    def pixels(self, image: PillowImage) -> Tensor:
        """Returns an eight-bit RGB picture as the network's float32 [C, *crop] in [-1, 1]; HugeError as of `resized`."""
        from PIL import Image

        size, (height, width) = self.resized(image.size), self.cropped
        image = image.resize(size, Image.Resampling[self.interpolation.upper()])
        left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
        image = image.crop((left, top, left + width, top + height))
        if len(self.mean) == 1:
            image = image.convert("L")
        values = torch.from_numpy(np.array(image)).view(height, width, -1)
        return values.permute(2, 0, 1).contiguous().float().div(255) * 2 - 1


def fitting(size: Side, channels: int = 3) -> Preprocessing:
    """Returns the preprocessing for inputs of `size` where nothing more is known of the network: the picture just covers it, and
    a picture of this very size stays as it is."""
    return Preprocessing(size, size, "bilinear", (0.5,) * channels, (0.5,) * channels)


def covering(size: tuple[int, int], box: tuple[int, int]) -> tuple[int, int]:
    """Returns the smallest size in the proportion of `size` that covers `box`, all (width, height); longer sides are rounded
    down, as torchvision does."""
    (width, height), (columns, rows) = size, box
    if columns * height > rows * width:  # the picture is higher in proportion
        return columns, max(rows, int(columns * height / width))
    return max(columns, int(rows * width / height)), rows


def _sides(side: Side) -> tuple[int, int]:
    pair = (side, side) if isinstance(side, int) else side
    if not isinstance(pair, tuple) or len(pair) != 2 or not all(isinstance(s, int) and s > 0 for s in pair):
        raise ValueError(f"a size is the side of a square, or (height, width), in whole pixels; got {side!r}")
    return pair


def pictures_in(folder: str | PathLike[str]) -> list[Path]:
    """Returns the files in a folder, and in the folders in it, that end as pictures do (`ENDINGS`), sorted by name; hidden ones
    are left out. Links to folders are followed, and a folder that is there twice is taken once.

    Raises:
        NotADirectoryError: it is no folder.
        OSError: it, or a folder in it, cannot be listed.
    """
    root = Path(folder)
    if not root.is_dir():
        raise NotADirectoryError(f"there is no folder {root}")
    found, seen = list[Path](), {root.resolve()}
    for place, folders, files in os.walk(root, onerror=_raise, followlinks=True):
        inside = {Path(place, name).resolve(): name for name in sorted(folders, reverse=True) if not name.startswith(".")}
        folders[:] = sorted(name for path, name in inside.items() if path not in seen)  # a link may lead back to where it is
        seen |= inside.keys()
        found += [Path(place, name) for name in files if name.lower().endswith(ENDINGS) and not name.startswith(".")]
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error  # a folder that cannot be listed, whose pictures would be left out without a word


def read_picture(
    path: str | PathLike[str] | Iterable[str | PathLike[str]],
    size: Side | Preprocessing = 224,
    *,
    resize: Side | None = None,
    squash: bool = False,
    interpolation: str = "bilinear",
    channels: int = 3,
) -> Tensor:
    """Returns the picture at `path` as pixels in [-1, 1]: float32 [1, 3, size, size], a batch of one, or of all where `path` is a
    list of paths: `x = sp_fx.read_picture("cat.jpg", 224, resize=256)`.

    The picture is resized until it just covers `resize`, and its centre is cropped to `size`. Grey, transparent, rotated and
    16-bit pictures are converted as they are seen (`sp_fx.models.images`).

    Args:
        size: side of the square, or (height, width), in pixels; or a network's own `Preprocessing`, which says it all:
            `sp_fx.read_picture("cat.jpg", net.preprocessing)`.
        resize: in pixels; None is `size`. Networks of torchvision were mostly tested at 256 for 224.
        squash: the picture is resized to `size` whatever its proportion, as `torchvision.transforms.Resize((224, 224))` does it.
        interpolation: one of `FILTERS`.
        channels: 3, or 1 for grey.

    Raises:
        OSError: no file, a folder, no picture, or a truncated one.
        ValueError: a picture that is refused, an empty list, or another `size`, `resize`, `interpolation` or `channels`.
    """
    if isinstance(size, Preprocessing):
        if resize is not None or squash:
            raise ValueError("a Preprocessing says how pictures are resized: pass it without resize and squash")
        preprocessing = size
    else:
        fitted = fitting(size, channels)
        preprocessing = replace(fitted, resize=size if resize is None else resize, squash=squash, interpolation=interpolation)
        if any(side < wanted for side, wanted in zip(_sides(preprocessing.resize), preprocessing.cropped)):
            raise ValueError(f"a picture resized to {resize} does not cover the crop of {size}: resize is at least that")
    paths = [path] if isinstance(path, str | PathLike) else list(path)
    if not paths:
        raise ValueError("no picture: the list of paths is empty")
    for each in paths:
        if Path(each).is_dir():
            raise IsADirectoryError(f"{each} is a folder; sp_fx.offline.pictures({str(each)!r}) lists the pictures in it")
    return torch.stack([preprocessing(each).pixels for each in paths])


def read_rgb(path: str | PathLike[str]) -> tuple[PillowImage, str, tuple[str, ...]]:
    """Returns the picture at `path` as eight-bit RGB, the mode it was in, and the conversions. Errors as of `Preprocessing`."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        if not Path(path).is_file() and Path(path).exists():
            raise OSError("it is a folder" if Path(path).is_dir() else "it is no file")  # a pipe would be waited for
        try:
            with Image.open(path) as file:
                _check_pixels(*file.size)
                mode, conversions = file.mode, []
                if getattr(file, "n_frames", 1) > 1:
                    conversions.append(f"the first of {file.n_frames} frames")  # type: ignore[attr-defined]
                image = ImageOps.exif_transpose(file)
                if file.getexif().get(0x0112, 1) != 1:
                    conversions.append("rotated as its EXIF says")
                image, to_eight_bits = to_rgb(image)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise ValueError(f"it has more than {Image.MAX_IMAGE_PIXELS} pixels, the most that are read") from None
        except UnidentifiedImageError:
            raise OSError("it is not a picture in any format that is read") from None
        except (OSError, ValueError):
            raise
        except Exception as error:  # each of pillow's decoders has its own: SyntaxError, struct.error, zlib.error, ...
            raise ValueError(f"it is damaged ({type(error).__name__}: {error})") from error
    return image, mode, (*conversions, *to_eight_bits)


def to_rgb(image: PillowImage) -> tuple[PillowImage, list[str]]:
    """Returns the picture as eight-bit RGB, and the conversions that this took. Errors as of `Preprocessing`."""
    from PIL import Image

    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()  # here, where what is wrong with the file is caught
        return image, []
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.array(image) / 257).round().astype(np.uint8)).convert("RGB"), ["16-bit grey to 8 bits"]
    if image.mode in ("I", "F"):
        raise ValueError(
            f"it has 32-bit pixels (mode {image.mode}), whose range is not known; save it with 8 or 16 bits a channel"
        )
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"), ["transparency over white"]
    return image.convert("RGB"), [f"{image.mode} to RGB"]


class HugeError(ValueError):
    """A picture has more pixels than are read."""


def _check_pixels(width: int, height: int, when: str = "it") -> None:
    from PIL import Image

    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise HugeError(f"{when} has {width} x {height} pixels; at most {Image.MAX_IMAGE_PIXELS} are read")
