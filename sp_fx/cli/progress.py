"""Progress on the terminal: a bar over many equal things, and the stages of one long thing."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LINE = 15.0  # seconds between lines where there is no terminal to draw on


class Progress:
    """A bar on stderr, where that is a terminal and there are several things to do; `say` prints lines above it.

    With `always`, a line every 15 seconds where it is no terminal.
    """

    def __init__(self, total: int, things: str = "", always: bool = False) -> None:
        self.total, self.done, self.started = total, 0, time.perf_counter()
        self.shown = total > 1 and sys.stderr.isatty()
        self.things, self.lines = things, always and not self.shown
        self.begun, self.said = 0, self.started  # what was there at the first look, and when a line was printed
        self._draw()

    def say(self, line: str, file: Any = None) -> None:
        self._clear()
        print(line, file=file or sys.stdout, flush=True)  # whoever reads it, reads on
        self._draw()

    def advance(self, count: int) -> None:
        if not self.done and time.perf_counter() - self.started < 0.1:
            self.begun = count if self.lines or self.things else 0
        self.done += count
        self._draw()

    def end(self) -> None:
        self._clear()

    def _left(self) -> str:
        now, spent = self.done - self.begun, time.perf_counter() - self.started
        return f", {spent / now * (self.total - self.done):.0f} s left" if now > 0 else ""

    def _draw(self) -> None:
        if self.shown:
            filled = 30 * self.done // self.total
            print(f"\r[{'#' * filled:30}] {self.done}/{self.total}{self._left()}\033[K", end="", file=sys.stderr, flush=True)
        elif self.lines and time.perf_counter() - self.said > LINE:
            self.said = time.perf_counter()
            print(f"sp-fx: {self.done} of {self.total} {self.things}{self._left()}", file=sys.stderr, flush=True)

    def _clear(self) -> None:
        if self.shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


class Stages:
    """The stages of one thing, on stderr: a line when one begins, with the seconds that are expected, and the seconds it took.

    `with stages("compile it", expected=40): ...`. On a terminal the seconds count; elsewhere a line is printed every 15 seconds.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet, self.started, self.terminal = quiet, time.perf_counter(), sys.stderr.isatty()

    @contextmanager
    def __call__(self, what: str, expected: float | None = None) -> Iterator[None]:
        if self.quiet:
            yield
            return
        about = f" (about {human(expected)})" if expected else ""

        def spent() -> str:
            seconds = time.perf_counter() - started
            late = ", longer than expected" if expected and seconds > 1.5 * expected else ""
            return f"{seconds:.0f} s{late}"

        started, ended = time.perf_counter(), threading.Event()

        def count() -> None:
            while not ended.wait(1.0 if self.terminal else LINE):
                if self.terminal:
                    print(f"\rsp-fx: {what}{about} ... {spent()}\033[K", end="", file=sys.stderr, flush=True)
                else:
                    print(f"sp-fx: ... {spent()} so far{about}", file=sys.stderr, flush=True)

        print(f"sp-fx: {what}{about} ...", end="" if self.terminal else "\n", file=sys.stderr, flush=True)
        counting = threading.Thread(target=count, daemon=True)
        counting.start()
        try:
            yield
        except BaseException:
            if self.terminal:
                print(file=sys.stderr)
            raise
        finally:
            ended.set()
            counting.join()
        seconds = f"{time.perf_counter() - started:.1f} s"
        line = f"\rsp-fx: {what}: {seconds}\033[K" if self.terminal else f"sp-fx:     {seconds}"
        print(line, file=sys.stderr, flush=True)

    def end(self, line: str) -> None:
        if not self.quiet:
            print(f"{line} ({human(time.perf_counter() - self.started)} in all)")


def human(seconds: float) -> str:
    """Returns a duration as people say it: 40 s, 3 min."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
