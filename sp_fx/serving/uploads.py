"""Uploaded pictures, which may be anything: decoded with limits. Needs Pillow (extra `serve`)."""

from __future__ import annotations

import io

import numpy as np

from ..models.images import HugeError, Preprocessing, to_rgb

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # raster formats with decoders that allocate what the header says, and no more


class PictureError(ValueError):
    """An upload that is no picture of the known formats, or one with too many pixels (`too_large`)."""

    def __init__(self, message: str, too_large: bool = False) -> None:
        super().__init__(message)
        self.too_large = too_large


def decode(content: bytes, preprocessing: Preprocessing, max_pixels: int) -> np.ndarray:
    """Returns the picture in `content` as `preprocessing` makes it of a file: float32 [channels, height, width] in [-1, 1].

    The header is read first, and nothing is decoded or resized beyond `max_pixels`.

    Raises:
        PictureError: no picture of the known formats, a truncated one, or one of more pixels.
    """
    from PIL import Image, ImageOps

    try:
        file = Image.open(io.BytesIO(content), formats=FORMATS)
        if file.width * file.height > max_pixels:
            raise PictureError(f"a picture of {file.width} x {file.height} pixels, the limit is {max_pixels}", too_large=True)
        turned = ImageOps.exif_transpose(file)
        preprocessing.resized(turned.size, max_pixels)
        picture, _ = to_rgb(turned)
        return preprocessing.pixels(picture).numpy()
    except PictureError:
        raise
    except (Image.DecompressionBombError, HugeError) as error:
        raise PictureError(str(error), too_large=True) from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ...: all mean a damaged file
        # Not in Pillow's own words, which hold the address of an object.
        raise PictureError(f"not a whole picture of {', '.join(FORMATS)} ({type(error).__name__})") from error
