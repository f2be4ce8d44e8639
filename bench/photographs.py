"""The photographs that SqueezeNet is judged on: those in `--data`, then others, which no default was chosen on.

The others come with packages, where these are installed (`pip install --no-deps foolbox scikit-image`): the twenty ImageNet
pictures of Foolbox, and those of scikit-image that show a class of ImageNet.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

SKIMAGE = ("chelsea.png", "coffee.png", "rocket.jpg")  # tabby, espresso, missile


def photographs(data: Path) -> tuple[list[Path], int]:
    """Returns the files, and how many of them, the first ones, the defaults were chosen on."""
    chosen_on = sorted((data / "photos").glob("*.jpg"))
    others = sorted(folder("foolbox").glob("imagenet_*.jpg")) + [folder("skimage") / name for name in SKIMAGE]
    present = [path for path in others if path.exists()]
    if len(present) < 23:
        hint = "further photographs are missing: pip install --no-deps foolbox scikit-image"
        print(f"{23 - len(present)} of 23 {hint}", file=sys.stderr)
    return chosen_on + present, len(chosen_on)


def folder(package: str) -> Path:
    """Returns where an installed package keeps its data; a folder that does not exist where it is not installed."""
    spec = find_spec(package)
    return Path((spec.submodule_search_locations or ["missing"])[0] if spec else "missing") / "data"
