"""An explainer in the calling conventions of other libraries. Captum's gradient methods take it as their model unchanged."""

from .quantus import explain_func
from .zennit import Attributor

__all__ = ["Attributor", "explain_func"]
