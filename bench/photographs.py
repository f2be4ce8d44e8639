"""The ImageNet photographs that SqueezeNet is judged on: those in `--data`, then others, which no default was chosen on.

The others come with packages, where these are installed (`pip install --no-deps foolbox scikit-image`): the twenty ImageNet
pictures of Foolbox, their classes in their names, and those of scikit-image that show a class of ImageNet.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

IMAGENETTE = (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)
SKIMAGE = {"chelsea.png": 281, "coffee.png": 967, "rocket.jpg": 657}  # tabby, espresso, missile


def photographs(data: Path) -> tuple[list[tuple[Path, int]], int]:
    """Files with the class that they show, and how many of them, the first ones, the defaults were chosen on."""
    chosen_on = list(zip(sorted((data / "photos").glob("*.jpg")), IMAGENETTE, strict=True))
    foolbox = [(path, int(path.stem.split("_")[-1])) for path in sorted(folder("foolbox").glob("imagenet_*.jpg"))]
    skimage = [(folder("skimage") / name, number) for name, number in SKIMAGE.items()]
    others = [(path, number) for path, number in foolbox + skimage if path.exists()]
    if len(others) < 23:
        told = "further photographs are missing: pip install --no-deps foolbox scikit-image"
        print(f"{23 - len(others)} of 23 {told}", file=sys.stderr)
    return chosen_on + others, len(chosen_on)


def folder(package: str) -> Path:
    """Where an installed package keeps its data; a folder that does not exist where it is not installed."""
    spec = find_spec(package)
    return Path((spec.submodule_search_locations or ["missing"])[0] if spec else "missing") / "data"
