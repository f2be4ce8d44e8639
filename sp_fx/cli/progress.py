"""A progress bar on the terminal."""

from __future__ import annotations

import sys
import time
from typing import Any


class Progress:
    """A bar on stderr, where that is a terminal and there are several things to do; `say` prints lines above it."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.started = total, 0, time.perf_counter()
        self.shown = total > 1 and sys.stderr.isatty()
        self._draw()

    def say(self, line: str, file: Any = None) -> None:
        self._clear()
        print(line, file=file or sys.stdout, flush=self.shown)
        self._draw()

    def advance(self, count: int) -> None:
        self.done += count
        self._draw()

    def end(self) -> None:
        self._clear()

    def _draw(self) -> None:
        if self.shown:
            filled, spent = 30 * self.done // self.total, time.perf_counter() - self.started
            left = f", {spent / self.done * (self.total - self.done):.0f} s left" if self.done else ""
            print(f"\r[{'#' * filled:30}] {self.done}/{self.total}{left}\033[K", end="", file=sys.stderr, flush=True)

    def _clear(self) -> None:
        if self.shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
