"""Semantic pullbacks: turn a pretrained PyTorch model into a fast explainer. Start at `transform`."""

from .capture import CaptureError
from .explainer import Explainer, NotRewrittenError, transform
from .pixels import pixel_space
from .rewrite import Report, Site
from .rules import Rules

__all__ = ["CaptureError", "Explainer", "NotRewrittenError", "Report", "Rules", "Site", "pixel_space", "transform"]
__version__ = "0.1.0"
