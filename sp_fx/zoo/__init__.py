"""Two small trained networks, and drawn scenes whose objects' pixels are known: explanations can be tried offline."""

from .scenes import Scenes, draw
from .shapes import KINDS
from .store import NAMES, load

labels: tuple[str, ...] = KINDS

__all__ = ["KINDS", "NAMES", "Scenes", "draw", "labels", "load"]
