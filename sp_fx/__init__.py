"""Semantic pullbacks: turn a pretrained PyTorch model into a fast explainer. Start at `transform`."""

from .check import Checks, check
from .clone import CaptureError
from .explainer import Explainer
from .make import NotRewrittenError, transform
from .manifest import PackageError
from .package import load
from .pixels import pixel_space
from .register import register_gate
from .report import Report, Site
from .rules import Rules
from .version import __version__

__all__ = [
    "CaptureError",
    "Checks",
    "Explainer",
    "NotRewrittenError",
    "PackageError",
    "Report",
    "Rules",
    "Site",
    "__version__",
    "check",
    "load",
    "pixel_space",
    "register_gate",
    "transform",
]
