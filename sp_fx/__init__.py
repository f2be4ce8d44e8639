"""Semantic pullbacks: turn a pretrained PyTorch model into a fast explainer. Start at `transform`."""

from .build import NotRewrittenError, transform
from .capture.capture import CaptureError
from .checks.check import Checks, check
from .explainer import Explainer
from .figures.pixel_space import pixel_space
from .gates.registry import register_gate
from .gates.rules import Rules
from .packages.errors import PackageError
from .packages.package import load
from .rewrite.report import Report, Site
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
