"""The command `sp-fx`: `parser` reads its options, `commands` does what they say."""

from .commands import main

__all__ = ["main"]
