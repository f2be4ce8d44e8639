"""Semantic pullbacks: turn a pretrained PyTorch model into a fast explainer. Start at `transform`.

Public is what `__all__` lists: the names below, and the modules `targets`, `plot`, `bridges`, `models`, `offline` and `zoo`. The
folders are the machinery, in the order in which a model goes through them: gates, capture, analysis, rewrite, methods, program.
"""

from importlib import import_module as _import_module
from typing import Any as _Any

from .build import NotRewrittenError, transform
from .capture.capture import CaptureError
from .checks.check import Checks, check
from .explainer import Explainer
from .figures.showing import show
from .gates.adjoints.row import Soft
from .gates.presets import PRESETS, Preset
from .gates.registry import register_gate
from .gates.rules import Rules
from .models.images import read_picture
from .models.pixel_space import pixel_space
from .packages.errors import PackageError
from .packages.package import load
from .rewrite.report import Report, Site
from .version import __version__

__all__ = [
    "PRESETS",
    "CaptureError",
    "Checks",
    "Explainer",
    "NotRewrittenError",
    "PackageError",
    "Preset",
    "Report",
    "Rules",
    "Site",
    "Soft",
    "__version__",
    "bridges",
    "check",
    "load",
    "models",
    "offline",
    "pixel_space",
    "plot",
    "read_picture",
    "register_gate",
    "show",
    "targets",
    "transform",
    "zoo",
]
_MODULES = ("bridges", "models", "offline", "plot", "targets", "zoo")


def __getattr__(name: str) -> _Any:
    """`sp_fx.plot` and its like are imported when they are first asked for, so that `import sp_fx` stays light."""
    if name in _MODULES:
        return _import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
