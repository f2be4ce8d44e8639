"""Small trained networks and drawn scenes with known truth, for trying explanations offline."""

from .scenes import Scenes, draw
from .shapes import KINDS
from .store import NAMES, load

labels: tuple[str, ...] = KINDS

__all__ = ["KINDS", "NAMES", "Scenes", "draw", "labels", "load"]
