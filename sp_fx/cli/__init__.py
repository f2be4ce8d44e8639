"""The command `sp-fx`."""

from .commands import main

__all__ = ["main"]
