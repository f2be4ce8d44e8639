"""Picture files to tensors. Needs pillow (extras `vision` and `demo`).

Whatever a file holds becomes eight-bit RGB, as it is meant to be seen, and `Picture.conversions` says what that took:

- a rotation in its EXIF is applied; of several frames the first is taken;
- grey is repeated over the channels; a palette is looked up; transparency is laid over white;
- sixteen-bit grey is scaled to eight bits (pillow reads sixteen-bit colour as eight bits itself);
- CMYK, YCbCr, Lab and HSV are converted by pillow's formulas; colour profiles are ignored.

Refused, each with its reason: files that are no pictures, truncated ones, 32-bit integer and floating ones, whose range is not
known, and pictures of more than `Image.MAX_IMAGE_PIXELS` pixels as they are or once resized.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage


@dataclass(frozen=True)
class Picture:
    """A picture that was read: `pixels` float32 [3, N, N] in [-1, 1]; `size` (width, height) as seen, before resizing; `mode`,
    pillow's, such as "L" for grey, and `conversions` as the module lists them."""

    pixels: Tensor
    size: tuple[int, int]
    mode: str
    conversions: tuple[str, ...]


@dataclass(frozen=True)
class Preprocessing:
    """Resizes the shorter side to `resize` pixels and crops the centre to `crop`; the network behind it takes pixels in [0, 1],
    normalised by `mean` and `std`."""

    resize: int
    crop: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, path: str | PathLike[str]) -> Picture:
        """Returns the picture at `path`, resized and cropped as torchvision does it.

        Raises:
            OSError: the file cannot be opened, is no picture, or is truncated.
            ValueError: it is a picture that is refused (see the module), or damaged in some other way.
        """
        image, mode, conversions = read_rgb(path)
        size = image.size
        width, height = (int(self.resize * side / min(size)) for side in size)
        _check_pixels(width, height, f"once its shorter side is {self.resize}, from {size[0]} x {size[1]},")
        image = image.resize((width, height), self._filter())
        left, top = round((width - self.crop) / 2), round((height - self.crop) / 2)
        image = image.crop((left, top, left + self.crop, top + self.crop))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255) * 2 - 1
        return Picture(pixels, size, mode, conversions)

    def _filter(self):
        from PIL import Image

        return Image.Resampling[self.interpolation.upper()]


def read_rgb(path: str | PathLike[str]) -> tuple[PillowImage, str, tuple[str, ...]]:
    """Returns the picture at `path` as eight-bit RGB, the mode it was in, and the conversions. Errors as of `Preprocessing`."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
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


def _check_pixels(width: int, height: int, when: str = "it") -> None:
    from PIL import Image

    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{when} has {width} x {height} pixels; at most {Image.MAX_IMAGE_PIXELS} are read")
