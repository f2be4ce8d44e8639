"""What an image processor of transformers makes of pictures, found by showing it some: what the settings of each kind mean is in
the kind's code alone."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..images import Preprocessing

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage


def asked(processor: Any, channels: int = 3) -> tuple[Preprocessing, bool]:
    """Returns the preprocessing that an image processor of transformers comes closest to, and whether it puts blue first.

    Raises:
        ValueError: what it makes of pictures is no crop of a size of its own, normalised.
    """
    from PIL import Image

    mode = "RGB" if channels == 3 else "L"

    def seen(image: PillowImage) -> Tensor:
        made = processor(image.convert(mode), return_tensors="pt")
        if "pixel_values" not in made or made["pixel_values"].dim() != 4 or made["pixel_values"].shape[1] != channels:
            shapes = ", ".join(f"{key} {list(value.shape)}" for key, value in made.items() if isinstance(value, Tensor))
            raise ValueError(f"its {type(processor).__name__} makes {shapes} of one")
        return made["pixel_values"][0].float()

    # One colour at a time shows how it is normalised, whichever settings do that.
    basis = [(255, 0, 0), (0, 255, 0), (0, 0, 255)] if channels == 3 else [(255, 255, 255)]
    black, *colours = (_middle(seen(Image.new("RGB", (64, 48), colour))) for colour in [(0, 0, 0), *basis])
    gains = torch.stack([colour - black for colour in colours]).double()
    bgr = channels == 3 and not bool(gains[0, 0]) and bool(gains[0, 2])  # red is seen in the last channel
    slope, offset = (gains.fliplr().diagonal(), black.flip(0)) if bgr else (gains.diagonal(), black)
    if not bool((slope > 0).all()):
        raise ValueError(f"its {type(processor).__name__} makes no picture of a plain colour brighter where that is")
    said = {key: value for key, value in processor.to_dict().items() if value is not None}
    mean = _as_said((-offset.double() / slope).tolist(), said.get("image_mean"))
    std = _as_said((1 / slope).tolist(), said.get("image_std"))

    # Of the ways to resize and crop, the one that comes closest on a wide and on a high picture.
    _, height, width = seen(_drawn(300, 200)).shape
    pictures = [_drawn(int(1.5 * width) + 1, int(1.2 * height)), _drawn(int(1.1 * width), int(1.7 * height) + 1)]
    shift, scale = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)
    wanted = [(each.flip(0) if bgr else each) * scale + shift for each in map(seen, pictures)]
    if any(each.shape[1:] != (height, width) for each in wanted):
        raise ValueError(f"its {type(processor).__name__} makes {width} x {height} of one and other sizes of others")

    def distance(way: Preprocessing) -> float:
        return max(_apart((way.pixels(image) + 1) / 2, want) for image, want in zip(pictures, wanted))

    best = min(_ways(said, (height, width), mean, std), key=lambda way: round(distance(way), 5))
    if (off := 255 * distance(best)) > 3:
        warnings.warn(
            f"{type(processor).__name__} does more to pictures than resize, crop and normalise: those made here differ by "
            f"{off:.0f} of 255 on average",
            stacklevel=4,
        )
    return best, bgr


def _middle(pixels: Tensor) -> Tensor:
    return pixels[:, pixels.shape[1] // 2, pixels.shape[2] // 2]


def _apart(found: Tensor, wanted: Tensor) -> float:
    """The mean distance of two pictures. One may lie a pixel beside the other: where an odd number of them is cut off,
    torchvision and transformers leave one out at different ends."""
    rows, columns = found.shape[1] - 2, found.shape[2] - 2
    moved = (wanted[:, y : y + rows, x : x + columns] for y in range(3) for x in range(3))
    return min(float((found[:, 1:-1, 1:-1] - each).abs().mean()) for each in moved)


def _as_said(found: list[float], said: Any) -> tuple[float, ...]:
    """The mean or deviation as its settings have it, in full precision, where that is what was found."""
    if isinstance(said, list | tuple) and len(said) == len(found) and all(abs(a - b) < 1e-5 for a, b in zip(found, said)):
        return tuple(map(float, said))
    return tuple(round(value, 6) + 0.0 for value in found)  # no -0.0


def _ways(said: dict[str, Any], crop: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...]) -> list[Preprocessing]:
    """Returns the ways to resize and crop to `crop` that an image processor with these settings may mean."""
    pillows = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
    timms = said.get("data_config") or {}
    if "resample" in said:
        filters = [pillows.get(int(said["resample"]), "bilinear")]
    else:
        filters = [str(timms["interpolation"])] if "interpolation" in timms else ["bilinear", "bicubic"]
    size, side, least = dict(said.get("size") or {}), crop[0] if crop[0] == crop[1] else crop, min(crop)
    shares = [share for share in (said.get("crop_pct"), timms.get("crop_pct"), 224 / 256) if share]
    edges = dict.fromkeys([*(v for v in size.values() if v), *(int(least / share) for share in shares), least])
    boxes = dict.fromkeys([(size.get("height", crop[0]), size.get("width", crop[1])), crop])
    covered = [(edge, False) for edge in edges]
    squashed = [((h, w) if h != w else h, True) for h, w in boxes]
    return [Preprocessing(resize, side, how, mean, std, squash) for how in filters for resize, squash in [*squashed, *covered]]


def _drawn(width: int, height: int) -> PillowImage:
    """Returns a picture with detail of every size."""
    from PIL import Image

    noise = torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(0))
    waves = nn.functional.interpolate(noise[None], (height, width), mode="bicubic").clamp(0, 1)[0]
    return Image.fromarray((waves * 255).byte().permute(1, 2, 0).numpy())
