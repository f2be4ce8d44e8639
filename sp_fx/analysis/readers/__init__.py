"""One file a family of gates: every form in which a model may call it, read into one `Gate`."""

from . import affine, by_index, norms, pooling, relu, smooth  # noqa: F401  (each registers its readers)
from .attention import SOFTMAX
from .reader import READERS, Gate, Unread, is_tensor
from .relu import COMPUTED, bounded

__all__ = ["COMPUTED", "READERS", "SOFTMAX", "Gate", "Unread", "bounded", "is_tensor"]
